"""The float64 truth that a result must match before it is timed, for lengths whose S^2 scores don't fit
into memory.

Attention and its gradients are computed for a sample of tokens: whole rows of the softmax for the
sampled queries and for every query that sees a sampled key, chunk by chunk. In float64 that is the
truth; in the working dtype, the error that the plain maths makes. The rule (CONTRIBUTING):

    max|ours - fp64| <= 2 * max|eager in the working dtype - fp64| + 1e-5
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from voco_kernels import MaskLayout

ABSOLUTE = 1e-5
FACTOR = 2.0
NAMES = ("out", "dq", "dk", "dv")

# Elements of one chunk of scores. Float64, and about five such arrays live at once.
CHUNK_ELEMENTS = {"cuda": 1 << 25, "cpu": 1 << 21}


@dataclass(frozen=True)
class Sample:
    """What is compared: these rows of the batch, these key/value heads with all the query heads
    that share them, these token positions (int64 ``[n]``)."""

    rows: tuple[int, ...]
    kv_heads: tuple[int, ...]
    tokens: Tensor

    def pick(self, name: str, tensor: Tensor, num_kv_heads: int) -> Tensor:
        """The sampled part of a whole ``out``, ``dq``, ``dk`` or ``dv``: ``[rows, heads, n,
        D]``."""
        heads = list(self.kv_heads)
        if name in ("out", "dq"):
            group = tensor.shape[1] // num_kv_heads
            heads = [head * group + member for head in heads for member in range(group)]
        return tensor[list(self.rows)][:, heads].index_select(2, self.tokens)


@dataclass(frozen=True)
class Truth:
    """The sample's float64 tensors by name, and how far each may be off."""

    sample: Sample
    tensors: dict[str, Tensor]
    limits: dict[str, float]

    def check(self, results: dict[str, Tensor], num_kv_heads: int) -> dict[str, dict[str, float]]:
        """``{name: {"error": ..., "limit": ...}}`` for each tensor of ``results``. A NaN stays
        one."""
        errors = {}
        for name, result in results.items():
            picked = self.sample.pick(name, result.detach(), num_kv_heads)
            error = (picked.double() - self.tensors[name]).abs().max().item()
            errors[name] = {"error": error, "limit": self.limits[name]}
        return errors


def within_limits(errors: dict[str, dict[str, float]]) -> bool:
    """Whether every error is inside its limit; a NaN is not."""
    return all(entry["error"] <= entry["limit"] for entry in errors.values())


def over_limits(errors: dict[str, dict[str, float]]) -> str:
    """The reason of a red row: which tensors are off by how much; empty if none is."""
    wrong = {name: entry for name, entry in errors.items() if not within_limits({name: entry})}
    listed = [f"{name} {e['error']:.2e} over {e['limit']:.2e}" for name, e in wrong.items()]
    return f"error against fp64: {', '.join(listed)}; not timed" if wrong else ""


