// The framework of the kernel that processes key tiles (dK, dV): shared memory, and the warpgroup that
// copies.
//
// Like query_tiles.cuh, except that an item is a tile of keys. Its queries are processed in blocks, for
// one head after another of those that share the keys.
#pragma once

#include "jobs.cuh"
#include "launch.cuh"
#include "pipeline.cuh"
#include "tiles.cuh"

// Blocks of keys in a tile: one for each consumer, or one for both, each of which then has half of the
// columns of dK and dV.
template <int D>
constexpr int KEY_BLOCKS = D <= 128 ? CONSUMERS : 1;
template <int D>
constexpr int COLUMNS = D <= 128 ? D : D / CONSUMERS;

// Keys [start, stop) of one head and the queries [query_start, query_stop) that see them, in blocks of
// 64 queries from the first on. In a contiguous tile both are token positions, and a key is seen by
// every query from its own position on. In a gathered tile they are indices into `kept` and `readers`,
// and their positions decide which query sees which key.
struct KeyTile {
  int row, kv_head, gathered;
  int start, stop, query_start, query_stop;
  int blocks;  // of queries; negative after the last item
  // How many items with queries, and pairs of a block of q and one of dout, this CTA copied before.
  int fill, first_pair;

  VOCO_DEVICE bool is_end() const { return blocks < 0; }
  VOCO_DEVICE bool keys_contiguous(int block) const {
    return !gathered && start + BLOCK_ROWS * (block + 1) <= stop;
  }
  VOCO_DEVICE bool queries_contiguous(int block) const {
    return !gathered && query_start + BLOCK_ROWS * (block + 1) <= query_stop;
  }
  VOCO_DEVICE int queries_in(int block) const {
    return min(BLOCK_ROWS, query_stop - query_start - BLOCK_ROWS * block);
  }
  // The block has at most 16 queries, so products need a quarter of the width.
  VOCO_DEVICE bool narrow(int block) const { return queries_in(block) <= NARROW_ROWS; }
};

template <int D>
VOCO_DEVICE KeyTile key_tile(const AttentionParams& params, int index) {
  constexpr int KEYS = KEY_BLOCKS<D> * BLOCK_ROWS;
  constexpr int PARTS = SCHEDULE_TILE / KEYS;
  KeyTile tile = {};
  const int tiles = params.counts[1] * PARTS;
  if (index >= tiles * params.kv_heads) {
    tile.blocks = -1;
    return tile;
  }
  const Item item = item_at(index, tiles, params.kv_heads);
  const int* entry = params.key_tiles + item.tile / PARTS * TILE_COLUMNS;
  const int offset = item.tile % PARTS * KEYS;
  tile.row = entry[KEY_ROW];
  tile.kv_head = item.head;
  tile.gathered = entry[KIND];
  tile.start = entry[KEY_TILE_START] + offset;
  tile.stop = entry[KEY_TILE_STOP];
  tile.query_start = entry[QUERY_START] + (tile.gathered ? 0 : offset);
  tile.query_stop = entry[QUERY_STOP];
  if (tile.start < tile.stop) {
    tile.blocks = max(0, tile.query_stop - tile.query_start + BLOCK_ROWS - 1) / BLOCK_ROWS;
  }
  return tile;
}

// The kernel's argument. In the tensor maps, all tensors are [batch, heads, length, 1, head_dim].
struct KeyTileArguments {
  AttentionParams params;
  ptx::TensorMap q, dout, k, v;

  explicit KeyTileArguments(const AttentionParams& params)
      : params(params),
        q(panel_map(params.q, params, params.heads, 1)),
        dout(panel_map(params.dout, params, params.heads, 1)),
        k(panel_map(params.k, params, params.kv_heads, 1)),
        v(panel_map(params.v, params, params.kv_heads, 1)) {}
};

template <int D, bool ADD_DQ>
struct KeyTileShared {
  static constexpr int OPERAND_BYTES = KEY_BLOCKS<D> * BLOCK_BYTES<D>;
  static constexpr int STATISTIC_SLOTS = 8;
  using Statistics = Ring<STATISTIC_SLOTS, sizeof(QueryStatistics), CONSUMERS * 4>;
  // dS [64 keys, 64 queries] for each block of keys, double-buffered.
  static constexpr int DS_BYTES = ADD_DQ ? KEY_BLOCKS<D> * PANEL_BYTES : 0;
  static constexpr int FIXED_BYTES = 2 * OPERAND_BYTES + 2 * DS_BYTES + Statistics::BYTES;
  using Slots = Ring<(SHARED_LIMIT - SHARED_RESERVE - FIXED_BYTES) / BLOCK_BYTES<D>, BLOCK_BYTES<D>>;
  static constexpr int BYTES = FIXED_BYTES + Slots::BYTES + SHARED_RESERVE;

  uint32_t k, v, ds;
  Slots ring;
  Statistics statistics;
  Resident<> resident;
  WorkQueue<KeyTile> queue;
  JobQueue jobs;
  unsigned char* memory;

