"""Single measurements: a shape's inputs, a peer checked and timed on them, a layout timed."""

from __future__ import annotations

import hashlib

import torch

from bench.attention import oracle, peers
from bench.attention.peers import Case, Peer
from bench.attention.questions import DIRECTIONS
from bench.attention.shapes import IMAGE_TOKEN, VOCO_TOKEN, Shape
from bench.harness import clock
from bench.harness.clock import Effort
from bench.harness.guard import first_line
from voco_kernels import MaskLayout

UNCOMPILED_BLOCK_MASK = 16384
"""Tokens up to which create_block_mask is also timed uncompiled: it makes [S, S] tensors then."""

STORAGES = ("tokens", "heads")
"""How q, k, v lie in memory: ``[B, S, H, D]`` (as projections leave them) or ``[B, H, S, D]``."""


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
        direction: one of ``DIRECTIONS``.
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
    return Case(shape, layout, q, k, v, dout, backward=direction != DIRECTIONS[0])


def case_record(
    shape: Shape, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, direction: str
) -> dict:
    """A case of the record, still without rows."""
    num_heads, num_kv_heads = heads
    layout = shape.layout("cpu")
    flops = layout.flops(num_heads, head_dim)
    tokens = layout.batch * layout.length
    result_bytes = tokens * num_heads * (head_dim * dtype.itemsize + 4)  # out, and lse in fp32
    if direction != DIRECTIONS[0]:
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
        "result_bytes": result_bytes,  # what any implementation must allocate
        "rows": [],
    }


def truth_of(case: Case) -> oracle.Truth:
    dout = case.dout if case.backward else None
    return oracle.truth(case.q, case.k, case.v, dout, case.layout)


def row_head(peer: Peer) -> dict:
    """What a peer's row has in any case."""
    return {
        "name": peer.name,
        "ours": peer.ours,
        "masked": peer.masked,
        "drop_in": peer.drop_in,
    }


def measure_peer(
    peer: Peer,
    case: Case,
    truth: oracle.Truth,
    flops: int,
    effort: Effort,
    *,
    graph: bool = False,
) -> dict:
    """The rest of a peer's row: checked first, then timed.

    Args:
        flops: useful ones of one call.
        graph: also time replays of a CUDA graph.
    """
    reason = peer.unsupported(case)
    if reason:
        return {"status": "unsupported", "reason": reason}
    job = peer.prepare(case)
    poison(case)
    errors = {}
    if peer.masked:
        results = dict(zip(oracle.NAMES, job.collect(job.run()), strict=False))
        errors = truth.check(results, case.k.shape[1])
        del results
        wrong = oracle.over_limits(errors)
        if wrong:
            return {"status": "red", "reason": wrong, "errors": errors}
    else:
        job.run()
    measured = clock.measure(job.run, case.device, effort, graph)
    row = {
        "status": "ok",
        "timing": measured.to_json(),
        "tflops": clock.tflops(flops, measured.p50),
        "extra_bytes": clock.peak_extra_bytes(job.run, case.device),
        "setup_ms": job.setup_ms,
    }
    return {**row, "errors": errors} if peer.masked else row


def poison(case: Case) -> None:
    """Leave NaN in the memory that the next allocations get, so that an unwritten result shows."""
    blocks = [torch.full_like(x, float("nan")) for x in (case.q, case.q, case.k, case.v)]
    del blocks


def measure_layout(shape: Shape, device: torch.device, effort: Effort, *, compiled: bool) -> dict:
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
        entry["layout"] = clock.measure(make, device, effort).to_json()
    except Exception as error:  # as with a peer: the entry says what broke
        return {**entry, "status": "failed", "reason": first_line(error)}
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
            entry[key] = clock.measure(make_mask, device, effort).to_json()
        except Exception as error:  # recorded; the other one is still timed
            entry["notes"].append(f"{key}: {first_line(error)}")
    masks = [entry[key]["p50"] for key in ("block_mask", "block_mask_compiled") if entry[key]]
    entry["ratio"] = min(masks) / entry["layout"]["p50"] if masks else None
    return entry
