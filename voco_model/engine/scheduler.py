"""The queue of requests, and what happens to it step by step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from voco_model.engine.first_pass import FirstPass
from voco_model.engine.images import ImageJob, Images
from voco_model.engine.prompts import Work, failure_of, kind_of, prompt_of
from voco_model.engine.request import RequestError
from voco_model.engine.second_pass import BROKEN, Prompt, SecondPass
from voco_model.engine.ticket import Ticket
from voco_model.engine.work_stream import WorkStream

_CANCELLED = "expected a request that is waited for, got one that was cancelled; submit it again"
_CLOSED = "expected an open engine, got one that was closed; make another"
_NO_NUMBERS = (
    "expected finite keys and values of an image, got NaN or infinity; look for an overflow of the "
    "model's dtype"
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

    Args:
        first_pass, second_pass, images: of the engine.
        keeps_entries: whether the first pass makes entries; otherwise images are only embedded.
        max_prompt_tokens: slots of a prompt, at most.
        stop_ids: that end an answer.
        on_stream: what device work is done inside of.
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
    ) -> None:
        self._first = first_pass
        self._second = second_pass
        self._images = images
        self._keeps_entries = keeps_entries
        self._max_prompt_tokens = max_prompt_tokens
        self._stop_ids = frozenset(stop_ids)
        self._waiting: deque[Work] = deque()
        self._lock = threading.RLock()
        self._on_stream = on_stream
        self._arrived: deque[tuple[Work, int]] = deque()
        self._closed = False
        self._stats = EngineStats()

    def add(self, works: Iterable[Work]) -> None:
        with self._lock:
            for work in works:
                if self._closed:
                    self.fail(work.ticket, RequestError("cancelled", _CLOSED))
                    continue
                self._waiting.append(work)
                self._stats.images_from_store += work.from_store

    def fail(self, ticket: Ticket, error: RequestError) -> None:
        with self._lock:
            ticket.fail(error)
            self._stats.failed += 1

    def read(self, jobs: Sequence[ImageJob]) -> bool:
        """Pass 1 of those of these images that need it, up to a batch; whether there were any."""
        with self._lock, torch.no_grad(), self._on_stream():
            return self._read_images([job for job in jobs if job.missing])

    def step(self) -> bool:
        """A little of everything; whether there was anything to do."""
        with self._lock, torch.no_grad(), self._on_stream():
            self._drop_cancelled()
            progressed = False
            if self._waiting and self._second.free_rows:
                missing = [job for work in self._waiting for job in work.jobs if job.missing]
                progressed |= self._read_images(missing)
                progressed |= self._let_in()
                self._hand_out()  # first tokens don't wait for a decoding step
            if self._second.busy:
                progressed = True
                self._write()
                self._hand_out()
            return progressed

    def warm_decode(self, rows: int, greedy: bool) -> None:
        """Record decoding of this many rows, if nobody is being answered."""
        with self._lock, torch.no_grad(), self._on_stream():
            if not self._second.busy:
                self._second.warm_decode(rows, greedy)

    def close(self) -> None:
        """Gives up what waits and what comes."""
        with self._lock, self._on_stream():
            self._closed = True
            for work in [*self._waiting, *self._second.owners()]:
                work.ticket.cancel()
            self._drop_cancelled()

    def stats(self) -> EngineStats:
        with self._lock:
            return replace(
                self._stats,
                put_failures=self._images.put_failures,
                graphs=len(self._second.programs),
                cache_bytes=self._first.cache_bytes + self._second.cache.nbytes,
            )

    def _drop_cancelled(self) -> None:
        gone = [work for work in self._waiting if work.ticket.cancelled or work.ticket.done]
        for work in gone:
            self._waiting.remove(work)
        running = [work for work in self._second.owners() if work.ticket.cancelled]
        for work in running:
            self._second.leave(work)
        for work in [*gone, *running]:
            if not work.ticket.done:
                self.fail(work.ticket, RequestError("cancelled", _CANCELLED))

    def _read_images(self, missing: Sequence[ImageJob]) -> bool:
        """Pass 1 of the first of these, up to a batch; whether there were any."""
        batch = list(dict.fromkeys(missing))[: self._first.max_images]
        if not batch:
            return False
        try:
            self._read_batch(batch)
        except Exception:  # no memory for all of them, or one is bad
            for job in batch:
                self._read_alone(job)
        return True

    def _read_alone(self, job: ImageJob) -> None:
        try:
            self._read_batch([job])
        except Exception as error:
            self._images.fail(job, failure_of(error, "reading an image"))

    def _read_batch(self, batch: Sequence[ImageJob]) -> None:
        features = self._first.features([job.pixels for job in batch])
        if not self._keeps_entries:
            for job, feature in zip(batch, features, strict=True):
                job.features, job.pixels = feature.clone(), None
        else:
            entries = self._first.entries(features, [job.slot for job in batch])
            sound = torch.stack([entry.kv.isfinite().all() for entry in entries]).tolist()
            for job, entry, is_sound in zip(batch, entries, sound, strict=True):
                if is_sound:
                    self._images.keep(job, entry)
                else:
                    self._images.fail(job, RequestError("image", _NO_NUMBERS))
        self._stats.images_read += len(batch)

    def _let_in(self) -> bool:
        """Give free rows to requests whose images are there, first come, first served."""
        chosen: list[tuple[Work, Prompt]] = []
        for work in list(self._waiting):
            if len(chosen) == self._second.free_rows:
                break
            error = next((job.error for job in work.jobs if job.error is not None), None)
            try:
                if error is None and work.ready:
                    chosen.append(
                        (work, prompt_of(work, self._max_prompt_tokens, self._first.join))
                    )
            except Exception as raised:
                error = failure_of(raised, "putting the prompt together")
            if error is not None:
                self._waiting.remove(work)
                self.fail(work.ticket, error)
        for work, _ in chosen:
            self._waiting.remove(work)
        by_kind = sorted(chosen, key=lambda pair: kind_of(pair[1]))
        for _, group in groupby(by_kind, key=lambda pair: kind_of(pair[1])):
            self._enter(list(group))
        return bool(chosen)

    def _enter(self, group: list[tuple[Work, Prompt]]) -> None:
        try:
            self._second.enter([prompt for _, prompt in group])
            self._stats.prefills += 1
        except Exception as error:
            if len(group) == 1:
                for job in group[0][0].jobs:  # their entries may be at fault
                    self._images.forget(job)
                self.fail(group[0][0].ticket, failure_of(error, "reading the prompt"))
                return
            for pair in group:
                self._enter([pair])

    def _write(self) -> None:
        try:
            self._stats.decode_steps += self._second.step()
        except Exception as error:
            failure = failure_of(error, "decoding")
            for work in self._second.owners():
                self._second.leave(work)
                self.fail(work.ticket, failure)

    def _hand_out(self) -> None:
        self._arrived.extend(self._second.arrived())
        while self._arrived:
            work, token = self._arrived.popleft()
            if work.ticket.done:
                continue
            try:
                self._take(work, token)
            except Exception as error:
                self._second.leave(work)
                self.fail(work.ticket, failure_of(error, "writing an answer down"))

    def _take(self, work: Work, token: int) -> None:
        ticket, sampling = work.ticket, work.sampling
        if token == BROKEN:
            self._second.leave(work)
            for job in work.jobs:
                self._images.forget(job)
            self.fail(
                ticket,
                RequestError(
                    "internal",
                    "expected finite logits, got NaN or infinity; look for it in the image's entry in "
                    "the store, or for an overflow of the model's dtype",
                ),
            )
            return
        ticket.add(token)
        self._stats.new_tokens += 1
        ended = token in self._stop_ids and not sampling.ignore_eos
        if ended or ticket.stopped():
            reason = "stop"
        elif len(ticket.tokens) == sampling.max_new_tokens:
            reason = "length"
        else:
            return
        self._second.leave(work, sound=True)
        ticket.finish(reason, prompt_tokens=work.prompt_tokens, from_store=work.from_store)
        self._stats.answered += 1
