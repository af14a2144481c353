"""``bench/kv.py`` from the outside, and the tables and plots that its records become."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

from bench import kv, report
from bench.harness import machine, options
from bench.harness.family import read
from bench.harness.guard import NotMeasuredError
from bench.harness.turns import QUICK, Clock, Job
from bench.loading import loads, places, plots
from bench.loading import report as loading_report
from bench.loading import run as loading_run
from bench.loading.questions import floor_of, times_floor
from bench.loading.report import FAMILY
from bench.loading.scene import SIZES, Scene

TINY = ["--device", "cpu", "--size", "tiny", "--quick"]
CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    """``run(*arguments)`` -> the CLI's result and the record that it left, if any."""

    def invoke(*arguments: str):
        out = tmp_path / "kv.json"
        result = CliRunner().invoke(kv.app, [*TINY, *arguments, "--out", str(out)])
        return result, read(out, [FAMILY]) if out.exists() else None

    return invoke


@pytest.fixture
def scene(tmp_path):
    def no_server():
        raise NotMeasuredError("none in this test")

    made = Scene(SIZES["tiny"], 3, CPU, tmp_path, no_server)
    yield made
    made.close()


def rows_of(record: dict, source: str) -> dict[str, dict]:
    return {r["name"]: r for c in record["cases"] if c["source"] == source for r in c["rows"]}


def test_a_whole_run(run, tmp_path):
    result, record = run("--tokens", "2", "--tokens", "1")
    assert result.exit_code == 0, result.output
    assert record["finished"] and record["bench"] == "kv" and record["settings"]["tokens"] == [1, 2]
    found = [(case["source"], case["tokens"]) for case in record["cases"]]
    assert found == [(source, n) for source in loads.SOURCES["cpu"] for n in (1, 2)]
    for case in record["cases"]:
        assert case["bytes"] == 2 * (3 * 2 * 2 * case["tokens"] * 16)
        names = [load.name for load in loads.loads_from(case["source"], "cpu")]
        assert [row["name"] for row in case["rows"]] == names
        for row in case["rows"]:
            if row["status"] == "unsupported":  # no Redis here, or a disk in memory
                assert case["source"] in ("disk", "redis") and row["reason"]
                continue
            assert row["status"] == "ok", row
            assert 0 < row["wall"]["p20"] <= row["wall"]["p50"] <= row["wall"]["p80"]
            assert ("warm" in row) == (case["source"] != "disk") and "device" not in row
    assert {"numpy", "safetensors", "xxhash"} <= set(record["environment"]["versions"])
    assert record["environment"]["sources_sha256"] == machine.sources_digest(sources=kv.MEASURED)
    assert (tmp_path / "kv.png").stat().st_size > 10_000
    for words in ("from page cache: 2 tokens, 0.000768 MB", "memcpy + xxh3-128", "RedisStore"):
        assert words in result.stdout
    assert "[8/8] redis, 1 token: " in result.stderr
    assert not list(tmp_path.glob("voco-kv-*"))


@pytest.mark.parametrize("fault", ["an element", "nothing", "behind", "length"])
def test_a_red_check_prints_no_time(run, monkeypatch, fault):
    right = loads.load_into

    def wrong(cache, entry, **placement):
        if fault != "nothing":
            right(cache, entry, **placement)
        keys = cache.layers[-1].keys if hasattr(cache, "layers") else cache[0].tensors[-1][0]
        if fault == "an element":
            keys[0, 1, 0, 5] += 1
        elif fault == "behind":
            keys[0, 1, 2, 5] = 0
        elif fault == "length" and hasattr(cache, "layers"):
            cache.layers[0].cumulative_length += 1

    monkeypatch.setattr(loads, "load_into", wrong)
    result, record = run("--tokens", "2", "--source", "memory")
    assert result.exit_code == options.EXIT_RED
    rows = rows_of(record, "memory")
    red = rows["load_into"]
    assert red["status"] == "red" and "not timed" in red["reason"]
    assert not {"wall", "warm", "device"} & set(red)
    (line,) = [x for x in result.stdout.splitlines() if x.startswith("| load_into  ")]
    assert "RED" in line and line.count(" - ") == 6
    assert f"RED memory 2 load_into: red: {red['reason']}" in result.stderr
    for name in ("memcpy", "slices", "launch"):  # the others go on
        assert rows[name]["status"] == "ok"


