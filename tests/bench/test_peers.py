"""Rivals compute what they claim: every way of cutting the mask, with every adapter, equals the
oracle.

The CUDA kernels are played by CPU functions of the same signature, so that the adapters around them
are tested where there is no GPU.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench.attention import oracle, peers, splits
from bench.attention.shapes import SIZES, Shape

TINY = SIZES["tiny"].shapes


def causal(q, k, v):
    """Plain causal attention, ``[N, H, L, D]``."""
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def causal_varlen(q, k, v, cu_seqlens):
    """Plain causal attention of each sequence, ``[T, H, D]``."""
    out = torch.empty_like(q)
    for start, stop in pairwise(cu_seqlens.tolist()):
        turned = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        out = torch.cat([out[:start], causal(*turned)[0].transpose(0, 1), out[stop:]])
    return out


def assert_right(case, job) -> None:
    dout = case.dout if case.backward else None
    truth = oracle.truth(case.q, case.k, case.v, dout, case.layout)
    for _ in range(2):  # a job runs many times
        results = job.collect(job.run())
    assert len(results) == (4 if case.backward else 1)
    named = dict(zip(oracle.NAMES, results, strict=False))
    for name, like in zip(oracle.NAMES, (case.q, case.q, case.k, case.v), strict=True):
        assert name not in named or named[name].shape == like.shape
    errors = truth.check(named, case.k.shape[1])
    assert oracle.within_limits(errors), errors


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("rival", ["sdpa-two-call", "sdpa-two-call-parts", "sdpa-dense"])
def test_cpu_rivals_equal_the_oracle(rival, name, backward, heads, tiny_case):
    case = tiny_case(name, backward, heads)
    peer = peers.RIVALS[rival]
    assert peer.missing(case.device) is None and peer.unsupported(case) is None
    assert_right(case, peer.prepare(case))


@pytest.mark.parametrize("make", [peers.joined, peers.parts], ids=["drop-in", "parts"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", TINY)
def test_varlen_split_equals_the_oracle(name, backward, make, tiny_case):
    case = tiny_case(name, backward)
    split = splits.Varlen(case.shape, case.device)
    assert split.cu_seqlens.dtype == torch.int32

    def attend(q, k, v):
        return causal_varlen(q, k, v, split.cu_seqlens)

    assert_right(case, make(case, split, attend))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_our_backends_are_peers(backend, tiny_case):
    (peer,) = peers.ours(torch.empty(1, 1, 1, 16), [backend])
    case = tiny_case("F", True)
    assert peer.ours and peer.missing(case.device) is None and peer.unsupported(case) is None
    assert_right(case, peer.prepare(case))


def test_the_causal_floor_is_marked_as_another_function(tiny_case):
    floor = peers.RIVALS["sdpa-causal"]
    assert not floor.masked
    case = tiny_case("A", False)
    (out,) = floor.prepare(case).run()
    torch.testing.assert_close(out, causal(case.q, case.k, case.v))


@pytest.mark.parametrize("name", TINY)
def test_flex_mask_equals_the_layout(name):
    layout = TINY[name].layout("cpu")
    mask = peers.mask_mod(TINY[name], layout)
    position = torch.arange(layout.length)
    for row in range(layout.batch):
        computed = mask(torch.tensor(row), 0, position[:, None], position[None, :])
        assert torch.equal(computed, layout.materialize()[row])


@pytest.mark.slow
def test_compiled_flex_equals_the_oracle(tiny_case):
    """Forward alone: FlexAttention has no backward on the CPU. Packed documents use all of mask_mod."""
    case = tiny_case("G", False)
    job = peers.Flex().prepare(case)
    assert job.setup_ms["block_mask_first"] > 0
    assert_right(case, job)


def test_dense_mask_is_the_layout_and_aligned(tiny_case):
    case = tiny_case("G", False)
    mask = peers.dense_mask(case)
    assert torch.equal(mask[:, 0] == 0, case.layout.materialize()) and mask.stride(2) % 8 == 0
    assert bool((mask[:, 0][~case.layout.materialize()] == float("-inf")).all())


def test_what_does_not_split_is_refused_with_a_reason(tiny_case):
    rows = (("vision", 4), ("voco", 1), ("text", 2), ("vision", 4), ("voco", 1), ("text", 3))
    between = Shape("X", "text between images", (rows,))
    with pytest.raises(ValueError, match="expected .vision, VoCo. segments and then one text span"):
        splits.pieces(between)
    seen = Shape("Y", "images see each other", ((("vision", 4), ("voco", 1)) * 2 + (("text", 3),),))
    with pytest.raises(ValueError, match="expected isolated segments"):
        splits.pieces(seen)
    case = tiny_case("A", False)
    other = peers.Case(between, case.layout, case.q, case.k, case.v, case.dout, backward=False)
    assert "expected" in peers.RIVALS["sdpa-two-call"].unsupported(other)


def test_a_dense_mask_that_fits_nowhere_is_refused(tiny_case):
    case = tiny_case("A", False)
    long = SimpleNamespace(length=100_000, batch=1)
    huge = peers.Case(TINY["G"], long, case.q, case.k, case.v, case.dout, backward=False)
    assert "40.0 GB" in peers.SdpaDense().unsupported(huge)


def fake_package(with_lse: bool) -> ModuleType:
    """A flash-attn package whose kernels are ours on the CPU; version 3 returns ``(out, lse)``."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        assert causal
        out = causal_bshd(q, k, v)
        return (out, None) if with_lse else out

    def causal_bshd(q, k, v):
        return causal(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False
    ):
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff()
        assert max_seqlen_q == max_seqlen_k == int(lengths.max())
        out = causal_varlen(q, k, v, cu_seqlens_q)
        return (out, None) if with_lse else out

    module = ModuleType("flash_package")
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("name", ["A", "F", "G"])
def test_flash_package_adapters(name, varlen, apart, with_lse, monkeypatch, tiny_case):
    monkeypatch.setitem(sys.modules, "flash_package", fake_package(with_lse))
    peer = peers.FlashPackage("flash-attn9", "flash_package", varlen=varlen, apart=apart)
    assert peer.drop_in != apart and peer.name.endswith("-parts") == apart
    case = tiny_case(name, True)
    assert_right(case, peer.prepare(case))


