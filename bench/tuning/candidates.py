"""The candidates of ``bench/tune.py``, the choice among them, and the package's table of choices."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

from voco_kernels.attention.backends.triton import table as triton_table

Blocks = tuple[int, int, int, int]
"""block_m, block_n, num_warps, num_stages: the first four of ``config.Config``."""

Table = dict[int, dict[tuple[str, int], tuple]]
"""As ``triton_table.TABLE``: by chip, by kernel and width, blocks and where they come from."""

KERNELS = ("forward", "dkdv", "dq")
"""In the order of their cost."""

WIDTHS = (128, 64, 256)
"""Classes of head_dim, the most used first."""

TABLE_FILE = Path(triton_table.__file__)

CANDIDATES: dict[tuple[str, int], tuple[Blocks, ...]] = {
    ("forward", 64): (
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 128, 4, 2),
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    ),
    ("forward", 128): (
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 32, 4, 4),
        (128, 32, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    ),
    ("forward", 256): (
        (64, 64, 8, 2),
        (64, 32, 8, 2),
        (64, 32, 4, 2),
        (128, 32, 8, 2),
        (128, 64, 8, 2),
    ),
    ("dkdv", 64): (
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (32, 64, 4, 3),
        (32, 64, 8, 2),
        (64, 32, 4, 2),
        (64, 128, 8, 2),
    ),
    ("dkdv", 128): (
        (32, 64, 4, 3),
        (32, 64, 4, 2),
        (32, 64, 8, 1),
        (32, 64, 8, 2),
        (64, 64, 4, 2),
        (64, 64, 8, 2),
        (32, 128, 8, 3),
    ),
    ("dkdv", 256): (
        (32, 32, 8, 2),
        (32, 32, 8, 1),
        (32, 64, 8, 1),
        (64, 32, 8, 1),
    ),
    ("dq", 64): (
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 32, 4, 2),
        (128, 32, 8, 2),
        (128, 64, 8, 2),
    ),
    ("dq", 128): (
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (64, 32, 8, 2),
        (64, 64, 8, 2),
        (128, 64, 8, 2),
    ),
    ("dq", 256): (
        (64, 64, 8, 2),
        (64, 32, 8, 1),
        (32, 32, 8, 2),
        (32, 64, 8, 1),
    ),
}
"""The same for every chip: what spills on one, or exceeds its memory, is dropped before it is timed."""


def candidates_for(kernel: str, width: int, chip: int, most: int | None = None) -> list[Blocks]:
    """The shipped blocks of a chip first, then the others; ``most`` of them."""
    shipped = shipped_blocks(kernel, width, chip)
    others = [blocks for blocks in CANDIDATES[kernel, width] if blocks != shipped]
    return [shipped, *others][:most]


def shipped_blocks(kernel: str, width: int, chip: int) -> Blocks:
    return triton_table.TABLE[chip][kernel, width][:4]


def choose(record: dict) -> list[dict]:
    """The best candidate of each (kernel, width): the smallest geometric mean over shapes.

    Compared are candidates that were right and were timed wherever they were run, on the shapes that
    all of them reached. Where there is no such shape nothing is chosen.

    Args:
        record: of ``bench/tune.py``.
    """
    times: dict[tuple[str, int], dict[Blocks, dict[str, float]]] = defaultdict(dict)
    for row in record["candidates"]:
        if row["status"] == "ok":
            times[row["kernel"], row["width"]][tuple(row["blocks"])] = {}
    for row in record["timings"]:
        rivals, blocks = times[row["kernel"], row["width"]], tuple(row["blocks"])
        if row["status"] == "ok" and blocks in rivals:
            rivals[blocks][row["shape"]] = row["timing"]["p50"]
        elif row["status"] in ("red", "failed"):
            rivals.pop(blocks, None)
    chip = record["settings"]["chip"]
    choices = []
    for (kernel, width), rivals in times.items():
        reached = [set(by_shape) for by_shape in rivals.values()]
        shapes = sorted(set.intersection(*reached)) if reached else []
        if not shapes:
            continue
        means = {
            blocks: _geometric_mean([by_shape[shape] for shape in shapes])
            for blocks, by_shape in rivals.items()
        }
        best = min(means, key=means.get)
        shipped = means.get(shipped_blocks(kernel, width, chip))
        choices.append(
            {
                "kernel": kernel,
                "width": width,
                "blocks": list(best),
                "shapes": shapes,
                "mean_ms": means[best],
                "times_shipped": None if shipped is None else shipped / means[best],
            }
        )
    return choices


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def updated_table(table: Table, record: dict) -> Table:
    """``table`` with the choices of a record in it, marked with its device and date."""
    environment = record["environment"]
    origin = f"{environment['device']['name']}, {environment['date'][:10]}"
    chip = record["settings"]["chip"]
    rows = dict(table[chip])
    for choice in record["choices"]:
        rows[choice["kernel"], choice["width"]] = (*choice["blocks"], origin)
    return {**table, chip: rows}


def table_text(table: Table) -> str:
    """The source of ``triton_table.py`` that holds ``table``."""
    lines = []
    for chip, rows in table.items():
        lines.append(f"    {chip}: {{")
        for (kernel, width), (*blocks, origin) in rows.items():
            values = ", ".join(map(str, blocks))
            lines.append(f'        ("{kernel}", {width}): ({values}, "{origin}"),')
        lines.append("    },")
    return _HEAD + "\n".join(["TABLE = {", *lines, "}"]) + "\n"


_HEAD = '''"""Triton block sizes for 16-bit tensors, by compute capability. Generated by bench/tune.py.

By kernel and width (``config.width_of``): block_m, block_n, num_warps, num_stages, and the entry's
source: the GPU and date of a measurement, or "compiled" (no spills, fits shared memory, not timed).
"""

'''
