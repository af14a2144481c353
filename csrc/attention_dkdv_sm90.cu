// The gradients of keys and values, for sm_90a: dV = P^T dOut, dK = scale * dS^T Q.
//
// A consumer has 64 keys, meets all queries that see them, of all heads that share them, and adds up dK
// and dV in registers; scores are transposed, keys by queries. Two accumulators of 256 columns don't
// fit: there both consumers have the same keys, and half of the columns each.
//
// With ADD_DQ the kernel makes dQ as well, from the dS that it has anyway: five products a block, where
// a walk of its own (attention_dq_sm90.cu) brings them to seven. But then each row of dQ has many
// authors, which add to it in memory, in float32, in whatever order they come.
#include "attention.h"
#include "jobs.cuh"
#include "launch.cuh"
#include "pipeline.cuh"
#include "products.cuh"
#include "softmax.cuh"
#include "store.cuh"
#include "tiles.cuh"

namespace {

template <int D>
constexpr int KEY_BLOCKS = D <= 128 ? CONSUMERS : 1;
template <int D>
constexpr int COLUMNS = D <= 128 ? D : D / CONSUMERS;
// Of dQ a consumer makes some columns, from all keys.
template <int D>
constexpr int DQ_COLUMNS = D / CONSUMERS;
constexpr int NOBODYS_TOKEN = 0x7fffffff;
// The named barrier at which both consumers meet when dS is written.
constexpr int DS_WRITTEN = FIRST_BARRIER;

// Keys [start, stop) of one head and the queries [query_start, query_stop) that see them, in 64-query
// blocks from the first on. Both are token positions and every key sees from itself on; or, gathered,
// both are ranks, in `kept` and `readers`, and who sees whom is asked of their positions.
struct KeyTile {
  int row, kv_head, gathered;
  int start, stop, query_start, query_stop;
  int blocks;  // of queries; negative behind the last item
  // How many items with queries, and pairs of a block of q and one of dout, this block has copied
  // before.
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
  // At most 16 queries: products of a quarter of the width.
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
  const int* column = params.key_tiles + item.tile / PARTS * TILE_COLUMNS;
  const int offset = item.tile % PARTS * KEYS;
  tile.row = column[0];
  tile.kv_head = item.head;
  tile.gathered = column[1];
  tile.start = column[2] + offset;
  tile.stop = column[3];
  tile.query_start = column[4] + (tile.gathered ? 0 : offset);
  tile.query_stop = column[5];
  if (tile.start < tile.stop) {
    tile.blocks = max(0, tile.query_stop - tile.query_start + BLOCK_ROWS - 1) / BLOCK_ROWS;
  }
  return tile;
}

struct KeyTileArguments {
  AttentionParams params;
  ptx::TensorMap q, dout, k, v;
};

template <int D, bool ADD_DQ>
struct KeyTileShared {
  static constexpr int OPERAND_BYTES = KEY_BLOCKS<D> * BLOCK_BYTES<D>;
  static constexpr int STATISTIC_SLOTS = 8;
  using Statistics = Ring<STATISTIC_SLOTS, sizeof(QueryStatistics), CONSUMERS * 4>;
  // dS [64 keys, 64 queries] of each block of keys, twice: one is written while the other is read.
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

// One thread: draws the items and sees to it that everything is copied.
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

template <typename T, int D, bool ADD_DQ>
struct DkdvConsumer {
  const AttentionParams& params;
  const KeyTileShared<D, ADD_DQ>& shared;
  const ConsumerThread me;
  const int key_block = KEY_BLOCKS<D> == 1 ? 0 : me.warpgroup;
  const int first_panel = KEY_BLOCKS<D> == 1 ? me.warpgroup * COLUMNS<D> / PANEL_COLUMNS : 0;
  const float scale_log2;

  RowsByHeadDim<COLUMNS<D>> dk, dv;

  VOCO_DEVICE DkdvConsumer(const AttentionParams& params, const KeyTileShared<D, ADD_DQ>& shared)
      : params(params), shared(shared), scale_log2(params.scale * LOG2_E) {}

