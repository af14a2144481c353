"""Tests of the CUDA attention kernels on the emulation, against float64, with oracle.py's bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.cuda_on_cpu.build import why_not
from tests.cuda_on_cpu.extension import emulate, load_emulation
from tests.voco_kernels.cases import CASES, Case, image
from tests.voco_kernels.oracle import (
    Inputs,
    assert_close_to_truth,
    attend,
    plant_nan_in_padding,
    poisoned_memory,
    random_inputs,
)
from tests.voco_kernels.strategies import cases
from voco_kernels import MaskLayout, masked_attention
from voco_kernels.attention.backends import cuda_sm90

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# Forwards, backwards, and a seed that exposes a consumer that skips loads without synchronizing.
ORDERS = (0, 1, 3)
MIXED = "text between images"
# Layouts of several tiles and blocks, most of them partial.
LARGER = {
    "A": Case([[image(576, 1, 114)]]),
    "isolated images before a long text": Case(
        [[[*image(70, 3) * 12, ("text", 200)]]], isolated=True
    ),
    "chat": Case([[[*image(144, 8, 77) * 2]], [image(260, 65, 30)]], padding_side="left"),
    "documents": Case([[image(144, 1, text) for text in (20, 133, 1, 65)]]),
    # The first consumer has no queries in the last tile, and there are more blocks of keys than slots.
    "few queries, many keys": Case([[[*image(3, 90) * 9, ("text", 40)]]]),
}


@pytest.fixture(scope="session")
def emulation():
    return load_emulation()


@pytest.fixture(params=ORDERS, ids=lambda order: f"order {order}")
def order(request, monkeypatch, emulation):
    emulate(monkeypatch, emulation, request.param)


@pytest.fixture
def emulated(monkeypatch, emulation):
    emulate(monkeypatch, emulation)


def parity(
    case: Case, dtype: torch.dtype = torch.bfloat16, deterministic: bool = True, **sizes: int
) -> None:
    """Check the kernels' results, with NaN in padding and in uninitialized memory."""
    layout = case.layout()
    inputs = random_inputs(layout, dtype, **{"heads": 2, "kv_heads": 1, "head_dim": 64, **sizes})
    with poisoned_memory(), pytest.MonkeyPatch.context() as patch:
        if not deterministic:  # poisoned_memory turns determinism on
            patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
        inputs_with_nan = plant_nan_in_padding(inputs, layout)
        results = attend(inputs_with_nan, layout, "cuda_sm90", deterministic=deterministic)
    assert_close_to_truth(results, inputs, layout)


@pytest.mark.parametrize("name", CASES)
def test_parity(order, name):
    parity(CASES[name])


@pytest.mark.parametrize("name", [*CASES, *LARGER])
def test_parity_of_dq_in_passing(order, name):
    parity((CASES | LARGER)[name], deterministic=False, head_dim=128)


@pytest.mark.parametrize("head_dim", [80, 200, 256])
@pytest.mark.parametrize("name", [MIXED, "20 isolated frames", "padded left"])
def test_head_dims_of_dq_in_passing(emulated, name, head_dim):
    parity(CASES[name], torch.float16, deterministic=False, head_dim=head_dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 200, 256])
def test_head_dims(order, head_dim, dtype):
    parity(CASES[MIXED], dtype, head_dim=head_dim)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (4, 1), (40, 8), (64, 1)], ids=str)
def test_groups_of_heads(order, heads):
    """Heads are packed by the largest power of two that divides the group, up to 32."""
    parity(CASES["padded left"], heads=heads[0], kv_heads=heads[1])


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("name", LARGER)
def test_larger_layouts(order, name, head_dim):
    parity(LARGER[name], head_dim=head_dim)


@pytest.mark.parametrize("text", [16, 17, 63, 64, 65, 127, 128, 129, 192, 193])
def test_around_the_edges_of_blocks(emulated, text):
    """Runs just fill their blocks, or need another block for one key."""
    parity(Case([[image(text, 1, text)]]), heads=1)


