"""What is timed: our backends, and every rival that a user could choose instead.

A peer says why it cannot serve, and otherwise turns a ``Case`` into a ``Job``. Rivals are
written as well as a user of theirs would write them, and two-call rivals appear twice:

* as a drop-in: whole tensors in, whole tensors out; cutting and joining are part of the time;
* ``...-parts``: kernels alone, on inputs already cut, with outputs left apart. Not a drop-in, and the
  hardest to beat.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import voco_kernels
from bench.attention.shapes import Shape
from bench.attention.splits import PerDocument, Split, TwoCalls, Varlen
from voco_kernels import MaskLayout
from voco_kernels.attention import dispatch

Results = tuple[Tensor, ...]
"""``(out,)``, or ``(out, dq, dk, dv)`` with the backward pass."""


@dataclass(frozen=True)
class Case:
    """One problem: inputs ``q [B, Hq, S, D]``, ``k, v [B, Hkv, S, D]``, ``dout`` like q, the
    layout."""

    shape: Shape
    layout: MaskLayout
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    backward: bool

    @property
    def grouped(self) -> bool:
        return self.q.shape[1] != self.k.shape[1]

    @property
    def device(self) -> torch.device:
        return self.q.device


@dataclass(frozen=True)
class Job:
    """A peer ready to run one case.

    Attributes:
        run: what is timed: the forward pass, or forward and backward.
        collect: from what ``run`` returned to whole ``Results``; not timed.
        setup_ms: what had to be made first and is shared by all layers of a model, by name, in ms.
    """

    run: Callable[[], object]
    collect: Callable[[object], Results]
    setup_ms: dict[str, float] = field(default_factory=dict)


class Peer:
    """Base of all peers.

    Attributes:
        name: in tables and for ``--rival``.
        legend: what it does, in a few words.
        ours: one of our backends.
        masked: computes our mask; the plain causal floor does not, and its error is not compared.
        drop_in: takes and returns whole tensors.
        device_type: the only one it runs on; None for any.
    """

    name: str
    legend: str
    ours = False
    masked = True
    drop_in = True
    device_type: str | None = None

    def missing(self, device: torch.device) -> str | None:
        """Why it can't run on this machine and device at all."""
        if self.device_type in (None, device.type):
            return None
        return f"runs on {self.device_type}, not on {device.type}"

    def unsupported(self, case: Case) -> str | None:
        """Why it can't serve this case."""
        return None

    def slow(self, shape: Shape, device: torch.device) -> bool:
        """Whether it compiles for each case or takes very long: it is left to the end of a run. On
        a CPU nothing is: what is compared there should be measured at about the same moment."""
        return False

    def prepare(self, case: Case) -> Job:
        raise NotImplementedError


def whole(case: Case, attend: Callable[..., Tensor], setup_ms: dict | None = None) -> Job:
    """The job of a function of whole q, k and v."""
    collect = lambda results: results  # noqa: E731
    if not case.backward:

        def forward() -> Results:
            with torch.no_grad():
                return (attend(case.q, case.k, case.v),)

        return Job(forward, collect, setup_ms or {})
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]

    def step() -> Results:
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, case.dout)

    return Job(step, collect, setup_ms or {})


def joined(case: Case, split: Split, attend: Callable[..., Tensor]) -> Job:
    """The drop-in job of a split: cutting and joining are timed."""

    def whole_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(split.cut(q), split.cut(k), split.cut(v), strict=True)
        return split.join([attend(*part) for part in parts])

    return whole(case, whole_attention)


def parts(case: Case, split: Split, attend: Callable[..., Tensor]) -> Job:
    """The kernels of a split alone: inputs cut beforehand, outputs and gradients left apart."""
    tensors = (case.q, case.k, case.v)
    with torch.no_grad():
        cuts = [[_own_copy(part) for part in split.cut(x)] for x in tensors]
    inputs = list(zip(*cuts, strict=True))
    if not case.backward:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [attend(*part) for part in inputs]

        return Job(forward, lambda outputs: (split.join(outputs),))

    leaves = [tuple(x.requires_grad_() for x in part) for part in inputs]
    flat = [x for part in leaves for x in part]
    with torch.no_grad():
        outputs = [attend(*part) for part in leaves]
    douts = _vjp(lambda *outs: split.join(list(outs)), outputs, case.dout)
    douts = [torch.empty_like(out).copy_(d) for out, d in zip(outputs, douts, strict=True)]

    def step() -> tuple[list[Tensor], Sequence[Tensor]]:
        outs = [attend(*part) for part in leaves]
        return outs, torch.autograd.grad(outs, flat, douts)

    def collect(result: tuple[list[Tensor], Sequence[Tensor]]) -> Results:
        outs, gradients = result
        with torch.no_grad():
            out = split.join(outs)
        by_input = (gradients[i::3] for i in range(3))
        whole_gradients = (
            _vjp(split.cut, [x], list(pieces))[0]
            for x, pieces in zip(tensors, by_input, strict=True)
        )
        return out, *whole_gradients

    return Job(step, collect)


