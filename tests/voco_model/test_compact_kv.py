from __future__ import annotations

import pytest
import torch

from voco_kernels.kv import CompactKV


def test_one_token_of_llava_7b_takes_half_a_megabyte():
    kv = torch.empty(32, 2, 32, 1, 128, dtype=torch.bfloat16, device="meta")
    assert kv.nbytes == 524_288  # Table 7 of the paper, in bytes


def test_a_value_with_its_sizes():
    entry = CompactKV(torch.zeros(3, 2, 4, 5, 16), torch.arange(10, 15), 15)
    assert (entry.num_layers, entry.num_kv_heads, entry.num_tokens, entry.head_dim) == (3, 4, 5, 16)
    assert entry.nbytes == 3 * 2 * 4 * 5 * 16 * 4
    assert entry.to("cpu") is entry
    assert entry.to(dtype=torch.float16).nbytes == entry.nbytes // 2
    assert "5 tokens, 3 layers, 4 heads of 16, float32 on cpu" in repr(entry)
    with pytest.raises(AttributeError):
        entry.next_position = 3


@pytest.mark.parametrize(
    ("kv", "positions", "next_position", "error", "message"),
    [
        (torch.zeros(3, 4, 5, 16), torch.arange(5), 5, ValueError, r"got \[3, 4, 5, 16\]"),
        (torch.zeros(3, 2, 4, 0, 16), torch.arange(0), 5, ValueError, "at least one token"),
        (torch.zeros(3, 2, 4, 5, 16).long(), torch.arange(5), 5, TypeError, "torch.int64"),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(5).int(), 5, TypeError, "torch.int32"),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(4), 5, ValueError, r"5 tokens .* \[4\]"),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(5), 4, ValueError, "next_position 4"),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(5).flip(0), 9, ValueError, "that rise"),
    ],
)
def test_refuses_parts_that_do_not_fit(kv, positions, next_position, error, message):
    with pytest.raises(error, match=message):
        CompactKV(kv, positions, next_position)
