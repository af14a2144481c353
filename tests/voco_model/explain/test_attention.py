"""Attention weights, against Transformers' eager attention under a dense mask."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import voco_model
from tests.voco_model import tiny
from voco_kernels import MaskLayout, masked_attention
from voco_model import explain
from voco_model.explain.compute import ReadAttention

QUESTION = "what?"
NUM_VOCO = 2


@pytest.fixture
def ready(model, processor):
    with voco_model.enable(model, processor, NUM_VOCO):
        yield model


@pytest.fixture
def found(ready, processor):
    return explain.attention(
        ready, tiny.picture(0), QUESTION, processor=processor, max_new_tokens=5
    )


def prepared(processor) -> dict:
    written = voco_model.prompt(QUESTION, NUM_VOCO)
    return dict(processor(images=tiny.picture(0), text=written, return_tensors="pt"))


def two_pass_answer(model, processor) -> torch.Tensor:
    """int64 ``[new]``, up to the end of the sequence."""
    entries = voco_model.compress(model, tiny.picture(0), processor=processor)
    (tokens,) = voco_model.generate(
        model, entries, QUESTION, processor=processor, max_new_tokens=5, do_sample=False
    )
    end = (tokens == tiny.EOS).nonzero()
    return tokens[: int(end[0])] if len(end) else tokens


def eager_attention(model, inputs: dict, ids: torch.Tensor) -> torch.Tensor:
    """``[L, S, S]``, the mean over heads: stock attention, the dense mask from its definition."""
    stock = copy.deepcopy(model)
    stock.model._forward_pre_hooks.clear()
    stock.set_attn_implementation({"text_config": "eager"})
    first = int((ids == tiny.VOCO).int().argmax())
    kinds = ["v" * first + "c" * NUM_VOCO + "t" * (len(ids) - first - NUM_VOCO)]
    vision = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with torch.no_grad():
        output = stock.model(
            input_ids=ids[None],
            attention_mask=tiny.additive(tiny.dense_mask(kinds), torch.float32),
            position_ids=torch.arange(len(ids))[None],
            use_cache=False,
            output_attentions=True,
            **vision,
        )
    return torch.stack([layer[0].mean(0) for layer in output.attentions])


def test_maps_are_rows_of_eager_attention(ready, processor, found):
    inputs = prepared(processor)
    ids = torch.cat([inputs["input_ids"][0], two_pass_answer(ready, processor)])
    expected = eager_attention(ready, inputs, ids)
    is_image, is_voco = ids == tiny.IMAGE, ids == tiny.VOCO
    column = torch.arange(len(ids))
    first = int(is_voco.int().argmax())
    is_context = (column < first) & ~is_image
    is_text = column >= first + NUM_VOCO

    of_voco, of_text = expected[:, is_voco], expected[:, is_text]
    image = of_voco[:, :, is_image]
    layers = expected.shape[0]
    close = dict(atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found.voco_over_image, image[..., :16].reshape(layers, NUM_VOCO, 4, 4), **close
    )
    torch.testing.assert_close(found.voco_over_tiles, image[..., 16:].sum(-1), **close)
    torch.testing.assert_close(found.voco_over_context, of_voco[:, :, is_context], **close)
    torch.testing.assert_close(found.voco_over_voco, of_voco[:, :, is_voco], **close)
    torch.testing.assert_close(found.text_over_voco, of_text[:, :, is_voco], **close)
    torch.testing.assert_close(found.text_over_text, of_text[:, :, is_text].sum(-1), **close)
    assert found.voco_over_image.std() > 1e-3  # uniform attention would prove little


def test_the_weights_of_a_token_sum_to_one(found):
    of_voco = (
        found.voco_over_image.sum((2, 3))
        + found.voco_over_tiles
        + found.voco_over_context.sum(2)
        + found.voco_over_voco.sum(2)
    )
    of_text = found.text_over_voco.sum(2) + found.text_over_text
    for total in (of_voco, of_text):
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)


def test_tokens_and_the_answer(ready, processor, found):
    answer = two_pass_answer(ready, processor)
    assert len(answer) > 1
    assert found.context_tokens == ("<s>", "\n")
    written = voco_model.prompt(QUESTION, NUM_VOCO).split("<VoCo>")[-1]
    assert "".join(found.text_tokens[: found.answer_start]) == written
    assert len(found.text_tokens) == found.answer_start + len(answer)
    assert found.answer == processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert found.text_over_voco.shape[1] == len(found.text_tokens)


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_the_picture_is_what_the_model_saw(ready, processor, kind, size):
    """LLaVA-1.5 sees the middle of a wide image, LLaVA-NeXT's first tile has all of it, squeezed."""
    image = tiny.picture(1, size)
    if kind == "llava":
        seen = image.crop((image.width // 2 - 16, 0, image.width // 2 + 16, 32))
    else:
        seen = image.resize((32, 32), Image.Resampling.BICUBIC)
    found = explain.attention(ready, image, QUESTION, processor=processor, max_new_tokens=1)
    assert torch.equal(found.picture, torch.from_numpy(np.array(seen)))


@pytest.mark.parametrize("special", [tiny.VOCO, tiny.IMAGE, tiny.EOS])
def test_an_answer_ends_before_a_token_that_is_no_text(ready, processor, special, monkeypatch):
    said = torch.tensor([[70, 71, special, 72]])
    monkeypatch.setattr(
        ready, "generate", lambda *, input_ids, **_: torch.cat([input_ids, said], dim=1)
    )
    found = explain.attention(ready, tiny.picture(0), QUESTION, processor=processor)
    assert len(found.text_tokens) == found.answer_start + 2
    assert found.answer == processor.tokenizer.decode([70, 71])


def test_nothing_of_the_model_changes(ready, processor):
    inputs = prepared(processor)

    def state():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in ready.modules()]
        return copy.deepcopy(ready.config.to_dict()), hooks, ready(**inputs).logits

    def attention():
        return explain.attention(
            ready, tiny.picture(0), QUESTION, processor=processor, max_new_tokens=2
        )

    def same(before, after):
        return before[:2] == after[:2] and torch.equal(before[2], after[2])

    with torch.no_grad():
        before = state()
        attention()
        assert ready.config.text_config._attn_implementation == "voco"
        assert same(before, state())

        def fails(*_):
            raise MemoryError("in the second layer")

        broken = ready.model.language_model.layers[1].register_forward_pre_hook(fails)
        with pytest.raises(MemoryError):
            attention()
        broken.remove()
        assert same(before, state())


def test_read_attention_is_the_softmax_that_makes_the_output():
    """Grouped keys, a scale, float64's truth; and the weights times v are what the kernel returns."""
    generator = torch.Generator().manual_seed(0)
    layout = MaskLayout.from_lengths(5, 2, 4)
    q = torch.randn(1, 4, 11, 16, generator=generator)
    k, v = torch.randn(2, 1, 2, 11, 16, generator=generator)
    v[:] = v[:, :1]  # one v for all heads, so that the mean of weights gives the mean of outputs
    with ReadAttention(5) as read:
        out = masked_attention(q, k, v, layout, scale=0.3)
        torch.ones(2) + 1  # other operators pass by
    (weights,) = read.layers
    dense = tiny.dense_mask(["v" * 5 + "c" * 2 + "t" * 4])[0, 5:]
    scores = 0.3 * q[0, :, 5:].double() @ k[0].double().repeat_interleave(2, 0).mT
    expected = scores.masked_fill(~dense, -torch.inf).softmax(-1).mean(0)
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=0)
    assert weights[~dense].count_nonzero() == 0 and (~dense)[2:, :5].all()
    torch.testing.assert_close(weights @ v[0, 0], out[0, :, 5:].mean(0), atol=1e-5, rtol=0)


