"""Two processes against one, and killed runs against whole ones: real processes, on loopback only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.voco_model import instruction
from voco_model.train import checkpoints, make_config, train
from voco_model.vlm.load import load

WORKER = Path(__file__).with_name("worker.py")
ROOT = WORKER.parents[3]
# 6 steps; the last checkpoint before the end of step 5 is that of step 4.
CHECKPOINTS = {"every": 2}
DIE_AT = 5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def _namespace() -> list[str]:
    """torchrun listens on all interfaces: where the system allows, it gets loopback alone."""
    command = [
        "unshare",
        "--map-root-user",
        "--net",
        "sh",
        "-c",
        'ip link set lo up && exec "$@"',
        "-",
    ]
    if shutil.which("unshare") and shutil.which("ip"):
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []


def run(processes: int, values: dict, die_at: int = 0) -> subprocess.CompletedProcess:
    path = Path(values["output"]).with_suffix(".json")
    path.write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *_namespace(),
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
        *("--master-addr", "127.0.0.1", "--master-port", str(port), str(WORKER), str(path)),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "VOCO_DIE_AT": str(die_at),
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def one_process(folder, checkpoint, data):
    """Weights and losses of the run that nothing was done to."""
    values = instruction.config(checkpoint, data, folder / "one")
    return result(train(make_config(values)))


def result(saved: Path) -> tuple[torch.Tensor, list[float]]:
    model, _ = load(saved)
    history = json.loads((saved / "training.json").read_text())["log_history"]
    return instruction.weights(model), [entry["loss"] for entry in history if "loss" in entry]


def check_equal(saved: Path, one_process) -> None:
    (weights, losses), (expected, expected_losses) = result(saved), one_process
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert torch.allclose(weights, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sharding", ["zero3", "fsdp2"])
def test_killed_and_resumed_on_two_processes_equals_one(
    sharding, folder, checkpoint, data, one_process
):
    output = folder / sharding
    values = instruction.config(
        checkpoint, data, output, sharding=sharding, checkpoints=CHECKPOINTS
    )
    killed = run(2, values, die_at=DIE_AT)
    assert killed.returncode != 0 and f"Signal {int(signal.SIGKILL)}" in killed.stderr, (
        killed.stderr
    )
    assert not (output / "model").exists()
    assert [p.name for p in checkpoints.folders(output)] == ["checkpoint-4", "checkpoint-2"]

    # A checkpoint that a kill has cut off: newer, and never to be used.
    half = shutil.copytree(output / "checkpoint-4", output / "checkpoint-5")
    (half / checkpoints.MARK).unlink()
    if sharding == "fsdp2":
        shutil.copytree(output, folder / "elastic")

    resumed = run(2, values)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {output / 'checkpoint-4'}" in resumed.stderr
    check_equal(output / "model", one_process)
    # The half-written one is older than the newest whole ones now.
    assert [p.name for p in checkpoints.folders(output)] == ["checkpoint-6", "checkpoint-4"]

    if sharding == "fsdp2":  # whose checkpoints go on with another number of processes
        elastic = folder / "elastic"
        alone = run(1, {**values, "output": str(elastic)})
        assert alone.returncode == 0, alone.stderr
        assert f"resuming from {elastic / 'checkpoint-4'}" in alone.stderr
        check_equal(elastic / "model", one_process)
