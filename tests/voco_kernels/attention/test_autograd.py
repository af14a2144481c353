"""Tests of masked_attention with autograd, torch.compile, checkpointing and autocast."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.voco_kernels.cases import CASES, Case, image
from tests.voco_kernels.oracle import attend, random_inputs, skip_unless_it_serves
from voco_kernels import MaskLayout, masked_attention
from voco_kernels.attention.autograd import attention_backward, attention_forward

SMALL = Case([[image(6, 2, 5)], [[("text", 4)]]], padding_side="left")
# triton is left out: it would run in the interpreter, and all backends are the same to autograd.
ON_CPU = ("sdpa", "reference")

CPU_AND_CUDA = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def leaves(inputs) -> list[torch.Tensor]:
    return [tensor.clone().requires_grad_() for tensor in inputs[:3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_opcheck(backend, dtype):
    layout = SMALL.layout()
    inputs = random_inputs(layout, dtype, head_dim=8)
    q, k, v = leaves(inputs)
    torch.library.opcheck(attention_forward, (q, k, v, *layout.tensors(), 0.3, backend, True))
    out, lse = attention_forward(*inputs[:3], *layout.tensors(), 0.3, backend, True)
    for dlse in (inputs.dlse, None):
        torch.library.opcheck(
            attention_backward,
            (inputs.dout, dlse, *inputs[:3], out, lse, *layout.tensors(), 0.3, backend, True),
        )


def test_opcheck_of_strided_inputs():
    """The real kernels return the strides that the fake ones promise."""
    layout = SMALL.layout()
    inputs = random_inputs(layout, torch.float32, head_dim=8)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs[:3])
    for tensors in ((q, k, v), (q, k[:, :1].expand_as(k), v)):
        for backend in ON_CPU:
            torch.library.opcheck(
                attention_forward, (*tensors, *layout.tensors(), 0.3, backend, True)
            )


@pytest.mark.parametrize("name", ["one token", "padded left, isolated", "empty text"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_gradcheck(backend, name):
    case = SMALL if name.startswith("padded") else CASES[name]
    layout = case.layout()
    q, k, v = leaves(random_inputs(layout, torch.float64, heads=2, kv_heads=1, head_dim=3))
    real = (layout.visible_until > 0)[:, None]

    def attention(q, k, v):
        out, lse = masked_attention(q, k, v, layout, backend=backend, return_lse=True)
        return out, lse.masked_fill(~real, 0)

    assert torch.autograd.gradcheck(attention, (q, k, v), fast_mode=layout.length > 20)


@pytest.mark.parametrize("backend", ["triton", *ON_CPU])
@pytest.mark.parametrize("through", ["out", "lse"])
def test_gradient_through_one_output_only(backend, through):
    layout = SMALL.layout()
    inputs = random_inputs(layout, torch.float32, heads=2, kv_heads=1, head_dim=16)
    skip_unless_it_serves(backend, inputs)
    gradients = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        q, k, v = leaves(inputs.to(dtype))
        outputs = masked_attention(q, k, v, layout, backend=name, return_lse=True)
        output, gradient = (
            (outputs[0], inputs.dout) if through == "out" else (outputs[1], inputs.dlse)
        )
        gradients.append(torch.autograd.grad(output, (q, k, v), gradient.to(dtype)))
    for ours, exact in zip(*gradients, strict=True):
        assert (ours - exact).abs().max() < 1e-5
    assert (gradients[0][2] == 0).all() == (through == "lse"), "lse does not depend on v"


def test_no_gradient_is_asked_for():
    layout = SMALL.layout()
    q, k, v = random_inputs(layout, torch.float32, head_dim=8)[:3]
    assert not masked_attention(q, k, v, layout).requires_grad
    k.requires_grad_()
    out = masked_attention(q, k, v, layout)
    (dk,) = torch.autograd.grad(out.sum(), k)
    assert dk.shape == k.shape


@pytest.mark.parametrize("device", CPU_AND_CUDA)
def test_compiles_whole_and_once(device):
    """Layout and attention are in one graph, and other lengths in a batch don't cause a recompile."""
    voco = 9

    def attention(q, k, v, ids):
        layout = MaskLayout.from_input_ids(ids, voco_token_id=voco)
        return masked_attention(q, k, v, layout, return_lse=True)

    # On the CPU, inductor would need a C++ compiler, and would test none of our code.
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(attention, fullgraph=True, backend=backend, dynamic=False)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs = random_inputs(MaskLayout.from_lengths(0, 0, 24, device=device), dtype, head_dim=64)
    for stance, lengths in (
        ("default", (10, 2, 12)),
        ("fail_on_recompile", (20, 1, 3)),
        ("fail_on_recompile", (0, 0, 24)),
    ):
        row = [5] * lengths[0] + [voco] * lengths[1] + [5] * lengths[2]
        ids = torch.tensor([row], device=device)
        results = []
        for function in (compiled, attention):
            q, k, v = leaves(inputs)
            with torch.compiler.set_stance(stance if function is compiled else "default"):
                outputs = function(q, k, v, ids)
                gradients = torch.autograd.grad(outputs, (q, k, v), (inputs.dout, inputs.dlse))
            results.append((*outputs, *gradients))
        for ours, eager in zip(*results, strict=True):
            assert torch.equal(ours, eager) and ours.stride() == eager.stride()


