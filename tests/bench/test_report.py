"""Tables from committed records: a round trip, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import report
from bench.attention.report import FAMILY
from voco_model.miniature import report as miniature_report

README = """# Title

<!-- bench:attn:start -->
old
<!-- bench:attn:end -->

between

<!-- bench:layout:start -->
<!-- bench:layout:end -->
<!-- bench:attn-cpu:start -->
<!-- bench:attn-cpu:end -->
after
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a README of three tables, a page of docs, and no results."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "speed.md").write_text(
        "<!-- bench:attn-plot:start -->\n<!-- bench:attn-plot:end -->\n"
        "<!-- bench:shapes:start -->\n<!-- bench:shapes:end -->\n"
        "<!-- bench:roofline:start -->\n<!-- bench:roofline:end -->\n"
    )
    return tmp_path


def run(checkout: Path, *arguments: str):
    return CliRunner().invoke(report.app, [*arguments, "--root", str(checkout)])


def test_without_results_every_figure_is_not_measured(checkout):
    assert run(checkout, "--check").exit_code == 1
    assert (checkout / "README.md").read_text() == README  # a check writes nothing
    result = run(checkout)
    assert result.exit_code == 0 and "wrote: README.md" in result.stdout
    text = (checkout / "README.md").read_text()
    assert text.startswith("# Title\n") and "\nbetween\n" in text and text.endswith("after\n")
    assert "old" not in text
    for name in "ABCDEFG":
        assert f"| **{name}** | 32/8 |" + " not measured |" * 7 in text
    docs = (checkout / "docs" / "speed.md").read_text()
    assert "Roofline: not measured." in docs and "64 isolated (576, 1), then 2048 x 1" in docs
    assert run(checkout, "--check").exit_code == 0


def test_results_become_tables_and_a_plot(checkout, record):
    path = checkout / "bench" / "results" / "attn-test.json"
    FAMILY.write(record, path)
    result = run(checkout)
    assert "wrote: bench/results/attn-test.png" in result.stdout
    text = (checkout / "README.md").read_text()
    measured = (
        "| **A** | 32/8 | 1 | 100 | 1.25 (fa2-varlen) | 1.10 (cudnn-two-call) | 2.00 "
        "| not measured | 0.25 |"
    )
    assert text.count(measured) == 2  # forward, and forward with backward
    assert (
        "NVIDIA Test, bf16, head_dim 128, backend `triton`; torch 2.11.0, triton 3.6.0, commit "
        "0123456789ab, 2030-01-02 (`bench/results/attn-test.json`)." in text
    )
    assert "| **A** | 20 | 1e+03 | 50.0 |" in text and "| **B** | not measured |" in text
    docs = (checkout / "docs" / "speed.md").read_text()
    assert "](../bench/results/attn-test.png)" in docs
    assert "](../bench/results/attn-test-roofline.png)" in docs
    picture = checkout / "bench" / "results" / "attn-test-roofline.png"
    assert picture.stat().st_size > 10_000
    assert run(checkout, "--check").exit_code == 0

    record["cases"][0]["rows"][0]["tflops"] = 77.0
    FAMILY.write(record, path)
    stale = run(checkout, "--check")
    assert stale.exit_code == 1
    assert "out of date: README.md" in stale.stdout and "attn-test.png" in stale.stdout
    assert run(checkout).exit_code == 0 and run(checkout, "--check").exit_code == 0


def test_the_newer_record_of_a_device_is_shown(checkout, record):
    folder = checkout / "bench" / "results"
    FAMILY.write(record, folder / "b-older.json")
    record["environment"]["date"] = "2030-02-01 00:00 UTC"
    for row in record["cases"][0]["rows"]:
        if "tflops" in row:
            row["tflops"] *= 2
    del record["cases"][1]
    FAMILY.write(record, folder / "a-newer.json")
    run(checkout)
    text = (checkout / "README.md").read_text()
    assert "| **A** | 32/8 | 1 | 200 |" in text and "| **A** | 32/8 | 1 | 100 |" in text


def test_a_red_backend_has_no_figures(checkout, record):
    row = record["cases"][0]["rows"][0]
    row |= {"status": "red", "reason": "wrong"}
    del row["timing"], row["tflops"]
    record["cases"] = record["cases"][:1]
    FAMILY.write(record, checkout / "bench" / "results" / "attn.json")
    run(checkout)
    assert "fa2-varlen" not in (checkout / "README.md").read_text()


