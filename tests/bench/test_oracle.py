"""The sampled oracle equals the reference in float64, whole or sampled, in one chunk or many."""

from __future__ import annotations

import pytest
import torch

from bench.attention import oracle
from voco_kernels import MaskLayout, masked_attention

LAYOUTS = {
    "one image": MaskLayout.from_lengths(20, 2, 11, batch=2),
    "isolated": MaskLayout.from_spans(
        [[("vision", 7), ("voco", 1)] * 4 + [("text", 9)]], isolated=True
    ),
    "packed": MaskLayout.packed([[("vision", 6), ("voco", 2), ("text", n)] for n in (5, 1, 12)]),
    "padded": MaskLayout.from_spans(
        [[("vision", 6), ("voco", 2), ("text", 9)], [("text", 11)]], padding_side="left"
    ),
}


def random_inputs(layout: MaskLayout, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    shapes = [(layout.batch, heads, layout.length, 8) for heads in (4, 2, 2, 4)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def exact_results(q, k, v, dout, layout) -> dict[str, torch.Tensor]:
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = masked_attention(*leaves, layout, backend="reference")
    gradients = torch.autograd.grad(out, leaves, dout.double())
    return dict(zip(oracle.NAMES, (out.detach(), *gradients), strict=True))


@pytest.mark.parametrize("tokens", ["all", "some"])
@pytest.mark.parametrize("chunk", [1 << 21, 64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_reference(name, chunk, tokens, monkeypatch):
    monkeypatch.setitem(oracle.CHUNK_ELEMENTS, "cpu", chunk)
    layout = LAYOUTS[name]
    q, k, v, dout = random_inputs(layout)
    positions = torch.arange(layout.length)
    sample = oracle.Sample(
        rows=(0, layout.batch - 1) if layout.batch > 1 else (0,),
        kv_heads=(1,),
        tokens=positions if tokens == "all" else positions[[0, 5, 6, layout.length - 1]],
    )
    computed = oracle.sampled_attention(q, k, v, dout, layout, sample, torch.float64)
    for key, whole in exact_results(q, k, v, dout, layout).items():
        picked = sample.pick(key, whole, num_kv_heads=2)
        torch.testing.assert_close(computed[key], picked, rtol=0, atol=1e-12)


def test_truth_accepts_the_eager_result_and_refuses_a_wrong_one():
    layout = LAYOUTS["one image"]
    q, k, v, dout = random_inputs(layout, torch.float32)
    truth = oracle.truth(q, k, v, dout, layout)
    results = exact_results(q, k, v, dout, layout)
    assert oracle.within_limits(truth.check(results, num_kv_heads=2))
    for name in oracle.NAMES:
        off = results[name] + 1e-3
        assert not oracle.within_limits(truth.check({name: off}, num_kv_heads=2))
        unwritten = results[name].clone()
        unwritten[0, 0, 0, 0] = float("nan")
        assert not oracle.within_limits(truth.check({name: unwritten}, num_kv_heads=2))


def test_long_rows_are_sampled_with_their_ends():
    layout = MaskLayout.packed([[("vision", 576), ("voco", 1), ("text", 1500)]] * 3)
    sample = oracle.choose_sample(layout, num_kv_heads=8)
    assert len(sample.tokens) == 3 * 1024 and sample.kv_heads == (0, 7) and sample.rows == (0,)
    assert sample.tokens[0] == 0 and sample.tokens[-1] == layout.length - 1
