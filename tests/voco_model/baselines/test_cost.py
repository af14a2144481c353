"""``cost`` against a count by hand, of a model with grouped queries."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from tests.voco_model import tiny
from voco_model import baselines
from voco_model.baselines.cost import token_bytes

# Of tiny.py's language model, but for 2 heads of keys: hidden 64, inner 128, 3 layers, 4 heads of 16.
WEIGHTS = 64 * 64 + 64 * 32 + 64 * 32 + 64 * 64 + 3 * 64 * 128  # q, k, v, output, gated MLP
HEAD = 2 * 64 * 262
PAIR = 4 * 16 * 4  # scores and values, all heads
ENTRY = 2 * 2 * 16 * 2  # key and value of a token in a layer, 2 heads of 16, 2 bytes


def tokens_and_pairs(tokens: int, pairs: int) -> int:
    return 2 * WEIGHTS * tokens + PAIR * pairs


@pytest.fixture(scope="module")
def grouped():
    return tiny.tiny_llava("llava", num_key_value_heads=2)


# 16 vision tokens, a question of 5. Pairs of a triangle of n tokens: n * (n + 1) / 2.
FULL = 3 * tokens_and_pairs(21, 231) + HEAD
FEW = 3 * tokens_and_pairs(9, 45) + HEAD  # 4 tokens and the question
FEW_AGAIN = 3 * tokens_and_pairs(5, 5 * 4 + 15) + HEAD


@pytest.mark.parametrize(
    "name, options, tokens, entries, first, again",
    [
        ("full", {}, 16, 3 * 16, FULL, 3 * tokens_and_pairs(5, 5 * 16 + 15) + HEAD),
        (
            "full",
            {"num_voco": 2},
            18,
            3 * 18,
            3 * tokens_and_pairs(23, 276) + HEAD,
            3 * tokens_and_pairs(5, 5 * 18 + 15) + HEAD,
        ),
        ("voco", {}, 4, 3 * 4, 3 * tokens_and_pairs(20, 210) + FEW_AGAIN, FEW_AGAIN),
        ("untrained", {}, 4, 3 * 4, 3 * tokens_and_pairs(20, 210) + FEW_AGAIN, FEW_AGAIN),
        ("random", {}, 4, 3 * 4, FEW, FEW_AGAIN),
        ("pooling", {}, 4, 3 * 4, FEW, FEW_AGAIN),
        ("qformer", {"width": 32, "heads": 2}, 4, 3 * 4, FEW, FEW_AGAIN),
    ],
)
def test_cost(grouped, llava_processor, name, options, tokens, entries, first, again):
    with baselines.apply(
        name, grouped, llava_processor, None if name == "full" else 4, **options
    ) as method:
        assert method.num_tokens == tokens
        found = method.cost(5, torch.float16)
        assert found == baselines.Cost(tokens, entries * ENTRY, first, again)
        assert method.cost(5).cache_bytes == 2 * entries * ENTRY  # the model is in float32


def test_cost_of_fastv(grouped, llava_processor):
    with baselines.apply("fastv", grouped, llava_processor, 4, layer=2) as method:
        found = method.cost(5, torch.bfloat16)
    scores = 2 * 16 * 4 * 21  # the last token's, over all heads
    flops = 2 * tokens_and_pairs(21, 231) + scores + tokens_and_pairs(9, 45) + HEAD
    assert found == baselines.Cost(4, (2 * 16 + 4) * ENTRY, flops, flops)


def test_a_voco_token_of_llava_7b_takes_524288_bytes():
    """The paper's 0.525 MB: 2 * 32 layers * 4096 channels * 2 bytes."""
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
    )
    assert 32 * token_bytes(config, torch.float16) == 524_288


def test_refuses_llava_next_and_no_text(model, processor, kind):
    message = "text_tokens >= 1, got 0" if kind == "llava" else "expected LLaVA-1.5"
    with baselines.apply("voco", model, processor, 2) as method:
        with pytest.raises(ValueError, match=message):
            method.cost(0)