def test_compiles_with_a_layout_made_outside():
    def attention(q, k, v, layout):
        return masked_attention(q, k, v, layout)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=False)
    layouts = [MaskLayout.from_lengths(10, 2, 12), MaskLayout.from_lengths(3, 1, 20)]
    q, k, v = random_inputs(layouts[0], torch.float32)[:3]
    for layout, stance in zip(layouts, ("default", "fail_on_recompile"), strict=True):
        with torch.compiler.set_stance(stance):
            out = compiled(q, k, v, layout)
        assert torch.equal(out, attention(q, k, v, layout))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    layout = CASES["text between images"].layout()
    inputs = random_inputs(layout, torch.float32)

    def attention(q, k, v):
        return masked_attention(q * 2, k, v, layout)

    def checkpointed(q, k, v):
        return checkpoint(attention, q, k, v, use_reentrant=use_reentrant)

    results = []
    for function in (attention, checkpointed):
        q, k, v = leaves(inputs)
        out = function(q, k, v)
        out.backward(inputs.dout)
        results.append((out, q.grad, k.grad, v.grad))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("device", CPU_AND_CUDA)
def test_autocast(device):
    """As in SDPA, attention runs in autocast's dtype, and gradients have the inputs' dtype."""
    layout = SMALL.layout(device)
    inputs = random_inputs(layout, torch.float32, head_dim=64)
    q, k, v = leaves(inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, lse = masked_attention(q, k, v, layout, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    gradients = torch.autograd.grad(out, (q, k, v), inputs.dout.bfloat16())
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    expected = masked_attention(*(tensor.bfloat16() for tensor in (q, k, v)), layout)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["triton", *ON_CPU])
def test_the_same_bits_every_time(backend):
    layout = (SMALL if backend == "triton" else CASES["5 tiles"]).layout()
    inputs = random_inputs(layout, torch.bfloat16, heads=2, kv_heads=1)
    skip_unless_it_serves(backend, inputs)
    first, second = (attend(inputs, layout, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_stay_as_they_are():
    layout = CASES["padded left"].layout()
    inputs = random_inputs(layout, torch.float32)
    before = [tensor.clone() for tensor in (*inputs, *layout.tensors())]
    for backend in ON_CPU:
        attend(inputs, layout, backend)
    for ours, copy in zip((*inputs, *layout.tensors()), before, strict=True):
        assert torch.equal(ours, copy)


def test_inference_mode():
    layout = SMALL.layout()
    q, k, v = random_inputs(layout, torch.float32)[:3]
    expected = masked_attention(q, k, v, layout)
    with torch.inference_mode():
        assert torch.equal(masked_attention(q, k, v, layout), expected)
