"""What is timed: ways to load an entry from some place into a cache, and their floors.

Each says in one line what its time includes. Rivals are written as well as a user of theirs would write
them, and read files of their own. No rival verifies what it has read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.harness.clock import capture
from bench.harness.guard import NotMeasuredError, first_line
from bench.harness.turns import Job
from bench.loading.places import check_dropped, drop, read_file
from bench.loading.scene import Scene, same_bits
from voco_kernels.kv import cache_view, staging
from voco_kernels.kv.entry import CompactKV
from voco_kernels.kv.load import extract, load_into, prepare_extract, prepare_load

SOURCES = {
    "cpu": ("memory", "page cache", "disk", "redis"),
    "cuda": ("pinned memory", "device", "page cache", "disk", "redis"),
}

_HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Load:
    """One way to load.

    Attributes:
        name: in records and tables.
        legend: what the time includes.
        prepare: makes a scene's job; raises NotMeasuredError if this machine can't time it.
        kind: "floor", "ours" or "rival".
        checksum: whether every byte is hashed on the way.
        device: "cpu" or "cuda" if the load exists only there.
        sweep: whether it is also timed at the sizes in between, where staging begins to pay.
    """

    name: str
    legend: str
    prepare: Callable[[Scene], Job]
    kind: str = "ours"
    checksum: bool = False
    device: str | None = None
    sweep: bool = False


def loads_from(source: str, device: str, *, sweep: bool = False) -> list[Load]:
    """Loads in the order of the tables; with ``sweep``, those that find the crossover."""
    found = [load for load in _LOADS[source] if load.device in (None, device)]
    return [load for load in found if load.sweep] if sweep else found


# ---- floors


def _copy(scene: Scene, source: Tensor | None = None) -> Job:
    source = scene.bytes if source is None else source
    if scene.device.type == "cpu":
        run = partial(np.copyto, scene.target.numpy(), source.numpy())
    else:
        run = partial(scene.target.copy_, source, non_blocking=True)
    return Job(run, lambda _: _wrong_bytes(scene, scene.target), queued=_queued(scene))


def _copy_on_device(scene: Scene) -> Job:
    return _copy(scene, scene.entry_on_device.kv.view(-1).view(torch.uint8))


def _copy_and_hash(scene: Scene, *, at_once: int | None = None) -> Job:
    xxh3_128 = _xxhash().xxh3_128
    source, target = scene.bytes.numpy(), scene.target.numpy()
    at_once = at_once or len(source)
    expected = xxh3_128(source).digest()

    def run() -> bytes:
        state = xxh3_128()
        for start in range(0, len(source), at_once):
            piece = target[start : start + at_once]
            np.copyto(piece, source[start : start + at_once])
            state.update(piece)
        return state.digest()

    def check(digest: bytes) -> str:
        return _wrong_bytes(scene, scene.target) or ("" if digest == expected else "another digest")

    return Job(run, check)


def _read(scene: Scene, *, cold: bool) -> Job:
    path, into = scene.raw_file, memoryview(scene.host_buffer)
    return Job(
        lambda: read_file(path, into),
        lambda _: _wrong_bytes(scene, torch.from_numpy(scene.host_buffer)),
        before=_before([path], cold),
    )


def _redis_get(scene: Scene) -> Job:
    client, name = scene.redis_client()

    def check(value: bytes) -> str:
        start = 8 + int.from_bytes(
            value[:8], "little"
        )  # after the header, as in any safetensors file
        got = torch.frombuffer(bytearray(value[start : start + scene.nbytes]), dtype=torch.uint8)
        return _wrong_bytes(scene, got)

    return Job(lambda: client.get(name), check)


def _wrong_bytes(scene: Scene, got: Tensor) -> str:
    return "" if torch.equal(got.cpu(), scene.bytes) else "the copy differs from the entry"


def _xxhash():
    try:
        import xxhash
    except ImportError:
        raise NotMeasuredError("xxhash is not installed") from None
    return xxhash


# ---- ours, from memory


def _loaded(
    scene: Scene, expected: Callable[[int], Tensor] | None = None
) -> Callable[[object], str]:
    """A check that the cache holds the entry, and counts its tokens."""
    expected = expected or scene.layer_of_entry
    return lambda _: scene.wrong_length() or scene.wrong_in_cache(expected)


def _queued(scene: Scene) -> bool:
    return scene.device.type == "cuda"


def _load_into(scene: Scene, *, on_device: bool = False, keep_views: bool = False) -> Job:
    entry = scene.entry_on_device if on_device else scene.entry
    cache = cache_view.views(scene.cache) if keep_views else scene.cache
    return Job(lambda: load_into(cache, entry), _loaded(scene), queued=_queued(scene))


def _launch(
    scene: Scene,
    *,
    on_device: bool = False,
    loader: str | None = None,
    staged: bool | None = None,
    graph: bool = False,
) -> Job:
    entry = scene.entry_on_device if on_device else scene.entry
    with _staging(staged):
        try:
            transfer = prepare_load(scene.cache, entry, loader=loader)
        except NotImplementedError as error:
            if loader is None:
                raise
            raise NotMeasuredError(first_line(error)) from error
    run = capture(transfer.launch).replay if graph else transfer.launch
    # The transfer must outlive its graph.
    return Job(lambda: (run(), transfer)[0], _loaded(scene), queued=_queued(scene))


def _replace_and_launch(scene: Scene, *, on_device: bool = False) -> Job:
    entry = scene.entry_on_device if on_device else scene.entry
    transfer = prepare_load(scene.cache, entry)

    def run() -> None:
        transfer.replace([entry])
        transfer.launch()

    return Job(run, _loaded(scene))  # not queued: names may change only when launches are done


@contextmanager
def _staging(staged: bool | None) -> Iterator[None]:
    """Transfers that are prepared inside copy pinned entries to the device first, or never do."""
    shipped = staging.STAGED_ABOVE
    if staged is not None:
        staging.STAGED_ABOVE = -1 if staged else 1 << 62
    try:
        yield
    finally:
        staging.STAGED_ABOVE = shipped


def _quantized(scene: Scene, dtype: torch.dtype) -> Job:
    entry = quantize(scene.entry, dtype)

    def expected(index: int) -> Tensor:
        return _layer(entry, index).dequantize(torch.bfloat16).kv[0]

    return Job(
        lambda: load_into(scene.cache, entry), _loaded(scene, expected), queued=_queued(scene)
    )


def _rotated(scene: Scene) -> Job:
    entry, shift = scene.entry, 1000
    first = int(entry.positions[0]) + shift
    shifts = torch.full_like(entry.positions, shift)

    def check(_: object) -> str:
        # Against float64: at most twice the error of the same rotation in torch, as everywhere else.
        for index, layer in enumerate(scene.cache.layers):
            keys, values = entry.kv[index]
            got = layer.keys[0, :, : scene.tokens].cpu()
            exact = entry.rope.rotate(keys.double(), shifts)
            error = (got - exact).abs().max()
            limit = 2 * (entry.rope.rotate(keys, shifts) - exact).abs().max() + 1e-5
            if not error <= limit:
                return f"layer {index}: keys are off by {error:.1e}, over {limit:.1e}"
            if not same_bits(layer.values[0, :, : scene.tokens].cpu(), values):
                return f"layer {index}: the values in the cache differ from the entry's"
        return scene.wrong_length()

    return Job(lambda: load_into(scene.cache, entry, positions=first), check, queued=_queued(scene))


def _extract(scene: Scene, *, prepared: bool = False) -> Job:
    entry = scene.entry
    slots, positions = [list(range(scene.tokens))], [entry.positions.tolist()]
    transfer = prepare_extract(scene.cache, slots, positions) if prepared else None

    def run() -> list[CompactKV]:
        if transfer is None:
            return extract(scene.cache, slots, positions)
        transfer.launch()
        return transfer.entries

    def check(entries: list[CompactKV]) -> str:
        return "" if same_bits(entries[0].kv.cpu(), entry.kv) else "another entry came out"

    return Job(run, check, prime=lambda: load_into(scene.cache, entry), queued=_queued(scene))


def quantize(entry: CompactKV, dtype: torch.dtype) -> CompactKV:
    """``entry.quantize(dtype)``, layer by layer to save memory; pinned if the entry is."""
    kv = torch.empty(entry.kv.shape, dtype=dtype)
    scales = torch.empty(entry.kv.shape[:4], dtype=torch.float32)
    for index in range(entry.num_layers):
        layer = _layer(entry, index).quantize(dtype)
        kv[index], scales[index] = layer.kv[0], layer.scales[0]
    if entry.kv.is_pinned():
        kv, scales = kv.pin_memory(), scales.pin_memory()
    return replace(entry, kv=kv, scales=scales)


def _layer(entry: CompactKV, index: int) -> CompactKV:
    layer = slice(index, index + 1)
    scales = None if entry.scales is None else entry.scales[layer]
    return replace(entry, kv=entry.kv[layer], scales=scales)


# ---- ours, from stores


def _load_from(scene: Scene, store, cache, before: Callable[[], object]) -> Job:
    """``Store.load_into``: the entry of one key."""
    key = scene.entry.key

    def run() -> None:
        missing = store.load_into(cache, [key])
        if missing:  # a miss is fast, and no load
            raise LookupError(f"{store} does not serve the entry any more")

    return Job(run, _loaded(scene), before=before)


def _disk_load_into(scene: Scene, *, cold: bool, keep_views: bool = False) -> Job:
    cache = cache_view.views(scene.cache) if keep_views else scene.cache
    return _load_from(scene, scene.store, cache, _before(scene.store_files, cold))


def _disk_get_and_load(scene: Scene, *, cold: bool) -> Job:
    store, key = scene.store, scene.entry.key

    def run() -> CompactKV:
        entry = store.get(key)
        load_into(scene.cache, entry)
        return entry

    return Job(run, _loaded(scene), before=_before(scene.store_files, cold))


def _redis_load_into(scene: Scene) -> Job:
    return _load_from(scene, scene.redis_store, scene.cache, lambda: None)


def _before(paths: list[Path], cold: bool) -> Callable[[], None]:
    """What to do before each read: nothing, or drop the files from the page cache."""
    if not cold:
        return lambda: None
    check_dropped(paths)
    return partial(drop, paths)


# ---- rivals


def _put_slices(scene: Scene, kv: Tensor) -> None:
    """2 L copies; the cache's length is not changed."""
    for layer, (keys, values) in zip(scene.cache.layers, kv, strict=True):
        layer.keys[0, :, : scene.tokens].copy_(keys, non_blocking=True)
        layer.values[0, :, : scene.tokens].copy_(values, non_blocking=True)


