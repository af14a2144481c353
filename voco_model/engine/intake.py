"""``Intake``: checks requests, and prepares the work that the scheduler does for them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from typing import Any

from voco_model.engine.images import Images
from voco_model.engine.plan import Plan, plan_prompt
from voco_model.engine.prompts import Work, check_length
from voco_model.engine.request import Request, RequestError, Sampling
from voco_model.engine.ticket import Ticket
from voco_model.kv_store.format import check_key
from voco_model.pictures import as_images
from voco_model.vlm.prompt import Turns, pictures_in


class Intake:
    """Turns requests into work.

    Args:
        model, processor: the engine's.
        images: the images that requests are waiting for.
        mode, num_voco, max_new_tokens, max_prompt_tokens: as for ``TwoPassEngine``.
    """

    def __init__(
        self,
        model,
        processor,
        images: Images,
        *,
        mode: str,
        num_voco: int,
        max_new_tokens: int,
        max_prompt_tokens: int,
    ) -> None:
        self._model = model
        self._processor = processor
        self._images = images
        self._mode = mode
        self._num_voco = num_voco
        self._max_new_tokens = max_new_tokens
        self._max_prompt_tokens = max_prompt_tokens

    def work_of(self, request: Request, ticket: Ticket) -> Work:
        """Checks a request, looks its images up and decodes those that pass 1 has to read.

        Raises:
            RequestError: it can't be answered.
        """
        sampling = request.sampling or Sampling()
        new = sampling.max_new_tokens or self._max_new_tokens
        if new > self._max_new_tokens:
            raise RequestError(
                "prompt",
                f"expected max_new_tokens <= {self._max_new_tokens}, got {new}; make the engine "
                "with a larger max_new_tokens",
            )
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        sampling = replace(sampling, max_new_tokens=new, seed=seed)
        try:
            given = _images_of(request)
            images = as_list(given)
            if given is not None and not images:
                raise ValueError(
                    "expected at least one image, or None for a question without any, got an empty "
                    f"{type(request.images).__name__}"
                )
        except RequestError:
            raise
        except Exception as error:  # an iterator that opens files may raise anything
            raise RequestError("image", _message(error, "listing the images")) from error
        try:
            images = with_keys(images, request.keys)
            plan = self.plan(request.text, len(images))
        except Exception as error:
            raise RequestError("prompt", _message(error, "tokenizing the text")) from error
        if not plan.text:
            raise RequestError(
                "prompt", "expected at least one token of text, got none; add a question"
            )
        if len(images) > 1:
            self._check_several(len(images))
        if self._mode == "voco":
            check_length(plan.num_text + self._num_voco * len(images), self._max_prompt_tokens)
        jobs = []
        for place, ((image, key), slot) in enumerate(zip(images, plan.images, strict=True)):
            with naming(place, len(images)):
                jobs.append(self._images.job(image, slot, first=place == 0, key=key))
        ticket.stop = sampling.stop
        found = sum(job.from_store for job in jobs)
        return Work(ticket, plan, jobs, sampling, from_store=found)

    def plan(self, text: Turns | Sequence[int], images: int) -> Plan:
        """See ``plan_prompt``."""
        return plan_prompt(
            text,
            images,
            processor=self._processor,
            model=self._model,
            num_voco=self._num_voco if self._mode == "voco" else None,
        )

    def _check_several(self, images: int) -> None:
        if self._mode == "full_cache":
            raise RequestError(
                "prompt",
                f"expected one image in mode 'full_cache', got {images}; without the mask, an image's "
                "keys depend on the images before it",
            )
        if self._mode == "voco" and not self._model.config.voco_isolated:
            raise RequestError(
                "prompt",
                f"expected one image, got {images} for a model whose images attend to each other; use "
                "enable(..., isolated=True), with which each has an entry of its own",
            )


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


def as_list(images: Any) -> list[Any]:
    """The images as a list; an empty one for None."""
    if images is None:
        return []
    return list(as_images(images))


@contextmanager
def naming(place: int, images: int) -> Iterator[None]:
    """Adds the number of an image that can't be read to the message, if there are several."""
    try:
        yield
    except RequestError as error:
        if error.reason != "image" or images == 1:
            raise
        raise RequestError("image", f"image {place + 1} of {images}: {error}") from error


def with_keys(images: list[Any], keys: Sequence[str] | None) -> list[tuple[Any, str | None]]:
    """Pairs of an image and its key, or None without keys."""
    if keys is None:
        return list(zip(images, repeat(None), strict=False))
    if not isinstance(keys, Sequence):
        raise TypeError(f"expected a list with a key for each image, got {keys!r}")
    keys = [check_key(key) for key in ([keys] if isinstance(keys, str) else keys)]
    if len(keys) != len(images):
        raise ValueError(
            f"expected a key for each image, got {len(keys)} keys for {len(images)} images"
        )
    return list(zip(images, keys, strict=True))


def _message(error: Exception, doing: str) -> str:
    """An argument error's own message; for any other error, what failed."""
    message = str(error)
    if message.startswith("expected"):
        return message
    return f"{doing} failed: {type(error).__name__}: {message}"
