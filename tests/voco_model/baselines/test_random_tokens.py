"""``random``: one set an image, and the model that sees no other token."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.voco_model import tiny
from tests.voco_model.baselines.eager import rows_of
from voco_model import baselines
from voco_model.vlm.caches import CACHE_ARGUMENT

KEPT, STEPS = 4, 5
PICTURES = [tiny.picture(0), tiny.picture(1)]


@torch.no_grad()
def sets(method, images, turns) -> list[list[int]]:
    """Which of each image's tokens a forward pass keeps, counted within the image."""
    inputs = method.inputs(images, turns)
    cache = DynamicCache(config=method.model.config.text_config)
    method.model(**inputs, **{CACHE_ARGUMENT: cache})
    found = []
    for row, columns in enumerate(cache.voco_pruned.columns):
        is_image = inputs["input_ids"][row] == tiny.IMAGE
        own = columns[cache.voco_pruned.real[row]]
        found.append((is_image.cumsum(0)[own[is_image[own]]] - 1).tolist())
    return found


def test_equals_a_model_that_never_sees_the_others(llava, llava_processor):
    messages = [{"role": "user", "content": "no image"}]
    images, turns = PICTURES, ["what is it?", messages, "why"]
    with baselines.apply("random", llava, llava_processor, KEPT) as method:
        kept, inputs = sets(method, images, turns), method.inputs(images, turns)
        options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
        tokens = method.generate(images, turns, **options)
        copies = method.generate(images, turns, **options, num_beams=2, num_return_sequences=2)
        with torch.no_grad():
            logits = llava(**inputs).logits
            without_cache = llava(**inputs, use_cache=False).logits
    assert torch.equal(logits, without_cache)
    rows = rows_of(llava, inputs)
    for row, own, last, new in zip(rows, kept, logits[:, -1], tokens, strict=True):
        columns = row.image[own] if row.features is not None else torch.tensor([])
        truth, _ = row.forward(0, kept=columns)
        assert (last - truth[-1]).abs().max() < 1e-5
        assert new.tolist() == row.greedy(0, None, STEPS, kept=columns)
    assert [len(own) for own in kept] == [KEPT, 0, KEPT]
    assert len(copies) == 6


@torch.no_grad()
@pytest.mark.parametrize("given", [(), ("position_ids",), ("attention_mask",)])
def test_decoding_outside_generate(llava, llava_processor, given):
    with baselines.apply("random", llava, llava_processor, KEPT) as method:
        inputs = method.inputs(PICTURES, ["what is it?", "why"])  # the second row is padded
        mask = inputs["attention_mask"]
        made = llava.generate(
            **inputs,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        step = dict(inputs)
        if "position_ids" in given:
            step["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=llava.config.text_config)
        for expected, token in zip(made.logits, made.sequences[:, -STEPS:].T, strict=True):
            logits = llava(**step, **{CACHE_ARGUMENT: cache}).logits[:, -1]
            assert (logits - expected).abs().max() < 1e-5
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = {"input_ids": token[:, None]}
            if "attention_mask" in given:
                step["attention_mask"] = mask


def test_an_image_keeps_its_set(llava, llava_processor):
    first, second = PICTURES
    with baselines.apply("random", llava, llava_processor, KEPT) as method:
        (alone,) = sets(method, [first], ["what is it?"])
        one, other = sets(method, [second, first], ["why", "a longer question?"])
        assert other == alone != one
    with baselines.apply("random", llava, llava_processor, KEPT - 1) as method:
        assert set(sets(method, [first], ["why"])[0]) < set(alone)
    with baselines.apply("random", llava, llava_processor, KEPT, seed=1) as method:
        assert sets(method, [first], ["why"]) != [alone]


def test_refuses_image_tokens_without_pixels(llava, llava_processor):
    with baselines.apply("random", llava, llava_processor, KEPT) as method:
        inputs = method.inputs(PICTURES[:1], ["why"])
        del inputs["pixel_values"]
        with pytest.raises(ValueError, match="expected pixel_values of 1 images, got 0"):
            llava(**inputs)
    with pytest.raises(ValueError, match="expected an int seed >= 0, got -1"):
        baselines.apply("random", llava, llava_processor, KEPT, seed=-1)
