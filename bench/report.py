"""Writes the tables and plots of README.md and docs/ from the committed records in bench/results/.

    python bench/report.py            # bring README.md, docs/ and the plots up to date
    python bench/report.py --check    # exit 1 if they are not (CI)
    python bench/report.py --show bench-output/attn.json    # a record's tables, on stdout

A text says where a table belongs with two comment lines, ``<!-- bench:NAME:start -->`` and
``<!-- bench:NAME:end -->``; what stands between them is replaced. Names: ``attn`` and ``attn-cpu``
(tables of bench/attn.py on a GPU and on a CPU), ``attn-plot`` (its plots), ``roofline`` (each shape
under its roof), ``layout`` (making a layout against making a BlockMask), ``shapes`` (what A to G
are), ``tiles`` (the visible share of what kernels multiply), ``kv`` and ``kv-cpu`` (goals and tables
of bench/kv.py on a GPU and on a CPU), ``kv-plot`` (its plots), ``two-pass``, ``two-pass-cpu`` and
``two-pass-plot`` (likewise of bench/two_pass.py), ``train`` and ``train-cpu`` (tables of
bench/train.py), ``miniature-...`` (what ``python -m voco_model miniature`` has found). A figure that no
record holds is "not measured".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install

import typer

from bench.answering import plots as two_pass_plots
from bench.answering import report as two_pass_report
from bench.attention import plots, tiles
from bench.attention.shapes import SIZES
from bench.harness import records
from bench.harness import text as markdown
from bench.harness.text import NOT_MEASURED
from bench.loading import report as kv_report
from bench.training import report as train_report
from voco_model.miniature import report as miniature_report

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"^<!-- bench:([a-z0-9-]+):(start|end) -->$", re.MULTILINE)
PLOT_SOURCE = "Source"
"""The PNG text entry that holds the SHA-256 of the record a plot was drawn from."""

Records = dict[str, dict]
"""Records by file name, oldest first."""


def load_results(folder: Path) -> Records:
    """All records under ``folder``, oldest first.

    Raises:
        ValueError: a file that is no record, or one of a quick run, which holds no figures.
    """
    found = {path.name: records.read(path) for path in sorted(folder.glob("*.json"))}
    for name, record in found.items():
        if record["settings"].get("quick"):
            raise ValueError(f"expected a record of a full run, got {name} of a --quick one")
    return dict(sorted(found.items(), key=lambda item: item[1]["environment"]["date"]))


def render(text: str, tables: dict[str, Callable[[], str]], where: str) -> str:
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


def tables_for(results: Records, text_folder: Path, results_folder: Path) -> dict:
    """Every table by name, for a text in ``text_folder`` (image links are relative to it)."""
    attn = {name: record for name, record in results.items() if record["bench"] == "attn"}
    on_gpu = {n: r for n, r in attn.items() if r["environment"]["device"]["type"] == "cuda"}
    on_cpu = {n: r for n, r in attn.items() if n not in on_gpu}
    kv = {name: record for name, record in results.items() if record["bench"] == "kv"}
    two_pass = {name: record for name, record in results.items() if record["bench"] == "two_pass"}
    train = {name: record for name, record in results.items() if record["bench"] == "train"}
    return {
        "attn": lambda: attention_tables(on_gpu, "full"),
        "attn-cpu": lambda: attention_tables(on_cpu, "small"),
        "attn-plot": lambda: plot_links(attn, text_folder, results_folder),
        "roofline": lambda: roofline_links(on_gpu, text_folder, results_folder),
        "layout": lambda: layout_table(on_gpu or on_cpu, "full" if on_gpu else "small"),
        "shapes": shapes_table,
        "tiles": tiles_table,
        "kv": lambda: kv_report.tables(kv, "cuda"),
        "kv-cpu": lambda: kv_report.tables(kv, "cpu"),
        "kv-plot": lambda: kv_plot_links(kv, text_folder, results_folder),
        "two-pass": lambda: two_pass_report.tables(two_pass, "cuda"),
        "two-pass-cpu": lambda: two_pass_report.tables(two_pass, "cpu"),
        "two-pass-plot": lambda: two_pass_plot_links(two_pass, text_folder, results_folder),
        "train": lambda: train_report.tables(train, "cuda"),
        "train-cpu": lambda: train_report.tables(train, "cpu"),
        **miniature_tables(results_folder),
    }


def miniature_tables(results_folder: Path) -> dict[str, Callable[[], str]]:
    """Those of results/miniature/results.json; "not measured" where there is no such file."""
    path = results_folder / "miniature/results.json"
    if not path.exists():
        return {f"miniature-{name}": lambda: "not measured" for name in miniature_report.TABLES}
    made = miniature_report.tables(json.loads(path.read_text()))
    return {f"miniature-{name}": lambda text=text: text for name, text in made.items()}


def attention_tables(results: Records, size: str) -> str:
    """A table for each device and direction; without records, the same tables of "not measured"."""
    usable = {n: r for n, r in results.items() if r["settings"]["size"] == size}
    devices = dict.fromkeys(device_of(record) for record in usable.values())
    blocks = []
    for device in devices or [None]:
        own = {n: r for n, r in usable.items() if device_of(r) == device}
        for direction in records.DIRECTIONS:
            blocks.append(_attention_table(own, size, direction))
    return "\n\n".join(blocks)


def device_of(record: dict) -> str:
    return record["environment"]["device"]["name"]


def _attention_table(
    results: Records, size: str, direction: str, *, all_shapes: bool = True
) -> str:
    newest: dict[tuple, tuple[str, dict]] = {}
    for name, record in results.items():
        for case in record["cases"]:
            if case["direction"] == direction:
                key = (case["shape"], case["num_heads"], case["num_kv_heads"])
                newest[key] = (name, case)
    expected = [(shape, *heads) for heads in SIZES[size].heads for shape in SIZES[size].shapes]
    keys = [key for key in expected if all_shapes or key in newest]
    keys += [key for key in newest if key not in keys]
    unit, factor = ("TFLOP/s", 1.0) if size == "full" else ("GFLOP/s", 1e3)
    header = [
        "shape",
        "heads",
        "ms",
        f"useful {unit}",
        "× two-call, drop-in",
        "× two-call, kernels alone",
        "× FlexAttention",
        "× dense-mask SDPA",
        "error / limit",
    ]
    cases = [newest.get(key, (None, None))[1] for key in keys]
    served = [case and records.our_row(case) for case in cases]
    mixed = len({own["name"] for own in served if own}) > 1
    several = any(case and records.our_next(case) for case in cases)
    if several:
        header.insert(4, "× our next backend")
    if mixed:
        header.insert(2, "backend")
    rows = []
    for key, case, own in zip(keys, cases, served, strict=True):
        figures = _figures(case, factor)
        if several:
            next_ratio = case and _ratio(case, records.our_next(case), named=True)
            figures.insert(2, next_ratio or NOT_MEASURED)
        if mixed:
            figures.insert(0, own["name"].removeprefix("voco ") if own else NOT_MEASURED)
        rows.append([f"**{key[0]}**", f"{key[1]}/{key[2]}", *figures])
    used = list(dict.fromkeys(name for name, _ in newest.values()))
    return f"**{direction}**. {_origin(results, used)}\n\n{markdown.table(header, rows)}"


def _figures(case: dict | None, factor: float) -> list[str]:
    own = records.our_row(case) if case else None
    if own is None:
        return [NOT_MEASURED] * 7
    ratios = [
        _ratio(case, records.best_pieces(case, drop_in=True), named=True),
        _ratio(case, records.best_pieces(case, drop_in=False), named=True),
        _ratio(case, records.named(case, "flex")),
        _ratio(case, records.named(case, "sdpa-dense")),
    ]
    share = max(entry["error"] / entry["limit"] for entry in own["errors"].values())
    rate = own["tflops"] * factor
    return [f"{own['timing']['p50']:.3g}", f"{rate:.3g}", *ratios, f"{share:.2f}"]


def _ratio(case: dict, rival: dict | None, named: bool = False) -> str:
    ratio = records.times_faster(case, rival)
    if ratio is None:
        return NOT_MEASURED
    name = rival["name"].removesuffix("-parts").removeprefix("voco ")
    return f"{ratio:.2f} ({name})" if named else f"{ratio:.2f}"


def _origin(results: Records, used: list[str]) -> str:
    """Where figures come from, in one sentence."""
    if not used:
        return f"{NOT_MEASURED.capitalize()} yet."
    newest = results[used[-1]]
    environment, settings = newest["environment"], newest["settings"]
    versions = environment["versions"]
    commits = dict.fromkeys(markdown.short(results[name]["environment"]["commit"]) for name in used)
    own = [records.our_row(case) or _first_of_ours(case) for case in newest["cases"]]
    backends = dict.fromkeys(row["name"].removeprefix("voco ") for row in own)
    files = ", ".join(f"`bench/results/{name}`" for name in used)
    triton = f", triton {versions['triton']}" if environment["device"]["type"] == "cuda" else ""
    return (
        f"{device_of(newest)}, {settings['dtype']}, head_dim {settings['head_dim']}, backend "
        f"{', '.join(f'`{name}`' for name in backends)}; torch {versions['torch']}{triton}, commit "
        f"{', '.join(commits)}, {environment['date'][:10]} ({files})."
    )


def _first_of_ours(case: dict) -> dict:
    return next(row for row in case["rows"] if row["ours"])


def layout_table(results: Records, size: str, *, all_shapes: bool = True) -> str:
    """Time to make a layout from token ids against the time to make the BlockMask."""
    newest: dict[str, tuple[str, dict]] = {}
    for name, record in results.items():
        if record["settings"]["size"] == size:
            for entry in record["layouts"]:
                if entry["status"] == "ok":
                    newest[entry["shape"]] = (name, entry)
    rows = []
    for shape in SIZES[size].shapes:
        if shape not in newest and not all_shapes:
            continue
        if shape not in newest:
            rows.append([f"**{shape}**", *[NOT_MEASURED] * 3])
            continue
        _, entry = newest[shape]
        masks = [entry[key] for key in ("block_mask", "block_mask_compiled") if entry.get(key)]
        fastest = min((mask["p50"] for mask in masks), default=None)
        rows.append(
            [
                f"**{shape}**",
                f"{1e3 * entry['layout']['p50']:.3g}",
                NOT_MEASURED if fastest is None else f"{1e3 * fastest:.3g}",
                NOT_MEASURED if entry["ratio"] is None else f"{entry['ratio']:.1f}",
            ]
        )
    used = list(dict.fromkeys(name for name, _ in newest.values()))
    header = ["shape", "`from_input_ids`, µs", "`create_block_mask`, µs", "×"]
    return f"{_origin(results, used)}\n\n{markdown.table(header, rows)}"


def plot_links(results: Records, text_folder: Path, results_folder: Path) -> str:
    """The plots of all records, as images."""
    links = []
    for name, record in results.items():
        picture = (results_folder / name).with_suffix(".png")
        target = Path(os.path.relpath(picture, text_folder)).as_posix()
        links.append(
            f"![Useful TFLOP/s by shape and implementation, {device_of(record)}]({target})"
        )
    return "\n\n".join(links) or f"Useful TFLOP/s by shape and implementation: {NOT_MEASURED}."


def kv_plot_links(results: Records, text_folder: Path, results_folder: Path) -> str:
    """The plots of bench/kv.py's records, as images."""
    links = []
    for name, record in results.items():
        picture = (results_folder / name).with_suffix(".png")
        target = Path(os.path.relpath(picture, text_folder)).as_posix()
        links.append(f"![Time of a load against its bytes, {device_of(record)}]({target})")
    return "\n\n".join(links) or f"Time of a load against its bytes: {NOT_MEASURED}."