def test_two_backends_of_ours_stand_side_by_side(checkout, record):
    rows = record["cases"][0]["rows"]
    rows.insert(0, {**rows[0], "name": "voco cuda_sm90", "tflops": 150.0})
    rows[0]["timing"] = {**rows[0]["timing"], "p50": 0.5}
    # the second case is one that the default can't serve
    lacks = {**rows[0], "status": "unsupported", "reason": "head_dim"}
    del lacks["timing"], lacks["tflops"]
    record["cases"][1]["rows"] = [lacks, *rows[1:]]
    FAMILY.write(record, checkout / "bench" / "results" / "attn.json")
    run(checkout)
    text = (checkout / "README.md").read_text()
    assert "| useful TFLOP/s | × our next backend | × two-call, drop-in |" in text
    assert "| **A** | 32/8 | 0.5 | 150 | 2.00 (triton) | 2.50 (fa2-varlen) |" in text
    assert "| **A** | 32/8 | 1 | 100 | 1.25 (fa2-varlen) |" in text
    assert "backend `cuda_sm90`, `triton`;" in text and "| heads | ms |" in text

    # in one table: each row says whose it is
    other = {**record["cases"][1], "direction": "forward", "shape": "B"}
    record["cases"] = [record["cases"][0], other]
    FAMILY.write(record, checkout / "bench" / "results" / "attn.json")
    run(checkout)
    text = (checkout / "README.md").read_text()
    assert "| shape | heads | backend | ms | useful TFLOP/s | × our next backend |" in text
    assert "| **A** | 32/8 | cuda_sm90 | 0.5 | 150 | 2.00 (triton) |" in text
    assert "| **B** | 32/8 | triton | 1 | 100 | not measured |" in text
    assert "| **C** | 32/8 | not measured | not measured |" in text


def test_without_ceilings_there_is_no_roofline(checkout, record):
    record["ceilings"] = {}
    FAMILY.write(record, checkout / "bench" / "results" / "attn.json")
    run(checkout)
    docs = (checkout / "docs" / "speed.md").read_text()
    assert "NVIDIA Test (`bench/results/attn.json`): ceilings not measured." in docs
    assert not list((checkout / "bench" / "results").glob("*roofline*"))
    assert run(checkout, "--check").exit_code == 0


def test_quick_runs_are_refused(checkout, record):
    record["settings"]["quick"] = True
    FAMILY.write(record, checkout / "bench" / "results" / "look.json")
    result = run(checkout)
    assert result.exit_code == 2 and "got look.json of a --quick one" in result.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- bench:attn:start -->\n", "line 1"),
        ("x\n<!-- bench:attn:end -->\n", "line 2"),
        ("<!-- bench:attn:start -->\n<!-- bench:layout:end -->\n", "line 1"),
        (
            "<!-- bench:nothing:start -->\n<!-- bench:nothing:end -->\n",
            "expected a table among attn",
        ),
    ],
)
def test_broken_markers_are_refused(checkout, text, message):
    (checkout / "README.md").write_text(text)
    result = run(checkout)
    assert result.exit_code == 2 and message in result.stderr
    assert (checkout / "README.md").read_text() == text


def test_show_prints_one_record(checkout, record):
    path = checkout / "attn.json"
    FAMILY.write(record, path)
    result = run(checkout, "--show", str(path))
    assert "1.25 (fa2-varlen)" in result.stdout and "not measured yet" not in result.stdout.lower()
    assert "**B**" not in result.stdout


def test_the_checkout_itself_is_up_to_date(tmp_path):
    """What CI asks, on a copy: the committed texts and results agree."""
    root = report.ROOT
    for path in [*report.texts(root), *(root / "bench" / "results").rglob("*.*")]:
        target = tmp_path / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    assert report.update(tmp_path, tmp_path / "bench" / "results", check=True) == []


def test_the_miniatures_tables_and_plot_follow_its_results(checkout):
    folder = checkout / "bench/results/miniature"
    folder.mkdir()
    shutil.copy(report.ROOT / "bench/results/miniature/results.json", folder)
    page = checkout / "docs/quality.md"
    page.write_text("<!-- bench:miniature-main:start -->\n<!-- bench:miniature-main:end -->\n")
    assert run(checkout).exit_code == 0
    results = json.loads((folder / "results.json").read_text())
    assert miniature_report.tables(results)["main"] in page.read_text()
    assert run(checkout, "--check").exit_code == 0

    results["rows"][0]["accuracy"]["digit"] = 0.5
    (folder / "results.json").write_text(json.dumps(results))
    stale = run(checkout, "--check")
    assert stale.exit_code == 1
    assert "docs/quality.md" in stale.output and "miniature/retention.png" in stale.output
