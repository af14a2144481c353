// The gradients of keys and values, for sm_90a: dV = P^T dOut, dK = scale * dS^T Q.
//
// A consumer has 64 keys, meets all queries that see them, of all heads that share them, and adds up dK and
// dV in registers; scores are transposed, keys by queries. Nobody else writes these rows: no atomics. Two
// accumulators of 256 columns don't fit: there the consumers have the same keys and half of the
// columns each.
#include "attention.h"
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

// Keys [start, stop) of one head and the queries [query_start, query_stop) that see them, in 64-query blocks
// from the first on. Both are token positions and every key sees from itself on; or, gathered, both are ranks,
// in `kept` and `readers`, and who sees whom is asked of their positions.
struct KeyTile {
  int row, kv_head, gathered;
  int start, stop, query_start, query_stop;
  int blocks;  // of queries; negative behind the last item
  // How many items with queries, and pairs of a block of q and one of dout, this block has copied before.
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

// What is known of the 64 queries of a block, one number each.
struct QueryStatistics {
  float lse_log2[BLOCK_ROWS];  // inf where there is no query: its probabilities are 0
  float delta[BLOCK_ROWS];
  int token[BLOCK_ROWS];  // asked for in gathered tiles only, as is
  int visible_from[BLOCK_ROWS];
};

struct KeyTileArguments {
  AttentionParams params;
  ptx::TensorMap q, dout, k, v;
};

template <int D>
struct KeyTileShared {
  static constexpr int OPERAND_BYTES = KEY_BLOCKS<D> * BLOCK_BYTES<D>;
  static constexpr int STATISTIC_SLOTS = 8;
  using Statistics = Ring<STATISTIC_SLOTS, sizeof(QueryStatistics), CONSUMERS * 4>;
  static constexpr int FIXED_BYTES = 2 * OPERAND_BYTES + Statistics::BYTES;
  using Slots = Ring<(SHARED_LIMIT - SHARED_RESERVE - FIXED_BYTES) / BLOCK_BYTES<D>, BLOCK_BYTES<D>>;
  static constexpr int BYTES = FIXED_BYTES + Slots::BYTES + SHARED_RESERVE;

  uint32_t k, v;
  Slots ring;
  Statistics statistics;
  Resident resident;
  WorkQueue<KeyTile> queue;
  unsigned char* memory;

  VOCO_DEVICE KeyTileShared() {
    memory = ptx::dynamic_shared();
    k = ptx::shared_address(memory);
    v = k + OPERAND_BYTES;
    ring.slots = v + OPERAND_BYTES;
    statistics.slots = ring.slots + Slots::BYTES;
    ring.barriers = statistics.slots + Statistics::BYTES;
    statistics.barriers = ring.barriers + Slots::BARRIER_BYTES;
    resident.barriers = statistics.barriers + Statistics::BARRIER_BYTES;
    queue.barriers = resident.barriers + Resident::BARRIER_BYTES;
    queue.entries = reinterpret_cast<KeyTile*>(memory + (queue.barriers - k) + queue.BARRIER_BYTES);
  }
  VOCO_DEVICE void init() const {
    ring.init();
    statistics.init();
    resident.init(2 * KEY_BLOCKS<D>);
    queue.init();
    ptx::barrier_init_fence();
  }
  VOCO_DEVICE QueryStatistics& statistics_of(int n) const {
    return *reinterpret_cast<QueryStatistics*>(memory + (statistics.slot(n) - k));
  }
};

// One thread: draws the items, copies contiguous blocks of keys, values, queries and dout.
template <int D>
VOCO_DEVICE void copy_by_tma(const KeyTileArguments& arguments, const KeyTileShared<D>& shared) {
  const AttentionParams& params = arguments.params;
  const auto copy = [](const ptx::TensorMap& map, uint32_t target, uint32_t barrier, int token, int head,
                       int row) {
    ptx::barrier_arrive_expect(barrier, BLOCK_BYTES<D>);
    for (int panel = 0; panel < D / PANEL_COLUMNS; ++panel) {
      ptx::tma_load(target + panel * PANEL_BYTES, &map, barrier, panel * PANEL_COLUMNS, 0, token, head, row);
    }
  };
  const int group = params.heads / params.kv_heads;
  int pair = 0, fill = 0;
  for (int i = 0;; ++i) {
    KeyTile drawn = key_tile<D>(params, shared.queue.draw(i, params.next_item));
    drawn.fill = fill;
    drawn.first_pair = pair;
    const KeyTile& tile = shared.queue.publish(i, drawn);
    if (tile.is_end()) return;
    if (tile.blocks == 0) continue;
    shared.resident.wait_empty(fill++);
    for (int block = 0; block < KEY_BLOCKS<D>; ++block) {
      if (!tile.keys_contiguous(block)) continue;
      const int token = tile.start + BLOCK_ROWS * block, offset = BLOCK_BYTES<D> * block;
      copy(arguments.k, shared.k + offset, shared.resident.full(), token, tile.kv_head, tile.row);
      copy(arguments.v, shared.v + offset, shared.resident.full(), token, tile.kv_head, tile.row);
    }
    for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; ++head) {
      for (int block = 0; block < tile.blocks; ++block, ++pair) {
        if (!tile.queries_contiguous(block)) continue;
        const int token = tile.query_start + BLOCK_ROWS * block;
        for (int load = 2 * pair; load < 2 * pair + 2; ++load) {
          shared.ring.wait_empty(load);
          copy(load % 2 ? arguments.dout : arguments.q, shared.ring.slot(load), shared.ring.full(load), token,
               head, tile.row);
        }
      }
    }
  }
}

