"""The record's schema, and the questions that tables ask of it."""

from __future__ import annotations

import json

import pytest

from bench.attention.questions import (
    best_pieces,
    intensity,
    our_next,
    our_row,
    roof,
    times_faster,
)
from bench.attention.report import FAMILY
from bench.harness.family import read
from bench.harness.records import named
from bench.report import FAMILIES


def test_a_record_survives_its_file(record, tmp_path):
    path = tmp_path / "new" / "attn.json"
    FAMILY.write(record, path)
    assert read(path, FAMILIES) == record
    assert [entry.name for entry in path.parent.iterdir()] == ["attn.json"]


def test_nan_becomes_a_string(record, tmp_path):
    row = {**record["cases"][0]["rows"][-1], "status": "red", "reason": "wrong"}
    row["errors"] = {"out": {"error": float("nan"), "limit": 1e-3}}
    record["cases"][0]["rows"] = [row]
    FAMILY.write(record, tmp_path / "attn.json")
    text = (tmp_path / "attn.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (
        read(tmp_path / "attn.json", FAMILIES)["cases"][0]["rows"][0]["errors"]["out"]["error"]
        == "nan"
    )


def put(path: str, value):
    """A change of one entry, its place written with dots."""

    def change(record: dict) -> None:
        *folders, last = path.split(".")
        for folder in folders:
            record = record[int(folder)] if folder.isdigit() else record[folder]
        if value is None:
            del record[last]
        else:
            record[last] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (put("schema", 99), "expected schema 1, got 99; run the benchmark again"),
        (put("environment", None), "expected dict 'environment' in a record, got nothing"),
        (put("cases.0.direction", "sideways"), "expected a direction of"),
        (put("cases.0.flops", "many"), "expected int 'flops' in a case, got str"),
        (put("cases.0.rows.0.status", "great"), "expected a status of"),
        (put("cases.0.rows.0.tflops", None), "expected a time exactly where the status is 'ok'"),
        (put("cases.0.rows.0.status", "red"), "expected a time exactly where the status is 'ok'"),
        (put("cases.0.rows.6.reason", ""), "expected a reason for status 'failed' of sdpa-dense"),
        (put("layouts.0.status", None), "expected str 'status' in a layout, got nothing"),
    ],
)
def test_a_wrong_record_is_refused(record, tmp_path, change, message):
    change(record)
    with pytest.raises(ValueError, match=message):
        FAMILY.write(record, tmp_path / "attn.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"there.json: .*{message}"):
        read(tmp_path / "there.json", FAMILIES)


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "half.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON in .*half.json"):
        read(tmp_path / "half.json", FAMILIES)


def test_ratios_are_against_our_default_backend(record):
    case = record["cases"][0]
    drop_in = best_pieces(case, drop_in=True)
    assert drop_in["name"] == "fa2-varlen" and times_faster(case, drop_in) == 1.25
    apart = best_pieces(case, drop_in=False)
    assert apart["name"] == "cudnn-two-call-parts" and times_faster(case, apart) == 1.1
    assert named(case, "sdpa-dense") is None
    assert times_faster(case, None) is None


def test_no_ratio_if_our_default_backend_has_no_time(record):
    case = record["cases"][0]
    ours = case["rows"][0]
    second = {**ours, "name": "voco sdpa"}
    red = {key: value for key, value in ours.items() if key not in ("timing", "tflops")}
    case["rows"][:1] = [{**red, "status": "red", "reason": "wrong"}, second]
    FAMILY.check(record)
    assert our_row(case) is None
    assert times_faster(case, named(case, "flex")) is None


def test_our_row_is_the_backend_that_a_user_gets(record):
    case = record["cases"][0]
    default = {**case["rows"][0], "name": "voco cuda_sm90"}
    case["rows"].insert(0, default)
    assert our_row(case) is default and our_next(case)["name"] == "voco triton"
    for key in ("timing", "tflops"):
        del default[key]
    default |= {"status": "unsupported", "reason": "head_dim"}
    assert our_row(case)["name"] == "voco triton" and our_next(case) is None
    default["status"] = "red"  # it would have been taken: no other stands in for it
    assert our_row(case) is None


def test_the_roof_is_the_lower_of_both_ceilings(record):
    forward, both = record["cases"]
    tensors = 2 * 32 + 2 * 8  # q, k, v and out, in heads
    bytes_moved = tensors * 16 * 691 * 128 * 2
    forward["flops"] = both["flops"] = 200 * bytes_moved
    assert intensity(forward) == 200
    assert intensity(both) == 100  # the gradients move as much again
    assert roof(record, forward) == 3.0 * 200
    forward["flops"] *= 2
    assert roof(record, forward) == 700.0
    record["ceilings"] = {}
    assert roof(record, forward) is None
