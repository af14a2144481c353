"""What a release is made of: the folder for the kernels hub, versions and addresses that agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from release import hub_kernel

ROOT = Path(__file__).parents[1]


def test_the_hub_folder_is_a_package_of_its_own(tmp_path):
    """Loaded as the hub does, under another name and without an installed voco_kernels."""
    hub_kernel.write(tmp_path)
    variants = sorted(path.name for path in (tmp_path / "build").iterdir())
    assert variants == ["torch-cpu", "torch-cuda"]
    for variant in variants:
        metadata = json.loads((tmp_path / "build" / variant / "metadata.json").read_text())
        assert (
            metadata["name"] == "voco-kernels" and variant == f"torch-{metadata['backend']['type']}"
        )
    code = f"""
import importlib.util, sys
sys.modules["voco_kernels"] = None
path = {str(tmp_path / "build/torch-cpu/__init__.py")!r}
spec = importlib.util.spec_from_file_location("kernel_from_the_hub", path)
vk = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = vk
spec.loader.exec_module(vk)
import torch
layout = vk.MaskLayout.from_lengths(3, 1, 2)
assert vk.masked_attention(*torch.randn(3, 1, 1, 6, 16), layout).isfinite().all()
assert "not built" in vk.backends()["cuda_sm90"][0]
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_pre_commit_has_the_pinned_versions():
    pinned = dict(
        re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements/dev.txt").read_text(), re.M)
    )
    hooks = dict(
        re.findall(r"/([\w-]+)\n    rev: v([\w.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    )
    expected = {"ruff-pre-commit": "ruff", "mirrors-clang-format": "clang-format"}
    assert hooks == {hook: pinned[package] for hook, package in expected.items()}


def test_citation_and_project_have_one_version():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