// A gathering warp copies keys or queries of a tile, by their ranks: rows [0, rows) of a block.
template <int D>
VOCO_DEVICE void copy_ranks(const AttentionParams& params, const KeyTile& tile, const Tensor4& tensor, int head,
                            const int* list, int start, int stop, int rows, uint32_t block, int lane) {
  list += static_cast<int64_t>(tile.row) * params.length;
  copy_rows<D>(block, row_address(tensor, tile.row, head, 0), tensor.token_stride, params.head_dim, 0, rows, lane,
               [&](int row) {
                 const int rank = start + row;
                 return rank >= stop ? -1 : tile.gathered ? list[rank] : rank;
               });
}

VOCO_DEVICE void copy_statistics(const AttentionParams& params, const KeyTile& tile, int head, int block,
                                 QueryStatistics& statistics, int lane) {
  const int64_t row = static_cast<int64_t>(tile.row) * params.length;
#pragma unroll 1
  for (int r = lane; r < BLOCK_ROWS; r += 32) {
    const int rank = tile.query_start + BLOCK_ROWS * block + r;
    const bool valid = rank < tile.query_stop;
    const int token = !valid ? 0 : tile.gathered ? params.readers[row + rank] : rank;
    const int64_t index = statistic_index(params, tile.row, head, token);
    statistics.lse_log2[r] = valid ? params.lse[index] * LOG2_E : INFINITY_F;
    statistics.delta[r] = valid ? params.delta[index] : 0.f;
    statistics.token[r] = token;
    statistics.visible_from[r] = params.visible_from[row + token];
  }
  __syncwarp();
}

// One of the gathering warps: everything else, dealt out in turn, so that several copies are under way.
template <int D>
VOCO_DEVICE void copy_by_rows(const AttentionParams& params, const KeyTileShared<D>& shared, int gather_warp,
                              int lane) {
  const int group = params.heads / params.kv_heads;
  int dealt = 0;
  const auto mine = [&] { return dealt++ % GATHER_WARPS == gather_warp; };
  for (int i = 0;; ++i) {
    const KeyTile& tile = shared.queue.read(i);
    if (tile.is_end()) return;
    for (int n = 0; n < 2 * KEY_BLOCKS<D> && tile.blocks > 0; ++n) {
      const int block = n / 2;
      if (tile.keys_contiguous(block) || !mine()) continue;
      shared.resident.wait_empty(tile.fill);
      copy_ranks<D>(params, tile, n % 2 ? params.v : params.k, tile.kv_head, params.kept,
                    tile.start + BLOCK_ROWS * block, tile.stop, BLOCK_ROWS,
                    (n % 2 ? shared.v : shared.k) + BLOCK_BYTES<D> * block, lane);
      if (lane == 0) ptx::barrier_arrive(shared.resident.full());
    }
    int pair = tile.first_pair;
    for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; ++head) {
      for (int block = 0; block < tile.blocks; ++block, ++pair) {
        if (mine()) {
          shared.statistics.wait_empty(pair);
          copy_statistics(params, tile, head, block, shared.statistics_of(pair), lane);
          if (lane == 0) ptx::barrier_arrive(shared.statistics.full(pair));
        }
        for (int load = 2 * pair; load < 2 * pair + 2 && !tile.queries_contiguous(block); ++load) {
          if (!mine()) continue;
          shared.ring.wait_empty(load);
          copy_ranks<D>(params, tile, load % 2 ? params.dout : params.q, head, params.readers,
                        tile.query_start + BLOCK_ROWS * block, tile.query_stop,
                        tile.narrow(block) ? NARROW_ROWS : BLOCK_ROWS, shared.ring.slot(load), lane);
          if (lane == 0) ptx::barrier_arrive(shared.ring.full(load));
        }
      }
    }
    shared.queue.release(i, lane);
  }
}

