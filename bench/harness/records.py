"""What a benchmark leaves behind: one JSON file, its schema, and the questions asked of it.

A record holds ``environment`` (device, versions, commit, date), ``settings``, ``ceilings``,
``unavailable`` (rivals that this machine does not have, with the reason), ``cases`` and
``layouts``. A case is one shape, heads and direction; its ``rows`` are the peers, each with a
``status``:

* ``ok``: correct (or, for the unmasked floor, not compared) and timed;
* ``red``: its error is over the limit; a red row carries no time;
* ``unsupported``, ``failed``, ``skipped``: not measured, and ``reason`` says why.

Records of bench/kv.py ("bench" is "kv") have neither ceilings nor layouts. A case is a place to load
from and a number of tokens; its rows are the loads of ``kv_loads``, floors among them, and carry up to
three times in ms: ``wall``, on cold caches, from the call until the device is done; ``warm``, the same,
call upon call; ``device``, on a CUDA device alone, on a cold L2.

Records of bench/two_pass.py ("bench" is "two_pass") have ceilings and no layouts. A case is a model; its
rows are what ``two_pass.Step`` tells apart, each with ``wall`` in ms: of a batch until all have their
first token, or of a whole stream. Rows of the engine have ``device`` and ``stages``, without the host.

Records of bench/train.py ("bench" is "train") have ceilings and no layouts. A case is a model and a
batch; its rows are the ways to train it, each with the time of a step and its useful TFLOP/s.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

SCHEMA = 1
STATUSES = ("ok", "red", "unsupported", "failed", "skipped")
DIRECTIONS = ("forward", "forward+backward")

_COMMON_KEYS = {
    "schema": int,
    "bench": str,
    "finished": bool,
    "environment": dict,
    "settings": dict,
    "cases": list,
}
_RECORD_KEYS = {**_COMMON_KEYS, "ceilings": dict, "unavailable": dict, "layouts": list}
_CASE_KEYS = {
    "shape": str,
    "title": str,
    "direction": str,
    "num_heads": int,
    "num_kv_heads": int,
    "head_dim": int,
    "dtype": str,
    "batch": int,
    "length": int,
    "pairs": int,
    "flops": int,
    "rows": list,
}
_TIMED_KEYS = ("timing", "tflops")
_ROW_KEYS = {"name": str, "ours": bool, "masked": bool, "drop_in": bool, "status": str}
_KV_CASE_KEYS = {"source": str, "tokens": int, "bytes": int, "rows": list}
_KV_ROW_KEYS = {"name": str, "kind": str, "checksum": bool, "status": str}
_KV_KINDS = ("floor", "ours", "rival")
_TWO_PASS_CASE_KEYS = {"model": str, "title": str, "fits": bool, "rows": list}
_TWO_PASS_ROW_KEYS = {
    "name": str,
    "kind": str,
    "images": str,
    "num_voco": int,
    "batch": int,
    "compiled": bool,
    "status": str,
}
_TWO_PASS_KINDS = ("answer", "stream")
_TRAIN_CASE_KEYS = {
    "model": str,
    "title": str,
    "layers": int,
    "samples": int,
    "texts": list,
    "rows": list,
}
_TRAIN_ROW_KEYS = {"name": str, "title": str, "packed": bool, "status": str}
_ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


def write(record: dict, path: Path) -> None:
    """Write a checked record; a reader never sees half of one."""
    check(record)
    save(record, path)


def save(record: dict, path: Path) -> None:
    """Write any record as JSON, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    half.write_text(json.dumps(_finite(record), indent=1) + "\n")
    os.replace(half, path)


