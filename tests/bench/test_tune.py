"""``bench/tune.py``: which blocks it chooses, what it does when time is short or a candidate breaks,
and the table that it writes. Times are made up; one whole run is interpreted."""

from __future__ import annotations

import ast
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton", reason="Triton is not installed: requirements/triton.txt has it")

from bench import tune  # noqa: E402
from bench.attention.shapes import SIZES  # noqa: E402
from bench.harness import guard, records, run  # noqa: E402
from bench.harness.family import read  # noqa: E402
from bench.tuning import (
    candidates,  # noqa: E402
    trial,  # noqa: E402
)
from bench.tuning import run as tuning_run  # noqa: E402
from bench.tuning.report import FAMILY  # noqa: E402
from bench.tuning.run import Tuner  # noqa: E402
from voco_kernels.attention.backends.triton import forward_kernel as triton_forward  # noqa: E402
from voco_kernels.attention.backends.triton.config import Config, config  # noqa: E402
from voco_kernels.attention.backends.triton.table import TABLE  # noqa: E402

SHIPPED = TABLE[90]["forward", 128][:4]
OTHER, THIRD = (128, 64, 8, 3), (64, 32, 4, 4)


def timing(blocks, shape, p50=None, status="ok", kernel="forward", width=128):
    row = {"kernel": kernel, "width": width, "shape": shape, "blocks": list(blocks)}
    if status == "ok":
        return {**row, "status": status, "timing": {"p50": p50}}
    return {**row, "status": status, "reason": "because"}


@pytest.fixture
def tuned():
    """``tuned(timings, dropped)`` -> a record of sm_90 with these timings of the forward kernel."""

    def make(timings: list[dict], dropped: tuple = ()) -> dict:
        rows = [
            {
                "kernel": "forward",
                "width": 128,
                "blocks": list(blocks),
                "status": "dropped" if blocks in dropped else "ok",
                "reason": "spills 8 bytes a thread",
            }
            for blocks in (SHIPPED, OTHER, THIRD)
        ]
        return {
            "schema": records.SCHEMA,
            "bench": "tune",
            "finished": True,
            "environment": {"device": {"name": "NVIDIA Test"}, "date": "2030-01-02 03:04 UTC"},
            "settings": {"chip": 90, "dry_run": False},
            "candidates": rows,
            "timings": timings,
            "choices": [],
        }

    return make


def test_the_smallest_geometric_mean_is_chosen(tuned):
    # by the arithmetic mean it would be the shipped one: 5.5 against 5.7
    times = {SHIPPED: (1.0, 10.0), OTHER: (0.4, 11.0), THIRD: (0.3, 40.0)}
    timings = [
        timing(b, s, t) for b, pair in times.items() for s, t in zip("AE", pair, strict=True)
    ]
    (choice,) = candidates.choose(tuned(timings))
    assert choice["blocks"] == list(OTHER) and choice["shapes"] == ["A", "E"]
    assert choice["mean_ms"] == pytest.approx((0.4 * 11) ** 0.5)
    assert choice["times_shipped"] == pytest.approx((10 / 4.4) ** 0.5)


def test_only_shapes_that_all_reached_are_compared(tuned):
    timings = [timing(b, "A", t) for b, t in ((SHIPPED, 1.0), (OTHER, 2.0), (THIRD, 3.0))]
    timings += [timing(OTHER, "E", 0.1), timing(SHIPPED, "E", status="skipped")]
    (choice,) = candidates.choose(tuned(timings))
    assert choice["blocks"] == list(SHIPPED) and choice["shapes"] == ["A"]


@pytest.mark.parametrize("status", ["red", "failed"])
def test_what_was_wrong_once_is_never_chosen(tuned, status):
    timings = [timing(b, "A", t) for b, t in ((SHIPPED, 2.0), (OTHER, 1.0), (THIRD, 3.0))]
    timings += [timing(b, "E", 2.0) for b in (SHIPPED, THIRD)]
    timings.insert(1, timing(OTHER, "E", status=status))
    (choice,) = candidates.choose(tuned(timings))
    assert choice["blocks"] == list(SHIPPED) and choice["shapes"] == ["A", "E"]


