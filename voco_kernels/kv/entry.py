"""``CompactKV``: an image's compressed keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

# The dtypes of quantized entries, and the largest finite value of each, to which a row is scaled.
QUANTIZED_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# The largest value that may be quantized. Larger ones would be infinite in bfloat16, the default of
# ``dequantize``.
_LARGEST = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True, eq=False)
class Rope:
    """How a model rotates keys by position (RoFormer, Eq. 34), so that they can be rotated further.

    Attributes:
        inv_freq: float32 ``[rotary_dim / 2]`` on the CPU, radians per position: the model's own, with
            any scaling applied. Dimensions of a head from rotary_dim on are not rotated.
        interleaved: whether dimensions ``(2i, 2i + 1)`` are rotated as a pair (GPT-J), or ``(i, i +
            rotary_dim / 2)`` (Llama).

    Raises:
        TypeError, ValueError: ``inv_freq`` of another dtype, device or shape.
    """

    inv_freq: Tensor
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.inv_freq.dim() != 1 or not self.inv_freq.numel():
            raise ValueError(
                f"expected inv_freq as [rotary_dim / 2], got {list(self.inv_freq.shape)}"
            )
        if self.inv_freq.dtype != torch.float32 or self.inv_freq.device.type != "cpu":
            raise TypeError(
                f"expected float32 inv_freq on the CPU, got {self.inv_freq.dtype} on "
                f"{self.inv_freq.device}"
            )

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.numel()

    def same(self, other: Rope | None) -> bool:
        """Whether both rotate keys in the same way."""
        return self is other or (
            other is not None
            and self.interleaved == other.interleaved
            and torch.equal(self.inv_freq, other.inv_freq)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Rope, (_own_memory(self.inv_freq), self.interleaved)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def rotate(self, keys: Tensor, shift: Tensor) -> Tensor:
        """Rotate keys by a number of positions.

        Angles are computed in float64, which costs little; the rotation in float32 (float64 for float64
        keys), rounded once to the keys' dtype.

        Args:
            keys: ``[..., n, D]``.
            shift: int64 ``[n]``, positions.

        Returns:
            ``[..., n, D]``, new memory. Keys with a shift of 0 are equal bit for bit.
        """
        working = torch.promote_types(keys.dtype, torch.float32)
        angle = shift.to(torch.float64)[:, None] * self.inv_freq.to(keys.device, torch.float64)
        cos, sin = angle.cos().to(working), angle.sin().to(working)
        rotated = keys[..., : self.rotary_dim].to(working)
        if self.interleaved:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
        else:
            a, b = rotated.chunk(2, dim=-1)
        a, b = a * cos - b * sin, b * cos + a * sin
        if self.interleaved:
            rotated = torch.stack((a, b), dim=-1).flatten(-2)
        else:
            rotated = torch.cat((a, b), dim=-1)
        rotated = torch.cat([rotated.to(keys.dtype), keys[..., self.rotary_dim :]], dim=-1)
        return torch.where((shift == 0)[:, None], keys, rotated)  # keeps the signs of zeros, too


@dataclass(frozen=True, eq=False, repr=False)
class CompactKV:
    """The keys and values of one image's VoCo tokens, in all layers (supplement, 2.3.1).

    One token of LLaVA-1.5-7B in bf16 takes 2 * 32 layers * 4096 * 2 B = 0.52 MB, whereas all 576 vision
    tokens take 302 MB. A batch is a list of entries, which may have different numbers of tokens.

    Attributes:
        kv: ``[L, 2, Hkv, n, D]``, for each layer the keys (0) and the values (1) of the n VoCo tokens.
            Keys are already rotated for ``positions``. Floating, or int8 or float8_e4m3fn with scales.
        positions: int64 ``[n]`` on the CPU, rising: the position ids of the first pass.
        next_position: the position id of the text that follows, larger than all ``positions``. It gives
            tokens the same positions in two passes as in one pass over the whole sequence.
        scales: float32 ``[L, 2, Hkv, n]`` if ``kv`` is quantized: the values of a row of D are
            ``scale * kv``.
        rope: how the keys were rotated; None if unknown, and then they can't be rotated further.
        fingerprint: of the model that computed the entry (``voco_model.fingerprint``), or "".
        key: of the entry in a store (``voco_model.image_key``), or "".

    Raises:
        TypeError, ValueError: shapes, dtypes or positions that are wrong or don't agree.
    """

    kv: Tensor
    positions: Tensor
    next_position: int
    scales: Tensor | None = None
    rope: Rope | None = None
    fingerprint: str = field(default="", kw_only=True)
    key: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if self.kv.dim() != 5 or self.kv.shape[1] != 2 or 0 in self.kv.shape:
            raise ValueError(
                "expected kv as [layers, 2, kv_heads, tokens, head_dim] with at least one token, "
                f"got {list(self.kv.shape)}"
            )
        self._check_scales()
        if self.positions.dtype != torch.int64:
            raise TypeError(f"expected int64 positions, got {self.positions.dtype}")
        if self.positions.device.type != "cpu":
            # Positions are read on the host, to place the text that follows.
            object.__setattr__(self, "positions", self.positions.cpu())
        if self.positions.shape != (self.num_tokens,):
            raise ValueError(
                f"expected one position for each of the {self.num_tokens} tokens in kv, got "
                f"positions of shape {list(self.positions.shape)}"
            )
        if not isinstance(self.next_position, int):
            raise TypeError(f"expected next_position as an int, got {self.next_position!r}")
        rising = [-1, *self.positions.tolist(), self.next_position]
        if rising != sorted(set(rising)):
            raise ValueError(
                "expected positions >= 0 that rise, and next_position above them, got positions "
                f"{rising[1:-1]} and next_position {rising[-1]}"
            )
        if self.rope is not None and self.rope.rotary_dim > self.head_dim:
            raise ValueError(
                f"expected a rotary_dim up to head_dim {self.head_dim}, got {self.rope.rotary_dim}"
            )

    def _check_scales(self) -> None:
        if self.kv.dtype in QUANTIZED_MAX:
            expected = list(self.kv.shape[:4])
            if (
                self.scales is None
                or self.scales.dtype != torch.float32
                or (list(self.scales.shape) != expected)
            ):
                scales = self.scales
                got = None if scales is None else f"{scales.dtype} {list(scales.shape)}"
                raise ValueError(
                    f"expected float32 scales {expected} with kv in {self.kv.dtype}, got {got}; "
                    "CompactKV.quantize makes both"
                )
            if self.scales.device != self.kv.device:
                raise ValueError(
                    f"expected kv and scales on one device, got {self.kv.device} and "
                    f"{self.scales.device}"
                )
        elif not self.kv.dtype.is_floating_point or self.kv.dtype.itemsize < 2:
            raise TypeError(
                "expected kv in a floating dtype of 16 bits or more, int8 or float8_e4m3fn, got "
                f"{self.kv.dtype}"
            )
        elif self.scales is not None:
            raise ValueError(f"expected no scales with kv in {self.kv.dtype}, got some")

    def __reduce__(self) -> tuple[Any, ...]:
        # Because plain pickle can't restore a float8 storage, and because torch.load with weights_only
        # admits a registered function of plain arguments, which runs the checks.
        kv = _own_memory(self.kv)
        if kv.dtype in QUANTIZED_MAX:
            kv = kv.view(torch.uint8)
        scales = None if self.scales is None else _own_memory(self.scales)
        name = str(self.dtype).removeprefix("torch.")
        positions = _own_memory(self.positions)
        rest = (self.next_position, scales, self.rope, self.fingerprint, self.key)
        return _restore, (kv, name, positions, *rest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore an entry pickled before it had ``__reduce__``."""
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def num_layers(self) -> int:
        return self.kv.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kv.shape[2]

    @property
    def num_tokens(self) -> int:
        return self.kv.shape[3]

    @property
    def head_dim(self) -> int:
        return self.kv.shape[4]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``kv``."""
        return self.kv.dtype

    @property
    def device(self) -> torch.device:
        return self.kv.device

    @property
    def nbytes(self) -> int:
        """The bytes of keys, values and scales together."""
        return self.kv.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def quantize(self, dtype: torch.dtype = torch.int8) -> CompactKV:
        """The same entry in 8 bits, with one scale for each layer, head and token.

        The scale maps the largest value of a row of D to the end of the dtype's range: 127 for int8, 448
        for float8_e4m3fn. The error of a value is at most half a step, ``max|row| / 254``, in int8, and
        at most the larger of ``|value| / 16`` and ``max|row| / 458752`` (2**-10 steps) in float8_e4m3fn;
        rounding in float32 comes on top.

        Args:
            dtype: torch.int8 or torch.float8_e4m3fn.

        Raises:
            ValueError: another dtype; an entry that is already quantized; NaN, infinity or values above
                bfloat16's largest, which ``dequantize`` could not restore.
        """
        if dtype not in QUANTIZED_MAX:
            raise ValueError(f"expected torch.int8 or torch.float8_e4m3fn, got {dtype}")
        if self.scales is not None:
            raise ValueError(
                f"expected an entry that isn't quantized, got {self.dtype}; dequantize it first"
            )
        values = self.kv.float()
        largest = values.abs().amax(-1)
        if not (largest <= _LARGEST).all():
            if not self.kv.isfinite().all():
                raise ValueError(
                    "expected finite keys and values, got some that are NaN or infinite"
                )
            raise ValueError(
                f"expected keys and values of up to {_LARGEST:.4g}, bfloat16's largest, got "
                f"{self.kv.abs().max().item():.4g}; keep this entry in {self.dtype}"
            )
        # Rows of zeros, and rows so small that their scale would underflow, get the least normal scale.
        scales = (largest / QUANTIZED_MAX[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
        values = values / scales[..., None]
        if dtype == torch.int8:
            values = values.round().clamp(-127, 127)
        else:
            values = values.clamp(-448, 448)
        return replace(self, kv=values.to(dtype), scales=scales)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> CompactKV:
        """The same entry in a floating dtype: ``scale * kv`` in float32, rounded once to ``dtype``.

        Raises:
            ValueError: an entry that isn't quantized; a dtype of 8 bits, or with too small a range.
        """
        if self.scales is None:
            raise ValueError(
                f"expected a quantized entry, got one in {self.dtype}; use to(dtype=...)"
            )
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"expected a floating dtype of 16 bits or more, got {dtype}")
        values = self.kv.float() * self.scales[..., None]
        kv = values.to(dtype)
        if not kv.isfinite().all():
            raise ValueError(
                f"expected values of up to {torch.finfo(dtype).max:.4g}, {dtype}'s largest, got "
                f"{values.abs().max().item():.4g}; dequantize to a dtype with a larger range"
            )
        return replace(self, kv=kv, scales=None)

    def rotated(self, positions: Tensor | int) -> CompactKV:
        """The same entry with its keys rotated to other positions, in float32.

        ``next_position`` keeps its distance from the last token.

        Args:
            positions: int64 ``[n]``, rising; or the first token's position (int), with the others at
                their present distances from it.

        Raises:
            ValueError: an entry without ``rope``, or a quantized one; positions that don't rise.
        """
        if self.rope is None:
            raise ValueError("expected an entry that knows its rope, got one without")
        if self.scales is not None:
            raise ValueError(
                f"expected an entry that isn't quantized, got {self.dtype}; dequantize it"
            )
        positions = self.moved(positions)
        shift = positions - self.positions
        kv = self.kv.clone()
        kv[:, 0] = self.rope.rotate(kv[:, 0], shift.to(kv.device))
        return replace(
            self,
            kv=kv,
            positions=positions,
            next_position=self.next_position + int(shift[-1]),
        )

    def moved(self, positions: Tensor | int) -> Tensor:
        """``positions``, as ``rotated`` takes them, as int64 ``[n]`` on the CPU."""
        if not isinstance(positions, Tensor):
            return self.positions + (int(positions) - int(self.positions[0]))
        if positions.shape != self.positions.shape or positions.dtype.is_floating_point:
            raise ValueError(
                f"expected integer positions of shape {list(self.positions.shape)}, got "
                f"{positions.dtype} {list(positions.shape)}"
            )
        return positions.to("cpu", torch.int64)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CompactKV:
        """The same entry on another device or in another dtype; ``self`` if nothing changes.

        A floating dtype dequantizes; for 8 bits use ``quantize``.
        """
        if dtype is not None and dtype != self.dtype:
            if dtype in QUANTIZED_MAX:
                raise ValueError(
                    f"expected a floating dtype of 16 bits or more, got {dtype}; use quantize"
                )
            if self.scales is not None:
                return self.dequantize(dtype).to(device)
        kv = self.kv.to(device=device, dtype=dtype)
        if kv is self.kv:
            return self
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, kv=kv, scales=scales)

    def __repr__(self) -> str:
        return (
            f"CompactKV({self.num_tokens} tokens, {self.num_layers} layers, {self.num_kv_heads} "
            f"heads of {self.head_dim}, {str(self.kv.dtype).removeprefix('torch.')} on "
            f"{self.kv.device}, {self.nbytes} B, next position {self.next_position})"
        )


def _own_memory(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy if it is part of a larger storage, which pickle would write as a whole."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _restore(
    kv: Tensor,
    dtype: str,
    positions: Tensor,
    next_position: int,
    scales: Tensor | None,
    rope: Rope | None,
    fingerprint: str,
    key: str,
) -> CompactKV:
    """Undo ``CompactKV.__reduce__``. Pickles refer to this function by name."""
    if dtype in _QUANTIZED_NAMES:
        kv = kv.view(_QUANTIZED_NAMES[dtype])
    return CompactKV(kv, positions, next_position, scales, rope, fingerprint=fingerprint, key=key)


_QUANTIZED_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in QUANTIZED_MAX}
# Lets torch.load read entries without weights_only=False. The classes are for entries that were saved
# before they had __reduce__.
torch.serialization.add_safe_globals([_restore, CompactKV, Rope])
