"""What bench/tune.py has chosen, in words, and its family of records."""

from __future__ import annotations

from bench.harness.family import Family
from bench.harness.records import device_of
from bench.harness.text import table


def show(record: dict) -> str:
    """What was chosen, and what was dropped and why."""
    header = ["kernel", "head_dim", "blocks", "ms", "×", "shapes"]
    rows = []
    for choice in record["choices"]:
        gain = choice["times_shipped"]
        rows.append(
            [
                choice["kernel"],
                str(choice["width"]),
                ", ".join(map(str, choice["blocks"])),
                f"{choice['mean_ms']:.4g}",
                "-" if gain is None else f"{gain:.3f}",
                "".join(choice["shapes"]),
            ]
        )
    blocks = [
        f"**Triton on {device_of(record)}, sm_{record['settings']['chip']}**. Blocks: queries, keys, "
        "warps, stages; ms: geometric mean over the shapes, of the whole backward pass for dq and dkdv; "
        "×: how many times faster than the shipped blocks.",
        table(header, rows),
    ]
    blocks += [
        f"{row['status']}: {row['kernel']} {row['width']} {tuple(row['blocks'])}: {row['reason']}"
        for row in record["candidates"]
        if row["status"] != "ok"
    ]
    for status in ("skipped", "red", "failed"):
        found = [row for row in record["timings"] if row["status"] == status]
        if found:
            blocks.append(f"{status}: {len(found)} timings, the first: {found[0]['reason']}")
    return "\n\n".join(blocks)


_CANDIDATE = {"kernel": str, "width": int, "blocks": list, "status": str}
FAMILY = Family(
    name="tune",
    show=show,
    record_keys={"candidates": list, "timings": list, "choices": list},
    counts=lambda row: False,  # a candidate that is wrong or fails is not chosen, that is all
    entries={"candidates": _CANDIDATE, "timings": {**_CANDIDATE, "shape": str}},
)
