"""The queue of requests, and what happens to it step by step."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

import torch

from voco_model.engine.first_pass import FirstPass
from voco_model.engine.images import ImageJob, Images
from voco_model.engine.prompts import Work, failure_of, kind_of, prompt_of
from voco_model.engine.request import RequestError
from voco_model.engine.second_pass import BROKEN, Prompt, SecondPass
from voco_model.engine.ticket import Ticket
from voco_model.engine.work_stream import WorkStream
from voco_model.kv_store.base import after_fork

logger = logging.getLogger("voco_model.engine")

T = TypeVar("T")

# Interrupts that a request survives. One that raises more than an Exception by itself, such as a
# tokenizer's panic, must not keep all others from being answered.
_MAX_INTERRUPTIONS = 3
# Seconds that close() waits for another thread's step.
_CLOSING = 5.0
_CANCELLED = "expected a request that is waited for, got one that was cancelled; submit it again"
_CLOSED = "expected an open engine, got one that was closed; make another"
_NO_NUMBERS = (
    "expected finite keys and values of an image, got NaN or infinity; look for an overflow of the "
    "model's dtype"
)
_NOT_FINITE = (
    "expected finite logits, got NaN or infinity; look for it in the image's entry in the store, or for "
    "an overflow of the model's dtype"
)
_INTERRUPTED = (
    f"the thread that worked on this request was interrupted more than {_MAX_INTERRUPTIONS} times; if "
    "nobody interrupts it, the request itself may be at fault"
)
_FORKED = (
    "the process was forked while this request was open: the parent answers it; submit it again"
)
_FORKED_DEVICE = (
    "expected an engine made in this process, got one on {device} from before a fork, after which "
    "the device can't be used; load the model and make the engine in the child, or start the process "
    'with multiprocessing\'s "spawn"'
)
_NESTED = (
    "expected no call inside a step of the engine, got one in the thread that drives it, from a signal "
    "handler or a finalizer; call the engine in another thread"
)


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
        cache_bytes: of the key/value caches: pass 2's, and pass 1's from the first image on.
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


class Scheduler:
    """Reads images, lets requests into free rows, and has one token written for each row, in turn.

    ``_open`` has every request from ``add`` until its ticket is done; what waits is what is open and has
    no row. A step may be cut short at any point, by Ctrl-C or a signal handler that raises. It then
    leaves ``_in_hand`` behind, and whoever drives next takes all rows back first: requests that had one
    are read into a row again, together with what they have written.

    Args:
        first_pass, second_pass, images: of the engine.
        keeps_entries: whether the first pass makes entries; otherwise images are only embedded.
        max_prompt_tokens: slots of a prompt, at most.
        stop_ids: that end an answer.
        on_stream: what device work is done inside of.
        device: of the model.
        check_model: raises if the model isn't what the images' keys say.
    """

    def __init__(
        self,
        first_pass: FirstPass,
        second_pass: SecondPass,
        images: Images,
        *,
        keeps_entries: bool,
        max_prompt_tokens: int,
        stop_ids: Sequence[int],
        on_stream: WorkStream,
        device: torch.device,
        check_model: Callable[[], None],
    ) -> None:
        self._first = first_pass
        self._second = second_pass
        self._images = images
        self._keeps_entries = keeps_entries
        self._max_prompt_tokens = max_prompt_tokens
        self._stop_ids = frozenset(stop_ids)
        self._on_stream = on_stream
        self._check_model = check_model
        self._device = device
        # Ordered. Single reads and writes of it are atomic, so that nobody who submits, in a signal
        # handler for instance, waits for the thread that drives.
        self._open: dict[Work, None] = {}
        self._arrived: deque[tuple[Work, int]] = deque()
        # The requests that the step is working on; None between steps.
        self._in_hand: Sequence[Work] | None = None
        self._closed = False
        self._forked = False
        self._stats = EngineStats()
        self._make_locks()
        after_fork(self, Scheduler._renew)

    def _make_locks(self) -> None:
        # Reentrant, the one since its release() tells whether it is held, the other since a signal
        # handler may submit a request while its thread is counting.
        self._turn = threading.RLock()
        self._counting = threading.RLock()
        self._driver: int | None = None  # the thread that has the turn

    @property
    def _waiting(self) -> list[Work]:
        running = set(self._second.owners())
        return [work for work in list(self._open) if work not in running]

    def check_usable(self) -> None:
        """After a fork: OpenMP's threads are not in the child, where an operator would wait for them.

        Raises:
            RuntimeError: an engine on a GPU, in a process that was forked from the engine's.
        """
        if not self._forked:
            return
        if self._device.type != "cpu":
            raise RuntimeError(_FORKED_DEVICE.format(device=self._device))
        if torch.get_num_threads() > 1:
            logger.warning(
                "this process was forked: torch runs on one thread in it, since OpenMP's are not here"
            )
            torch.set_num_threads(1)
        self._forked = False

    def add(self, works: Iterable[Work]) -> None:
        for work in works:
            if self._closed:
                self.fail(work.ticket, RequestError("cancelled", _CLOSED))
                continue
            self._count(images_from_store=work.from_store)
            self._open[work] = None

    def fail(self, ticket: Ticket, error: RequestError) -> None:
        if ticket.fail(error):
            self._count(failed=1)

    def read(self, jobs: Sequence[ImageJob]) -> bool:
        """Pass 1 of those of these images that need it, up to a batch; whether there were any."""
        return (
            self._drive(lambda: self._read_images([job for job in jobs if job.missing]))
            is not False
        )

    def step(self, patience: float = -1.0) -> bool:
        """A little of everything; whether there was anything to do.

        Args:
            patience: seconds to wait for another thread that is driving; if it is still at it then, the
                result is True. -1 waits for as long as its step takes.
        """
        return self._drive(self._step, patience) is not False

    def warm_decode(self, rows: int, greedy: bool) -> None:
        """Record decoding of this many rows, if nobody is being answered."""

        def warm() -> None:
            if not self._second.busy:
                self._second.warm_decode(rows, greedy)

        self._drive(warm)

    def close(self, timeout: float | None = None) -> None:
        """Gives up what waits and what comes. If another thread is in a step for longer than ``timeout``
        (5 seconds at most), or this one is, that thread gives it up when it has done so."""
        self._closed = True
        if self._driver == threading.get_ident() or (self._forked and self._device.type != "cpu"):
            return
        self._drive(self._drop, _CLOSING if timeout is None else max(0.0, min(timeout, _CLOSING)))

    def stats(self) -> EngineStats:
        with self._counting:
            return replace(
                self._stats,
                put_failures=self._images.put_failures,
                graphs=len(self._second.programs),
                cache_bytes=self._first.cache_bytes + self._second.cache.nbytes,
            )

    # ---- whose turn it is

    def _drive(self, work: Callable[[], T], patience: float = -1.0) -> T | None:
        """``work()`` in this thread while no other drives; None if another did for all of ``patience``.

        Raises:
            RuntimeError: this thread is in it already, or the process was forked from a GPU engine's.
        """
        me = threading.get_ident()
        if self._driver == me:
            raise RuntimeError(_NESTED)
        self.check_usable()
        grad, kind = torch.is_grad_enabled(), self._device.type
        autocast = torch.is_autocast_enabled(kind)
        # Python runs signal handlers after calls: between acquire() and the next line, for instance. So
        # the lock itself is asked whether this thread has it, and no call comes before the release.
        try:
            if not self._turn.acquire(timeout=patience):
                return None
            self._driver = me
            # Not the caller's autocast: a step is for the requests of all threads.
            whole = torch.autocast(kind, enabled=False)
            with torch.no_grad(), whole, self._on_stream():
                if self._in_hand is not None:
                    self._recover()
                self._in_hand = ()
                result = work()
                self._in_hand = None
                return result
        finally:
            if self._driver == me:
                self._driver = None
            try:
                self._turn.release()
            except RuntimeError:  # it never was this thread's
                pass
            finally:  # an interrupt that struck while they were restored has left them off
                torch.set_grad_enabled(grad)
                torch.set_autocast_enabled(kind, autocast)

    def _recover(self) -> None:
        """After a step that was cut short: all that is open waits again, or is at its end."""
        for work in self._in_hand:
            work.interruptions += 1
        self._in_hand = ()
        self._arrived.clear()
        try:
            self._second.reset()
        except Exception as error:  # the device is lost
            for work in list(self._open):
                self._give_up(work, failure_of(error, "freeing rows after an interrupt"))
        for work in list(self._open):
            self._in_hand = (work,)
            if work.interruptions > _MAX_INTERRUPTIONS:
                self._give_up(work, RequestError("interrupted", _INTERRUPTED))
            elif work.ticket.done:
                self._open.pop(work, None)
            elif work.ticket.tokens:
                try:
                    self._conclude_if_over(work)
                except Exception as error:
                    self._give_up(work, failure_of(error, "writing an answer down"))
            self._in_hand = ()

    def _renew(self) -> None:
        """In a child process: what is open belongs to the parent, a thread of which may have been in the
        middle of a step."""
        self._make_locks()
        self._forked, self._in_hand = True, ()
        for work in list(self._open):
            self.fail(work.ticket, RequestError("interrupted", _FORKED))
        self._open = {}

    # ---- a step

    def _step(self) -> bool:
        self._drop()
        progressed = False
        if self._second.free_rows and (waiting := self._waiting):
            progressed |= self._read_images(
                [job for work in waiting for job in work.jobs if job.missing]
            )
            progressed |= self._let_in()
            self._hand_out()  # first tokens don't wait for a decoding step
        if self._second.busy:
            progressed = True
            self._write()
            self._hand_out()
        return progressed

    def _drop(self) -> None:
        for work in list(self._open):
            if (self._closed or work.ticket.cancelled) and not work.ticket.done:
                self._give_up(work, RequestError("cancelled", _CANCELLED))
            elif work.ticket.done:
                self._open.pop(work, None)

    def _give_up(self, work: Work, error: RequestError) -> None:
        self.fail(work.ticket, error)
        self._open.pop(work, None)
        self._second.leave(work)

    def _count(self, **amounts: int) -> None:
        with self._counting:
            for name, amount in amounts.items():
                setattr(self._stats, name, getattr(self._stats, name) + amount)

    def _read_images(self, missing: Sequence[ImageJob]) -> bool:
        """Pass 1 of the first of these, up to a batch; whether there were any."""
        batch = list(dict.fromkeys(missing))[: self._first.max_images]
        if not batch:
            return False
        self._in_hand = [
            work for work in list(self._open) if any(job in batch for job in work.jobs)
        ]
        try:
            self._read_batch(batch)
        except Exception:  # no memory for all of them, or one is bad
            for job in batch:
                if job.missing:
                    self._read_alone(job)
        return True

    def _read_alone(self, job: ImageJob) -> None:
        try:
            self._read_batch([job])
        except Exception as error:
            if not job.ready:
                self._images.fail(job, failure_of(error, "reading an image"))

    def _read_batch(self, batch: Sequence[ImageJob]) -> None:
        features = self._first.features([job.pixels for job in batch])
        if not self._keeps_entries:
            for job, feature in zip(batch, features, strict=True):
                job.features, job.pixels = feature.clone(), None
        else:
            entries = self._first.entries(features, [job.slot for job in batch])
            self._check_model()  # once more: these are kept for good
            sound = torch.stack([entry.kv.isfinite().all() for entry in entries]).tolist()
            for job, entry, is_sound in zip(batch, entries, sound, strict=True):
                if is_sound:
                    self._images.keep(job, entry)
                else:
                    self._images.fail(job, RequestError("image", _NO_NUMBERS))
        self._count(images_read=len(batch))

    def _let_in(self) -> bool:
        """Give free rows to requests whose images are there, first come, first served."""
        chosen: list[tuple[Work, Prompt]] = []
        for work in self._waiting:
            if len(chosen) == self._second.free_rows:
                break
            self._in_hand = (work,)
            failures = (job.failure for job in work.jobs)
            error = next((failure for failure in failures if failure is not None), None)
            if error is None and not work.ready:
                continue
            try:
                if error is None:
                    prompt = prompt_of(work, self._max_prompt_tokens, self._first.join)
            except Exception as raised:
                error = failure_of(raised, "putting the prompt together")
            if error is None:
                chosen.append((work, prompt))
            else:
                self._give_up(work, error)
        by_kind = sorted(chosen, key=lambda pair: kind_of(pair[1]))
        for _, group in groupby(by_kind, key=lambda pair: kind_of(pair[1])):
            self._enter(list(group))
        return bool(chosen)

    def _enter(self, group: list[tuple[Work, Prompt]]) -> None:
        self._in_hand = [work for work, _ in group]
        try:
            self._second.enter([prompt for _, prompt in group])
        except Exception as error:
            if len(group) == 1:
                work = group[0][0]
                for job in work.jobs:  # their entries may be at fault
                    self._images.forget(job)
                self._give_up(work, failure_of(error, "reading the prompt"))
                return
            for pair in group:
                self._enter([pair])
        else:
            self._count(prefills=1)

    def _write(self) -> None:
        self._in_hand = self._second.owners()
        try:
            self._count(decode_steps=int(self._second.step()))
        except Exception as error:
            failure = failure_of(error, "decoding")
            for work in self._second.owners():
                self._give_up(work, failure)

    def _hand_out(self) -> None:
        self._in_hand = self._second.owners()
        self._arrived.extend(self._second.arrived())
        while self._arrived:
            work, token = self._arrived.popleft()
            if work.ticket.done:
                continue
            self._in_hand = (work,)
            try:
                self._take(work, token)
            except Exception as error:
                self._give_up(work, failure_of(error, "writing an answer down"))

    def _take(self, work: Work, token: int) -> None:
        if token == BROKEN:
            for job in work.jobs:
                self._images.forget(job)
            self._give_up(work, RequestError("internal", _NOT_FINITE))
            return
        work.ticket.add(token)
        self._count(new_tokens=1)
        self._conclude_if_over(work)

    def _conclude_if_over(self, work: Work) -> None:
        """Ends an answer with its last token."""
        ticket, sampling = work.ticket, work.sampling
        ended = ticket.tokens[-1] in self._stop_ids and not sampling.ignore_eos
        if ended or ticket.stopped():
            reason = "stop"
        elif len(ticket.tokens) == sampling.max_new_tokens:
            reason = "length"
        else:
            return
        self._second.leave(work, sound=True)
        ticket.finish(reason, prompt_tokens=work.prompt_tokens, from_store=work.from_store)
        self._open.pop(work, None)
        self._count(answered=1)
