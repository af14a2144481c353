#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command and inside ten minutes, most valuable first.
#
#   OUT=folder bash bench/gpu.sh          on a machine with a GPU; needs no network and no installation
#   bash bench/gpu.sh --dry-run           the same steps, small, on a CPU: a rehearsal, as in CI
#   bash bench/gpu.sh --only parity       one step: environment, build, parity, forward or backward
#
# What it finds goes to OUT (by default a temporary folder, named at the end) as it comes: a run that is cut
# off loses little. The commit is taken from VOCO_COMMIT, or git, or a file COMMIT. PYTHON names the
# interpreter (python3), VOCO_LIMIT the seconds for everything (560).
set -uo pipefail
cd "$(dirname "$0")/.."

steps=(environment build parity forward backward)
dry_run=${VOCO_DRY_RUN:-}
only=
inside=
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry_run=1 ;;
        --only) only=${2:-none}; shift; [ $# -gt 0 ] || set -- '' ;;
        --inside) inside=${2:-none}; shift ;; # how this script starts each of its steps
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "expected --dry-run, --only STEP or --help, got '$1'" >&2; exit 2 ;;
    esac
    shift
done
if [ -n "$only" ] && [[ " ${steps[*]} " != *" $only "* ]]; then
    echo "expected --only with one of: ${steps[*]}; got '$only'" >&2
    exit 2
fi

PYTHON=${PYTHON:-python3}

# ---- the steps; each runs in a process of its own with OUT and STEP_SECONDS set

environment() {
    if [ -z "$dry_run" ]; then
        nvidia-smi
        nvcc --version
    fi
    "$PYTHON" - <<'PY'
import json, os, pathlib, torch
from bench import timing

on_gpu = not os.environ.get("VOCO_DRY_RUN")
record = timing.environment(torch.device("cuda" if on_gpu else "cpu"))
text = json.dumps(record, indent=1)
pathlib.Path(os.environ["OUT"], "environment.json").write_text(text + "\n")
print(text)
PY
}

build() {
    if [ ! -d csrc ]; then
        echo "nothing to build: there is no csrc/"
    elif [ -n "$dry_run" ]; then
        echo "not built again: a rehearsal uses what is installed"
    else
        "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
    fi
}

# The tests that need a GPU, on eight processes where pytest-xdist is installed. Without a GPU they would all be
# skipped: a rehearsal runs a few that run anywhere.
parity() {
    local chosen=(-m gpu tests)
    if [ -n "$dry_run" ]; then
        chosen=(-m "not gpu and not slow" tests/bench/test_bench_shapes.py)
    elif "$PYTHON" -c 'import xdist' 2>/dev/null; then
        chosen+=(-n 8)
    fi
    "$PYTHON" -m pytest -q -p no:cacheprovider "${chosen[@]}" 2>&1 | tee "$OUT/parity.log"
}

# attn DIRECTION ARGUMENTS...: a kernel that breaks the CUDA context ends the process with status 3; the rest
# goes on behind it.
attn() {
    local direction=$1 finish=$((SECONDS + STEP_SECONDS - 25)) rc=3 resume=()
    local out=$OUT/attn-$direction.json
    shift
    if [ -n "$dry_run" ]; then
        set -- --device cpu --size tiny --quick --heads 4/2 --shape A --shape F --shape G "$@"
        for rival in sdpa-two-call sdpa-two-call-parts sdpa-causal sdpa-dense; do
            set -- --rival "$rival" "$@"
        done
    else
        set -- --device cuda "$@"
    fi
    while [ "$rc" -eq 3 ] && [ "$SECONDS" -lt "$finish" ]; do
        "$PYTHON" bench/attn.py "$@" --out "$out" --budget $((finish - SECONDS)) "${resume[@]}"
        rc=$?
        resume=(--resume)
    done
    return "$rc"
}

forward() { attn forward --direction forward; }
backward() { attn backward --direction forward+backward --no-layouts; }

if [ -n "$inside" ]; then
    "$inside"
    exit
fi

# ---- what runs them

limit=${VOCO_LIMIT:-560}
OUT=${OUT:-$(mktemp -d)}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
export OUT PYTHON PYTHONUNBUFFERED=1 VOCO_DRY_RUN=$dry_run
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
: >"$OUT/gpu.log"
summary=()
failed=0

say() { printf '%s\n' "$*" | tee -a "$OUT/gpu.log"; }

# step NAME SECONDS: run it within its own time and what is left of the whole, and remember how it went.
step() {
    local name=$1 allowed=$2 started=$SECONDS left=$((limit - SECONDS)) rc=124
    if [ -n "$only" ] && [ "$only" != "$name" ]; then
        return
    fi
    [ "$left" -ge "$allowed" ] || allowed=$left
    say "==> $name (at most $allowed s)"
    if [ "$allowed" -ge 5 ]; then
        STEP_SECONDS=$allowed timeout --kill-after=5 "$allowed" bash bench/gpu.sh --inside "$name" 2>&1 |
            tee -a "$OUT/gpu.log"
        rc=${PIPESTATUS[0]}
    fi
    [ "$rc" -eq 0 ] || failed=1
    summary+=("$(printf '%-12s rc %-4d %4d s' "$name" "$rc" $((SECONDS - started)))")
    say "==> ${summary[-1]}"
    printf '%s\n' "${summary[@]}" "wall ${SECONDS} s of ${limit} s" >"$OUT/summary.txt"
}

step environment 40
step build 150
step parity 200
step forward 230
step backward 300

rm -f "$OUT"/*.part
for record in "$OUT"/attn-*.json; do
    [ -e "$record" ] && "$PYTHON" bench/report.py --show "$record"
done
printf '\n%s\n' "results in $OUT:"
ls -l "$OUT"
printf '\n%s\n' "$(cat "$OUT/summary.txt")"
[ "$failed" -eq 0 ] && echo "all steps passed" || echo "A STEP FAILED"
exit "$failed"
