"""How models rotate keys, and entries that are moved to other positions."""

from __future__ import annotations

import pytest
import torch
import transformers

import voco_model
from tests.voco_model import tiny
from voco_kernels.kv.entry import Rope
from voco_model.vlm.rope import rope_of

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SCALED = {"factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("model_class", "config_class", "options", "expected"),
    [
        ("LlamaModel", "LlamaConfig", {}, (16, False)),
        ("MistralModel", "MistralConfig", {}, (16, False)),
        ("PhiModel", "PhiConfig", {}, (8, False)),  # half of a head
        ("CohereModel", "CohereConfig", {}, (16, True)),
        ("GlmModel", "GlmConfig", {"num_key_value_heads": 2, "head_dim": 16}, (8, True)),
        (
            "LlamaModel",
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "yarn", **SCALED}},
            (16, False),
        ),
        (
            "LlamaModel",
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "dynamic", **SCALED}},
            None,
        ),
    ],
)
def test_a_models_rotation_is_found_by_trying_it(model_class, config_class, options, expected):
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**SIZES, **options)
    rope = rope_of(getattr(transformers, model_class)(config))
    assert (rope and (rope.rotary_dim, rope.interleaved)) == expected


def test_a_model_without_rotation_has_none():
    assert rope_of(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("first_position", [0, 3, 900])
def test_an_entry_that_is_moved_with_its_text_gives_the_same_logits(kind, first_position):
    """Rotary attention knows distances only: what pass 2 computes doesn't change."""
    model, processor = tiny.tiny_llava(kind), tiny.tiny_processor(kind)
    with voco_model.enable(model, processor, num_voco=3):
        (entry,) = voco_model.compress(model, tiny.picture(0), processor=processor)
        assert isinstance(entry.rope, Rope)
        moved = entry.rotated(first_position)
        options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3}
        here, there = (
            voco_model.generate(model, each, "Who?", processor=processor, **options)
            for each in (entry, moved)
        )
    assert torch.equal(here.sequences, there.sequences)
    for one, other in zip(here.logits, there.logits, strict=True):
        # the model's own angles are float32: off by half a unit in the last place of up to 1000 radians
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


BY_LENGTH = {
    "dynamic": ({"max_position_embeddings": 400, "rope_parameters": {"factor": 4.0}}, 399),
    "longrope": (
        {
            "max_position_embeddings": 1600,
            "rope_parameters": {
                "factor": 4.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 400,
            },
        },
        400,
    ),
}


@pytest.fixture(params=BY_LENGTH)
def by_length(request):
    """A model whose rotation depends on the length, its processor, and the length up to which not."""
    text, limit = BY_LENGTH[request.param]
    rope = {"rope_type": request.param, "rope_theta": 10000.0} | text["rope_parameters"]
    model = tiny.tiny_llava("llava", **(text | {"rope_parameters": rope}))
    processor = tiny.tiny_processor("llava")
    voco_model.enable(model, processor, num_voco=2)
    return model, processor, limit


def question_of(processor, length: int) -> str:
    """A question whose prompt has this many tokens."""
    prompt = processor(images=tiny.picture(0), text=voco_model.prompt("", 2), return_tensors="pt")
    return "x" * (length - prompt["input_ids"].shape[1])


@pytest.mark.parametrize("below", [0, 40])
def test_short_texts_are_exact_where_the_rotation_depends_on_the_length(by_length, below):
    model, processor, limit = by_length
    question = question_of(processor, limit - below)
    prompt = processor(
        images=tiny.picture(0), text=voco_model.prompt(question, 2), return_tensors="pt"
    )
    assert prompt["input_ids"].shape[1] == limit - below
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    one = model.generate(**prompt, do_sample=False, **options)  # past the limit for some steps
    (entry,) = voco_model.compress(model, tiny.picture(0), processor=processor)
    two = voco_model.generate(
        model, entry, question, processor=processor, do_sample=False, **options
    )
    assert torch.equal(one.sequences[:, limit - below :], two.sequences)
    for here, there in zip(one.logits, two.logits, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5)


def test_long_texts_are_refused_where_the_rotation_depends_on_the_length(by_length):
    model, processor, limit = by_length
    (entry,) = voco_model.compress(model, tiny.picture(0), processor=processor)
    question = question_of(processor, limit + 1)
    message = f"a prompt of at most {limit} tokens, image tokens included, got {limit + 1}"
    with pytest.raises(ValueError, match=message):
        voco_model.generate(model, entry, question, processor=processor)
    ids = torch.full((1, limit + 2), tiny.FIRST_TEXT)
    ids[0, 5:21], ids[0, -2:] = tiny.IMAGE, tiny.VOCO
    pixels = torch.zeros(1, 3, 32, 32)
    with pytest.raises(
        ValueError, match=f"a first pass of at most {limit} tokens.*got {limit + 2}"
    ):
        voco_model.compress(model, inputs={"input_ids": ids, "pixel_values": pixels})
    with pytest.raises(
        ValueError, match=f"voco_model.generate, which takes .* up to {limit} tokens"
    ):
        voco_model.TwoPassEngine(model, processor, None)


def test_yarn_is_fixed_at_any_length():
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    rope["original_max_position_embeddings"] = 100
    model = tiny.tiny_llava("llava", max_position_embeddings=400, rope_parameters=rope)
    processor = tiny.tiny_processor("llava")
    voco_model.enable(model, processor, num_voco=2)
    question, options = "x" * 150, {"output_logits": True, "return_dict_in_generate": True}
    prompt = processor(
        images=tiny.picture(0), text=voco_model.prompt(question, 2), return_tensors="pt"
    )
    one = model.generate(**prompt, max_new_tokens=1, **options)
    (entry,) = voco_model.compress(model, tiny.picture(0), processor=processor)
    two = voco_model.generate(
        model, entry, question, processor=processor, max_new_tokens=1, **options
    )
    torch.testing.assert_close(one.logits[0], two.logits[0], rtol=0, atol=1e-5)
