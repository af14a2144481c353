"""The Triton loader's kernel: entries to a cache or back, a few rows of an entry a program at a time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pointers(
    addresses,
    TYPE: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """``[rows, BLOCK]``: elements from FIRST on of rows at these addresses."""
    addresses = tl.multiple_of(addresses, ALIGNMENT)
    rows = tl.multiple_of(addresses.to(tl.pointer_type(TYPE)), ALIGNMENT)
    return rows[:, None] + (FIRST + tl.arange(0, BLOCK))[None, :]


@triton.jit
def _load(
    addresses, inside, scales,
    TYPE: tl.constexpr, FIRST: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """``[rows, BLOCK]``: columns [FIRST, STOP) of some rows, in float32; integers of 16 and 32 bits,
    which stand for bits of any type, as they are."""
    pointers = _pointers(addresses, TYPE, FIRST, BLOCK, ALIGNMENT)
    mask = inside[:, None] & (FIRST + tl.arange(0, BLOCK) < STOP)[None, :]
    values = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
    if TYPE == tl.uint8:
        values = _float_from_e4m3(values) * scales[:, None]
    elif TYPE == tl.int8:
        values = values.to(tl.float32) * scales[:, None]
    elif TYPE != tl.int16 and TYPE != tl.int32:
        values = values.to(tl.float32)
    return values


@triton.jit
def _store(
    addresses, inside, values,
    TYPE: tl.constexpr, FIRST: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    pointers = _pointers(addresses, TYPE, FIRST, BLOCK, ALIGNMENT)
    mask = inside[:, None] & (FIRST + tl.arange(0, BLOCK) < STOP)[None, :]
    tl.store(pointers, values.to(TYPE), mask=mask)


@triton.jit
def _float_from_e4m3(bits):
    """By integer arithmetic, since chips before sm_89 don't know the type; exact."""
    bits = bits.to(tl.int32)
    fraction = bits & 7
    # The exponent's bias is 7 there and 127 here; below 2**-6, eighths of it.
    normal = (((bits & 0x7F) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where((bits & 0x78) == 0, fraction.to(tl.float32) * 0.001953125, normal)
    magnitude = tl.where((bits & 0x7F) == 0x7F, float("nan"), magnitude)
    return (magnitude.to(tl.int32, bitcast=True) | ((bits & 0x80) << 24)).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _cos_sin(shift, inv_freq):
    """Of shift * inv_freq radians, both off by less than 1.5 * 2**-24: see turn_of in csrc/kv_load.cu,
    which this repeats."""
    # Not bare numbers, which some versions of Triton would round to float32.
    quarter = tl.full([1, 1], 1.5707963267948966, tl.float64)
    quarters_a_radian = tl.full([1, 1], 0.6366197723675814, tl.float64)
    quarters = shift.to(tl.float64)[:, None] * inv_freq[None, :] * quarters_a_radian
    whole = tl.floor(quarters + 0.5)
    x = ((quarters - whole) * quarter).to(tl.float32)
    z = x * x
    sin = z * (1 / 362880) - 1 / 5040
    sin = z * (z * sin + 1 / 120) - 1 / 6
    sin = x * z * sin + x
    cos = z * (-1 / 3628800) + 1 / 40320
    cos = z * (z * cos - 1 / 720) + 1 / 24
    cos = z * (z * cos - 0.5) + 1.0
    turn = whole.to(tl.int64).to(tl.int32) & 3
    odd = (turn & 1) != 0
    c, s = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((turn == 1) | (turn == 2), -c, c), tl.where(turn >= 2, -s, s)


@triton.jit
def _rotate(a, b, shift, inv_freq, NUM_PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """``[rows, BLOCK]`` each: the pairs (a, b) turned by ``shift``, those of a shift of 0 to the bit."""
    if tl.sum((shift != 0).to(tl.int32), 0) > 0:
        pair = tl.arange(0, BLOCK)
        frequency = tl.load(inv_freq + pair, mask=pair < NUM_PAIRS, other=0.0)
        cos, sin = _cos_sin(shift, frequency)
        moved = (shift != 0)[:, None]
        turned = tl.where(moved, a * cos - b * sin, a)
        b = tl.where(moved, b * cos + a * sin, b)
        a = turned
    return a, b


@triton.jit(
    do_not_specialize=["num_layers", "num_kv_heads", "head_stride", "num_entries", "length"],
    do_not_specialize_on_alignment=["entries", "tokens", "bases", "lengths", "inv_freq"],
)
def move_kernel(
    entries, tokens, bases, lengths, inv_freq,
    num_layers, num_kv_heads, head_stride, num_entries, length,
    TO_CACHE: tl.constexpr, ENTRY_TYPE: tl.constexpr, CACHE_TYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, ROTARY_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """One move (``kv_move.Move``), whose tables these are; ``lengths`` and ``inv_freq`` may be None.

    An entry has an equal share of the programs; where there are ``lengths``, one more program writes
    there. Types are those of elements, uint8 for float8_e4m3fn; int16 or int32 in both means a copy.
    ROTARY_BLOCK and REST_BLOCK are powers of two: of the columns that turn (of half of them unless
    INTERLEAVED) and of the others; there is always one of the two at least.
    """
    ENTRY_BYTES: tl.constexpr = ENTRY_TYPE.primitive_bitwidth // 8
    CACHE_BYTES: tl.constexpr = CACHE_TYPE.primitive_bitwidth // 8
    ENTRY_ALIGNMENT: tl.constexpr = 8 if ENTRY_BYTES == 1 else 16
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if lengths is not None:
        programs -= 1
        if program == programs:
            for start in tl.range(0, num_layers, ROWS):
                layer = start + tl.arange(0, ROWS)
                counts = tl.load(lengths + layer, mask=layer < num_layers, other=0)
                counts = counts.to(tl.pointer_type(tl.int64))
                tl.store(counts, tl.cast(length, tl.int64), mask=layer < num_layers)
            return
    programs = programs // num_entries
    columns = entries + program // programs * 4
    data, scales_of_entry = tl.load(columns), tl.load(columns + 1)
    first, num_tokens = tl.load(columns + 2), tl.load(columns + 3).to(tl.int32)
    num_rows = 2 * num_layers * num_kv_heads * num_tokens
    for start in tl.range(program % programs * ROWS, num_rows, programs * ROWS, disable_licm=True):
        row = start + tl.arange(0, ROWS)
        inside = row < num_rows
        heads = row // num_tokens  # of all layers' keys and values
        token = row % num_tokens
        plane = heads // num_kv_heads  # layer * 2 + c
        place = tokens + (first + token) * 2
        base = tl.load(bases + plane, mask=inside, other=0)
        offset = tl.load(place, mask=inside, other=0)
        offset += (heads % num_kv_heads).to(tl.int64) * head_stride
        in_cache = base + offset * CACHE_BYTES
        in_entry = data + row.to(tl.int64) * (HEAD_DIM * ENTRY_BYTES)
        if not TO_CACHE:
            values = _load(
                in_cache, inside, None, CACHE_TYPE, 0, HEAD_DIM, REST_BLOCK, 16
            )  # fmt: skip
            _store(in_entry, inside, values, ENTRY_TYPE, 0, HEAD_DIM, REST_BLOCK, ENTRY_ALIGNMENT)
        else:
            scales = None
            if ENTRY_BYTES == 1:
                scales = (scales_of_entry + row.to(tl.int64) * 4).to(tl.pointer_type(tl.float32))
                # A comparison with a scalar: newer interpreters refuse "block & scalar" as a mask.
                scaled_rows = tl.where(scales_of_entry != 0, num_rows, 0)
                scales = tl.load(scales, mask=row < scaled_rows, other=1.0)
            if ROTARY_DIM > 0:
                is_key = inside & (plane % 2 == 0)
                shift = tl.load(place + 1, mask=is_key, other=0)
                HALF: tl.constexpr = ROTARY_DIM // 2
                if INTERLEAVED:
                    pairs = _load(
                        in_entry, inside, scales,
                        ENTRY_TYPE, 0, ROTARY_DIM, ROTARY_BLOCK, ENTRY_ALIGNMENT,
                    )  # fmt: skip
                    a, b = tl.split(pairs.reshape(ROWS, ROTARY_BLOCK // 2, 2))
                    a, b = _rotate(a, b, shift, inv_freq, HALF, ROTARY_BLOCK // 2)
                    pairs = tl.join(a, b).reshape(ROWS, ROTARY_BLOCK)
                    _store(in_cache, inside, pairs, CACHE_TYPE, 0, ROTARY_DIM, ROTARY_BLOCK, 16)
                else:
                    a = _load(
                        in_entry, inside, scales,
                        ENTRY_TYPE, 0, HALF, ROTARY_BLOCK, ENTRY_ALIGNMENT,
                    )  # fmt: skip
                    b = _load(
                        in_entry, inside, scales,
                        ENTRY_TYPE, HALF, ROTARY_DIM, ROTARY_BLOCK, ENTRY_ALIGNMENT,
                    )  # fmt: skip
                    a, b = _rotate(a, b, shift, inv_freq, HALF, ROTARY_BLOCK)
                    _store(in_cache, inside, a, CACHE_TYPE, 0, HALF, ROTARY_BLOCK, 16)
                    _store(in_cache, inside, b, CACHE_TYPE, HALF, ROTARY_DIM, ROTARY_BLOCK, 16)
            if ROTARY_DIM < HEAD_DIM:
                rest = _load(
                    in_entry, inside, scales,
                    ENTRY_TYPE, ROTARY_DIM, HEAD_DIM, REST_BLOCK, ENTRY_ALIGNMENT,
                )  # fmt: skip
                _store(in_cache, inside, rest, CACHE_TYPE, ROTARY_DIM, HEAD_DIM, REST_BLOCK, 16)
