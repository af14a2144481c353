"""What tables and plots ask of a record of bench/two_pass.py."""

from __future__ import annotations

from collections.abc import Sequence

STAGES = ("vision", "prefix", "extract", "load", "prefill")
"""Stages of the engine until the first token is chosen, in order."""

FIRST_FORWARD = ("vision", "prefix", "extract")
SECOND_FORWARD = ("load", "prefill")

MODES = {"uncached": "read", "full cache": "stored", "voco": "stored"}
"""The three modes that are compared, and where their images are read from."""


def row_of(case: dict | None, **wanted) -> dict | None:
    """The first row with these values, if it was timed."""
    for row in case["rows"] if case else ():
        if row["status"] == "ok" and all(row[key] == value for key, value in wanted.items()):
            return row
    return None


def weights_ms(record: dict, case: dict) -> float:
    """The time to read the language model's weights at the copy rate measured in the same run."""
    # That rate counts what is read and what is written.
    return 1e-9 * case["language_bytes"] / record["ceilings"]["copy_tb_per_s"]


def gemm_ms(record: dict, flops: int) -> float:
    """The time for so many operations at the matrix product's rate in the same run."""
    return 1e-9 * flops / record["ceilings"]["matmul_tflops"]


def was_planned(case: dict, **wanted) -> bool:
    """Whether a row with these values was to be measured, however that went."""
    return any(all(row[key] == value for key, value in wanted.items()) for row in case["rows"])


def answer_row(case: dict | None, name: str, batch: int, num_voco: int, **more) -> dict | None:
    """The row of a batch; through the compiler where that was timed."""
    wanted = dict(kind="answer", name=name, batch=batch, num_voco=num_voco, **more)
    return row_of(case, compiled=True, **wanted) or row_of(case, compiled=False, **wanted)


def same_row(case: dict, name: str, batch: int, compiled: bool) -> dict | None:
    """A plain LLaVA's row of a batch, compiled or not."""
    return row_of(
        case, kind="answer", name=name, batch=batch, images=MODES[name], compiled=compiled
    )


def stream_row(case: dict, name: str, share: float | None) -> dict | None:
    """The row of a stream; through the compiler where that was timed."""
    wanted = dict(kind="stream", name=name, share=None if name == "stock generate" else share)
    return row_of(case, compiled=True, **wanted) or row_of(case, compiled=False, **wanted)


def saved(case: dict, batch: int, num_voco: int, name: str = "voco") -> float | None:
    """The share of the uncached answer's time that the cached one saves; both compiled or both not."""
    for compiled in (True, False):
        cached = row_of(
            case,
            kind="answer",
            name=name,
            images="stored",
            batch=batch,
            num_voco=num_voco,
            compiled=compiled,
        )
        plain = same_row(case, "uncached", batch, compiled)
        if cached and plain:
            return 1 - cached["device"]["p50"] / plain["device"]["p50"]
    return None


def stage_ms(row: dict, stages: Sequence[str]) -> float:
    """Medians of these stages, summed."""
    return sum(row["stages"][stage]["p50"] for stage in stages if stage in row["stages"])


def first_voco(record: dict) -> int:
    """The number of VoCo tokens with which everything is measured."""
    return record["settings"]["num_voco"][0]
