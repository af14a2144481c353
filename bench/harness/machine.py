"""The machine and the code that figures depend on: device, versions, commit, date, and the device's own
ceilings."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.harness.clock import Effort, measure
from bench.harness.guard import first_line

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("voco_kernels", "csrc")
"""Folders whose code is timed, unless a benchmark names others."""


def environment(device: torch.device, sources: Sequence[str] = SOURCES) -> dict:
    """What figures depend on. Holds no names of machines, users or folders.

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
            "triton": package_version("triton"),
            "transformers": package_version("transformers"),
            "flash-attn": package_version("flash-attn"),
            "flash-attn-3": package_version("flash-attn-3"),
            "flash-attn-4": package_version("flash-attn-4"),
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
    """The processor's model name; the architecture where the system does not say."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().split("\n"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(root: Path = ROOT) -> str:
    """The commit that is measured: of ``VOCO_COMMIT``, else of git, else of a file ``COMMIT``.

    A copy of the tree without ``.git`` gives it by the variable or by the file. ``-dirty`` marks changed
    files under git; ``unknown`` is the last resort, and ``sources_sha256`` beside it still distinguishes
    versions.
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
