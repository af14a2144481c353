// Mapping of a work item's number to its queries and keys (docs/schedule.md, docs/hopper.md).
#pragma once

#include "blocks.cuh"
#include "params.h"

VOCO_DEVICE uint16_t* row_address(const Tensor4& tensor, int row, int head, int token) {
  return static_cast<uint16_t*>(tensor.data) + row * tensor.batch_stride + head * tensor.head_stride +
         token * tensor.token_stride;
}

// Index into a [batch, heads, length] array with one number per query.
VOCO_DEVICE int64_t statistic_index(const AttentionParams& params, int row, int head, int token) {
  return (static_cast<int64_t>(row) * params.heads + head) * params.length + token;
}

constexpr int SCHEDULE_TILE = 128;  // TILE in voco_kernels/layout/schedule.py

// Columns of the schedule's two tables, described in voco_kernels/layout/schedule.py.
constexpr int TILE_COLUMNS = 8;
enum QueryTileColumn { ROW, START, STOP, KEY_START, PREFIX_START, PREFIX_STOP, RUN_START, RUN_STOP };
enum KeyTileColumn { KEY_ROW, KIND, KEY_TILE_START, KEY_TILE_STOP, QUERY_START, QUERY_STOP };

// Items are numbered so that CTAs that run at the same time share keys: within a section of tiles, a few
// heads are finished before the next few begin, so their keys and values stay in L2.
constexpr int SECTION = 16;
constexpr int HEAD_GROUP = 8;

struct Item {
  int tile, head;
};

VOCO_DEVICE Item item_at(int index, int tiles, int heads) {
  const int section = index / (SECTION * heads);
  const int in_section = index - section * SECTION * heads;
  const int tiles_here = min(SECTION, tiles - section * SECTION);
  const int group = in_section / (tiles_here * HEAD_GROUP);
  const int in_group = in_section - group * tiles_here * HEAD_GROUP;
  const int heads_here = min(HEAD_GROUP, heads - group * HEAD_GROUP);
  return {section * SECTION + in_group / heads_here, group * HEAD_GROUP + in_group % heads_here};
}

// Grouped queries are packed: 2^log2 heads that share keys (a pack) are interleaved as rows, so that the
// 64 rows of a consumer are 64 >> log2 positions. Row r is head r % 2^log2 at position r >> log2.
struct Packing {
  int log2;

  VOCO_DEVICE int heads() const { return 1 << log2; }
  VOCO_DEVICE int positions() const { return BLOCK_ROWS >> log2; }
};

// The largest power of two that divides the group.
inline int packing_log2(int heads, int kv_heads) {
  int log2 = 0;
  while (log2 < 5 && (heads / kv_heads) % (2 << log2) == 0) ++log2;
  return log2;
}

// Queries [start, end) of one pack of heads. Tiles are cut from the end of a run, so only a run's first
// tile can be partial (its queries before run_start are not in the run and are not stored).
//
// They see keys [first_key, end) of one axis. From key_start on, these are token positions. Before that
// they are the run's prefix, which is gathered: key j is token kept[prefix_stop - (key_start - j)]. A
// query sees all keys up to its own position. Blocks of 64 keys are cut from the end as well, so only
// the first can be partial, and the diagonal passes through the corners of blocks.
struct QueryTile {
  int row, pack, kv_head;
  int start, end, run_start;
  int first_key, key_start, prefix_stop;
  int blocks;  // negative after the last item
  // How many items with keys, and blocks of keys and of values, this CTA copied before.
  int fill, first_load;

  VOCO_DEVICE bool is_end() const { return blocks < 0; }
  VOCO_DEVICE int block_start(int block) const { return end - BLOCK_ROWS * (blocks - block); }
  // Whether the block is full and contiguous in memory, so that TMA can copy it.
  VOCO_DEVICE bool contiguous(int block) const { return block_start(block) >= key_start; }
  // The first block has at most 16 keys, so its products need a quarter of the width.
  VOCO_DEVICE bool narrow() const {
    return blocks > 0 && first_key - block_start(0) >= BLOCK_ROWS - NARROW_ROWS;
  }
  // The number of blocks that a consumer needs; 0 if all its queries are before the run.
  VOCO_DEVICE int blocks_until(int last_position) const {
    return last_position < run_start ? 0 : max(0, blocks - (end - 1 - last_position) / BLOCK_ROWS);
  }
};

// The number of items: each tile of the schedule becomes 2^log2 tiles, for heads / 2^log2 packs.
VOCO_DEVICE int query_items(const AttentionParams& params) { return params.counts[0] * params.heads; }

VOCO_DEVICE QueryTile query_tile(const AttentionParams& params, Packing packing, int index) {
  QueryTile tile = {};
  if (index >= query_items(params)) {
    tile.blocks = -1;
    return tile;
  }
  const int packs = params.heads >> packing.log2;
  const Item item = item_at(index, params.counts[0] << packing.log2, packs);
  const int* entry = params.query_tiles + (item.tile >> packing.log2) * TILE_COLUMNS;
  const int start = entry[START], run_start = entry[RUN_START], run_stop = entry[RUN_STOP];
  // The schedule cuts tiles of 128 positions from the run's start. The n-th from its end is used here
  // for the n-th tile cut from the end.
  const int tiles_behind =
      (run_stop - 1 - run_start) / SCHEDULE_TILE - (start - run_start) / SCHEDULE_TILE;
  const int part = item.tile & (packing.heads() - 1);
  const int positions = 2 * packing.positions();

  tile.row = entry[ROW];
  tile.pack = item.head;
  tile.kv_head = (item.head << packing.log2) / (params.heads / params.kv_heads);
  tile.end = run_stop - ((tiles_behind << packing.log2) + part) * positions;
  tile.start = tile.end - positions;
  tile.run_start = run_start;
  tile.key_start = entry[KEY_START];
  tile.first_key = tile.key_start - (entry[PREFIX_STOP] - entry[PREFIX_START]);
  tile.prefix_stop = entry[PREFIX_STOP];
  const bool sees_nothing = tile.key_start >= run_stop || tile.end <= run_start;
  tile.blocks = sees_nothing ? 0 : (tile.end - tile.first_key + BLOCK_ROWS - 1) / BLOCK_ROWS;
  return tile;
}
