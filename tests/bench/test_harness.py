"""What all benchmarks share: budgets, statuses of rows, resuming, tables; and who imports whom."""

from __future__ import annotations

import ast
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer

from bench.harness import guard, run, text
from bench.harness.family import Family, Picture, family_of, picture_links, read
from bench.harness.machine import ROOT

FAMILY = Family(
    name="sixth",
    show=lambda record: text.table(
        ["row", "ms"], [[r["name"], r["status"]] for r in rows_of(record)]
    ),
    record_keys={"cases": list},
    case_keys={"rows": list},
    row_keys={"name": str, "kind": str, "status": str},
    choices={"kind": ("ours", "rival")},
    label=lambda case, row: row["name"] if row else "the case",
    counts=lambda row: row["kind"] == "ours",
)


def rows_of(record: dict) -> list[dict]:
    return record["cases"][0]["rows"]


def right() -> dict:
    return {"timing": {"p50": 1.0}}


def raises(error: Exception):
    def function() -> dict:
        raise error

    return function


@dataclass(kw_only=True)
class Sixth(run.Runner):
    """The whole of a sixth benchmark's runner."""

    family = FAMILY
    jobs: dict

    def fill(self) -> None:
        rows = rows_of(self.record)
        todo = {
            name: job for name, job in self.jobs.items() if name not in [r["name"] for r in rows]
        }
        with self.progress_of(len(self.jobs), len(rows)):
            for name, (kind, function) in todo.items():
                head = {"name": name, "kind": kind}
                self.measure(name, head, function, rows, order=list(self.jobs))


@pytest.fixture
def sixth(tmp_path):
    """``sixth(jobs, **options)`` -> a runner on a fresh record."""

    def make(jobs: dict, **options) -> Sixth:
        cpu = torch.device("cpu")
        record = run.fresh(FAMILY, cpu, {"quick": False}, ["bench/harness"], cases=[{"rows": []}])
        made = {"record": record, "out": tmp_path / "sixth.json", "device": cpu, "jobs": jobs}
        return Sixth(**made | options)

    return make


def test_a_row_says_how_its_measurement_went(sixth, capsys):
    jobs = {
        "right": ("ours", right),
        "wrong": ("rival", raises(guard.WrongError("2 is not 3"))),
        "absent": ("ours", raises(guard.NotMeasuredError("no server"))),
        "broken": ("rival", raises(ValueError("no\nkernel"))),
        "large": ("rival", raises(MemoryError("40 GB"))),
    }
    runner = sixth(jobs)
    run.finish(runner)
    found = {row["name"]: (row["status"], row.get("reason")) for row in rows_of(runner.record)}
    assert found == {
        "right": ("ok", None),
        "wrong": ("red", "2 is not 3; not timed"),
        "absent": ("unsupported", "no server"),
        "broken": ("failed", "ValueError: no kernel"),
        "large": ("failed", "MemoryError: 40 GB"),
    }
    assert read(runner.out, [FAMILY]) == runner.record and runner.record["finished"]
    said = capsys.readouterr()
    assert "| wrong  |         red |" in said.out and f"wrote {runner.out}" in said.out
    assert "[2/5] wrong: red: 2 is not 3; not timed" in said.err and "RED" not in said.err


def test_where_not_to_fit_is_no_fault_it_is_unsupported():
    found = guard.outcome(raises(torch.OutOfMemoryError("40 GB")), out_of_memory="unsupported")
    assert found == {"status": "unsupported", "reason": "does not fit: OutOfMemoryError: 40 GB"}


def test_what_is_ours_and_wrong_ends_with_1(sixth, capsys):
    with pytest.raises(typer.Exit) as ended:
        run.finish(sixth({"ours": ("ours", raises(guard.WrongError("no")))}))
    assert ended.value.exit_code == 1
    assert "RED ours: red: no; not timed" in capsys.readouterr().err


