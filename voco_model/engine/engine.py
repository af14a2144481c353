"""``TwoPassEngine``: the queue of requests, and what happens to it step by step."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from PIL import Image

from voco_kernels.kv import CompactKV
from voco_model.attach import is_enabled
from voco_model.engine.clock import StageClock
from voco_model.engine.first_pass import FirstPass, max_image_tokens, prepare_pixels
from voco_model.engine.images import ImageJob, Images
from voco_model.engine.language import Language
from voco_model.engine.plan import ImageSlot, Plan, plan_prompt
from voco_model.engine.programs import length_bucket
from voco_model.engine.request import Answer, Request, RequestError, Sampling
from voco_model.engine.second_pass import Prompt, SecondPass
from voco_model.engine.ticket import Ticket
from voco_model.fingerprint import fingerprint as fingerprint_of
from voco_model.image_key import image_key
from voco_model.kv_store.base import Store
from voco_model.prompt import Turns, image_part

MODES = ("voco", "full_cache", "uncached")
# Options of a model's generation_config that the engine would ignore, and what they are when they do
# nothing.
_UNHEEDED = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None,),
    "guidance_scale": (None, 1.0),
    "num_beams": (None, 1),
}
# Requests that answer_many prepares ahead of those that are being answered.
_PREPARING_THREADS = 2


@dataclass
class EngineStats:
    """What an engine has done since it was made.

    Attributes:
        answered, failed: requests.
        images_read: by pass 1.
        images_from_store: that a request found there.
        put_failures: entries that the store didn't take.
        prefills, decode_steps: forward passes of pass 2.
        new_tokens: written.
        graphs: CUDA graphs recorded.
        cache_bytes: of the second pass's key/value cache.
    """

    answered: int = 0
    failed: int = 0
    images_read: int = 0
    images_from_store: int = 0
    put_failures: int = 0
    prefills: int = 0
    decode_steps: int = 0
    new_tokens: int = 0
    graphs: int = 0
    cache_bytes: int = 0


@dataclass(eq=False)
class _Work:
    """A request that waits or is being answered."""

    ticket: Ticket
    plan: Plan
    jobs: list[ImageJob]
    sampling: Sampling
    prompt_tokens: int = 0
    from_store: int = 0

    @property
    def ready(self) -> bool:
        return all(job.ready for job in self.jobs)


class TwoPassEngine:
    """Answers questions about images, many at a time; see ``docs/engine.md``.

    ::

        engine = TwoPassEngine(model, processor, store=KVStore(path, fingerprint=fingerprint(model)))
        engine.warmup()
        engine.answer(photograph, "What is in it?").text
        for piece in engine.stream(photograph, "And behind it?"):
            print(piece, end="")
        engine.answer_many([Request(a, "..."), Request([b, c], "...", Sampling(temperature=0.7))])

    An image's entry comes from the store, or pass 1 makes it: vision tower and prefix in batches, each
    image once however many ask. Pass 2 loads entries into the rows of one static cache, reads the text
    and decodes; a request joins while others decode and leaves when it is done. On CUDA each shape of
    work is a CUDA graph; batch sizes are powers of two and lengths are in buckets. On a CPU the same
    code runs without graphs.

    There is no thread behind it. Whoever waits for an answer drives the engine for all, under a lock:
    call it from as many threads as you like.

    Args:
        model: enabled, in eval mode, on one device.
        processor: the one given to ``enable``.
        store: of entries; None keeps nothing after the requests that asked.
        max_batch: requests that decode together, at most.
        max_new_tokens: of an answer, at most.
        dtype: to cast the model to, in place; None leaves it as it is.
        mode: "voco"; or, to compare with, a plain LLaVA by the same means: "full_cache" keeps the keys
            and values of all tokens of an image, "uncached" keeps nothing and reads the image for each
            question. Their prompts are the same but for the VoCo tokens.
        num_voco: VoCo tokens an image; by default the number given to ``enable``.
        max_prompt_tokens: slots of a prompt in the cache, at most: VoCo tokens (in the other modes all
            tokens of the image) and text. By default 512 beside the image's.
        max_images: images in one forward pass of pass 1.
        salt: of a tenant, for ``image_key``.
        fingerprint: of the model, where it is known already; by default told from its weights, if there
            is a store.
        graphs: record CUDA graphs; None where there is CUDA.
        compiled: send the layers through ``torch.compile``; None where there is CUDA.
        lag: decoding steps that the host may be behind the device; None is 2 on CUDA, 0 elsewhere.
        profile: time the stages; see ``stage_seconds``.

    Raises:
        TypeError, ValueError: a model that isn't enabled, is in training mode or lies on several
            devices, a generation option that the engine would ignore, or numbers out of range.
        torch.OutOfMemoryError: for the cache.
    """

    def __init__(
        self,
        model,
        processor,
        store: Store | None = None,
        *,
        max_batch: int = 8,
        max_new_tokens: int = 256,
        dtype: torch.dtype | None = None,
        mode: str = "voco",
        num_voco: int | None = None,
        max_prompt_tokens: int | None = None,
        max_images: int = 8,
        salt: str | bytes | None = None,
        fingerprint: str | None = None,
        graphs: bool | None = None,
        compiled: bool | None = None,
        lag: int | None = None,
        profile: bool = False,
    ) -> None:
        _check(model, processor, store, mode)
        for name, value in (
            ("max_batch", max_batch),
            ("max_new_tokens", max_new_tokens),
            ("max_images", max_images),
            ("num_voco", 1 if num_voco is None else num_voco),
            ("max_prompt_tokens", 1 if max_prompt_tokens is None else max_prompt_tokens),
            ("lag", 1 if lag is None else lag + 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"expected {name} >= 1, got {value!r}")
        if dtype is not None:
            model.to(dtype)
        on_gpu = model.device.type == "cuda"
        graphs = on_gpu if graphs is None else graphs
        if graphs and not on_gpu:
            raise ValueError(f"expected a model on CUDA for graphs, got one on {model.device}")
        self.model, self.processor, self.store, self.mode = model, processor, store, mode
        self.num_voco: int = model.config.num_voco if num_voco is None else num_voco
        self.max_batch, self.max_new_tokens = max_batch, max_new_tokens
        self._clock = StageClock(model.device, profile)
        language = Language(model, on_gpu if compiled is None else compiled)
        if fingerprint is None:
            fingerprint = "" if store is None else fingerprint_of(model)
        stop_ids = model.generation_config.eos_token_id
        self._stop_ids = [stop_ids] if isinstance(stop_ids, int) else list(stop_ids or ())
        self._image_slots = self.num_voco
        if mode != "voco":  # and BOS
            self._image_slots = max_image_tokens(model.config) + self._longest_tail()
        self.max_prompt_tokens = max_prompt_tokens or self._image_slots + 512
        self._second = SecondPass(
            language,
            rows=max_batch,
            slots=self.max_prompt_tokens + max_new_tokens,
            stop_ids=self._stop_ids,
            suppressed=model.generation_config.suppress_tokens or (),
            lag=(2 if on_gpu else 0) if lag is None else lag,
            graphs=graphs,
            clock=self._clock,
        )
        self._first = FirstPass(
            language,
            num_kept=self.num_voco if mode == "voco" else None,
            max_images=max_images,
            max_tail=self._longest_tail(),
            programs=self._second.programs,
            clock=self._clock,
            fingerprint=fingerprint,
        )
        self._images = Images(
            store,
            partial(image_key, model=model, processor=processor, num_voco=self.num_voco, salt=salt),
            partial(prepare_pixels, processor),
            "" if mode == "voco" else f" {mode}",
            fingerprint,
        )
        self._waiting: deque[_Work] = deque()
        self._lock = threading.RLock()
        self._stats = EngineStats(cache_bytes=self._second.cache.nbytes)
        self._closed = False

    # ---- questions

    def answer(
        self,
        images: Any,
        text: Turns | Sequence[int],
        *,
        keys: Sequence[str] | None = None,
        **sampling,
    ) -> Answer:
        """One answer. Arguments as in ``Request`` and ``Sampling``.

        Raises:
            RequestError: it can't be answered.
            ValueError: sampling options out of range.
        """
        return self.submit(Request(images, text, Sampling(**sampling), keys)).result()

    def stream(
        self,
        images: Any,
        text: Turns | Sequence[int],
        *,
        keys: Sequence[str] | None = None,
        **sampling,
    ) -> Iterator[str]:
        """As ``answer``, the text in pieces as it comes. Leave off early and the request is given up."""
        ticket = self.submit(Request(images, text, Sampling(**sampling), keys))
        try:
            yield from ticket
        finally:
            ticket.cancel()

    def answer_many(self, requests: Iterable[Request]) -> list[Answer]:
        """An answer a request, in their order. One that fails has an ``error``; the others go on."""
        remaining = iter(requests)
        tickets: list[Future[Ticket]] = []
        with ThreadPoolExecutor(_PREPARING_THREADS, "voco-prepare") as pool:
            exhausted = False
            finished = 0
            while not exhausted or finished < len(tickets):
                # What is prepared too early holds memory; too late, and the device waits.
                while not exhausted and len(tickets) - finished < 2 * self.max_batch:
                    request = next(remaining, None)
                    exhausted = request is None
                    if not exhausted:
                        tickets.append(pool.submit(self.submit, request))
                progressed = self.step()
                while finished < len(tickets) and _is_finished(tickets[finished]):
                    finished += 1
                if not progressed and finished < len(tickets):
                    time.sleep(0.0005)
        return [future.result().wait() for future in tickets]

    def submit(self, request: Request) -> Ticket:
        """Puts a request into the queue, to be answered when somebody drives the engine. Its images are
        decoded here, in the caller's thread.

        Raises:
            RuntimeError: a closed engine.
        """
        if self._closed:
            raise RuntimeError("expected an open engine, got one that was closed; make another")
        if not isinstance(request, Request):
            raise TypeError(f"expected a Request, got {type(request).__name__}")
        ticket = Ticket(self.step, self._decode)
        try:
            work = self._prepared(request, ticket)
        except RequestError as error:
            with self._lock:
                self._fail(ticket, error)
            return ticket
        with self._lock:
            self._waiting.append(work)
        return ticket

    def compress(self, images: Any, *, keys: Sequence[str] | None = None) -> list[CompactKV]:
        """Pass 1 of images, in batches: their entries, from the store or new, as each stands first in
        its prompt.

        Raises:
            RequestError: one of them can't be read.
            ValueError: in mode "uncached", which has no entries.
        """
        if self.mode == "uncached":
            raise ValueError(
                "expected mode 'voco' or 'full_cache', got 'uncached', without entries"
            )
        each = _as_list(images)
        slot = self._plan("", 1).images[0]
        jobs = [self._job(image, slot, 0, keys) for image, keys in _with_keys(each, keys)]
        while any(not job.ready for job in jobs):
            for job in jobs:
                if job.error is not None:
                    raise job.error
            with self._lock, torch.no_grad():
                progressed = self._read_images([job for job in jobs if job.missing])
            if not progressed:
                time.sleep(0.0005)
        return [job.entry for job in jobs]

    # ---- running

    def step(self) -> bool:
        """A little of everything: read images, let requests in, write one token each. Whether there was
        anything to do."""
        with self._lock, torch.no_grad():
            self._drop_cancelled()
            progressed = False
            if self._waiting and self._second.free_rows:
                missing = [job for work in self._waiting for job in work.jobs if job.missing]
                progressed |= self._read_images(missing)
                progressed |= self._let_in()
            if self._second.busy:
                progressed = True
                self._write()
            return progressed

    def warmup(
        self, *, batch_sizes: Sequence[int] | None = None, text_tokens: Sequence[int] | None = None
    ) -> int:
        """Runs shapes of work once, so that no request waits for their CUDA graphs to be recorded.

        Args:
            batch_sizes: by default the powers of two up to ``max_batch``.
            text_tokens: lengths of questions; by default 32, 64 and 128.

        Returns:
            graphs recorded by now. Shapes that weren't met are recorded when they are.
        """
        sizes = batch_sizes or [1 << i for i in range(self.max_batch.bit_length())]
        room = self.max_prompt_tokens - self._image_slots
        sampling = Sampling(max_new_tokens=min(2, self.max_new_tokens), ignore_eos=True, seed=0)
        for size in sizes:
            for length in text_tokens or (32, 64, 128):
                works = [self._blank_work(min(length, room), sampling) for _ in range(size)]
                with self._lock:
                    self._waiting.extend(works)
                for work in works:
                    work.ticket.result()
        return len(self._second.programs)

    def stage_seconds(self) -> dict[str, list[float]]:
        """With ``profile``: for each stage ("vision", "prefix", "extract", "load", "prefill", "decode")
        the seconds of each run since the last call; on CUDA the device's, by events."""
        return self._clock.read()

    def stats(self) -> EngineStats:
        with self._lock:
            return replace(
                self._stats,
                put_failures=self._images.put_failures,
                graphs=len(self._second.programs),
            )

    def flush(self) -> None:
        """Waits until the store has what pass 1 made."""
        self._images.flush()

    def close(self) -> None:
        """Fails what is still waiting, and flushes. The store stays open."""
        with self._lock:
            self._closed = True
            for work in [*self._waiting, *self._second.owners()]:
                work.ticket.cancel()
            self._drop_cancelled()
        self._images.close()

    def __enter__(self) -> TwoPassEngine:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    # ---- a request comes

    def _prepared(self, request: Request, ticket: Ticket) -> _Work:
        sampling = request.sampling or Sampling()
        new = sampling.max_new_tokens or self.max_new_tokens
        if new > self.max_new_tokens:
            raise RequestError(
                "prompt",
                f"expected max_new_tokens <= {self.max_new_tokens}, got {new}; make the engine "
                "with more",
            )
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        sampling = replace(sampling, max_new_tokens=new, seed=seed)
        images = _as_list(request.images)
        try:
            paired = list(_with_keys(images, request.keys))
            plan = self._plan(request.text, len(images))
        except (ValueError, TypeError, KeyError) as error:
            raise RequestError("prompt", str(error)) from error
        if len(images) > 1:
            self._check_several(len(images))
        if not plan.text:
            raise RequestError("prompt", "expected at least one token of text, got none")
        if self.mode == "voco":
            self._check_length(plan.num_text + self.num_voco * len(images))
        jobs = [
            self._job(image, slot, place, key)
            for place, ((image, key), slot) in enumerate(zip(paired, plan.images, strict=True))
        ]
        ticket.stop = sampling.stop
        found = sum(job.from_store for job in jobs)
        return _Work(ticket, plan, jobs, sampling, from_store=found)

    def _blank_work(self, length: int, sampling: Sampling) -> _Work:
        """A question of this many tokens about a black picture."""
        side = self.model.config.vision_config.image_size
        pixels = prepare_pixels(self.processor, Image.new("RGB", (side, side)))
        slot = self._plan("", 1).images[0]
        job = ImageJob("", slot, pixels, prepared=True)
        sampling = replace(sampling, max_new_tokens=sampling.max_new_tokens or self.max_new_tokens)
        text = (self.processor.tokenizer.pad_token_id or 0,) * max(length, 1)
        return _Work(Ticket(self.step, self._decode), Plan((slot,), text), [job], sampling)

    def _plan(self, text: Turns | Sequence[int], images: int) -> Plan:
        return plan_prompt(
            text,
            images,
            processor=self.processor,
            model=self.model,
            num_voco=self.num_voco if self.mode == "voco" else None,
        )

    def _job(self, image: Any, slot: ImageSlot, place: int, key: str | None) -> ImageJob:
        job = self._images.job(image, slot, first=place == 0, key=key)
        if job.from_store:
            self._stats.images_from_store += 1
            kept = job.entry.num_tokens
            if self.mode == "voco" and kept != self.num_voco:
                error = RequestError(
                    "store",
                    f"expected an entry with {self.num_voco} VoCo tokens, got one with {kept} under key "
                    f"{job.key}; tell different numbers of VoCo tokens apart in the keys",
                )
                self._images.fail(job, error)
                raise error
        return job

    def _check_several(self, images: int) -> None:
        if self.mode == "full_cache":
            raise RequestError(
                "prompt",
                f"expected one image in mode 'full_cache', got {images}; without a mask the keys of an "
                "image depend on the images before it",
            )
        if self.mode == "voco" and not getattr(self.model.config, "voco_isolated", False):
            raise RequestError(
                "prompt",
                f"expected one image, got {images} for a model whose images see one another; with "
                "enable(..., isolated=True) each has an entry of its own",
            )

    def _check_length(self, slots: int) -> None:
        if slots > self.max_prompt_tokens:
            raise RequestError(
                "prompt",
                f"expected a prompt of at most {self.max_prompt_tokens} tokens, got {slots}; "
                "shorten it, or make the engine with more max_prompt_tokens",
            )

    # ---- a step

    def _drop_cancelled(self) -> None:
        gone = [work for work in self._waiting if work.ticket.cancelled or work.ticket.done]
        for work in gone:
            self._waiting.remove(work)
        running = [work for work in self._second.owners() if work.ticket.cancelled]
        for work in running:
            self._second.leave(work)
        for work in [*gone, *running]:
            if not work.ticket.done:
                self._fail(work.ticket, RequestError("cancelled", "the request was given up"))

    def _read_images(self, missing: Sequence[ImageJob]) -> bool:
        """Pass 1 of the first of these, up to a batch; whether there were any."""
        batch = list(dict.fromkeys(missing))[: self._first.max_images]
        if not batch:
            return False
        try:
            self._read_batch(batch)
        except torch.OutOfMemoryError:
            for job in batch:  # one at a time may fit
                self._read_alone(job)
        except Exception:
            for job in batch:  # one bad image must not take the others along
                self._read_alone(job)
        return True

    def _read_alone(self, job: ImageJob) -> None:
        try:
            self._read_batch([job])
        except Exception as error:
            self._images.fail(job, _failure(error, "reading an image"))

    def _read_batch(self, batch: Sequence[ImageJob]) -> None:
        features = self._first.features([job.pixels for job in batch])
        if self.mode == "uncached":
            for job, feature in zip(batch, features, strict=True):
                job.features, job.pixels = feature.clone(), None
        else:
            entries = self._first.entries(features, [job.slot for job in batch])
            for job, entry in zip(batch, entries, strict=True):
                self._images.keep(job, entry)
        self._stats.images_read += len(batch)

    def _let_in(self) -> bool:
        """Give free rows to requests whose images are there, first come, first served."""
        chosen: list[tuple[_Work, Prompt]] = []
        for work in list(self._waiting):
            if len(chosen) == self._second.free_rows:
                break
            error = next((job.error for job in work.jobs if job.error is not None), None)
            try:
                if error is None and work.ready:
                    chosen.append((work, self._prompt(work)))
            except RequestError as raised:
                error = raised
            if error is not None:
                self._waiting.remove(work)
                self._fail(work.ticket, error)
        for work, _ in chosen:
            self._waiting.remove(work)
        by_kind = sorted(chosen, key=lambda pair: _kind(pair[1]))
        for _, group in groupby(by_kind, key=lambda pair: _kind(pair[1])):
            self._enter(list(group))
        return bool(chosen)

    def _enter(self, group: list[tuple[_Work, Prompt]]) -> None:
        try:
            self._second.enter([prompt for _, prompt in group])
            self._stats.prefills += 1
        except Exception as error:
            if len(group) == 1:
                self._fail(group[0][0].ticket, _failure(error, "reading the prompt"))
                return
            for pair in group:
                self._enter([pair])

    def _prompt(self, work: _Work) -> Prompt:
        sampling = work.sampling
        common = dict(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            ignore_eos=sampling.ignore_eos,
            owner=work,
        )
        if self.mode == "uncached" and work.jobs:
            features = self._first.join(
                [
                    piece
                    for job, slot in zip(work.jobs, work.plan.images, strict=True)
                    for piece in (slot.joint, slot.before, job.features, slot.behind)
                ]
                + [work.plan.text]
            )
            length = features.shape[0]
            work.prompt_tokens = length
            self._check_length(length)
            return Prompt(
                [0] * length,
                range(length),
                range(length),
                length,
                length,
                features=features,
                **common,
            )
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        entry_slots: list[int] = []
        entry_positions: list[int] = []
        slot = position = 0
        moved = False
        for job, place in zip(work.jobs, work.plan.images, strict=True):
            ids += place.joint
            slots += range(slot, slot + len(place.joint))
            positions += range(position, position + len(place.joint))
            slot, position = slot + len(place.joint), position + len(place.joint)
            entry_slots.append(slot)
            entry_positions.append(position + int(job.entry.positions[0]))
            moved |= position > 0
            slot, position = slot + job.entry.num_tokens, position + job.entry.next_position
        count = len(work.plan.text)
        ids += work.plan.text
        slots += range(slot, slot + count)
        positions += range(position, position + count)
        work.prompt_tokens = slot + count
        self._check_length(slot + count)
        return Prompt(
            ids,
            slots,
            positions,
            slot + count,
            position + count,
            entries=[job.entry for job in work.jobs],
            entry_slots=entry_slots,
            entry_positions=entry_positions if moved else None,
            **common,
        )

    def _write(self) -> None:
        try:
            self._second.step()
            self._stats.decode_steps += 1
        except Exception as error:
            failure = _failure(error, "decoding")
            for work in self._second.owners():
                self._second.leave(work)
                self._fail(work.ticket, failure)
            return
        for work, token in self._second.arrived():
            if not work.ticket.done:
                self._take(work, token)

    def _take(self, work: _Work, token: int) -> None:
        ticket, sampling = work.ticket, work.sampling
        ticket.add(token)
        self._stats.new_tokens += 1
        ended = token in self._stop_ids and not sampling.ignore_eos
        if ended or ticket.stopped():
            reason = "stop"
        elif len(ticket.tokens) == sampling.max_new_tokens:
            reason = "length"
        else:
            return
        self._second.leave(work)
        ticket.finish(reason, prompt_tokens=work.prompt_tokens, from_store=work.from_store)
        self._stats.answered += 1

    def _fail(self, ticket: Ticket, error: RequestError) -> None:
        ticket.fail(error)
        self._stats.failed += 1

    def _decode(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)

    def _longest_tail(self) -> int:
        ids = self.processor.tokenizer(image_part(self.num_voco))["input_ids"]
        return len(ids)


