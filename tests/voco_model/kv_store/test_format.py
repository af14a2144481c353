"""The entry format: round trips are exact, and every change to the bytes is detected."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from tests.voco_model.kv_store.samples import assert_same, make_entry, make_key
from voco_kernels.kv.entry import Rope
from voco_model.kv_store import format as kv_format
from voco_model.kv_store.format import (
    COMPACT,
    REASONS,
    Digest,
    EntryError,
    check_key,
    decode,
    encode,
    header_size,
    parse_header,
)

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.float8_e4m3fn,
)
NAMES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
}


def to_bytes(entry, key=None) -> bytes:
    return b"".join(encode(entry, key or entry.key))


def read_by_the_book(data: bytes) -> tuple[dict, dict]:
    """Reads metadata and tensors by the documented format, without the package's code."""
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % 4096 == 0
    text = data[8 : 8 + length]
    assert text.startswith(b'{"__metadata__":{"xxh3_128":"') and data[37:69].isalnum()
    digest = xxhash.xxh3_128_hexdigest(data[:37] + b"0" * 32 + data[69:])
    assert data[37:69].decode() == digest
    fields = json.loads(text)
    metadata = fields.pop("__metadata__")
    payload, at, tensors = data[8 + length :], 0, {}
    for name, field in fields.items():
        start, stop = field["data_offsets"]
        assert start == at, "a hole"
        flat = torch.frombuffer(bytearray(payload[start:stop]), dtype=NAMES[field["dtype"]])
        tensors[name] = flat.reshape(field["shape"])
        at = stop
    assert at == len(payload)
    return metadata, tensors


def with_header(data: bytes, text: bytes, *, digest: bool = True) -> bytes:
    """The file with another JSON text, padded, with a valid digest."""
    size = header_size(data)
    text += b" " * (-(8 + len(text)) % 4096)
    changed = bytearray(struct.pack("<Q", len(text)) + text + data[size:])
    if digest:
        changed[37:69] = b"0" * 32
        changed[37:69] = xxhash.xxh3_128_hexdigest(changed).encode()
    return bytes(changed)


def json_of(data: bytes) -> bytes:
    return data[8 : header_size(data)].rstrip(b" ")


def refuse(data: bytes, **asked) -> str:
    with pytest.raises(EntryError) as refused:
        decode(data, **asked)
    assert refused.value.reason in REASONS
    return refused.value.reason


