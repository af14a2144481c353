"""One masked pass against stock attention with the dense mask, written down independently."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import StableLmConfig

import voco_model
from tests.voco_model import tiny

BATCHES = {
    "one row": {"rows": [(1, 6)]},
    "left padding": {"rows": [(2, 6), (2, 3), (2, 9)]},
    "right padding": {"rows": [(2, 6), (2, 3), (2, 9)], "side": "right"},
    "text-only row, left": {"rows": [(2, 6), (0, 25), (3, 4)]},
    "text-only row, right": {"rows": [(0, 7), (2, 6), (1, 4)], "side": "right"},
    "text only": {"rows": [(0, 7), (0, 4)], "side": "right"},
    "nothing after the VoCo tokens": {"rows": [(8, 0), (2, 5)], "side": "right"},
    "truncated text": {"rows": [(2, 30), (2, 3), (0, 99)], "side": "right", "truncate": 6},
    "truncated VoCo tokens": {"rows": [(4, 6), (1, 9)], "side": "right", "truncate": 3},
}


@pytest.fixture(scope="module")
def stock(kind):
    """The same weights in float32 and, as the truth, in float64, with stock eager attention."""
    model = tiny.tiny_llava(kind)
    model.set_attn_implementation({"text_config": "eager"})
    return model, copy.deepcopy(model).double()


def run(model, inputs: dict, kinds: list[str], mask: torch.Tensor | None) -> dict:
    """Logits and loss of real tokens, and all gradients, in float64."""
    model.train()
    model.zero_grad()
    inputs = dict(inputs)
    if mask is not None:
        inputs["attention_mask"] = tiny.additive(mask, model.dtype)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model(**inputs, labels=tiny.labels_of(inputs, kinds), use_cache=False)
    output.loss.backward()
    found = {"logits": output.logits[tiny.where(kinds, "vct")], "loss": output.loss}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return {name: value.detach().double() for name, value in found.items()}


def assert_within_twice_the_error(ours: dict, stock: dict, truth: dict) -> None:
    """max|ours - truth| <= 2 max|stock - truth| + 1e-5 max(1, |truth|), for each tensor."""
    assert ours.keys() == stock.keys() == truth.keys()
    for name, expected in truth.items():
        scale = max(1.0, expected.abs().max().item())
        allowed = 2 * (stock[name] - expected).abs().max().item() + 1e-5 * scale
        error = (ours[name] - expected).abs().max().item()
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("name", BATCHES)
def test_equals_dense_mask(enabled, stock, name):
    inputs, kinds = tiny.batch_of(enabled, **BATCHES[name])
    inputs["position_ids"] = tiny.positions_of(inputs["attention_mask"])
    mask = tiny.dense_mask(kinds)
    ours = run(enabled, inputs, kinds, None)
    in_float32, truth = (run(model, inputs, kinds, mask) for model in stock)
    assert_within_twice_the_error(ours, in_float32, truth)


def test_a_dead_mask_would_be_noticed(enabled, stock):
    """Plain causal attention is farther from the truth than any tolerance above allows."""
    inputs, kinds = tiny.batch_of(enabled, [(2, 6), (2, 3)])
    inputs["position_ids"] = tiny.positions_of(inputs["attention_mask"])
    everything_is_text = [row.replace("v", "t").replace("c", "t") for row in kinds]
    masked = run(stock[1], inputs, kinds, tiny.dense_mask(kinds))
    causal = run(stock[1], inputs, kinds, tiny.dense_mask(everything_is_text))
    assert (masked["logits"] - causal["logits"]).abs().max() > 0.1
    assert (masked["loss"] - causal["loss"]).abs() > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(enabled, reentrant):
    inputs, kinds = tiny.batch_of(enabled, [(2, 6), (2, 3)], side="right")
    plain = run(enabled, inputs, kinds, None)
    enabled.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = run(enabled, inputs, kinds, None)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_training_builds_no_cache_and_no_dense_mask(enabled):
    inputs, _ = tiny.batch_of(enabled, [(2, 6), (2, 3)])
    batch, length = inputs["input_ids"].shape
    handed = []
    spies = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: handed.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for layer in enabled.model.language_model.layers
    ]
    enabled.train()
    output = enabled(**inputs)
    for spy in spies:
        spy.remove()
    assert output.past_key_values is None
    assert [tuple(mask.shape) for mask in handed] == [(batch, 1, 1, length)] * 3


def test_packed_documents_do_not_see_each_other(enabled):
    """Position ids that start again, as DataCollatorWithFlattening makes them, without a mask."""
    rows = [(2, 6), (2, 3), (0, 5)]
    padded, kinds = tiny.batch_of(enabled, rows, side="right")
    lengths = padded["attention_mask"].sum(1).tolist()
    documents = [ids[:n] for ids, n in zip(padded["input_ids"], lengths, strict=True)]
    packed = {name: value for name, value in padded.items() if name != "attention_mask"}
    packed["input_ids"] = torch.cat(documents)[None]
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    for mode in (True, False):
        enabled.train(mode)
        with torch.no_grad():
            together = enabled(**packed).logits[0]
            apart = enabled(**padded).logits[tiny.where(kinds, "vct")]
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_two_images_in_a_row_hide_both(enabled, stock):
    """Text between images stays visible; text sees neither image, nor does the second see the
    first."""
    inputs, letters = tiny.two_images(enabled)
    ids = inputs["input_ids"][0]
    mask = torch.ones(1, len(ids), len(ids), dtype=torch.bool).tril()
    for query, reader in enumerate(letters):
        for key, read in enumerate(letters):
            if (read == "v" and reader not in "vc") or (read == "w" and reader not in "wd"):
                mask[0, query, key] = False
    with torch.no_grad():
        ours = enabled(**inputs).logits
        dense = stock[0](**inputs, attention_mask=tiny.additive(mask, torch.float32)).logits
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)


def test_runs_without_voco_tokens_as_before(model):
    inputs, _ = tiny.batch_of(model, [(0, 7), (0, 4)])
    with torch.no_grad():
        before = model(**inputs).logits[inputs["attention_mask"] == 1]
        with voco_model.enable(model, voco_token_id=tiny.VOCO):
            after = model(**inputs).logits[inputs["attention_mask"] == 1]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_a_text_model_that_loses_the_mask_is_refused():
    """StableLM's layers drop the keyword arguments that they are given, and the layout with them."""
    model = tiny.tiny_llava("llava", text_class=StableLmConfig, num_key_value_heads=4)
    ids = torch.tensor([[tiny.BOS, 70, 80, 90]])
    with (
        voco_model.enable(model, voco_token_id=tiny.VOCO),
        pytest.raises(ValueError, match="got StableLmAttention without the mask's layout"),
        torch.no_grad(),
    ):
        model(input_ids=ids)


