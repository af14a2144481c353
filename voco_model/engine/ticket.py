"""``Ticket``: a request that is being answered, as its sender sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from voco_model.engine.request import Answer, RequestError

# Seconds after which a thread that waits for another to drive looks at its own answer again.
_LOOK_AGAIN = 0.02
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Ticket:
    """Iterate over it for the answer's text as it comes, or wait for ``result()``.

    There is no thread behind it: whoever waits drives the engine, for all requests. Tickets may be
    waited for in different threads.

    Attributes:
        tokens: written so far.
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
        """Gives up the request; its row is freed at the next step. A finished one stays as it is."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> Answer:
        """The answer, when it is complete.

        Raises:
            RequestError: there is none.
            TimeoutError: not within ``timeout`` seconds, or one step more where this thread was driving.
                The request goes on.
        """
        answer = self.wait(timeout)
        if answer.error is not None:
            raise answer.error
        return answer

    def wait(self, timeout: float | None = None) -> Answer:
        """As ``result``, but a request that failed gives an ``Answer`` with ``error``."""
        began = time.perf_counter()
        while self._answer is None:
            left = _LOOK_AGAIN if timeout is None else began + timeout - time.perf_counter()
            if left < 0:
                raise TimeoutError(
                    f"expected an answer within {timeout} s, got {len(self.tokens)} tokens so far; wait "
                    "longer, or cancel()"
                )
            self._drive_once(min(left, _LOOK_AGAIN))
        return self._answer

    def __iter__(self) -> Iterator[str]:
        """Pieces of the answer's text, each at least one character.

        Raises:
            RequestError: behind the pieces that came before.
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
        """Whether one of the stop strings has been written."""
        return bool(self.stop) and bool(self._places(self._decode(self.tokens)))

    def finish(self, reason: str, **facts) -> None:
        text = self._decode(self.tokens)
        places = self._places(text)
        text = text[: min(places)] if places else text
        self._conclude(Answer(text, tuple(self.tokens), reason, **facts))

    def fail(self, error: RequestError) -> bool:
        """Whether it had no answer yet."""
        if self._answer is not None:
            return False
        self._conclude(Answer(tokens=tuple(self.tokens), finish_reason="error", error=error))
        return True

    def _places(self, text: str) -> list[int]:
        """Where stop strings begin."""
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
            time.sleep(0.0005)  # another thread prepares the image, or the device is at it

    def _safe_text(self) -> str:
        """The text so far, without what the next token may still change or turn into a stop string."""
        text = self._decode(self.tokens).rstrip(_UNFINISHED)
        if stopped := self._places(text):  # and finish() is about to say so
            return text[: min(stopped)]
        held_back = max(map(len, self.stop), default=1) - 1
        return text[: len(text) - held_back] if held_back else text