STRIDES = {
    "[B, S, H, D] transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "slices of a fused projection": lambda t: torch.cat([t, t + 1, t - 1], dim=-1)[
        ..., t.shape[-1] : 2 * t.shape[-1]
    ].sub_(1),
    "every other token": lambda t: t.repeat_interleave(2, dim=2)[:, :, ::2],
    "one head expanded": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize("stride", STRIDES)
def test_strides(emulated, stride):
    layout = CASES["padded left"].layout()
    inputs = random_inputs(layout, torch.bfloat16, heads=4, kv_heads=2, head_dim=64)
    strided = Inputs(*map(STRIDES[stride], inputs[:4]), inputs.dlse)
    assert not any(tensor.is_contiguous() for tensor in strided[:4])
    assert_close_to_truth(attend(strided, layout, "cuda_sm90"), strided, layout)


def test_gradient_without_strides(emulated):
    """autograd passes such a gradient for a sum."""
    layout = CASES[MIXED].layout()
    inputs = random_inputs(layout, torch.float16, head_dim=64)
    inputs = inputs._replace(dout=torch.ones(()).half().expand_as(inputs.q))
    assert_close_to_truth(attend(inputs, layout, "cuda_sm90"), inputs, layout)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("deterministic", [True, False])
def test_what_deterministic_asks_for(emulated, monkeypatch, deterministic, head_dim):
    """The fused kernel for dQ is used if sums may be in any order and the head_dim has such a kernel."""
    layout = CASES["no image"].layout()
    inputs = random_inputs(layout, torch.float16, head_dim=head_dim)
    launch, sums = cuda_sm90._launch, {}

    def spy(name, *arguments, **tensors):
        sums[name] = tensors.get("dq_sum")
        launch(name, *arguments, **tensors)

    monkeypatch.setattr(cuda_sm90, "_launch", spy)
    attend(inputs, layout, "cuda_sm90", deterministic=deterministic)
    in_passing = not deterministic and head_dim > 64
    assert (sums["attention_backward_sm90"] is not None) == in_passing
    torch.use_deterministic_algorithms(True)
    try:
        attend(inputs, layout, "cuda_sm90", deterministic=deterministic)
    finally:
        torch.use_deterministic_algorithms(False)
    assert sums["attention_backward_sm90"] is None


def test_the_extension_refuses_sums_that_no_kernel_makes(emulated, monkeypatch):
    monkeypatch.setattr(cuda_sm90, "_WIDEST_WITHOUT_PASSING", 0)
    layout = CASES["no image"].layout()
    inputs = random_inputs(layout, torch.float16, head_dim=64)
    with pytest.raises(ValueError, match="dq_sum: expected head_dim above 64, got 64"):
        attend(inputs, layout, "cuda_sm90", deterministic=False)


def test_views_that_begin_anywhere_are_copied(emulated):
    """TMA needs addresses that are multiples of 16 bytes."""
    layout = CASES["padded left"].layout()
    q, k, v = random_inputs(layout, torch.bfloat16, heads=2, kv_heads=1, head_dim=64)[:3]
    shifted = torch.cat([q, q, q], dim=-1)[..., 68:132].copy_(q)
    contiguous = torch.cat([q.flatten()[:1], q.flatten()])[1:].view_as(q)
    assert shifted.data_ptr() % 16 and contiguous.data_ptr() % 16 and contiguous.is_contiguous()
    expected = masked_attention(q, k, v, layout, backend="cuda_sm90")
    for odd in (shifted, contiguous):
        assert torch.equal(masked_attention(odd, k, v, layout, backend="cuda_sm90"), expected)

    # torch.cat's backward passes such a gradient too.
    inputs = random_inputs(layout, torch.bfloat16, heads=2, kv_heads=1, head_dim=64)
    inputs = inputs._replace(dout=contiguous)
    assert_close_to_truth(attend(inputs, layout, "cuda_sm90"), inputs, layout)