def test_a_stale_result_is_red(scene):
    """Memory is poisoned between loads: one that does nothing doesn't live on another's work."""
    timed = [load for load in loads.loads_from("memory", "cpu") if load.name == "launch"]
    idle = loads.Load("idle", "", lambda s: Job(lambda: None, loads._in_cache(s)))
    rows = loading_run.time_loads([*timed, idle], scene, Clock(CPU, QUICK["cpu"]))
    assert [row["status"] for row in rows] == ["ok", "red"]


def test_what_raises_is_recorded_and_the_others_go_on(run, monkeypatch):
    calls = []

    def breaks(*_):
        calls.append(None)
        raise RuntimeError("no memory\nleft")

    monkeypatch.setattr(loads, "extract", breaks)
    result, record = run("--tokens", "1", "--source", "memory")
    rows = rows_of(record, "memory")
    assert rows["extract"]["reason"] == "RuntimeError: no memory left" and calls
    assert rows["extract"]["status"] == "failed" and rows["memcpy"]["status"] == "ok"
    assert result.exit_code == options.EXIT_RED


def test_a_load_that_fails_later_has_no_time(scene):
    left = [2]

    def run_out() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("gone")

    load = loads.Load("fragile", "", lambda _: Job(run_out, lambda _: ""))
    (row,) = loading_run.time_loads([load], scene, Clock(CPU, QUICK["cpu"]))
    assert row["status"] == "failed" and row["reason"] == "OSError: gone" and "wall" not in row


def test_without_a_server_redis_is_not_measured(run, monkeypatch):
    monkeypatch.setattr(places.shutil, "which", lambda _: None)
    result, record = run("--tokens", "1", "--source", "redis")
    assert result.exit_code == 0
    rows = rows_of(record, "redis")
    assert rows["memcpy"]["status"] == "ok"
    for name in ("GET", "RedisStore.load_into"):
        assert rows[name]["status"] == "unsupported"
        assert rows[name]["reason"] == "redis-server is not on the PATH"


def test_files_that_stay_in_memory_are_no_cold_disk(run, monkeypatch):
    monkeypatch.setattr(places.os, "posix_fadvise", lambda *_: None)
    result, record = run("--tokens", "1", "--source", "disk")
    assert result.exit_code == 0
    rows = rows_of(record, "disk")
    for name in ("read", "KVStore.load_into", "torch.load + slices"):
        assert rows[name]["status"] == "unsupported", rows[name]


def test_a_spent_budget_is_said(run):
    result, record = run("--tokens", "1", "--source", "memory", "--budget", "0")
    assert result.exit_code == 0
    assert {row["status"] for row in rows_of(record, "memory").values()} == {"skipped"}
    assert "the budget of 0 s was spent" in result.stdout


@pytest.mark.parametrize("arguments", [["--size", "huge"], ["--source", "tape"], ["--tokens", "0"]])
def test_wrong_usage(run, arguments):
    result, record = run(*arguments)
    assert result.exit_code == 2 and record is None
    assert "expected" in re.sub(r"\W+", " ", result.output)


def test_the_loads_of_a_gpu_can_be_prepared(scene):
    """As far as a CPU goes: what is named, not what is timed."""
    for source in loads.SOURCES["cuda"][:2]:
        for load in loads.loads_from(source, "cuda"):
            if load.name == "graph replay":
                continue
            try:
                assert isinstance(loading_run.checked(load, scene), Job)
            except NotMeasuredError as error:  # Triton may be there, interpreted
                assert load.name in ("launch, cuda", "launch, triton")
                assert "no loader can make this move" in str(error)
    names = [load.name for load in loads.loads_from("pinned memory", "cuda", sweep=True)]
    assert names == ["pinned copy", "launch, direct", "launch, staged"]


def test_staging_is_as_it_was_behind_a_load(scene):
    shipped = loads.staging.STAGED_ABOVE
    for staged in (True, False):
        loads._launch(scene, staged=staged)
        assert loads.staging.STAGED_ABOVE == shipped