def _vjp(function: Callable, inputs: Sequence[Tensor], cotangent) -> list[Tensor]:
    """Gradients of ``function`` at ``inputs``, for the gradient(s) of its result(s)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return list(torch.autograd.grad(function(*leaves), leaves, cotangent))


def _own_copy(part: Tensor) -> Tensor:
    """A copy stored token by token (``[N, L, H, D]``), as flash kernels like it best."""
    if part.dim() == 3:
        return part.detach().clone()
    return part.detach().transpose(1, 2).contiguous().clone().transpose(1, 2)


class Ours(Peer):
    """One backend of ``voco_kernels.masked_attention``."""

    ours = True

    def __init__(self, backend: str, deterministic: bool = True) -> None:
        self.backend = backend
        self.deterministic = deterministic
        self.name = f"voco {backend}" + ("" if deterministic else ", any order")
        options = "" if deterministic else ", deterministic=False"
        self.legend = f'masked_attention(..., backend="{backend}"{options})'

    def missing(self, device: torch.device) -> str | None:
        return "; ".join(dispatch.load(self.backend).missing()) or None

    def unsupported(self, case: Case) -> str | None:
        reasons = dispatch.load(self.backend).unsupported(case.q, case.k, case.v)
        if not (self.deterministic or case.backward):
            reasons.append("the order of sums differs in the backward pass only")
        return "; ".join(reasons) or None

    def prepare(self, case: Case) -> Job:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return voco_kernels.masked_attention(
                q, k, v, case.layout, backend=self.backend, deterministic=self.deterministic
            )

        return whole(case, attend)


class SdpaCausal(Peer):
    """Plain causal attention over everything: what it costs to ignore the mask."""

    name = "sdpa-causal"
    legend = "SDPA, is_causal over the whole row: NOT this mask, but a floor"
    masked = False

    def slow(self, shape: Shape, device: torch.device) -> bool:
        return device.type == "cuda"

    def prepare(self, case: Case) -> Job:
        return whole(case, partial(_sdpa, is_causal=True))


class SdpaDense(Peer):
    """What the authors' code does: SDPA with a dense mask. Ours is additive, in q's dtype, padded
    to an aligned row and shared by equal rows, which is the fastest form SDPA takes."""

    name = "sdpa-dense"
    legend = "SDPA with a dense additive mask [., 1, S, S]"

    def slow(self, shape: Shape, device: torch.device) -> bool:
        return device.type == "cuda"

    def unsupported(self, case: Case) -> str | None:
        rows = 1 if case.shape.rows_equal else case.layout.batch
        needed = rows * case.layout.length**2 * case.q.element_size()
        if case.device.type == "cuda":
            room = torch.cuda.get_device_properties(case.device).total_memory // 2
        else:
            room = 4 << 30
        if needed <= room:
            return None
        return (
            f"the dense mask takes {needed / 1e9:.1f} GB; {room / 1e9:.1f} GB are set aside for it"
        )

    def prepare(self, case: Case) -> Job:
        started = time.perf_counter()
        mask = dense_mask(case)
        _synchronize(case.device)
        setup = {"dense_mask": 1e3 * (time.perf_counter() - started)}
        # Without repeated K and V, grouped heads leave SDPA's fused kernels for the unfused one on
        # CUDA.
        repeat = case.q.shape[1] // case.k.shape[1] if case.device.type == "cuda" else 1

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if repeat > 1:
                k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
            return _sdpa(q, k, v, attn_mask=mask)

        return whole(case, attend, setup)


def dense_mask(case: Case) -> Tensor:
    """0 where visible and -inf where not, ``[1 or B, 1, S, S]`` in q's dtype; filled 512 rows at a
    time, its rows padded to a multiple of 8 elements as SDPA's kernels want them."""
    layout = case.layout
    rows = 1 if case.shape.rows_equal else layout.batch
    length = layout.length
    padded = -(-length // 8) * 8
    mask = torch.empty(rows, 1, length, padded, dtype=case.q.dtype, device=case.device)
    position = torch.arange(length, device=case.device)
    visible_until = layout.visible_until[:rows, None, :]
    for query in position.split(512):
        visible = (
            (layout.visible_from[:rows, query, None] <= position)
            & (position <= query[:, None])
            & (query[:, None] < visible_until)
        )
        mask[:, 0, query[0] : query[-1] + 1, :length] = torch.where(visible, 0.0, float("-inf"))
    return mask[..., :length]


class Flex(Peer):
    """Compiled FlexAttention with its BlockMask. One image and isolated images get a closed-form
    mask_mod (no loads in the kernel); packed documents one that reads our two integers a token."""

    name = "flex"
    legend = "compiled FlexAttention; its BlockMask is made beforehand"

    def slow(self, shape: Shape, device: torch.device) -> bool:
        return device.type == "cuda"

    def prepare(self, case: Case) -> Job:
        from torch.nn.attention.flex_attention import flex_attention

        started = time.perf_counter()
        # Uncompiled, create_block_mask goes through an [S, S] tensor.
        block_mask = block_mask_maker(case.shape, case.layout, compiled=case.layout.length > 8192)()
        _synchronize(case.device)
        setup = {"block_mask_first": 1e3 * (time.perf_counter() - started)}
        compiled = torch.compile(flex_attention, dynamic=False)
        attend = partial(compiled, block_mask=block_mask, enable_gqa=case.grouped)
        return whole(case, attend, setup)


def block_mask_maker(shape: Shape, layout: MaskLayout, *, compiled: bool) -> Callable[[], object]:
    """A function that makes the ``BlockMask`` of a shape."""
    from torch.nn.attention.flex_attention import create_block_mask

    torch._dynamo.reset()  # each shape is static: none may push another out of the cache
    make = torch.compile(create_block_mask, dynamic=False) if compiled else create_block_mask
    rows = None if shape.rows_equal else layout.batch
    length = layout.length
    return partial(make, mask_mod(shape, layout), rows, None, length, length, layout.device)


def mask_mod(shape: Shape, layout: MaskLayout) -> Callable[..., Tensor]:
    """FlexAttention's form of the mask."""
    document = shape.documents[0]
    if shape.packed or not shape.rows_equal or len(set(document[:-1])) != 2:
        visible_from, visible_until = layout.visible_from, layout.visible_until

        def by_token(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (visible_from[b, q] <= k) & (k <= q) & (q < visible_until[b, k])

        return by_token
    (_, vision), (_, voco) = document[:2]
    segment = vision + voco
    text_start = segment * ((len(document) - 1) // 2)
    if text_start == segment:

        def one_image(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & ((q < segment) | (k >= vision))

        return one_image

    def isolated_images(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (q < text_start) & (q // segment == k // segment)
        kept = (q >= text_start) & ((k >= text_start) | (k % segment >= vision))
        return (k <= q) & (same | kept)

    return isolated_images


class SplitPeer(Peer):
    """A causal kernel used on the pieces of a split, as a drop-in or on parts alone."""

    def __init__(self, name: str, legend: str, *, apart: bool) -> None:
        self.name = f"{name}-parts" if apart else name
        self.legend = f"{legend}{'; kernels alone, cut and joined outside' if apart else ''}"
        self.drop_in = not apart

    def split(self, case: Case) -> Split:
        """Two calls for equal rows; for packed documents, two each, in a loop."""
        return PerDocument(case.shape) if case.shape.packed else TwoCalls(case.shape)

    def kernel(self, split: Split, case: Case) -> Callable[..., Tensor]:
        raise NotImplementedError

    def unsupported(self, case: Case) -> str | None:
        try:
            self.split(case)
        except ValueError as error:
            return str(error)
        return None

    def prepare(self, case: Case) -> Job:
        split = self.split(case)
        make = joined if self.drop_in else parts
        return make(case, split, self.kernel(split, case))


class SdpaTwoCall(SplitPeer):
    """Two ``is_causal`` SDPA calls, on one of SDPA's backends or (CPU) on the one that it picks."""

    def __init__(
        self, name: str, legend: str, device_type: str, backend: SDPBackend | None, *, apart: bool
    ) -> None:
        super().__init__(name, legend, apart=apart)
        self.device_type = device_type
        self.backend = backend

    def slow(self, shape: Shape, device: torch.device) -> bool:
        # cuDNN plans anew for each length, flash launches 128 kernels
        return shape.packed and device.type == "cuda"

    def kernel(self, split: Split, case: Case) -> Callable[..., Tensor]:
        if self.backend is None:
            return partial(_sdpa, is_causal=True)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(self.backend):
                return _sdpa(q, k, v, is_causal=True)

        return attend


class TorchVarlen(SplitPeer):
    """All pieces in one launch of torch's FlashAttention-2, ``torch.nn.attention.varlen``."""

    device_type = "cuda"

    def missing(self, device: torch.device) -> str | None:
        reason = super().missing(device)
        if reason is None and find_spec("torch.nn.attention.varlen") is None:
            reason = f"torch {torch.__version__} has no torch.nn.attention.varlen"
        return reason

    def split(self, case: Case) -> Varlen:
        return Varlen(case.shape, case.device)

    def kernel(self, split: Varlen, case: Case) -> Callable[..., Tensor]:
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        # torch 2.10 takes is_causal; 2.11 a window; 2.12 also needs to know of grouped heads.
        options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        if "enable_gqa" in known:
            options["enable_gqa"] = case.grouped
        starts, longest = split.cu_seqlens, split.longest

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return varlen_attn(q, k, v, starts, starts, longest, longest, **options)

        return attend


class FlashPackage(SplitPeer):
    """A FlashAttention package: ``flash_attn`` (2), ``flash_attn_interface`` (3),
    ``flash_attn.cute`` (4). Two calls of its batched function, or one of its varlen function."""

    device_type = "cuda"

    def __init__(self, name: str, module: str, *, varlen: bool, apart: bool) -> None:
        way = "one varlen call" if varlen else "two calls"
        kind = "varlen" if varlen else "two-call"
        super().__init__(f"{name}-{kind}", f"the package {module}, {way}", apart=apart)
        self.module = module
        self.varlen = varlen

    def missing(self, device: torch.device) -> str | None:
        parent = self.module.partition(".")[0]
        reason = super().missing(device)
        if reason is None and (find_spec(parent) is None or find_spec(self.module) is None):
            reason = f"{self.module} is not installed"
        return reason

    def split(self, case: Case) -> Split:
        return Varlen(case.shape, case.device) if self.varlen else super().split(case)

    def kernel(self, split: Split, case: Case) -> Callable[..., Tensor]:
        package = import_module(self.module)
        if not self.varlen:

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                turned = (x.transpose(1, 2) for x in (q, k, v))
                return _first(package.flash_attn_func(*turned, causal=True)).transpose(1, 2)

            return attend
        limits = {
            "cu_seqlens_q": split.cu_seqlens,
            "cu_seqlens_k": split.cu_seqlens,
            "max_seqlen_q": split.longest,
            "max_seqlen_k": split.longest,
        }
        known = inspect.signature(package.flash_attn_varlen_func).parameters
        limits = {name: value for name, value in limits.items() if name in known}

        def attend_varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _first(package.flash_attn_varlen_func(q, k, v, causal=True, **limits))

        return attend_varlen


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **options)


def _first(result: Tensor | tuple) -> Tensor:
    """Some versions of the flash packages return ``(out, lse)``."""
    return result[0] if isinstance(result, tuple) else result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rivals() -> list[Peer]:
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    rivals: list[Peer] = []
    for apart in (False, True):
        rivals += [
            SdpaTwoCall("sdpa-two-call", "SDPA, two causal calls", "cpu", None, apart=apart),
            SdpaTwoCall("fa2-two-call", "torch's FA2, two calls", "cuda", flash, apart=apart),
            SdpaTwoCall("cudnn-two-call", "cuDNN, two calls", "cuda", cudnn, apart=apart),
            TorchVarlen("fa2-varlen", "torch's FA2, one varlen call", apart=apart),
        ]
        for name, module in (
            ("flash-attn2", "flash_attn"),
            ("flash-attn3", "flash_attn_interface"),
            ("flash-attn4", "flash_attn.cute"),
        ):
            for varlen in (False, True):
                rivals.append(FlashPackage(name, module, varlen=varlen, apart=apart))
    return [*rivals, SdpaCausal(), Flex(), SdpaDense()]


RIVALS: dict[str, Peer] = {rival.name: rival for rival in _rivals()}
"""Every rival by name, on every device."""


ANY_ORDER = ("cuda_sm90",)
"""Our backends that do something else with ``deterministic=False``."""


def ours(probe: Tensor, names: Sequence[str] = ()) -> list[Ours]:
    """Our backends: the named ones, or all but the reference, the default for ``probe`` first; then,
    once more, those of ``ANY_ORDER``.

    Args:
        probe: a small q, of the device, dtype and head_dim that will be run.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: no backend can serve such tensors.
    """
    known = list(voco_kernels.backends())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"expected backends among {', '.join(known)}, got {', '.join(unknown)}")
    if names:
        return [Ours(name) for name in names]
    default = dispatch.choose(probe, probe, probe)
    others = [
        name
        for name in known
        if name not in (default, "reference")
        and not dispatch.load(name).unsupported(probe, probe, probe)
    ]
    any_order = [name for name in (default, *others) if name in ANY_ORDER]
    return [
        *(Ours(name) for name in (default, *others)),
        *(Ours(name, deterministic=False) for name in any_order),
    ]
