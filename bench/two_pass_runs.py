"""One model under the clock: questions through the engine in its three modes, through stock
``generate`` and through ``voco_model.generate``; and what they should answer."""

from __future__ import annotations

import gc
import hashlib
import random
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import voco_model
from bench import kv_clock, timing
from bench import two_pass_models as models
from bench.two_pass_models import Spec
from bench.two_pass_report import STAGES
from voco_model import flops
from voco_model.kv_store.memory_store import MemoryStore
from voco_model.vlm.attach import attach
from voco_model.vlm.prompt import IMAGE_TOKEN, image_part

FINGERPRINT = "bench"
# Host time that a request's stages are kept clear of, in ms: the device is busy with something else
# while they are enqueued.
_COVERED_MS = 10.0


class WrongError(RuntimeError):
    """An answer that isn't what it should be: nothing is timed."""


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        repeats: of a row, at least; a stream is repeated a third as often.
        seconds: a row is repeated until these are spent, too, but no more than four times as often.
        compared: pictures whose answers are compared before anything is timed.
        requests: of a stream.
    """

    repeats: int
    seconds: float
    compared: int
    requests: int


FULL = {"cuda": Effort(12, 1.0, 8, 32), "cpu": Effort(6, 3.0, 2, 16)}
QUICK = {"cuda": Effort(3, 0.0, 2, 8), "cpu": Effort(2, 0.0, 1, 4)}


@dataclass(frozen=True)
class Reference:
    """What a picture's question is answered with.

    Attributes:
        tokens: by ``generate``.
        logits: float32 ``[vocabulary]`` of the first of them.
    """

    tokens: list[int]
    logits: Tensor


@dataclass
class References:
    """By ``generate``, picture by picture.

    Attributes:
        noise: by how much a first token's logits differ, at most, between two routes that are both
            exact, and no less than one rounding of the largest; None where the second route failed, for
            ``reason``.
    """

    answers: list[Reference]
    noise: float | None
    reason: str = ""


@dataclass
class Asked:
    """One run of a batch: times in milliseconds.

    Attributes:
        stages: of the device on CUDA, until the first token.
        decode: of each decoding step.
        first, whole: on the host's clock, from the first request until each has its first, its last
            token.
    """

    stages: dict[str, float]
    decode: list[float]
    first: float
    whole: float
    answers: list[voco_model.Answer] = field(default_factory=list)


class Subject:
    """A model, and how to ask it.

    Args:
        spec: of the model, whose weights are made here.
        device, dtype: of the weights.
        text_tokens: of a question.
        new_tokens: of an answer.
        max_batch: the largest that will be measured.
        store_bytes: for the store of entries.
        effort: how much is measured.

    Attributes:
        image_tokens: vision tokens of a picture.
        store: of entries; those of ``keep`` stay in it.

    Raises:
        torch.OutOfMemoryError: the model doesn't fit.
    """

    def __init__(
        self,
        spec: Spec,
        device: torch.device,
        dtype: torch.dtype,
        *,
        text_tokens: int,
        new_tokens: int,
        max_batch: int,
        store_bytes: int,
        effort: Effort,
    ) -> None:
        self.spec, self.device, self.effort = spec, device, effort
        self.text_tokens, self.new_tokens, self.max_batch = text_tokens, new_tokens, max_batch
        self.processor = models.build_processor(spec)
        config = models.build_config(spec, self.processor.tokenizer)
        self.model = models.build_model(config, device, dtype, std=spec.std)
        tokenizer = self.processor.tokenizer
        self._bytes = range(len(tokenizer) - 256, len(tokenizer))
        # No answer ends early, or has a token that stands for an image: <VoCo> will be the next id.
        special = [*range(self._bytes.start), len(tokenizer)]
        self.model.generation_config.suppress_tokens = special
        self._exact = dtype == torch.float32
        self._pictures: dict[int, object] = {}
        self._flush = timing.Flush(device) if device.type == "cuda" else None
        self.image_tokens = int(self.plain_inputs([0])["input_ids"].shape[1]) - 1 - text_tokens
        self.store = MemoryStore(store_bytes, fingerprint=FINGERPRINT)
        self._kept: set[str] = set()
        self._fresh = 0
        self._warm: weakref.ref | None = None  # the engine must go when its rows are done

    def enable(self) -> None:
        """From now on the model knows VoCo tokens, and stock ``generate`` isn't stock any more."""
        attach(self.model, self.processor, 1)

    def facts(self) -> dict:
        """What a record says of the model."""
        text = self.model.config.text_config
        parameters = list(self.model.parameters())
        return {
            "vision_tokens": self.image_tokens,
            "tiles": models.tiles_of(self.spec),
            "text_tokens": self.text_tokens,
            "num_layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "num_heads": text.num_attention_heads,
            "num_kv_heads": text.num_key_value_heads,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "weight_bytes": sum(parameter.nbytes for parameter in parameters),
            "language_bytes": models.language_bytes(self.model),
        }

    # ---- what is asked

    def picture(self, number: int):
        """There are eight, which is enough: images are told apart by their keys."""
        number %= 8
        if number not in self._pictures:
            self._pictures[number] = models.picture(self.spec, number)
        return self._pictures[number]

    def question(self, number: int) -> list[int]:
        """Ids of a text of bytes."""
        return random.Random(number).choices(self._bytes, k=self.text_tokens)

    def fresh(self) -> int:
        """A number that no picture had before."""
        self._fresh += 1
        return 1000 + self._fresh

    def key(self, number: int, variant: str) -> str:
        return hashlib.sha256(f"{variant} {number}".encode()).hexdigest()

    def request(self, picture: int, question: int, key: str) -> voco_model.Request:
        sampling = voco_model.Sampling(max_new_tokens=self.new_tokens, ignore_eos=True)
        return voco_model.Request(self.picture(picture), self.question(question), sampling, [key])

    def plain_inputs(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """For a plain LLaVA's ``generate``: one picture and its question a row."""
        return self._inputs(numbers, IMAGE_TOKEN)

    def _inputs(self, numbers: Sequence[int], front: str) -> dict[str, Tensor]:
        made = self.processor(
            images=[self.picture(number) for number in numbers],
            text=[front] * len(numbers),
            return_tensors="pt",
        )
        text = torch.tensor([self.question(number) for number in numbers])
        made["input_ids"] = torch.cat([made["input_ids"], text], dim=1)
        made["attention_mask"] = torch.ones_like(made["input_ids"])
        return {
            name: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in made.items()
        }

    # ---- what should be answered

    def plain_references(self) -> References:
        """By stock ``generate``, one row at a time and, for the noise, all rows together."""
        numbers = range(self.effort.compared)
        answers = [self._generated(self.plain_inputs([number]))[0] for number in numbers]
        try:
            together = self._generated(
                self.plain_inputs([*numbers, *numbers][: max(2, len(numbers))])
            )
        except Exception as error:  # the answers alone still say something
            return References(answers, None, timing.first_line(error))
        return References(answers, self._noise(answers, together))

    def voco_references(self, num_voco: int) -> References:
        """By ``voco_model.generate`` and, for the noise, by one masked pass over the whole prompt."""
        numbers = list(range(self.effort.compared))
        entries = voco_model.compress(
            self.model,
            [self.picture(number) for number in numbers],
            processor=self.processor,
            num_voco=num_voco,
        )
        answers = []
        for number, entry in zip(numbers, entries, strict=True):
            output = voco_model.generate(
                self.model,
                entry,
                torch.tensor([self.question(number)], device=self.device),
                **self._options(self.new_tokens),
            )
            answers.append(Reference(output.sequences[0].tolist(), output.logits[0][0].float()))
        try:
            one_pass = [
                Reference([], self._masked_logits(self._inputs([number], image_part(num_voco))))
                for number in numbers
            ]
        except Exception as error:  # the answers alone still say something
            return References(answers, None, timing.first_line(error))
        return References(answers, self._noise(answers, one_pass))

    def _noise(self, first: Sequence[Reference], second: Sequence[Reference]) -> float:
        rounding = torch.finfo(self.model.dtype).eps
        pairs = list(zip(first, second, strict=False))
        apart = [(one.logits - other.logits).abs().max() for one, other in pairs]
        rounded = [rounding * one.logits.abs().max() for one, _ in pairs]
        return float(max(*apart, *rounded))

    @torch.no_grad()
    def _masked_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs, logits_to_keep=1).logits[0, -1].float()

    def _generated(self, inputs: dict[str, Tensor]) -> list[Reference]:
        output = self.model.generate(**inputs, **self._options(self.new_tokens))
        length = inputs["input_ids"].shape[1]
        return [
            Reference(row[length:].tolist(), logits.float())
            for row, logits in zip(output.sequences, output.logits[0], strict=True)
        ]

    def _options(self, new_tokens: int) -> dict:
        return dict(
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    # ---- engines

    def engine(self, mode: str, num_voco: int, compiled: bool) -> voco_model.TwoPassEngine:
        in_front = num_voco if mode == "voco" else self.image_tokens + 16  # BOS, and some to spare
        return voco_model.TwoPassEngine(
            self.model,
            self.processor,
            None if mode == "uncached" else self.store,
            mode=mode,
            max_batch=self.max_batch,
            max_images=self.max_batch,
            max_new_tokens=self.new_tokens,
            max_prompt_tokens=in_front + self.text_tokens,
            num_voco=num_voco or None,
            fingerprint=FINGERPRINT,
            compiled=compiled,
            profile=True,
        )

    def keep(self, engine: voco_model.TwoPassEngine, variant: str) -> int:
        """Puts the entries of as many pictures as a batch has into the store, if they aren't there; an
        entry's bytes."""
        numbers = range(self.max_batch)
        keys = [self.key(number, variant) for number in numbers]
        entries = engine.compress([self.picture(number) for number in numbers], keys=keys)
        engine.flush()
        self._kept |= set(self.store)
        return entries[0].nbytes

    def forget(self, engine: voco_model.TwoPassEngine) -> None:
        """Drops what was put since ``keep``."""
        engine.flush()
        for key in set(self.store) - self._kept:
            self.store.delete(key)

    def compare(
        self, engine: voco_model.TwoPassEngine, references: References, variant: str
    ) -> dict:
        """How far the engine's answers are those of ``generate``: with new images and, where there is a
        store, again from there.

        In float32 every token must be the same. In 16 bits a likeliest token may change; the one that
        the engine took must then be as good as the noise allows: its logit in ``generate`` is below the
        largest by no more than twice what two exact routes differ by.

        Raises:
            WrongError: they are not.
        """
        numbers = range(len(references.answers))
        pairs = []
        for stored in (False, True) if engine.store is not None else (False,):
            asked = self.ask(
                engine, [self.request(n, n, self.key(n, f"{variant} compared")) for n in numbers]
            )
            engine.flush()
            _check_found(asked, len(numbers) if stored else 0)
            pairs += zip(asked.answers, references.answers, strict=True)
        same = [
            ours == theirs
            for answer, expected in pairs
            for ours, theirs in zip(answer.tokens, expected.tokens, strict=True)
        ]
        gaps = [
            float(self._written(expected.logits).max() - expected.logits[answer.tokens[0]])
            for answer, expected in pairs
        ]
        found = {
            "tokens": len(same),
            "identical": sum(same),
            "first_identical": sum(
                answer.tokens[0] == expected.tokens[0] for answer, expected in pairs
            ),
            "answers": len(pairs),
            "gap": max(gaps),
            "noise": references.noise,
            "noise_reason": references.reason,
        }
        if self._exact and not all(same):
            raise WrongError(
                f"expected the tokens of generate, got {found['identical']} of {len(same)} alike"
            )
        if references.noise is not None and found["gap"] > 2 * references.noise:
            raise WrongError(
                f"expected first tokens within twice the noise {references.noise:.3g} of the likeliest, "
                f"got one {found['gap']:.3g} below it"
            )
        return found

    def _written(self, logits: Tensor) -> Tensor:
        """Without the tokens that are never written."""
        logits = logits.clone()
        logits[self.model.generation_config.suppress_tokens] = -torch.inf
        return logits

    def ask(
        self,
        engine: voco_model.TwoPassEngine,
        requests: Sequence[voco_model.Request],
        *,
        covered: bool = False,
    ) -> Asked:
        """Have a batch of requests answered together.

        Args:
            covered: on CUDA, keep the device busy while the host enqueues, so that the stages hold none
                of the host's time; ``first`` and ``whole`` are then of no use.

        Raises:
            RequestError: one of them failed.
        """
        while engine.step():  # what is left of the batch before
            pass
        engine.stage_seconds()
        self.synchronize()
        started = time.perf_counter()
        tickets = [engine.submit(request) for request in requests]
        if covered and self._flush is not None:
            for _ in range(self._flush.repeats_covering(_COVERED_MS)):
                self._flush()
        answers = [ticket.result() for ticket in tickets]
        whole = time.perf_counter() - started
        seconds = engine.stage_seconds()
        decode = [1e3 * each for each in seconds.pop("decode", [])]
        return Asked(
            {stage: 1e3 * sum(times) for stage, times in seconds.items()},
            decode[: max(len(answer.tokens) for answer in answers) - 1],
            1e3 * max(answer.seconds_to_first for answer in answers),
            1e3 * whole,
            answers,
        )

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # ---- rows

    def answer_row(
        self,
        engine: voco_model.TwoPassEngine,
        *,
        batch: int,
        num_voco: int,
        new_images: bool,
        variant: str,
    ) -> dict:
        """Times of a batch until its first tokens, stage by stage, and of each token behind."""
        stored = engine.mode != "uncached" and not new_images
        cache_bytes = 0
        if engine.mode != "uncached":
            cache_bytes = self.keep(engine, variant)

        def once(covered: bool) -> Asked:
            pictures = [n if stored else self.fresh() for n in range(batch)]
            requests = [
                self.request(picture, n, self.key(picture, variant))
                for n, picture in enumerate(pictures)
            ]
            asked = self.ask(engine, requests, covered=covered)
            _check_found(asked, batch if stored else 0)
            return asked

        setup = []

        def all_repeats() -> tuple[list[Asked], list[Asked]]:
            for _ in range(2):  # graphs are recorded here, and layers compiled
                setup.append(once(False).whole)
            on_host, on_device = [], []
            for _ in self._repeats():
                on_host.append(once(False))
                if self._flush is not None:
                    on_device.append(once(True))
            return on_host, on_device or on_host

        (on_host, on_device), peak = self._with_peak(all_repeats)
        self.forget(engine)
        stages = {
            stage: kv_clock.summary([asked.stages[stage] for asked in on_device])
            for stage in STAGES
            if stage in on_device[0].stages
        }
        row = {
            "stages": stages,
            "device": kv_clock.summary([sum(asked.stages.values()) for asked in on_device]),
            "wall": kv_clock.summary([asked.first for asked in on_host]),
            "prompt_tokens": on_host[0].answers[0].prompt_tokens,
            "cache_bytes": cache_bytes,
            "peak_bytes": peak,
            "kv_bytes": engine.stats().cache_bytes,
            "setup_s": 1e-3 * setup[0],
            "flops": self._flops(engine.mode, num_voco, new_images),
        }
        steps = [each for asked in on_device for each in asked.decode]
        if steps:
            row["decode"] = kv_clock.summary(steps)
            behind = [asked.whole - asked.first for asked in on_host]
            row["tokens_per_s"] = _rate(batch * (self.new_tokens - 1), behind)
        return row

    def generate_row(self, batch: int) -> dict:
        """Stock Transformers on the plain prompt."""
        inputs = self.plain_inputs(range(batch))
        row = self._generate_times(
            batch,
            lambda new: self.model.generate(**inputs, max_new_tokens=new, do_sample=False),
        )
        return row | {"cache_bytes": 0, "flops": self._flops("uncached", 0, False)}

    def voco_generate_row(
        self, engine: voco_model.TwoPassEngine, *, batch: int, num_voco: int, variant: str
    ) -> dict:
        """``voco_model.generate`` from stored entries."""
        cache_bytes = self.keep(engine, variant)
        keys = [self.key(number, variant) for number in range(batch)]
        text = torch.tensor([self.question(n) for n in range(batch)], device=self.device)

        def generate(new: int) -> Tensor:
            return voco_model.generate(
                self.model, self.store.get_many(keys), text, max_new_tokens=new, do_sample=False
            )

        row = self._generate_times(batch, generate)
        return row | {
            "cache_bytes": cache_bytes,
            "flops": self._flops("voco", num_voco, False),
        }

    def _generate_times(self, batch: int, generate: Callable[[int], Tensor]) -> dict:
        def timed(new: int) -> float:
            self.synchronize()
            started = time.perf_counter()
            made = generate(new)
            self.synchronize()
            elapsed = time.perf_counter() - started
            del made
            return 1e3 * elapsed

        def all_repeats() -> tuple[list[float], list[float]]:
            timed(1)
            timed(self.new_tokens)
            pairs = [(timed(1), timed(self.new_tokens)) for _ in self._repeats()]
            return [one for one, _ in pairs], [whole - one for one, whole in pairs]

        (first, behind), peak = self._with_peak(all_repeats)
        row = {"wall": kv_clock.summary(first), "peak_bytes": peak}
        if self.new_tokens > 1:
            row["tokens_per_s"] = _rate(batch * (self.new_tokens - 1), behind)
        return row

    def stream_row(self, engine: voco_model.TwoPassEngine, share: float, variant: str) -> dict:
        """Answers a second of a stream of requests, of whose images a share came before."""
        count = self.effort.requests
        repeats = max(1, self.effort.repeats // 3)

        def once() -> tuple[float, int]:
            numbers = stream(count, share)
            new = {number: self.fresh() for number in dict.fromkeys(numbers)}
            requests = []
            for index, number in enumerate(numbers):
                # A plain LLaVA knows no image again.
                known = self.fresh() if engine.mode == "uncached" else new[number]
                requests.append(self.request(number, index, self.key(known, variant)))
            while engine.step():
                pass
            self.synchronize()
            started = time.perf_counter()
            answers = engine.answer_many(requests)
            elapsed = time.perf_counter() - started
            for answer in answers:
                if answer.error is not None:
                    raise answer.error
            self.forget(engine)
            return elapsed, sum(answer.from_store for answer in answers)

        if self._warm is None or self._warm() is not engine:
            engine.warmup(text_tokens=(self.text_tokens,))
            self._warm = weakref.ref(engine)
        once()
        read_before = engine.stats().images_read
        runs, peak = self._with_peak(lambda: [once() for _ in range(repeats)])
        engine.stage_seconds()
        return {
            "wall": kv_clock.summary([1e3 * elapsed for elapsed, _ in runs]),
            "answers_per_s": _rate(count, [1e3 * elapsed for elapsed, _ in runs]),
            "requests": count,
            "images_read": (engine.stats().images_read - read_before) / repeats,
            "peak_bytes": peak,
        }

    def generate_stream_row(self) -> dict:
        """The same requests through stock ``generate``, a full batch at a time. It knows no image
        again, so one share stands for all."""
        count, batch = self.effort.requests, self.max_batch
        repeats = max(1, self.effort.repeats // 3)

        def once() -> float:
            self.synchronize()
            started = time.perf_counter()
            for start in range(0, count, batch):
                inputs = self.plain_inputs(range(start, min(start + batch, count)))
                self.model.generate(**inputs, max_new_tokens=self.new_tokens, do_sample=False)
            self.synchronize()
            return 1e3 * (time.perf_counter() - started)

        once()
        runs, peak = self._with_peak(lambda: [once() for _ in range(repeats)])
        return {
            "wall": kv_clock.summary(runs),
            "answers_per_s": _rate(count, runs),
            "requests": count,
            "images_read": count,
            "peak_bytes": peak,
        }

    def _repeats(self) -> Iterator[int]:
        finish = time.monotonic() + self.effort.seconds
        for index in range(4 * self.effort.repeats):
            if index >= self.effort.repeats and time.monotonic() > finish:
                return
            yield index

    def _flops(self, mode: str, num_voco: int, new_images: bool) -> dict[str, dict[str, int]]:
        """By stage, of one request."""
        config, tiles = self.model.config, models.tiles_of(self.spec)
        plain = 1 + self.image_tokens  # and BOS
        parts = {}
        if mode == "uncached":
            parts["vision"] = flops.see(config, tiles)
            parts["prefill"] = flops.first_token(config, plain + self.text_tokens)
        elif mode == "full_cache":
            parts["prefill"] = flops.first_token(config, self.text_tokens, plain)
        else:
            if new_images:
                parts["vision"] = flops.see(config, tiles)
                parts["prefix"] = flops.language(config, plain + 1 + num_voco)  # and the newline
            parts["prefill"] = flops.first_token(config, self.text_tokens, num_voco)
        return {stage: {"useful": part.useful, "full": part.full} for stage, part in parts.items()}

    def _with_peak(self, function: Callable[[], object]) -> tuple[object, int | None]:
        """What it returns, and the most device memory that was taken meanwhile, weights included."""
        gc.collect()
        if self.device.type != "cuda":
            return function(), None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        returned = function()
        torch.cuda.synchronize()
        return returned, torch.cuda.max_memory_allocated(self.device)


def stream(count: int, share: float) -> list[int]:
    """Numbers of the images of a stream: as near as can be, ``share`` of them came before."""
    draw = random.Random(0)
    numbers: list[int] = []
    for index in range(count):
        new = len(set(numbers))
        fresh = new < max(1, round((1 - share) * (index + 1)))
        numbers.append(new if fresh else draw.randrange(new))
    return numbers


def _check_found(asked: Asked, expected: int) -> None:
    """What is timed must be what it is called."""
    found = sum(answer.from_store for answer in asked.answers)
    if found != expected:
        raise RuntimeError(f"expected {expected} images from the store, got {found}")


def _rate(amount: int, milliseconds: Sequence[float]) -> float:
    """Median, a second."""
    _, p50, _ = timing.quantiles(list(milliseconds))
    return 1e3 * amount / p50