def test_a_dropped_candidate_is_not_waited_for(tuned):
    timings = [timing(b, "A", t) for b, t in ((OTHER, 2.0), (THIRD, 1.0))]
    (choice,) = candidates.choose(tuned(timings, dropped=(SHIPPED,)))
    assert choice["blocks"] == list(THIRD) and choice["times_shipped"] is None


def test_nothing_is_chosen_where_not_all_were_timed(tuned):
    assert candidates.choose(tuned([timing(SHIPPED, "A", 1.0)])) == []
    assert candidates.choose(tuned([])) == []


def test_the_shipped_blocks_come_first_and_once():
    for chip, rows in TABLE.items():
        for kernel, width in rows:
            found = candidates.candidates_for(kernel, width, chip)
            assert found[0] == rows[kernel, width][:4] and len(set(found)) == len(found) > 2
            assert candidates.candidates_for(kernel, width, chip, 2) == found[:2]
    assert set(candidates.CANDIDATES) == {
        (k, w) for k in candidates.KERNELS for w in (64, 128, 256)
    }


def test_the_table_file_is_what_the_writer_writes():
    assert candidates.table_text(TABLE) == candidates.TABLE_FILE.read_text()


def test_a_record_becomes_a_table(tuned, tmp_path):
    record = tuned([timing(b, "A", t) for b, t in ((SHIPPED, 2.0), (OTHER, 1.0), (THIRD, 3.0))])
    source, table = tmp_path / "tune.json", tmp_path / "table.py"
    records.save(record, source)
    arguments = ["--from", str(source), "--write", "--table", str(table)]
    result = CliRunner().invoke(tune.app, arguments)
    assert result.exit_code == 0, result.output
    assert "128, 64, 8, 3" in result.stdout and "2.000" in result.stdout
    text = table.read_text()
    written = ast.literal_eval(text[text.index("TABLE = ") + len("TABLE = ") :])
    assert written[90]["forward", 128] == (*OTHER, "NVIDIA Test, 2030-01-02")
    del written[90]["forward", 128]
    expected = {chip: dict(rows) for chip, rows in TABLE.items()}
    del expected[90]["forward", 128]
    assert written == expected  # and all else as it was
    assert candidates.TABLE_FILE.read_text() == candidates.table_text(TABLE)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dry-run", "--write"], "expected another --table to --write a --dry-run's choices"),
        (["--dry-run", "--head-dim", "80"], "expected --head-dim of 64, 128 or 256, got [80]"),
        (["--dry-run", "--shape", "Z"], "expected shapes among A, B"),
    ],
)
def test_wrong_options_say_what_was_expected(arguments, message):
    result = CliRunner().invoke(tune.app, arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_only_a_dry_run_is_possible():
    result = CliRunner().invoke(tune.app, [])
    assert result.exit_code == 2
    assert "expected a CUDA device without --dry-run" in " ".join(result.output.split())


def test_another_record_is_refused(record, tmp_path):
    records.save(record, tmp_path / "attn.json")
    result = CliRunner().invoke(tune.app, ["--from", str(tmp_path / "attn.json")])
    assert result.exit_code == 2
    assert "expected a record of tune, got one of 'attn'" in " ".join(result.output.split())


def test_a_dry_runs_choices_stay_out_of_the_package(tuned, tmp_path):
    record = tuned([])
    record["settings"]["dry_run"] = True
    records.save(record, tmp_path / "tune.json")
    result = CliRunner().invoke(tune.app, ["--from", str(tmp_path / "tune.json"), "--write"])
    assert result.exit_code == 2 and "expected another --table" in " ".join(result.output.split())


def test_blocks_on_trial_are_used_and_then_gone():
    shipped = config("forward", 128, 2, 90)
    with pytest.raises(KeyError), trial.using(("forward", 128, OTHER), 90):
        assert config("forward", 128, 2, 90) == Config(*OTHER)
        raise KeyError
    assert config("forward", 128, 2, 90) == shipped


JOBS = [("forward", 64, SHIPPED), ("forward", 64, OTHER), ("dq", 64, THIRD)]


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """``tuner(budget=...)`` with kernels that are not run: every candidate is right, and timed."""
    monkeypatch.setattr(tuning_run.direct, "forward", lambda *_: (None, None))
    monkeypatch.setattr(Tuner, "_check_and_time", lambda *_: {"status": "ok", "timing": TIMED})
    ok = {"status": "ok"}
    monkeypatch.setattr(
        trial,
        "try_out",
        lambda job, *_: {"kernel": job[0], "width": job[1], "blocks": list(job[2]), **ok},
    )

    def make(**changes) -> Tuner:
        record = {
            "schema": records.SCHEMA,
            "bench": "tune",
            "finished": False,
            "environment": {},
            "settings": {"chip": 90},
            "candidates": [],
            "timings": [],
            "choices": [],
        }
        shapes = [SIZES["tiny"].shapes[name] for name in "AE"]
        options = dict(
            record=record,
            out=tmp_path / "tune.json",
            device=torch.device("cpu"),
            chip=90,
            heads=(2, 1),
            shapes=shapes,
            jobs=JOBS,
            budget=None,
        )
        return Tuner(**{**options, **changes})

    return make


TIMED = {"p50": 1.0}


def statuses(rows: list[dict]) -> list[str]:
    return [row["status"] for row in rows]


def test_every_candidate_is_timed_on_every_shape(tuner):
    made = tuner()
    made.run()
    assert statuses(made.record["candidates"]) == ["ok"] * 3
    assert [(row["shape"], row["kernel"]) for row in made.record["timings"]] == [
        (shape, kernel) for shape in "AE" for kernel in ("forward", "forward", "dq")
    ]
    assert [choice["kernel"] for choice in made.record["choices"]] == ["forward", "dq"]
    assert records.load(made.out)["finished"]


def test_what_a_budget_does_not_reach_is_recorded_as_such(tuner):
    made = tuner(budget=0.0, started=time.monotonic() - 1)
    made.run()
    rows = made.record["candidates"]
    assert statuses(rows) == ["skipped"] * 3 and made.record["timings"] == []
    assert rows[0]["reason"] == "the budget of 0 s was spent"
    assert made.record["choices"] == [] and made.record["finished"]


def test_a_budget_that_ends_between_shapes(tuner, monkeypatch):
    made = tuner(budget=100.0)
    reasons = iter([""] * 4 + ["the budget was spent"] * 9)  # a look before the shape, one a row
    monkeypatch.setattr(made, "spent", lambda: next(reasons))
    made.run()
    assert statuses(made.record["timings"]) == ["ok"] * 3 + ["skipped"] * 3
    assert made.record["choices"][0]["shapes"] == ["A"]


def test_a_shape_without_a_truth_is_no_candidates_fault(tuner, monkeypatch):
    def truth_of(case):
        if case.shape.name == "A":
            raise RuntimeError("out of memory")

    monkeypatch.setattr(tuning_run.measure, "truth_of", truth_of)
    made = tuner()
    made.run()
    assert statuses(made.record["timings"]) == ["skipped"] * 3 + ["ok"] * 3
    assert "no float64 truth: RuntimeError: out of memory" in made.record["timings"][0]["reason"]
    assert [choice["shapes"] for choice in made.record["choices"]] == [["E"], ["E"]]


def test_a_lost_device_keeps_what_is_there_and_another_run_goes_on(tuner, monkeypatch):
    def broken(self, job, *_):
        if job == JOBS[1]:
            raise RuntimeError("illegal memory access")
        return {"status": "ok", "timing": TIMED}

    def lost(device, what, row):
        if row["status"] == "failed":
            raise guard.DeviceLostError(what)

    monkeypatch.setattr(Tuner, "_check_and_time", broken)
    monkeypatch.setattr(guard, "check_device", lost)
    made = tuner()
    with pytest.raises(guard.DeviceLostError):
        made.run()
    assert statuses(records.load(made.out)["timings"]) == ["ok", "failed"]
    monkeypatch.setattr(Tuner, "_check_and_time", lambda *_: {"status": "ok", "timing": TIMED})
    again = tuner(record=made.record)
    again.run()
    assert len(again.record["candidates"]) == 3  # not tried out again
    assert statuses(again.record["timings"]) == ["ok", "failed"] + ["ok"] * 4
    assert again.record["choices"][0]["blocks"] == list(SHIPPED)


def test_resuming_another_run_is_refused(tuned, tmp_path):
    before, path = tuned([timing(OTHER, "A", status="skipped")]), tmp_path / "tune.json"
    before["environment"]["sources_sha256"] = "f"
    fresh = {**before, "candidates": [], "timings": []}
    assert run.resumed(path, fresh, FAMILY) is fresh
    records.save(before, path)
    again = run.resumed(path, fresh, FAMILY)
    assert len(again["candidates"]) == 3 and again["timings"] == [] and not again["finished"]
    with pytest.raises(ValueError, match="with the same settings to resume"):
        run.resumed(path, {**fresh, "settings": {"chip": 80}}, FAMILY)


def done(result) -> Future:
    future = Future()
    future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)
    return future


