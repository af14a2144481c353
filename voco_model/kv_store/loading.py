"""Loading entries from files into a key/value cache, in pieces that fit the CPU's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from voco_kernels.kv.entry import CompactKV
from voco_kernels.kv.load import prepare_load
from voco_kernels.kv.transfer import Transfer
from voco_model.kv_store.buffers import BufferPool
from voco_model.kv_store.format import EntryError, Header
from voco_model.kv_store.reader import EntryReader

# Bytes of a file from which this pays off: a smaller one fits into the CPU's cache as a whole.
STREAMED_FROM = 2 << 20
# Bytes of an entry to read at a time for a key/value cache on the CPU, so that they stay in the CPU's
# cache. A GPU works on one piece while the next is read, and gets whole layers.
_PIECE = 2 << 20
_LAYERS = 4 << 20
# Bytes of a head from which it is read directly to its place in the key/value cache and hashed there,
# which saves one pass over the memory. Shorter ones are too many for that.
_READ_IN_PLACE_FROM = 1 << 16


def load_from_files(
    cache: Any,
    keys: Sequence[Sequence[str]],
    placement: dict[str, Any],
    *,
    outline: Callable[[str], tuple[CompactKV, Header] | None],
    reader: Callable[[str], AbstractContextManager[EntryReader | None]],
    buffers: BufferPool,
) -> list[str]:
    """``Store.load_into`` for a store of files.

    Args:
        keys: of each row.
        placement: keyword arguments of ``voco_kernels.load_into``.
        outline, reader, buffers: as of ``KVStore``.

    Returns:
        The missing keys.
    """
    # Each file is opened twice, first for what determines its place, then for its contents, and one file
    # at a time: there may be more of them than a process may have open.
    flat = [key for row in keys for key in row]
    outlines = [outline(key) for key in flat]
    missing = [key for key, found in zip(flat, outlines, strict=True) if found is None]
    if missing:
        return list(dict.fromkeys(missing))
    shells = iter(shell for shell, _ in outlines)
    transfer = prepare_load(cache, [[next(shells) for _ in row] for row in keys], **placement)
    for index, key in enumerate(flat):
        try:
            with reader(key) as opened:
                if opened is None or not _load(transfer, index, outlines[index], opened, buffers):
                    missing.append(key)
        except (EntryError, OSError):  # the store has counted and logged it
            missing.append(key)
    if missing:
        transfer.cancel()
    else:
        transfer.commit()
    return list(dict.fromkeys(missing))


def _load(
    transfer: Transfer,
    index: int,
    outline: tuple[CompactKV, Header],
    reader: EntryReader,
    buffers: BufferPool,
) -> bool:
    """Loads an entry to its place. False if it has been replaced by one that doesn't fit there."""
    shell, scales = reader.outline()
    if not _alike(outline, (shell, reader.header)):
        return False
    if transfer.takes_bytes(index):
        _write(transfer, index, reader, buffers)
    else:
        _feed(transfer, index, reader, scales, buffers)
    reader.check()
    return True


def _alike(one: tuple[CompactKV, Header], other: tuple[CompactKV, Header]) -> bool:
    """Whether two versions of an entry, one of which has replaced the other, go to the same places."""
    (shell, header), (other_shell, other_header) = one, other
    return header.digest == other_header.digest or (
        header._replace(digest=other_header.digest) == other_header
        and torch.equal(shell.positions, other_shell.positions)
        and (shell.rope is None or shell.rope.same(other_shell.rope))
    )


def _write(transfer: Transfer, index: int, reader: EntryReader, buffers: BufferPool) -> None:
    header = reader.header
    nbytes = header.tail - header.size
    head = header.layer_nbytes // (2 * header.shape[2])
    if head >= _READ_IN_PLACE_FROM:
        destinations = transfer.destinations(index)
        if destinations is not None:
            reader.read_scattered(destinations)
            return
    size = min(max(1, _PIECE // head) * head, nbytes)
    memory = buffers.lease(size)
    for at in range(0, nbytes, size):
        piece = memory[: min(size, nbytes - at)]
        reader.read_bytes(at, piece)
        transfer.write(index, at, piece)


def _feed(
    transfer: Transfer, index: int, reader: EntryReader, scales: Tensor | None, buffers: BufferPool
) -> None:
    header = reader.header
    num_layers = header.shape[0]
    at_once = min(max(1, _LAYERS // header.layer_nbytes), num_layers)
    memory = None
    for first in range(0, num_layers, at_once):
        count = min(at_once, num_layers - first)
        if memory is None or transfer.reads_later:
            memory = buffers.lease(at_once * header.layer_nbytes)
        kv = reader.read(first, count, memory)
        transfer.feed(index, first, kv, None if scales is None else scales[first : first + count])
