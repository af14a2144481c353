"""``CompactKV`` and ``Rope``: checks, quantization, rotation, pickling."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voco_kernels.kv.entry import QUANTIZED_MAX, CompactKV, Rope

EPS = torch.finfo(torch.float32).eps


def make_entry(tokens=3, layers=4, heads=2, head_dim=16, dtype=torch.float32, rope=None, seed=0):
    kv = torch.randn(
        layers, 2, heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed)
    )
    return CompactKV(kv.to(dtype), torch.arange(7, 7 + tokens), 7 + tokens, rope=rope)


def llama_rope(rotary_dim=16, interleaved=False):
    return Rope(10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim), interleaved)


def test_one_token_of_llava_7b_takes_half_a_megabyte():
    kv = torch.empty(32, 2, 32, 1, 128, dtype=torch.bfloat16, device="meta")
    assert kv.nbytes == 524_288  # Table 7 of the paper, in bytes


def test_a_value_with_its_sizes():
    entry = CompactKV(torch.zeros(3, 2, 4, 5, 16), torch.arange(10, 15), 15)
    assert (entry.num_layers, entry.num_kv_heads, entry.num_tokens, entry.head_dim) == (3, 4, 5, 16)
    assert entry.nbytes == 3 * 2 * 4 * 5 * 16 * 4
    assert entry.to("cpu") is entry
    assert entry.to(dtype=torch.float16).nbytes == entry.nbytes // 2
    assert "5 tokens, 3 layers, 4 heads of 16, float32 on cpu" in repr(entry)
    with pytest.raises(AttributeError):
        entry.next_position = 3


@pytest.mark.parametrize(
    ("kv", "positions", "next_position", "error", "message"),
    [
        (torch.zeros(3, 4, 5, 16), torch.arange(5), 5, ValueError, r"got \[3, 4, 5, 16\]"),
        (torch.zeros(3, 2, 4, 0, 16), torch.arange(0), 5, ValueError, "at least one token"),
        (torch.zeros(3, 2, 4, 5, 16).long(), torch.arange(5), 5, TypeError, "torch.int64"),
        (
            torch.zeros(3, 2, 4, 5, 16).char(),
            torch.arange(5),
            5,
            ValueError,
            "float32 scales .* None",
        ),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(5).int(), 5, TypeError, "torch.int32"),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(4), 5, ValueError, r"5 tokens .* \[4\]"),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(5), 4, ValueError, "next_position 4"),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(5), 5.5, TypeError, "as an int, got 5.5"),
        (torch.zeros(3, 2, 4, 5, 16), torch.arange(5).flip(0), 9, ValueError, "that rise"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(kv, positions, next_position, error, message):
    with pytest.raises(error, match=message):
        CompactKV(kv, positions, next_position)


def test_scales_belong_to_8_bits():
    scales = torch.ones(4, 2, 2, 3)
    with pytest.raises(ValueError, match="no scales with kv in torch.float32"):
        CompactKV(torch.zeros(4, 2, 2, 3, 16), torch.arange(3), 3, scales)
    with pytest.raises(ValueError, match=r"float32 scales \[4, 2, 2, 3\].*got .*\[4, 2, 2, 1\]"):
        CompactKV(
            torch.zeros(4, 2, 2, 3, 16, dtype=torch.int8), torch.arange(3), 3, scales[..., :1]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("quantized", list(QUANTIZED_MAX), ids=str)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), log_size=st.floats(-30, 4))
def test_quantization_errors_are_within_the_documented_bounds(dtype, quantized, seed, log_size):
    entry = make_entry(seed=seed)
    # rows of very different sizes: each has its own scale
    sizes = 2.0 ** (log_size * torch.rand(4, 2, 2, 3, 1, generator=torch.manual_seed(seed)))
    entry = CompactKV((entry.kv * sizes).to(dtype), entry.positions, entry.next_position)
    small = entry.quantize(quantized)
    assert small.nbytes == entry.kv.numel() + 4 * entry.kv[..., 0].numel()
    values = entry.kv.double()
    back = small.dequantize(torch.float64).kv
    largest = values.abs().amax(-1, keepdim=True)
    if quantized == torch.int8:
        bound = largest / 254
    else:
        bound = torch.maximum(values.abs() / 16, largest / 448 / 1024)
    # In float32, the scale, the quotient and the product are rounded, and the scale of a row of tiny
    # numbers is the least normal number.
    slack = 4 * EPS * largest + torch.finfo(torch.float32).tiny
    assert ((back - values).abs() <= bound + slack).all()


@pytest.mark.parametrize("quantized", list(QUANTIZED_MAX), ids=str)
def test_quantization_keeps_zeros_and_the_largest_value(quantized):
    entry = make_entry()
    entry.kv[1, 0, 1] = 0
    back = entry.quantize(quantized).dequantize(torch.float32)
    assert (back.kv[1, 0, 1] == 0).all()
    largest = entry.kv.abs().amax(-1)
    torch.testing.assert_close(back.kv.abs().amax(-1), largest, rtol=2 * EPS, atol=0)
    assert back.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert back.scales is None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda entry: entry.quantize(torch.int16), "expected torch.int8 or torch.float8_e4m3fn"),
        (lambda entry: entry.quantize().quantize(), "dequantize it first"),
        (lambda entry: entry.dequantize(), "expected a quantized entry"),
        (lambda entry: entry.quantize().dequantize(torch.int32), "expected a floating dtype"),
        (lambda entry: entry.to(dtype=torch.int8), "use quantize"),
        (lambda entry: entry.rotated(3), "expected an entry that knows its rope"),
        (lambda entry: Rope(torch.ones(2, 2)), r"expected inv_freq as \[rotary_dim / 2\]"),
        (lambda entry: make_entry(rope=llama_rope(32)), "expected a rotary_dim up to head_dim 16"),
    ],
)
def test_operations_that_an_entry_does_not_support_are_refused(what, message):
    with pytest.raises(ValueError, match=message):
        what(make_entry())


def test_infinity_is_not_quantized():
    entry = make_entry()
    entry.kv[0, 1, 0, 0, 3] = torch.inf
    with pytest.raises(ValueError, match="expected finite keys and values"):
        entry.quantize()


def rotate_fp64(keys, shift, inv_freq, interleaved):
    """Rotation by complex numbers, one pair of dimensions at a time."""
    keys, half = keys.double(), len(inv_freq)
    out = keys.clone()
    for i, frequency in enumerate(inv_freq.double()):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = torch.complex(keys[..., a], keys[..., b]) * torch.exp(
            1j * (shift.double() * frequency)
        )
        out[..., a], out[..., b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keys_are_rotated_as_in_fp64(dtype, rotary_dim, interleaved):
    entry = make_entry(dtype=dtype, rope=llama_rope(rotary_dim, interleaved))
    positions = torch.tensor([7, 1500, 100_003])
    moved = entry.rotated(positions)
    shift = positions - entry.positions
    truth = rotate_fp64(entry.kv[:, 0], shift, entry.rope.inv_freq, interleaved)
    # one rounding to the dtype, and those of cosine, sine, two products and their sum in float32
    unit = torch.finfo(dtype).eps / 2
    working = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = unit * truth.abs() + 4 * working * entry.kv[:, 0].double().abs().amax(-1, keepdim=True)
    assert ((moved.kv[:, 0].double() - truth).abs() <= bound).all()
    assert torch.equal(moved.kv[:, 1], entry.kv[:, 1])
    assert torch.equal(moved.kv[:, 0, :, 0], entry.kv[:, 0, :, 0])  # it stayed where it was
    assert moved.positions.tolist() == positions.tolist()
    assert moved.next_position == 100_004
    assert entry.rotated(7).kv.equal(entry.kv)


def test_rotating_there_and_back_changes_nothing():
    entry = make_entry(dtype=torch.float64, rope=llama_rope())
    there_and_back = entry.rotated(4000).rotated(7)
    torch.testing.assert_close(there_and_back.kv, entry.kv, rtol=0, atol=1e-14)
    assert there_and_back.positions.equal(entry.positions)


def test_ropes_are_the_same_by_value():
    assert llama_rope().same(llama_rope())
    assert not llama_rope().same(llama_rope(interleaved=True))
    assert not llama_rope().same(llama_rope(8))
    assert not llama_rope().same(None)


def test_values_that_would_become_infinite_are_not_quantized():
    largest = torch.finfo(torch.bfloat16).max
    kv = torch.full((1, 2, 1, 1, 4), largest)
    for quantized in QUANTIZED_MAX:
        back = CompactKV(kv, torch.tensor([5]), 6).quantize(quantized).dequantize()
        assert torch.equal(back.kv, kv.bfloat16())
        for value in (3.4e38, torch.finfo(torch.float32).max):
            entry = CompactKV(kv.clone().fill_(value), torch.tensor([5]), 6)
            with pytest.raises(ValueError, match=r"up to 3\.39e\+38.*got 3\.4"):
                entry.quantize(quantized)
        with pytest.raises(ValueError, match=r"got 1e\+300; keep this entry in torch.float64"):
            CompactKV(kv.double() / kv * 1e300, torch.tensor([5]), 6).quantize(quantized)


def test_dequantizing_to_a_dtype_that_is_too_small_is_refused():
    entry = CompactKV(torch.full((1, 2, 1, 1, 4), 1e6), torch.tensor([5]), 6).quantize()
    with pytest.raises(ValueError, match="float16's largest, got 1e\\+06"):
        entry.dequantize(torch.float16)
    assert entry.dequantize(torch.float32).kv.max() == pytest.approx(1e6, rel=1 / 254)


# --- pickled, copied, saved

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, *QUANTIZED_MAX]


def entry_in(dtype: torch.dtype, **options) -> CompactKV:
    entry = make_entry(rope=llama_rope(interleaved=True), **options)
    entry = entry.quantize(dtype) if dtype in QUANTIZED_MAX else entry.to(dtype=dtype)
    names = {"fingerprint": "model", "key": "ab" * 32}
    return CompactKV(
        entry.kv, entry.positions, entry.next_position, entry.scales, entry.rope, **names
    )


def assert_same(got: CompactKV, expected: CompactKV) -> None:
    assert (got.dtype, got.kv.shape) == (expected.dtype, expected.kv.shape)
    assert torch.equal(got.kv.view(torch.uint8), expected.kv.contiguous().view(torch.uint8))
    assert (got.scales is None) == (expected.scales is None)
    assert got.scales is None or torch.equal(got.scales, expected.scales)
    assert torch.equal(got.positions, expected.positions)
    assert got.rope.same(expected.rope)
    for name in ("next_position", "fingerprint", "key"):
        assert getattr(got, name) == getattr(expected, name)


def saved(entry: CompactKV) -> io.BytesIO:
    file = io.BytesIO()
    torch.save({"entry": entry}, file)
    file.seek(0)
    return file


WAYS = {
    **{
        f"pickle {protocol}": lambda entry, protocol=protocol: pickle.loads(
            pickle.dumps(entry, protocol)
        )
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "torch.save": lambda entry: torch.load(saved(entry), weights_only=True)["entry"],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_is_copied_pickled_and_saved(way, dtype):
    entry = entry_in(dtype)
    assert_same(way(entry), entry)


def test_a_deep_copy_has_memory_of_its_own_and_a_copy_does_not():
    for dtype in DTYPES:
        entry = entry_in(dtype)
        assert copy.copy(entry).kv.data_ptr() == entry.kv.data_ptr()
        assert copy.deepcopy(entry).kv.data_ptr() != entry.kv.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_are_pickled_without_the_rest_of_their_memory(dtype):
    """Views: some layers of a larger tensor, and a tensor that isn't contiguous."""
    whole = entry_in(dtype, layers=40)
    scales = None if whole.scales is None else whole.scales[3:5]
    for kv in (whole.kv[3:5], whole.kv[3:5].transpose(2, 3).contiguous().transpose(2, 3)):
        part = CompactKV(kv, whole.positions, whole.next_position, scales, whole.rope)
        pickled = pickle.dumps(part)
        assert len(pickled) < part.nbytes + 4096
        assert_same(pickle.loads(pickled), part)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_read_only_memory_is_pickled(tmp_path, dtype):
    entry = entry_in(dtype)
    data = entry.kv.view(torch.uint8).numpy().tobytes()
    read_only = torch.frombuffer(data, dtype=dtype).view(entry.kv.shape)
    (tmp_path / "kv").write_bytes(data)
    mapped = torch.from_file(
        str(tmp_path / "kv"), shared=False, size=entry.kv.numel(), dtype=dtype
    ).view(entry.kv.shape)
    for kv in (read_only, mapped):
        given = CompactKV(
            kv,
            entry.positions,
            entry.next_position,
            entry.scales,
            entry.rope,
            fingerprint=entry.fingerprint,
            key=entry.key,
        )
        for way in WAYS.values():
            assert_same(way(given), entry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_is_mapped(tmp_path, dtype):
    torch.save(entry_in(dtype), tmp_path / "entry.pt")
    mapped = torch.load(tmp_path / "entry.pt", mmap=True, weights_only=True)
    assert_same(mapped, entry_in(dtype))
    for way in WAYS.values():
        assert_same(way(mapped), entry_in(dtype))


def _echo(connection) -> None:
    entry = connection.recv()
    connection.send(entry)
    connection.recv()  # keeps the shared tensors alive until they were received


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_an_entry_goes_to_another_process_and_back(dtype):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_echo, args=(theirs,), daemon=True)
    process.start()
    ours.send(entry_in(dtype))
    assert ours.poll(20)
    assert_same(ours.recv(), entry_in(dtype))
    ours.send("done")
    process.join(20)
    assert process.exitcode == 0


def test_a_process_that_only_imports_the_package_loads_an_entry(tmp_path):
    torch.save(entry_in(torch.float8_e4m3fn), tmp_path / "entry.pt")
    code = f"import torch, voco_kernels; print(torch.load({str(tmp_path / 'entry.pt')!r}).dtype)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "torch.float8_e4m3fn\n"


class _Before:
    """Pickles an entry as its dataclass was pickled before it had ``__reduce__``."""

    def __init__(self, entry) -> None:
        self.entry = entry

    def __reduce__(self):
        return copy_of_class, (type(self.entry),), dict(self.entry.__dict__)


def copy_of_class(kind):
    return kind.__new__(kind)


def test_unpickled_entries_are_checked():
    entry = entry_in(torch.bfloat16)
    assert_same(pickle.loads(pickle.dumps(_Before(entry))), entry)
    bad = copy.copy(entry)
    object.__setattr__(bad, "next_position", 1)
    for pickled in (pickle.dumps(bad), pickle.dumps(_Before(bad))):
        with pytest.raises(ValueError, match="next_position 1"):
            pickle.loads(pickled)