def two_pass_plot_links(results: Records, text_folder: Path, results_folder: Path) -> str:
    """The plots of bench/two_pass.py's records, as images."""
    titles = {
        "stages": "Time to the first token by stage",
        "streams": "Answers a second over the share of images that come back",
    }
    links = []
    for name, record in results.items():
        for what, picture in two_pass_plots.paths(results_folder / name).items():
            if two_pass_plots.has(record, what):
                target = Path(os.path.relpath(picture, text_folder)).as_posix()
                links.append(f"![{titles[what]}, {device_of(record)}]({target})")
    return "\n\n".join(links) or "\n\n".join(f"{t}: {NOT_MEASURED}." for t in titles.values())


def roofline_links(results: Records, text_folder: Path, results_folder: Path) -> str:
    """The roofline plots of all records with ceilings; of the others, what they lack."""
    blocks = []
    for name, record in results.items():
        directions = " and ".join(record["settings"]["directions"])
        title = f"Roofline, {directions}, {device_of(record)}"
        if record["ceilings"]:
            picture = roofline_path(results_folder / name)
            target = Path(os.path.relpath(picture, text_folder)).as_posix()
            blocks.append(f"![{title}]({target})")
        else:
            blocks.append(f"{title} (`bench/results/{name}`): ceilings {NOT_MEASURED}.")
    return "\n\n".join(blocks) or f"Roofline: {NOT_MEASURED}."


