#!/usr/bin/env bash
# Everything that needs a GPU, in one command and within ten minutes, most valuable first.
#
#   OUT=folder bash bench/gpu.sh          on a machine with a GPU; needs no network and no installation
#   bash bench/gpu.sh --dry-run           the same steps, small, on a CPU, as in CI
#   bash bench/gpu.sh --only parity       one step: environment, build, parity, sanitizer, forward, backward,
#                                         kv, two_pass, train, tune or ncu
#
# Results are written to OUT (by default a temporary folder, named at the end) as they are measured: a run that
# is cut off loses little. The commit is taken from VOCO_COMMIT, or git, or a file COMMIT. PYTHON names the
# interpreter (python3), VOCO_LIMIT the seconds for everything (560).
set -uo pipefail
cd "$(dirname "$0")/.."

# The steps, the seconds that each may take, and those reserved for it: earlier steps leave them.
plan=(
    "environment 40 20"
    "build 150 60"
    "parity 200 90"
    "sanitizer 75 35"
    "forward 230 90"
    "backward 300 100"
    "kv 110 40"
    "two_pass 300 40"
    "train 200 10"
    "tune 200 25"
    "ncu 60 30"
)
steps=("${plan[@]%% *}")

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
import json, os, torch
from bench.harness import clock, machine

device = torch.device("cpu" if os.environ.get("VOCO_DRY_RUN") else "cuda")
on_gpu = device.type == "cuda"
record = machine.environment(device)
dtype, effort = (torch.bfloat16, clock.FULL) if on_gpu else (torch.float32, clock.QUICK)
record["ceilings"] = machine.ceilings(device, dtype, effort[device.type])
print(json.dumps(record, indent=1))
PY
}

