"""``bench/gpu.sh``: its steps in their order, what it leaves behind, and how it ends.

A stand-in for the interpreter plays the steps, so that the script itself is tested in a second; CI
runs ``--dry-run`` with the real one.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in
    *"--show"*) echo "TABLE" ;;
    *"import xdist"*) exit 0 ;;
    *"bench/attn.py"*)
        out=$(printf '%s\\n' "$@" | grep -A1 -x -- --out | tail -1)
        echo '{}' >"$out"
        touch "$out.part"
        case "$*" in *--resume*) exit 0 ;; esac
        exit "${ATTN_RC:-0}" ;;
    "-m pytest"*) sleep "${TESTS_TAKE:-0}"; echo "9 passed"; exit "${TESTS_RC:-0}" ;;
    -) cat >/dev/null; echo '{}' >"$OUT/environment.json" ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """``script(*arguments, **variables)`` -> the process, the folder of results, the calls made."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(python.stat().st_mode | stat.S_IEXEC)

    def run(*arguments: str, **variables: str):
        out = tmp_path / "out"
        calls = tmp_path / "calls"
        environment = {
            **os.environ,
            "PYTHON": str(python),
            "OUT": str(out),
            "CALLS": str(calls),
            **variables,
        }
        command = ["bash", "bench/gpu.sh", *arguments]
        answer = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        made = calls.read_text().splitlines() if calls.exists() else []
        return answer, out, made

    return run


def test_all_steps_in_order(script):
    answer, out, calls = script()
    assert answer.returncode == 0, answer.stdout + answer.stderr
    steps = re.findall(r"^==> (\w+) \(at most", answer.stdout, re.M)
    assert steps == ["environment", "build", "parity", "forward", "backward"]
    tests = next(call for call in calls if call.startswith("-m pytest"))
    assert "-m gpu tests -n 8" in tests
    benches = [call for call in calls if call.startswith("bench/attn.py")]
    assert len(benches) == 2 and all("--device cuda" in call for call in benches)
    assert "--direction forward " in benches[0] and "--direction forward+backward" in benches[1]
    assert not any("--rival" in call or "--quick" in call for call in benches)
    names = sorted(path.name for path in out.iterdir())
    # with the two plots, eight files
    assert names == [
        "attn-backward.json",
        "attn-forward.json",
        "environment.json",
        "gpu.log",
        "parity.log",
        "summary.txt",
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    assert answer.stdout.count("TABLE") == 2
    assert re.search(r"parity +rc 0 +\d+ s", (out / "summary.txt").read_text())


def test_a_dry_run_is_small_and_on_the_cpu(script):
    answer, _, calls = script("--dry-run")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for call in calls:
        if call.startswith("bench/attn.py"):
            assert "--device cpu --size tiny --quick" in call
        if call.startswith("-m pytest"):
            assert "-m not gpu and not slow" in call


def test_a_failed_step_fails_the_script_and_the_others_go_on(script):
    answer, out, calls = script(TESTS_RC="1")
    assert answer.returncode == 1 and "A STEP FAILED" in answer.stdout
    assert re.search(r"parity +rc 1 ", (out / "summary.txt").read_text())
    assert sum(call.startswith("bench/attn.py") for call in calls) == 2


def test_a_lost_device_is_resumed(script):
    answer, _, calls = script("--only", "forward", ATTN_RC="3")
    assert answer.returncode == 0
    benches = [call for call in calls if call.startswith("bench/attn.py")]
    assert ["--resume" in call for call in benches] == [False, True]


def test_a_step_that_hangs_is_ended_and_the_rest_still_runs(script):
    answer, out, calls = script("--only", "parity", TESTS_TAKE="30", VOCO_LIMIT="5")
    assert answer.returncode == 1
    assert re.search(r"parity +rc 124 ", (out / "summary.txt").read_text())


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--only"], ["--dry"]])
def test_wrong_use_says_what_was_expected(script, arguments):
    answer, out, calls = script(*arguments)
    assert answer.returncode == 2 and "expected --" in answer.stderr
    assert not out.exists() and not calls


def test_help(script):
    answer, _, _ = script("--help")
    assert (
        answer.returncode == 0 and "--dry-run" in answer.stdout and "set -uo" not in answer.stdout
    )


def test_one_step_with_the_real_interpreter(script):
    answer, out, _ = script("--dry-run", "--only", "environment", PYTHON=sys.executable)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert '"type": "cpu"' in (out / "environment.json").read_text()
