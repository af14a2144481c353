"""``TwoPassEngine``: answers many questions about images at a time."""

from __future__ import annotations

import time
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import repeat
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from voco_kernels.kv.entry import CompactKV
from voco_model.engine.checks import (
    cast,
    check_counts,
    check_parts,
    check_rotary,
    check_store,
    suppressed_ids,
)
from voco_model.engine.clock import StageClock
from voco_model.engine.first_pass import FirstPass, max_image_tokens, prepare_pixels
from voco_model.engine.image_job import ImageJob
from voco_model.engine.images import Images
from voco_model.engine.intake import Intake, as_list, naming, with_keys
from voco_model.engine.language import Language
from voco_model.engine.plan import Plan
from voco_model.engine.programs import bucket
from voco_model.engine.prompts import Work
from voco_model.engine.request import Answer, Request, RequestError, Sampling
from voco_model.engine.scheduler import EngineStats, Scheduler
from voco_model.engine.second_pass import SecondPass
from voco_model.engine.ticket import Ticket
from voco_model.engine.work_stream import WorkStream
from voco_model.kv_store.base import Store
from voco_model.pictures import PictureLimits, decode, ground_of
from voco_model.pictures.limits import check_limits
from voco_model.vlm.attach import check_ready
from voco_model.vlm.fingerprint import Unchanged
from voco_model.vlm.fingerprint import fingerprint as fingerprint_of
from voco_model.vlm.image_key import image_key
from voco_model.vlm.prompt import Turns, image_part

# Threads in which answer_many prepares requests while others are being answered.
_PREPARING_THREADS = 2
_IDLE_SECONDS = 0.0005
# Images whose pixels compress() holds in memory at a time.
_PREPARED_IMAGES = 64
_NO_MORE = object()