@pytest.mark.parametrize("rope", ["none", "halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_comes_back_to_the_bit(dtype, rope):
    entry = make_entry(3, tokens=3, layers=3, dtype=dtype)
    ropes = {"none": None, "halves": entry.rope, "interleaved": Rope(entry.rope.inv_freq, True)}
    entry = replace(entry, rope=ropes[rope])
    data = to_bytes(entry)
    for buffer in (data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        assert_same(decode(buffer, key=entry.key, fingerprint="model-a"), entry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_comes_back(dtype):
    """NaNs with their payloads, negative zeros, denormals."""
    pattern = torch.arange(65536, dtype=torch.int32).repeat(2).view(torch.uint8)
    kv = pattern.view(dtype).view(2, 2, 2, 4, -1)
    entry = make_entry(0, tokens=4, dtype=dtype)
    entry = replace(entry, kv=kv)
    assert torch.equal(decode(to_bytes(entry)).kv.view(torch.uint8), kv.view(torch.uint8))


@pytest.mark.parametrize("head_dim", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes_come_back(dtype, head_dim):
    """What follows kv isn't aligned here, nor is anything in a buffer at an odd address."""
    entry = make_entry(1, tokens=1, layers=1, dtype=torch.float32)
    entry = replace(entry, kv=entry.kv[:, :, :1, :, :head_dim], rope=None)
    entry = entry.quantize(dtype) if dtype.itemsize == 1 else entry.to(dtype=dtype)
    data = to_bytes(entry)
    assert_same(decode(data), entry)
    assert_same(decode(memoryview(bytearray(b"x" + data))[1:]), entry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_program_reads_it(dtype):
    entry = make_entry(5, tokens=2, dtype=dtype)
    metadata, tensors = read_by_the_book(to_bytes(entry))
    del metadata["xxh3_128"]
    assert metadata == {
        "format": "voco-kv",
        "version": "1",
        "key": entry.key,
        "fingerprint": "model-a",
        "next_position": "7",
        "rope_interleaved": "false",
    }
    expected = {"kv": entry.kv, "positions": entry.positions, "inv_freq": entry.rope.inv_freq}
    if entry.scales is not None:
        expected["scales"] = entry.scales
    for read in (tensors, load(to_bytes(entry))):
        assert set(read) == set(expected)
        for name, tensor in expected.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_bytes_of_a_small_entry():
    """Bytes written by hand. If this fails, the version of the format has to change."""
    kv = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 4.0, 5.0, -0.0]).bfloat16().view(1, 2, 1, 2, 2)
    entry = replace(
        make_entry(0, tokens=2, layers=1),
        kv=kv,
        positions=torch.tensor([3, 9]),
        next_position=12,
        rope=Rope(torch.tensor([0.25]), interleaved=True),
        fingerprint='a "quoted" one',
    )
    text = (
        '{"__metadata__":{"xxh3_128":"%s","format":"voco-kv","version":"1",'
        f'"key":"{"0f" * 32}","fingerprint":"a \\"quoted\\" one","next_position":"12",'
        '"rope_interleaved":"true"},'
        '"kv":{"dtype":"BF16","shape":[1,2,1,2,2],"data_offsets":[0,16]},'
        '"positions":{"dtype":"I64","shape":[2],"data_offsets":[16,32]},'
        '"inv_freq":{"dtype":"F32","shape":[1],"data_offsets":[32,36]}}'
    )

    def by_hand(digest: str) -> bytes:
        padded = (text % digest).encode().ljust(4096 - 8)
        payload = struct.pack("<8H", *(0x3F80, 0xC000, 0x3F00, 0, 0x4040, 0x4080, 0x40A0, 0x8000))
        payload += struct.pack("<2q", 3, 9) + struct.pack("<f", 0.25)
        return struct.pack("<Q", 4088) + padded + payload

    expected = by_hand(xxhash.xxh3_128_hexdigest(by_hand("0" * 32)))
    assert to_bytes(entry, "0f" * 32) == expected
    assert xxhash.xxh64_hexdigest(expected) == "5faf9e329faecc74"


def test_the_payload_is_aligned_and_kv_is_not_copied():
    for fingerprint in ("", "m" * 3000, "ü" * 4096):
        entry = make_entry(1, fingerprint=fingerprint)
        header, kv, _ = encode(entry, entry.key)
        assert len(header) % 4096 == 0
        assert np.frombuffer(kv, np.uint8).ctypes.data == entry.kv.data_ptr()
        assert_same(decode(to_bytes(entry)), entry)


def test_decode_doesnt_copy_kv():
    entry = make_entry(1)
    for data in (to_bytes(entry), bytearray(to_bytes(entry))):
        address = np.frombuffer(data, np.uint8).ctypes.data
        decoded = decode(data)
        assert decoded.kv.data_ptr() == address + 4096
        del data
        assert_same(decoded, entry)  # which keeps the memory alive


def test_any_layout_in_memory_is_encoded_alike():
    entry = make_entry(1, tokens=4)
    strided = entry.kv.transpose(2, 3).contiguous().transpose(2, 3)
    leaf = entry.kv.clone().requires_grad_()
    assert not strided.is_contiguous()
    for kv in (strided, leaf):
        assert to_bytes(replace(entry, kv=kv)) == to_bytes(entry)


def test_the_header_says_where_everything_is():
    entry = make_entry(4, tokens=3, layers=2, dtype=torch.int8)
    data = to_bytes(entry)
    header = parse_header(data[:4096], len(data))
    assert (header.size, header.tail, header.file_size) == (4096, 4096 + entry.kv.nbytes, len(data))
    assert header.layer_nbytes * 2 == entry.kv.nbytes
    assert (header.dtype, header.shape) == (torch.int8, (2, 2, 2, 3, 16))
    assert (header.rotary_half, header.interleaved) == (8, False)
    digest = Digest(data[:4096])
    for at in range(4096, len(data), 7):
        digest.update(data[at : at + 7])
    digest.check(header)


def test_keys_are_checked():
    assert check_key("0f" * 32) == "0f" * 32
    bad = ("", "0f" * 31, "0F" * 32, "0g" * 32, "../" + "0" * 61, "0f" * 32 + "\n", None, b"0" * 64)
    for key in bad:
        with pytest.raises(ValueError, match="expected a key of 64 lower-case hex digits"):
            check_key(key)
    with pytest.raises(ValueError, match="expected a key"):
        encode(make_entry(1), "../../etc/passwd")


def test_what_a_header_has_no_room_for_is_refused():
    with pytest.raises(ValueError, match="expected a fingerprint of up to 4096"):
        encode(make_entry(1, fingerprint="x" * 4097), make_key(1))
    with pytest.raises(ValueError, match="next_position below 2"):
        encode(replace(make_entry(1), next_position=2**63), make_key(1))


# --- invalid bytes


def test_each_reason():
    entry = make_entry(7)
    data = to_bytes(entry)
    assert refuse(b"") == "truncated"
    assert refuse(data[:7]) == "truncated"
    assert refuse(data[:100]) == "truncated"
    assert refuse(data[:-1]) == "truncated"
    assert refuse(data + b"\0") == "corrupt"
    assert refuse(data[:4200] + bytes([data[4200] ^ 1]) + data[4201:]) == "corrupt"
    assert refuse(b"PK\3\4" + bytes(8188)) == "foreign"
    assert refuse(to_bytes(make_entry(7)).replace(b"xxh3_128", b"sha2_256", 1)) == "foreign"
    assert refuse(data, key=make_key(8)) == "foreign"
    assert refuse(data, key=entry.key, fingerprint="model-b") == "model"
    newer = with_header(data, json_of(data).replace(b'"version":"1"', b'"version":"2"'))
    assert refuse(newer) == "version"
    error = EntryError("corrupt", "detail")
    assert str(error) == "corrupt: detail"


SAMPLES = [
    to_bytes(make_entry(11, tokens=2, layers=2, dtype=torch.int8)),
    to_bytes(make_entry(12, tokens=1, layers=1, dtype=torch.bfloat16)),
    to_bytes(replace(make_entry(13, layers=1, dtype=torch.float8_e4m3fn), rope=None)),
]


def regions(data: bytes) -> dict[str, range]:
    size, at = header_size(data), 0
    fields = json.loads(data[8:size])
    end = 8 + len(json_of(data))
    table = data.index(b'"kv":')
    found = {
        "length": range(0, 8),
        "digest": range(37, 69),
        "metadata": range(69, table),
        "table": range(table, end),
        "padding": range(end, size),
    }
    for name, field in fields.items():
        if name != "__metadata__":
            start, stop = field["data_offsets"]
            found[name] = range(size + start, size + stop)
            at = size + stop
    assert at == len(data)
    return found


@pytest.mark.parametrize("sample", range(len(SAMPLES)))
def test_every_flipped_bit_is_found_outside_kv_and_padding(sample):
    """Each bit of three samples, about 8000."""
    data = bytearray(SAMPLES[sample])
    for name, where in regions(data).items():
        step = 97 if name in ("kv", "padding") else 1
        for at in where[::step]:
            for bit in range(8):
                data[at] ^= 1 << bit
                with pytest.raises(EntryError):
                    decode(data)
                data[at] ^= 1 << bit
    decode(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_are_found_anywhere(draw):
    original = draw.draw(st.sampled_from(SAMPLES))
    data = bytearray(original)
    for _ in range(draw.draw(st.integers(1, 4))):
        where = regions(original)[draw.draw(st.sampled_from(sorted(regions(original))))]
        at = draw.draw(st.sampled_from(where))
        data[at] = draw.draw(st.integers(0, 255))
    if data == original:
        decode(data)
    else:
        refuse(bytes(data))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SAMPLES), st.integers(0, 6000), st.integers(0, 9000))
def test_truncation_extension_and_holes_are_found(data, start, stop):
    cut = data[:start] + data[stop:]
    if cut != data:
        refuse(cut)
    refuse(data[:stop] + data[start:] + b"\0")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=9000))
@example(b"")
@example(b"\xf8\x0f" + bytes(4094))
@example(struct.pack("<Q", 2**64 - 1) + bytes(4088))
@example(struct.pack("<Q", 2**64 - 8) + bytes(4088))
def test_garbage_is_refused(data):
    refuse(data)
    refuse(data, key=make_key(1))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SAMPLES), st.data())