  VOCO_DEVICE void run() {
    for (int i = 0;; ++i) {
      const KeyTile& tile = shared.queue.read(i);
      if (tile.is_end()) return;
      dk.clear();
      dv.clear();
      if (tile.blocks > 0) {
        shared.resident.wait_full(tile.fill);
        accumulate(tile);
        shared.resident.release(tile.fill, me.lane);
      }
      store(tile);
      shared.queue.release(i, me.lane);
    }
  }

 private:
  // This thread's two keys.
  VOCO_DEVICE int rank(const KeyTile& tile, int h) const {
    return tile.start + BLOCK_ROWS * key_block + 16 * me.warp + me.lane / 4 + 8 * h;
  }
  // Behind the tile's end: a token that no query sees.
  VOCO_DEVICE int token(const KeyTile& tile, int h) const {
    const int r = rank(tile, h);
    if (r >= tile.stop) return NOBODYS_TOKEN;
    return tile.gathered ? params.kept[static_cast<int64_t>(tile.row) * params.length + r] : r;
  }

  // How many blocks of keys see queries of a block: with contiguous keys, those that begin before it
  // ends.
  VOCO_DEVICE int key_blocks_of(const KeyTile& tile, int block) const {
    const int seen = tile.gathered ? KEY_BLOCKS<D> : min(block + 1, KEY_BLOCKS<D>);
    return min(seen, (tile.stop - tile.start + BLOCK_ROWS - 1) / BLOCK_ROWS);
  }

  VOCO_DEVICE void accumulate(const KeyTile& tile) {
    const int pairs = params.heads / params.kv_heads * tile.blocks;
    int block = 0;
    for (int pair = tile.first_pair; pair < tile.first_pair + pairs; ++pair) {
      if (!ADD_DQ && key_block >= key_blocks_of(tile, block)) {
        skip(pair);
      } else if (tile.narrow(block)) {
        add<NARROW_ROWS>(tile, pair, block);
      } else {
        add<BLOCK_ROWS>(tile, pair, block);
      }
      block = block + 1 < tile.blocks ? block + 1 : 0;  // ... of the next head
    }
  }

  VOCO_DEVICE void skip(int pair) {
    shared.ring.skip(2 * pair, 2 * pair + 1, me);
    shared.statistics.wait_full(pair);
    __syncwarp();
    shared.statistics.release(pair, me.lane == 0);
  }

  // The first N queries of a block.
  template <int N>
  VOCO_DEVICE void add(const KeyTile& tile, int pair, int block) {
    const auto& ring = shared.ring;
    const QueryStatistics& statistics = shared.statistics_of(pair);
    if (!ADD_DQ || key_block < key_blocks_of(tile, block)) {
      const uint32_t q = ring.slot(2 * pair), dout = ring.slot(2 * pair + 1);
      const uint32_t keys = BLOCK_BYTES<D> * key_block;
      float scores[N / 2], dp[N / 2];
      uint32_t p[N / 16][4], ds[N / 16][4];
      ring.wait_full(2 * pair);
      ptx::wgmma_fence();
      rows_by_rows<T, D, N>(scores, shared.k + keys, q, 0);
      ptx::wgmma_commit();
      ring.wait_full(2 * pair + 1);
      ptx::wgmma_fence();
      rows_by_rows<T, D, N>(dp, shared.v + keys, dout, 0);
      ptx::wgmma_commit();

      shared.statistics.wait_full(pair);
      ptx::wgmma_wait<1>();
      ptx::pin(scores);
      exponentiate<N>(scores, tile, statistics, tile.query_start + BLOCK_ROWS * block);
      round_to_operand<T>(p, scores);
      ptx::wgmma_fence();
      rows_by_block<T, COLUMNS<D>>(dv, p, dout, 0, true, first_panel);
      ptx::wgmma_commit();

      ptx::wgmma_wait<1>();
      ptx::pin(dp);
      differentiate<N>(dp, p, statistics);
      round_to_operand<T>(ds, dp);
      if constexpr (ADD_DQ) share(ds, pair);
      ptx::wgmma_fence();
      rows_by_block<T, COLUMNS<D>>(dk, ds, q, 0, true, first_panel);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      dv.pin();
      dk.pin();
      ring.release(2 * pair, me.elected);
      ring.release(2 * pair + 1, me.elected);
    } else if constexpr (ADD_DQ) {
      const uint32_t nothing[N / 16][4] = {};
      share(nothing, pair);
      ring.skip(2 * pair, 2 * pair + 1, me);
      shared.statistics.wait_full(pair);
    }
    if constexpr (ADD_DQ) {
      ptx::named_barrier_sync(DS_WRITTEN, CONSUMERS * WARPGROUP);
      add_dq(tile, pair, block);
    }
    __syncwarp();
    shared.statistics.release(pair, me.lane == 0);
  }

