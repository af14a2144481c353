"""``TwoPassEngine``: what a service calls."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
from PIL import Image

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
from voco_model.engine.images import ImageJob, Images
from voco_model.engine.language import Language
from voco_model.engine.plan import Plan, plan_prompt
from voco_model.engine.programs import bucket
from voco_model.engine.prompts import Work, check_length
from voco_model.engine.request import Answer, Request, RequestError, Sampling
from voco_model.engine.scheduler import EngineStats, Scheduler
from voco_model.engine.second_pass import SecondPass
from voco_model.engine.ticket import Ticket
from voco_model.engine.work_stream import WorkStream
from voco_model.kv_store.base import Store
from voco_model.kv_store.format import check_key
from voco_model.pictures import PictureLimits, as_images, decode, ground_of
from voco_model.pictures.limits import check_limits
from voco_model.vlm.attach import check_ready
from voco_model.vlm.fingerprint import Unchanged
from voco_model.vlm.fingerprint import fingerprint as fingerprint_of
from voco_model.vlm.image_key import image_key
from voco_model.vlm.prompt import Turns, image_part, pictures_in

# Threads that prepare requests for answer_many, ahead of those that are being answered.
_PREPARING_THREADS = 2
_IDLE_SECONDS = 0.0005
# Images whose pixels compress() holds at once.
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

    An image's entry comes from the store, or pass 1 makes it: vision tower and prefix in batches, each
    image once however many ask. Pass 2 loads entries into the rows of one static cache, reads the text
    and decodes; a request joins while others decode and leaves when it is done. On CUDA each shape of
    work is a CUDA graph; batch sizes are powers of two and lengths are in buckets. On a CPU the same
    code runs without graphs.

    There is no thread behind it. Whoever waits for an answer drives the engine for all, under a lock:
    call it from as many threads as you like.

    The model must stay as it is: entries are found by it, and CUDA graphs hold the addresses of its
    weights. A request that comes after a change, such as another active adapter, is refused. Of its
    ``generation_config`` only ``eos_token_id`` and ``suppress_tokens`` count; sampling is what each
    request says.

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
        salt: of a tenant, for ``image_key``. It has no effect on keys that requests bring.
        ground: red, green and blue, 0 to 255, that transparent pixels are shown on; by default what the
            model was trained with, else white.
        limits: what an image may cost.
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
            raise ValueError(f"expected lag >= 0, got {lag!r}")
        on_gpu = model.device.type == "cuda"
        graphs = on_gpu if graphs is None else graphs
        if graphs and not on_gpu:
            raise ValueError(f"expected a model on CUDA for graphs, got one on {model.device}")
        if dtype is not None:
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"expected dtype as a torch.dtype, got {dtype!r}")
            cast(model, dtype)
        self._keyed_by: str | None = None  # one that is given need not be what image_key computes
        if fingerprint is None:
            self._keyed_by = None if store is None else fingerprint_of(model)
            fingerprint = self._keyed_by or ""
        check_store(store, fingerprint)
        self._unchanged = Unchanged(model, strict=store is not None)
        self.model, self.processor, self.store, self.mode = model, processor, store, mode
        self.num_voco = int(model.config.num_voco if num_voco is None else num_voco)
        self.max_batch, self.max_new_tokens = max_batch, max_new_tokens
        # Ids around an image in its segment, at most: BOS, the newline, VoCo tokens.
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
        pictures = {"ground": ground_of(model.config, ground), "limits": limits}
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
        if on_gpu:  # what was made here lies on another stream than what comes
            torch.cuda.synchronize(model.device)
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
        ticket = self.submit(Request(images, text, Sampling(**sampling), keys))
        try:
            return ticket.result()
        finally:
            ticket.cancel()  # an interrupted wait must not leave a row taken

    def stream(
        self,
        images: Any,
        text: Turns | Sequence[int],
        *,
        keys: Sequence[str] | None = None,
        **sampling,
    ) -> Iterator[str]:
        """As ``answer``, the text in pieces as it comes. Leave off early and the request is given up."""
        return self._pieces(Request(images, text, Sampling(**sampling), keys))

    def answer_many(self, requests: Iterable[Request]) -> list[Answer]:
        """An answer a request, in their order. One that fails has an ``error``; the others go on."""
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
                # What is prepared too early holds memory; too late, and the device waits.
                while not exhausted and len(coming) + len(unfinished) < 2 * self.max_batch:
                    request = next(remaining, _NO_MORE)
                    exhausted = request is _NO_MORE
                    if not exhausted:
                        coming.append(pool.submit(self.submit, request))
                while coming and coming[0].done():
                    tickets.append(coming.popleft().result())
                    unfinished.append(tickets[-1])
                progressed = self.step()
                unfinished = [ticket for ticket in unfinished if not ticket.done]
                if not progressed and (coming or unfinished):
                    time.sleep(_IDLE_SECONDS)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # an image may take its time
            for ticket in tickets:
                ticket.cancel()
            for future in coming:
                future.add_done_callback(_cancel_ticket)
            raise
        pool.shutdown()
        return [ticket.wait() for ticket in tickets]

    def submit(self, request: Request) -> Ticket:
        """Puts a request into the queue, to be answered when somebody drives the engine. Its images are
        decoded here, in the caller's thread.

        Raises:
            RuntimeError: a closed engine.
            ValueError: a model that isn't enabled any more, was put into training mode, or has changed.
            TypeError: something that is no ``Request``.
        """
        self._check_open()
        if not isinstance(request, Request):
            raise TypeError(
                f"expected a Request(images, text), got {type(request).__name__}; or call answer()"
            )
        ticket = self._ticket()
        try:
            self._scheduler.add([self._work_of(request, ticket)])
        except RequestError as error:
            self._scheduler.fail(ticket, error)
        return ticket

    def compress(self, images: Any, *, keys: Sequence[str] | None = None) -> list[CompactKV]:
        """Pass 1 of images, in batches: their entries, from the store or new, as each stands first in
        its prompt.

        Raises:
            RequestError: one of them can't be read.
            ValueError: mode "uncached", which has no entries; or keys that don't fit the images.
        """
        if self.mode == "uncached":
            raise ValueError(
                "expected mode 'voco' or 'full_cache', got 'uncached', without entries"
            )
        self._check_open()
        slot = self._plan("", 1).images[0]
        paired = _with_keys(_as_list(images), keys)
        entries: list[CompactKV] = []
        for start in range(0, len(paired), _PREPARED_IMAGES):  # pixels take memory
            jobs = []
            for number, (image, key) in enumerate(paired[start : start + _PREPARED_IMAGES], start):
                with _naming(number, len(paired)):
                    jobs.append(self._images.job(image, slot, first=True, key=key))
            while waiting := [job for job in jobs if not job.ready]:
                for job in waiting:
                    if (failure := job.failure) is not None:
                        raise failure
                if not self._scheduler.read(waiting):
                    time.sleep(_IDLE_SECONDS)  # another thread is preparing it
            entries += [job.entry for job in jobs]
        return entries

    # ---- running

    def step(self) -> bool:
        """A little of everything: read images, let requests in, write one token each. Whether there was
        anything to do. Waiting for an answer calls this; call it yourself to drive the engine from a
        loop of your own."""
        return self._scheduler.step()

    def warmup(
        self,
        *,
        batch_sizes: Sequence[int] | None = None,
        text_tokens: Sequence[int] = (32, 64, 128),
        sampled: bool = False,
    ) -> int:
        """Runs shapes of work once, so that no request waits for their CUDA graphs to be recorded.

        Args:
            batch_sizes: by default the powers of two up to ``max_batch``, and that.
            text_tokens: lengths of what stands behind the image, system prompt included.
            sampled: for requests with a temperature, instead of greedy ones.

        Returns:
            graphs recorded by now. Shapes that weren't met are recorded when they are.
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
        slot = self._plan("", 1).images[0]
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
        """With ``profile``: for each stage ("vision", "prefix", "extract", "load", "prefill", "decode")
        the seconds of each run since the last call; on CUDA the device's, by events."""
        return self._clock.read()

    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return self._scheduler.stats()

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until the store has what pass 1 made; whether that was within ``timeout`` seconds. None
        waits for as long as the store is writing: one that has finished no entry for 60 seconds is
        given up, with a warning."""
        return self._images.flush(timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Fails what is still waiting, and flushes as ``flush`` does; whether the store has everything.
        The store stays open."""
        began = time.monotonic()
        self._closed = True
        self._scheduler.close(timeout)
        left = None if timeout is None else max(0.0, began + timeout - time.monotonic())
        return self._images.close(left)

    def __enter__(self) -> TwoPassEngine:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    # ---- a request comes

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

    def _work_of(self, request: Request, ticket: Ticket) -> Work:
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
        try:
            given = _images_of(request)
            images = _as_list(given)
            if given is not None and not images:
                raise ValueError(
                    "expected at least one image, or None for a question without any, got an empty "
                    f"{type(request.images).__name__}"
                )
        except RequestError:
            raise
        except Exception as error:  # an iterator that opens files may raise anything
            raise RequestError("image", _told(error, "images that can be listed")) from error
        try:
            images = _with_keys(images, request.keys)
            plan = self._plan(request.text, len(images))
        except Exception as error:
            raise RequestError("prompt", _told(error, "text that the tokenizer takes")) from error
        if not plan.text:
            raise RequestError("prompt", "expected at least one token of text, got none")
        if len(images) > 1:
            self._check_several(len(images))
        if self.mode == "voco":
            check_length(plan.num_text + self.num_voco * len(images), self.max_prompt_tokens)
        jobs = []
        for place, ((image, key), slot) in enumerate(zip(images, plan.images, strict=True)):
            with _naming(place, len(images)):
                jobs.append(self._images.job(image, slot, first=place == 0, key=key))
        ticket.stop = sampling.stop
        found = sum(job.from_store for job in jobs)
        return Work(ticket, plan, jobs, sampling, from_store=found)

    def _plan(self, text: Turns | Sequence[int], images: int) -> Plan:
        return plan_prompt(
            text,
            images,
            processor=self.processor,
            model=self.model,
            num_voco=self.num_voco if self.mode == "voco" else None,
        )

    def _check_several(self, images: int) -> None:
        if self.mode == "full_cache":
            raise RequestError(
                "prompt",
                f"expected one image in mode 'full_cache', got {images}; without a mask the keys of "
                "an image depend on the images before it",
            )
        if self.mode == "voco" and not self.model.config.voco_isolated:
            raise RequestError(
                "prompt",
                f"expected one image, got {images} for a model whose images see one another; with "
                "enable(..., isolated=True) each has an entry of its own",
            )

    def _key(self, key_of: Callable[..., str], image: Any) -> str:
        if self._keyed_by is None:
            self._keyed_by = fingerprint_of(self.model)
        # As the engine's steps compute, whatever autocast the caller has on.
        with torch.autocast(self.model.device.type, enabled=False):
            return key_of(image, fingerprint=self._keyed_by)

    def _ticket(self) -> Ticket:
        return Ticket(self._scheduler.step, self._decode)

    def _decode(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)


