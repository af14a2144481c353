"""``bench/attn.py`` from the outside: what it prints, writes and returns, also when things go
wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import attn, measure, peers, records, timing
from bench.shapes import SIZES, Shape
from voco_kernels.attention import dispatch

ROOT = Path(__file__).parents[2]
TINY = ["--device", "cpu", "--size", "tiny", "--quick", "--heads", "4/2", "--no-layouts"]
ONE = [*TINY, "--shape", "A", "--backend", "reference"]


@pytest.fixture
def run(tmp_path):
    """``run(*arguments)`` -> the CLI's result and the record that it left, if any."""

    def invoke(*arguments: str):
        out = tmp_path / "attn.json"
        result = CliRunner().invoke(attn.app, [*arguments, "--out", str(out)])
        return result, records.read(out) if out.exists() else None

    return invoke


def rows_of(record: dict) -> dict[str, dict]:
    return {row["name"]: row for case in record["cases"] for row in case["rows"]}


def test_a_whole_run(run, tmp_path):
    rivals = ["sdpa-two-call", "sdpa-two-call-parts", "sdpa-causal", "sdpa-dense"]
    options = [word for rival in rivals for word in ("--rival", rival)]
    tiny = [word for word in TINY if word != "--no-layouts"]
    shapes = ["--shape", "G", "--shape", "A"]
    result, record = run(*tiny, *shapes, "--backend", "sdpa", "--backend", "reference", *options)
    assert result.exit_code == 0, result.output
    assert record["finished"] and record["ceilings"]["matmul_tflops"] > 0
    assert [(case["direction"], case["shape"]) for case in record["cases"]] == [
        (direction, shape) for direction in records.DIRECTIONS for shape in "AG"
    ]
    for case in record["cases"]:
        assert [row["name"] for row in case["rows"]] == ["voco sdpa", "voco reference", *rivals]
        assert all(row["status"] == "ok" for row in case["rows"]), case["rows"]
        backward = 3.5 if case["direction"] != "forward" else 1
        assert case["flops"] == backward * 4 * case["head_dim"] * 4 * case["pairs"]
        for row in case["rows"]:
            seconds = 1e-3 * row["timing"]["p50"]
            assert row["tflops"] == pytest.approx(case["flops"] / seconds / 1e12)
            assert ("errors" in row) == row["masked"]
    layouts = record["layouts"]
    assert [(entry["shape"], entry["status"]) for entry in layouts] == [("A", "ok"), ("G", "ok")]
    assert all(entry["ratio"] > 0 for entry in layouts)
    assert (tmp_path / "attn.png").stat().st_size > 10_000
    for words in (
        "forward, heads 4/2",
        "not compared",
        "kernels alone",
        "from_input_ids",
        "ceilings",
    ):
        assert words in result.stdout
    assert "[1/26] forward A 4/2 voco sdpa: " in result.stderr


def test_a_new_backend_is_measured_beside_the_others(run, monkeypatch):
    """As cuda_sm90 beside triton on a GPU: whatever ``BACKENDS`` holds, the device's default first."""
    sdpa = dispatch.BACKENDS["sdpa"]
    new = {"cuda_new": sdpa, "cuda_next": sdpa, "sdpa": sdpa}
    monkeypatch.setattr(dispatch, "BACKENDS", new)
    monkeypatch.setattr(dispatch, "PREFERENCE_ELSEWHERE", ("cuda_new", "sdpa"))
    result, record = run(*TINY, "--shape", "A", "--rival", "sdpa-two-call")
    assert result.exit_code == 0, result.output
    for case in record["cases"]:
        names = [row["name"] for row in case["rows"] if row["status"] == "ok"]
        own = [name for name in names if name.startswith("voco ")]
        assert own[0] == "voco cuda_new" and "voco sdpa" in own and names[-1] == "sdpa-two-call"
        assert records.our_row(case)["name"] == "voco cuda_new"
        assert records.our_next(case)["name"] == "voco cuda_next"