# ---- records, tables and plots


def summary(p50: float) -> dict:
    return {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50, "repeats": 9}


def made_up(device_type: str) -> dict:
    """A record of a whole run whose every load takes a multiple of the first floor's time."""
    model = SIZES["full"]
    sizes = [(n, False) for n in loading_report.TOKENS]
    if device_type == "cuda":
        sizes += [(n, True) for n in loading_run.SWEEP_TOKENS]
    cases = []
    for source in loads.SOURCES[device_type]:
        for tokens, sweep in sizes:
            if sweep and source != "pinned memory":
                continue
            rows = []
            for place, load in enumerate(loads.loads_from(source, device_type, sweep=sweep)):
                p50 = 1e-8 * model.nbytes(tokens) * (2 + place)
                row = {"name": load.name, "kind": load.kind, "checksum": load.checksum}
                row |= {"status": "ok", "wall": summary(p50), "warm": summary(p50 / 4)}
                if device_type == "cuda" and source in ("pinned memory", "device"):
                    row["device"] = summary(p50 / 2)
                rows.append(row)
            case = {"source": source, "tokens": tokens, "bytes": model.nbytes(tokens)}
            cases.append({**case, "rows": rows})
    device = {"type": device_type, "name": f"Test {device_type}"}
    if device_type == "cpu":
        device["threads"] = 1
    return {
        "schema": 1,
        "bench": "kv",
        "finished": True,
        "environment": {
            "date": "2030-01-02 03:04 UTC",
            "commit": "0123456789abcdef",
            "sources_sha256": "f" * 64,
            "device": device,
            "versions": {"torch": "2.11.0"},
        },
        "settings": {
            "size": "full",
            "num_layers": model.num_layers,
            "num_kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "dtype": "bf16",
            "tokens": list(loading_report.TOKENS),
            "sources": list(loads.SOURCES[device_type]),
            "evicted_bytes": {"cpu": 64 << 20},
            "quick": False,
        },
        "cases": cases,
    }


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a page for these tables, and no results."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    names = ("kv-cpu", "kv", "kv-plot")
    text = "".join(f"<!-- bench:{name}:start -->\n<!-- bench:{name}:end -->\n" for name in names)
    (tmp_path / "docs" / "kv_cache.md").write_text(text)
    (tmp_path / "README.md").write_text("# Title\n")
    return tmp_path


def report_on(checkout, *arguments: str):
    result = CliRunner().invoke(report.app, [*arguments, "--root", str(checkout)])
    return result, (checkout / "docs" / "kv_cache.md").read_text()


def test_without_results_goals_are_shown_as_not_measured(checkout):
    result, text = report_on(checkout)
    assert result.exit_code == 0
    assert text.count("Not measured yet.") == 2
    assert "64 tokens, 33.6 MB: × memcpy + xxh3-128 | ≤ 1.3 | not measured |  |" in text
    assert "`launch`, 1 token, 0.52 MB | ≤ 35 µs | not measured | not measured |" in text
    assert "Time of a load against its bytes: not measured." in text
    assert report_on(checkout, "--check")[0].exit_code == 0


