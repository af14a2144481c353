// The gradients of keys and values, for sm_90a: dV = P^T dOut, dK = scale * dS^T Q.
//
// Each consumer (a warpgroup that computes) has 64 keys. It processes all queries that see them, of all
// heads that share them, and accumulates dK and dV in registers. Scores are transposed: keys by queries.
// Two accumulators of 256 columns don't fit in registers, so for that width both consumers have the same
// keys, and half of the columns each.
//
// With ADD_DQ the kernel also computes dQ, from the dS that it has anyway. That takes five products per
// block; with a separate kernel for dQ (attention_dq_sm90.cu) there are seven. But several CTAs then add
// to each row of dQ, in float32 in global memory, in no particular order.
#include <stdexcept>
#include <string>

#include "attention.h"
#include "key_tiles.cuh"
#include "products.cuh"
#include "softmax.cuh"
#include "store.cuh"

namespace {

// The columns of dQ that each consumer computes, from all keys.
template <int D>
constexpr int DQ_COLUMNS = D / CONSUMERS;
// A position after every query, for rows without a key.
constexpr int NOBODYS_TOKEN = 0x7fffffff;
// The named barrier at which both consumers wait until dS is written.
constexpr int DS_WRITTEN = FIRST_BARRIER;

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
  // Indices of this thread's two keys, h = 0 and 1: token positions, or indices into `kept`.
  VOCO_DEVICE int rank(const KeyTile& tile, int h) const {
    return tile.start + BLOCK_ROWS * key_block + 16 * me.warp + me.lane / 4 + 8 * h;
  }
  // Their token positions; after the tile's end, a position that no query sees.
  VOCO_DEVICE int token(const KeyTile& tile, int h) const {
    const int r = rank(tile, h);
    if (r >= tile.stop) return NOBODYS_TOKEN;
    return tile.gathered ? params.kept[static_cast<int64_t>(tile.row) * params.length + r] : r;
  }

  // How many of the tile's key blocks are seen by queries of a block. If the keys are contiguous, it is
  // those that begin before the query block ends.
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

  // Writes dS to shared memory, for both consumers: a panel [keys, queries], for a product with queries
  // as M.
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

  // Adds this tile's part of dQ for a block of queries: from all keys, for half of the columns.
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

  // Turns dP into dS. Uses the rounded probabilities because there aren't enough registers to keep the
  // unrounded ones.
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

  // Turns scores (keys by queries) into probabilities, 0 where the query does not see the key. That
  // includes keys after the tile's end: those rows are zeros, so their probabilities would not be 0 (or
  // even finite), and dQ includes them.
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
          // & instead of &&, which would branch.
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
  walk_key_tiles<DkdvConsumer<T, D, ADD_DQ>, D, ADD_DQ>(arguments);
}

template <bool ADD_DQ>
void launch(const AttentionParams& params, void* stream) {
  const KeyTileArguments arguments(params);
  by_type(params, [&](auto type, auto head_dim) {
    constexpr int D = decltype(head_dim)::value;
    if constexpr (!ADD_DQ || D > 64) {
      runtime::launch(dkdv_kernel<decltype(type), D, ADD_DQ>, runtime::multiprocessors(), THREADS,
                      KeyTileShared<D, ADD_DQ>::BYTES, stream, arguments);
    } else {
      throw std::invalid_argument("dq_sum: expected head_dim above 64, got " +
                                  std::to_string(params.head_dim) + "; leave it out");
    }
  });
}

}  // namespace

void attention_dkdv_sm90(const AttentionParams& params, void* stream) { launch<false>(params, stream); }

void attention_dkdv_and_dq_sm90(const AttentionParams& params, void* stream) {
  launch<true>(params, stream);
}