  // dS where both consumers see it: a panel [keys, queries], for a product with queries as M.
  template <int STEPS>
  VOCO_DEVICE void share(const uint32_t (&ds)[STEPS][4], int pair) const {
    if (KEY_BLOCKS<D> == 1 && me.warpgroup > 0) return;  // both have the same
    const uint32_t panel = ds_panel(pair, key_block);
#pragma unroll
    for (int j = 0; j < 2 * STEPS; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * me.warp + me.lane / 4 + 8 * h;
        ptx::store_shared(chunk_address(panel, row, j) + me.lane % 4 * 4, ds[j / 2][j % 2 * 2 + h]);
      }
    }
    ptx::fence_async_proxy();
  }
  VOCO_DEVICE uint32_t ds_panel(int pair, int block) const {
    return shared.ds + pair % 2 * shared.DS_BYTES + block * PANEL_BYTES;
  }

  // dQ of a block of queries, from all keys of this tile, half of its columns.
  VOCO_DEVICE void add_dq(const KeyTile& tile, int pair, int block) const {
    float dq[DQ_COLUMNS<D> / 2];
    const int panel = me.warpgroup * DQ_COLUMNS<D> / PANEL_COLUMNS;
    ptx::wgmma_fence();
#pragma unroll
    for (int keys = 0; keys < KEY_BLOCKS<D>; ++keys) {
      const ColumnsOperand ds(ds_panel(pair, keys), 0, 0);
      const ColumnsOperand k(shared.k + BLOCK_BYTES<D> * keys, panel, 0);
#pragma unroll
      for (int step = 0; step < BLOCK_ROWS / 16; ++step) {
        ptx::wgmma<T, DQ_COLUMNS<D>, true, true>(dq, ds.step(step), k.step(step), keys > 0 || step > 0);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin(dq);

    const QueryStatistics& statistics = shared.statistics_of(pair);
    const int member = (pair - tile.first_pair) / tile.blocks;
    const int head = tile.kv_head * (params.heads / params.kv_heads) + member;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * me.warp + me.lane / 4 + 8 * h;
      if (row >= tile.queries_in(block)) continue;
      float* target = params.dq_sum +
                      statistic_index(params, tile.row, head, statistics.token[row]) * params.head_dim;
#pragma unroll
      for (int j = 0; j < DQ_COLUMNS<D> / 8; ++j) {
        const int column = me.warpgroup * DQ_COLUMNS<D> + 8 * j + me.lane % 4 * 2;
        if (column < params.head_dim) {
          ptx::add_global(target + column, dq[4 * j + 2 * h], dq[4 * j + 2 * h + 1]);
        }
      }
    }
  }

  // dP becomes dS. From the rounded probabilities: the unrounded ones would take registers that there
  // aren't.
  template <int N>
  VOCO_DEVICE void differentiate(float (&dp)[N / 2], const uint32_t (&p)[N / 16][4],
                                 const QueryStatistics& statistics) const {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float2 delta = *reinterpret_cast<const float2*>(&statistics.delta[8 * j + me.lane % 4 * 2]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 rounded = ptx::unpack<T>(p[j / 2][j % 2 * 2 + h]);
        dp[4 * j + 2 * h] = rounded.x * (dp[4 * j + 2 * h] - delta.x);
        dp[4 * j + 2 * h + 1] = rounded.y * (dp[4 * j + 2 * h + 1] - delta.y);
      }
    }
  }

