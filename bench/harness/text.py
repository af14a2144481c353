"""Figures in words, and Markdown tables, as README, docs and the commands' output have them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.harness.records import Records, device_of

NOT_MEASURED = "not measured"


def table(header: list[str], rows: list[list[str]], *, left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are words, the others figures."""
    rule = [*["---"] * left, *["---:"] * (len(header) - left)]
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in [header, rule, *rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def aligned(markdown: str) -> str:
    """The same text for a terminal: the columns of its tables under each other, no bold."""
    blocks = re.split(r"((?:^\| .*\n?){2,})", markdown.replace("**", ""), flags=re.M)
    return "".join(_padded(block) if block.startswith("| ") else block for block in blocks)


def _padded(block: str) -> str:
    rows = [line[2:-2].split(" | ") for line in block.splitlines()]
    rule = rows.pop(1)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [
        " | ".join(
            cell.rjust(width) if mark.endswith(":") else cell.ljust(width)
            for cell, mark, width in zip(row, rule, widths, strict=True)
        )
        for row in rows
    ]
    return "".join(f"| {line} |\n" for line in lines)


def plural(count: int, what: str) -> str:
    """``"1 token"``, ``"8 tokens"``."""
    return f"{count} {what}{'s' if count != 1 else ''}"


def digits(value: float) -> str:
    """Three digits, as many as a median of a noisy machine has at best: 0.50, 40.0, 123."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def three(value: float) -> str:
    """At most three digits, without an exponent: 0.5, 40, 123, 12345."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def duration(milliseconds: float) -> str:
    """``"93.1 µs"``, ``"4.57 ms"``, ``"1.23 s"``."""
    for unit, factor in (("µs", 1e3), ("ms", 1.0)):
        if milliseconds * factor < 999.5:
            return f"{digits(milliseconds * factor)} {unit}"
    return f"{digits(1e-3 * milliseconds)} s"


def scaled(count: float, units: Sequence[str], factor: float) -> str:
    """A count in the first of ``units`` in which it is 1 or more; ``factor`` is how many the first
    is, and each further one is a thousandth of the one before."""
    *larger, smallest = units
    for unit in larger:
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g} {unit}"
        factor /= 1e3
    return f"{count / factor:.3g} {smallest}"


def nbytes(count: float) -> str:
    """``"302 MB"``."""
    return scaled(count, ("GB", "MB", "kB"), 1e9)


def flops(count: float) -> str:
    """``"1.2 TFLOP"``."""
    return scaled(count, ("TFLOP", "GFLOP", "MFLOP"), 1e12)


def rate(tera: float, unit: str) -> str:
    """``rate(0.5, "FLOP/s")`` -> ``"500 GFLOP/s"``."""
    return scaled(tera, (f"T{unit}", f"G{unit}"), 1)


def short(commit: str) -> str:
    """A commit's first 12 digits, marked if files were changed."""
    return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def device(record: dict) -> str:
    """The device's name; a CPU's with the number of threads."""
    threads = record["environment"]["device"].get("threads")
    return device_of(record) + (f" ({plural(threads, 'thread')})" if threads else "")


def provenance(results: Records, packages: Sequence[str]) -> str:
    """What figures were measured with: the newest record's versions of ``packages``, the commits, the
    newest date, and the files in bench/results/, of records that have a name."""
    newest = list(results.values())[-1]["environment"]
    versions = ", ".join(f"{package} {newest['versions'][package]}" for package in packages)
    commits = dict.fromkeys(short(record["environment"]["commit"]) for record in results.values())
    files = ", ".join(f"`bench/results/{name}`" for name in results if name)
    where = f" ({files})" if files else ""
    return f"{versions}, commit {', '.join(commits)}, {newest['date'][:10]}{where}"
