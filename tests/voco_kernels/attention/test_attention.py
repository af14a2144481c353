"""Tests of every backend, forward and backward, against float64 results, with oracle.py's bounds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from tests.voco_kernels.brute_force import brute_force_mask
from tests.voco_kernels.cases import CASES, Case, image
from tests.voco_kernels.oracle import (
    Inputs,
    assert_close_to_truth,
    attend,
    plant_nan_in_padding,
    poisoned_memory,
    random_inputs,
    skip_unless_it_serves,
)
from tests.voco_kernels.strategies import cases
from voco_kernels import MaskLayout, masked_attention
from voco_kernels.attention.dispatch import BACKENDS, load

# tests/cuda_on_cpu/ tests our CUDA kernels on the CPU, test_flash_attn.py a stand-in for flash-attn.
ON_CPU = [backend for backend in BACKENDS if backend not in ("cuda_sm90", "flash_attn")]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter is about a thousand times slower than other backends. Kernels with 16-bit operands
# differ from those with 32-bit ones only in conversions, so these cases are enough to cover them.
INTERPRETED_IN_16_BITS = ("one image, 8 VoCo tokens", "5 tiles", "padded left, isolated")
MIXED = "text between images"
SMALL = Case([[image(24, 2, 21)], [[("text", 12)]]], padding_side="left")

# The interpreter warns when it computes with NaN and huge scores before masking them; a GPU doesn't.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning:triton"),
]


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def parity(backend: str, case: Case, dtype: torch.dtype, device: str = "cpu", **sizes: int) -> None:
    """Check a backend's results, with NaN in padding and in uninitialized memory."""
    layout = case.layout(device)
    inputs = random_inputs(layout, dtype, **sizes)
    skip_unless_it_serves(backend, inputs)
    with poisoned_memory():
        results = attend(plant_nan_in_padding(inputs, layout), layout, backend)
    assert_close_to_truth(results, inputs, layout)


@pytest.mark.parametrize(
    ("backend", "dtype", "name"),
    [
        (backend, dtype, name)
        for backend in ON_CPU
        for dtype in FLOATS
        for name in CASES
        if backend != "triton" or dtype == torch.float32 or name in INTERPRETED_IN_16_BITS
    ],
    ids=name_of,
)
def test_parity(backend, dtype, name):
    # test_groups_of_heads covers groups; in the interpreter, a head takes seconds
    heads = {"heads": 1, "kv_heads": 1} if backend == "triton" else {}
    parity(backend, CASES[name], dtype, **heads)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("backend", ON_CPU)
def test_head_dims(backend, head_dim):
    dtype = torch.bfloat16 if head_dim == 96 else torch.float32
    parity(backend, SMALL, dtype, heads=2, kv_heads=1, head_dim=head_dim)