  // Scores, keys by queries, become probabilities, 0 where the query does not see the key. Keys behind
  // the tile's end are zeros, not nothing: their probabilities may be anything, and dQ would meet them.
  template <int N>
  VOCO_DEVICE void exponentiate(float (&scores)[N / 2], const KeyTile& tile,
                                const QueryStatistics& statistics, int first_query) const {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float2 lse = *reinterpret_cast<const float2*>(&statistics.lse_log2[8 * j + me.lane % 4 * 2]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scores[4 * j + 2 * h] = ptx::exp2(fmaf(scores[4 * j + 2 * h], scale_log2, -lse.x));
        scores[4 * j + 2 * h + 1] = ptx::exp2(fmaf(scores[4 * j + 2 * h + 1], scale_log2, -lse.y));
      }
    }
    const int keys[2] = {token(tile, 0), token(tile, 1)};
    if (tile.gathered) {
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const int column = 8 * j + me.lane % 4 * 2;
        const int2 query = *reinterpret_cast<const int2*>(&statistics.token[column]);
        const int2 since = *reinterpret_cast<const int2*>(&statistics.visible_from[column]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          // Without &&, which would be a branch each.
          const bool first = (keys[h] <= query.x) & (keys[h] >= since.x);
          const bool second = (keys[h] <= query.y) & (keys[h] >= since.y);
          if (!first) scores[4 * j + 2 * h] = 0.f;
          if (!second) scores[4 * j + 2 * h + 1] = 0.f;
        }
      }
    } else if (first_query < tile.start + BLOCK_ROWS * (key_block + 1) - 1 ||
               !tile.keys_contiguous(key_block)) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const int query = first_query + i / 4 * 8 + me.lane % 4 * 2 + i % 2;
        if (keys[i / 2 % 2] > query) scores[i] = 0.f;
      }
    }
  }

  VOCO_DEVICE void store(const KeyTile& tile) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool valid = rank(tile, h) < tile.stop;
      const int key = token(tile, h), column = first_panel * PANEL_COLUMNS;
      store_row<T, COLUMNS<D>>(row_address(params.dk, tile.row, tile.kv_head, key), valid, dk, h,
                               params.scale, column, params.head_dim, me.lane);
      store_row<T, COLUMNS<D>>(row_address(params.dv, tile.row, tile.kv_head, key), valid, dv, h, 1.f,
                               column, params.head_dim, me.lane);
    }
  }
};

template <typename T, int D, bool ADD_DQ>
__global__ void __launch_bounds__(THREADS, 1)
    dkdv_kernel(const __grid_constant__ KeyTileArguments arguments) {
  const KeyTileShared<D, ADD_DQ> shared;
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < WARPGROUP / 32) {
    ptx::give_registers<COPY_REGISTERS>();
    if (warp > 0) {
      shared.jobs.template work<D>(arguments.params, shared.memory, shared.k, warp - 1, lane);
    } else if (lane == 0) {
      copy_items(arguments, shared);
    }
  } else {
    ptx::take_registers<COMPUTE_REGISTERS>();
    DkdvConsumer<T, D, ADD_DQ>(arguments.params, shared).run();
  }
}

template <bool ADD_DQ>
void launch(const AttentionParams& params, runtime::Stream stream) {
  KeyTileArguments arguments{params, {}, {}, {}, {}};
  arguments.q = panel_map(params.q, params, params.heads, 1);
  arguments.dout = panel_map(params.dout, params, params.heads, 1);
  arguments.k = panel_map(params.k, params, params.kv_heads, 1);
  arguments.v = panel_map(params.v, params, params.kv_heads, 1);
  by_type(params, [&](auto type, auto head_dim) {
    constexpr int D = decltype(head_dim)::value;
    if constexpr (!ADD_DQ || D > 64) {
      runtime::launch(dkdv_kernel<decltype(type), D, ADD_DQ>, runtime::multiprocessors(), THREADS,
                      KeyTileShared<D, ADD_DQ>::BYTES, stream, arguments);
    }
  });
}

}  // namespace

void attention_dkdv_sm90(const AttentionParams& params, void* stream) { launch<false>(params, stream); }

void attention_dkdv_and_dq_sm90(const AttentionParams& params, void* stream) {
  launch<true>(params, stream);
}
