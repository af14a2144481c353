"""Tiny enabled models, questions about pictures, and the answers of ``generate``."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import voco_model
from tests.voco_model import tiny
from voco_model import Request, Sampling
from voco_model.vlm.prompt import image_part, text_part

NUM_VOCO, NEW_TOKENS = 2, 10
# So few ids that the image influences every token of the answer; with a sentence of bytes it doesn't.
SHORT, LONG = [70, 90], [80 + i % 60 for i in range(23)]
SENTENCE = "Is there a flag in the picture?"


@dataclass(frozen=True)
class Case:
    """A request, and its answer's tokens from one masked pass of ``generate``."""

    request: Request
    tokens: tuple[int, ...]


def images_of(request: Request) -> list:
    images = request.images
    return [] if images is None else images if isinstance(images, list) else [images]


def ids_of(processor, request: Request, mode: str) -> list[int]:
    """A prompt's token ids, with each image token repeated for its features."""
    images = images_of(request)
    as_ids = isinstance(request.text, list) and isinstance(request.text[0], int)
    if mode == "voco":
        front = image_part(NUM_VOCO, len(images))
    else:
        front = "\n".join(["<image>"] * len(images))
    if not as_ids:
        front += text_part(request.text, with_image=bool(images))
    made = processor(images=images or None, text=front)
    return made["input_ids"][0] + (request.text if as_ids else [])


def inputs_of(processor, requests, mode: str = "voco") -> dict:
    """The inputs of ``generate`` for requests, padded on the left."""
    rows = [ids_of(processor, request, mode) for request in requests]
    width = max(map(len, rows))
    padded = torch.tensor([[tiny.PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    pictures = [picture for request in requests for picture in images_of(request)]
    vision = processor.image_processor(images=pictures, return_tensors="pt") if pictures else {}
    return {"input_ids": padded, "attention_mask": mask, **vision}


def generated(model, processor, request: Request, mode: str = "voco") -> tuple[int, ...]:
    """The answer of one (masked) pass of ``generate``."""
    inputs = inputs_of(processor, [request], mode)
    sampling = request.sampling or Sampling()
    new = sampling.max_new_tokens or NEW_TOKENS
    out = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())


def requests_of(seed: int) -> list[Request]:
    # Few, large patches: a model can't tell noise of different seeds apart.
    pictures = [
        tiny.picture(seed + index, (3, 3)).resize(size[::-1])
        for index, size in enumerate(tiny.SIZES)
    ]
    alone = [Request(picture, text) for picture in pictures for text in (SHORT, LONG)]
    return [
        *alone,
        Request(pictures[0], SENTENCE, Sampling(max_new_tokens=3)),
        Request(pictures[:2], SHORT),
        Request([pictures[2], pictures[0], pictures[2]], LONG, Sampling(max_new_tokens=6)),
        Request(None, "No picture?"),
    ]


@pytest.fixture(scope="module")
def world(kind):
    """``model``, ``processor``, ``cases``. The model's stop tokens occur in some of its answers."""
    model, processor = tiny.tiny_llava(kind), tiny.tiny_processor(kind)
    with torch.no_grad():  # make images affect the VoCo tokens strongly
        model.model.multi_modal_projector.linear_2.weight.mul_(4.0)
    with voco_model.enable(model, processor, num_voco=NUM_VOCO, isolated=True):
        for seed in range(0, 60, 3):
            requests = requests_of(seed)
            free = [generated(model, processor, request) for request in requests]
            if len(set(free[0:6:2])) == len(set(free[1:6:2])) == 3:
                break
        else:
            raise AssertionError("no three pictures have answers of their own")
        # Tokens in a few answers, but not at their start, so that some answers stop and some don't.
        rare = sorted(
            {token for tokens in free for token in tokens[2:]},
            key=lambda token: (sum(token in tokens for tokens in free), token),
        )
        rare = [token for token in rare if not any(tokens[0] == token for tokens in free)]
        model.generation_config.eos_token_id = [tiny.EOS, *rare[:3]]
        cases = [Case(request, generated(model, processor, request)) for request in requests]
        assert len({len(case.tokens) for case in cases}) > 2, "some stop, some don't"
        yield SimpleNamespace(model=model, processor=processor, cases=cases, kind=kind)


@pytest.fixture
def engine_of(world):
    """Makes engines of the world's model."""

    def make(store=None, **options):
        options = {"max_new_tokens": NEW_TOKENS, "max_prompt_tokens": 400, **options}
        return voco_model.TwoPassEngine(world.model, world.processor, store, **options)

    return make


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
