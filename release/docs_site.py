"""Stage the pages of the documentation site, from which mkdocs builds it (``make docs-site``).

    python release/docs_site.py build/docs-site/pages

Pages keep their places relative to each other, so that their links work on the site as they do in the
repository. Links to files that are not pages (sources, configs, records) become text: they are of use
in a checkout only. The reference has a page for each package, with a section for each name in its
``__all__``.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md")
FILES = ("docs/*.png", "bench/results/*.png", "bench/results/miniature/*.png")
PACKAGES = {
    "voco_kernels": "Tensors and masks; knows nothing of models.",
    "voco_model": "Vision-language models under the mask, stores and the engine.",
}

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def staged(patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def without_dead_ends(text: str, page: Path, kept: set[Path]) -> str:
    """``text`` with links to what is not staged replaced by their words.

    Raises:
        SystemExit: a link to a file that is not in the repository either.
    """

    def replaced(found: re.Match) -> str:
        target = (page.parent / found[2]).resolve()
        if target in kept:
            return found[0]
        if not target.exists():
            raise SystemExit(f"{page.relative_to(ROOT)}: dead link {found[0]}")
        return found[1]

    return _LINK.sub(replaced, text)


def public_names(package: str) -> list[str]:
    """``__all__`` of a package, read from its source."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value), key=str.lower)
    raise SystemExit(f"expected __all__ in {package}/__init__.py, got none")


def reference(package: str, summary: str) -> str:
    sections = "\n\n".join(f"::: {package}.{name}" for name in public_names(package))
    return f"# `{package}`\n\n{summary}\n\n{sections}\n"


def stage(folder: Path) -> None:
    """Write all pages and pictures under ``folder``, in place of what an earlier run wrote there."""
    shutil.rmtree(folder, ignore_errors=True)
    pages, files = staged(PAGES), staged(FILES)
    pages = [page for page in pages if page != ROOT / "docs" / "README.md"]
    kept = {*pages, *files}
    for path in (*pages, *files):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in files:
            shutil.copy(path, target)
        else:
            target.write_text(without_dead_ends(path.read_text(), path, kept))
    (folder / "reference").mkdir()
    for package, summary in PACKAGES.items():
        (folder / "reference" / f"{package}.md").write_text(reference(package, summary))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the pages")
    stage(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main(sys.argv[1:])
