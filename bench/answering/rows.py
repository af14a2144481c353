"""The rows of bench/two_pass.py: a model's answers and streams, timed."""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import voco_model
from bench.answering.questions import STAGES
from bench.answering.subject import Asked, Subject, check_found
from bench.harness.clock import quantiles, summary


def answer_row(
    subject: Subject,
    engine: voco_model.TwoPassEngine,
    *,
    batch: int,
    num_voco: int,
    new_images: bool,
    variant: str,
) -> dict:
    """Times of a batch until its first tokens, stage by stage, and of each further token."""
    stored = engine.mode != "uncached" and not new_images
    cache_bytes = 0
    if engine.mode != "uncached":
        cache_bytes = subject.keep(engine, variant)

    def once(covered: bool) -> Asked:
        pictures = [n if stored else subject.fresh() for n in range(batch)]
        requests = [
            subject.request(picture, n, subject.key(picture, variant))
            for n, picture in enumerate(pictures)
        ]
        asked = subject.ask(engine, requests, covered=covered)
        check_found(asked, batch if stored else 0)
        return asked

    setup = []

    def all_repeats() -> tuple[list[Asked], list[Asked]]:
        for _ in range(2):  # graphs are recorded here, and layers compiled
            setup.append(once(False).whole)
        on_host, on_device = [], []
        for _ in _repeats(subject):
            on_host.append(once(False))
            if subject.flush is not None:
                on_device.append(once(True))
        return on_host, on_device or on_host

    (on_host, on_device), peak = _with_peak(subject, all_repeats)
    subject.forget(engine)
    stages = {
        stage: summary([asked.stages[stage] for asked in on_device])
        for stage in STAGES
        if stage in on_device[0].stages
    }
    row = {
        "stages": stages,
        "device": summary([sum(asked.stages.values()) for asked in on_device]),
        "wall": summary([asked.first for asked in on_host]),
        "prompt_tokens": on_host[0].answers[0].prompt_tokens,
        "cache_bytes": cache_bytes,
        "peak_bytes": peak,
        "kv_bytes": engine.stats().cache_bytes,
        "setup_s": 1e-3 * setup[0],
        "flops": subject.flops_by_stage(engine.mode, num_voco, new_images),
    }
    steps = [each for asked in on_device for each in asked.decode]
    if steps:
        row["decode"] = summary(steps)
        behind = [asked.whole - asked.first for asked in on_host]
        row["tokens_per_s"] = _rate(batch * (subject.new_tokens - 1), behind)
    return row


def generate_row(subject: Subject, batch: int) -> dict:
    """Stock Transformers on the plain prompt."""
    inputs = subject.plain_inputs(range(batch))
    row = _generate_times(
        subject,
        batch,
        lambda new: subject.model.generate(**inputs, max_new_tokens=new, do_sample=False),
    )
    return row | {"cache_bytes": 0, "flops": subject.flops_by_stage("uncached", 0, False)}


def voco_generate_row(
    subject: Subject, engine: voco_model.TwoPassEngine, *, batch: int, num_voco: int, variant: str
) -> dict:
    """``voco_model.generate`` from stored entries."""
    cache_bytes = subject.keep(engine, variant)
    keys = [subject.key(number, variant) for number in range(batch)]
    text = torch.tensor([subject.question(n) for n in range(batch)], device=subject.device)

    def generate(new: int) -> Tensor:
        return voco_model.generate(
            subject.model, subject.store.get_many(keys), text, max_new_tokens=new, do_sample=False
        )

    row = _generate_times(subject, batch, generate)
    return row | {
        "cache_bytes": cache_bytes,
        "flops": subject.flops_by_stage("voco", num_voco, False),
    }


def _generate_times(subject: Subject, batch: int, generate: Callable[[int], Tensor]) -> dict:
    def timed(new: int) -> float:
        subject.synchronize()
        started = time.perf_counter()
        made = generate(new)
        subject.synchronize()
        elapsed = time.perf_counter() - started
        del made
        return 1e3 * elapsed

    def all_repeats() -> tuple[list[float], list[float]]:
        timed(1)
        timed(subject.new_tokens)
        pairs = [(timed(1), timed(subject.new_tokens)) for _ in _repeats(subject)]
        return [one for one, _ in pairs], [whole - one for one, whole in pairs]

    (first, behind), peak = _with_peak(subject, all_repeats)
    row = {"wall": summary(first), "peak_bytes": peak}
    if subject.new_tokens > 1:
        row["tokens_per_s"] = _rate(batch * (subject.new_tokens - 1), behind)
    return row