def test_other_headers_with_the_right_digest_are_refused(data, draw):
    """Even with a valid digest, any other spelling of a header is rejected."""
    text = json_of(data)
    numbers = [m for m in range(69, len(text)) if text[m : m + 1].isdigit()]
    at = draw.draw(st.sampled_from(numbers))
    new = draw.draw(
        st.sampled_from([b"-1", b"0", b"9" * 15, b"9" * 400, b"1e3", b"NaN", b"1.0", b"01", b"[]"])
    )
    changed = text[:at] + new + text[at + 1 :]
    changed = with_header(data, changed)
    if changed != data:
        try:
            entry = decode(changed)
        except EntryError:
            return
        # A valid header of another entry: another key or position.
        assert entry.kv.shape == decode(data).kv.shape
        assert changed == b"".join(encode(entry, entry.key))


ADVERSARIAL = {
    "deep": lambda text: b'{"__metadata__":{"xxh3_128":"' + b"0" * 32 + b'",' + b"[" * 20000,
    "doubled tensor": lambda text: text[:-1] + b"," + text[text.index(b'"kv"') :],
    "doubled metadata": lambda text: text.replace(b'"format"', b'"version":"1","format"', 1),
    "an unknown tensor": lambda text: (
        text[:-1] + b',"more":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    ),
    "spaces": lambda text: text.replace(b'":{"dtype', b'": {"dtype'),
    "huge": lambda text: text.replace(b'"shape":[', b'"shape":[' + b"9" * 5000),
    "too large to multiply": lambda text: text.replace(
        b'"shape":[1,2,2,1,16]', b'"shape":[999999999999999,2,999999999999999,999999999999999,9]'
    ),
    "bool": lambda text: text.replace(b'"shape":[1,', b'"shape":[true,'),
    "dtype": lambda text: text.replace(b'"BF16"', b'"U16"'),
    "another dtype of the size": lambda text: text.replace(b'"BF16"', b'"I8"'),
    "holes": lambda text: text.replace(b'"data_offsets":[0,128]', b'"data_offsets":[8,136]'),
    "overlap": lambda text: text.replace(b'"data_offsets":[128,136]', b'"data_offsets":[120,136]'),
    "no rope said": lambda text: text.replace(b',"rope_interleaved":"false"', b""),
    "null in metadata": lambda text: text.replace(b'"next_position":"6"', b'"next_position":null'),
    "bad escape": lambda text: text.replace(b'"model-a"', b'"mode\\qa"'),
    "bad unicode": lambda text: text.replace(b'"model-a"', b'"mo\xffel-a"'),
    "padding of a page more": lambda text: text + b" " * 4096,
    "a position past the text": lambda text: text.replace(
        b'"next_position":"6"', b'"next_position":"5"'
    ),
    "a position past int64": lambda text: text.replace(
        b'"next_position":"6"', b'"next_position":"9999999999999999999"'
    ),
    "nothing": lambda text: b"",
    "brace": lambda text: b"{",
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_headers_are_refused(name):
    data = SAMPLES[1]
    changed = with_header(data, ADVERSARIAL[name](json_of(data)))
    assert changed != data, "the sample has changed, this test has not"
    refuse(changed)


def test_nothing_is_allocated_by_what_a_header_says(monkeypatch):
    data = with_header(SAMPLES[1], ADVERSARIAL["too large to multiply"](json_of(SAMPLES[1])))
    monkeypatch.setattr(kv_format, "tensor_over", None)
    refuse(data)
    with pytest.raises(EntryError):
        parse_header(SAMPLES[1][:4096], 2**62)


def test_a_compact_header_is_read_only_on_request():
    entry = make_entry(1, tokens=3)
    compact = b"".join(encode(entry, entry.key, COMPACT))
    padded = b"".join(encode(entry, entry.key))
    assert len(compact) < len(padded) - 3000
    for data in (compact, padded):
        assert_same(decode(data, alignment=COMPACT), entry)
        assert {name for name in load(data)} == {"kv", "positions", "inv_freq"}
    with pytest.raises(EntryError, match="foreign"):
        decode(compact)
    # A header with more padding than necessary is invalid.
    (length,) = struct.unpack_from("<Q", compact)
    longer = struct.pack("<Q", length + 8) + compact[8 : 8 + length] + b" " * 8
    with pytest.raises(EntryError, match="expected up to 7 spaces"):
        decode(longer + compact[8 + length :], alignment=COMPACT)
