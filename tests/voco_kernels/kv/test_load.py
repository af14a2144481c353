"""``load_into`` and ``extract`` on Transformers' caches and on paged ones, with the CPU loader."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from tests.voco_kernels.kv.test_entry import llama_rope, make_entry
from voco_kernels.kv import cache_view
from voco_kernels.kv.cache_view import PagedKV
from voco_kernels.kv.entry import QUANTIZED_MAX, CompactKV
from voco_kernels.kv.load import extract, load_into, prepare_extract, prepare_load

LAYERS, HEADS, HEAD_DIM = 4, 2, 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS,
    hidden_size=HEADS * HEAD_DIM,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
)


def static_cache(rows=1, slots=12, dtype=torch.float32):
    cache = StaticCache(CONFIG, max_cache_len=slots)
    cache.early_initialization(rows, HEADS, HEAD_DIM, dtype, torch.device("cpu"))
    return poison(cache)


def dynamic_cache(rows=1, slots=12, dtype=torch.float32):
    cache = DynamicCache()
    for layer in range(LAYERS):
        memory = torch.zeros(2, rows, HEADS, slots, HEAD_DIM, dtype=dtype)
        cache.update(memory[0], memory[1], layer)
    return poison(cache)


def paged_cache(rows=1, slots=12, dtype=torch.float32, block_size=4):
    """A cache whose rows own blocks in random order, so that their slots are scattered."""
    blocks = -(-slots // block_size)
    table = torch.randperm(rows * blocks, generator=torch.manual_seed(3)).view(rows, blocks) + 1
    shape = (rows * blocks + 2, block_size, HEADS, HEAD_DIM)
    layers = [
        (torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)) for _ in range(LAYERS)
    ]
    return poison(PagedKV(layers, table.int()))


CACHES = {"static": static_cache, "dynamic": dynamic_cache, "paged": paged_cache}


def pairs_of(cache):
    if isinstance(cache, PagedKV):
        return list(cache.layers)
    return [(layer.keys, layer.values) for layer in cache.layers]


def poison(cache):
    for pair in pairs_of(cache):
        for tensor in pair:
            tensor.fill_(torch.nan)
    return cache


def contents(cache):
    """Everything in a cache of any kind, as ``[L, 2, rows, Hkv, slots, D]``."""
    pairs = torch.stack([torch.stack(pair) for pair in pairs_of(cache)])
    if isinstance(cache, PagedKV):
        rows, _ = cache.block_table.shape
        return (
            pairs[:, :, cache.block_table.long()]
            .movedim(5, 3)
            .reshape(LAYERS, 2, rows, HEADS, -1, HEAD_DIM)
        )
    return pairs


def assert_only(cache, expected: dict[tuple[int, int], CompactKV]):
    """Check the entry at each (row, first slot), and that every other slot still has the poison."""
    found = contents(cache)
    untouched = torch.ones(found.shape[2], found.shape[4], dtype=torch.bool)
    for (row, slot), entry in expected.items():
        stop = slot + entry.num_tokens
        assert torch.equal(found[:, :, row, :, slot:stop], entry.kv)
        untouched[row, slot:stop] = False
    assert (
        found.movedim(4, 3)[:, :, untouched.nonzero()[:, 0], untouched.nonzero()[:, 1]]
        .isnan()
        .all()
    )
    if isinstance(cache, PagedKV):
        rest = set(range(cache.layers[0][0].shape[0])) - set(cache.block_table.flatten().tolist())
        assert all(t[list(rest)].isnan().all() for pair in cache.layers for t in pair)


@pytest.fixture(params=CACHES)
def make_cache(request):
    return CACHES[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_of_a_batch_go_to_their_slots_bit_by_bit(make_cache, dtype):
    entries = [make_entry(tokens, dtype=dtype, seed=tokens) for tokens in (1, 3, 8)]
    cache = make_cache(rows=4, dtype=dtype)
    load_into(cache, entries, rows=[3, 0, 1], slots=[11, 2, 0])
    assert_only(cache, {(3, 11): entries[0], (0, 2): entries[1], (1, 0): entries[2]})


def test_several_images_in_one_prompt(make_cache):
    a, b, c = (make_entry(tokens, seed=tokens) for tokens in (1, 2, 4))
    cache = make_cache(rows=2)
    load_into(cache, [[a, b], [c]], slots=[[1, 7], 5])
    assert_only(cache, {(0, 1): a, (0, 7): b, (1, 5): c})
    poison(cache)
    load_into(cache, [[a, b, c], []], slots=3)
    assert_only(cache, {(0, 3): a, (0, 4): b, (0, 6): c})


def test_by_default_rows_end_together_and_the_length_is_set():
    a, b, c = (make_entry(tokens, seed=tokens) for tokens in (1, 2, 4))
    cache = static_cache(rows=2)
    load_into(cache, [[a, b], [c]])
    assert_only(cache, {(0, 1): a, (0, 2): b, (1, 0): c})
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [4] * LAYERS

    cache = DynamicCache()
    load_into(cache, [[a, b], [c]])
    assert cache.get_seq_length() == 4
    found = contents(cache)
    assert torch.equal(found[:, :, 0, :, 1:2], a.kv) and torch.equal(found[:, :, 1], c.kv)
    assert (found[:, :, 0, :, 0] == 0).all()

    cache = paged_cache(rows=2)
    load_into(cache, [[a, b], [c]])
    assert_only(cache, {(0, 0): a, (0, 1): b, (1, 0): c})


def test_with_slots_the_length_stays():
    cache = static_cache()
    load_into(cache, make_entry(2), slots=5)
    assert int(cache.get_seq_length()) == 0


def test_a_loaded_cache_can_be_extended():
    cache, entry = DynamicCache(), make_entry(2)
    load_into(cache, entry)
    new = torch.randn(1, HEADS, 1, HEAD_DIM)
    for layer in range(LAYERS):
        keys, values = cache.update(new, new, layer)
        assert torch.equal(keys, torch.cat([entry.kv[layer, 0][None], new], dim=2))
        assert torch.equal(values, torch.cat([entry.kv[layer, 1][None], new], dim=2))
    static = static_cache()
    load_into(static, entry)
    for layer in range(LAYERS):
        keys, _ = static.update(new, new, layer)
        assert torch.equal(keys[0, :, :3], torch.cat([entry.kv[layer, 0], new[0]], dim=1))


def test_tensors_at_irregular_distances():
    """Tensors scattered as in a long-running process, or in one allocation in reverse order."""
    entry = make_entry(3, rope=llama_rope())
    memory = torch.full((LAYERS * 7, 1, 12, HEADS, HEAD_DIM), torch.nan)
    for at in ([0, 3, 4, 9, 10, 11, 20, 27], list(range(7, -1, -1)), [0, 1, 4, 5, 8, 9, 12, 13]):
        memory.fill_(torch.nan)
        tensors = [memory[index].transpose(1, 2) for index in at]
        cache = DynamicCache()
        cache_view.allocate(cache, LAYERS, (1, HEADS, 12, HEAD_DIM), torch.float32, lambda _: "cpu")
        for layer, keys, values in zip(cache.layers, tensors[::2], tensors[1::2], strict=True):
            layer.keys, layer.values = keys, values
        load_into(cache, entry, slots=4)
        assert_only(cache, {(0, 4): entry})
        rest = [index for index in range(len(memory)) if index not in at]
        assert memory[rest].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entry_dtype", [*DTYPES, *QUANTIZED_MAX], ids=str)
def test_other_dtypes_are_rounded_once(make_cache, entry_dtype, dtype):
    entry = make_entry(3, rope=llama_rope())
    if entry_dtype in QUANTIZED_MAX:
        entry = entry.quantize(entry_dtype)
        expected = entry.dequantize(dtype)
    else:
        entry = entry.to(dtype=entry_dtype)
        expected = entry.to(dtype=dtype)
    cache = make_cache(dtype=dtype)
    load_into(cache, entry, slots=1)
    assert_only(cache, {(0, 1): expected})


@pytest.mark.parametrize("entry_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_positions_rotate_keys_on(make_cache, entry_dtype):
    rope = llama_rope()
    a, b = (make_entry(tokens, rope=rope, seed=tokens) for tokens in (1, 3))
    if entry_dtype == torch.int8:
        a, b = a.quantize(), b.quantize()
        plain = [a.dequantize(torch.float32), b.dequantize(torch.float32)]
    else:
        a, b = a.to(dtype=entry_dtype), b.to(dtype=entry_dtype)
        plain = [a.to(dtype=torch.float32), b.to(dtype=torch.float32)]
    where = torch.tensor([8, 100, 1001])
    cache = make_cache(rows=2)
    load_into(cache, [a, b], slots=[2, 4], positions=[5000, where])
    expected = {(0, 2): plain[0].rotated(5000), (1, 4): plain[1].rotated(where)}
    assert_only(cache, expected)
    # at its present positions, an entry is copied bit for bit
    load_into(poison(cache), [a, b], slots=[2, 4], positions=[7, 7])
    assert_only(cache, {(0, 2): plain[0], (1, 4): plain[1]})
    # two images in one row, one of which keeps its positions
    load_into(poison(cache), [[a, b]], rows=[1], slots=[[0, 6]], positions=[[7, 50]])
    assert_only(cache, {(1, 0): plain[0], (1, 6): plain[1].rotated(50)})


def test_entries_of_different_dtypes_in_one_row(make_cache):
    a, b, c = (make_entry(tokens, seed=tokens) for tokens in (1, 2, 3))
    entries = [a, b.quantize(), c.to(dtype=torch.bfloat16)]
    cache = make_cache()
    load_into(cache, [entries], slots=2)
    expected = [entry.to(dtype=torch.float32) for entry in entries]
    assert_only(cache, {(0, 2): expected[0], (0, 3): expected[1], (0, 5): expected[2]})


def test_extract_is_the_inverse_of_load_into(make_cache):
    entries = [make_entry(tokens, seed=tokens) for tokens in (1, 3)]
    cache = make_cache(rows=3)
    load_into(cache, entries, rows=[2, 0], slots=[3, 5])
    rope = llama_rope()
    found = extract(
        cache,
        [[3], [7, 6, 5]],
        [[10], [20, 21, 30]],
        rows=[2, 0],
        next_positions=[11, 40],
        rope=rope,
        fingerprint="f",
    )
    assert torch.equal(found[0].kv, entries[0].kv)
    assert torch.equal(found[1].kv, entries[1].kv.flip(3))
    assert [entry.positions.tolist() for entry in found] == [[10], [20, 21, 30]]
    assert [entry.next_position for entry in found] == [11, 40]
    assert all(entry.rope is rope and entry.fingerprint == "f" for entry in found)
    (one,) = extract(cache, torch.tensor([[3]]), torch.tensor([[10]]), rows=[2])
    assert one.next_position == 11


def test_a_transfer_is_launched_again_and_with_other_entries(make_cache):
    first, second = make_entry(2, seed=1), make_entry(2, seed=2)
    cache = make_cache()
    transfer = prepare_load(cache_view.views(cache), first, slots=3)
    transfer.launch()
    assert_only(cache, {(0, 3): first})
    transfer.replace([second])
    assert_only(cache, {(0, 3): first})
    transfer.launch()
    assert_only(cache, {(0, 3): second})
    with pytest.raises(ValueError, match="expected entries like those before"):
        transfer.replace([make_entry(3)])
    out = prepare_extract(cache, [[3, 4]], [[0, 1]])
    out.launch()
    assert torch.equal(out.entries[0].kv, second.kv)
    load_into(cache, first, slots=3)
    out.launch()
    assert torch.equal(out.entries[0].kv, first.kv)


@pytest.mark.parametrize("quantized", [False, True])
def test_layers_are_fed_as_they_arrive(quantized):
    entries = [make_entry(tokens, seed=tokens, rope=llama_rope()) for tokens in (1, 3)]
    if quantized:
        entries = [entry.quantize() for entry in entries]
    shells = [
        CompactKV(
            entry.kv.to("meta"),
            entry.positions,
            entry.next_position,
            None if entry.scales is None else entry.scales.to("meta"),
            entry.rope,
        )
        for entry in entries
    ]
    expected, cache = static_cache(rows=2), static_cache(rows=2)
    load_into(expected, entries, positions=[7, 9])
    transfer = prepare_load(cache, shells, positions=[7, 9])
    for index, entry in enumerate(entries):
        for start, stop in ((0, 1), (1, 3), (3, 4)):
            scales = None if entry.scales is None else entry.scales[start:stop]
            transfer.feed(index, start, entry.kv[start:stop], scales)
    assert int(cache.get_seq_length()) == 0
    transfer.commit()
    assert int(cache.get_seq_length()) == 3
    assert contents(cache).nan_to_num().equal(contents(expected).nan_to_num())


ENTRY = make_entry(2)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda c: load_into(c, []), "at least one compact entry, got none"),
        (
            lambda c: load_into(c, make_entry(2, layers=3), slots=0),
            r"\(4, 2, 16\), got \(3, 2, 16\)",
        ),
        (lambda c: load_into(c, make_entry(2, head_dim=8), slots=0), r"got \(4, 2, 8\)"),
        (
            lambda c: load_into(c, [ENTRY, make_entry(1, heads=1)], slots=0),
            r"\(4, 1, 16\) in entry 1",
        ),
        (lambda c: load_into(c, [ENTRY] * 3, slots=0), "expected rows 0 to 1, got 2"),
        (lambda c: load_into(c, ENTRY, slots=11), "expected slots 0 to 11, got 11 to 12 in row 0"),
        (lambda c: load_into(c, ENTRY, slots=-1), "got -1 to 0"),
        (
            lambda c: load_into(c, [[ENTRY, ENTRY]], slots=[[0, 1]]),
            "expected every slot to be used once, got slot 1 of row 0 twice",
        ),
        (lambda c: load_into(c, [ENTRY] * 2, rows=[1, 1], slots=0), "2 different rows"),
        (lambda c: load_into(c, [ENTRY], slots=[1, 2]), "slots for each of 1 rows, got 2"),
        (
            lambda c: load_into(c, [[ENTRY, ENTRY]], slots=[[1]]),
            "first slot for each of the 2 entries",
        ),
        (
            lambda c: load_into(c, [[ENTRY, ENTRY]], slots=0, positions=[3]),
            "for each of the 2 entries",
        ),
        (lambda c: load_into(c, ENTRY, slots=0, positions=[3]), "know their rope"),
        (lambda c: load_into(c, ENTRY, slots=0, loader="cuda"), "cuda: "),
        (
            lambda c: load_into(c, ENTRY, slots=0, loader="gpu"),
            "expected a loader of cpu, cuda, triton",
        ),
        (
            lambda c: load_into(c, ENTRY, slots=0, dtype=torch.half),
            "only with an empty DynamicCache",
        ),
        (
            lambda c: extract(c, [[0, 1]], [[0]]),
            "a slot for each position, at least one, got 2 and 1",
        ),
        (lambda c: extract(c, [[0]], [[0]], rows=[2]), "expected rows 0 to 1, got 2"),
        (lambda c: extract(c, [[1, 1]], [[0, 1]]), "got slot 1 of row 0 twice"),
        (lambda c: extract(c, [[0]], [[0], [1]]), "for the same rows, at least one, got 1, 2"),
    ],
)
def test_refuses_what_does_not_fit_and_changes_nothing(make_cache, what, message):
    cache = make_cache(rows=2)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        what(cache)
    assert contents(cache).isnan().all()


def test_an_error_leaves_an_empty_dynamic_cache_empty():
    ropes = [make_entry(rope=llama_rope(interleaved=each)) for each in (False, True)]
    for entries, options in (
        (ropes, {"positions": [9, 9]}),
        (ENTRY, {"loader": "cuda"}),
        (ENTRY, {"loader": "no such"}),
    ):
        cache = DynamicCache()
        with pytest.raises((ValueError, NotImplementedError)):
            load_into(cache, entries, **options)
        assert cache.get_seq_length() == 0 and not cache.layers
        load_into(cache, ENTRY)
        assert cache.get_seq_length() == 2


def test_tensors_that_were_replaced_are_found():
    cache = static_cache()
    load_into(cache, ENTRY, slots=0)
    for layer in cache.layers:
        layer.keys.data = torch.full_like(layer.keys, torch.nan)
        layer.cumulative_length = torch.zeros_like(layer.cumulative_length)
    load_into(cache, ENTRY)
    assert torch.equal(cache.layers[1].keys[0, :, :2], ENTRY.kv[1, 0])
    assert int(cache.get_seq_length()) == 2


def test_bytes_are_only_written_for_entries_that_are_copied_unchanged():
    half = make_entry(2, dtype=torch.float16)
    transfer = prepare_load(static_cache(), [[ENTRY, half]])
    assert [transfer.takes_bytes(index) for index in range(2)] == [True, False]
    with pytest.raises(ValueError, match="bytes go into the cache unchanged, got entry 1"):
        transfer.write(1, 0, memoryview(bytes(half.nbytes)))
    with pytest.raises(ValueError, match="bytes go into the cache unchanged, got entry 1"):
        transfer.destinations(1)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda t: t.feed(1, 0, ENTRY.kv), "expected an entry from 0 to 0, got 1"),
        (lambda t: t.feed(0, 0, torch.ones(1, 1, 1, 1, 1)), r"got torch.float32 \[1, 1, 1, 1, 1\]"),
        (lambda t: t.feed(0, 0, ENTRY.kv.double()), "expected torch.float32"),
        (lambda t: t.feed(0, LAYERS - 1, ENTRY.kv), "within 4 layers, .* from layer 3 on"),
        (lambda t: t.feed(0, 0, ENTRY.kv, ENTRY.kv[..., 0]), "expected scales of shape None"),
        (lambda t: t.write(0, 3, memoryview(bytes(128))), "expected whole heads of 128 bytes"),
        (lambda t: t.write(0, ENTRY.nbytes, memoryview(bytes(128))), "within 2048"),
    ],
)
def test_layers_that_do_not_fit_are_not_fed(what, message):
    cache = static_cache()
    with pytest.raises(ValueError, match=message):
        what(prepare_load(cache, ENTRY))
    assert contents(cache).isnan().all()


def test_slots_that_share_memory_and_wrong_arguments_are_refused():
    cache = static_cache()
    cache.layers[0].cumulative_length = torch.zeros(2, dtype=torch.int32)[0]
    with pytest.raises(ValueError, match="expected cumulative_length as one int64 .* torch.int32"):
        load_into(cache, ENTRY)
    paged = paged_cache(rows=2)
    paged.block_table[1] = paged.block_table[0]
    with pytest.raises(ValueError, match="rows of the block table that name one block twice"):
        load_into(paged, [ENTRY, ENTRY])
    overlapping = dynamic_cache(rows=2)
    for layer in overlapping.layers:
        memory = torch.zeros(HEADS, 16, HEAD_DIM)
        strides = (2 * HEAD_DIM, 16 * HEAD_DIM, HEAD_DIM, 1)  # row 1 starts at slot 2 of row 0
        layer.keys = layer.values = memory.as_strided((2, HEADS, 12, HEAD_DIM), strides)
    with pytest.raises(ValueError, match="slots that share memory: .* or tensors that overlap"):
        load_into(overlapping, [ENTRY, ENTRY], slots=[2, 0])
    eight_bits = PagedKV(
        [(torch.zeros(3, 4, 2, 16, dtype=torch.int8),) * 2] * LAYERS, paged.block_table
    )
    with pytest.raises(ValueError, match="expected a cache in a floating dtype"):
        load_into(eight_bits, ENTRY.quantize())
    expanded = dynamic_cache()
    for layer in expanded.layers:
        layer.keys = layer.values = layer.keys[:, :, :1].expand(-1, -1, 12, -1)
    with pytest.raises(ValueError, match="slots that don't overlap"):
        load_into(expanded, ENTRY, slots=0)
    with pytest.raises(TypeError, match="a slot as an int, got float 0.9"):
        load_into(static_cache(), ENTRY, slots=[0.9])
    with pytest.raises(TypeError, match="expected a cache with layers"):
        load_into([], ENTRY)
    with pytest.raises(TypeError, match="expected CompactKV entries in a list, got int"):
        load_into(static_cache(), 5)
    running = static_cache(rows=2)
    with pytest.raises(ValueError, match="expected slots with rows"):
        load_into(running, ENTRY, rows=[1])
    assert contents(running).isnan().all()
    shell = CompactKV(ENTRY.kv.to("meta"), ENTRY.positions, ENTRY.next_position)
    with pytest.raises(ValueError, match="expected entries with memory"):
        load_into(static_cache(), shell)


def test_positions_must_rise():
    entry = make_entry(2, rope=llama_rope())
    with pytest.raises(ValueError, match=r"expected positions >= 0 that rise, got \[5, 5\]"):
        load_into(static_cache(), entry, positions=[torch.tensor([5, 5])])
    with pytest.raises(ValueError, match=r"got \[-1, 0\]"):
        load_into(static_cache(), entry, positions=[-1])


def test_entries_of_different_models_do_not_mix():
    a, b = (replace(make_entry(), fingerprint=name) for name in ("one", "another"))
    load_into(static_cache(rows=2), [a, make_entry()])  # one without a fingerprint
    with pytest.raises(ValueError, match="expected entries of one model, got the fingerprints"):
        load_into(static_cache(rows=2), [a, b])
    ropes = [make_entry(rope=llama_rope(interleaved=each)) for each in (False, True)]
    with pytest.raises(ValueError, match="another rope in entry 1"):
        load_into(static_cache(rows=2), ropes, positions=[9, 9])


def test_refuses_caches_that_it_cannot_use():
    with pytest.raises(TypeError, match="expected a cache with layers .* got dict"):
        load_into({}, ENTRY)
    with pytest.raises(TypeError, match="expected CompactKV entries, got Tensor in row 0"):
        load_into(static_cache(), [[torch.zeros(1)]])
    with pytest.raises(ValueError, match="call cache.early_initialization"):
        load_into(StaticCache(CONFIG, max_cache_len=4), ENTRY)
    with pytest.raises(ValueError, match="got none with one that holds 12 tokens"):
        load_into(dynamic_cache(), ENTRY)
    with pytest.raises(ValueError, match="neither slots nor rows with an empty .* leave them out"):
        load_into(DynamicCache(), ENTRY, slots=0)
    with pytest.raises(ValueError, match="int32 or int64"):
        PagedKV([], torch.zeros(2))
    paged = paged_cache()
    paged.block_table[0, 1] = -1
    load_into(paged, ENTRY, slots=0)  # the missing block is not used
    with pytest.raises(
        ValueError, match="expected blocks 0 to 4 .* got block -1 for slot 4 of row 0"
    ):
        load_into(paged, ENTRY, slots=3)
    sliding = StaticCache(
        LlamaConfig(
            num_hidden_layers=LAYERS, sliding_window=4, layer_types=["sliding_attention"] * LAYERS
        ),
        max_cache_len=8,
    )
    sliding.early_initialization(1, HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="got a sliding window in layer 0"):
        load_into(sliding, ENTRY, slots=0)
    apart = dynamic_cache()
    for layer in apart.layers[2:]:  # as on another device, with fewer slots
        layer.keys, layer.values = (
            layer.keys[:, :, :4].to("meta"),
            layer.values[:, :, :4].to("meta"),
        )
    with pytest.raises(ValueError, match=r"got \(1, 12, 2, 16\) from layer 0 .* from layer 2 on"):
        load_into(apart, ENTRY, slots=8)
    uneven = dynamic_cache()
    uneven.layers[2].values = uneven.layers[2].values.half()
    with pytest.raises(ValueError, match="float16 .* as the values of layer 2"):
        load_into(uneven, ENTRY, slots=0)


@pytest.mark.parametrize("integer", [np.int64, np.uint8, torch.tensor])
def test_numpy_integers_and_single_tensors_are_integers(integer):
    entry = make_entry(3, rope=llama_rope())
    expected, got = dynamic_cache(rows=2), dynamic_cache(rows=2)
    load_into(expected, [entry], rows=[1], slots=4, positions=[9])
    load_into(got, [entry], rows=[integer(1)], slots=integer(4), positions=[np.int64(9)])
    for ours, theirs in zip(pairs_of(got), pairs_of(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("wrong", [True, 2.0, np.float64(2), np.True_, "2"])
@pytest.mark.parametrize(
    ("name", "nested"),
    [("rows", 1), ("slots", 0), ("slots", 1), ("slots", 2), ("positions", 0), ("positions", 2)],
)
def test_other_types_than_integers_are_refused_and_nothing_is_changed(name, nested, wrong):
    for _ in range(nested):
        wrong = [wrong]
    cache = dynamic_cache()
    before = [tensor.clone() for pair in pairs_of(cache) for tensor in pair]
    with pytest.raises(TypeError, match="expected .* as an int.*got"):
        load_into(cache, [make_entry(3)], **{"slots": 0, name: wrong})
    after = [tensor for pair in pairs_of(cache) for tensor in pair]
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