class TwoPassEngine:
    """Answers questions about images, many at a time; see ``docs/engine.md``.

    ::

        store = KVStore("entries", max_bytes=10**10, fingerprint=fingerprint(model))
        engine = TwoPassEngine(model, processor, store)
        engine.warmup()
        engine.answer(photograph, "What is in it?").text
        for piece in engine.stream(photograph, "And behind it?"):
            print(piece, end="")
        engine.answer_many([Request(a, "..."), Request([b, c], "...", Sampling(temperature=0.7))])

    An image's entry is taken from the store, or made by pass 1: vision tower and prefix in batches, once
    for all requests that need it. Pass 2 loads entries into the rows of one static cache, reads the text
    and decodes. Requests join and leave while others decode. On CUDA each shape of work is a CUDA graph;
    batch sizes are powers of two, and lengths are padded. On a CPU the same code runs without graphs.

    The engine has no thread of its own. A thread that waits for an answer drives the engine for all
    requests, under a lock. Call it from any number of threads.

    Don't change the model while the engine is in use: entries are identified by it, and CUDA graphs hold
    the addresses of its weights. After a change, such as another active adapter, requests are refused.
    Of its ``generation_config`` only ``eos_token_id`` and ``suppress_tokens`` are used; each request has
    its own sampling options.

    Args:
        model: enabled, in eval mode, on one device.
        processor: the one given to ``enable``.
        store: of entries. With None, an entry is dropped once the requests that need it are answered.
        max_batch: number of requests that can decode together.
        max_new_tokens: upper limit for an answer.
        dtype: casts the model, in place; None leaves it as it is.
        mode: "voco", or one of two baselines that run a plain LLaVA: "full_cache" keeps the keys and
            values of all tokens of an image, "uncached" keeps nothing and reads the image for each
            question. Their prompts differ only in having no VoCo tokens.
        num_voco: VoCo tokens per image; by default the number given to ``enable``.
        max_prompt_tokens: cache slots that a prompt may take, for VoCo tokens (in the other modes all
            tokens of the image) and text. By default 512 more than the image's.
        max_images: images in one forward pass of pass 1.
        salt: of a tenant, for ``image_key``. It doesn't affect keys given with requests.
        ground: red, green and blue, 0 to 255, of the background for transparent pixels; by default the
            one that the model was trained with, or white.
        limits: on the size of images.
        fingerprint: of the model, if you have it; by default computed from its weights, if there is a
            store.
        graphs: whether to record CUDA graphs; None records them on CUDA.
        compiled: whether to run layers through ``torch.compile``; None does so on CUDA.
        lag: number of decoding steps that the host may be behind the device; None is 2 on CUDA, else 0.
        profile: whether to time the stages; see ``stage_seconds``.

    Raises:
        TypeError, ValueError: a model that isn't enabled, is in training mode or is on several devices;
            a generation option that the engine would ignore; or numbers out of range.
        torch.OutOfMemoryError: for the cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
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
        ground: tuple[int, int, int] | None = None,
        limits: PictureLimits = PictureLimits(),  # noqa: B008 (frozen)
        fingerprint: str | None = None,
        graphs: bool | None = None,
        compiled: bool | None = None,
        lag: int | None = None,
        profile: bool = False,
    ) -> None:
        check_parts(model, processor, store, mode)
        check_counts(
            max_batch=max_batch,
            max_new_tokens=max_new_tokens,
            max_images=max_images,
            num_voco=num_voco,
            max_prompt_tokens=max_prompt_tokens,
        )
        check_limits(limits)
        check_rotary(model)
        suppressed = suppressed_ids(model)
        if lag is not None and (isinstance(lag, bool) or not isinstance(lag, int) or lag < 0):
            raise ValueError(f"expected an int lag >= 0, got {lag!r}")
        on_gpu = model.device.type == "cuda"
        graphs = on_gpu if graphs is None else graphs
        if graphs and not on_gpu:
            raise ValueError(
                f"expected a model on CUDA with graphs=True, got one on {model.device}; leave graphs out"
            )
        if dtype is not None:
            if not isinstance(dtype, torch.dtype):
                raise TypeError(
                    f"expected dtype as a torch.dtype, got {dtype!r}; pass torch.bfloat16, for example"
                )
            cast(model, dtype)
        # The computed one: a given fingerprint may differ from image_key's.
        self._keyed_by: str | None = None
        if fingerprint is None:
            self._keyed_by = None if store is None else fingerprint_of(model)
            fingerprint = self._keyed_by or ""
        check_store(store, fingerprint)
        self._unchanged = Unchanged(model, strict=store is not None)
        self.model, self.processor, self.store, self.mode = model, processor, store, mode
        self.num_voco = int(model.config.num_voco if num_voco is None else num_voco)
        self.max_batch, self.max_new_tokens = max_batch, max_new_tokens
        # Upper limit on the ids around an image in its segment: BOS, newline, VoCo tokens.
        around = len(processor.tokenizer(image_part(self.num_voco))["input_ids"])
        self._image_slots = self.num_voco
        if mode != "voco":
            self._image_slots = max_image_tokens(model.config) + around
        self.max_prompt_tokens = max_prompt_tokens or self._image_slots + 512
        eos = model.generation_config.eos_token_id
        stop_ids = [eos] if isinstance(eos, int) else list(eos or ())
        self._clock = StageClock(model.device, profile)
        language = Language(model, on_gpu if compiled is None else compiled)
        self._second = SecondPass(
            language,
            rows=max_batch,
            slots=self.max_prompt_tokens + max_new_tokens,
            stop_ids=stop_ids,
            suppressed=suppressed,
            lag=(2 if on_gpu else 0) if lag is None else lag,
            graphs=graphs,
            clock=self._clock,
        )
        first = FirstPass(
            language,
            num_kept=self.num_voco if mode == "voco" else None,
            max_images=max_images,
            max_tail=around,
            programs=self._second.programs,
            clock=self._clock,
            fingerprint=fingerprint,
        )
        pictures: dict[str, Any] = {"ground": ground_of(model.config, ground), "limits": limits}
        key_of = partial(
            image_key,
            model=model,
            processor=processor,
            num_voco=self.num_voco,
            salt=salt,
            **pictures,
        )
        self._images = Images(
            store,
            partial(decode, processor=processor, **pictures),
            partial(self._key, key_of),
            partial(prepare_pixels, processor, **pictures),
            "" if mode == "voco" else f" {mode}",
            fingerprint,
            num_tokens=self.num_voco if mode == "voco" else None,
            shared=mode != "uncached",
        )
        self._intake = Intake(
            model,
            processor,
            self._images,
            mode=mode,
            num_voco=self.num_voco,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
        )
        self._scheduler = Scheduler(
            first,
            self._second,
            self._images,
            keeps_entries=mode != "uncached",
            max_prompt_tokens=self.max_prompt_tokens,
            stop_ids=stop_ids,
            on_stream=WorkStream(model.device),
            device=model.device,
            check_model=self._unchanged.check,
        )
        if on_gpu:  # the work above was launched on another stream
            torch.cuda.synchronize(model.device)
        self._closed = False

    # ---- questions

    def answer(
        self,
        images: Any,
        text: Turns | Sequence[int],
        *,
        keys: Sequence[str] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Answers one question. Arguments as for ``Request`` and ``Sampling``.

        Raises:
            RequestError: it can't be answered.
            TypeError, ValueError: unknown sampling options, or ones out of range.
        """
        ticket = self.submit(Request(images, text, Sampling(**sampling), keys))
        try:
            return ticket.result()
        finally:
            ticket.cancel()  # frees the row if the wait was interrupted

    def stream(
        self,
        images: Any,
        text: Turns | Sequence[int],
        *,
        keys: Sequence[str] | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """As ``answer``, but yields the text in pieces as it is generated. Closing the iterator cancels
        the request."""
        return self._pieces(Request(images, text, Sampling(**sampling), keys))

    def answer_many(self, requests: Iterable[Request]) -> list[Answer]:
        """Answers requests, in their order. A failed one has an ``error`` and doesn't affect the
        others."""
        if isinstance(requests, Request) or not isinstance(requests, Iterable):
            raise TypeError(
                f"expected Requests in a list or an iterator, got {type(requests).__name__}"
            )
        remaining = iter(requests)
        tickets: list[Ticket] = []
        unfinished: list[Ticket] = []
        coming: deque[Future[Ticket]] = deque()
        exhausted = False
        pool = ThreadPoolExecutor(_PREPARING_THREADS, "voco-prepare")
        try:
            while not exhausted or coming or unfinished:
                # Preparing too early takes memory; too late, and the device waits.
                while not exhausted and len(coming) + len(unfinished) < 2 * self.max_batch:
                    request = next(remaining, _NO_MORE)
                    exhausted = request is _NO_MORE
                    if not exhausted:
                        coming.append(pool.submit(self.submit, typing.cast(Request, request)))
                while coming and coming[0].done():
                    tickets.append(coming.popleft().result())
                    unfinished.append(tickets[-1])
                progressed = self.step()
                unfinished = [ticket for ticket in unfinished if not ticket.done]
                if not progressed and (coming or unfinished):
                    time.sleep(_IDLE_SECONDS)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # decoding an image may take a while
            for ticket in tickets:
                ticket.cancel()
            for future in coming:
                future.add_done_callback(_cancel_ticket)
            raise
        pool.shutdown()
        return [ticket.wait() for ticket in tickets]

    def submit(self, request: Request) -> Ticket:
        """Queues a request, to be answered while a thread drives the engine. Its images are decoded
        here, in the caller's thread.

        Raises:
            RuntimeError: the engine is closed.
            ValueError: the model is no longer enabled, is in training mode, or has changed.
            TypeError: not a ``Request``.
        """
        self._check_open()
        if not isinstance(request, Request):
            raise TypeError(
                f"expected a Request(images, text), got {type(request).__name__}; or call answer()"
            )
        ticket = self._ticket()
        try:
            self._scheduler.add([self._intake.work_of(request, ticket)])
        except RequestError as error:
            self._scheduler.fail(ticket, error)
        return ticket

    def compress(self, images: Any, *, keys: Sequence[str] | None = None) -> list[CompactKV]:
        """Runs pass 1 on images, in batches, and returns an entry for each, from the store or new. An
        entry is that of the first image in a prompt.

        Raises:
            RequestError: an image can't be read.
            ValueError: mode "uncached", which has no entries; or another number of keys than images.
        """
        if self.mode == "uncached":
            raise ValueError(
                "expected mode 'voco' or 'full_cache', got 'uncached', which has no entries"
            )
        self._check_open()
        slot = self._intake.plan("", 1).images[0]
        paired = with_keys(as_list(images), keys)
        entries: list[CompactKV] = []
        for start in range(0, len(paired), _PREPARED_IMAGES):  # pixels take memory
            jobs = []
            for number, (image, key) in enumerate(paired[start : start + _PREPARED_IMAGES], start):
                with naming(number, len(paired)):
                    jobs.append(self._images.job(image, slot, first=True, key=key))
            while waiting := [job for job in jobs if not job.ready]:
                for job in waiting:
                    if (failure := job.failure) is not None:
                        raise failure
                if not self._scheduler.read(waiting):
                    time.sleep(_IDLE_SECONDS)  # another thread is preparing it
            entries += [typing.cast(CompactKV, job.entry) for job in jobs]  # all of them are ready
        return entries

    # ---- running

    def step(self) -> bool:
        """Reads images, admits requests and generates a token for each. Returns whether there was work.

        Waiting for an answer calls this. Call it yourself to drive the engine from your own loop.
        """
        return self._scheduler.step()

    def warmup(
        self,
        *,
        batch_sizes: Sequence[int] | None = None,
        text_tokens: Sequence[int] = (32, 64, 128),
        sampled: bool = False,
    ) -> int:
        """Runs each shape of work once, so that no request waits for a CUDA graph to be recorded.

        Args:
            batch_sizes: by default ``max_batch`` and the powers of two below it.
            text_tokens: numbers of tokens after the image, including the system prompt.
            sampled: warm up for requests with a temperature instead of greedy ones.

        Returns:
            The number of graphs recorded so far. Other shapes are recorded when they first occur.
        """
        self._check_open()
        largest = bucket(self.max_batch)
        sizes = batch_sizes or [
            min(1 << power, self.max_batch) for power in range(largest.bit_length())
        ]
        for name, values in (("batch_sizes", sizes), ("text_tokens", text_tokens)):
            if not isinstance(values, Sequence):
                raise TypeError(f"expected {name} in a list, got {values!r}")
            for value in values:
                check_counts(**{name: value})
        sampling = Sampling(
            max_new_tokens=min(2, self.max_new_tokens),
            temperature=float(sampled),
            seed=0,
            ignore_eos=True,
        )
        slot = self._intake.plan("", 1).images[0]
        side = self.model.config.vision_config.image_size
        pixels = prepare_pixels(self.processor, Image.new("RGB", (side, side)))
        room = self.max_prompt_tokens - self._image_slots
        pad = self.processor.tokenizer.pad_token_id or 0
        for size in sizes:
            jobs = [ImageJob("", slot, pixels, prepared=True) for _ in range(size)]
            while self._scheduler.read(jobs):
                pass
            for length in text_tokens:
                plan = Plan((slot,), tuple(repeat(pad, max(1, min(length, room)))))
                works = [Work(self._ticket(), plan, [job], sampling) for job in jobs]
                try:
                    self._scheduler.add(works)
                    for work in works:
                        work.ticket.result()
                finally:
                    for work in works:
                        work.ticket.cancel()
            self._scheduler.warm_decode(size, greedy=not sampled)
        return len(self._second.programs)

    def stage_seconds(self) -> dict[str, list[float]]:
        """With ``profile``, the seconds of each run since the last call, by stage: "vision", "prefix",
        "extract", "load", "prefill" and "decode". On CUDA they are measured on the device."""
        return self._clock.read()

    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return self._scheduler.stats()

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until all entries are stored. Returns whether that was within ``timeout`` seconds.

        None waits as long as the store makes progress: if it finishes no entry for 60 seconds, that is
        logged, and the result is False.
        """
        return self._images.flush(timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Fails all open requests, and flushes as ``flush`` does. Returns whether everything is stored.
        The store stays open."""
        began = time.monotonic()
        self._closed = True
        self._scheduler.close(timeout)
        left = None if timeout is None else max(0.0, began + timeout - time.monotonic())
        return self._images.close(left)

    def __enter__(self) -> TwoPassEngine:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    # ---- submitting

    def _pieces(self, request: Request) -> Iterator[str]:
        ticket = self.submit(request)
        try:
            yield from ticket
        finally:
            ticket.cancel()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("expected an open engine, got one that was closed; make another")
        self._scheduler.check_usable()
        check_ready(self.model)
        self._unchanged.check()

    def _key(self, key_of: Callable[..., str], image: Any) -> str:
        if self._keyed_by is None:
            self._keyed_by = fingerprint_of(self.model)
        # As in the engine's steps, not with the caller's autocast.
        with torch.autocast(self.model.device.type, enabled=False):
            return key_of(image, fingerprint=self._keyed_by)

    def _ticket(self) -> Ticket:
        return Ticket(self._scheduler.step, self._decode)

    def _decode(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)


def _cancel_ticket(future: Future[Ticket]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().cancel()