def test_processes_that_end_take_the_blame_only_when_alone():
    row = {"status": "ok"}
    rows = {}
    results = [done(row), done(BrokenProcessPool()), done(BrokenProcessPool())]
    futures = dict(zip(JOBS, results, strict=True))
    assert trial._collect(futures, rows, alone=False, deadline=float("inf"))
    assert rows == {JOBS[0]: row}
    del futures[JOBS[0]]
    assert trial._collect(futures, rows, alone=True, deadline=float("inf"))
    assert rows[JOBS[1]]["reason"] == "ended its process" and JOBS[2] not in rows


def test_a_result_that_is_late_or_lost_leaves_no_row():
    rows = {}
    assert trial._collect({JOBS[0]: done(None)}, rows, alone=False, deadline=float("inf"))
    assert not trial._collect({JOBS[0]: Future()}, rows, alone=False, deadline=0)
    assert rows == {}


def test_candidates_are_tried_in_processes_of_their_own():
    """Here on a device that has no memory, so that each is dropped."""
    device = torch.device("meta")
    rows = trial.try_all(JOBS[1:], (2, 1), 90, device, float("inf"))
    assert list(rows) == JOBS[1:] and statuses(list(rows.values())) == ["dropped"] * 2
    assert all(row["reason"] for row in rows.values())
    assert trial.try_all(JOBS, (2, 1), 90, device, time.monotonic()) == {}


