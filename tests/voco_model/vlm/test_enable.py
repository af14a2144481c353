"""``enable`` and ``undo``: what they change, what they put back, what they refuse."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import voco_model
from tests.voco_model import tiny
from voco_model import baselines


def snapshot(model, processor) -> dict:
    """Everything that enable may touch, by value."""
    tokenizer = processor.tokenizer
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attributes": set(vars(model)),
        "attention": [
            config._attn_implementation
            for config in (model.config, model.config.text_config, model.config.vision_config)
        ],
        "hooks": len(model.model._forward_pre_hooks) + len(model._forward_pre_hooks),
        "template": processor.chat_template,
        "tokenizer": tokenizer._tokenizer.to_str(),
        "special": tokenizer.special_tokens_map,
        "size": len(tokenizer),
        "ids": tokenizer("a<VoCo>b")["input_ids"],
        "named": hasattr(tokenizer, "voco_token"),
    }


def assert_same(before: dict, after: dict) -> None:
    weights, others = before.pop("weights"), after.pop("weights")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert before == after


@pytest.mark.parametrize("room", [True, False], ids=["padded embeddings", "full embeddings"])
@pytest.mark.parametrize("tied", [True, False])
def test_undo_restores_everything(kind, room, tied):
    model = tiny.tiny_llava(kind, vocab_size=320 if room else tiny.VOCO)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = tied
    model.tie_weights()
    model.get_input_embeddings().weight.requires_grad_(False)
    processor = tiny.tiny_processor(kind)
    inputs, _ = tiny.batch_of(model, [(0, 6), (0, 3)])
    before = snapshot(model, processor)
    logits = model(**inputs).logits
    handle = voco_model.enable(model, processor, num_voco=4)
    assert len(processor.tokenizer) == tiny.VOCO + 1
    assert processor.tokenizer.voco_token_id == handle.voco_token_id == tiny.VOCO
    assert processor.tokenizer("a<VoCo>b")["input_ids"][2] == tiny.VOCO
    rows = model.get_input_embeddings().num_embeddings
    assert rows == model.config.text_config.vocab_size == (320 if room else tiny.VOCO + 1)
    assert (model.config.voco_token_id, model.config.num_voco) == (tiny.VOCO, 4)
    assert model.config.text_config._attn_implementation == "voco"
    assert model.config.vision_config._attn_implementation == "sdpa"
    masked, _ = tiny.batch_of(model, [(4, 3)])
    model.generate(**masked, max_new_tokens=2)
    handle.undo()
    assert_same(before, snapshot(model, processor))
    assert torch.equal(model(**inputs).logits, logits)
    handle.undo()  # a second time is nothing


def test_undo_keeps_what_was_learnt(kind):
    model, processor = tiny.tiny_llava(kind, vocab_size=tiny.VOCO), tiny.tiny_processor(kind)
    with voco_model.enable(model, processor):
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1.0)
        learnt = model.get_input_embeddings().weight.clone()
    assert torch.equal(model.get_input_embeddings().weight, learnt[:-1])


def test_context_manager_undoes_on_an_error(model):
    with pytest.raises(KeyError), voco_model.enable(model, voco_token_id=tiny.VOCO):
        raise KeyError
    assert not hasattr(model.config, "voco_token_id")


def test_saved_models_know_their_tokens(kind, tmp_path):
    model, processor = tiny.tiny_llava(kind, vocab_size=tiny.VOCO), tiny.tiny_processor(kind)
    voco_model.enable(model, processor, num_voco=3)
    inputs, _ = tiny.batch_of(model, [(3, 6), (3, 2)])
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded_processor = type(processor).from_pretrained(tmp_path)
    assert loaded.config.text_config._attn_implementation == "sdpa"  # loads without this package
    for given in ((), (loaded_processor,)):
        with voco_model.enable(loaded, *given) as handle:
            assert (handle.voco_token_id, handle.num_voco) == (tiny.VOCO, 3)
            assert torch.equal(loaded.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
        assert (loaded.config.voco_token_id, loaded.config.num_voco) == (tiny.VOCO, 3)
    assert loaded_processor.tokenizer.voco_token_id == tiny.VOCO
    with voco_model.enable(loaded, num_voco=1) as handle:  # fewer than trained with is legitimate
        assert handle.num_voco == loaded.config.num_voco == 1
    assert loaded.config.num_voco == 3


def test_a_processor_may_be_enabled_for_two_models(kind):
    processor = tiny.tiny_processor(kind)
    first, second = tiny.tiny_llava(kind), tiny.tiny_llava(kind)
    with voco_model.enable(first, processor, num_voco=2):
        with voco_model.enable(second, processor, num_voco=3) as handle:
            assert handle.voco_token_id == first.config.voco_token_id
        assert processor.tokenizer.voco_token_id == tiny.VOCO


def refused(message: str, *args, error=ValueError, **kwargs) -> None:
    with pytest.raises(error, match=message):
        voco_model.enable(*args, **kwargs)


def test_refuses_other_models_and_leaves_them_alone(kind):
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    refused(
        "LlavaForConditionalGeneration or LlavaNextForConditionalGeneration, got LlamaForCausalLM",
        LlamaForCausalLM(config),
        error=TypeError,
    )
    model, processor = tiny.tiny_llava(kind), tiny.tiny_processor(kind)
    before = snapshot(model, processor)
    other_image = copy.deepcopy(model)
    other_image.config.image_token_index = other_image.config.image_token_id = 7
    refused("model's 7, got <image> = 4", other_image, processor)
    refused("neither processor nor voco_token_id", model)
    refused("262 embedding rows, got 999", model, voco_token_id=999)
    refused("got 4 for both", model, voco_token_id=tiny.IMAGE)
    refused(r"261 \(the tokenizer\)", model, processor, voco_token_id=9)
    for wrong in (0, True, 1.0):
        refused(f"int num_voco >= 1, got {wrong!r}", model, processor, wrong)
    refused(
        "got PreTrainedTokenizerFast|got Tokenizers", model, processor.tokenizer, error=TypeError
    )
    assert_same(before, snapshot(model, processor))
    with voco_model.enable(model, processor, num_voco=5):
        refused("got one that is, with num_voco=5; call undo", model, processor)
        assert model.config.text_config._attn_implementation == "voco"


def test_a_number_of_numpy_is_saved_as_a_number(model, processor, tmp_path):
    with voco_model.enable(model, processor, np.int64(3)):
        assert type(model.config.num_voco) is int
        model.config.save_pretrained(tmp_path)


def test_refuses_a_window_and_dropout():
    windowed = tiny.tiny_llava("next", sliding_window=64)
    refused("sliding_window=64", windowed, voco_token_id=tiny.VOCO)
    model = tiny.tiny_llava("llava")
    model.config.text_config.attn_logit_softcapping = 50.0
    refused("attn_logit_softcapping=50.0", model, voco_token_id=tiny.VOCO)
    dropping = tiny.tiny_llava("llava", attention_dropout=0.1)
    refused("attention_dropout 0, got 0.1", dropping, voco_token_id=tiny.VOCO)


def test_an_error_midway_undoes_what_was_done(kind, monkeypatch):
    model, processor = tiny.tiny_llava(kind, vocab_size=tiny.VOCO), tiny.tiny_processor(kind)
    before = snapshot(model, processor)
    before["attributes"].add("set_attn_implementation")
    monkeypatch.setattr(model, "set_attn_implementation", lambda implementation: None)
    refused("whose attention can be switched, got (Llama|Mistral)Model", model, processor)
    assert_same(before, snapshot(model, processor))


@pytest.mark.parametrize(
    "name, num_tokens, options",
    [
        ("full", None, {}),
        ("full", None, {"num_voco": 2}),
        ("random", 4, {}),
        ("fastv", 4, {"layer": 1}),
    ],
)
def test_refuses_a_model_that_a_method_is_applied_to(name, num_tokens, options):
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    with baselines.apply(name, model, processor, num_tokens, **options):
        before = snapshot(model, processor)
        refused("that a method of voco_model.baselines is applied to; call undo", model, processor)
        assert_same(before, snapshot(model, processor))
    with voco_model.enable(model, processor):
        pass


def test_refuses_the_projector_of_a_baseline(tmp_path):
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    message = "with its own projector, got one made for 'pooling'; call undo.*baselines.load"
    with baselines.apply("pooling", model, processor, 4):
        refused(message, model, processor)
        assert model.config.voco_baseline["name"] == "pooling"
        model.save_pretrained(tmp_path)
    with voco_model.enable(model, processor):
        pass
    refused(message, type(model).from_pretrained(tmp_path), processor)  # a projector made up


def test_an_upper_bound_becomes_a_voco_model(tmp_path):
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    for name in ("upper", "tuned"):
        if name == "upper":
            baselines.apply("full", model, processor, num_voco=2)
        else:
            model = type(model).from_pretrained(tmp_path / "upper")
            assert model.config.voco_baseline["name"] == "full"
            voco_model.enable(model, processor)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    loaded = baselines.load(tmp_path / "tuned")
    assert (loaded.name, loaded.num_tokens) == ("voco", 2)
