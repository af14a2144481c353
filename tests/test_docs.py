"""The pages of docs/ and the README: their Python runs, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from release import docs_site
from voco_model.demo import load_photograph

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"(?:<!-- not run: (.+?) -->\n+)?```python\n(.*?)```", re.S)


def blocks(page: Path) -> list[str]:
    """The page's Python, but what is marked as not run."""
    return [code for reason, code in BLOCK.findall(page.read_text()) if not reason]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.stem)
def test_a_pages_python_runs_as_one_program(page, tmp_path, monkeypatch):
    """In the page's order and with one set of names, in a folder that holds photo.jpg."""
    load_photograph(None).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for number, code in enumerate(blocks(page), start=1):
        exec(compile(code, f"{page.name}, python block {number}", "exec"), names)


def test_every_link_leads_somewhere(tmp_path):
    docs_site.stage(tmp_path)
    assert (tmp_path / "README.md").exists() and (tmp_path / "reference/voco_model.md").exists()