@pytest.mark.parametrize("torch_version", ["2.10", "2.11", "2.12"])
def test_torch_varlen_adapter(torch_version, monkeypatch, tiny_case):
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert is_causal
        return causal_varlen(query, key, value, cu_seq_q)

    def middle(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
    ):
        assert window_size == (-1, 0)
        return causal_varlen(query, key, value, cu_seq_q)

    def new(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        window_size=(-1, -1),
        enable_gqa=False,
    ):
        assert window_size == (-1, 0) and enable_gqa
        return causal_varlen(query, key, value, cu_seq_q)

    by_version = {"2.10": old, "2.11": middle, "2.12": new}
    monkeypatch.setattr(varlen, "varlen_attn", by_version[torch_version])
    case = tiny_case("G", True)
    assert_right(case, peers.RIVALS["fa2-varlen"].prepare(case))


def test_missing_rivals_say_why():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert peers.RIVALS["cudnn-two-call"].missing(cpu) == "runs on cuda, not on cpu"
    assert peers.RIVALS["sdpa-two-call"].missing(cuda) == "runs on cpu, not on cuda"
    absent = peers.FlashPackage("flash-attn9", "no_such_package.cute", varlen=False, apart=False)
    assert absent.missing(cuda) == "no_such_package.cute is not installed"


def test_our_default_backend_comes_first():
    own = peers.ours(torch.empty(1, 1, 1, 16))
    assert own[0].name == "voco sdpa" and "voco reference" not in [peer.name for peer in own]


def test_an_unknown_backend_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="expected backends among triton.*got warp"):
        peers.ours(torch.empty(1, 1, 1, 16), ["warp"])
