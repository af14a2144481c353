"""``bench/gpu.sh``: its steps in their order, what it leaves behind, and how it ends.

A stand-in for the interpreter plays the steps, so that the script itself is tested in a second; CI
runs ``--dry-run`` with the real one.
"""

from __future__ import annotations

import os
import re
import shutil
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
    *"bench/attn.py"* | *"bench/kv.py"* | *"bench/two_pass.py"* | *"bench/train.py"* | *"bench/tune.py"*)
        out=$(printf '%s\\n' "$@" | grep -A1 -x -- --out | tail -1)
        echo '{}' >"$out"
        touch "$out.part"
        case "$*" in *--resume*) exit 0 ;; esac
        exit "${ATTN_RC:-0}" ;;
    *"bench/sanitize.py"*) sleep "${SANITIZE_TAKES:-0}" ;;
    "-m pytest"*) sleep "${TESTS_TAKE:-0}"; echo "9 passed"; exit "${TESTS_RC:-0}" ;;
    -) cat >/dev/null; echo '{}' ;;
esac
"""


TOOL = """#!/usr/bin/env bash
printf '%s %s\\n' "${0##*/}" "$*" >>"$CALLS"
case "${0##*/} $*" in
    *racecheck*) sleep "${RACES_TAKE:-0}" ;;
    *memcheck*) exit "${MEMORY_RC:-0}" ;;
    ncu*) echo '"ID","Kernel Name"' >"$(printf '%s\\n' "$@" | grep -A1 -x -- --log-file | tail -1)" ;;
esac
"""

PLAN = re.compile(r'^    "(\w+) (\d+) (\d+)"$', re.M)
STEPS = ["environment", "build", "parity", "sanitizer", "forward", "backward", "kv", "two_pass"]
STEPS += ["train", "tune", "ncu"]


@pytest.fixture
def tools(tmp_path):
    """A PATH with stand-ins for the tools of a GPU machine."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        (folder / name).write_text(TOOL)
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


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
    assert steps == STEPS
    tests = next(call for call in calls if call.startswith("-m pytest"))
    assert "-m gpu tests -n 8" in tests
    benches = [call for call in calls if call.startswith("bench/attn.py")]
    assert len(benches) == 2 and all("--device cuda" in call for call in benches)
    assert "--direction forward " in benches[0] and "--direction forward+backward" in benches[1]
    assert not any("--rival" in call or "--quick" in call for call in benches)
    (loads,) = [call for call in calls if call.startswith("bench/kv.py")]
    assert "--device cuda --budget " in loads and "--quick" not in loads
    (answers,) = [call for call in calls if call.startswith("bench/two_pass.py")]
    assert "--device cuda --budget 270" in answers and "--quick" not in answers
    (trained,) = [call for call in calls if call.startswith("bench/train.py")]
    assert "--device cuda --budget 160" in trained and "--small" not in trained
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "attn-backward.json",
        "attn-forward.json",
        "gpu.log",
        "kv.json",
        "train.json",
        "tune.json",
        "two-pass.json",
    ]
    assert len(names) < 8  # and ncu.csv, where there is ncu: few enough to copy by hand
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    assert answer.stdout.count("TABLE") == 5
    assert re.search(r"parity +rc 0 +\d+ s", (out / "gpu.log").read_text())


def test_a_dry_run_is_small_and_on_the_cpu(script):
    answer, _, calls = script("--dry-run")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for call in calls:
        if call.startswith("bench/attn.py"):
            assert "--device cpu --size tiny --quick" in call
        if call.startswith("bench/kv.py"):
            assert "--device cpu --size tiny --quick --tokens 1 --tokens 8" in call
        if call.startswith("bench/two_pass.py"):
            assert "--device cpu --model small --quick" in call
        if call.startswith("bench/train.py"):
            assert "--device cpu --small" in call
        if call.startswith("-m pytest"):
            assert "-m not gpu and not slow" in call
        if call.startswith("bench/tune.py"):
            assert "--dry-run" in call
        if call.startswith(("bench/sanitize.py", "bench/profile_kernels.py")):
            assert "--backend sdpa" in call
    assert "pip install --no-build-isolation --no-deps -e ." in answer.stdout
    assert not any("pip" in call for call in calls)
    played = {call.split()[0] for call in calls if call.startswith("bench/")}
    assert {
        "bench/kv.py",
        "bench/two_pass.py",
        "bench/train.py",
        "bench/sanitize.py",
        "bench/tune.py",
        "bench/profile_kernels.py",
    } <= played