def test_errors(model, processor, kind):
    def attention(image=None, **options):
        options = {"processor": processor, **options}
        return explain.attention(model, image or tiny.picture(0), QUESTION, **options)

    with pytest.raises(ValueError, match="expected an enabled model"):
        attention()
    with voco_model.enable(model, processor, NUM_VOCO):
        with pytest.raises(ValueError, match="expected max_new_tokens >= 1, got 0"):
            attention(max_new_tokens=0)
        with pytest.raises(ValueError, match="expected text without <VoCo>"):
            explain.attention(model, tiny.picture(0), "<VoCo>?", processor=processor)
        with pytest.raises(ValueError, match="expected 2 VoCo tokens .* got 0"):
            attention(processor=tiny.tiny_processor(kind))
        with pytest.raises(ValueError, match="expected one image, got 2"):
            attention([tiny.picture(0), tiny.picture(1)])
        model.train()
        with pytest.raises(ValueError, match="expected a model in eval mode"):
            attention()


def test_a_layer_that_cannot_be_read_is_an_error(ready, processor, monkeypatch):
    def other(hidden_states, **_):
        return torch.zeros_like(hidden_states), None

    monkeypatch.setattr(ready.model.language_model.layers[1].self_attn, "forward", other)
    with pytest.raises(RuntimeError, match="reading attention failed: 2 of 3 layers"):
        explain.attention(ready, tiny.picture(0), QUESTION, processor=processor)


def test_image_tokens_that_are_no_patches_are_refused(ready, processor):
    ready.config.vision_feature_select_strategy = "full"
    try:
        with pytest.raises(ValueError, match="expected image tokens that are 4 x 4 patches"):
            explain.attention(ready, tiny.picture(0), QUESTION, processor=processor)
    finally:
        ready.config.vision_feature_select_strategy = "default"