def roofline_path(record: Path) -> Path:
    return record.with_name(f"{record.stem}-roofline.png")


def tiles_table() -> str:
    """Visible pairs as a share of executed ones."""
    rows = []
    for name, shape in SIZES["full"].shapes.items():
        layout = shape.layout("cpu")
        executed = [
            tiles.pairs_of_two_calls(layout),
            tiles.pairs_of_cuda_sm90(layout),
            tiles.pairs_of_cuda_sm90(layout, packed_heads=4),
        ]
        rows.append(
            [f"**{name}**", *(f"{100 * layout.pairs() / pairs:.0f}%" for pairs in executed)]
        )
    header = [
        "shape",
        "two calls, 128 x 128",
        "`cuda_sm90`, 32/32 heads",
        "`cuda_sm90`, 32/8 heads",
    ]
    return markdown.table(header, rows)


def shapes_table() -> str:
    """What A to G are, in the two sizes that are measured."""
    rows = [
        [f"**{name}**", SIZES["full"].shapes[name].title, SIZES["small"].shapes[name].title]
        for name in SIZES["full"].shapes
    ]
    return markdown.table(["shape", "on a GPU (vision, VoCo, text x batch)", "on a CPU"], rows)


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
        path = results_folder / name
        if record["bench"] == "two_pass":
            stale += _update_two_pass(record, path, check=check)
        if record["bench"] not in ("attn", "kv") or not record["cases"]:
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        is_kv = record["bench"] == "kv"
        pictures = {path.with_suffix(".png"): plots.plot_kv if is_kv else plots.plot_attention}
        if record["environment"]["device"]["type"] == "cuda" and record.get("ceilings"):
            pictures[roofline_path(path)] = plots.plot_roofline
        for picture, plot in pictures.items():
            if plot_source(picture) != digest:
                stale.append(picture)
                if not check:
                    plot(record, picture, metadata={PLOT_SOURCE: digest})
    return stale + _update_miniature(results_folder / "miniature", check=check)