build() {
    local command=("$PYTHON" -m pip install --no-build-isolation --no-deps -e .)
    if [ ! -d csrc ]; then
        echo "nothing to build: there is no csrc/"
        return
    fi
    if [ -n "$dry_run" ]; then
        echo "not built: a rehearsal uses what is installed. On a GPU machine: ${command[*]}"
        echo "of these kernels:" csrc/*.cu
    else
        "${command[@]}" || return
    fi
    "$PYTHON" -c '
import voco_kernels

for name, reasons in voco_kernels.backends().items():
    print(f"backend {name}:", "; ".join(reasons) or "can run here")
'
}

# The tests that need a GPU, on eight processes where pytest-xdist is installed. Without a GPU they would all be
# skipped: a rehearsal runs a few that run anywhere.
parity() {
    local chosen=(-m gpu tests)
    if [ -n "$dry_run" ]; then
        chosen=(-m "not gpu and not slow" tests/bench/test_shapes.py)
    elif "$PYTHON" -c 'import xdist' 2>/dev/null; then
        chosen+=(-n 8)
    fi
    "$PYTHON" -m pytest -q -p no:cacheprovider "${chosen[@]}"
}

# Memory first, with every head_dim; then races and barriers with one, if there is time: they are slow, and not to
# finish them is no failure.
sanitizer() {
    local finish=$((SECONDS + STEP_SECONDS - 5)) failed=0 tool share rc
    if [ -n "$dry_run" ]; then
        "$PYTHON" bench/sanitize.py --backend sdpa
        return
    fi
    if ! command -v compute-sanitizer >/dev/null; then
        echo "skipped: compute-sanitizer is not on this machine"
        return
    fi
    # Every tensor gets its own allocation: inside torch's pool an access out of bounds would not show.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    "$PYTHON" bench/sanitize.py || return # compiles what is compiled at the first call
    for tool in memcheck racecheck synccheck; do
        share=$((finish - SECONDS))
        local arguments=()
        if [ "$tool" != memcheck ]; then
            arguments=(--head-dim 128)
        fi
        [ "$tool" != racecheck ] || share=$((share * 2 / 3))
        if [ "$share" -lt 5 ]; then
            echo "$tool: skipped, no time was left"
            [ "$tool" != memcheck ] || failed=1
            continue
        fi
        timeout --kill-after=2 "$share" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" bench/sanitize.py "${arguments[@]}"
        rc=$?
        if [ "$rc" -eq 124 ] || [ "$rc" -eq 137 ]; then
            echo "$tool: not finished in $share s"
            [ "$tool" != memcheck ] || failed=1
        else
            echo "$tool: rc $rc"
            [ "$rc" -eq 0 ] || failed=1
        fi
    done
    return "$failed"
}

# resuming SCRIPT OUT ARGUMENTS...: a kernel that breaks the CUDA context ends the process with status 3; the rest
# runs in another one.
resuming() {
    local script=$1 out=$2 finish=$((SECONDS + STEP_SECONDS - 25)) rc=3 resume=()
    shift 2
    while [ "$rc" -eq 3 ] && [ "$SECONDS" -lt "$finish" ]; do
        "$PYTHON" "$script" "$@" --out "$out" --budget $((finish - SECONDS)) "${resume[@]}"
        rc=$?
        resume=(--resume)
    done
    return "$rc"
}

# attn DIRECTION ARGUMENTS...
attn() {
    local out=$OUT/attn-$1.json rival
    shift
    if [ -n "$dry_run" ]; then
        set -- --device cpu --size tiny --quick --heads 4/2 --shape A --shape F --shape G "$@"
        for rival in sdpa-two-call sdpa-two-call-parts sdpa-causal sdpa-dense; do
            set -- --rival "$rival" "$@"
        done
    else
        set -- --device cuda "$@"
    fi
    resuming bench/attn.py "$out" "$@"
}

forward() { attn forward --direction forward; }
backward() { attn backward --direction forward+backward --no-layouts; }

# A case that has started when the budget is spent is finished; what was timed before is in the record.
kv() {
    if [ -n "$dry_run" ]; then
        set -- --device cpu --size tiny --quick --tokens 1 --tokens 8
    else
        set -- --device cuda --budget $((STEP_SECONDS > 40 ? STEP_SECONDS - 20 : STEP_SECONDS / 2))
    fi
    "$PYTHON" bench/kv.py --out "$OUT/kv.json" "$@"
}

# The most important models first, as many as there is time for.
two_pass() {
    if [ -n "$dry_run" ]; then
        set -- --device cpu --model small --quick --num-voco 1 --batch 1 --no-streams
    else
        set -- --device cuda --budget $((STEP_SECONDS > 70 ? STEP_SECONDS - 30 : STEP_SECONDS / 2))
    fi
    "$PYTHON" bench/two_pass.py --out "$OUT/two-pass.json" "$@"
}

# A method that is started before the budget is spent gets at least a step; the rest is recorded as skipped.
train() {
    if [ -n "$dry_run" ]; then
        set -- --device cpu --small --steps 2
    elif [ "$STEP_SECONDS" -lt 45 ]; then
        echo "skipped: no time was left; bash bench/gpu.sh --only train has it all"
        return
    else
        set -- --device cuda --budget $((STEP_SECONDS > 70 ? STEP_SECONDS - 40 : STEP_SECONDS / 2))
    fi
    "$PYTHON" bench/train.py --out "$OUT/train.json" "$@"
}

# Nothing is written into the package here: python bench/tune.py --from tune.json --write does that, on the
# machine where the package is developed.
tune() { resuming bench/tune.py "$OUT/tune.json" ${dry_run:+--dry-run}; }

ncu() {
    if [ -n "$dry_run" ]; then
        "$PYTHON" bench/profile_kernels.py --backend sdpa
        return
    fi
    if ! type -P ncu >/dev/null; then
        echo "skipped: Nsight Compute (ncu) is not on this machine"
        return
    fi
    # Names differ between chips (wgmma is "gmma" on Hopper): a pattern takes what this one has.
    local metrics=gpu__time_duration.sum,launch__registers_per_thread
    metrics+=,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active
    metrics+=',regex:sm__inst_executed_pipe_tensor_op_.*\.avg\.pct_of_peak_sustained_active$'
    # The clocks stay as they are: the machine may be shared.
    command ncu --clock-control none --profile-from-start off \
        --section SpeedOfLight --section LaunchStats --section Occupancy --metrics "$metrics" \
        --csv --page raw --log-file "$OUT/ncu.csv" "$PYTHON" bench/profile_kernels.py
}

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

# step NAME SECONDS RESERVED: run it within its own time and what is left of the whole but for what is reserved for
# others, and remember how it went.
step() {
    local name=$1 allowed=$2 started=$SECONDS left=$((limit - SECONDS - $3)) rc=124
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
}

for index in "${!plan[@]}"; do
    read -r name most _ <<<"${plan[index]}"
    if [ -n "$only" ]; then
        [ "$only" != "$name" ] || step "$name" "$most" 0
        continue
    fi
    reserved=0
    for later in "${plan[@]:index+1}"; do
        reserved=$((reserved + ${later##* }))
    done
    step "$name" "$most" $((reserved * limit / 560))
done

# Few and small files (eight at most), so that they are easily copied; bench/report.py draws the plots again.
rm -f "$OUT"/*.part "$OUT"/*.png
for record in "$OUT"/attn-*.json "$OUT/kv.json" "$OUT/two-pass.json" "$OUT/train.json"; do
    [ -e "$record" ] && "$PYTHON" bench/report.py --show "$record"
done
printf '\n%s\n' "results in $OUT:"
ls -l "$OUT"
say "$(printf '\n%s' "${summary[@]}" "wall ${SECONDS} s of ${limit} s")"
[ "$failed" -eq 0 ] && echo "all steps passed" || echo "A STEP FAILED"
exit "$failed"