def _slices(scene: Scene, *, on_device: bool = False) -> Job:
    kv = (scene.entry_on_device if on_device else scene.entry).kv
    return Job(lambda: _put_slices(scene, kv), _in_cache(scene), queued=_queued(scene))


def _load_file(scene: Scene) -> Tensor:
    from safetensors.torch import load_file

    return load_file(scene.safetensors_file, device=str(scene.device))["kv"]


def _torch_load(scene: Scene) -> Tensor:
    return torch.load(scene.torch_file, weights_only=True).to(scene.device)


def _rival(scene: Scene, *, read: Callable[[Scene], Tensor], cold: bool, slices: bool) -> Job:
    path = scene.safetensors_file if read is _load_file else scene.torch_file

    def run() -> Tensor:
        kv = read(scene)
        if slices:
            _put_slices(scene, kv)
        return kv

    def check(kv: Tensor) -> str:
        if slices:
            return _in_cache(scene)(kv)
        return "" if same_bits(kv.cpu(), scene.entry.kv) else "another tensor came out"

    return Job(run, check, before=_before([path], cold))


def _in_cache(scene: Scene) -> Callable[[object], str]:
    return lambda _: scene.wrong_in_cache(scene.layer_of_entry)


# ---- the list

_ONE_BY_ONE = "`keys[0, :, :n].copy_(...)` and the values' for each layer, 2 L copies"
_CPU_FLOORS = (
    Load("memcpy", "one copy of the entry's bytes in memory", _copy, "floor", device="cpu"),
    Load(
        "memcpy + xxh3-128",
        "that copy, then the checksum of the copy",
        _copy_and_hash,
        "floor",
        checksum=True,
        device="cpu",
    ),
)
_IN_CHUNKS = Load(
    "memcpy + xxh3-128, chunks",
    "both in turns for each MiB, while it is in a cache",
    partial(_copy_and_hash, at_once=_HASHED_AT_ONCE),
    "floor",
    checksum=True,
    device="cpu",
)
_PINNED_COPY = Load(
    "pinned copy",
    "one copy of the entry's bytes from pinned memory to the device",
    _copy,
    "floor",
    device="cuda",
    sweep=True,
)


