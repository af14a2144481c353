"""One entry of one size, the cache it goes into, and all places where it may be."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from bench.loading.places import RedisServer, write_back
from voco_kernels.kv.entry import CompactKV, Rope

FREE_SLOTS = 256
"""Slots that the cache has besides the entry's tokens, for a question and its answer."""

_FIRST_POSITION = 612  # after a prompt and the 576 tokens of an image


@dataclass(frozen=True)
class Model:
    """What decides an entry's size: layers, key/value heads, head_dim."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def nbytes(self, tokens: int) -> int:
        """Size of an entry in 16 bits."""
        return 2 * self.num_layers * 2 * self.num_kv_heads * tokens * self.head_dim


SIZES = {"full": Model(32, 32, 128), "tiny": Model(3, 2, 16)}
"""LLaVA-1.5-7B, and a rehearsal."""


class Scene:
    """An entry of ``tokens`` tokens in bfloat16, in memory and wherever a load needs it.

    Attributes:
        entry: on the CPU; pinned where the cache is on a GPU.
        cache: a StaticCache of one row, on the device.
        folder: for files; emptied by ``close``.
    """

    def __init__(
        self,
        model: Model,
        tokens: int,
        device: torch.device,
        folder: Path,
        server: Callable[[], RedisServer],
    ) -> None:
        self.model, self.tokens, self.device, self._server = model, tokens, device, server
        self.folder = folder / str(tokens)
        self.folder.mkdir()
        generator = torch.Generator().manual_seed(tokens)
        shape = (model.num_layers, 2, model.num_kv_heads, tokens, model.head_dim)
        kv = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
        if device.type == "cuda":
            kv = kv.pin_memory()
        exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
        self.entry = CompactKV(
            kv,
            torch.arange(_FIRST_POSITION, _FIRST_POSITION + tokens),
            _FIRST_POSITION + tokens,
            rope=Rope(10000.0**-exponents),
            fingerprint="bench/kv.py",
            key=hashlib.sha256(f"{tokens} tokens".encode()).hexdigest(),
        )
        self.cache = static_cache(model, tokens + FREE_SLOTS, device)
        self.poison()

    @property
    def nbytes(self) -> int:
        """Size of the entry's keys and values."""
        return self.entry.kv.nbytes

    @cached_property
    def bytes(self) -> Tensor:
        """The entry's keys and values, uint8 ``[nbytes]``."""
        return self.entry.kv.view(-1).view(torch.uint8)

    @cached_property
    def target(self) -> Tensor:
        """Memory on the device for a plain copy, uint8 ``[nbytes]``; written before it is timed."""
        return torch.full((self.nbytes,), 255, dtype=torch.uint8, device=self.device)

    @cached_property
    def host_buffer(self) -> np.ndarray:
        """Memory to read a file into, uint8 ``[nbytes]``; likewise."""
        return torch.full((self.nbytes,), 255, dtype=torch.uint8).numpy()

    @cached_property
    def entry_on_device(self) -> CompactKV:
        return self.entry.to(self.device)

    @cached_property
    def store(self):
        """A ``KVStore`` that holds the entry, on the disk."""
        from voco_model.kv_store.disk import KVStore

        store = KVStore(self.folder / "store", max_bytes=2 * self.nbytes + (1 << 30))
        store.put(self.entry)
        write_back(self.store_files)
        return store

    @property
    def store_files(self) -> list[Path]:
        """The entry's files, without the index beside them, which a store in use has in memory."""
        return list((self.folder / "store").rglob("*.safetensors"))

    @cached_property
    def safetensors_file(self) -> Path:
        """The entry's keys and values as one tensor, "kv"."""
        from safetensors.torch import save_file

        path = self.folder / "kv.safetensors"
        save_file({"kv": self.entry.kv}, path)
        write_back([path])
        return path

    @cached_property
    def torch_file(self) -> Path:
        """The entry's keys and values as ``torch.save`` writes a tensor."""
        path = self.folder / "kv.pt"
        torch.save(self.entry.kv, path)
        write_back([path])
        return path

    @cached_property
    def raw_file(self) -> Path:
        """The bytes and nothing else."""
        path = self.folder / "kv.bin"
        with path.open("wb") as file:
            file.write(memoryview(self.bytes.numpy()))
        write_back([path])
        return path

    @cached_property
    def redis_store(self):
        """A ``RedisStore`` that holds the entry.

        Raises:
            NotMeasuredError: there is no server.
        """
        server = self._server()
        from voco_model.kv_store.redis_store import RedisStore

        store = RedisStore(server.url)
        store.put(self.entry)
        return store

    def redis_client(self):
        """A plain client, and the name under which the store keeps the entry."""
        import redis

        assert self.redis_store is not None  # the entry is there
        client = redis.Redis.from_url(self._server().url)
        (name,) = client.keys("*")
        return client, name

    def poison(self) -> None:
        """NaN and other values that no entry has, into all that a load may write."""
        for layer in self.cache.layers:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
            layer.cumulative_length.fill_(-1)
        for name in ("target", "host_buffer"):
            if name in vars(self):
                getattr(self, name)[:] = 255

    def wrong_in_cache(self, expected: Callable[[int], Tensor]) -> str:
        """What differs from ``expected`` of each layer, ``[2, Hkv, n, D]`` on the CPU, to the bit."""
        for index, layer in enumerate(self.cache.layers):
            for name, whole, want in zip(
                ("keys", "values"), (layer.keys, layer.values), expected(index), strict=True
            ):
                if not same_bits(whole[0, :, : self.tokens].cpu(), want):
                    return f"layer {index}: the {name} in the cache differ from the entry's"
                if not whole[:, :, self.tokens :].isnan().all():
                    return f"layer {index}: {name} were written after the entry's slots"
        return ""

    def wrong_length(self) -> str:
        """Whether every layer counts the entry's tokens."""
        lengths = {int(layer.cumulative_length) for layer in self.cache.layers}
        if lengths != {self.tokens}:
            return f"expected a cache of {self.tokens} tokens, it says {sorted(lengths)}"
        return ""

    def layer_of_entry(self, index: int) -> Tensor:
        return self.entry.kv[index]

    def close(self) -> None:
        """Remove the files and what the server stores."""
        if "redis_store" in vars(self):
            with suppress(OSError):  # a server that has stopped stores nothing
                self.redis_store.delete(self.entry.key)
            self.redis_store.close()
        if "store" in vars(self):
            self.store.close()
        shutil.rmtree(self.folder)


def static_cache(model: Model, slots: int, device: torch.device):
    """Transformers' StaticCache with one row; without Transformers, a stand-in for it."""
    shape = (1, model.num_kv_heads, slots, model.head_dim)
    try:
        from transformers import LlamaConfig, StaticCache
    except ImportError:
        layers = [
            SimpleNamespace(
                keys=torch.zeros(shape, dtype=torch.bfloat16, device=device),
                values=torch.zeros(shape, dtype=torch.bfloat16, device=device),
                cumulative_length=torch.tensor(0, device=device),
                max_cache_len=slots,
            )
            for _ in range(model.num_layers)
        ]
        return SimpleNamespace(layers=layers)
    config = LlamaConfig(
        num_hidden_layers=model.num_layers,
        hidden_size=model.num_kv_heads * model.head_dim,
        num_attention_heads=model.num_kv_heads,
        num_key_value_heads=model.num_kv_heads,
    )
    cache = StaticCache(config, max_cache_len=slots)
    cache.early_initialization(1, model.num_kv_heads, model.head_dim, torch.bfloat16, device)
    return cache


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Equal in dtype, shape and every bit (NaN and the sign of zero too)."""
    return (
        got.dtype == want.dtype
        and got.shape == want.shape
        and torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))
    )
