"""``Request``, ``Sampling`` and ``Answer``: what the engine is asked, and what it returns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from voco_model.arguments import is_whole
from voco_model.vlm.prompt import Turns


class RequestError(RuntimeError):
    """A request that can't be answered. Other requests are not affected.

    Attributes:
        reason: "image" (it can't be read), "prompt" (too long, or malformed), "memory" (the device has
            none left), "store" (it raised an error), "cancelled", "interrupted" (submit the request
            again), or "internal".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and when an answer ends.

    Attributes:
        max_new_tokens: at most; None for the engine's limit.
        temperature: 0 takes the likeliest token.
        top_p: in (0, 1]. Below 1 it requires a temperature.
        seed: the same seed gives the same answer, whatever else the engine is doing. None draws one.
        stop: strings that end an answer. They are not part of its text.
        ignore_eos: continue to ``max_new_tokens``, for benchmarks.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range, or one that would have no effect.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __new__(cls, *args: Any, **options: Any) -> Sampling:
        # Before the dataclass's own __init__, whose message doesn't name the options that there are.
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(_unknown(name, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        new = self.max_new_tokens
        if new is not None and not (is_whole(new) and new >= 1):
            raise ValueError(f"expected max_new_tokens >= 1, got {new!r}")
        if not (_is_finite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"expected temperature >= 0 (0 is greedy), got {self.temperature!r}")
        if not (_is_finite(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"expected top_p in (0, 1], got {self.top_p!r}")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(
                f"expected a temperature above 0 with top_p {self.top_p!r}, got 0, which ignores it and "
                "takes the likeliest token; pass temperature=1.0, or leave top_p out"
            )
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
        for name in ("max_new_tokens", "seed"):  # NumPy integers become ints
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else int(value))


def _unknown(name: str, known: Sequence[str]) -> str:
    likely = get_close_matches(name, known, n=1)
    hint = f"did you mean {likely[0]}?" if likely else "for others use voco_model.generate"
    return f"expected sampling options among {', '.join(known)}, got {name}; {hint}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class Request:
    """A question about images.

    Attributes:
        images: one image, several, or the frames of a video (a list, or an array with one dimension more
            than an image); None for a question without images. In any form that
            ``voco_model.pictures.decode`` accepts: PIL images, paths, URLs, bytes, arrays, tensors, ...
        text: a question, messages as in Transformers (the last one the user's), or the token ids that
            follow the images.
        sampling: None is greedy.
        keys: a key for each image, 64 lower-case hex digits, if you identify your images yourself: their
            pixels are then not hashed, and not even read if the store has the entry. The engine's
            ``salt`` doesn't affect these keys.

    Raises:
        TypeError: a ``sampling`` that isn't a ``Sampling``.
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
        tokens: all generated tokens, including the end-of-sequence token.
        finish_reason: "stop" (end of sequence, or a stop string), "length" or "error".
        prompt_tokens: cache slots that the prompt takes.
        from_store: number of its images whose entries were already in the store.
        seconds: from ``submit`` to the last token.
        seconds_to_first: from ``submit`` to the first token.
        error: why the request failed; None if it didn't.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    finish_reason: str = ""
    prompt_tokens: int = 0
    from_store: int = 0
    seconds: float = 0.0
    seconds_to_first: float = 0.0
    error: RequestError | None = None
