"""From files into a key/value cache without a stop: piece by piece, each while it is in the processor's
cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from voco_kernels.kv.entry import CompactKV
from voco_kernels.kv.load import prepare_load
from voco_kernels.kv.transfer import Transfer
from voco_model.kv_store.format import EntryError, Header
from voco_model.kv_store.reader import EntryReader

if TYPE_CHECKING:
    from voco_model.kv_store.disk import KVStore

# Bytes of a file from which on it pays: of less, the whole fits into a processor's cache.
STREAMED_FROM = 2 << 20
# Bytes of an entry at a time, where they go to a cache on the CPU: they stay in a processor's cache. A
# GPU, which is busy with one while the next is read, gets whole layers.
_PIECE = 2 << 20
_LAYERS = 4 << 20
# Bytes of a head from which on it is read to its place in the cache at once, and hashed there: one pass
# over the memory less. Of shorter ones there are too many for that.
_READ_IN_PLACE_FROM = 1 << 16


def load_from_files(
    store: KVStore, cache: Any, keys: Sequence[Sequence[str]], placement: dict[str, Any]
) -> list[str]:
    """``Store.load_into`` for a store of files; ``placement`` are its keyword arguments."""
    # Each file is opened twice and one at a time, since there may be more than a process may have open:
    # first for what says where it goes, then for what it holds.
    flat = [key for row in keys for key in row]
    outlines = [store.outline(key) for key in flat]
    missing = [key for key, outline in zip(flat, outlines, strict=True) if outline is None]
    if missing:
        return list(dict.fromkeys(missing))
    shells = iter(shell for shell, _ in outlines)
    transfer = prepare_load(cache, [[next(shells) for _ in row] for row in keys], **placement)
    for index, key in enumerate(flat):
        try:
            if not _load(transfer, index, key, outlines[index], store):
                missing.append(key)
        except (EntryError, OSError):  # counted and logged by the store
            missing.append(key)
    if missing:
        transfer.cancel()
    else:
        transfer.commit()
    return list(dict.fromkeys(missing))


def _load(
    transfer: Transfer, index: int, key: str, outline: tuple[CompactKV, Header], store: KVStore
) -> bool:
    """Puts an entry where it goes; False if it isn't there any more, or is another by now."""
    with store.reader(key) as reader:
        if reader is None:
            return False
        shell, scales = reader.outline()
        if not _alike(outline, (shell, reader.header)):
            return False
        if transfer.takes_bytes(index):
            _write(transfer, index, reader, store)
        else:
            _feed(transfer, index, reader, scales, store)
        reader.check()
    return True


def _alike(one: tuple[CompactKV, Header], other: tuple[CompactKV, Header]) -> bool:
    """Whether an entry that was put in the place of another one goes where that was to go."""
    (shell, header), (other_shell, other_header) = one, other
    return header.digest == other_header.digest or (
        header._replace(digest=other_header.digest) == other_header
        and torch.equal(shell.positions, other_shell.positions)
        and (shell.rope is None or shell.rope.same(other_shell.rope))
    )


def _write(transfer: Transfer, index: int, reader: EntryReader, store: KVStore) -> None:
    header = reader.header
    nbytes = header.tail - header.size
    head = header.layer_nbytes // (2 * header.shape[2])
    if head >= _READ_IN_PLACE_FROM:
        destinations = transfer.destinations(index)
        if destinations is not None:
            reader.read_scattered(destinations)
            return
    size = min(max(1, _PIECE // head) * head, nbytes)
    memory = store.buffers.lease(size)
    for at in range(0, nbytes, size):
        piece = memory[: min(size, nbytes - at)]
        reader.read_bytes(at, piece)
        transfer.write(index, at, piece)


def _feed(
    transfer: Transfer, index: int, reader: EntryReader, scales: Tensor | None, store: KVStore
) -> None:
    header = reader.header
    num_layers = header.shape[0]
    at_once = min(max(1, _LAYERS // header.layer_nbytes), num_layers)
    memory = None
    for first in range(0, num_layers, at_once):
        count = min(at_once, num_layers - first)
        if memory is None or transfer.reads_later:
            memory = store.buffers.lease(at_once * header.layer_nbytes)
        kv = reader.read(first, count, memory)
        transfer.feed(index, first, kv, None if scales is None else scales[first : first + count])