@pytest.mark.parametrize("heads", [(3, 1), (4, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_groups_of_heads(backend, heads):
    parity(backend, SMALL, torch.float32, heads=heads[0], kv_heads=heads[1], head_dim=16)


STRIDES = {
    "[B, S, H, D] transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "slices of a fused projection": lambda t: torch.cat([t, t + 1, t - 1], dim=-1)[
        ..., t.shape[-1] : 2 * t.shape[-1]
    ].sub_(1),
    "every other head": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "every other token": lambda t: t.repeat_interleave(2, dim=2)[:, :, ::2],
    "one head expanded": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_strides(backend, stride):
    layout = SMALL.layout()
    inputs = random_inputs(layout, torch.float32, heads=2, kv_heads=2, head_dim=16)
    skip_unless_it_serves(backend, inputs)
    strided = Inputs(*map(STRIDES[stride], inputs[:4]), inputs.dlse)
    assert not any(tensor.is_contiguous() for tensor in strided[:4])
    assert_close_to_truth(attend(strided, layout, backend), strided, layout)


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradient_of_a_sum(backend):
    """autograd passes a gradient whose strides are all 0."""
    layout = CASES[MIXED].layout()
    inputs = random_inputs(layout, torch.float32, heads=2, kv_heads=1, head_dim=16)
    skip_unless_it_serves(backend, inputs)
    gradients = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        q, k, v = (tensor.clone().to(dtype).requires_grad_() for tensor in inputs[:3])
        masked_attention(q, k, v, layout, backend=name).sum().backward()
        gradients.append((q.grad, k.grad, v.grad))
    for ours, exact in zip(*gradients, strict=True):
        assert (ours - exact).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [0.03, 1.0])
@pytest.mark.parametrize("backend", ON_CPU)
def test_scales(backend, scale):
    """Scores are 0.2 and 6 on average. For much larger ones, oracle.py's bounds don't apply: eager
    attention uses the same rounded scores in both passes, while a fused backward recomputes them.
    """
    layout = SMALL.layout()
    inputs = random_inputs(layout, torch.float32, heads=2, kv_heads=1)
    skip_unless_it_serves(backend, inputs)
    assert_close_to_truth(attend(inputs, layout, backend, scale), inputs, layout, scale)


@pytest.mark.parametrize("backend", ON_CPU)
def test_scores_in_the_tens_of_thousands(backend):
    """exp of such a score, or of its difference to a hidden key's score, is infinite."""
    layout = SMALL.layout()
    inputs = random_inputs(layout, torch.float32, heads=2, kv_heads=1)
    inputs = inputs._replace(v=torch.ones_like(inputs.v))
    skip_unless_it_serves(backend, inputs)
    results = attend(inputs, layout, backend, scale=3e3)
    real = (layout.visible_until > 0)[:, None, :, None]
    assert ((results.out - 1).abs() < 1e-5).masked_fill(~real, True).all()
    assert all(gradient.isfinite().all() for gradient in results[2:])


@pytest.mark.parametrize("backward_of", ON_CPU)
@pytest.mark.parametrize("forward_of", ON_CPU)
def test_forward_of_one_backend_and_backward_of_another(forward_of, backward_of):
    layout = SMALL.layout()
    inputs = random_inputs(layout, torch.float32, heads=2, kv_heads=1, head_dim=16)
    for backend in (forward_of, backward_of):
        skip_unless_it_serves(backend, inputs)
    scale = 0.2
    out, lse = load(forward_of).forward(*inputs[:3], layout, scale)
    gradients = load(backward_of).backward(
        inputs.dout, inputs.dlse, *inputs[:3], out, lse, layout, scale
    )
    truth = attend(inputs.to(torch.float64), layout, "reference", scale)
    for ours, exact in zip((out, *gradients), (truth.out, *truth[2:]), strict=True):
        assert (ours - exact).abs().max() < 1e-5


@settings(max_examples=60, deadline=None)
@given(cases())
def test_drawn_layouts_with_sdpa(case):
    parity("sdpa", case, torch.float32, heads=2, kv_heads=1, head_dim=8)


@settings(max_examples=3, deadline=None)
@given(cases(longest=9))
def test_drawn_layouts_with_triton(case):
    parity("triton", case, torch.float32, heads=1, kv_heads=1, head_dim=16)


@pytest.mark.parametrize("length", [1, 190, 192, 193, 400, 1024, 1025, 1100])
def test_sdpa_where_it_cuts_runs_into_chunks(length):
    parity("sdpa", Case([[[("text", length)]]]), torch.float32, heads=1, kv_heads=1, head_dim=8)
    parity("sdpa", Case([[image(3, 2, length)]]), torch.float32, heads=1, kv_heads=1, head_dim=8)


def test_sdpa_in_float64():
    layout = CASES[MIXED].layout()
    inputs = random_inputs(layout, torch.float64)
    for ours, exact in zip(
        attend(inputs, layout, "sdpa"), attend(inputs, layout, "reference"), strict=True
    ):
        assert (ours - exact).abs().max() < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_attention_under_the_dense_mask(name):
    """The reference backend, against the mask's definition and autograd."""
    case = CASES[name]
    layout = case.layout()
    mask = brute_force_mask(case.rows, isolated=case.isolated, padding_side=case.padding_side)
    inputs = random_inputs(layout, torch.float64, heads=2, kv_heads=1)
    results = attend(inputs, layout, "reference")

    q, k, v = (tensor.requires_grad_() for tensor in inputs[:3])
    real = mask.any(-1)[:, None]
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~(mask | ~mask.any(-1, keepdim=True))[:, None], float("-inf"))
    out = F.softmax(scores, dim=-1) @ v * real[..., None]
    lse = scores.logsumexp(-1)
    loss = (out * inputs.dout).sum() + (lse * inputs.dlse * real).sum()
    expected = (out, lse.masked_fill(~real, float("-inf")), *torch.autograd.grad(loss, (q, k, v)))
    for ours, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, exact.detach(), rtol=0, atol=1e-11)


# The same tests on a GPU, with the lengths, head dims and dtypes that matter there. All use one ratio of
# heads, since each combination compiles new kernels.