def _check(model, processor, store, mode: str) -> None:
    if not is_enabled(model):
        raise ValueError(
            f"expected an enabled model, got a {type(model).__name__} that isn't; call "
            "voco_model.enable(model, processor) first"
        )
    if model.training:
        raise ValueError("expected a model in eval mode, got one in training; call model.eval()")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"expected a model on one device, got one on {sorted(map(str, devices))}; an engine drives "
            "one device: for several, run one engine on each, with one store"
        )
    if getattr(processor, "tokenizer", None) is None:
        raise TypeError(
            f"expected the processor that was given to enable, got {type(processor).__name__}"
        )
    if store is not None and not isinstance(store, Store):
        raise TypeError(
            f"expected a store or None, got {type(store).__name__}; open one with KVStore.open(url)"
        )
    if mode not in MODES:
        raise ValueError(f"expected mode to be one of {', '.join(MODES)}, got {mode!r}")
    for name, harmless in _UNHEEDED.items():
        value = getattr(model.generation_config, name, None)
        if value not in harmless:
            raise ValueError(
                f"expected no {name} in model.generation_config, got {value!r}, which the engine would "
                "not heed; set it to None, or use voco_model.generate"
            )


def _as_list(images: Any) -> list[Any]:
    """Images in a list: none, one, or each."""
    if images is None:
        return []
    single = isinstance(images, str) or hasattr(images, "shape") or not isinstance(images, Iterable)
    return [images] if single else list(images)


def _with_keys(images: list[Any], keys: Sequence[str] | None) -> list[tuple[Any, str | None]]:
    keys = [None] * len(images) if keys is None else [keys] if isinstance(keys, str) else list(keys)
    if len(keys) != len(images):
        raise ValueError(f"expected a key an image, got {len(keys)} for {len(images)} images")
    return list(zip(images, keys, strict=True))


def _kind(prompt: Prompt) -> tuple:
    """Prompts of one kind are read together."""
    moved = prompt.entry_positions is not None
    return (prompt.causal, prompt.features is not None, moved, length_bucket(len(prompt.slots)))


def _failure(error: Exception, doing: str) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        failure = RequestError(
            "memory",
            f"expected memory for {doing}, got {error}; make the engine with a smaller max_batch, "
            "max_images or max_prompt_tokens",
        )
    else:
        failure = RequestError(
            "internal", f"expected no error in {doing}, got {type(error).__name__}: {error}"
        )
    failure.__cause__ = error
    return failure


def _is_finished(ticket: Future[Ticket]) -> bool:
    return ticket.done() and ticket.result().done