  VOCO_DEVICE KeyTileShared() {
    memory = ptx::dynamic_shared();
    k = ptx::shared_address(memory);
    v = k + OPERAND_BYTES;
    ds = v + OPERAND_BYTES;
    ring.slots = ds + 2 * DS_BYTES;
    statistics.slots = ring.slots + Slots::BYTES;
    ring.barriers = statistics.slots + Statistics::BYTES;
    statistics.barriers = ring.barriers + Slots::BARRIER_BYTES;
    resident.barriers = statistics.barriers + Statistics::BARRIER_BYTES;
    queue.barriers = resident.barriers + resident.BARRIER_BYTES;
    jobs.barriers = queue.barriers + queue.BARRIER_BYTES;
    queue.entries = reinterpret_cast<KeyTile*>(memory + (jobs.barriers - k) + JobQueue::BARRIER_BYTES);
    jobs.jobs = reinterpret_cast<Job*>(queue.entries + queue.DEPTH);
    static_assert(Slots::BARRIER_BYTES + Statistics::BARRIER_BYTES + resident.BARRIER_BYTES +
                      queue.BYTES + JobQueue::BYTES <=
                  SHARED_RESERVE);
  }
  VOCO_DEVICE void init() const {
    ring.init();
    statistics.init();
    resident.init(2 * KEY_BLOCKS<D>);
    queue.init();
    jobs.init();
    ptx::barrier_init_fence();
  }
  VOCO_DEVICE QueryStatistics& statistics_of(int n) const {
    return *reinterpret_cast<QueryStatistics*>(memory + (statistics.slot(n) - k));
  }
};

// Run by one thread: draws the items, and issues all copies as TMA loads or jobs.
template <int D, bool ADD_DQ>
VOCO_DEVICE void copy_items(const KeyTileArguments& arguments, const KeyTileShared<D, ADD_DQ>& shared) {
  const AttentionParams& params = arguments.params;
  const int group = params.heads / params.kv_heads;
  int* const next_item = params.next_item + 1;
  int pair = 0, fill = 0, next_job = 0;

  const auto by_tma = [](const ptx::TensorMap& map, uint32_t target, uint32_t barrier, int token,
                         int head, int row) {
    ptx::barrier_arrive_expect(barrier, BLOCK_BYTES<D>);
    for (int panel = 0; panel < D / PANEL_COLUMNS; ++panel) {
      ptx::tma_load(target + panel * PANEL_BYTES, &map, barrier, panel * PANEL_COLUMNS, 0, token, head,
                    row);
    }
  };
  const auto by_job = [&](Copy what, uint32_t target, uint32_t barrier, const KeyTile& tile, int head,
                          int start, int stop, int rows) {
    Job job = {};
    job.what = what;
    job.target = target;
    job.barrier = barrier;
    job.row = tile.row;
    job.head = head;
    job.end = rows;
    job.start = start;
    job.high = stop;
    job.direct_from = tile.gathered ? stop : 0;
    job.list_readers = what != Copy::K && what != Copy::V;
    shared.jobs.publish(next_job, job);
  };

  int item = shared.queue.draw(0, next_item);
  for (int i = 0;; ++i) {
    KeyTile drawn = key_tile<D>(params, item);
    drawn.fill = fill;
    drawn.first_pair = pair;
    const KeyTile& tile = shared.queue.publish(i, drawn);
    if (tile.is_end()) break;
    item = shared.queue.draw(i + 1, next_item);
    if (tile.blocks == 0) continue;

    shared.resident.wait_empty(fill++);
    for (int n = 0; n < 2 * KEY_BLOCKS<D>; ++n) {
      const bool values = n % 2;
      const int block = n / 2, start = tile.start + BLOCK_ROWS * block;
      const uint32_t target = (values ? shared.v : shared.k) + BLOCK_BYTES<D> * block;
      if (tile.keys_contiguous(block)) {
        by_tma(values ? arguments.v : arguments.k, target, shared.resident.full(tile.fill), start,
               tile.kv_head, tile.row);
      } else {
        by_job(values ? Copy::V : Copy::K, target, shared.resident.full(tile.fill), tile, tile.kv_head,
               start, tile.stop, BLOCK_ROWS);
      }
    }
    for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; ++head) {
      for (int block = 0; block < tile.blocks; ++block, ++pair) {
        const int start = tile.query_start + BLOCK_ROWS * block;
        shared.statistics.wait_empty(pair);
        by_job(Copy::STATISTICS, shared.statistics.slot(pair), shared.statistics.full(pair), tile, head,
               start, tile.query_stop, BLOCK_ROWS);
        for (int load = 2 * pair; load < 2 * pair + 2; ++load) {
          shared.ring.wait_empty(load);
          if (tile.queries_contiguous(block)) {
            by_tma(load % 2 ? arguments.dout : arguments.q, shared.ring.slot(load),
                   shared.ring.full(load), start, head, tile.row);
          } else {
            by_job(load % 2 ? Copy::DOUT : Copy::Q, shared.ring.slot(load), shared.ring.full(load), tile,
                   head, start, tile.query_stop, tile.narrow(block) ? NARROW_ROWS : BLOCK_ROWS);
          }
        }
      }
    }
  }
  shared.jobs.publish_end(next_job);
}

// The kernel's body, for all threads. `Consumer(params, shared).run()` reads the items.
template <typename Consumer, int D, bool ADD_DQ>
VOCO_DEVICE void walk_key_tiles(const KeyTileArguments& arguments) {
  const KeyTileShared<D, ADD_DQ> shared;
  take_roles<D>(
      arguments.params, shared, shared.k, [&] { copy_items(arguments, shared); },
      [&] { Consumer(arguments.params, shared).run(); });
}
