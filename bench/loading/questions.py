"""What tables and plots ask of a record of bench/kv.py."""

from __future__ import annotations


def times_floor(case: dict, row: dict, what: str = "wall") -> float | None:
    """A load's median as a multiple of its floor's: of the one with a checksum, if it has one, too.

    Args:
        case: of a kv record, ``row`` of it.
        what: the time to compare, "wall", "warm" or "device".

    Returns:
        None unless both were timed so.
    """
    floor = floor_of(case, checksum=row["checksum"])
    if floor is None or not row.get(what) or not floor.get(what):
        return None
    return row[what]["p50"] / floor[what]["p50"]


def floor_of(case: dict, *, checksum: bool) -> dict | None:
    """The first floor with, or without, a checksum; without one where no floor has any (on CUDA)."""
    floors = [row for row in case["rows"] if row["kind"] == "floor"]
    alike = [row for row in floors if row["checksum"] == checksum] or floors
    return alike[0] if alike and alike[0]["status"] == "ok" else None


def case_of(record: dict, source: str, tokens: int) -> dict | None:
    """The case of a place and a size, if the record has it."""
    cases = record["cases"]
    return next((c for c in cases if (c["source"], c["tokens"]) == (source, tokens)), None)
