"""``python -m voco_model``: what can be done from a shell."""

from __future__ import annotations

import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from voco_model.evaluate.cli import evaluate
from voco_model.explain.cli import explain
from voco_model.kv_store.disk import KVStore
from voco_model.kv_store.format import EntryError, check_key
from voco_model.miniature.cli import miniature

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
store_app = typer.Typer(no_args_is_help=True, help="Look into a store of compact entries.")
convert_app = typer.Typer(
    no_args_is_help=True, help="Between the authors' checkpoints and Hugging Face's layout."
)
app.add_typer(store_app, name="store")
app.add_typer(convert_app, name="convert")
app.command(name="eval")(evaluate)
app.command()(explain)
app.command()(miniature)

# Nothing is put from here, so nothing is evicted, whatever the bound.
_NO_BOUND = 1 << 62

FOLDER = Annotated[Path, typer.Argument(help="the store's folder", show_default=False)]


@app.callback()
def main() -> None:
    """Vision-token compression with VoCo-LLaMA."""


def _opened(path: Path) -> KVStore:
    if not (path / "v1").is_dir():
        _fail(f"expected the folder of a store, with v1 in it, got {path}")
    try:
        return KVStore(path, max_bytes=_NO_BOUND)
    except OSError as error:
        _fail(f"expected a store that can be opened, got {error}")


def _fail(message: str) -> None:
    print(message, file=sys.stderr)
    raise typer.Exit(2)


@store_app.command()
def ls(path: FOLDER) -> None:
    """List the entries, the one used last first: key, bytes, tokens, dtype, model, last use."""
    with _opened(path) as store:
        rows = []
        for key in store:
            try:
                rows.append((store.last_used(key), key, *_described(store, key)))
            except FileNotFoundError:
                continue  # evicted meanwhile
    table = Table(box=None, pad_edge=False)
    for name in ("key", "bytes", "tokens", "dtype", "model", "last used (UTC)"):
        table.add_column(
            name, justify="right" if name in ("bytes", "tokens") else "left", no_wrap=True
        )
    for used, *cells in sorted(rows, reverse=True):
        when = datetime.fromtimestamp(used / 1e9, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(*map(Text, cells), when)
    # Piped into another program, lines must not be cut.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def _described(store: KVStore, key: str) -> tuple[str, str, str, str]:
    try:
        header = store.header(key)
    except EntryError as error:
        return "-", "-", f"not served: {error.reason}", "-"
    dtype = str(header.dtype).removeprefix("torch.")
    return str(header.file_size), str(header.shape[3]), dtype, header.fingerprint[:12] or "-"


@store_app.command()
def stats(path: FOLDER) -> None:
    """Entries and bytes, and what is set aside."""
    with _opened(path) as store:
        found = store.stats()
        aside = list((store.path / "quarantine").iterdir())
    print(f"entries      {found.entries}")
    print(f"bytes        {found.bytes}")
    print(f"set aside    {len(aside)}")


@store_app.command()
def verify(path: FOLDER) -> None:
    """Read every byte; set aside what is bad, put the index right. Exit status 1 if anything was."""
    with _opened(path) as store:
        report = store.verify()
    print(f"{report.entries} entries of {report.bytes} bytes are intact")
    for name, reason in report.bad.items():
        print(f"set aside, {reason}: {name}")
    for key in report.added:
        print(f"was not in the index: {key}")
    for key in report.dropped:
        print(f"had no file: {key}")
    raise typer.Exit(0 if report.ok else 1)


@store_app.command()
def rm(
    path: FOLDER,
    keys: Annotated[list[str] | None, typer.Argument(help="of the entries to remove")] = None,
    everything: Annotated[bool, typer.Option("--all", help="remove all entries")] = False,
) -> None:
    """Remove entries by key. Exit status 1 if one of them wasn't there."""
    if bool(keys) == everything:
        _fail("expected keys, or --all, got " + ("both" if keys else "neither"))
    with _opened(path) as store:
        if everything:
            count = len(store)
            store.clear()
            print(f"removed {count} entries")
            return
        keys = list(dict.fromkeys(keys))
        try:
            for key in keys:  # all of them before the first is removed
                check_key(key)
        except ValueError as error:
            _fail(str(error))
        gone = [store.delete(key) for key in keys]
    for key, was_there in zip(keys, gone, strict=True):
        print(f"{'removed' if was_there else 'not there'}: {key}")
    raise typer.Exit(0 if all(gone) else 1)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="a YAML file; see docs/training.md")],
    output: Annotated[Path | None, typer.Option(help="in place of the file's")] = None,
    model: Annotated[str | None, typer.Option(help="in place of the file's")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="look through the data and say what would be done")
    ] = False,
) -> None:
    """Train a LLaVA to compress images; with torchrun on several GPUs."""
    try:
        from voco_model.train import load_config
        from voco_model.train import train as run_training
    except ModuleNotFoundError as error:
        _fail(f"expected the packages for training, got {error}; pip install 'voco-kernels[train]'")
    given = {"output": output, "model": model}
    try:
        read = load_config(config, **{k: str(v) for k, v in given.items() if v is not None})
        run_training(read, dry_run=dry_run)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("VOCO_TRACEBACK"):
            raise
        _fail(str(error))


@convert_app.command()
def from_authors(
    source: Annotated[
        Path,
        typer.Argument(help="folder of a checkpoint of the authors, or of an original LLaVA-1.5"),
    ],
    target: Annotated[Path, typer.Argument(help="a new folder")],
    num_voco: Annotated[
        int | None,
        typer.Option(help="that the model was trained with; an original LLaVA has none"),
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="folder or hub name, in place of the checkpoint's")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="how prompts are written, authors by default")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="of the weights, by default as they are")
    ] = None,
) -> None:
    """To the layout that from_pretrained and voco_model.load read."""
    from voco_model import convert

    _converted(
        convert.from_authors,
        source,
        target,
        num_voco=num_voco,
        vision_tower=vision_tower,
        prompt=prompt,
        dtype=dtype,
    )


@convert_app.command()
def to_authors(
    source: Annotated[Path, typer.Argument(help="folder of a checkpoint in Hugging Face's layout")],
    target: Annotated[Path, typer.Argument(help="a new folder")],
    vision_tower: Annotated[
        str | None,
        typer.Option(help="what to name there, if the model wasn't converted from there"),
    ] = None,
) -> None:
    """To the layout of the authors' code."""
    from voco_model import convert

    _converted(convert.to_authors, source, target, vision_tower=vision_tower)


def _converted(convert, source: Path, target: Path, **options) -> None:
    try:
        written = convert(source, target, **options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        _fail(str(error))
    print(f"written: {written}")


def run() -> None:
    try:
        app(prog_name="python -m voco_model")
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
