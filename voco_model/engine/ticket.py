"""``Ticket``: a submitted request, to wait for or to stream its answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from voco_model.engine.request import Answer, RequestError

# Seconds after which a thread that waits for another one to drive checks its own answer again.
_LOOK_AGAIN = 0.02
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Ticket:
    """Iterate over it for the answer's text as it is generated, or call ``result()``.

    The engine has no thread of its own: a thread that waits for a ticket drives it, for all requests.
    Different threads may wait for different tickets.

    Attributes:
        tokens: generated so far.
    """

    def __init__(self, drive: Callable[[float], bool], decode: Callable[[list[int]], str]) -> None:
        self._drive = drive
        self._decode = decode
        self._answer: Answer | None = None
        self._began = time.perf_counter()
        self._first: float | None = None
        self.tokens: list[int] = []
        self.stop: tuple[str, ...] = ()
        self.cancelled = False

    @property
    def done(self) -> bool:
        return self._answer is not None

    def cancel(self) -> None:
        """Cancels the request; its row is freed in the next step. No effect if it is finished."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> Answer:
        """Waits for the complete answer.

        Raises:
            RequestError: the request failed.
            TimeoutError: not complete within ``timeout`` seconds, plus one step if this thread is
                driving. The request continues.
        """
        answer = self.wait(timeout)
        if answer.error is not None:
            raise answer.error
        return answer

    def wait(self, timeout: float | None = None) -> Answer:
        """As ``result``, but for a failed request it returns an ``Answer`` with ``error``."""
        began = time.perf_counter()
        while self._answer is None:
            left = _LOOK_AGAIN if timeout is None else began + timeout - time.perf_counter()
            if left < 0:
                raise TimeoutError(
                    f"no complete answer within {timeout} s, got {len(self.tokens)} tokens so far; wait "
                    "longer, or cancel()"
                )
            self._drive_once(min(left, _LOOK_AGAIN))
        return self._answer

    def __iter__(self) -> Iterator[str]:
        """Yields pieces of the answer's text, each at least one character.

        Raises:
            RequestError: the request failed, perhaps after some pieces.
        """
        sent = 0
        while self._answer is None:
            ready = self._safe_text()
            if len(ready) > sent:
                yield ready[sent:]
                sent = len(ready)
            else:
                self._drive_once()
        answer = self.result()
        if len(answer.text) > sent:
            yield answer.text[sent:]

    # ---- for the engine

    def add(self, token: int) -> None:
        if self._first is None:
            self._first = time.perf_counter()
        self.tokens.append(token)

    def stopped(self) -> bool:
        """Whether the text contains a stop string."""
        return bool(self.stop) and bool(self._places(self._decode(self.tokens)))

    def finish(self, reason: str, **facts: Any) -> None:
        text = self._decode(self.tokens)
        places = self._places(text)
        text = text[: min(places)] if places else text
        self._conclude(Answer(text, tuple(self.tokens), reason, **facts))

    def fail(self, error: RequestError) -> bool:
        """Fails the request. Returns False if it had an answer already."""
        if self._answer is not None:
            return False
        self._conclude(Answer(tokens=tuple(self.tokens), finish_reason="error", error=error))
        return True

    def _places(self, text: str) -> list[int]:
        """Where stop strings begin in a text."""
        return [text.find(each) for each in self.stop if each in text]

    def _conclude(self, answer: Answer) -> None:
        first = self._first if self._first is not None else time.perf_counter()
        self._answer = replace(
            answer,
            seconds=time.perf_counter() - self._began,
            seconds_to_first=first - self._began,
        )

    def _drive_once(self, patience: float = _LOOK_AGAIN) -> None:
        if not self._drive(patience):
            time.sleep(0.0005)  # another thread is preparing the image, or the device is busy

    def _safe_text(self) -> str:
        """The text so far, without an end that later tokens may change or complete to a stop string."""
        text = self._decode(self.tokens).rstrip(_UNFINISHED)
        if stopped := self._places(text):  # and finish() is about to be called
            return text[: min(stopped)]
        held_back = max(map(len, self.stop), default=1) - 1
        return text[: len(text) - held_back] if held_back else text
