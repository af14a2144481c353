"""Random moves between compact entries and caches, and checks of their results for any loader.

A ``Scene`` has entries, a cache and a ``Move`` between them. ``check_load`` and ``check_extract`` run a
loader and compare every element of the cache's memory, or of the entries, with the result in float64.

The error bound of a rotated key: it is computed from ``a`` and ``b``, which are exact in float32, or
have a relative error of 2**-24 if they were multiplied by a scale. The errors of cos and sin are below
1.5 * 2**-24 (turn_of in csrc/kv_load.cu); the products and the sum have relative errors of 2**-24.
Since |a cos - b sin| is at most |a| + |b|, the sum of these errors is below (1 + 1.5 + 1 + 1) * 2**-24 *
(|a| + |b|), and below 5 * 2**-24 * (|a| + |b|) with the products of errors included. Rounding to the
cache's dtype is monotonic, so the result lies between the rounded values of truth - bound and truth +
bound. Elements that aren't rotated are determined: one product in float32 if there is a scale, and one
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from voco_kernels.kv.move import Move

ERROR = 5 * 2.0**-24
QUANTIZED = {torch.int8: 127, torch.float8_e4m3fn: 448}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])


@dataclass
class Scene:
    """The sizes and dtypes of a move; ``build`` makes its tensors.

    Attributes:
        counts: tokens in each entry; entry ``e`` goes to row ``e`` of the cache.
        paged: layers are ``[blocks, block_size, Hkv, D]`` instead of ``[B, Hkv, S, D]``.
        rotary_dim: 0 for no rotation.
        shifts: used in turn for all tokens; by default 0 and others, some of them large.
        host: entries and tables in pinned memory, with a cache on CUDA.
        lengths: whether each layer has a token count.
    """

    counts: tuple[int, ...] = (1, 3, 8)
    num_layers: int = 2
    num_kv_heads: int = 3
    head_dim: int = 64
    entry_dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype = torch.bfloat16
    paged: bool = False
    rotary_dim: int = 0
    interleaved: bool = False
    shifts: tuple[int, ...] | None = None
    host: bool = False
    lengths: bool = True
    device: str = "cpu"

    entries: list[Tensor] = field(init=False)
    scales: list[Tensor | None] = field(init=False)
    layers: list[tuple[Tensor, Tensor]] = field(init=False)
    counters: Tensor = field(init=False)
    offsets: list[Tensor] = field(init=False)
    move: Move = field(init=False)

    BLOCK_SIZE = 4
    SLOTS = 12

    def build(self, to_cache: bool = True) -> Scene:
        generator = torch.Generator().manual_seed(sum(self.counts) + self.head_dim)
        self._make_entries(generator)
        self._make_cache(generator)
        total = sum(self.counts)
        tokens = torch.zeros(total, 2, dtype=torch.int64)
        tokens[:, 0] = torch.cat(self.offsets)
        shifts = self.shifts or [0, 1, -7, 577, 131_071, 1_000_003]
        tokens[:, 1] = torch.tensor([shifts[i % len(shifts)] for i in range(total)])
        inv_freq = None
        if self.rotary_dim:
            exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim
            # rounded to float32, like a model's
            inv_freq = self.table((10_000**-exponents).float().double())
        bases = [[tensor.data_ptr() for tensor in layer] for layer in self.layers]
        lengths = [counter.data_ptr() for counter in self.counters]
        self.move = Move(
            to_cache=to_cache,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            entries=self.table(self.entry_rows()),
            tokens=self.table(tokens),
            bases=self.table(torch.tensor(bases)),
            head_stride=self.layers[0][0].stride(2 if self.paged else 1),
            most_tokens=max(self.counts),
            entry_dtype=self.entry_dtype,
            cache_dtype=self.cache_dtype,
            device=self.layers[0][0].device,
            inv_freq=inv_freq,
            interleaved=self.interleaved,
            lengths=self.table(torch.tensor(lengths)) if self.lengths else None,
            length=1234 if self.lengths else 0,
        )
        return self

    def table(self, values: Tensor) -> Tensor:
        return values.pin_memory() if self.host else values.to(self.device)

    def entry_rows(self) -> Tensor:
        rows, first = [], 0
        for kv, scales, count in zip(self.entries, self.scales, self.counts, strict=True):
            rows.append((kv.data_ptr(), 0 if scales is None else scales.data_ptr(), first, count))
            first += count
        return torch.tensor(rows)

    def _make_entries(self, generator: torch.Generator) -> None:
        self.entries, self.scales = [], []
        for count in self.counts:
            shape = (self.num_layers, 2, self.num_kv_heads, count, self.head_dim)
            values = torch.randn(shape, generator=generator)
            scales = None
            if self.entry_dtype in QUANTIZED:
                largest = QUANTIZED[self.entry_dtype]
                values = (values * largest / 3).clamp(-largest, largest)
                values = values.round() if self.entry_dtype == torch.int8 else values
                scales = self.table(torch.rand(shape[:4], generator=generator) + 0.01)
            # zeros of both signs
            values.view(-1)[::17] = 0.0
            values.view(-1)[5::17] = -0.0
            self.entries.append(self.table(values.to(self.entry_dtype)))
            self.scales.append(scales)

    def _make_cache(self, generator: torch.Generator) -> None:
        """A cache of NaN, with one allocation per tensor, and scattered slots for the tokens."""
        H, D = self.num_kv_heads, self.head_dim
        rows = len(self.counts)
        blocks = rows * self.SLOTS // self.BLOCK_SIZE + 2
        shape = (blocks, self.BLOCK_SIZE, H, D) if self.paged else (rows, H, self.SLOTS, D)
        self.layers = [
            tuple(
                torch.full(shape, float("nan"), dtype=self.cache_dtype, device=self.device)
                for _ in range(2)
            )
            for _ in range(self.num_layers)
        ]
        self.counters = torch.full((self.num_layers,), -1, dtype=torch.int64, device=self.device)
        table = torch.randperm(blocks, generator=generator)
        self.offsets = []
        for row, count in enumerate(self.counts):
            slots = torch.randperm(self.SLOTS, generator=generator)[:count].sort().values
            if self.paged:
                block = table[row * self.SLOTS // self.BLOCK_SIZE + slots // self.BLOCK_SIZE]
                self.offsets.append((block * self.BLOCK_SIZE + slots % self.BLOCK_SIZE) * H * D)
            else:
                self.offsets.append((row * H * self.SLOTS + slots) * D)

    def rows_of(self, cache: Tensor, entry: int) -> Tensor:
        """``[Hkv, n]``: the index of each row's first element in a tensor of the cache."""
        heads = torch.arange(self.num_kv_heads)[:, None] * self.move.head_stride
        return (heads + self.offsets[entry]).to(cache.device)

    def gather(self, layer: int, c: int, entry: int) -> Tensor:
        """``[Hkv, n, D]``: what the cache holds of an entry."""
        cache = self.layers[layer][c]
        columns = torch.arange(self.head_dim, device=cache.device)
        return cache.view(-1)[self.rows_of(cache, entry)[..., None] + columns]

    def truth(self, entry: int) -> tuple[Tensor, Tensor]:
        """The entry as a cache should hold it, and the error allowed before it is rounded.

        Both are float64 ``[L, 2, Hkv, n, D]`` on the CPU.
        """
        exact = self.entries[entry].cpu().float()
        if self.scales[entry] is not None:
            exact = exact * self.scales[entry].cpu()[..., None]
        exact = exact.double()
        error = torch.zeros_like(exact)
        if self.move.inv_freq is None:
            return exact, error
        first = sum(self.counts[:entry])
        shift = self.move.tokens[first : first + self.counts[entry], 1].cpu()
        angle = shift.double()[:, None] * self.move.inv_freq.cpu()
        keys = exact[:, 0]
        rotary = slice(0, self.rotary_dim)
        if self.interleaved:
            a, b = keys[..., rotary].unflatten(-1, (-1, 2)).unbind(-1)
        else:
            a, b = keys[..., rotary].chunk(2, dim=-1)
        turned = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        bound = (ERROR * (a.abs() + b.abs())).clamp(min=1e-300)  # 0 means: not rotated
        if self.interleaved:
            turned, bound = torch.stack(turned, -1).flatten(-2), bound.repeat_interleave(2, -1)
        else:
            turned, bound = torch.cat(turned, -1), torch.cat([bound, bound], -1)
        moved = (shift != 0)[:, None]
        error[:, 0, ..., rotary] = torch.where(moved, bound, 0)
        exact[:, 0, ..., rotary] = torch.where(moved, turned, keys[..., rotary])
        return exact, error


