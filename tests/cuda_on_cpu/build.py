"""Cached compilation of .cu files with g++, using the emulation of CUDA in this folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_on_cpu"
INCLUDES = (HERE, ROOT / "csrc")
FLAGS = (
    "-x",
    "c++",  # otherwise a .cu file is taken for a linker script
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",  # otherwise two libraries in a process would share the emulation's state
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-DVOCO_CUDA_ON_CPU",
)


def why_not() -> str | None:
    """The reason why this machine can't run the emulation, or None."""
    if shutil.which("g++") is None:
        return "needs g++, which is not on the PATH"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    return None


def compile_for_cpu(
    sources: list[Path],
    output_name: str,
    defines: tuple[str, ...] = (),
    python_module: bool = False,
) -> Path:
    """Build a shared library from ``sources`` if one of them, a header or a flag has changed.

    ``defines`` are names or ``NAME=value``. A python_module is compiled with the headers of pybind11 and
    Python, and ``output_name`` is its name in PYBIND11_MODULE. Raises RuntimeError with g++'s output.
    """
    includes, suffix = list(INCLUDES), ".so"
    if python_module:
        import pybind11

        includes += [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
    command = ["g++", *FLAGS, *(f"-I{folder}" for folder in includes)]
    command += [f"-D{define}" for define in defines]

    library = (
        CACHE / fingerprint([*command, *map(str, sources)], sources) / f"{output_name}{suffix}"
    )
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        # The first of several test processes compiles; the others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=library.parent) as unfinished:
                objects = [Path(unfinished) / f"{source.name}.o" for source in sources]
                # Use all cores, since the waiting processes leave theirs idle.
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    compilations = [
                        pool.submit(_run, [*command, "-c", source, "-o", target])
                        for source, target in zip(sources, objects, strict=True)
                    ]
                for compilation in compilations:
                    compilation.result()
                linked = Path(unfinished) / library.name
                _run(["g++", "-shared", *objects, "-o", linked])
                os.replace(linked, library)
    return library


def _run(command: list[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")


def fingerprint(command: list[str], sources: list[Path]) -> str:
    """A hash of the command, the compiler and every file that can be part of the library."""
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256("\0".join([*command, version.stdout]).encode())
    headers = [
        path for folder in INCLUDES for path in folder.rglob("*") if path.suffix in {".h", ".cuh"}
    ]
    for path in sorted({*headers, *map(Path, sources)}):
        digest.update(f"{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:20]
