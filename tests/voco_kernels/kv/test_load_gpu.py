"""``load_into`` and ``extract`` on a GPU: each loader, entries in each kind of memory, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from tests.voco_kernels.kv.test_entry import llama_rope, make_entry
from tests.voco_kernels.kv.test_load import CONFIG, HEAD_DIM, HEADS, poison
from voco_kernels.kv import cache_view, staging
from voco_kernels.kv.entry import CompactKV
from voco_kernels.kv.load import extract, load_into, prepare_load
from voco_kernels.kv.loaders import cuda, triton

pytestmark = pytest.mark.gpu
LOADERS = {"cuda": cuda, "triton": triton}


@pytest.fixture(params=LOADERS)
def loader(request):
    if why_not := LOADERS[request.param].missing():
        pytest.skip("; ".join(why_not))
    return request.param


def static_cache(rows=1, slots=12, dtype=torch.bfloat16):
    cache = StaticCache(CONFIG, max_cache_len=slots)
    cache.early_initialization(rows, HEADS, HEAD_DIM, dtype, torch.device("cuda"))
    return poison(cache)


def contents(cache):
    return torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers]).cpu()


def in_memory(entry: CompactKV, kind: str) -> CompactKV:
    if kind == "device":
        return entry.to("cuda")
    if kind == "pinned":
        scales = None if entry.scales is None else entry.scales.pin_memory()
        return CompactKV(
            entry.kv.pin_memory(), entry.positions, entry.next_position, scales, entry.rope
        )
    return entry


@pytest.mark.parametrize("staged_above", [0, 1 << 30])
@pytest.mark.parametrize("kind", ["device", "pinned", "pageable"])
@pytest.mark.parametrize("quantized", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_entries_come_from_any_memory(loader, kind, quantized, staged_above, monkeypatch):
    monkeypatch.setattr(staging, "STAGED_ABOVE", staged_above)
    entries = [make_entry(tokens, dtype=torch.bfloat16, seed=tokens) for tokens in (1, 3, 8)]
    expected = entries
    if quantized is not None:
        entries = [entry.quantize(quantized) for entry in entries]
        expected = [entry.dequantize(torch.bfloat16) for entry in entries]
    cache = static_cache(rows=3)
    load_into(cache, [in_memory(entry, kind) for entry in entries], loader=loader)
    found = contents(cache)
    for row, entry in enumerate(expected):
        assert torch.equal(found[:, :, row, :, 8 - entry.num_tokens : 8], entry.kv)
        assert found[:, :, row, :, : 8 - entry.num_tokens].isnan().all()
    assert found[:, :, :, :, 8:].isnan().all()
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [8] * len(cache.layers)


def test_keys_are_rotated(loader):
    entry = make_entry(3, rope=llama_rope())
    cache = static_cache(dtype=torch.float32)
    load_into(cache, entry, positions=[50_000], loader=loader)
    expected = entry.rotated(50_000).kv
    bound = 8 * torch.finfo(torch.float32).eps * entry.kv.abs().max()
    torch.testing.assert_close(contents(cache)[:, :, 0, :, :3], expected, rtol=0, atol=bound)


def test_extract_is_the_inverse_of_load_into(loader):
    entry = make_entry(3, dtype=torch.bfloat16)
    cache = static_cache(rows=2)
    load_into(cache, [entry], rows=[1], slots=[4], loader=loader)
    (found,) = extract(cache, [[4, 5, 6]], [[7, 8, 9]], rows=[1], loader=loader)
    assert found.device.type == "cuda" and torch.equal(found.kv.cpu(), entry.kv)


@pytest.mark.parametrize("kind", ["device", "pinned"])
def test_a_graph_loads_what_the_tables_name(loader, kind):
    first, second = (
        in_memory(make_entry(2, dtype=torch.bfloat16, seed=seed), kind) for seed in (1, 2)
    )
    cache = static_cache()
    transfer = prepare_load(cache_view.views(cache), [first], loader=loader)
    transfer.launch()  # compiles what is compiled at the first call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        transfer.launch()
    for entry in (second, first):
        transfer.replace([entry])
        poison(cache)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(contents(cache)[:, :, 0, :, :2], entry.kv.cpu())


def test_pinned_memory_is_kept_until_it_was_read(loader):
    """The entry is freed at once, but its memory must not be reused while the kernel reads it."""
    cache = static_cache(rows=1)
    for seed in range(50):
        torch.cuda._sleep(1_000_000)  # the kernel waits
        entry = make_entry(2, dtype=torch.bfloat16, seed=seed)
        load_into(cache, in_memory(entry, "pinned"), loader=loader)
        in_memory(make_entry(2, dtype=torch.bfloat16, seed=1000 + seed), "pinned")
        torch.cuda.synchronize()
        assert torch.equal(contents(cache)[:, :, 0, :, :2], entry.kv)
