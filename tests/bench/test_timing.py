"""The arithmetic of timing, and the record of what was timed."""

from __future__ import annotations

import subprocess
import time

import pytest
import torch

from bench.harness import clock, machine

CPU = torch.device("cpu")


def test_quantiles_are_interpolated():
    assert clock.quantiles([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert clock.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_tflops():
    assert clock.tflops(4 * 128 * 32 * 10**6, 1.0) == pytest.approx(16.384)


def test_cpu_timing_is_of_one_call_and_keeps_its_bounds():
    calls = []

    def sleep() -> None:
        calls.append(None)
        time.sleep(2e-3)

    measured = clock.measure(sleep, CPU, clock.Effort(seconds=0.0, least=3, most=9))
    assert measured.repeats == len(calls) == 3
    assert 2.0 <= measured.p20 <= measured.p50 <= measured.p80
    calls.clear()
    measured = clock.measure(sleep, CPU, clock.Effort(seconds=10.0, least=3, most=4))
    assert measured.repeats == len(calls) == 4 and measured.host_ms is None


class FakeEvent:
    """A CUDA event whose clock is the host's."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


def test_cuda_timing_flushes_between_calls(monkeypatch):
    """The loop of the CUDA timer with the host's clock for events: order, repeats, what is
    counted."""
    monkeypatch.setattr(clock, "_events", lambda: (FakeEvent(), FakeEvent()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    flush = object.__new__(clock.Flush)
    flush.milliseconds = 0.5
    order = []
    monkeypatch.setattr(clock.Flush, "__call__", lambda self: order.append("flush"))

    def call() -> None:
        order.append("call")
        time.sleep(1e-3)

    times, host_ms = clock._measure_cuda(call, clock.Effort(0.02, 5, 8), flush)
    assert len(times) in range(5, 9) and min(times) >= 1.0 and host_ms >= 1.0
    flushes = flush.repeats_covering(host_ms)
    assert flushes >= 3 and order[:3] == ["call"] * 3
    assert order[3:] == (["flush"] * flushes + ["call"]) * len(times)


@pytest.mark.gpu
def test_cuda_timing_with_a_graph():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    measured = clock.measure(lambda: x @ x, device, clock.QUICK["cuda"], graph=True)
    # 137 GFLOP at less than 2 PFLOP/s and more than 1 TFLOP/s
    assert 0.07 < measured.p50 < 140 and measured.graph_reason is None
    assert measured.graph_p50 == pytest.approx(measured.p50, rel=0.5)
    assert clock.peak_extra_bytes(lambda: x @ x, device) == x.nbytes


def test_commit_of_variable_git_file_or_unknown(monkeypatch, tmp_path):
    monkeypatch.delenv("VOCO_COMMIT", raising=False)
    assert machine.commit(tmp_path) == "unknown"
    (tmp_path / "COMMIT").write_text("feedface\n")
    assert machine.commit(tmp_path) == "feedface"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "COMMIT")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert machine.commit(tmp_path) == head
    (tmp_path / "COMMIT").write_text("changed\n")
    assert machine.commit(tmp_path) == f"{head}-dirty"
    monkeypatch.setenv("VOCO_COMMIT", "told")
    assert machine.commit(tmp_path) == "told"


def test_sources_digest_follows_the_sources(tmp_path):
    (tmp_path / "voco_kernels").mkdir()
    source = tmp_path / "voco_kernels" / "a.py"
    source.write_text("a = 1\n")
    before = machine.sources_digest(tmp_path)
    source.write_text("a = 2\n")
    assert machine.sources_digest(tmp_path) != before


def test_environment_names_device_versions_commit_and_date():
    record = machine.environment(CPU)
    assert record["device"]["type"] == "cpu" and record["device"]["threads"] >= 1
    assert record["versions"]["torch"] == torch.__version__
    assert (
        record["date"].endswith("UTC") and record["commit"] and len(record["sources_sha256"]) == 64
    )


def test_ceilings_are_rates(monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda *_: clock.Timing(1.0, 1.0, 1.0, 1))
    ceilings = machine.ceilings(CPU, torch.float32, clock.QUICK["cpu"])
    assert ceilings["matmul_tflops"] == pytest.approx(2 * 1024**3 / 1e-3 / 1e12)
    assert ceilings["copy_tb_per_s"] == pytest.approx(2 * 2**25 / 1e-3 / 1e12)


def test_errors_become_one_line():
    error = RuntimeError("first\n  second " + "x" * 500)
    line = clock.first_line(error, limit=40)
    assert line.startswith("RuntimeError: first second x") and len(line) == 40
