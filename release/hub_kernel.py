"""Write ``voco_kernels`` in the layout of the Hugging Face kernels hub: the part that needs no compiler.

    python release/hub_kernel.py build/hub         # or: make hub

writes ``build/hub/build/torch-cuda`` and ``torch-cpu``. ``kernels.get_local_kernel(Path("build/hub"))``
loads a module with the public names of ``voco_kernels`` from them; uploaded to the hub,
``kernels.get_kernel(...)`` does. The CUDA extension for Hopper is not part of it; the Triton backend
serves GPUs.

The hub gives each version of a kernel its own module name, so that two versions can be loaded side by
side and beside an installed package. Two things would tie them together, and are rewritten here:
absolute imports become relative, and operators are registered under a namespace that is derived from
the sources.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "voco_kernels"
BACKENDS = ("cuda", "cpu")
# The part of the hub's version that users name; it goes up when a release breaks callers.
VERSION = 1

_IMPORT = re.compile(rf"^(\s*)from {PACKAGE}(\.[\w.]+)? import ", re.M)


def sources() -> list[Path]:
    """The package's Python files, as paths from its folder."""
    folder = ROOT / PACKAGE
    return sorted(path.relative_to(folder) for path in folder.rglob("*.py"))


def digest() -> str:
    """Twelve hexadecimal digits that change with any source file."""
    hashed = hashlib.sha256()
    for path in sources():
        content = (ROOT / PACKAGE / path).read_bytes()
        hashed.update(f"{path.as_posix()} {len(content)}\n".encode() + content)
    return hashed.hexdigest()[:12]


def rewritten(path: Path, namespace: str) -> str:
    """One source file with relative imports, and with its operators in ``namespace``."""
    text = (ROOT / PACKAGE / path).read_text()
    dots = "." * len(path.parts)
    text = _IMPORT.sub(lambda found: f"{found[1]}from {dots}{(found[2] or '')[1:]} import ", text)
    absolute = re.search(rf"^\s*(?:import|from) {PACKAGE}\b.*", text, re.M)
    if absolute:
        raise SystemExit(
            f"{path}: expected 'from {PACKAGE}... import ...' on one line, got {absolute.group()!r}"
        )
    if f'import_module(f"{PACKAGE}' in text or f'import_module("{PACKAGE}' in text:
        raise SystemExit(f"{path}: expected import_module with __package__, got the name {PACKAGE}")
    return text.replace(f'"{PACKAGE}::', f'"{namespace}::')


def write(folder: Path) -> None:
    """Write all variants under ``folder``, in place of what an earlier run wrote there."""
    identity = digest()
    namespace = f"{PACKAGE}_{identity}"
    shutil.rmtree(folder / "build", ignore_errors=True)
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        for path in sources():
            target = variant / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(rewritten(path, namespace))
        metadata = {
            "id": f"_{namespace}_{backend}",
            "name": PACKAGE.replace("_", "-"),
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write, e.g. build/hub")
    folder = parser.parse_args(arguments).folder
    write(folder)
    print(f"wrote {', '.join(f'torch-{backend}' for backend in BACKENDS)} under {folder / 'build'}")


if __name__ == "__main__":
    main(sys.argv[1:])