def read(path: Path) -> dict:
    """Read a record and check it.

    Raises:
        ValueError: the file is not JSON, or not a record of this schema; the message names the
        file.
    """
    record = load(path)
    try:
        check(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return record


def load(path: Path) -> dict:
    """The JSON in a file, whatever it is a record of.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON in {path}, got: {error}") from error


def check(record: dict) -> None:
    """Raise ``ValueError`` unless ``record`` has this schema."""
    if isinstance(record, dict) and record.get("bench") == "kv":
        _check_kv(record)
        return
    if isinstance(record, dict) and record.get("bench") == "two_pass":
        _check_two_pass(record)
        return
    if isinstance(record, dict) and record.get("bench") == "train":
        _check_train(record)
        return
    _check_keys(record, _RECORD_KEYS, "record")
    _check_schema(record)
    for case in record["cases"]:
        _check_keys(case, _CASE_KEYS, "case")
        if case["direction"] not in DIRECTIONS:
            raise ValueError(f"expected a direction of {DIRECTIONS}, got {case['direction']!r}")
        for row in case["rows"]:
            _check_row(row, f"{case['shape']} {case['direction']}")
    for layout in record["layouts"]:
        _check_keys(layout, {"shape": str, "status": str}, "layout")


def _check_kv(record: dict) -> None:
    _check_keys(record, _COMMON_KEYS, "record")
    _check_schema(record)
    for case in record["cases"]:
        _check_keys(case, _KV_CASE_KEYS, "case")
        where = f"{case['source']}, {case['tokens']} tokens"
        for row in case["rows"]:
            _check_row(row, where, _KV_ROW_KEYS, ("wall",))
            if row["kind"] not in _KV_KINDS:
                raise ValueError(f"expected a kind of {_KV_KINDS}, got {row['kind']!r} in {where}")


def _check_two_pass(record: dict) -> None:
    _check_keys(record, {**_COMMON_KEYS, "ceilings": dict}, "record")
    _check_schema(record)
    for case in record["cases"]:
        _check_keys(case, _TWO_PASS_CASE_KEYS, "case")
        for row in case["rows"]:
            _check_row(row, case["model"], _TWO_PASS_ROW_KEYS, ("wall",))
            if row["kind"] not in _TWO_PASS_KINDS:
                raise ValueError(
                    f"expected a kind of {_TWO_PASS_KINDS}, got {row['kind']!r} in {case['model']}"
                )


def _check_train(record: dict) -> None:
    _check_keys(record, {**_COMMON_KEYS, "ceilings": dict}, "record")
    _check_schema(record)
    for case in record["cases"]:
        _check_keys(case, _TRAIN_CASE_KEYS, "case")
        for row in case["rows"]:
            _check_row(row, case["title"], _TRAIN_ROW_KEYS)


def _check_schema(record: dict) -> None:
    if record["schema"] != SCHEMA:
        raise ValueError(
            f"expected schema {SCHEMA}, got {record['schema']}; run the benchmark again"
        )


def _check_row(
    row: dict,
    where: str,
    keys: dict[str, type] = _ROW_KEYS,
    times: tuple[str, ...] = _TIMED_KEYS,
) -> None:
    _check_keys(row, keys, f"row of {where}")
    if row["status"] not in STATUSES:
        raise ValueError(f"expected a status of {STATUSES}, got {row['status']!r} in {where}")
    timed = [key for key in times if key in row]
    if (row["status"] == "ok") != (len(timed) == len(times)):
        raise ValueError(
            f"expected a time exactly where the status is 'ok', got status {row['status']!r} with "
            f"{timed or 'none'} for {row['name']} in {where}"
        )
    if row["status"] != "ok" and not row.get("reason"):
        raise ValueError(
            f"expected a reason for status {row['status']!r} of {row['name']} in {where}"
        )


def _check_keys(value: dict, keys: dict[str, type], what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"expected a {what} as an object, got {type(value).__name__}")
    for key, kind in keys.items():
        if not isinstance(value.get(key), kind):
            got = type(value[key]).__name__ if key in value else "nothing"
            raise ValueError(f"expected {kind.__name__} {key!r} in a {what}, got {got}")


def _finite(value):
    """JSON has no NaN and no infinity: they become strings, so that any reader can load the
    file."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def timed(case: dict) -> list[dict]:
    """The rows of a case that were correct and timed."""
    return [row for row in case["rows"] if row["status"] == "ok"]


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


def named(case: dict, name: str) -> dict | None:
    return next((row for row in timed(case) if row["name"] == name), None)


def times_faster(case: dict, rival: dict | None) -> float | None:
    """How many times faster our default backend is than ``rival``; None unless both were timed."""
    own = our_row(case)
    if own is None or rival is None:
        return None
    return rival["timing"]["p50"] / own["timing"]["p50"]


def intensity(case: dict) -> float:
    """Useful FLOPs a byte that nobody can avoid to move: q, k, v and out once each; with the backward
    pass their gradients too."""
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


def our_failures(record: dict) -> list[str]:
    """A line for each thing of ours that was wrong or raised."""
    lines = [
        f"{case['direction']} {case['shape']} {case['num_heads']}/{case['num_kv_heads']} "
        f"{row['name']}: {row['status']}: {row['reason']}"
        for case in record["cases"]
        for row in case["rows"]
        if row["ours"] and row["status"] in ("red", "failed")
    ]
    return lines + [
        f"layout {entry['shape']}: {entry['status']}: {entry['reason']}"
        for entry in record["layouts"]
        if entry["status"] in ("red", "failed")
    ]


def kv_times_floor(case: dict, row: dict, what: str = "wall") -> float | None:
    """A load's median as a multiple of its floor's: of the one with a checksum, if it has one, too.

    Args:
        case: of a kv record, ``row`` of it.
        what: the time to compare, "wall", "warm" or "device".

    Returns:
        None unless both were timed so.
    """
    floor = kv_floor(case, checksum=row["checksum"])
    if floor is None or not row.get(what) or not floor.get(what):
        return None
    return row[what]["p50"] / floor[what]["p50"]


def kv_floor(case: dict, *, checksum: bool) -> dict | None:
    """The first floor with, or without, a checksum; without one where no floor has any (on CUDA)."""
    floors = [row for row in case["rows"] if row["kind"] == "floor"]
    alike = [row for row in floors if row["checksum"] == checksum] or floors
    return alike[0] if alike and alike[0]["status"] == "ok" else None


def kv_case(record: dict, source: str, tokens: int) -> dict | None:
    cases = record["cases"]
    return next((c for c in cases if (c["source"], c["tokens"]) == (source, tokens)), None)


def kv_row(case: dict | None, name: str) -> dict | None:
    """The row of that name, if it was timed."""
    return case and named(case, name)


def kv_failures(record: dict) -> list[str]:
    """A line for each load of ours, or floor, that was wrong or raised."""
    return [
        f"{case['source']} {case['tokens']} {row['name']}: {row['status']}: {row['reason']}"
        for case in record["cases"]
        for row in case["rows"]
        if row["kind"] != "rival" and row["status"] in ("red", "failed")
    ]


def two_pass_row(case: dict | None, **wanted) -> dict | None:
    """The first row with these values, if it was timed."""
    for row in case["rows"] if case else ():
        if row["status"] == "ok" and all(row[key] == value for key, value in wanted.items()):
            return row
    return None


def two_pass_failures(record: dict) -> list[str]:
    """A line for each row that was wrong or raised."""
    return [
        f"{case['model']} {row['name']} {row['kind']} batch {row['batch']} VoCo {row['num_voco']}: "
        f"{row['status']}: {row['reason']}"
        for case in record["cases"]
        for row in case["rows"]
        if row["status"] in ("red", "failed")
    ]


def train_failures(record: dict) -> list[str]:
    """A line for each way to train that was wrong or raised."""
    return [
        f"{case['title']} {row['name']}: {row['status']}: {row['reason']}"
        for case in record["cases"]
        for row in case["rows"]
        if row["status"] in ("red", "failed")
    ]