def choose_sample(layout: MaskLayout, num_kv_heads: int) -> Sample:
    """First and last row and key/value head; all tokens, or of long rows three windows of 1024."""
    every, window = 4096, 1024
    length = layout.length
    if length <= every:
        tokens = torch.arange(length)
    else:
        starts = (0, (length - window) // 2, length - window)
        tokens = torch.cat([torch.arange(start, start + window) for start in starts])
    return Sample(
        rows=tuple(sorted({0, layout.batch - 1})),
        kv_heads=tuple(sorted({0, num_kv_heads - 1})),
        tokens=tokens.to(layout.device),
    )


def truth(q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, layout: MaskLayout) -> Truth:
    """Float64 results on a sample of ``q [B, Hq, S, D]``, ``k, v [B, Hkv, S, D]``, with their
    limits.

    With ``dout`` (of q's shape) the gradients too.
    """
    sample = choose_sample(layout, k.shape[1])
    exact = sampled_attention(q, k, v, dout, layout, sample, torch.float64)
    eager = sampled_attention(q, k, v, dout, layout, sample, q.dtype)
    limits = {
        name: FACTOR * (eager[name].double() - exact[name]).abs().max().item() + ABSOLUTE
        for name in exact
    }
    return Truth(sample, exact, limits)


def sampled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None,
    layout: MaskLayout,
    sample: Sample,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Masked attention (and gradients, with ``dout``) on the sample, computed in ``dtype``."""
    names = NAMES if dout is not None else NAMES[:1]
    group = q.shape[1] // k.shape[1]
    gathered: dict[str, list[Tensor]] = {name: [] for name in names}
    for row in sample.rows:
        needed = _needed_queries(layout, row, sample.tokens, with_readers=dout is not None)
        by_head: dict[str, list[Tensor]] = {name: [] for name in names}
        for head in sample.kv_heads:
            heads = slice(head * group, (head + 1) * group)
            dout_part = None if dout is None else dout[row, heads].to(dtype)
            parts = _one_head(
                q[row, heads].to(dtype),
                k[row, head].to(dtype),
                v[row, head].to(dtype),
                dout_part,
                layout.visible_from[row],
                layout.visible_until[row],
                needed,
                sample.tokens,
            )
            for name in names:
                by_head[name].append(parts[name])
        for name in names:
            gathered[name].append(torch.cat(by_head[name]))
    return {name: torch.stack(parts) for name, parts in gathered.items()}


def _needed_queries(layout: MaskLayout, row: int, tokens: Tensor, *, with_readers: bool) -> Tensor:
    """The sampled tokens and, where gradients of keys are wanted, every query that sees one."""
    if not with_readers or len(tokens) == layout.length:
        return tokens
    position = torch.arange(layout.length, device=tokens.device)
    needed = torch.zeros(layout.length, dtype=torch.bool, device=tokens.device)
    needed[tokens] = True
    for some in tokens.split(256):
        visible = (
            (layout.visible_from[row][:, None] <= some)
            & (some <= position[:, None])
            & (position[:, None] < layout.visible_until[row][some])
        )
        needed |= visible.any(1)
    return needed.nonzero().flatten()


def _one_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None,
    visible_from: Tensor,
    visible_until: Tensor,
    needed: Tensor,
    tokens: Tensor,
) -> dict[str, Tensor]:
    """q, dout ``[group, S, D]``, k, v ``[S, D]`` -> out, dq ``[group, n, D]``, dk, dv ``[1, n,
    D]``."""
    scale = q.shape[-1] ** -0.5
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, dq = torch.zeros_like(q), torch.zeros_like(q)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for rows in _chunks(needed, visible_from, len(q)):
        first, last = int(visible_from[rows].min()), int(rows[-1]) + 1
        keys = torch.arange(first, last, device=q.device)
        visible = (
            (visible_from[rows][:, None] <= keys)
            & (keys <= rows[:, None])
            & (rows[:, None] < visible_until[keys])
        )
        k_part, v_part = k[first:last], v[first:last]
        scores = (q[:, rows] @ k_part.T) * scale
        p = scores.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0)
        out[:, rows] = p @ v_part
        if dout is None:
            continue
        dout_part = dout[:, rows]
        dp = dout_part @ v_part.T
        delta = (p.to(wide) * dp.to(wide)).sum(-1, keepdim=True)
        ds = (p.to(wide) * (dp.to(wide) - delta)).to(q.dtype)
        dq[:, rows] = (ds @ k_part) * scale
        dk[first:last] += ((ds.transpose(1, 2) @ q[:, rows]) * scale).to(wide).sum(0)
        dv[first:last] += (p.transpose(1, 2) @ dout_part).to(wide).sum(0)
    parts = {"out": out[:, tokens]}
    if dout is not None:
        parts["dq"] = dq[:, tokens]
        parts["dk"] = dk[None, tokens].to(q.dtype)
        parts["dv"] = dv[None, tokens].to(q.dtype)
    return parts


def _chunks(needed: Tensor, visible_from: Tensor, group: int) -> list[Tensor]:
    """Runs of the needed queries whose scores, ``group`` heads of them, fit ``CHUNK_ELEMENTS``."""
    budget = CHUNK_ELEMENTS[needed.device.type] // group
    starts, stops = visible_from[needed].tolist(), needed.tolist()
    chunks, begin, lowest = [], 0, starts[0]
    for index in range(len(stops)):
        low = min(lowest, starts[index])
        if index > begin and (index + 1 - begin) * (stops[index] + 1 - low) > budget:
            chunks.append(needed[begin:index])
            begin, low = index, starts[index]
        lowest = low
    chunks.append(needed[begin:])
    return chunks