template <typename T, int D>
struct DkdvConsumer {
  const AttentionParams& params;
  const KeyTileShared<D>& shared;
  const ConsumerThread me;
  const int key_block = KEY_BLOCKS<D> == 1 ? 0 : me.warpgroup;
  const int first_panel = KEY_BLOCKS<D> == 1 ? me.warpgroup * COLUMNS<D> / PANEL_COLUMNS : 0;
  const float scale_log2;

  RowsByHeadDim<COLUMNS<D>> dk, dv;

  VOCO_DEVICE DkdvConsumer(const AttentionParams& params, const KeyTileShared<D>& shared)
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
        shared.resident.release(me.lane);
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
  VOCO_DEVICE int token(const KeyTile& tile, int h) const {
    const int r = rank(tile, h);
    const bool look_up = tile.gathered && r < tile.stop;
    return look_up ? params.kept[static_cast<int64_t>(tile.row) * params.length + r] : r;
  }

  VOCO_DEVICE void accumulate(const KeyTile& tile) {
    const int blocks = tile.blocks, group = params.heads / params.kv_heads;
    // Keys behind the tile's end have no queries, nor have keys behind a block of queries.
    const bool any = tile.start + BLOCK_ROWS * key_block < tile.stop;
    const int begin = !any ? blocks : tile.gathered ? 0 : key_block;
    const int wide_end = blocks - tile.narrow(blocks - 1);
    int pair = tile.first_pair;
    for (int member = 0; member < group; ++member, pair += blocks) {
      for (int block = 0; block < min(begin, blocks); ++block) skip(pair + block);
      if (begin < wide_end) {
        for (int block = begin; block < wide_end; ++block) {
          add<BLOCK_ROWS>(tile, pair + block, block, block > begin);
        }
        finish(pair + wide_end - 1);
      }
      if (begin < blocks && wide_end < blocks) {
        add<NARROW_ROWS>(tile, pair + wide_end, wide_end, false);
        finish(pair + wide_end);
      }
    }
  }

  VOCO_DEVICE void finish(int pair) {
    ptx::wgmma_wait<0>();
    dk.pin();
    dv.pin();
    release(pair);
  }

  VOCO_DEVICE void release(int pair) {
    shared.ring.release(2 * pair, me.elected);
    shared.ring.release(2 * pair + 1, me.elected);
  }

  VOCO_DEVICE void skip(int pair) {
    shared.ring.skip(2 * pair, me.elected);
    shared.ring.skip(2 * pair + 1, me.elected);
    shared.statistics.wait_full(pair);
    __syncwarp();
    shared.statistics.release(pair, me.lane == 0);
  }