def test_results_become_tables_and_plots(checkout):
    folder = checkout / "bench" / "results"
    for device_type in ("cpu", "cuda"):
        FAMILY.write(made_up(device_type), folder / f"kv-{device_type}.json")
    result, text = report_on(checkout)
    assert "wrote: bench/results/kv-cpu.png" in result.stdout
    for name in ("kv-cpu", "kv-cuda"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
        assert f"](../bench/results/{name}.png)" in text
    assert "not measured" not in text.split("<!-- bench:kv:start -->")[1].split("| from |")[0]
    # Of the page cache's loads memcpy takes 2, with the checksum 3, ours 6 parts.
    assert "1 token, 0.52 MB: × memcpy + xxh3-128 | ≤ 2 | 2.00 | 2.00 |" in text
    assert "| **KVStore.load_into** ✓ | the call, checksum included | 31.5 µs (2.00) |" in text
    assert "≤ 35 µs | 15.7 µs | 31.5 µs |" in text  # half on the device
    assert "| 16 | 8.39 MB |" in text
    assert "| from | load | its time includes | 1 token, 0.52 MB |" in text
    assert "Test cuda; entries of 32 layers, 32 heads of 128, bf16" in text
    assert "Test cpu (1 thread); " in text and "commit 0123456789ab, 2030-01-02" in text
    assert report_on(checkout, "--check")[0].exit_code == 0

    record = made_up("cpu")
    for row in record["cases"][0]["rows"]:
        row["wall"]["p50"] *= 2
    FAMILY.write(record, folder / "kv-cpu.json")
    result, _ = report_on(checkout, "--check")
    assert result.exit_code == 1 and "docs/kv_cache.md" in result.stdout
    assert "kv-cpu.png" in result.stdout


def test_what_was_not_timed_is_not_measured(checkout):
    record = made_up("cpu")
    for case in record["cases"]:
        for row in case["rows"]:
            if case["source"] == "redis" or row["name"] in ("KVStore.load_into", "memcpy"):
                for what in ("wall", "warm"):
                    del row[what]
                row |= {"status": "red", "reason": "wrong"}
    FAMILY.write(record, checkout / "bench" / "results" / "kv.json")
    _, text = report_on(checkout)
    assert "1 token, 0.52 MB: × memcpy + xxh3-128 | ≤ 2 | not measured | not measured |" in text
    assert (
        "**RedisStore.load_into** ✓ | the call, checksum included |" + " not measured |" * 4 in text
    )
    assert re.search(r"\| \*\*launch\*\* \| [^|]* \| [\d.]+ µs \|", text)  # no floor, no multiple


def test_show_prints_a_record_of_any_size(run, tmp_path):
    run("--tokens", "1", "--source", "memory")
    result = CliRunner().invoke(report.app, ["--show", str(tmp_path / "kv.json")])
    assert result.exit_code == 0 and "| memory | **load_into** |" in result.stdout
    assert "goal" not in result.stdout


def test_quick_records_are_refused(run, tmp_path):
    run("--tokens", "1", "--source", "memory")
    (tmp_path / "results").mkdir()
    shutil.move(tmp_path / "kv.json", tmp_path / "results")
    with pytest.raises(ValueError, match="kv.json of a --quick one"):
        report.load_results(tmp_path / "results")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda r: r.update(schema=0), "expected schema 1"),
        (lambda r: r["cases"][0].pop("source"), "'source' in a case"),
        (lambda r: r["cases"][0]["rows"][0].pop("wall"), "a time exactly where"),
        (lambda r: r["cases"][0]["rows"][0].update(status="red"), "a time exactly where"),
        (lambda r: r["cases"][0]["rows"][0].update(kind="mine"), "a kind of"),
    ],
)
def test_broken_records_are_refused(tmp_path, spoil, message):
    record = made_up("cpu")
    spoil(record)
    with pytest.raises(ValueError, match=message):
        FAMILY.write(record, tmp_path / "kv.json")
    assert not list(tmp_path.iterdir())


def test_floors_are_compared_with_their_like():
    case = made_up("cpu")["cases"][0]
    rows = {row["name"]: row for row in case["rows"]}
    assert floor_of(case, checksum=False) is rows["memcpy"]
    assert floor_of(case, checksum=True) is rows["memcpy + xxh3-128"]
    assert times_floor(case, rows["load_into"]) == pytest.approx(4 / 2)
    on_cuda = made_up("cuda")["cases"][0]
    assert floor_of(on_cuda, checksum=True)["name"] == "pinned copy"


def test_a_plot_needs_cases(tmp_path):
    with pytest.raises(ValueError, match="expected a record with cases"):
        plots.plot_loads({**made_up("cpu"), "cases": []}, tmp_path / "kv.png")


@pytest.mark.parametrize(
    "milliseconds, text",
    [(0.0931, "93.1 µs"), (0.9999, "1.00 ms"), (4.567, "4.57 ms"), (1234, "1.23 s")],
)
def test_durations_have_three_digits(milliseconds, text):
    assert loading_report.duration(milliseconds) == text


def test_more_than_the_caches_hold_is_read():
    assert Clock(CPU, QUICK["cpu"]).evicted_bytes["cpu"] >= 64 << 20
