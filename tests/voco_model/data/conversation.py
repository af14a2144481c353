"""Samples in a line, and what a document says, read back from its token ids."""

from __future__ import annotations

import re

import torch

from tests.voco_model import tiny
from voco_model.data.encode import IGNORE, Encoded
from voco_model.data.pictures import Picture
from voco_model.data.samples import Sample


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Question, answer, question, answer."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def sample(*texts: str, sizes=(), system: str | None = None) -> Sample:
    """A conversation about random pictures of these sizes (height, width)."""
    pictures = [
        Picture(tiny.picture(number, size), "data.json:1") for number, size in enumerate(sizes)
    ]
    return Sample("data.json:1", turns(*texts, system=system), pictures)


def text_of(processor, ids: torch.Tensor) -> str:
    """What the ids say, each image's run of tokens as one."""
    return re.sub("(<image>)+", "<image>", processor.tokenizer.decode(ids))


def learnt_runs(document: Encoded) -> list[torch.Tensor]:
    """The labelled tokens, in runs that stand together."""
    assert document.labels.shape == document.input_ids.shape
    learnt = document.labels != IGNORE
    assert document.labels[learnt].equal(document.input_ids[learnt])
    places = learnt.nonzero()[:, 0]
    starts = (places.diff() > 1).nonzero()[:, 0] + 1
    return [document.input_ids[run] for run in places.tensor_split(starts) if len(run)]


def learnt(processor, document: Encoded) -> list[str]:
    """What a model is to learn, run by run."""
    return [processor.tokenizer.decode(run) for run in learnt_runs(document)]
