"""``prompt_of``: assigns the tokens and entries of a request to cache slots and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from voco_model.engine.image_job import ImageJob
from voco_model.engine.plan import Plan
from voco_model.engine.programs import length_bucket
from voco_model.engine.request import RequestError, Sampling
from voco_model.engine.second_pass import Prompt
from voco_model.engine.ticket import Ticket


@dataclass(eq=False)
class Work:
    """A request that is waiting or being answered.

    Attributes:
        sampling: with max_new_tokens and seed set.
        prompt_tokens: set by ``prompt_of``.
        from_store: number of images whose entries were already in the store.
        interruptions: how often the thread working on it was interrupted.
    """

    ticket: Ticket
    plan: Plan
    jobs: list[ImageJob]
    sampling: Sampling
    prompt_tokens: int = 0
    from_store: int = 0
    interruptions: int = 0

    @property
    def ready(self) -> bool:
        return all(job.ready for job in self.jobs)


def prompt_of(
    work: Work, max_prompt_tokens: int, join: Callable[[Sequence[Sequence[int] | Tensor]], Tensor]
) -> Prompt:
    """The prompt of a request whose images are ready, followed by the tokens generated so far.

    An entry takes one slot for each of its tokens. The position ids after it continue as if the whole
    image were there.

    Args:
        join: concatenates token ids and embeddings ``[n, H]`` to embeddings ``[T, H]``.

    Raises:
        RequestError: it takes more than ``max_prompt_tokens`` slots.
    """
    ids: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    entry_slots: list[int] = []
    entry_positions: list[int] = []
    pieces: list[Sequence[int] | Tensor] = []
    slot = position = 0
    moved = False

    def add_text(tokens: Sequence[int]) -> None:
        nonlocal slot, position
        ids.extend(tokens)
        slots.extend(range(slot, slot + len(tokens)))
        positions.extend(range(position, position + len(tokens)))
        slot, position = slot + len(tokens), position + len(tokens)
        pieces.append(tokens)

    for job, place in zip(work.jobs, work.plan.images, strict=True):
        add_text(place.joint)
        if job.features is not None:  # a plain LLaVA reads the image itself
            add_text(place.before)
            pieces.append(job.features)
            count = job.features.shape[0]
            ids.extend([0] * count)  # unused: the embeddings are read
            slots.extend(range(slot, slot + count))
            positions.extend(range(position, position + count))
            slot, position = slot + count, position + count
            add_text(place.behind)
            continue
        entry_slots.append(slot)
        entry_positions.append(position + int(job.entry.positions[0]))
        moved |= position > 0
        slot, position = slot + job.entry.num_tokens, position + job.entry.next_position
    add_text(work.plan.text)
    check_length(slot, max_prompt_tokens)
    work.prompt_tokens = slot
    written = tuple(work.ticket.tokens)  # before an interrupt took its row
    add_text(written)
    embedded = any(isinstance(piece, Tensor) for piece in pieces)
    return Prompt(
        ids,
        slots,
        positions,
        next_slot=slot,
        next_position=position,
        max_new_tokens=work.sampling.max_new_tokens - len(written),
        temperature=work.sampling.temperature,
        top_p=work.sampling.top_p,
        seed=work.sampling.seed,
        ignore_eos=work.sampling.ignore_eos,
        owner=work,
        drawn=len(written),
        features=join(pieces) if embedded else None,
        entries=[job.entry for job in work.jobs] if entry_slots else (),
        entry_slots=entry_slots,
        entry_positions=entry_positions if moved else None,
    )


def check_length(slots: int, at_most: int) -> None:
    """Raises RequestError for a prompt that takes too many slots."""
    if slots > at_most:
        raise RequestError(
            "prompt",
            f"expected a prompt of at most {at_most} tokens, got {slots}; shorten it, or make the "
            "engine with a larger max_prompt_tokens",
        )


def kind_of(prompt: Prompt) -> tuple:
    """Prompts with the same result can be read in one batch."""
    moved = prompt.entry_positions is not None
    return (prompt.causal, prompt.features is not None, moved, length_bucket(len(prompt.slots)))


def failure_of(error: Exception, doing: str) -> RequestError:
    """The RequestError for an error that occurred while doing something for a request."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        failure = RequestError(
            "memory",
            f"{doing} ran out of memory: {error}; make the engine with a smaller max_batch, "
            "max_images or max_prompt_tokens",
        )
    else:
        failure = RequestError("internal", f"{doing} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
