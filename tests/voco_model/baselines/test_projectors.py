"""``pooling`` and ``qformer``: what they compute, that they train, that they are saved and loaded."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import voco_model
from tests.voco_model import tiny
from voco_model import baselines
from voco_model.baselines.pooling import fields

SMALL = {"width": 32, "heads": 2, "layers": 2}
OPTIONS = {"pooling": {}, "qformer": SMALL}
PICTURES, QUESTIONS = [tiny.picture(0), tiny.picture(1)], ["what is it?", "why"]


@pytest.fixture
def fresh():
    return tiny.tiny_llava("llava")


@torch.no_grad()
def features_of(model, inputs):
    found = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    return torch.stack(list(found.pooler_output))


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 8, 16])
def test_pooling_is_the_mean_of_fields(llava, llava_processor, num_tokens):
    with baselines.apply("full", llava, llava_processor) as method:
        plain = features_of(llava, method.inputs(PICTURES, QUESTIONS))
    with baselines.apply("pooling", llava, llava_processor, num_tokens) as method:
        inputs = method.inputs(PICTURES, QUESTIONS)
        assert (inputs["input_ids"] == tiny.IMAGE).sum(1).tolist() == [num_tokens] * 2
        assert llava_processor._get_num_multimodal_tokens([(1, 1)]).num_image_tokens == [num_tokens]
        pooled = features_of(llava, inputs)
    rows, columns = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4)}[num_tokens]
    grid = plain.view(2, rows, 4 // rows, columns, 4 // columns, 64)
    assert torch.allclose(pooled, grid.mean((2, 4)).flatten(1, 2), rtol=0, atol=1e-10)


def test_pooling_to_all_tokens_starts_as_the_plain_model(llava, llava_processor):
    options = {"max_new_tokens": 5, "do_sample": False}
    with baselines.apply("full", llava, llava_processor) as method:
        plain = method.generate(PICTURES, QUESTIONS, **options)
    with baselines.apply("pooling", llava, llava_processor, 16) as method:
        assert torch.equal(method.generate(PICTURES, QUESTIONS, **options), plain)


def test_fields_are_near_squares():
    assert [fields(n) for n in (1, 2, 7, 32, 64, 128, 576)] == [
        (1, 1),
        (1, 2),
        (1, 7),
        (4, 8),
        (8, 8),
        (8, 16),
        (24, 24),
    ]


def test_q_former_reads_the_features_with_its_queries(llava, llava_processor):
    with baselines.apply("qformer", llava, llava_processor, 3, **SMALL) as method:
        inputs = method.inputs(PICTURES, QUESTIONS)
        made = features_of(llava, inputs)
        assert made.shape == (2, 3, 64)
        module = llava.model.multi_modal_projector
        with torch.no_grad():
            seen = llava.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
            features = seen.hidden_states[-2][:, 1:]
            order = torch.randperm(16)
            # A set of features, in any order; and each query asks for something of its own.
            assert torch.allclose(module(features[:, order]), made, rtol=0, atol=1e-10)
            assert not torch.allclose(made[:, 0], made[:, 1], rtol=0, atol=1e-3)
            assert not torch.allclose(made[0], made[1], rtol=0, atol=1e-6)
        layers = module.q_former.encoder.layer
        assert [layer.has_cross_attention for layer in layers] == [True, True]


@pytest.mark.parametrize("name", OPTIONS)
def test_trains(fresh, llava_processor, name):
    method = baselines.apply(name, fresh, llava_processor, 2, **OPTIONS[name])
    assert method.trained
    fresh.train()
    fresh.model.vision_tower.requires_grad_(False)
    inputs = method.inputs(PICTURES, QUESTIONS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.SGD([p for p in fresh.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = fresh(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    new = dict(fresh.model.multi_modal_projector.named_parameters())
    # A bias of all keys alike changes no softmax: its gradient is 0 but for rounding.
    silent = [name for name, p in new.items() if p.grad is None or not p.grad.any()]
    assert [name for name in silent if not name.endswith("key.bias")] == []
    assert all(p.grad is None for p in fresh.model.vision_tower.parameters())
    method.undo()


@pytest.mark.parametrize("name", OPTIONS)
def test_saved_and_loaded(fresh, llava_processor, name, tmp_path):
    method = baselines.apply(name, fresh, llava_processor, 2, **OPTIONS[name], style="chatml")
    with torch.no_grad():
        for parameter in fresh.model.multi_modal_projector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    options = {"max_new_tokens": 5, "do_sample": False}
    tokens = method.generate(PICTURES, QUESTIONS, **options)
    fresh.save_pretrained(tmp_path / "once")
    llava_processor.save_pretrained(tmp_path / "once")
    for place in ("once", "twice"):
        loaded = baselines.load(tmp_path / place)
        assert (loaded.name, loaded.num_tokens) == (name, 2)
        assert type(loaded.model) is LlavaForConditionalGeneration
        weights, own = loaded.model.state_dict(), fresh.state_dict()
        assert weights.keys() == own.keys()
        assert all(torch.equal(weights[key], own[key]) for key in own)
        assert torch.equal(loaded.generate(PICTURES, QUESTIONS, **options), tokens)
        loaded.model.save_pretrained(tmp_path / "twice")
        loaded.processor.save_pretrained(tmp_path / "twice")
        loaded.undo()
        with pytest.raises(ValueError, match=f"one made for '{name}'"):
            baselines.apply("full", loaded.model, loaded.processor)
        again = baselines.apply(name, loaded.model, loaded.processor)
        assert torch.equal(again.generate(PICTURES, QUESTIONS, **options), tokens)
        again.undo()
        with pytest.raises(
            ValueError, match="with which the model was built, got {'num_tokens': 3}"
        ):
            baselines.apply(name, loaded.model, loaded.processor, 3)
    half = baselines.load(tmp_path / "once", dtype=torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=f"expected '{name}'.*got 'fastv'"):
        baselines.load(tmp_path / "once", "fastv", num_tokens=2)
    lost = LlavaForConditionalGeneration.from_pretrained(tmp_path / "once")
    with pytest.raises(ValueError, match="load it with voco_model.baselines.load"):
        baselines.apply(name, lost, llava_processor, 2)
    method.undo()


@pytest.mark.parametrize(
    "name, num_tokens, options, message",
    [
        ("pooling", 7, {}, "rows x columns with at most 4 each, got 7, which is 1 x 7"),
        ("pooling", None, {}, "expected num_tokens per image, got None"),
        ("pooling", 0, {}, "expected an int num_tokens >= 1, got 0"),
        ("qformer", 2, {"width": 32, "heads": 3}, "divisible by the number of heads, got 32 and 3"),
        ("qformer", 2, {"layers": 0}, "expected an int layers >= 1, got 0"),
        ("qformer", 2, {"dropout": 1.0}, "expected a dropout from 0 to below 1, got 1.0"),
    ],
)
def test_refuses_and_changes_nothing(llava, llava_processor, name, num_tokens, options, message):
    before = llava.model.multi_modal_projector
    with pytest.raises(ValueError, match=message):
        baselines.apply(name, llava, llava_processor, num_tokens, **options)
    assert llava.model.multi_modal_projector is before
    assert not hasattr(llava.config, "voco_baseline")


@pytest.mark.parametrize("name", ["random", *OPTIONS])
def test_refuses_llava_next(name):
    model, processor = tiny.tiny_llava("next"), tiny.tiny_processor("next")
    with pytest.raises(ValueError, match="expected LLaVA-1.5, got LlavaNext"):
        baselines.apply(name, model, processor, 2)


def test_other_loaders_refuse_a_replaced_projector(tmp_path, fresh, llava_processor):
    with baselines.apply("qformer", fresh, llava_processor, 2, **SMALL):
        fresh.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="made for 'qformer'; load it with voco_model.baselines.load"
    ):
        voco_model.load(tmp_path)