def check_load(scene: Scene, run: Callable[[Move], None]) -> None:
    """Run the scene's move into the cache, and check every element of the cache."""
    run(scene.move)
    _synchronize(scene)
    for entry in range(len(scene.counts)):
        exact, error = scene.truth(entry)
        for layer in range(scene.num_layers):
            for c in range(2):
                got = scene.gather(layer, c, entry).cpu()
                _assert_rounded(got, exact[layer, c], error[layer, c], scene.move.is_copy)
    assert_untouched(scene)
    if scene.lengths:
        assert scene.counters.tolist() == [scene.move.length] * scene.num_layers


def _assert_rounded(got: Tensor, exact: Tensor, error: Tensor, is_copy: bool) -> None:
    low, high = ((exact + sign * error).float().to(got.dtype) for sign in (-1, 1))
    fixed = error == 0
    assert torch.equal(bits(got)[fixed], bits(low)[fixed]), "an element that isn't rotated differs"
    assert not is_copy or fixed.all()
    inside = (got >= low) & (got <= high)
    assert inside.all(), f"off by {((got.double() - exact).abs() - error).max()} more than allowed"


def assert_untouched(scene: Scene) -> None:
    """Check that only the addressed slots were written: all others still hold NaN."""
    nan = bits(torch.full((1,), float("nan"), dtype=scene.cache_dtype))
    for layer in scene.layers:
        for cache in layer:
            addressed = torch.zeros(cache.numel(), dtype=torch.bool)
            for entry in range(len(scene.counts)):
                rows = scene.rows_of(cache, entry).cpu()
                addressed[rows[..., None] + torch.arange(scene.head_dim)] = True
            assert (bits(cache.cpu().view(-1))[~addressed] == nan).all(), "another slot was written"


