from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voco_kernels.kv import QUANTIZED_MAX, CompactKV, Rope

EPS = torch.finfo(torch.float32).eps


def make_entry(tokens=3, layers=4, heads=2, head_dim=16, dtype=torch.float32, rope=None, seed=0):
    kv = torch.randn(
        layers, 2, heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed)
    )
    return CompactKV(kv.to(dtype), torch.arange(7, 7 + tokens), 7 + tokens, rope=rope)


def llama_rope(rotary_dim=16, interleaved=False):
    return Rope(10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim), interleaved)


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
        (
            torch.zeros(3, 2, 4, 5, 16).char(),
            torch.arange(5),
            5,
            ValueError,
            "float32 scales .* None",
        ),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(5).int(), 5, TypeError, "torch.int32"),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(4), 5, ValueError, r"5 tokens .* \[4\]"),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(5), 4, ValueError, "next_position 4"),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(5), 5.5, TypeError, "as an int, got 5.5"),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(5).flip(0), 9, ValueError, "that rise"),
    ],
)
def test_refuses_parts_that_do_not_fit(kv, positions, next_position, error, message):
    with pytest.raises(error, match=message):
        CompactKV(kv, positions, next_position)


def test_scales_belong_to_8_bits():
    scales = torch.ones(4, 2, 2, 3)
    with pytest.raises(ValueError, match="no scales with kv in torch.float32"):
        CompactKV(torch.zeros(4, 2, 2, 3, 16), torch.arange(3), 3, scales)
    with pytest.raises(ValueError, match=r"float32 scales \[4, 2, 2, 3\].*got .*\[4, 2, 2, 1\]"):
        CompactKV(
            torch.zeros(4, 2, 2, 3, 16, dtype=torch.int8), torch.arange(3), 3, scales[..., :1]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("quantized", list(QUANTIZED_MAX), ids=str)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), log_size=st.floats(-30, 4))
def test_quantization_is_off_by_no_more_than_it_says(dtype, quantized, seed, log_size):
    entry = make_entry(seed=seed)
    # rows of very different sizes: each has its own scale
    sizes = 2.0 ** (log_size * torch.rand(4, 2, 2, 3, 1, generator=torch.manual_seed(seed)))
    entry = CompactKV((entry.kv * sizes).to(dtype), entry.positions, entry.next_position)
    small = entry.quantize(quantized)
    assert small.nbytes == entry.kv.numel() + 4 * entry.kv[..., 0].numel()
    values = entry.kv.double()
    back = small.dequantize(torch.float64).kv
    largest = values.abs().amax(-1, keepdim=True)
    if quantized == torch.int8:
        bound = largest / 254
    else:
        bound = torch.maximum(values.abs() / 16, largest / 448 / 1024)
    # float32: the scale, the quotient and the product are rounded; a row's scale may be the least normal
    # number, of which a row of tiny numbers is a small multiple
    slack = 4 * EPS * largest + torch.finfo(torch.float32).tiny
    assert ((back - values).abs() <= bound + slack).all()


@pytest.mark.parametrize("quantized", list(QUANTIZED_MAX), ids=str)
def test_quantization_keeps_zeros_and_the_largest_value(quantized):
    entry = make_entry()
    entry.kv[1, 0, 1] = 0
    back = entry.quantize(quantized).dequantize(torch.float32)
    assert (back.kv[1, 0, 1] == 0).all()
    largest = entry.kv.abs().amax(-1)
    torch.testing.assert_close(back.kv.abs().amax(-1), largest, rtol=2 * EPS, atol=0)
    assert back.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert back.scales is None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda entry: entry.quantize(torch.int16), "expected torch.int8 or torch.float8_e4m3fn"),
        (lambda entry: entry.quantize().quantize(), "dequantize it first"),
        (lambda entry: entry.dequantize(), "expected a quantized entry"),
        (lambda entry: entry.quantize().dequantize(torch.int32), "expected a floating dtype"),
        (lambda entry: entry.to(dtype=torch.int8), "use quantize"),
        (lambda entry: entry.rotated(3), "expected an entry that knows its rope"),
        (lambda entry: Rope(torch.ones(2, 2)), r"expected inv_freq as \[rotary_dim / 2\]"),
        (lambda entry: make_entry(rope=llama_rope(32)), "expected a rotary_dim up to head_dim 16"),
    ],
)
def test_says_what_it_can_not_do(what, message):
    with pytest.raises(ValueError, match=message):
        what(make_entry())


def test_infinity_is_not_quantized():
    entry = make_entry()
    entry.kv[0, 1, 0, 0, 3] = torch.inf
    with pytest.raises(ValueError, match="expected finite keys and values"):
        entry.quantize()


def rotate_fp64(keys, shift, inv_freq, interleaved):
    """By complex numbers, a pair at a time."""
    keys, half = keys.double(), len(inv_freq)
    out = keys.clone()
    for i, frequency in enumerate(inv_freq.double()):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = torch.complex(keys[..., a], keys[..., b]) * torch.exp(
            1j * (shift.double() * frequency)
        )
        out[..., a], out[..., b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keys_rotate_on_as_in_fp64(dtype, rotary_dim, interleaved):
    entry = make_entry(dtype=dtype, rope=llama_rope(rotary_dim, interleaved))
    positions = torch.tensor([7, 1500, 100_003])
    moved = entry.rotated(positions)
    shift = positions - entry.positions
    truth = rotate_fp64(entry.kv[:, 0], shift, entry.rope.inv_freq, interleaved)
    # one rounding to the dtype; in float32 also of cosine, sine, two products and their sum
    unit = torch.finfo(dtype).eps / 2
    working = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = unit * truth.abs() + 4 * working * entry.kv[:, 0].double().abs().amax(-1, keepdim=True)
    assert ((moved.kv[:, 0].double() - truth).abs() <= bound).all()
    assert torch.equal(moved.kv[:, 1], entry.kv[:, 1])
    assert torch.equal(moved.kv[:, 0, :, 0], entry.kv[:, 0, :, 0])  # it stayed where it was
    assert moved.positions.tolist() == positions.tolist()
    assert moved.next_position == 100_004
    assert entry.rotated(7).kv.equal(entry.kv)


def test_rotating_there_and_back_is_nothing():
    entry = make_entry(dtype=torch.float64, rope=llama_rope())
    there_and_back = entry.rotated(4000).rotated(7)
    torch.testing.assert_close(there_and_back.kv, entry.kv, rtol=0, atol=1e-14)
    assert there_and_back.positions.equal(entry.positions)


def test_ropes_are_the_same_by_value():
    assert llama_rope().same(llama_rope())
    assert not llama_rope().same(llama_rope(interleaved=True))
    assert not llama_rope().same(llama_rope(8))
    assert not llama_rope().same(None)