def stream_row(
    subject: Subject, engine: voco_model.TwoPassEngine, share: float, variant: str
) -> dict:
    """Answers per second in a stream of requests, of whose images a share came before."""
    count = subject.effort.requests
    repeats = max(1, subject.effort.repeats // 3)

    def once() -> tuple[float, int]:
        numbers = stream(count, share)
        new = {number: subject.fresh() for number in dict.fromkeys(numbers)}
        requests = []
        for index, number in enumerate(numbers):
            # A plain LLaVA remembers no image.
            known = subject.fresh() if engine.mode == "uncached" else new[number]
            requests.append(subject.request(number, index, subject.key(known, variant)))
        while engine.step():
            pass
        subject.synchronize()
        started = time.perf_counter()
        answers = engine.answer_many(requests)
        elapsed = time.perf_counter() - started
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        subject.forget(engine)
        return elapsed, sum(answer.from_store for answer in answers)

    if subject.warm is None or subject.warm() is not engine:
        engine.warmup(text_tokens=(subject.text_tokens,))
        subject.warm = weakref.ref(engine)
    once()
    read_before = engine.stats().images_read
    runs, peak = _with_peak(subject, lambda: [once() for _ in range(repeats)])
    engine.stage_seconds()
    return {
        "wall": summary([1e3 * elapsed for elapsed, _ in runs]),
        "answers_per_s": _rate(count, [1e3 * elapsed for elapsed, _ in runs]),
        "requests": count,
        "images_read": (engine.stats().images_read - read_before) / repeats,
        "peak_bytes": peak,
    }


def generate_stream_row(subject: Subject) -> dict:
    """The same requests through stock ``generate``, a full batch at a time. It remembers no
    image, so that one share is as good as another."""
    count, batch = subject.effort.requests, subject.max_batch
    repeats = max(1, subject.effort.repeats // 3)

    def once() -> float:
        subject.synchronize()
        started = time.perf_counter()
        for start in range(0, count, batch):
            inputs = subject.plain_inputs(range(start, min(start + batch, count)))
            subject.model.generate(**inputs, max_new_tokens=subject.new_tokens, do_sample=False)
        subject.synchronize()
        return 1e3 * (time.perf_counter() - started)

    once()
    runs, peak = _with_peak(subject, lambda: [once() for _ in range(repeats)])
    return {
        "wall": summary(runs),
        "answers_per_s": _rate(count, runs),
        "requests": count,
        "images_read": count,
        "peak_bytes": peak,
    }


def _repeats(subject: Subject) -> Iterator[int]:
    finish = time.monotonic() + subject.effort.seconds
    for index in range(4 * subject.effort.repeats):
        if index >= subject.effort.repeats and time.monotonic() > finish:
            return
        yield index


def _with_peak(subject: Subject, function: Callable[[], object]) -> tuple[object, int | None]:
    """What it returns, and the most device memory that was taken meanwhile, weights included."""
    gc.collect()
    if subject.device.type != "cuda":
        return function(), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(subject.device)
    returned = function()
    torch.cuda.synchronize()
    return returned, torch.cuda.max_memory_allocated(subject.device)


def stream(count: int, share: float) -> list[int]:
    """Numbers of a stream's images, of which as nearly as possible ``share`` came before."""
    draw = random.Random(0)
    numbers: list[int] = []
    for index in range(count):
        new = len(set(numbers))
        fresh = new < max(1, round((1 - share) * (index + 1)))
        numbers.append(new if fresh else draw.randrange(new))
    return numbers


def _rate(amount: int, milliseconds: Sequence[float]) -> float:
    """Median amount per second."""
    _, p50, _ = quantiles(list(milliseconds))
    return 1e3 * amount / p50
