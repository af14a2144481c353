"""Install each wheel into a fresh environment without a compiler or this checkout, and try it there.

    python release/check_wheels.py dist/*.whl      # or: make wheel

Each environment gets torch as ``requirements/torch.txt`` pins it, the wheel, and the wheel's
dependencies; then ``release/smoke.py`` runs in an empty folder. A wheel with the CUDA extension is
tried with it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def has_extension(wheel: Path) -> bool:
    return any(name.startswith("voco_kernels/_C.") for name in zipfile.ZipFile(wheel).namelist())


def check(wheel: Path) -> None:
    """Install and try one wheel.

    Raises:
        subprocess.CalledProcessError: it can't be installed, or the smoke test failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment, empty = Path(folder) / "environment", Path(folder) / "empty"
        venv.create(environment, with_pip=True)
        empty.mkdir()
        python = environment / "bin" / "python"
        pip = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-compile",
            "--disable-pip-version-check",
        ]
        subprocess.run([*pip, "-r", ROOT / "requirements" / "torch.txt"], check=True)
        subprocess.run([*pip, wheel], check=True)
        shutil.copy(ROOT / "release" / "smoke.py", empty)
        # no compiler and no nvcc on the PATH, and nothing that could lead back to the checkout
        surroundings = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTHON", "CUDA", "CC", "CXX", "VIRTUAL_ENV"))
        }
        surroundings["PATH"] = str(environment / "bin")
        command = [python, "smoke.py", *["--extension"] * has_extension(wheel)]
        subprocess.run(command, cwd=empty, env=surroundings, check=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, nargs="+", help="the wheels to try")
    wheels = parser.parse_args(arguments).wheels
    with ThreadPoolExecutor(len(wheels)) as pool:
        checks = [(wheel, pool.submit(check, wheel.resolve())) for wheel in wheels]
    for wheel, checked in checks:
        checked.result()
        holds = "with" if has_extension(wheel) else "without"
        print(f"{wheel.name}: works, {holds} the CUDA extension")


if __name__ == "__main__":
    main(sys.argv[1:])
