"""``voco store``: lists, checks and removes the entries of a store, wherever it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import parse_qs, unquote, urlsplit

import typer

from voco_model.cli_common import Command, Group, fail, reported_errors

if TYPE_CHECKING:
    from voco_model.kv_store import KVStore, Store

app = typer.Typer(
    cls=Group, no_args_is_help=True, help="List, check and remove the entries of a store."
)

# These commands put nothing, so they evict nothing, whatever the bound.
_NO_BOUND = 1 << 62
_FORMS = (
    "a store's folder, file:///path, redis://host:port/db (or rediss://, unix://path), "
    "s3://bucket/path or another URL that fsspec opens, or several joined by |"
)

Url = Annotated[str, typer.Argument(metavar="URL", help=f"The store: {_FORMS}.")]


@contextmanager
def _opened(url: str) -> Iterator[list[tuple[str, Store]]]:
    """The tiers of a store, uppermost first, each with its name; most stores have one."""
    with reported_errors(), ExitStack() as stack:
        urls = [url] if Path(url).is_dir() else [part.strip() for part in url.split("|")]
        for part in urls:
            _check_folder(part)
        lasting = [part for part in urls if not part.startswith("memory://")]
        if not lasting:
            raise ValueError(
                f"expected a store that outlives its process, got {url}; a memory:// store is seen only "
                "by the process that fills it"
            )
        if len(lasting) < len(urls):
            print("memory:// is left out: it is empty in this process", file=sys.stderr)
        yield [(_without_password(part), stack.enter_context(_open(part))) for part in lasting]


def _open(url: str) -> Store:
    from voco_model.kv_store.open import open_store

    folder = _folder(url)
    if folder is not None and "max_bytes" not in parse_qs(urlsplit(url).query):
        return open_store(url if "://" in url else folder, max_bytes=_NO_BOUND)
    return open_store(url)


def _without_password(url: str) -> str:
    from voco_model.kv_store.objects import without_password

    return without_password(url)


def _folder(url: str) -> Path | None:
    """The folder that a path or a file:// URL names; None for another kind of store."""
    if url.startswith("file://"):
        return Path(unquote(urlsplit(url).path))
    return Path(url) if "://" not in url else None


def _check_folder(url: str) -> None:
    """Opening a KVStore would make its folder."""
    folder = _folder(url)
    if folder is not None and not (folder / "v1").is_dir():
        why = "without v1 in it" if folder.is_dir() else "which is no folder"
        raise ValueError(f"expected a store, got {url}, {why}; give {_FORMS}")


def _is_folder(store: Store) -> bool:
    from voco_model.kv_store.disk import KVStore

    return isinstance(store, KVStore)


def _print_name(name: str, tiers: list) -> None:
    if len(tiers) > 1:
        print(f"{name}:")


@app.command(cls=Command)
def ls(url: Url) -> None:
    """List the entries: key, bytes, tokens, dtype, model and last use, the most recently used first.

    Only a folder tells more than the keys without reading the entries whole.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Piped into another program, lines must not be cut.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    with _opened(url) as tiers:
        for name, store in tiers:
            columns, rows = _listed(store)
            table = Table(box=None, pad_edge=False)
            for column in columns:
                justify = "right" if column in ("bytes", "tokens") else "left"
                table.add_column(column, justify=justify, no_wrap=True)
            for row in rows:
                table.add_row(*map(Text, row))
            _print_name(name, tiers)
            console.print(table)


def _listed(store: Store) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of a listing."""
    if not _is_folder(store):
        return ("key",), [(key,) for key in sorted(store)]
    rows = []
    for key in store:
        try:
            rows.append((store.last_used(key), key, *_described(store, key)))
        except FileNotFoundError:
            continue  # evicted meanwhile
    return ("key", "bytes", "tokens", "dtype", "model", "last used (UTC)"), [
        (*cells, f"{datetime.fromtimestamp(used / 1e9, timezone.utc):%Y-%m-%d %H:%M:%S}")
        for used, *cells in sorted(rows, reverse=True)
    ]


def _described(store: KVStore, key: str) -> tuple[str, str, str, str]:
    from voco_model.kv_store.format import EntryError

    try:
        header = store.header(key)
    except EntryError as error:
        return "-", "-", f"not served: {error.reason}", "-"
    dtype = str(header.dtype).removeprefix("torch.")
    return str(header.file_size), str(header.shape[3]), dtype, header.fingerprint[:12] or "-"


@app.command(cls=Command)
def stats(url: Url) -> None:
    """Count the entries and their bytes. For a folder, also the bad entries that were set aside."""
    with _opened(url) as tiers:
        for name, store in tiers:
            found = store.stats()
            _print_name(name, tiers)
            print(f"entries      {len(store) if found.entries is None else found.entries}")
            print(f"bytes        {'not known' if found.bytes is None else found.bytes}")
            if _is_folder(store):
                print(f"set aside    {len(list((store.path / 'quarantine').iterdir()))}")


@app.command(cls=Command)
def verify(url: Url) -> None:
    """Read every byte, set bad entries aside, repair the index. Exit status 1 if anything was wrong."""
    ok = True
    with _opened(url) as tiers:
        for name, store in tiers:
            report = store.verify()
            _print_name(name, tiers)
            print(f"{report.entries} entries of {report.bytes} bytes are intact")
            for key, reason in report.bad.items():
                print(f"set aside, {reason}: {key}")
            for key in report.added:
                print(f"was not in the index: {key}")
            for key in report.dropped:
                print(f"had no file: {key}")
            ok = ok and report.ok
    raise typer.Exit(0 if ok else 1)


@app.command(cls=Command)
def rm(
    url: Url,
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="Keys of the entries to remove.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all entries.")] = False,
) -> None:
    """Remove entries by key, or all of them. Exit status 1 if one of the keys was not there."""
    if bool(keys) == everything:
        fail("expected keys, or --all, got " + ("both" if keys else "neither"))
    with _opened(url) as tiers:
        if everything:
            for name, store in tiers:
                count = len(store)
                store.clear()
                _print_name(name, tiers)
                print(f"removed {count} entries")
            return
        gone = _removed([store for _, store in tiers], list(dict.fromkeys(keys)))
    for key, was_there in gone.items():
        print(f"{'removed' if was_there else 'not there'}: {key}")
    raise typer.Exit(0 if all(gone.values()) else 1)


def _removed(stores: list[Store], keys: list[str]) -> dict[str, bool]:
    """Whether each key was there, in any tier."""
    from voco_model.kv_store.format import check_key

    for key in keys:  # all of them before the first is removed
        check_key(key)
    # From below, or a reader could copy an entry up again after it was removed there.
    return {key: any([store.delete(key) for store in reversed(stores)]) for key in keys}
