"""One measurement: a case made of a shape, a peer checked on it and timed, a layout timed."""

from __future__ import annotations

import gc
import hashlib

import torch

from bench.attention import oracle, peers
from bench.attention.peers import Case, Peer
from bench.attention.shapes import IMAGE_TOKEN, VOCO_TOKEN, Shape
from bench.harness import clock as timing
from bench.harness import records
from voco_kernels import MaskLayout

UNCOMPILED_BLOCK_MASK = 16384
"""Tokens up to which create_block_mask is also timed uncompiled: it makes [S, S] tensors then."""

STORAGES = ("tokens", "heads")
"""How q, k, v lie in memory: ``[B, S, H, D]`` (as projections leave them) or ``[B, H, S, D]``."""


class DeviceLostError(RuntimeError):
    """A kernel broke the CUDA context: nothing more can run in this process.

    Attributes:
        row: of the peer whose kernel it was.
    """

    def __init__(self, row: dict) -> None:
        super().__init__(f"{row['name']} broke the CUDA context: {row['reason']}")
        self.row = row


def make_case(
    shape: Shape,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    direction: str,
    storage: str = STORAGES[0],
) -> Case:
    """Random inputs of a shape; the same ones for every peer and every run.

    Args:
        heads: query heads and key/value heads.
        direction: one of ``records.DIRECTIONS``.
        storage: one of ``STORAGES``.
    """
    num_heads, num_kv_heads = heads
    seed = hashlib.sha256(f"{shape.name} {num_heads} {num_kv_heads}".encode()).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(seed[:4], "little"))

    def normal(count: int) -> torch.Tensor:
        stored = [shape.batch, shape.length, count, head_dim]
        if storage == "heads":
            stored[1], stored[2] = stored[2], stored[1]
        values = torch.randn(stored, generator=generator, device=device, dtype=dtype)
        return values if storage == "heads" else values.transpose(1, 2)

    q, k, v, dout = (normal(n) for n in (num_heads, num_kv_heads, num_kv_heads, num_heads))
    layout = shape.layout(device)
    return Case(shape, layout, q, k, v, dout, backward=direction != records.DIRECTIONS[0])


def case_record(
    shape: Shape, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, direction: str
) -> dict:
    """A case of the record, still without rows."""
    num_heads, num_kv_heads = heads
    layout = shape.layout("cpu")
    flops = layout.flops(num_heads, head_dim)
    tokens = layout.batch * layout.length
    result_bytes = tokens * num_heads * (head_dim * dtype.itemsize + 4)  # out, and lse in fp32
    if direction != records.DIRECTIONS[0]:
        flops += layout.flops(num_heads, head_dim, backward=True)
        result_bytes += tokens * (num_heads + 2 * num_kv_heads) * head_dim * dtype.itemsize
    return {
        "shape": shape.name,
        "title": shape.title,
        "direction": direction,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": layout.batch,
        "length": layout.length,
        "pairs": layout.pairs(),
        "flops": flops,
        "result_bytes": result_bytes,  # what nobody can do without
        "rows": [],
    }


def truth_of(case: Case) -> oracle.Truth:
    dout = case.dout if case.backward else None
    return oracle.truth(case.q, case.k, case.v, dout, case.layout)


def empty_row(peer: Peer, status: str, reason: str) -> dict:
    """A row without a time."""
    return {
        "name": peer.name,
        "ours": peer.ours,
        "masked": peer.masked,
        "drop_in": peer.drop_in,
        "status": status,
        "reason": reason,
    }


def measure_peer(
    peer: Peer,
    case: Case,
    truth: oracle.Truth,
    flops: int,
    effort: timing.Effort,
    *,
    graph: bool = False,
) -> dict:
    """One row: checked first, then timed. Whatever a peer raises becomes its row's reason.

    Raises:
        DeviceLostError: what it raised has left CUDA unusable.
    """
    try:
        return _check_and_time(peer, case, truth, flops, effort, graph)
    except Exception as error:  # any rival may break in its own way: the row says how
        row = empty_row(peer, "failed", timing.first_line(error))
    if case.device.type == "cuda":
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLostError(row) from error
    return row


