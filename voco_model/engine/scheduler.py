"""``Scheduler``: the queue of requests, and the steps that answer them."""

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
from voco_model.engine.image_job import ImageJob
from voco_model.engine.images import Images
from voco_model.engine.prompts import Work, failure_of, kind_of, prompt_of
from voco_model.engine.request import RequestError
from voco_model.engine.second_pass import BROKEN, Prompt, SecondPass
from voco_model.engine.ticket import Ticket
from voco_model.engine.work_stream import WorkStream
from voco_model.kv_store.base import after_fork

logger = logging.getLogger("voco_model.engine")

T = TypeVar("T")

# Interrupts after which a request is retried. If it causes them itself, as by a tokenizer's panic, it
# must not keep the others from being answered.
_MAX_INTERRUPTIONS = 3
# Seconds for which close() waits for another thread's step.
_CLOSING = 5.0
_CANCELLED = "the request was cancelled; submit it again"
_CLOSED = "expected an open engine, got one that was closed; make another"
_ENTRY_NOT_FINITE = (
    "the image's keys and values contain NaN or infinity; check whether the model's dtype overflows"
)
_LOGITS_NOT_FINITE = (
    "the logits contain NaN or infinity; check the image's entry in the store, and whether the model's "
    "dtype overflows"
)
_INTERRUPTED = (
    f"the thread working on this request was interrupted more than {_MAX_INTERRUPTIONS} times; if not "
    "by a signal or Ctrl-C, the request itself may be at fault"
)
_FORKED = (
    "the process was forked while this request was open, and its parent answers it; submit it again"
)
_FORKED_DEVICE = (
    "expected an engine made in this process, got one on {device} from before a fork, after which "
    "the device can't be used; load the model and make the engine in the child, or start the process "
    'with multiprocessing\'s "spawn"'
)
_NESTED = (
    "expected no call from within a step of the engine, got one from a signal handler or finalizer in "
    "the thread that drives it; call the engine in another thread"
)


