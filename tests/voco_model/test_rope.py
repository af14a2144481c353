"""How models rotate keys, and entries that are moved to other positions."""

from __future__ import annotations

import pytest
import torch
import transformers

import voco_model
from tests.voco_model import tiny
from voco_kernels.kv import Rope
from voco_model.rope import rope_of

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