def planted(how):
    """``masked_attention`` with a fault, for the reference backend alone."""
    right = peers.voco_kernels.masked_attention

    def wrong(q, k, v, layout, *, backend=None, **options):
        out = right(q, k, v, layout, backend=backend, **options)
        return how(out) if backend == "reference" else out

    return wrong


def one_value(out: torch.Tensor) -> torch.Tensor:
    return out + torch.zeros_like(out).index_fill(2, torch.tensor([5]), 1e-2)


def unwritten(out: torch.Tensor) -> torch.Tensor:
    return out.index_fill(2, torch.tensor([5]), float("nan"))


@pytest.mark.parametrize("fault", [one_value, unwritten])
def test_a_red_check_prints_no_speed(run, monkeypatch, fault):
    monkeypatch.setattr(peers.voco_kernels, "masked_attention", planted(fault))
    result, record = run(*ONE, "--direction", "forward", "--rival", "sdpa-two-call")
    assert result.exit_code == attn.EXIT_RED
    rows = rows_of(record)
    red = rows["voco reference"]
    assert red["status"] == "red" and "error against fp64: out" in red["reason"]
    assert not {"timing", "tflops"} & set(red)
    line = next(line for line in result.stdout.splitlines() if "voco reference" in line)
    assert "RED" in line and line.count(" - ") == 5
    rival = rows["sdpa-two-call"]
    assert rival["status"] == "ok"  # the others go on, but against a wrong result there is no ratio
    assert records.times_faster(record["cases"][0], rival) is None
    assert "RED forward A 4/2 voco reference" in result.stderr


def test_wrong_gradients_are_red(run, monkeypatch):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, dout):
            return 1.01 * dout

    monkeypatch.setattr(peers.voco_kernels, "masked_attention", planted(Scaled.apply))
    result, record = run(*ONE, "--rival", "none")
    assert result.exit_code == attn.EXIT_RED
    statuses = [case["rows"][0]["status"] for case in record["cases"]]
    assert statuses == ["ok", "red"]
    assert "dq" in record["cases"][1]["rows"][0]["reason"]


def test_a_rival_that_raises_is_recorded_and_the_others_go_on(run, monkeypatch):
    def broken(self, case):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(peers.SdpaDense, "prepare", broken)
    options = ["--rival", "sdpa-dense", "--rival", "sdpa-two-call", "--direction", "forward"]
    result, record = run(*ONE, *options)
    assert result.exit_code == 0
    rows = rows_of(record)
    assert rows["sdpa-dense"]["status"] == "failed"
    assert rows["sdpa-dense"]["reason"] == "RuntimeError: no kernel for this"
    assert rows["sdpa-two-call"]["status"] == "ok"
    assert "no kernel for this" in result.stdout


