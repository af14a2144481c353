"""Encoding and decoding of entries: version 1 of the format, a safetensors file with one valid spelling.

| bytes | what |
|---|---|
| 8 | N, the length of the header, unsigned, little-endian |
| N | JSON in ASCII, padded with spaces to the next multiple of 4096 (in Redis: 8) of 8 + N |
| the rest | the payload: ``kv``, ``scales``, ``positions``, ``inv_freq``, without gaps |

All numbers are little-endian. The JSON has no spaces and its fields in this order, so every entry has
exactly one encoding, with the digest at bytes 37 to 68::

    {"__metadata__":{"xxh3_128":"<32 hex>","format":"voco-kv","version":"1","key":"<64 hex>",
     "fingerprint":"<string>","next_position":"<decimal>","rope_interleaved":"true" or "false"},
     "kv":{"dtype":"BF16","shape":[L,2,Hkv,n,D],"data_offsets":[0,<end>]},
     "scales":{"dtype":"F32","shape":[L,2,Hkv,n],"data_offsets":[<start>,<end>]},
     "positions":{"dtype":"I64","shape":[n],"data_offsets":[<start>,<end>]},
     "inv_freq":{"dtype":"F32","shape":[rotary_dim / 2],"data_offsets":[<start>,<end>]}}

``scales`` is present if kv is I8 or F8_E4M3; ``inv_freq`` and ``rope_interleaved`` if the entry's rope
is known. The digest is xxh3-128 over all bytes of the file, with its own 32 digits taken as ``0``, so it
covers every bit. A reader can hash as it reads: length, header, payload.

xxh3 detects accidents, not attacks: protect a store from other writers by its permissions.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from voco_kernels.kv.entry import QUANTIZED_MAX, CompactKV, Rope

VERSION = 1
ALIGNMENT = 4096  # of the payload; 8 + N is a multiple of it
# In Redis, where pages don't matter and memory is precious. Older values there have the other alignment.
COMPACT = 8
MAX_HEADER = 65536  # bytes, including the length word
MAX_FINGERPRINT = 4096  # characters
# Reasons for not serving an entry.
REASONS = ("truncated", "corrupt", "foreign", "version", "model")

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_LENGTH_BYTES = 8
_START = b'{"__metadata__":{"xxh3_128":"'
_DIGEST_DIGITS = 32
_DIGEST_AT = _LENGTH_BYTES + len(_START)
_ZERO_DIGEST = b"0" * _DIGEST_DIGITS

# A header must match two patterns, one for what differs between entries and one for what most of a
# store's entries share. Anything else was not written by ``encode``, and no JSON parser ever sees
# nested, duplicate or absurd input. A size has no sign, no leading zero, no fraction, and is below
# 2**53.
_METADATA = re.compile(
    rb'\{"__metadata__":\{"xxh3_128":"([0-9a-f]{32})","format":"voco-kv","version":"1",'
    rb'"key":"([0-9a-f]{64})","fingerprint":"((?:[ !#-\[\]-\x7f]|\\.)*)",'
    rb'"next_position":"([1-9][0-9]{0,18})"(?:,"rope_interleaved":"(true|false)")?\},'
)
_SIZE = r"([1-9][0-9]{0,14})"
_LAYOUT = re.compile(
    rf'"kv":\{{"dtype":"([A-Z0-9_]+)","shape":\[{_SIZE},2,{_SIZE},{_SIZE},{_SIZE}\],'
    rf'"data_offsets":\[0,{_SIZE}\]\}},'
    rf'(?:"scales":\{{"dtype":"F32","shape":\[{_SIZE},2,{_SIZE},{_SIZE}\],'
    rf'"data_offsets":\[{_SIZE},{_SIZE}\]\}},)?'
    rf'"positions":\{{"dtype":"I64","shape":\[{_SIZE}\],"data_offsets":\[{_SIZE},{_SIZE}\]\}}'
    rf'(?:,"inv_freq":\{{"dtype":"F32","shape":\[{_SIZE}\],"data_offsets":\[{_SIZE},{_SIZE}\]\}})?\}}',
    re.ASCII,
)
_OTHER_VERSION = re.compile(rb'"format":"voco-kv","version":"((?!1")[^"]{0,32})"')
_KEY = re.compile(r"[0-9a-f]{64}")


class EntryError(Exception):
    """These bytes must not be served as the entry that was asked for.

    Attributes:
        reason: one of ``REASONS``: "truncated" (shorter than the header says), "corrupt" (wrong digest
            or layout), "foreign" (not this format, or another key's entry), "version" (of the format),
            "model" (another model's entry).
        detail: what was expected, and what was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


class Header(NamedTuple):
    """An entry's header, consistent in itself and with the entry's size.

    Attributes:
        size: bytes of length word and header; ``kv`` starts here, at a multiple of the alignment.
        tail: offset of what follows ``kv`` (scales, positions, inv_freq), from the start.
        file_size: bytes of the whole entry.
        digest: its xxh3-128, 32 hex digits, not verified yet.
        key, fingerprint, next_position: as in ``CompactKV``.
        dtype, shape: of ``kv``, ``[L, 2, Hkv, n, D]``.
        rotary_half: length of ``inv_freq``; 0 if the rope isn't known.
        interleaved: whether the rope is.
    """

    size: int
    tail: int
    file_size: int
    digest: str
    key: str
    fingerprint: str
    next_position: int
    dtype: torch.dtype
    shape: tuple[int, int, int, int, int]
    rotary_half: int
    interleaved: bool

    @property
    def layer_nbytes(self) -> int:
        """Bytes of one layer's keys and values."""
        return (self.tail - self.size) // self.shape[0]

    def check(self, key: str | None, fingerprint: str | None) -> None:
        """Raises EntryError unless the entry has this key and this model's fingerprint (None: any)."""
        if key is not None and self.key != key:
            raise EntryError(
                "foreign", f"expected the entry of key {key}, got that of key {self.key}"
            )
        if fingerprint is not None and self.fingerprint != fingerprint:
            raise EntryError(
                "model",
                f"expected an entry of the model with fingerprint {fingerprint!r}, got one of "
                f"{self.fingerprint!r}",
            )


def check_key(key: str) -> str:
    """Returns ``key`` if it is valid. Keys are used as file names.

    Raises:
        ValueError: anything but 64 lower-case hex digits.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(
            f"expected a key of 64 lower-case hex digits, got {key!r}; make one with "
            "voco_model.image_key"
        )
    return key


def is_key(key: str) -> bool:
    """Whether ``check_key`` accepts it."""
    return _KEY.fullmatch(key) is not None


def encode(entry: CompactKV, key: str, alignment: int = ALIGNMENT) -> list[bytes | memoryview]:
    """An entry as the parts of a file, in order: header, ``kv``, what follows it.

    The second part is the memory of ``entry.kv`` itself if that is contiguous and on the CPU; otherwise
    a copy.

    Args:
        entry: on any device.
        key: 64 lower-case hex digits, written into the header.
        alignment: of the payload, ``ALIGNMENT`` or ``COMPACT``.

    Raises:
        ValueError: an invalid key, or a fingerprint or position that doesn't fit into a header.
        TypeError: a dtype that the format doesn't have.
    """
    check_key(key)
    if len(entry.fingerprint) > MAX_FINGERPRINT:
        raise ValueError(
            f"expected a fingerprint of up to {MAX_FINGERPRINT} characters, got "
            f"{len(entry.fingerprint)}; use a digest of it"
        )
    if entry.dtype not in _DTYPE_NAMES:
        raise TypeError(
            f"expected kv in one of {', '.join(map(str, _DTYPE_NAMES))}, got {entry.dtype}; use "
            "entry.to(dtype=...)"
        )
    if entry.next_position >= 2**63:
        raise ValueError(
            f"expected next_position below 2**63, got {entry.next_position}; check the entry"
        )
    tensors = {"kv": entry.kv}
    if entry.scales is not None:
        tensors["scales"] = entry.scales
    tensors["positions"] = entry.positions
    if entry.rope is not None:
        tensors["inv_freq"] = entry.rope.inv_freq
    kv, *tail = map(_memory, tensors.values())
    tail = b"".join(tail)

    header = bytearray(_render_header(entry, key, tensors, alignment))
    state = xxhash.xxh3_128(header)
    state.update(kv)
    state.update(tail)
    header[_DIGEST_AT : _DIGEST_AT + _DIGEST_DIGITS] = state.hexdigest().encode()
    return [bytes(header), kv, tail]


def header_size(start: bytes | memoryview, alignment: int = ALIGNMENT) -> int:
    """Bytes of length word and header, from the first 8 bytes of an entry.

    Raises:
        EntryError: fewer bytes, or a length that this format doesn't have.
    """
    if len(start) < _LENGTH_BYTES:
        raise EntryError("truncated", f"expected a length of 8 bytes, got {len(start)} bytes")
    size = _LENGTH_BYTES + int.from_bytes(start[:_LENGTH_BYTES], "little")
    if size % alignment or not _LENGTH_BYTES < size <= MAX_HEADER:
        raise EntryError(
            "foreign",
            f"expected a header whose end is a multiple of {alignment} up to {MAX_HEADER}, got {size}",
        )
    return size


def parse_header(start: bytes | memoryview, file_size: int, alignment: int = ALIGNMENT) -> Header:
    """The header of an entry, from its first bytes.

    All its sizes are checked, against ``file_size`` as well, so it is safe to allocate memory by them.
    The digest is not: see ``Digest``.

    Args:
        start: at least the first ``header_size(start)`` bytes.
        file_size: bytes of the whole entry.
        alignment: ``COMPACT`` also accepts a header padded to ``ALIGNMENT``.

    Raises:
        EntryError: a header that ``encode`` can't have written for a file of that size.
    """
    size = header_size(start, alignment)
    if len(start) < size:
        raise EntryError("truncated", f"expected a header of {size} bytes, got {len(start)}")
    text = bytes(start[_LENGTH_BYTES:size])
    metadata = _METADATA.match(text)
    if metadata is None:
        raise _not_a_header(text)
    digest, key, fingerprint, next_position, interleaved = metadata.groups()
    end = text.rfind(b"}") + 1
    most = (alignment if size % ALIGNMENT else ALIGNMENT) - 1
    if len(text) - end > most or text[end:].strip(b" "):
        raise EntryError("corrupt", f"expected up to {most} spaces, got {text[end:][:1024]}")
    layout = _parse_layout(text[metadata.end() : end])
    if (layout.rotary_half == 0) != (interleaved is None) or int(next_position) >= 2**63:
        raise EntryError(
            "corrupt", f"expected metadata consistent with the tensors, got {text[:1024]}"
        )
    if size + layout.nbytes != file_size:
        raise EntryError(
            "truncated" if file_size < size + layout.nbytes else "corrupt",
            f"expected {size + layout.nbytes} bytes, got {file_size}",
        )
    return Header(
        size=size,
        tail=size + layout.kv_nbytes,
        file_size=file_size,
        digest=digest.decode(),
        key=key.decode(),
        fingerprint=_unescape(fingerprint),
        next_position=int(next_position),
        dtype=layout.dtype,
        shape=layout.shape,
        rotary_half=layout.rotary_half,
        interleaved=interleaved == b"true",
    )


class _Layout(NamedTuple):
    """Contents of the table of tensors: dtype and shape of ``kv``, and the sizes that follow from it."""

    dtype: torch.dtype
    shape: tuple[int, int, int, int, int]
    kv_nbytes: int
    rotary_half: int
    nbytes: int


@functools.lru_cache(maxsize=64)  # takes half the time of a header, and a store has few layouts
def _parse_layout(text: bytes) -> _Layout:
    match = _LAYOUT.fullmatch(text.decode("ascii", "replace"))
    if match is None or match[1] not in _DTYPES:
        raise EntryError("corrupt", f"expected a table of tensors, got {text[:1024]}")
    dtype = _DTYPES[match[1]]
    sizes = [int(group) if group else None for group in match.groups()[1:]]
    layers, heads, tokens, head_dim, kv_nbytes, *rest = sizes
    scales, positions, inv_freq = rest[:5], rest[5:8], rest[8:]

    # Each tensor has exactly one place, without gaps.
    rows = layers * 2 * heads * tokens
    at = rows * head_dim * dtype.itemsize
    expected = [at]
    if dtype in QUANTIZED_MAX:
        expected += [layers, heads, tokens, at, at + 4 * rows]
        at += 4 * rows
    else:
        expected += [None] * len(scales)
    expected += [tokens, at, at + 8 * tokens]
    at += 8 * tokens
    rotary_half = inv_freq[0] or 0
    if rotary_half:
        expected += [rotary_half, at, at + 4 * rotary_half]
        at += 4 * rotary_half
    else:
        expected += [None] * len(inv_freq)
    if [kv_nbytes, *scales, *positions, *inv_freq] != expected or 2 * rotary_half > head_dim:
        raise EntryError("corrupt", f"expected consistent shapes and offsets, got {text[:1024]}")
    return _Layout(dtype, (layers, 2, heads, tokens, head_dim), kv_nbytes, rotary_half, at)


class Digest:
    """The digest of an entry, updated with its bytes in order: the header first, then the payload.

    Args:
        start: the first ``header.size`` bytes.
    """

    __slots__ = ("_state", "update")

    def __init__(self, start: bytes | memoryview) -> None:
        self._state = xxhash.xxh3_128(start[:_DIGEST_AT])
        self.update: Callable[[bytes | memoryview], None] = self._state.update
        self.update(_ZERO_DIGEST)
        self.update(start[_DIGEST_AT + _DIGEST_DIGITS :])

    def check(self, header: Header) -> None:
        """Raises EntryError unless all bytes are as they were written."""
        got = self._state.hexdigest()
        if got != header.digest:
            raise EntryError("corrupt", f"expected xxh3-128 {header.digest}, got {got}")


def decode(
    buffer,
    *,
    key: str | None = None,
    fingerprint: str | None = None,
    alignment: int = ALIGNMENT,
) -> CompactKV:
    """An entry from all its bytes.

    Args:
        buffer: a bytes-like object, C-contiguous. The entry's tensors are views of it if its memory is
            aligned for their dtypes, and keep it alive; don't write to either.
        key, fingerprint: that the entry must have; None accepts any.
        alignment: as for ``parse_header``.

    Raises:
        EntryError: not an intact entry with that key and fingerprint.
    """
    view = memoryview(buffer).cast("B")
    header = parse_header(view[:MAX_HEADER], len(view), alignment)
    header.check(key, fingerprint)
    digest = Digest(view[: header.size])
    digest.update(view[header.size :])
    digest.check(header)
    if view.readonly:
        view = memoryview(np.asarray(_Writable(view)))
    return entry_over(view, header)


def entry_over(buffer, header: Header) -> CompactKV:
    """An entry from all its bytes in a writable buffer, after header and digest were verified.

    Raises:
        EntryError: invalid positions.
    """
    kv = tensor_over(buffer, header.dtype, math.prod(header.shape), header.size)
    return assemble(header, kv.view(header.shape), buffer, header.tail)


def assemble(header: Header, kv: Tensor, buffer, tail: int = 0) -> CompactKV:
    """An entry from its header, ``kv`` on any device, and what follows ``kv`` in the file.

    Args:
        buffer: holds what follows ``kv``; the entry's tensors keep it alive.
        tail: offset of that in the buffer.

    Raises:
        EntryError: invalid positions.
    """
    at, scales, rope = tail, None, None
    if header.dtype in QUANTIZED_MAX:
        rows = math.prod(header.shape[:4])
        scales = tensor_over(buffer, torch.float32, rows, at).view(header.shape[:4]).to(kv.device)
        at += 4 * rows
    tokens = header.shape[3]
    positions = tensor_over(buffer, torch.int64, tokens, at)
    at += 8 * tokens
    if header.rotary_half:
        rope = _rope(bytes(buffer[at : at + 4 * header.rotary_half]), header.interleaved)
    try:
        return CompactKV(
            kv,
            positions,
            header.next_position,
            scales,
            rope,
            fingerprint=header.fingerprint,
            key=header.key,
        )
    except (TypeError, ValueError) as error:
        raise EntryError("corrupt", str(error)) from error


@functools.lru_cache(maxsize=64)  # a model's entries share one
def _rope(inv_freq: bytes, interleaved: bool) -> Rope:
    return Rope(tensor_over(bytearray(inv_freq), torch.float32), interleaved)


def tensor_over(buffer, dtype: torch.dtype, count: int = -1, offset: int = 0) -> Tensor:
    """A flat tensor of ``count`` values (-1: all), starting at byte ``offset``. It keeps ``buffer``
    alive.

    It is a copy if the values aren't aligned for the dtype.
    """
    tensor = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)
    return tensor.clone() if tensor.data_ptr() % dtype.itemsize else tensor


class _Writable:
    """Presents a read-only buffer as writable, because torch warns about read-only ones.

    Nothing writes to it: entries are values. NumPy keeps this object alive, and so the buffer.
    """

    __slots__ = ("__array_interface__", "_buffer")

    def __init__(self, view: memoryview) -> None:
        self._buffer = view
        readonly = np.frombuffer(view, np.uint8).__array_interface__
        self.__array_interface__ = {**readonly, "data": (readonly["data"][0], False)}


def _memory(tensor: Tensor) -> memoryview:
    """A tensor's bytes: its own memory if it is contiguous and on the CPU, otherwise a copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())


def _render_header(entry: CompactKV, key: str, tensors: dict[str, Tensor], alignment: int) -> bytes:
    """Length word, JSON and padding, with zeros for the digest."""
    metadata = {
        "xxh3_128": _ZERO_DIGEST.decode(),
        "format": "voco-kv",
        "version": str(VERSION),
        "key": key,
        "fingerprint": entry.fingerprint,
        "next_position": str(int(entry.next_position)),
    }
    if entry.rope is not None:
        metadata["rope_interleaved"] = "true" if entry.rope.interleaved else "false"
    names = {**_DTYPE_NAMES, torch.int64: "I64"}
    fields: dict[str, dict] = {"__metadata__": metadata}
    at = 0
    for name, tensor in tensors.items():
        fields[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode("ascii")
    padding = -(_LENGTH_BYTES + len(text)) % alignment
    length = len(text) + padding
    return length.to_bytes(_LENGTH_BYTES, "little") + text + b" " * padding


def _not_a_header(text: bytes) -> EntryError:
    if not text.startswith(_START):
        return EntryError("foreign", f"expected a header that starts {_START}, got {text[:64]}")
    if other := _OTHER_VERSION.search(text, 0, 256):
        return EntryError("version", f"expected version {VERSION} of the format, got {other[1]}")
    return EntryError(
        "corrupt", f"expected a header of version {VERSION}, got {text[:1024].rstrip()}"
    )


def _unescape(text: bytes) -> str:
    if b"\\" not in text:
        return text.decode("ascii")
    try:
        return json.loads(b'"' + text + b'"')
    except ValueError as error:
        raise EntryError("corrupt", f"expected a fingerprint in JSON, got {text[:1024]}") from error
