"""The rules of CONTRIBUTING.md that a machine can keep, and the promises of the README."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from voco_kernels.attention.dispatch import BACKENDS

ROOT = Path(__file__).parents[1]
FOLDERS = ("voco_kernels", "voco_model", "bench", "tests", "docs", "csrc", "requirements", ".ci")
BACKEND_FOLDER = ROOT / "voco_kernels" / "attention" / "backends"


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all that a file imports, anywhere in it; ``a.b`` for ``from a import b``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the house writes them in full"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def python_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)


@pytest.mark.parametrize("path", sources("voco_kernels"), ids=lambda path: path.name)
def test_kernels_know_nothing_of_models(path):
    packages = {name.split(".")[0] for name in imported_modules(path)}
    assert not packages & {"voco_model", "transformers", "bench", "tests"}


@pytest.mark.parametrize("path", sources("voco_model"), ids=lambda path: path.name)
def test_models_import_no_bench_and_no_tests(path):
    packages = {name.split(".")[0] for name in imported_modules(path)}
    assert not packages & {"bench", "tests"}


def test_the_kernels_need_neither_transformers_nor_triton():
    """Both blocked, as on a machine that lacks them: torch alone serves a call on the CPU."""
    code = """
import sys
sys.modules.update(transformers=None, triton=None, flash_attn=None)
import torch, voco_kernels as vk
layout = vk.MaskLayout.from_lengths(3, 1, 2)
out = vk.masked_attention(*torch.randn(3, 1, 1, 6, 16), layout)
assert out.isfinite().all() and vk.backends()["triton"] and vk.backends()["flash_attn"]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_backend_imports_another(name):
    folder, module = BACKEND_FOLDER / name, BACKEND_FOLDER / f"{name}.py"
    prefix = "voco_kernels.attention.backends."
    siblings = {
        imported.removeprefix(prefix).split(".")[0]
        for path in (sorted(folder.glob("*.py")) if folder.is_dir() else [module])
        for imported in imported_modules(path)
        if imported.startswith(prefix)
    }
    assert siblings <= {name}


def modules_on_the_map(folder: str) -> set[str]:
    """Paths of the modules under ``folder`` in CONTRIBUTING's map, whose indentation is the tree."""
    chapter = re.search(
        rf"^{folder}/.*?(?=^\w)", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S
    )
    shown, folders = set(), []
    for line in chapter.group().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        words = re.match(r"\s*((?:[\w.]+\.py ?|\w+/)+)", line)
        if words is None:
            continue
        if words.group(1).endswith("/"):
            folders = [*folders[:depth], words.group(1)]
        else:
            prefix = "".join(folders[:depth])
            shown.update(prefix + name for name in words.group(1).split())
    return shown


@pytest.mark.parametrize("folder", ["voco_kernels", "voco_model"])
def test_the_map_shows_every_module_and_no_other(folder):
    """A folder may be a line of its own, without its modules; if it shows one, it shows all."""
    shown = modules_on_the_map(folder)
    opened = {str(Path(path).parent) for path in shown}
    there = {
        str(path.relative_to(ROOT))
        for path in sources(folder)
        if path.name not in ("__init__.py", "__main__.py")
        and str(path.parent.relative_to(ROOT)) in opened
    }
    assert folder in opened and shown == there


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_and_path_exists(document):
    text = (ROOT / document).read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"^make ([a-z]+)", text, re.M) + re.findall(r"`make ([a-z]+)", text))
    assert named and named <= targets
    links = re.findall(r"(?:\]\(|src=\")(?!https?:)([^)\"#]+)", text)
    commands = re.findall(r"(?:bash|python) ([\w./]+\.(?:sh|py)|\.ci/run)", text)
    assert links + commands
    assert [path for path in links + commands if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("number, block", list(enumerate(python_blocks("README.md"), start=1)))
def test_readme_blocks_run(number, block, tmp_path, monkeypatch):
    """As printed, but that a checkpoint's name gives the demo's small model and processor."""
    demo = pytest.importorskip("voco_model.demo") if "from_pretrained" in block else None
    if demo is not None:
        import transformers

        from voco_model import small

        processor = small.build_processor()
        model = small.build_model(processor)
        stand_in = {"LlavaForConditionalGeneration": model, "LlavaProcessor": processor}
        for name, value in stand_in.items():
            monkeypatch.setattr(
                getattr(transformers, name), "from_pretrained", lambda *_, value=value, **__: value
            )
        demo.load_photograph(None).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, f"README.md, python block {number}", "exec"), {"__name__": "readme"})


def test_versions_and_extras_agree():
    from voco_kernels import __version__

    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"', project, re.M).group(1) == __version__
    extras = re.search(r"\[project.optional-dependencies\](.*?)\n\[", project, re.S).group(1)
    assert {"train", "bench", "dev", "flash-attn"} <= set(re.findall(r"^([a-z-]+) =", extras, re.M))


def test_nothing_names_one_machine():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.glob("*") if path.is_file()]
    text = {".py", ".md", ".sh", ".toml", ".txt", ".json", ".cu", ".cuh", ".cpp", ".h", ""}
    mine = re.compile(r"(?<![\w.~*])/(?:work|root|home|farm|Users)/\w")
    named = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files
        if path.suffix in text and "__pycache__" not in path.parts and path != Path(__file__)
        for match in mine.finditer(path.read_text())
    ]
    assert not named