@dataclass
class EngineStats:
    """What an engine has done since it was made.

    Attributes:
        answered, failed: numbers of requests.
        images_read: by pass 1.
        images_from_store: found there for a request.
        put_failures: entries that could not be stored.
        prefills, decode_steps: forward passes of pass 2.
        new_tokens: generated.
        graphs: CUDA graphs recorded.
        cache_bytes: size of the key/value caches: pass 2's and, from the first image on, pass 1's.
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
    """Reads images, admits requests into free rows, and generates one token for each row, in turn.

    ``_open`` has every request from ``add`` until its ticket is done; the waiting ones are those without
    a row. Ctrl-C, or a signal handler that raises, may interrupt a step at any point. It then leaves
    ``_in_hand`` set, and the next step first frees all rows: requests that had one are read into a row
    again, with the tokens generated so far.

    Args:
        first_pass, second_pass, images: the engine's.
        keeps_entries: whether pass 1 makes entries; otherwise images are only embedded.
        max_prompt_tokens: slots that a prompt may take.
        stop_ids: tokens that end an answer.
        on_stream: context for device work.
        device: of the model.
        check_model: raises if the model has changed since the images' keys were computed.
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
        # Used as an ordered set. Single reads and writes are atomic, so submitting, perhaps in a signal
        # handler, never waits for the thread that drives.
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
        # Reentrant: the first because its release() tells whether this thread holds it, the second
        # because a signal handler may submit a request while its thread is counting.
        self._turn = threading.RLock()
        self._counting = threading.RLock()
        self._driver: int | None = None  # id of the thread that holds _turn

    @property
    def _waiting(self) -> list[Work]:
        running = set(self._second.owners())
        return [work for work in list(self._open) if work not in running]

    def check_usable(self) -> None:
        """After a fork, limits torch to one thread: OpenMP's threads don't exist in the child, where an
        operator would wait for them.

        Raises:
            RuntimeError: an engine on a GPU, in a process that was forked from the engine's.
        """
        if not self._forked:
            return
        if self._device.type != "cpu":
            raise RuntimeError(_FORKED_DEVICE.format(device=self._device))
        if torch.get_num_threads() > 1:
            logger.warning(
                "this process was forked, without OpenMP's threads: torch runs on one thread in it"
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
        """Runs pass 1 on those of these images that need it, up to a batch. Returns whether any did."""
        return (
            self._drive(lambda: self._read_images([job for job in jobs if job.missing]))
            is not False
        )

    def step(self, patience: float = -1.0) -> bool:
        """Reads images, admits requests and generates tokens once. Returns whether there was work.

        Args:
            patience: seconds to wait for another thread that is driving; if it still is, the result is
                True. -1 waits until its step ends.
        """
        return self._drive(self._step, patience) is not False

    def warm_decode(self, rows: int, greedy: bool) -> None:
        """Records decoding of this many rows, unless requests are being answered."""

        def warm() -> None:
            if not self._second.busy:
                self._second.warm_decode(rows, greedy)

        self._drive(warm)

    def close(self, timeout: float | None = None) -> None:
        """Fails all open and future requests. If a step runs for longer than ``timeout`` (at most 5
        seconds) in another thread, or is running in this one, it fails them when it ends."""
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

    # ---- driving

    def _drive(self, work: Callable[[], T], patience: float = -1.0) -> T | None:
        """Runs ``work()`` while no other thread drives; None if another one did for all of ``patience``.

        Raises:
            RuntimeError: this thread is driving already, or the process was forked from a GPU engine's.
        """
        me = threading.get_ident()
        if self._driver == me:
            raise RuntimeError(_NESTED)
        self.check_usable()
        grad, kind = torch.is_grad_enabled(), self._device.type
        autocast = torch.is_autocast_enabled(kind)
        # Python runs signal handlers after calls, for instance between acquire() and the next line. So
        # the lock itself tells whether this thread holds it, and nothing is called before the release.
        try:
            if not self._turn.acquire(timeout=patience):
                return None
            self._driver = me
            # Not the caller's autocast: a step serves the requests of all threads.
            plain = torch.autocast(kind, enabled=False)
            with torch.no_grad(), plain, self._on_stream():
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
            except RuntimeError:  # it was never acquired
                pass
            finally:  # the contexts' own exits may have been interrupted
                torch.set_grad_enabled(grad)
                torch.set_autocast_enabled(kind, autocast)

    def _recover(self) -> None:
        """After an interrupted step: makes all open requests wait again, or end."""
        for work in self._in_hand:
            work.interruptions += 1
        self._in_hand = ()
        self._arrived.clear()
        try:
            self._second.reset()
        except Exception as error:  # the device has failed
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
                    self._give_up(work, failure_of(error, "recording an answer"))
            self._in_hand = ()

    def _renew(self) -> None:
        """In a forked child: open requests belong to the parent, which may have been in the middle of a
        step."""
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
            self._hand_out()  # first tokens needn't wait for a decoding step
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
        """Runs pass 1 on the first of these, up to a batch. Returns whether there were any."""
        batch = list(dict.fromkeys(missing))[: self._first.max_images]
        if not batch:
            return False
        self._in_hand = [
            work for work in list(self._open) if any(job in batch for job in work.jobs)
        ]
        try:
            self._read_batch(batch)
        except Exception:  # perhaps only one is bad, or they don't fit into memory together
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
            self._check_model()  # again, because these entries are stored
            sound = torch.stack([entry.kv.isfinite().all() for entry in entries]).tolist()
            for job, entry, is_sound in zip(batch, entries, sound, strict=True):
                if is_sound:
                    self._images.keep(job, entry)
                else:
                    self._images.fail(job, RequestError("image", _ENTRY_NOT_FINITE))
        self._count(images_read=len(batch))

    def _let_in(self) -> bool:
        """Admits requests whose images are ready into free rows, in their order."""
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
                error = failure_of(raised, "building the prompt")
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
                for job in work.jobs:  # the entries may be at fault
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
                self._give_up(work, failure_of(error, "recording an answer"))

    def _take(self, work: Work, token: int) -> None:
        if token == BROKEN:
            for job in work.jobs:
                self._images.forget(job)
            self._give_up(work, RequestError("internal", _LOGITS_NOT_FINITE))
            return
        work.ticket.add(token)
        self._count(new_tokens=1)
        self._conclude_if_over(work)

    def _conclude_if_over(self, work: Work) -> None:
        """Ends the answer if the latest token completes it."""
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