def test_strides_of_what_there_is_one_of(emulated):
    """torch allows any stride for a dimension of size 1, even one that TMA doesn't support."""
    layout = Case([[image(30, 1, 20)]]).layout()
    q, k, v = random_inputs(layout, torch.bfloat16, heads=1, kv_heads=1, head_dim=64)[:3]
    odd = q.as_strided(q.shape, (3, 5, 64, 1))
    expected = masked_attention(q, k, v, layout, backend="cuda_sm90")
    assert torch.equal(masked_attention(odd, k, v, layout, backend="cuda_sm90"), expected)


def test_strides_that_tma_cannot_take_are_refused(emulated):
    layout = CASES["padded left"].layout()
    q, k, v = random_inputs(layout, torch.bfloat16, heads=2, kv_heads=1, head_dim=64)[:3]
    odd = torch.nn.functional.pad(q, (0, 1))[..., :64]
    with pytest.raises(RuntimeError, match="expected strides that are multiples of 16 bytes"):
        masked_attention(odd, k, v, layout, backend="cuda_sm90")


def test_compiles_whole(emulated):
    layout = CASES[MIXED].layout()
    inputs = random_inputs(layout, torch.bfloat16, heads=2, kv_heads=1, head_dim=64)

    def attention(q, k, v):
        return masked_attention(q, k, v, layout, backend="cuda_sm90", deterministic=False)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attention, compiled):
        q, k, v = (tensor.clone().requires_grad_() for tensor in inputs[:3])
        out = function(q, k, v)
        results.append((out, *torch.autograd.grad(out, (q, k, v), inputs.dout)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("scale", [0.03, 1.0])
def test_scales(emulated, scale):
    layout = CASES["padded left"].layout()
    inputs = random_inputs(layout, torch.bfloat16, heads=2, kv_heads=1, head_dim=32)
    assert_close_to_truth(attend(inputs, layout, "cuda_sm90", scale), inputs, layout, scale)


def test_scores_in_the_tens_of_thousands(emulated):
    """exp of such a score, or of its difference to a hidden key's score, is infinite."""
    layout = CASES["padded left"].layout()
    inputs = random_inputs(layout, torch.bfloat16, heads=2, kv_heads=1)
    inputs = inputs._replace(v=torch.ones_like(inputs.v))
    results = attend(inputs, layout, "cuda_sm90", scale=3e3)
    real = (layout.visible_until > 0)[:, None, :, None]
    assert ((results.out - 1).abs() < 1e-2).masked_fill(~real, True).all()
    assert all(gradient.isfinite().all() for gradient in results[2:])


@pytest.mark.parametrize("deterministic", [True, False])
def test_scores_far_below_zero(emulated, deterministic):
    """A row of zeros after the keys has score 0 and so, compared with these, an infinite probability."""
    layout = Case([[[*image(3, 21) * 3, ("text", 70)]]]).layout()
    inputs = random_inputs(layout, torch.float16, heads=2, kv_heads=1, head_dim=128)
    # Scores are about -17.
    inputs = inputs._replace(q=1.5 + 0.1 * inputs.q, k=-1 + 0.1 * inputs.k)
    results = attend(inputs, layout, "cuda_sm90", deterministic=deterministic)
    assert_close_to_truth(results, inputs, layout)


def test_the_same_bits_whoever_takes_which_item(monkeypatch, emulation):
    layout = LARGER["chat"].layout()
    inputs = random_inputs(layout, torch.bfloat16, heads=4, kv_heads=2, head_dim=64)
    results = []
    for order, multiprocessors in ((0, 1), (1, 2), (5, 7)):
        emulate(monkeypatch, emulation, order, multiprocessors)
        results.append(attend(inputs, layout, "cuda_sm90"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_batch_of_padding_only(emulated):
    rows = torch.zeros(2, 70).long()
    layout = MaskLayout.from_input_ids(rows, voco_token_id=1, attention_mask=rows)
    parity_inputs = random_inputs(layout, torch.bfloat16, head_dim=64)
    results = attend(parity_inputs, layout, "cuda_sm90")
    assert results.lse.isneginf().all()
    assert all(tensor.eq(0).all() for tensor in (results.out, *results[2:]))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases())
def test_drawn_layouts(emulated, case):
    parity(case, heads=2, kv_heads=2)