def _from_memory(on_device: bool = False) -> tuple[Load, ...]:
    return (
        Load("load_into", "the call, with a StaticCache", partial(_load_into, on_device=on_device)),
        Load(
            "load_into, views kept",
            "the call, with `cache_view.views` made before",
            partial(_load_into, on_device=on_device, keep_views=True),
        ),
        Load(
            "replace + launch",
            "a prepared Transfer: name another entry, move it",
            partial(_replace_and_launch, on_device=on_device),
        ),
        Load(
            "launch",
            "a prepared Transfer: move the entry",
            partial(_launch, on_device=on_device),
        ),
        Load("slices", _ONE_BY_ONE, partial(_slices, on_device=on_device), "rival"),
    )


_CONVERTED = (
    Load(
        "load_into, int8",
        "the call, with an int8 entry (half the bytes, and scales)",
        partial(_quantized, dtype=torch.int8),
    ),
    Load(
        "load_into, fp8",
        "the call, with a float8_e4m3fn entry (likewise)",
        partial(_quantized, dtype=torch.float8_e4m3fn),
    ),
    Load("load_into, rotated", "the call, with keys rotated by 1000 more positions", _rotated),
)
_EXTRACT = (
    Load("extract", "the way back: the call, into new memory", _extract),
    Load(
        "extract, prepared",
        "the launch of a prepared extract, into the same memory",
        partial(_extract, prepared=True),
    ),
)
_ON_CUDA = (
    Load(
        "graph replay",
        "replay of a CUDA graph of the launch",
        partial(_launch, graph=True),
        device="cuda",
    ),
    Load("launch, cuda", "by csrc/kv_load.cu", partial(_launch, loader="cuda"), device="cuda"),
    Load(
        "launch, triton", "by the Triton loader", partial(_launch, loader="triton"), device="cuda"
    ),
    Load(
        "launch, direct",
        "the kernel reads pinned memory itself",
        partial(_launch, staged=False),
        device="cuda",
        sweep=True,
    ),
    Load(
        "launch, staged",
        "a copy to the device, then the kernel",
        partial(_launch, staged=True),
        device="cuda",
        sweep=True,
    ),
)