GPU_BACKENDS = [backend for backend in BACKENDS if backend != "reference"]
GPU_HEADS = {"heads": 4, "kv_heads": 2}
GPU_CASES = {
    "A": Case([[image(576, 1, 114)]] * 3),
    "B": Case([[image(576, 8, 512)]] * 2),
    "C": Case([[image(576, 1, 1470)]]),
    "D": Case([[image(2880, 5, 114)]]),
    "E": Case([[image(2880, 5, 1000)]]),
    "F": Case([[[*image(144, 1) * 16, ("text", 700)]]], isolated=True),
    "F, not isolated": Case([[[*image(144, 1) * 16, ("text", 700)]]]),
    "G": Case([[image(576, 1, text) for text in (20, 333, 1, 129, 600)]]),
    "chat": Case([[[*image(576, 8, 77) * 4]]]),
    "ragged": Case(
        [[image(576, 1, 400)], [[("text", 1000)]], [image(2, 1, 5)]], padding_side="left"
    ),
    "no image": Case([[[("text", 1111)]]]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("name", GPU_CASES)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_parity_on_cuda(backend, name, dtype):
    parity(backend, GPU_CASES[name], dtype, "cuda", head_dim=128, **GPU_HEADS)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_head_dims_on_cuda(backend, dtype, head_dim):
    case = Case([[[*image(300, 3, 141) * 2]], [image(200, 1, 99)]])
    parity(backend, case, dtype, "cuda", head_dim=head_dim, **GPU_HEADS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_small_cases_on_cuda(backend, name):
    parity(backend, CASES[name], torch.bfloat16, "cuda", head_dim=128, **GPU_HEADS)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8), (3, 3)], ids=str)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_groups_of_heads_on_cuda(backend, heads):
    case = Case([[image(200, 1, 99)]])
    sizes = {"heads": heads[0], "kv_heads": heads[1], "head_dim": 128}
    parity(backend, case, torch.bfloat16, "cuda", **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_strides_on_cuda(backend, stride):
    layout = Case([[image(200, 1, 99)], [[("text", 70)]]]).layout("cuda")
    inputs = random_inputs(layout, torch.bfloat16, head_dim=128, **GPU_HEADS)
    skip_unless_it_serves(backend, inputs)
    strided = Inputs(*map(STRIDES[stride], inputs[:4]), inputs.dlse)
    assert_close_to_truth(attend(strided, layout, backend), strided, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gradients_on_cuda_are_the_same_bits_every_time(backend):
    layout = GPU_CASES["F, not isolated"].layout("cuda")
    inputs = random_inputs(layout, torch.bfloat16, head_dim=128, **GPU_HEADS)
    skip_unless_it_serves(backend, inputs)
    first = attend(inputs, layout, backend)
    for _ in range(5):
        again = attend(inputs, layout, backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_gradients_in_any_order_on_cuda(name, head_dim):
    layout = GPU_CASES[name].layout("cuda")
    inputs = random_inputs(layout, torch.bfloat16, head_dim=head_dim, **GPU_HEADS)
    skip_unless_it_serves("cuda_sm90", inputs)
    results = attend(inputs, layout, "cuda_sm90", deterministic=False)
    assert_close_to_truth(results, inputs, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda_sm90"])
def test_needs_no_host_sync_and_can_be_captured(backend):
    """Layout and attention are captured in one CUDA graph, which is replayed for other ids."""
    voco = 9
    rows = {"first": [5] * 200 + [voco] + [5] * 99, "second": [5] * 20 + [voco] * 3 + [5] * 277}
    ids = torch.tensor([rows["first"]], device="cuda")
    no_image = MaskLayout.from_lengths(0, 0, 300, device="cuda")
    inputs = random_inputs(no_image, torch.bfloat16, head_dim=128, **GPU_HEADS)
    skip_unless_it_serves(backend, inputs)

    def step():
        layout = MaskLayout.from_input_ids(ids, voco_token_id=voco)
        return attend(inputs, layout, backend)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for row in rows.values():
        ids.copy_(torch.tensor([row]))
        graph.replay()
        layout = MaskLayout.from_input_ids(ids, voco_token_id=voco)
        assert_close_to_truth(results, inputs, layout)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_the_reference_hides_no_infinities(bad):
    """Scores are masked according to the layout, never because of their values."""
    layout = MaskLayout.from_lengths(3, 1, 3)
    q, k, v = (torch.randn(1, 1, 7, 8, dtype=torch.float64) for _ in range(3))
    q[0, 0, 5, 0] = bad
    out = masked_attention(q, k, v, layout, backend="reference")
    assert out[0, 0, 5].isnan().all() and out[0, 0, [0, 1, 2, 3, 4, 6]].isfinite().all()


def test_a_batch_of_padding_only():
    rows = torch.zeros(2, 5).long()
    layout = MaskLayout.from_input_ids(rows, voco_token_id=1, attention_mask=rows)
    inputs = [torch.randn(2, 2, 5, 16, requires_grad=True) for _ in range(3)]
    for backend in ("reference", "sdpa"):
        out, lse = masked_attention(*inputs, layout, backend=backend, return_lse=True)
        assert out.eq(0).all() and lse.isneginf().all()
        assert all(g.eq(0).all() for g in torch.autograd.grad(out.sum(), inputs))