def test_the_tools_of_a_gpu_machine_are_used_where_they_are(script, tools):
    answer, out, calls = script(PATH=tools)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    checks = [call for call in calls if call.startswith("compute-sanitizer")]
    assert [call.split()[2] for call in checks] == ["memcheck", "racecheck", "synccheck"]
    assert all("--error-exitcode 9" in call and "bench/sanitize.py" in call for call in checks)
    assert "--head-dim" not in checks[0] and "--head-dim 128" in checks[1]
    (profile,) = [call for call in calls if call.startswith("ncu")]
    assert "--clock-control none" in profile and "--profile-from-start off" in profile
    assert "sm__inst_executed_pipe_tensor" in profile and "bench/profile_kernels.py" in profile
    names = sorted(path.name for path in out.iterdir())
    assert "ncu.csv" in names and len(names) <= 8


def test_tools_that_are_not_there_are_no_failure(script, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("bash", "env", "dirname", "sed", "timeout", "tee", "cat", "mkdir", "rm", "ls", "sleep",
                 "grep", "tail", "touch", "nvidia-smi", "nvcc"):  # fmt: skip
        found = shutil.which(name)
        (tmp_path / "bin" / name).symlink_to(found or shutil.which("true"))
    answer, out, _ = script(PATH=str(tmp_path / "bin"))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "skipped: compute-sanitizer is not on this machine" in answer.stdout
    assert "skipped: Nsight Compute (ncu) is not on this machine" in answer.stdout
    assert not (out / "ncu.csv").exists()


def test_a_memory_error_fails_its_step_and_the_other_checks_go_on(script, tools):
    answer, out, calls = script("--only", "sanitizer", PATH=tools, MEMORY_RC="9")
    assert answer.returncode == 1 and "memcheck: rc 9" in answer.stdout
    assert re.search(r"sanitizer +rc 1 ", (out / "gpu.log").read_text())
    assert sum(call.startswith("compute-sanitizer") for call in calls) == 3


def test_a_race_check_that_takes_too_long_is_said_and_no_failure(script, tools):
    answer, _, calls = script("--only", "sanitizer", PATH=tools, RACES_TAKE="30", VOCO_LIMIT="20")
    assert answer.returncode == 0, answer.stdout
    assert re.search(r"racecheck: not finished in \d+ s", answer.stdout)
    assert "synccheck: rc 0" in answer.stdout


def test_early_steps_leave_time_to_later_ones(script):
    plan = (ROOT / "bench" / "gpu.sh").read_text()
    seconds = {name: (int(most), int(kept)) for name, most, kept in PLAN.findall(plan)}
    assert list(seconds) == STEPS and sum(kept for _, kept in seconds.values()) < 560
    answer, _, _ = script(VOCO_LIMIT="560")
    given = dict(re.findall(r"^==> (\w+) \(at most (\d+) s", answer.stdout, re.M))
    kept_behind = sum(kept for _, kept in seconds.values()) - sum(
        seconds[name][1] for name in ("environment", "build")
    )
    assert 560 - kept_behind - 10 <= int(given["build"]) <= 560 - kept_behind < seconds["build"][0]
    assert int(given["environment"]) == seconds["environment"][0]
    assert int(given["ncu"]) == seconds["ncu"][0]


def test_a_failed_step_fails_the_script_and_the_others_go_on(script):
    answer, out, calls = script(TESTS_RC="1")
    assert answer.returncode == 1 and "A STEP FAILED" in answer.stdout
    assert re.search(r"parity +rc 1 ", (out / "gpu.log").read_text())
    assert sum(call.startswith("bench/attn.py") for call in calls) == 2


@pytest.mark.parametrize("step, bench", [("forward", "bench/attn.py"), ("tune", "bench/tune.py")])
def test_a_lost_device_is_resumed(script, step, bench):
    answer, _, calls = script("--only", step, ATTN_RC="3")
    assert answer.returncode == 0
    benches = [call for call in calls if call.startswith(bench)]
    assert ["--resume" in call for call in benches] == [False, True]


def test_a_step_that_hangs_is_ended_and_the_rest_still_runs(script):
    answer, out, calls = script("--only", "parity", TESTS_TAKE="30", VOCO_LIMIT="5")
    assert answer.returncode == 1
    assert re.search(r"parity +rc 124 ", (out / "gpu.log").read_text())


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
    assert '"type": "cpu"' in (out / "gpu.log").read_text()
