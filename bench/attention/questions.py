"""What tables and plots ask of a record of bench/attn.py."""

from __future__ import annotations

from bench.harness.records import timed

DIRECTIONS = ("forward", "forward+backward")
_ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


def our_row(case: dict) -> dict | None:
    """The row of the backend that a user gets, if it was timed: the first of ours that can serve."""
    own = [row for row in case["rows"] if row["ours"] and row["status"] != "unsupported"]
    return own[0] if own and own[0]["status"] == "ok" else None


def our_next(case: dict) -> dict | None:
    """The fastest of our other backends; sdpa, which calls torch's own kernels, is not among them."""
    others = [row for row in timed(case) if row["ours"] and row is not our_row(case)]
    return fastest([row for row in others if row["name"] != "voco sdpa"])


def is_causal_pieces(row: dict) -> bool:
    """A rival that cuts the mask into causal calls: the family of the strongest rivals."""
    return "two-call" in row["name"] or "varlen" in row["name"]


def fastest(rows: list[dict]) -> dict | None:
    return min(rows, key=lambda row: row["timing"]["p50"], default=None)


def best_pieces(case: dict, *, drop_in: bool) -> dict | None:
    """The fastest causal-pieces rival, as a drop-in or as kernels alone."""
    family = [row for row in timed(case) if not row["ours"] and is_causal_pieces(row)]
    return fastest([row for row in family if row["drop_in"] == drop_in])


def times_faster(case: dict, rival: dict | None) -> float | None:
    """How many times faster our default backend is than ``rival``; None unless both were timed."""
    own = our_row(case)
    if own is None or rival is None:
        return None
    return rival["timing"]["p50"] / own["timing"]["p50"]


def intensity(case: dict) -> float:
    """Useful FLOPs per byte that must be moved: q, k, v and out once each; with the backward pass their
    gradients, too."""
    itemsize = _ITEMSIZES[case["dtype"]]
    tensors = 2 * case["num_heads"] + 2 * case["num_kv_heads"]
    if case["direction"] != DIRECTIONS[0]:
        tensors *= 2
    return case["flops"] / (tensors * case["batch"] * case["length"] * case["head_dim"] * itemsize)


def roof(record: dict, case: dict) -> float | None:
    """The TFLOP/s that a case's intensity and the ceilings of its run allow; None without ceilings."""
    if not record["ceilings"]:
        return None
    by_memory = intensity(case) * record["ceilings"]["copy_tb_per_s"]
    return min(record["ceilings"]["matmul_tflops"], by_memory)


def panels_of(record: dict) -> list[tuple[str, int, int]]:
    """Direction, heads and key/value heads of each panel, in their order."""
    return sorted(
        {(case["direction"], case["num_heads"], case["num_kv_heads"]) for case in record["cases"]},
        key=lambda panel: (DIRECTIONS.index(panel[0]), panel[1], -panel[2]),
    )


def cases_of(record: dict, panel: tuple[str, int, int]) -> list[dict]:
    return [
        case
        for case in record["cases"]
        if (case["direction"], case["num_heads"], case["num_kv_heads"]) == panel
    ]