def _told(error: Exception, expected: str) -> str:
    """An error's message, in the house's form where it comes from elsewhere."""
    message = str(error)
    if message.startswith("expected"):
        return message
    return f"expected {expected}, got {type(error).__name__}: {message}"


def _cancel_ticket(future: Future[Ticket]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().cancel()


def _images_of(request: Request) -> Any:
    """The request's images; without any, those in the image parts of its messages."""
    text = request.text
    is_messages = isinstance(text, Sequence) and len(text) > 0 and isinstance(text[0], Mapping)
    if request.images is not None or not is_messages:
        return request.images
    try:
        return pictures_in(text) or None
    except ValueError as error:
        raise RequestError("prompt", str(error)) from error


def _as_list(images: Any) -> list[Any]:
    """Images in a list: none, one, or each."""
    if images is None:
        return []
    return list(as_images(images))


@contextmanager
def _naming(place: int, images: int) -> Iterator[None]:
    """An image that can't be read is named by its place, if there are several."""
    try:
        yield
    except RequestError as error:
        if error.reason != "image" or images == 1:
            raise
        raise RequestError("image", f"image {place + 1} of {images}: {error}") from error


def _with_keys(images: list[Any], keys: Sequence[str] | None) -> list[tuple[Any, str | None]]:
    if keys is None:
        return list(zip(images, repeat(None), strict=False))
    if not isinstance(keys, Sequence):
        raise TypeError(f"expected keys in a list, one an image, got {keys!r}")
    keys = [check_key(key) for key in ([keys] if isinstance(keys, str) else keys)]
    if len(keys) != len(images):
        raise ValueError(f"expected a key an image, got {len(keys)} keys for {len(images)} images")
    return list(zip(images, keys, strict=True))
