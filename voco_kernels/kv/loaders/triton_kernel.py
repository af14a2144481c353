"""The Triton loader's kernel: a tile of an entry's rows per program, into a cache or out of it."""

from __future__ import annotations

import triton
import triton.language as tl

from voco_kernels.kv import move

# The columns of the tables (voco_kernels/kv/move.py).
KV_ADDRESS = tl.constexpr(move.KV_ADDRESS)
SCALES_ADDRESS = tl.constexpr(move.SCALES_ADDRESS)
FIRST_TOKEN = tl.constexpr(move.FIRST_TOKEN)
NUM_TOKENS = tl.constexpr(move.NUM_TOKENS)
ENTRY_COLUMNS = tl.constexpr(move.ENTRY_COLUMNS)
OFFSET = tl.constexpr(move.OFFSET)
SHIFT = tl.constexpr(move.SHIFT)
TOKEN_COLUMNS = tl.constexpr(move.TOKEN_COLUMNS)

# Alignment of rows, in bytes. Rows of 8-bit entries have half as many bytes as 16-bit ones.
ALIGNMENT = tl.constexpr(move.ALIGNMENT)
ALIGNMENT_OF_8_BITS = tl.constexpr(move.ALIGNMENT // 2)
SCALE_BYTES = tl.constexpr(4)

# float8_e4m3fn: 1 bit of sign, 4 of exponent, 3 of fraction.
E4M3_SIGN = tl.constexpr(0x80)
E4M3_EXPONENT = tl.constexpr(0x78)
E4M3_FRACTION = tl.constexpr(0x07)
E4M3_MAGNITUDE = tl.constexpr(0x7F)  # all ones are NaN
E4M3_LEAST = tl.constexpr(2.0**-9)  # the least subnormal, and the distance between subnormals
E4M3_TO_FLOAT_BITS = tl.constexpr(23 - 3)  # the fraction's place in a float32
E4M3_TO_FLOAT_BIAS = tl.constexpr((127 - 7) << 23)  # what the exponents' biases differ by
SIGN_TO_FLOAT_BITS = tl.constexpr(31 - 7)

QUARTER_TURN = tl.constexpr(1.5707963267948966)  # pi / 2 radians
QUARTERS_PER_RADIAN = tl.constexpr(0.6366197723675814)  # 2 / pi


@triton.jit
def _pointers(
    addresses,
    TYPE: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``[ROWS, BLOCK]``: columns from FIRST on of the rows at these addresses."""
    addresses = tl.multiple_of(addresses, ALIGN)
    rows = tl.multiple_of(addresses.to(tl.pointer_type(TYPE)), ALIGN)
    return rows[:, None] + (FIRST + tl.arange(0, BLOCK))[None, :]


@triton.jit
def _load(
    addresses, inside, scales,
    TYPE: tl.constexpr, FIRST: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """``[ROWS, BLOCK]``: columns [FIRST, STOP) of rows, in float32. Integers of 16 and 32 bits, which
    carry the bits of any type in a copy, are returned unchanged."""
    # [ROWS, BLOCK]
    pointers = _pointers(addresses, TYPE, FIRST, BLOCK, ALIGN)
    mask = inside[:, None] & (FIRST + tl.arange(0, BLOCK) < STOP)[None, :]
    values = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
    if TYPE == tl.uint8:
        # [ROWS, BLOCK] * [ROWS, 1]
        values = _float_from_e4m3(values) * scales[:, None]
    elif TYPE == tl.int8:
        # [ROWS, BLOCK] * [ROWS, 1]
        values = values.to(tl.float32) * scales[:, None]
    elif TYPE != tl.int16 and TYPE != tl.int32:
        values = values.to(tl.float32)
    return values


@triton.jit
def _store(
    addresses, inside, values,
    TYPE: tl.constexpr, FIRST: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Store ``values`` ``[ROWS, BLOCK]`` to columns [FIRST, STOP) of rows."""
    # [ROWS, BLOCK]
    pointers = _pointers(addresses, TYPE, FIRST, BLOCK, ALIGN)
    mask = inside[:, None] & (FIRST + tl.arange(0, BLOCK) < STOP)[None, :]
    tl.store(pointers, values.to(TYPE), mask=mask)


@triton.jit
def _float_from_e4m3(bits):
    """float32 from the bits of float8_e4m3fn, exact; in integers, because chips before sm_89 lack the
    type."""
    # Every tensor here has the shape of ``bits``.
    bits = bits.to(tl.int32)
    normal = ((bits & E4M3_MAGNITUDE) << E4M3_TO_FLOAT_BITS) + E4M3_TO_FLOAT_BIAS
    subnormal = (bits & E4M3_FRACTION).to(tl.float32) * E4M3_LEAST
    magnitude = tl.where(
        (bits & E4M3_EXPONENT) == 0, subnormal, normal.to(tl.float32, bitcast=True)
    )
    magnitude = tl.where((bits & E4M3_MAGNITUDE) == E4M3_MAGNITUDE, float("nan"), magnitude)
    sign = (bits & E4M3_SIGN) << SIGN_TO_FLOAT_BITS
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _cos_sin(shift, inv_freq):
    """``[ROWS, PAIRS]`` each: cosine and sine of ``shift * inv_freq`` radians, with errors below
    1.5 * 2**-24. The same computation as turn_of in csrc/kv_load.cu, where it is explained."""
    # As float64 tensors, since some versions of Triton would round bare numbers to float32.
    quarter_turn = tl.full([1, 1], QUARTER_TURN, tl.float64)
    quarters_per_radian = tl.full([1, 1], QUARTERS_PER_RADIAN, tl.float64)
    # [ROWS, 1] * [1, PAIRS]
    quarters = shift.to(tl.float64)[:, None] * inv_freq[None, :] * quarters_per_radian
    whole = tl.floor(quarters + 0.5)
    x = ((quarters - whole) * quarter_turn).to(tl.float32)
    z = x * x
    # Taylor's series, to x**9 / 9! and x**10 / 10!.
    sin = z * (1 / 362880) - 1 / 5040
    sin = z * (z * sin + 1 / 120) - 1 / 6
    sin = x * z * sin + x
    cos = z * (-1 / 3628800) + 1 / 40320
    cos = z * (z * cos - 1 / 720) + 1 / 24
    cos = z * (z * cos - 0.5) + 1.0
    quadrant = whole.to(tl.int64).to(tl.int32) & 3
    odd = (quadrant & 1) != 0
    c, s = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    c = tl.where((quadrant == 1) | (quadrant == 2), -c, c)
    return c, tl.where(quadrant >= 2, -s, s)


@triton.jit
def _rotate(a, b, shift, inv_freq, NUM_PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """``[ROWS, BLOCK]`` each: the pairs (a, b), rotated by ``shift`` ``[ROWS]`` positions. Rows with a
    shift of 0 are returned bit for bit."""
    if tl.sum((shift != 0).to(tl.int32), 0) > 0:
        pair = tl.arange(0, BLOCK)
        # [BLOCK]
        frequency = tl.load(inv_freq + pair, mask=pair < NUM_PAIRS, other=0.0)
        cos, sin = _cos_sin(shift, frequency)
        moved = (shift != 0)[:, None]
        # [ROWS, BLOCK] * [ROWS, BLOCK]
        rotated = tl.where(moved, a * cos - b * sin, a)
        b = tl.where(moved, b * cos + a * sin, b)
        a = rotated
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
    """Makes one ``Move`` (voco_kernels/kv/move.py) from its tables.

    Every entry is worked on by the same number of programs. If there are ``lengths``, one more program
    writes ``length`` to them.

    Args:
        entries, tokens, bases: the tables.
        lengths, inv_freq: tables, or None.
        ENTRY_TYPE, CACHE_TYPE: of elements: uint8 for float8_e4m3fn; int16 or int32 for both in a copy.
        ROWS: rows that a program moves at a time.
        ROTARY_BLOCK: a power of two, not below ROTARY_DIM (INTERLEAVED) or half of it.
        REST_BLOCK: a power of two, not below HEAD_DIM - ROTARY_DIM.
    """
    ENTRY_BYTES: tl.constexpr = ENTRY_TYPE.primitive_bitwidth // 8
    CACHE_BYTES: tl.constexpr = CACHE_TYPE.primitive_bitwidth // 8
    ENTRY_ALIGN: tl.constexpr = ALIGNMENT_OF_8_BITS if ENTRY_BYTES == 1 else ALIGNMENT
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if lengths is not None:
        programs -= 1
        if program == programs:
            for start in tl.range(0, num_layers, ROWS):
                layer = start + tl.arange(0, ROWS)
                # [ROWS]
                counters = tl.load(lengths + layer, mask=layer < num_layers, other=0)
                counters = counters.to(tl.pointer_type(tl.int64))
                tl.store(counters, tl.cast(length, tl.int64), mask=layer < num_layers)
            return
    programs = programs // num_entries
    # scalars
    entry = entries + program // programs * ENTRY_COLUMNS
    data, scales_of_entry = tl.load(entry + KV_ADDRESS), tl.load(entry + SCALES_ADDRESS)
    first = tl.load(entry + FIRST_TOKEN)
    num_tokens = tl.load(entry + NUM_TOKENS).to(tl.int32)
    num_rows = 2 * num_layers * num_kv_heads * num_tokens
    for start in tl.range(program % programs * ROWS, num_rows, programs * ROWS, disable_licm=True):
        row = start + tl.arange(0, ROWS)
        inside = row < num_rows
        heads = row // num_tokens  # of all layers' keys and values
        token = tokens + (first + row % num_tokens) * TOKEN_COLUMNS
        plane = heads // num_kv_heads  # layer * 2, + 1 for values
        # [ROWS]
        base = tl.load(bases + plane, mask=inside, other=0)
        # [ROWS]
        offset = tl.load(token + OFFSET, mask=inside, other=0)
        offset += (heads % num_kv_heads).to(tl.int64) * head_stride
        in_cache = base + offset * CACHE_BYTES
        in_entry = data + row.to(tl.int64) * (HEAD_DIM * ENTRY_BYTES)
        if not TO_CACHE:
            # [ROWS, REST_BLOCK]
            values = _load(
                in_cache, inside, None, CACHE_TYPE, 0, HEAD_DIM, REST_BLOCK, ALIGNMENT
            )  # fmt: skip
            _store(in_entry, inside, values, ENTRY_TYPE, 0, HEAD_DIM, REST_BLOCK, ENTRY_ALIGN)
        else:
            scales = None
            if ENTRY_BYTES == 1:
                scales = scales_of_entry + row.to(tl.int64) * SCALE_BYTES
                scales = scales.to(tl.pointer_type(tl.float32))
                # Compared with a scalar, because newer interpreters refuse "tile & scalar" as a mask.
                num_scales = tl.where(scales_of_entry != 0, num_rows, 0)
                # [ROWS]
                scales = tl.load(scales, mask=row < num_scales, other=1.0)
            if ROTARY_DIM > 0:
                is_key = inside & (plane % 2 == 0)
                # [ROWS]
                shift = tl.load(token + SHIFT, mask=is_key, other=0)
                HALF: tl.constexpr = ROTARY_DIM // 2
                if INTERLEAVED:
                    # [ROWS, ROTARY_BLOCK]
                    pairs = _load(
                        in_entry, inside, scales,
                        ENTRY_TYPE, 0, ROTARY_DIM, ROTARY_BLOCK, ENTRY_ALIGN,
                    )  # fmt: skip
                    # [ROWS, ROTARY_BLOCK / 2] each
                    a, b = tl.split(pairs.reshape(ROWS, ROTARY_BLOCK // 2, 2))
                    a, b = _rotate(a, b, shift, inv_freq, HALF, ROTARY_BLOCK // 2)
                    # [ROWS, ROTARY_BLOCK]
                    pairs = tl.join(a, b).reshape(ROWS, ROTARY_BLOCK)
                    _store(
                        in_cache, inside, pairs,
                        CACHE_TYPE, 0, ROTARY_DIM, ROTARY_BLOCK, ALIGNMENT,
                    )  # fmt: skip
                else:
                    # [ROWS, ROTARY_BLOCK]
                    a = _load(
                        in_entry, inside, scales,
                        ENTRY_TYPE, 0, HALF, ROTARY_BLOCK, ENTRY_ALIGN,
                    )  # fmt: skip
                    # [ROWS, ROTARY_BLOCK]
                    b = _load(
                        in_entry, inside, scales,
                        ENTRY_TYPE, HALF, ROTARY_DIM, ROTARY_BLOCK, ENTRY_ALIGN,
                    )  # fmt: skip
                    a, b = _rotate(a, b, shift, inv_freq, HALF, ROTARY_BLOCK)
                    # [ROWS, ROTARY_BLOCK] each
                    _store(
                        in_cache, inside, a, CACHE_TYPE, 0, HALF, ROTARY_BLOCK, ALIGNMENT
                    )  # fmt: skip
                    _store(
                        in_cache, inside, b, CACHE_TYPE, HALF, ROTARY_DIM, ROTARY_BLOCK, ALIGNMENT
                    )  # fmt: skip
            if ROTARY_DIM < HEAD_DIM:
                # [ROWS, REST_BLOCK]
                rest = _load(
                    in_entry, inside, scales,
                    ENTRY_TYPE, ROTARY_DIM, HEAD_DIM, REST_BLOCK, ENTRY_ALIGN,
                )  # fmt: skip
                _store(
                    in_cache, inside, rest, CACHE_TYPE, ROTARY_DIM, HEAD_DIM, REST_BLOCK, ALIGNMENT
                )  # fmt: skip
