"""Times on CUDA and on the CPU, peak memory, the machine's ceilings, and the record of all that
decides what a figure means: device, versions, commit, date."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("voco_kernels", "csrc")
"""Folders of the code that ``masked_attention`` runs."""

Function = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure one function: until ``seconds`` are spent, within the bounds on
    repeats."""

    seconds: float
    least: int
    most: int


FULL = {"cuda": Effort(0.15, 5, 300), "cpu": Effort(0.6, 3, 50)}
QUICK = {"cuda": Effort(0.04, 5, 50), "cpu": Effort(0.02, 3, 10)}


@dataclass(frozen=True)
class Timing:
    """One measurement, in milliseconds.

    Attributes:
        p20, p50, p80: quantiles over the repeats. On CUDA device time, with a cold L2 and with the
            launches enqueued before the clock starts, so that a slow host does not count.
        repeats: how many calls the quantiles are of.
        host_ms: on CUDA, the host's median time to enqueue one call. Where it exceeds p50, eager
            calls in a row run at the host's speed.
        graph_p50: on CUDA, the median of replays of a captured graph, where it was asked for.
        graph_reason: why there is no graph_p50, if it was asked for.
    """

    p20: float
    p50: float
    p80: float
    repeats: int
    host_ms: float | None = None
    graph_p50: float | None = None
    graph_reason: str | None = None

    def to_json(self) -> dict:
        return asdict(self)


def measure(
    function: Function, device: torch.device, effort: Effort, graph: bool = False
) -> Timing:
    """Time ``function``, which must have run once already (compilation is not ours to measure)."""
    if device.type == "cpu":
        return _measure_cpu(function, effort)
    flush = Flush(device)
    times, host_ms = _measure_cuda(function, effort, flush)
    if not graph:
        return Timing(*quantiles(times), len(times), host_ms)
    try:
        captured = capture(function)
    except RuntimeError as error:
        reason = first_line(error)
        return Timing(*quantiles(times), len(times), host_ms, graph_reason=reason)
    replays, _ = _measure_cuda(captured.replay, effort, flush)
    return Timing(*quantiles(times), len(times), host_ms, statistics.median(replays))


class Flush:
    """Writes a buffer of at least twice the L2, which evicts what the last call left there."""

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(max(2 * l2_bytes, 128 << 20), dtype=torch.int8, device=device)
        self()
        start, end = _events()
        start.record()
        for _ in range(4):
            self()
        end.record()
        torch.cuda.synchronize()
        self.milliseconds = max(start.elapsed_time(end) / 4, 1e-3)

    def __call__(self) -> None:
        self.buffer.zero_()

    def repeats_covering(self, host_ms: float) -> int:
        """Flushes to enqueue so that the device is busy while the host enqueues a call."""
        return min(max(1, math.ceil(1.5 * host_ms / self.milliseconds)), 200)


def _measure_cuda(function: Function, effort: Effort, flush: Flush) -> tuple[list[float], float]:
    host, device = [], []
    for _ in range(3):
        start, end = _events()
        torch.cuda.synchronize()
        started = time.perf_counter()
        start.record()
        function()
        end.record()
        host.append(1e3 * (time.perf_counter() - started))
        torch.cuda.synchronize()
        device.append(start.elapsed_time(end))
        if device[-1] > 1e3 * effort.seconds:
            break
    host_ms = statistics.median(host)
    flushes = flush.repeats_covering(host_ms)
    one_call = min(device) + flushes * flush.milliseconds
    repeats = min(max(effort.least, int(1e3 * effort.seconds / one_call)), effort.most)
    pairs = [_events() for _ in range(repeats)]
    for start, end in pairs:
        for _ in range(flushes):
            flush()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs], host_ms


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def capture(function: Function) -> torch.cuda.CUDAGraph:
    """``function`` as a CUDA graph, run and replayed once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        function()
    captured.replay()
    return captured


def _measure_cpu(function: Function, effort: Effort) -> Timing:
    times = []
    finish = time.perf_counter() + effort.seconds
    while len(times) < effort.least or (time.perf_counter() < finish and len(times) < effort.most):
        started = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - started))
    return Timing(*quantiles(times), len(times))


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, interpolated between neighbours."""
    ordered = sorted(times)

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return at(0.2), at(0.5), at(0.8)


