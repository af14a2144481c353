"""What is asked of the engine and what comes back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from voco_model.arguments import is_whole
from voco_model.vlm.prompt import Turns


class RequestError(RuntimeError):
    """One request that can't be answered; the others go on.

    Attributes:
        reason: "image" (it can't be read), "prompt" (too long, or ill-formed), "memory" (the device's is
            exhausted), "store" (it raised), "cancelled", "interrupted" (submit it again), or "internal".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when they end.

    Attributes:
        max_new_tokens: at most; None is the engine's.
        temperature: 0 takes the likeliest token.
        top_p: in (0, 1]; with a temperature only.
        seed: the same seed gives the same answer, whatever else the engine is doing. None draws one.
        stop: strings that end an answer, and are not part of its text.
        ignore_eos: go on to ``max_new_tokens``, for benchmarks.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        new = self.max_new_tokens
        if new is not None and not (is_whole(new) and new >= 1):
            raise ValueError(f"expected max_new_tokens >= 1, got {new!r}")
        if not (_is_finite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"expected temperature >= 0 (0 is greedy), got {self.temperature!r}")
        if not (_is_finite(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"expected top_p in (0, 1], got {self.top_p!r}")
        if self.seed is not None and not (is_whole(self.seed) and 0 <= self.seed < 2**63):
            raise ValueError(f"expected a seed from 0 to 2**63 - 1, got {self.seed!r}")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"expected ignore_eos as True or False, got {self.ignore_eos!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(
            isinstance(each, str) and each for each in stop
        ):
            raise ValueError(
                f"expected stop strings of at least one character in a list, got {self.stop!r}"
            )
        object.__setattr__(self, "stop", tuple(stop))
        for name in ("max_new_tokens", "seed"):  # NumPy's integers as ints
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else int(value))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class Request:
    """A question about images.

    Attributes:
        images: one image, several, or the frames of a video (a list, or an array with a dimension more
            than an image's); None for a question without any. In any form that
            ``voco_model.pictures.decode`` takes: PIL images, paths, URLs, bytes, arrays, tensors, ...
        text: a question, messages as in Transformers (the last one the user's), or the token ids of what
            follows the images.
        sampling: None is greedy.
        keys: one a image, 64 lower-case hex digits, for who knows his images by name: their pixels are
            then not hashed, and not even read where the store has the entry. A ``salt`` doesn't change
            them.

    Raises:
        TypeError: a ``sampling`` that is none.
    """

    images: Any
    text: Turns | Sequence[int]
    sampling: Sampling | None = None
    keys: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.sampling is not None and not isinstance(self.sampling, Sampling):
            raise TypeError(
                f"expected sampling as Sampling(...), got {type(self.sampling).__name__}"
            )


@dataclass(frozen=True)
class Answer:
    """An answer, or why there is none.

    Attributes:
        text: without special tokens and stop strings.
        tokens: as written, the end-of-sequence token included.
        finish_reason: "stop" (end of sequence, or a stop string), "length" or "error".
        prompt_tokens: slots that the prompt takes in the cache.
        from_store: how many of its images were compressed before it came.
        seconds: from ``submit`` to the last token.
        seconds_to_first: from ``submit`` to the first token.
        error: of a request that failed.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    finish_reason: str = ""
    prompt_tokens: int = 0
    from_store: int = 0
    seconds: float = 0.0
    seconds_to_first: float = 0.0
    error: RequestError | None = None