  // The first N queries of a block. Its last products are left under way, as those of the pair before are
  // where they are pending.
  template <int N>
  VOCO_DEVICE void add(const KeyTile& tile, int pair, int block, bool pending) {
    const auto& ring = shared.ring;
    const uint32_t q = ring.slot(2 * pair), dout = ring.slot(2 * pair + 1);
    const uint32_t keys = BLOCK_BYTES<D> * key_block;
    float scores[N / 2], dp[N / 2];
    uint32_t p[N / 16][4], ds[N / 16][4];

    ring.wait_full(2 * pair);
    ptx::wgmma_fence();
    rows_by_rows<T, D, N>(scores, ptx::opaque(shared.k + keys), q, 0);
    ptx::wgmma_commit();
    ring.wait_full(2 * pair + 1);
    ptx::wgmma_fence();
    rows_by_rows<T, D, N>(dp, ptx::opaque(shared.v + keys), dout, 0);
    ptx::wgmma_commit();

    shared.statistics.wait_full(pair);
    const QueryStatistics& statistics = shared.statistics_of(pair);
    ptx::wgmma_wait<1>();
    ptx::pin(scores);
    dk.pin();
    dv.pin();
    if (pending) release(pair - 1);
    exponentiate<N>(scores, tile, statistics, tile.query_start + BLOCK_ROWS * block);
    round_to_operand<T>(p, scores);
    ptx::wgmma_fence();
    rows_by_block<T, COLUMNS<D>>(dv, p, dout, 0, true, first_panel);
    ptx::wgmma_commit();

    ptx::wgmma_wait<1>();
    ptx::pin(dp);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float2 delta = *reinterpret_cast<const float2*>(&statistics.delta[8 * j + me.lane % 4 * 2]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // dS from the rounded probabilities: the unrounded ones would take registers that there aren't.
        const float2 rounded = ptx::unpack<T>(p[j / 2][j % 2 * 2 + h]);
        dp[4 * j + 2 * h] = rounded.x * (dp[4 * j + 2 * h] - delta.x);
        dp[4 * j + 2 * h + 1] = rounded.y * (dp[4 * j + 2 * h + 1] - delta.y);
      }
    }
    __syncwarp();
    shared.statistics.release(pair, me.lane == 0);
    round_to_operand<T>(ds, dp);
    ptx::wgmma_fence();
    rows_by_block<T, COLUMNS<D>>(dk, ds, q, 0, true, first_panel);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    dv.pin();
    dk.pin();
  }

  // Scores, keys by queries, become probabilities, 0 where the query does not see the key.
  template <int N>
  VOCO_DEVICE void exponentiate(float (&scores)[N / 2], const KeyTile& tile, const QueryStatistics& statistics,
                                int first_query) const {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float2 lse = *reinterpret_cast<const float2*>(&statistics.lse_log2[8 * j + me.lane % 4 * 2]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scores[4 * j + 2 * h] = ptx::exp2(fmaf(scores[4 * j + 2 * h], scale_log2, -lse.x));
        scores[4 * j + 2 * h + 1] = ptx::exp2(fmaf(scores[4 * j + 2 * h + 1], scale_log2, -lse.y));
      }
    }
    const int last_key = tile.start + BLOCK_ROWS * (key_block + 1) - 1;
    if (!tile.gathered && first_query >= last_key) return;
    const int keys[2] = {token(tile, 0), token(tile, 1)};
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const int column = i / 4 * 8 + me.lane % 4 * 2 + i % 2, h = i / 2 % 2;
      const bool sees = tile.gathered ? keys[h] <= statistics.token[column] &&
                                            keys[h] >= statistics.visible_from[column]
                                      : keys[h] <= first_query + column;
      if (!sees) scores[i] = 0.f;
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

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
    dkdv_kernel(const __grid_constant__ KeyTileArguments arguments) {
  const KeyTileShared<D> shared;
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < WARPGROUP / 32) {
    ptx::give_registers<COPY_REGISTERS>();
    if (warp > 0) {
      copy_by_rows<D>(arguments.params, shared, warp - 1, lane);
    } else if (lane == 0) {
      copy_by_tma<D>(arguments, shared);
    }
  } else {
    ptx::take_registers<COMPUTE_REGISTERS>();
    DkdvConsumer<T, D>(arguments.params, shared).run();
  }
}

}  // namespace

void attention_dkdv_sm90(const AttentionParams& params, runtime::Stream stream) {
  KeyTileArguments arguments{params, {}, {}, {}, {}};
  arguments.q = panel_map(params.q, params, params.heads, 1);
  arguments.dout = panel_map(params.dout, params, params.heads, 1);
  arguments.k = panel_map(params.k, params, params.kv_heads, 1);
  arguments.v = panel_map(params.v, params, params.kv_heads, 1);
  runtime::set_zero(params.next_item, sizeof(int), stream);
  by_type(params, [&](auto type, auto head_dim) {
    constexpr int D = decltype(head_dim)::value;
    runtime::launch(dkdv_kernel<decltype(type), D>, runtime::multiprocessors(), THREADS,
                    KeyTileShared<D>::BYTES, stream, arguments);
  });
}