def _from_files(cold: bool) -> tuple[Load, ...]:
    rivals = []
    for name, call, read in (
        ("safetensors", "`load_file(path, device)`", _load_file),
        ("torch.load", "`torch.load(path).to(device)`", _torch_load),
    ):
        job = partial(_rival, read=read, cold=cold)
        rivals += [
            # On a CPU load_file maps the file and reads nothing: only with the copies is it a load.
            Load(name, f"{call} alone", partial(job, slices=False), "rival", device="cuda"),
            Load(
                f"{name} + slices",
                f"{call}, then the copies layer by layer",
                partial(job, slices=True),
                "rival",
            ),
        ]
    kept = Load(
        "KVStore.load_into, views kept",
        "the call with `cache_view.views` made before, checksum included",
        partial(_disk_load_into, cold=cold, keep_views=True),
        checksum=True,
    )
    return (
        *_CPU_FLOORS,
        *(() if cold else (_IN_CHUNKS,)),
        _PINNED_COPY,
        Load(
            "read",
            "`open`, `preadv` of the bytes into memory that exists, `close`",
            partial(_read, cold=cold),
            "floor",
        ),
        Load(
            "KVStore.load_into",
            "the call, checksum included",
            partial(_disk_load_into, cold=cold),
            checksum=True,
        ),
        *(() if cold else (kept,)),
        Load(
            "KVStore.get + load_into",
            "both calls, checksum included",
            partial(_disk_get_and_load, cold=cold),
            checksum=True,
        ),
        *rivals,
    )


_LOADS = {
    "memory": (*_CPU_FLOORS, *_from_memory(), *_CONVERTED, *_EXTRACT),
    "pinned memory": (_PINNED_COPY, *_from_memory(), *_ON_CUDA, *_CONVERTED),
    "device": (
        Load(
            "device copy", "one copy of the entry's bytes on the device", _copy_on_device, "floor"
        ),
        *_from_memory(on_device=True),
        *_EXTRACT,
    ),
    "page cache": _from_files(cold=False),
    "disk": _from_files(cold=True),
    "redis": (
        *_CPU_FLOORS,
        _PINNED_COPY,
        Load("GET", "the bytes, by redis-py over loopback, no checksum", _redis_get, "floor"),
        Load(
            "RedisStore.load_into",
            "the call, checksum included",
            _redis_load_into,
            checksum=True,
        ),
    ),
}