def test_a_backend_of_ours_that_raises_fails_the_run(run, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(peers.voco_kernels, "masked_attention", broken)
    result, record = run(*ONE, "--direction", "forward", "--rival", "none")
    assert result.exit_code == attn.EXIT_RED
    assert rows_of(record)["voco reference"]["reason"] == "RuntimeError: no kernel"


def test_a_missing_rival_is_listed_with_its_reason(run):
    options = ["--direction", "forward", "--rival", "flash-attn2-varlen"]
    result, record = run(*ONE, *options)
    assert result.exit_code == 0
    assert record["unavailable"] == {"flash-attn2-varlen": "runs on cuda, not on cpu"}
    assert "not on this machine: flash-attn2-varlen: runs on cuda, not on cpu" in result.stdout


def test_a_spent_budget_skips_and_resume_goes_on(run):
    options = [*ONE, "--direction", "forward", "--rival", "sdpa-two-call"]
    result, record = run(*options, "--budget", "0")
    assert result.exit_code == 0
    assert {row["status"] for row in rows_of(record).values()} == {"skipped"}
    result, record = run(*options, "--resume")
    assert result.exit_code == 0
    assert {row["status"] for row in rows_of(record).values()} == {"ok"}


def test_a_lost_device_ends_with_3_and_resume_goes_on_behind_the_culprit(run, monkeypatch):
    options = [*ONE, "--direction", "forward", "--rival", "sdpa-two-call", "--rival", "sdpa-causal"]
    right = measure.measure_peer

    def lost(peer, *arguments, **options):
        if peer.name == "sdpa-two-call":
            row = measure.empty_row(peer, "failed", "illegal memory access")
            raise measure.DeviceLostError(row)
        return right(peer, *arguments, **options)

    monkeypatch.setattr(measure, "measure_peer", lost)
    result, record = run(*options)
    assert result.exit_code == attn.EXIT_DEVICE_LOST and not record["finished"]
    before = rows_of(record)
    assert list(before) == ["voco reference", "sdpa-two-call"]
    monkeypatch.setattr(measure, "measure_peer", right)
    result, record = run(*options, "--resume")
    after = rows_of(record)
    assert result.exit_code == 0 and record["finished"]
    assert after["voco reference"] == before["voco reference"]
    assert after["sdpa-two-call"]["reason"] == "illegal memory access"
    assert after["sdpa-causal"]["status"] == "ok"


def test_resuming_another_run_is_refused(run):
    result, _ = run(*ONE, "--direction", "forward", "--rival", "none", "--budget", "0")
    assert result.exit_code == 0
    result, _ = run(
        *ONE, "--direction", "forward", "--rival", "none", "--dtype", "bf16", "--resume"
    )
    assert result.exit_code == 2 and "with the same settings to resume" in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "Z"], "expected shapes among A, B, C, D, E, F, G, got Z"),
        (["--rival", "fa9"], "expected rivals among sdpa-two-call"),
        (["--backend", "warp"], "expected backends among triton"),
        (["--heads", "32:8"], "expected heads as 32/8"),
        (["--heads", "5/2"], "expected heads as 32/8"),
        (["--direction", "sideways"], "sideways"),
    ],
)
def test_wrong_options_say_what_was_expected(run, arguments, message):
    result, record = run("--device", "cpu", *arguments)
    assert result.exit_code == 2 and record is None
    assert message in " ".join(result.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_cuda_without_one_is_an_error(run):
    result, record = run("--device", "cuda")
    assert result.exit_code == 2 and record is None
    assert "expected a CUDA device" in " ".join(result.output.split())


def test_layouts_that_disagree_are_red(monkeypatch):
    other = peers.MaskLayout.from_lengths(20, 5, 9, batch=3)
    monkeypatch.setattr(Shape, "layout", lambda self, device: other)
    shape, effort = SIZES["tiny"].shapes["A"], timing.QUICK["cpu"]
    entry = measure.measure_layout(shape, torch.device("cpu"), effort, compiled=False)
    assert entry["status"] == "red" and "layout" not in entry


def test_without_a_truth_nothing_is_timed_and_other_cases_go_on(run, monkeypatch):
    right = measure.truth_of

    def broken(case):
        if case.shape.name == "A":
            raise MemoryError("no room")
        return right(case)

    monkeypatch.setattr(measure, "truth_of", broken)
    options = [*ONE, "--shape", "B", "--direction", "forward", "--rival", "sdpa-two-call"]
    result, record = run(*options)
    assert result.exit_code == attn.EXIT_RED
    statuses = [{row["status"] for row in case["rows"]} for case in record["cases"]]
    assert statuses == [{"failed"}, {"ok"}]
    assert "no float64 truth: MemoryError: no room" in record["cases"][0]["rows"][0]["reason"]


def test_help_names_every_option_and_rival():
    command = [sys.executable, "bench/attn.py", "--help"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = "".join(answer.stdout.split())
    for option in ("--shape", "--heads", "--dtype", "--direction", "--rival", "--out", "--quick"):
        assert option in text
    for rival in peers.RIVALS:
        assert rival in text
