"""Tests of the schedule: its tiles cover every visible pair exactly once, with few tiles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.voco_kernels.brute_force import brute_force_mask
from tests.voco_kernels.cases import CASES, Case, image
from tests.voco_kernels.strategies import cases
from voco_kernels import MaskLayout
from voco_kernels.layout import schedule
from voco_kernels.layout.schedule import CONTIGUOUS, START, TILE


def query_tiles_mask(layout: MaskLayout) -> tuple[Tensor, Tensor]:
    """The mask that query tiles represent, bool ``[B, S, S]``, and how many tiles hold each query."""
    visible = torch.zeros(layout.batch, layout.length, layout.length, dtype=torch.bool)
    times = torch.zeros(layout.batch, layout.length, dtype=torch.long)
    count = layout.schedule.counts[0]
    for row, start, stop, key_start, prefix_start, prefix_stop, *_ in layout.schedule.query_tiles[
        :count
    ].tolist():
        times[row, start:stop] += 1
        visible[row, start:stop, layout.schedule.kept[row, prefix_start:prefix_stop].long()] = True
        for query in range(start, stop):
            assert not visible[row, query, key_start : query + 1].any(), "a pair in both parts"
            visible[row, query, key_start : query + 1] = True
    return visible, times


def key_tiles_mask(layout: MaskLayout) -> tuple[Tensor, Tensor]:
    """The same for key tiles. In a contiguous tile, queries see the keys up to their own position; in a
    gathered one, those keys must also not be before the query's ``visible_from``."""
    visible = torch.zeros(layout.batch, layout.length, layout.length, dtype=torch.bool)
    times = torch.zeros(layout.batch, layout.length, dtype=torch.long)
    position = torch.arange(layout.length)
    count = layout.schedule.counts[1]
    for row, kind, start, stop, query_start, query_stop, *_ in layout.schedule.key_tiles[
        :count
    ].tolist():
        keys, queries = position[start:stop], position[query_start:query_stop]
        seen_from = torch.zeros_like(queries)
        if kind != CONTIGUOUS:
            keys = layout.schedule.kept[row, start:stop].long()
            queries = layout.schedule.readers[row, query_start:query_stop].long()
            seen_from = layout.visible_from[row, queries]
        times[row, keys] += 1
        seen = (keys <= queries[:, None]) & (keys >= seen_from[:, None])
        visible[row, queries[:, None], keys] |= seen
    return visible, times


def check(case: Case) -> None:
    layout = case.layout()
    mask = brute_force_mask(case.rows, isolated=case.isolated, padding_side=case.padding_side)

    visible, times = query_tiles_mask(layout)
    assert torch.equal(visible, mask)
    assert (times == 1).all(), "each query, also padding, belongs to one tile"

    visible, times = key_tiles_mask(layout)
    assert torch.equal(visible, mask)
    assert (times == 1).all(), "each key, also padding, belongs to one tile"


@pytest.mark.parametrize("name", CASES)
def test_tiles_equal_the_definition(name):
    check(CASES[name])


@settings(max_examples=150, deadline=None)
@given(cases())
def test_tiles_of_drawn_layouts_equal_the_definition(case):
    """Tiles have 4 rows, so that short documents have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "TILE", 4)
        check(case)


@pytest.mark.parametrize("name", CASES)
def test_no_tile_straddles_runs_or_is_too_long(name):
    layout = CASES[name].layout()
    tiles = layout.schedule.host_query_tiles().tolist()
    assert tiles == sorted(tiles)
    for row, start, stop, key_start, *_, run_start, run_stop in tiles:
        assert run_start <= start < stop <= run_stop and stop - start <= TILE
        assert (start - run_start) % TILE == 0, "tiles start where runs start"
        queries = slice(start, stop)
        assert len(set(layout.visible_from[row, queries].tolist())) == 1
        hidden_behind = layout.visible_until[row, key_start:start]
        assert not ((hidden_behind > start) & (hidden_behind < stop)).any()
    runs = [(row, start, stop) for row, start, stop, *_ in layout.schedule.host_runs()]
    assert runs == sorted(
        {(row, *ends) for row, *_, start, stop in tiles for ends in [(start, stop)]}
    )


def test_text_behind_64_images_reads_one_more_block():
    """It reads the 64 VoCo tokens, half a block of keys, and none of the 64 * 576 hidden keys."""
    first = 64 * 577
    layout = MaskLayout.from_spans([[*image(576, 1) * 64, ("text", 2048)]])
    text = [tile for tile in layout.schedule.host_query_tiles().tolist() if tile[START] >= first]
    assert len(text) == 2048 // TILE
    for _, _, stop, key_start, prefix_start, prefix_stop, *_ in text:
        assert key_start == first - 1 and prefix_stop - prefix_start == 63
        keys_read = stop - key_start + prefix_stop - prefix_start
        assert keys_read - (stop - first) == 64 <= TILE


def test_isolated_images_read_nothing_but_themselves():
    layout = MaskLayout.from_spans([[*image(576, 1) * 64, ("text", 2048)]], isolated=True)
    for (
        _,
        start,
        stop,
        key_start,
        prefix_start,
        prefix_stop,
        *_,
    ) in layout.schedule.host_query_tiles().tolist():
        if stop <= 64 * 577:
            assert prefix_start == prefix_stop and key_start == start // 577 * 577


@settings(max_examples=50, deadline=None)
@given(cases())
def test_shapes_depend_on_batch_and_length_alone(case):
    layout = case.layout()
    tokens = layout.batch * layout.length
    rows = (layout.batch, layout.length)
    shapes = {name: tuple(t.shape) for name, t in layout.schedule._asdict().items()}
    assert shapes == {
        "query_tiles": (tokens, 8),
        "key_tiles": (tokens, 8),
        "counts": (2,),
        "kept": rows,
        "readers": rows,
    }
    assert all(tensor.dtype == torch.int32 for tensor in layout.schedule)


def test_the_hopper_kernels_name_the_same_columns():
    source = (Path(__file__).parents[3] / "csrc" / "tiles.cuh").read_text()
    columns = dict(re.findall(r"enum (\w+) \{ ([^}]+) \};", source))
    query = {name: index for index, name in enumerate(columns["QueryTileColumn"].split(", "))}
    key = {name: index for index, name in enumerate(columns["KeyTileColumn"].split(", "))}
    assert key.pop("KEY_ROW") == schedule.ROW
    assert {name: getattr(schedule, name) for name in {**query, **key}} == {**query, **key}
    assert f"TILE_COLUMNS = {schedule.TILE_COLUMNS};" in source