def check_extract(scene: Scene, run: Callable[[Move], None]) -> None:
    """Copy entries out of a cache of random bits, and compare them and the memory around them."""
    for layer in scene.layers:
        for cache in layer:
            bits(cache).random_()
    before = [[bits(cache).clone() for cache in layer] for layer in scene.layers]
    guarded = []
    for index, entry in enumerate(scene.entries):
        memory = scene.table(torch.full((entry.numel() + 128,), float("nan"), dtype=entry.dtype))
        guarded.append(memory)
        scene.entries[index] = memory[64:-64].view(entry.shape)
    move = replace(scene.move, to_cache=False, entries=scene.table(scene.entry_rows()))
    run(move)
    _synchronize(scene)
    for index, (entry, memory) in enumerate(zip(scene.entries, guarded, strict=True)):
        for layer in range(scene.num_layers):
            for c in range(2):
                assert torch.equal(
                    bits(entry[layer, c].cpu()), bits(scene.gather(layer, c, index).cpu())
                )
        assert memory[:64].isnan().all() and memory[-64:].isnan().all()
    for layer, copies in zip(scene.layers, before, strict=True):
        assert all(
            torch.equal(bits(cache), copy) for cache, copy in zip(layer, copies, strict=True)
        )


def _synchronize(scene: Scene) -> None:
    if scene.move.device.type == "cuda":
        torch.cuda.synchronize(scene.move.device)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, E4M3 = torch.int8, torch.float8_e4m3fn
DTYPES = [
    (entry, cache) for entry in (BF16, FP16, FP32, INT8, E4M3) for cache in (BF16, FP16, FP32)
]
HEAD_DIMS = (64, 80, 96, 128, 256)

# The scenes that every loader is tested with; each value makes a new one.
SCENES: dict[str, Callable[..., Scene]] = {}


def _scene(name: str, **kinds) -> None:
    SCENES[name] = lambda **more: Scene(**{**kinds, **more})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


for _entry, _cache in DTYPES:
    _scene(f"{_name(_entry)} to {_name(_cache)}", entry_dtype=_entry, cache_dtype=_cache)
    _scene(
        f"{_name(_entry)} to {_name(_cache)}, rotated",
        entry_dtype=_entry,
        cache_dtype=_cache,
        rotary_dim=64,
        counts=(3, 6),
    )
for _head_dim in HEAD_DIMS:
    _scene(f"head_dim {_head_dim}", head_dim=_head_dim, paged=True)
    _scene(f"head_dim {_head_dim}, fp32", head_dim=_head_dim, entry_dtype=FP32, cache_dtype=FP32)
    for _interleaved in (False, True):
        _scene(
            f"head_dim {_head_dim}, rotated{', interleaved' if _interleaved else ''}",
            head_dim=_head_dim,
            rotary_dim=_head_dim,
            interleaved=_interleaved,
            paged=_interleaved,
        )
_scene("one token", counts=(1,))
_scene("one token, fp16", counts=(1,), entry_dtype=FP16, cache_dtype=FP16)
_scene("no tokens in one entry", counts=(2, 0, 1))
_scene("many entries", counts=(1,) * 9, lengths=False)
_scene("8 bits, rotated, paged", entry_dtype=INT8, rotary_dim=64, paged=True, head_dim=80)
_scene("half of head_dim rotated", head_dim=128, rotary_dim=64)
_scene("a fifth of head_dim rotated", head_dim=80, rotary_dim=16)
_scene("part of head_dim rotated, interleaved", head_dim=96, rotary_dim=20, interleaved=True)
_scene("shifts of 0 only", rotary_dim=64, shifts=(0,))
_scene("an odd number of units", head_dim=72, rotary_dim=48, entry_dtype=FP16)
_scene("an odd number of units, one row", head_dim=8, counts=(1,), entry_dtype=E4M3)