def test_a_copy_of_an_enabled_model_is_enabled(enabled):
    inputs, _ = tiny.batch_of(enabled, [(2, 6)])
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(enabled)(**inputs).logits, enabled(**inputs).logits)


def test_compiles_without_a_graph_break(enabled):
    """The language model under the mask, forward and backward, and one graph for other lengths
    inside."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    inputs, kinds = tiny.batch_of(enabled, [(2, 6), (2, 3)])
    others, _ = tiny.batch_of(enabled, [(3, 5), (1, 2)])
    assert inputs["input_ids"].shape == others["input_ids"].shape
    expected = run(enabled, inputs, kinds, None)["loss"]
    enabled.model.language_model.compile(fullgraph=True, backend="aot_eager")
    try:
        torch.testing.assert_close(run(enabled, inputs, kinds, None)["loss"], expected)
        enabled(**others)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    finally:
        enabled.model.language_model._compiled_call_impl = None
        torch.compiler.reset()


def refused(model, message: str, error=ValueError, **inputs) -> None:
    with pytest.raises(error, match=message):
        model(**inputs)


def test_refuses_what_it_cannot_mask(enabled):
    inputs, kinds = tiny.batch_of(enabled, [(2, 6)])
    ids = inputs["input_ids"]
    dense = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    embeds = enabled.get_input_embeddings()(ids)
    refused(enabled, "got inputs_embeds only", inputs_embeds=embeds)
    refused(enabled, r"0 for padding, got \[1, 1, ", **{**inputs, "attention_mask": dense})
    holes = inputs["attention_mask"].clone()
    holes[0, 5] = 0
    refused(enabled, r"positions \[5\]", **{**inputs, "attention_mask": holes})
    stray = torch.tensor([[tiny.VOCO, 9, 10]])
    refused(enabled, "position 0 of row 0", input_ids=stray)
    early = ids.clone()
    early[0, 0] = tiny.VOCO
    message = (
        r"before every run of VoCo tokens \(id 261\), got a run without one at position 0 of row 0"
    )
    refused(enabled, message, **{**inputs, "input_ids": early})
    if "image_sizes" in inputs:
        refused(enabled, r"expected image_sizes, .*LLaVA-NeXT", **{**inputs, "image_sizes": None})
    with pytest.raises(TypeError, match="got 2 positional"):
        enabled.model(ids, inputs["pixel_values"])
    refused(enabled, "attention weights are never computed", **inputs, output_attentions=True)
    enabled.set_attn_implementation({"text_config": "eager"})  # behind the handle's back
    refused(enabled, "got 'eager' and False", **inputs)