def _check_and_time(
    peer: Peer,
    case: Case,
    truth: oracle.Truth,
    flops: int,
    effort: timing.Effort,
    graph: bool,
) -> dict:
    reason = peer.unsupported(case)
    if reason:
        return empty_row(peer, "unsupported", reason)
    job = peer.prepare(case)
    poison(case)
    errors = {}
    if peer.masked:
        results = dict(zip(oracle.NAMES, job.collect(job.run()), strict=False))
        errors = truth.check(results, case.k.shape[1])
        del results
        if not oracle.within_limits(errors):
            wrong = {name: e for name, e in errors.items() if not e["error"] <= e["limit"]}
            listed = (f"{name} {e['error']:.2e} over {e['limit']:.2e}" for name, e in wrong.items())
            row = empty_row(peer, "red", f"error against fp64: {', '.join(listed)}; not timed")
            return {**row, "errors": errors}
    else:
        job.run()
    measured = timing.measure(job.run, case.device, effort, graph)
    row = empty_row(peer, "ok", "")
    del row["reason"]
    row |= {
        "timing": measured.to_json(),
        "tflops": timing.tflops(flops, measured.p50),
        "extra_bytes": timing.peak_extra_bytes(job.run, case.device),
        "setup_ms": job.setup_ms,
    }
    return {**row, "errors": errors} if peer.masked else row


def poison(case: Case) -> None:
    """Leave NaN in the memory that the next allocations get, so that an unwritten result shows."""
    blocks = [torch.full_like(x, float("nan")) for x in (case.q, case.q, case.k, case.v)]
    del blocks


def measure_layout(
    shape: Shape, device: torch.device, effort: timing.Effort, *, compiled: bool
) -> dict:
    """``from_input_ids`` against ``create_block_mask``, for the same mask, both ready for use.

    Args:
        compiled: also time a compiled ``create_block_mask``.
    """
    entry: dict = {"shape": shape.name, "title": shape.title, "status": "ok", "notes": []}
    ids, positions = shape.token_ids(device)

    def make() -> MaskLayout:
        return MaskLayout.from_input_ids(
            ids,
            voco_token_id=VOCO_TOKEN,
            image_token_id=IMAGE_TOKEN,
            position_ids=positions if shape.packed else None,
            isolated=shape.isolated,
        )

    try:
        made, expected = make(), shape.layout(device)
        if not all(map(torch.equal, made.tensors()[:2], expected.tensors()[:2])):
            reason = "from_input_ids gives another layout than the spans; not timed"
            return {**entry, "status": "red", "reason": reason}
        entry["layout"] = timing.measure(make, device, effort).to_json()
    except Exception as error:  # as with a peer: the entry says what broke
        return {**entry, "status": "failed", "reason": timing.first_line(error)}
    for key, by_compiler in (("block_mask", False), ("block_mask_compiled", True)):
        entry[key] = None
        if by_compiler and not compiled:
            continue
        if not by_compiler and shape.length > UNCOMPILED_BLOCK_MASK:
            entry["notes"].append(f"not uncompiled: [S, S] tensors of {shape.length} tokens")
            continue
        try:
            make_mask = peers.block_mask_maker(shape, expected, compiled=by_compiler)
            make_mask()
            entry[key] = timing.measure(make_mask, device, effort).to_json()
        except Exception as error:  # recorded: the other one goes on
            entry["notes"].append(f"{key}: {timing.first_line(error)}")
    masks = [entry[key]["p50"] for key in ("block_mask", "block_mask_compiled") if entry[key]]
    entry["ratio"] = min(masks) / entry["layout"]["p50"] if masks else None
    return entry
