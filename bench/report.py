"""Writes the tables and plots of README.md and docs/ from the committed records in bench/results/.

    python bench/report.py            # bring README.md, docs/ and the plots up to date
    python bench/report.py --check    # exit 1 if they are not (CI)
    python bench/report.py --show bench-output/attn.json    # a record's tables, on stdout

Two comment lines in a text mark the place of a table, ``<!-- bench:NAME:start -->`` and
``<!-- bench:NAME:end -->``; what is between them is replaced. Names: ``attn`` and ``attn-cpu``
(tables of bench/attn.py on a GPU and on a CPU), ``attn-plot`` (its plots), ``roofline`` (each shape
under its roof), ``layout`` (making a layout against making a BlockMask), ``shapes`` (what A to G
are), ``tiles`` (the visible share of what kernels multiply), ``kv`` and ``kv-cpu`` (goals and tables
of bench/kv.py on a GPU and on a CPU), ``kv-plot`` (its plots), ``two-pass``, ``two-pass-cpu`` and
``two-pass-plot`` (likewise of bench/two_pass.py), ``train`` and ``train-cpu`` (tables of
bench/train.py), ``headline`` and ``summary`` (the README's figures), ``miniature-...`` (what
``python -m voco_model miniature`` has found). A figure that no record holds is "not measured".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install

import typer

from bench.answering.report import FAMILY as ANSWERING
from bench.attention.report import FAMILY as ATTENTION
from bench.harness import options
from bench.harness.family import Family, family_of, read
from bench.harness.machine import ROOT
from bench.harness.records import Records
from bench.harness.text import NOT_MEASURED
from bench.loading.report import FAMILY as LOADING
from bench.training.report import FAMILY as TRAINING
from bench.tuning.report import FAMILY as TUNING
from voco_model.miniature import report as miniature_report

FAMILIES: tuple[Family, ...] = (ATTENTION, LOADING, ANSWERING, TRAINING, TUNING)
MARKER = re.compile(r"^<!-- bench:([a-z0-9-]+):(start|end) -->$", re.MULTILINE)
PLOT_SOURCE = "Source"
"""The PNG text entry that holds the SHA-256 of the record a plot was drawn from."""

Tables = dict[str, Callable[[], str]]


def load_results(folder: Path) -> Records:
    """All records in ``folder``, oldest first.

    Raises:
        ValueError: a file is no record, or one of a quick run, which holds no figures.
    """
    found = {path.name: read(path, FAMILIES) for path in sorted(folder.glob("*.json"))}
    for name, record in found.items():
        if record["settings"].get("quick"):
            raise ValueError(f"expected a record of a full run, got {name} of a --quick one")
    return dict(sorted(found.items(), key=lambda item: item[1]["environment"]["date"]))


def render(text: str, tables: Tables, where: str) -> str:
    """``text`` with everything between markers made anew.

    Raises:
        ValueError: a marker without its partner, or of an unknown name.
    """
    pieces, position = [], 0
    markers = list(MARKER.finditer(text))
    for opening, closing in zip(markers[::2], markers[1::2] + [None], strict=False):
        name = opening[1]
        paired = closing is not None and closing[1] == name
        if not paired or opening[2] != "start" or closing[2] != "end":
            line = text.count("\n", 0, opening.start()) + 1
            raise ValueError(
                f"expected <!-- bench:{name}:start --> and then <!-- bench:{name}:end --> in "
                f"{where}, got {opening[0]} alone in line {line}"
            )
        if name not in tables:
            raise ValueError(f"expected a table among {', '.join(tables)} in {where}, got {name!r}")
        pieces += [text[position : opening.end()], "\n", tables[name]().rstrip("\n"), "\n"]
        position = closing.start()
    return "".join([*pieces, text[position:]])


def tables_for(results: Records, text_folder: Path, results_folder: Path) -> Tables:
    """Every table by name, for a text in ``text_folder`` (image links are relative to it)."""

    def link(name: str) -> str:
        return Path(os.path.relpath(results_folder / name, text_folder)).as_posix()

    tables = {}
    for family in FAMILIES:
        own = {name: record for name, record in results.items() if record["bench"] == family.name}
        tables |= {name: partial(make, own, link) for name, make in family.tables.items()}
    return tables | miniature_tables(results_folder)


def miniature_tables(results_folder: Path) -> Tables:
    """The tables of results/miniature/results.json; "not measured" where there is no such file."""
    path = results_folder / "miniature/results.json"
    if not path.exists():
        return {f"miniature-{name}": lambda: NOT_MEASURED for name in miniature_report.TABLES}
    made = miniature_report.tables(json.loads(path.read_text()))
    return {f"miniature-{name}": lambda text=text: text for name, text in made.items()}


def texts(root: Path) -> list[Path]:
    """The texts that may hold markers."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [path for path in found if path.exists()]


def update(root: Path, results_folder: Path, *, check: bool) -> list[Path]:
    """The files that are out of date; without ``check`` they are written."""
    results = load_results(results_folder)
    stale = []
    for path in texts(root):
        before = path.read_text()
        tables = tables_for(results, path.parent, results_folder)
        after = render(before, tables, path.relative_to(root).as_posix())
        if after != before:
            stale.append(path)
            if not check:
                path.write_text(after)
    for name, record in results.items():
        for picture in family_of(record, FAMILIES).pictures:
            if picture.has(record):
                plot = partial(picture.draw, record)
                source, target = results_folder / name, picture.path(results_folder / name)
                stale += _update_plot(plot, source, target, check=check)
    source, target = (
        results_folder / "miniature" / name for name in ("results.json", "retention.png")
    )
    if source.exists():
        plot = partial(_plot_miniature, source)
        stale += _update_plot(plot, source, target, check=check)
    return stale


def _update_plot(
    plot: Callable[[Path, dict[str, str]], None], source: Path, target: Path, *, check: bool
) -> list[Path]:
    """``[target]`` if it was not drawn from this ``source``; without ``check`` it is drawn now."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    if plot_source(target) == digest:
        return []
    if not check:
        plot(target, {PLOT_SOURCE: digest})
    return [target]


def _plot_miniature(source: Path, target: Path, metadata: dict[str, str]) -> None:
    miniature_report.plot(json.loads(source.read_text()), target, metadata=metadata)


def plot_source(path: Path) -> str | None:
    """The digest of the record that a plot was drawn from; None where there is no such plot."""
    if not path.exists():
        return None
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(PLOT_SOURCE)


def show(path: Path) -> str:
    """The tables of one record, wherever it is."""
    record = read(path, FAMILIES)
    return family_of(record, FAMILIES).show(record)


app = options.app()


@app.command(context_settings=options.CONTEXT)
def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if anything is out of date.")
    ] = False,
    show_record: Annotated[
        Path | None, typer.Option("--show", help="Print one record's tables and stop.", exists=True)
    ] = None,
    root: Annotated[Path, typer.Option(help="The checkout.")] = ROOT,
) -> None:
    """Write the tables of README.md and docs/, and the plots, from bench/results/*.json."""
    if show_record is not None:
        print(show(show_record))
        return
    try:
        stale = update(root, root / "bench" / "results", check=check)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    for path in stale:
        print(f"{'out of date' if check else 'wrote'}: {path.relative_to(root).as_posix()}")
    if check and stale:
        print("run: python bench/report.py", file=sys.stderr)
        raise typer.Exit(1)
    if not stale:
        print("up to date")


if __name__ == "__main__":
    app()