def test_a_candidate_that_raises_is_dropped_with_its_reason(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(trial.direct, "forward", broken)
    row = trial.try_out(JOBS[0], (2, 1), 90, torch.device("cpu"))
    assert row["status"] == "dropped"
    assert row["reason"] == "RuntimeError: out of resource: shared memory"


def test_a_candidates_usage_is_the_most_of_its_own_binaries(monkeypatch):
    function = triton_forward.forward_kernel

    def binary(head_dim, block_m, block_n, warps, stages, registers, words, shared):
        values = {"HEAD_DIM": head_dim, "BLOCK_M": block_m, "BLOCK_N": block_n}
        constants = {(function.arg_names.index(name),): value for name, value in values.items()}
        options = SimpleNamespace(num_warps=warps, num_stages=stages, shared=shared)
        source = SimpleNamespace(constants=constants)
        return SimpleNamespace(src=source, metadata=options, n_regs=registers, n_spills=words)

    binaries = [
        binary(128, 64, 64, 4, 3, 200, 0, 1000),
        binary(128, 64, 64, 4, 3, 190, 2, 1100),  # compiled for another length
        binary(128, 64, 64, 4, 2, 255, 9, 9000),
        binary(64, 64, 64, 4, 3, 255, 9, 9000),
    ]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    caches = {0: (dict(enumerate(binaries)), None)}
    monkeypatch.setattr(function, "device_caches", caches, raising=False)
    usage = trial._usage(("forward", 128, (64, 64, 4, 3)))
    assert usage == {"registers": 200, "stack": 8, "shared": 1100}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.slow
def test_a_whole_dry_run(tmp_path):
    out, table = tmp_path / "tune.json", tmp_path / "table.py"
    arguments = ["--dry-run", "--most", "1", "--out", str(out), "--write", "--table", str(table)]
    result = CliRunner().invoke(tune.app, arguments)
    assert result.exit_code == 0, result.output
    record = read(out, [FAMILY])
    assert record["finished"] and statuses(record["timings"]) == ["ok"] * 3
    assert all(row["errors"] for row in record["timings"])
    assert [choice["kernel"] for choice in record["choices"]] == ["forward", "dkdv", "dq"]
    text = table.read_text()
    assert text.startswith(candidates.table_text({}).split("TABLE")[0])
    written = ast.literal_eval(text[text.index("TABLE = ") + len("TABLE = ") :])
    origin = f"{record['environment']['device']['name']}, {record['environment']['date'][:10]}"
    assert written[80]["dq", 64][4] == origin and written[90] == TABLE[90]