def _update_miniature(folder: Path, *, check: bool) -> list[Path]:
    path, picture = folder / "results.json", folder / "retention.png"
    if not path.exists():
        return []
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if plot_source(picture) == digest:
        return []
    if not check:
        results = json.loads(path.read_text())
        miniature_report.plot(results, picture, metadata={PLOT_SOURCE: digest})
    return [picture]


def _update_two_pass(record: dict, path: Path, *, check: bool) -> list[Path]:
    """The plots of a record of bench/two_pass.py that are out of date."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    stale = [
        picture
        for what, picture in two_pass_plots.paths(path).items()
        if two_pass_plots.has(record, what) and plot_source(picture) != digest
    ]
    if stale and not check:
        two_pass_plots.draw(record, path, metadata={PLOT_SOURCE: digest})
    return stale


def plot_source(path: Path) -> str | None:
    """The digest of the record that a plot was drawn from; None where there is no such plot."""
    if not path.exists():
        return None
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(PLOT_SOURCE)


def show(path: Path) -> str:
    """The tables of one record, wherever it lies."""
    record = records.read(path)
    if record["bench"] == "kv":
        return kv_report.show(record)
    if record["bench"] == "two_pass":
        return two_pass_report.show(record)
    if record["bench"] == "train":
        return train_report.show(record)
    size = record["settings"]["size"]
    results = {path.name: record}
    blocks = [
        _attention_table(results, size, direction, all_shapes=False)
        for direction in record["settings"]["directions"]
    ]
    if record["layouts"]:
        blocks.append("**layout from token ids**. " + layout_table(results, size, all_shapes=False))
    return "\n\n".join(blocks)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
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