def peak_extra_bytes(function: Function, device: torch.device) -> int | None:
    """Device memory that one call takes at its peak beyond what stood there; None on the CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def ceilings(device: torch.device, dtype: torch.dtype, effort: Effort) -> dict[str, float]:
    """What this device reaches at best: a large product (TFLOP/s) and a large copy (TB/s, bytes
    read plus bytes written), on random data."""
    side, elements = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 25)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    product = measure(lambda: torch.mm(a, b), device, effort).p50
    source = torch.randint(0, 255, (elements,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    copy = measure(lambda: target.copy_(source), device, effort).p50
    return {
        "matmul_tflops": 2 * side**3 / (product * 1e-3) / 1e12,
        "copy_tb_per_s": 2 * elements / (copy * 1e-3) / 1e12,
    }


def tflops(flops: int, milliseconds: float) -> float:
    """Rate in TFLOP/s of ``flops`` operations in ``milliseconds``."""
    return flops / (milliseconds * 1e-3) / 1e12


def first_line(error: BaseException, limit: int = 300) -> str:
    """An exception as one line: its type, and its message up to ``limit`` characters."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:limit]


def environment(device: torch.device, sources: Sequence[str] = SOURCES) -> dict:
    """All that decides what a figure means. Holds no names of machines, users or folders.

    Args:
        sources: see ``sources_digest``.
    """
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "sources_sha256": sources_digest(sources=sources),
        "device": _device_record(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
            "triton": _version("triton"),
            "transformers": _version("transformers"),
            "flash-attn": _version("flash-attn"),
            "flash-attn-3": _version("flash-attn-3"),
            "flash-attn-4": _version("flash-attn-4"),
        },
        "system": f"{platform.system()} {platform.machine()}",
    }


def _device_record(device: torch.device) -> dict:
    if device.type == "cpu":
        return {
            "type": "cpu",
            "name": _processor(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": _nvidia_smi("driver_version"),
        "sm_clock_mhz_max": _nvidia_smi("clocks.max.sm"),
        "power_limit_w": _nvidia_smi("power.limit"),
    }


def _nvidia_smi(field: str) -> str | None:
    """One field of ``nvidia-smi``, or None where the tool is missing or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"nvidia-smi {field}: {first_line(error)}", file=sys.stderr)
        return None
    lines = answer.stdout.split("\n")
    return lines[0].strip()


def _processor() -> str:
    """The processor's model name; the architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().split("\n"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(root: Path = ROOT) -> str:
    """The commit that is measured: of ``VOCO_COMMIT``, else of git, else of a file ``COMMIT``.

    A copy of the tree without ``.git`` (a machine that is handed files only) says it by the
    variable or by the file. ``-dirty`` marks changed files under git; ``unknown`` is the last
    resort, and ``sources_sha256`` beside it still tells versions apart.
    """
    if os.environ.get("VOCO_COMMIT"):
        return os.environ["VOCO_COMMIT"]
    if (root / ".git").exists():
        try:
            head = _git(root, "rev-parse", "HEAD")
            changed = _git(root, "status", "--porcelain", "--untracked-files=no")
            return f"{head}-dirty" if changed else head
        except (OSError, subprocess.SubprocessError) as error:
            print(f"git: {first_line(error)}", file=sys.stderr)
    if (root / "COMMIT").exists():
        return (root / "COMMIT").read_text().strip()
    return "unknown"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return answer.stdout.strip()


def sources_digest(root: Path = ROOT, sources: Sequence[str] = SOURCES) -> str:
    """SHA-256 over the code that is measured, the folders named by ``sources``, file by file."""
    digest = hashlib.sha256()
    for folder in sources:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".json"):
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