def test_a_lost_device_ends_with_3_and_the_rest_is_resumed(sixth, monkeypatch, capsys):
    jobs = {
        "a": ("ours", right),
        "b": ("rival", raises(ValueError("illegal"))),
        "c": ("ours", right),
    }

    def lost(device, what, row):
        if row["status"] == "failed":
            raise guard.DeviceLostError(f"{what} broke the CUDA context")

    monkeypatch.setattr(guard, "check_device", lost)
    runner = sixth(jobs)
    with pytest.raises(typer.Exit) as ended:
        run.finish(runner)
    assert ended.value.exit_code == 3 and "b broke the CUDA context" in capsys.readouterr().err
    before = read(runner.out, [FAMILY])
    assert [row["status"] for row in rows_of(before)] == ["ok", "failed"] and not before["finished"]
    again = sixth(jobs, record=run.resumed(runner.out, sixth(jobs).record, FAMILY))
    run.finish(again)
    assert [row["status"] for row in rows_of(again.record)] == ["ok", "failed", "ok"]


def test_a_spent_budget_skips_and_resuming_measures_what_was_skipped(sixth):
    jobs = {"a": ("ours", right)}
    runner = sixth(jobs, budget=1.0, started=time.monotonic() - 2)
    runner.run()
    assert rows_of(runner.record)[0]["reason"] == "the budget of 1 s was spent"
    again = run.resumed(runner.out, sixth(jobs).record, FAMILY)
    assert rows_of(again) == [] and not again["finished"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda new: new.update(settings={"quick": True}), "with the same settings to resume"),
        (lambda new: new["environment"].update(sources_sha256="other"), "of the same sources"),
    ],
)
def test_another_run_is_not_resumed(sixth, change, message):
    runner = sixth({})
    runner.run()
    new = sixth({}).record
    assert run.resumed(runner.out, new, FAMILY)["environment"] == runner.record["environment"]
    change(new)
    with pytest.raises(ValueError, match=message):
        run.resumed(runner.out, new, FAMILY)


def test_a_record_of_no_family_is_refused():
    with pytest.raises(ValueError, match="expected a record of sixth, got one of 'seventh'"):
        family_of({"bench": "seventh"}, [FAMILY])


def test_links_to_pictures_say_what_is_missing():
    picture = Picture("Speed", lambda *_: None, has=lambda record: record["fast"], suffix="-x")
    device = {"environment": {"device": {"name": "a GPU"}}}
    results = {"a.json": {**device, "fast": True}, "b.json": {**device, "fast": False}}
    linked = picture_links([picture], results, lambda name: f"../{name}")
    assert linked == "![Speed, a GPU](../a-x.png)"
    assert picture_links([picture], {}, str) == "Speed: not measured."


def test_tables_are_aligned_for_a_terminal():
    markdown = (
        "**Title**\n\n" + text.table(["a", "ms"], [["long name", "1"], ["a | b", ""]]) + "\n\nend"
    )
    assert text.aligned(markdown).splitlines() == [
        "Title",
        "",
        "| a         | ms |",
        "| --------- | -- |",
        "| long name |  1 |",
        "| a \\| b    |    |",
        "",
        "end",
    ]


@pytest.mark.parametrize(
    "value, said",
    [(302e6, "302 MB"), (0.9996e9, "1 GB"), (525, "0.525 kB"), (5e12, "5e+03 GB")],
)
def test_bytes_in_words(value, said):
    assert text.nbytes(value) == said


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


COMMANDS = sorted((ROOT / "bench").glob("[!_]*.py"))


@pytest.mark.parametrize("path", sorted((ROOT / "bench").rglob("*.py")), ids=lambda p: p.name)
def test_nothing_imports_a_command(path):
    commands = {f"bench.{command.stem}" for command in COMMANDS if command.stem != "flops"}
    assert not imports_of(path) & commands


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench/harness").glob("*.py")), ids=lambda p: p.name
)
def test_the_harness_knows_no_benchmark(path):
    of_bench = {name for name in imports_of(path) if name.startswith("bench")}
    assert all(name.startswith("bench.harness") for name in of_bench)
