// The gradient of the queries, for sm_90a: dQ = scale * dS K with dS = P * (dOut V^T - delta).
//
// It is built on query_tiles.cuh, as the forward kernel is: each consumer (a warpgroup that computes)
// has 64 rows of queries, processes all keys that they see, and accumulates dQ in registers. Each row is
// written once, so there are no atomics.
#include "attention.h"
#include "products.cuh"
#include "query_tiles.cuh"
#include "softmax.cuh"
#include "store.cuh"

namespace {

// Keys and values of a block are read together; the keys stay until dS is multiplied by them.
struct DqLoads {
  int first, fill;

  VOCO_DEVICE explicit DqLoads(const QueryTile& tile) : first(tile.first_load), fill(tile.fill) {}
  VOCO_DEVICE int keys(int block) const { return first + 2 * block; }
  VOCO_DEVICE int values(int block) const { return first + 2 * block + 1; }
  VOCO_DEVICE static Load at(int n) { return {n / 2, n % 2 == 1}; }
};

template <typename T, int D>
struct DqConsumer {
  // For larger D, the queries don't fit in registers and are multiplied from shared memory ...
  static constexpr bool QUERIES_IN_REGISTERS = D <= 128;
  // ... and dS of one block doesn't fit together with scores and dP of the next.
  static constexpr bool PIPELINED = D <= 128;

  const AttentionParams& params;
  const Packing packing;
  const QueryTileShared<D, true>& shared;
  const ConsumerThread me;
  const Turns turns{me.warpgroup};
  const float scale_log2;

  uint32_t fragments[QUERIES_IN_REGISTERS ? D / 16 : 1][4];
  RowsByHeadDim<D> dq;
  float lse[2], delta[2];

  VOCO_DEVICE DqConsumer(const QueryTileArguments& arguments, const QueryTileShared<D, true>& shared)
      : params(arguments.params),
        packing(arguments.packing),
        shared(shared),
        scale_log2(params.scale * LOG2_E) {}

  VOCO_DEVICE void run() {
    turns.open();
    for (int i = 0;; ++i) {
      const QueryTile& tile = shared.queue.read(i);
      if (tile.is_end()) break;
      const Rows rows(tile.start + me.warpgroup * packing.positions(), packing, me.warp, me.lane);
      const int mine = tile.blocks_until(rows.first_position + packing.positions() - 1);
      if (mine == 0) dq.clear();
      if (tile.blocks > 0) {
        load_statistics(tile, rows);
        shared.resident.wait_full(tile.fill);
        if constexpr (QUERIES_IN_REGISTERS)
          load_fragments<D>(fragments, my(shared.q(tile.fill)), me.warp, me.lane);
        walk_keys(*this, DqLoads(tile), tile, rows, mine);
        shared.resident.release(tile.fill, me.lane);
      }
      store(tile, rows);
      shared.queue.release(i, me.lane);
    }
    turns.close();
  }

  VOCO_DEVICE uint32_t my(uint32_t operand) const { return operand + me.warpgroup * BLOCK_BYTES<D>; }

  VOCO_DEVICE int head(const QueryTile& tile, int h) const {
    return (tile.pack << packing.log2) + (Rows::row(h, me.warp, me.lane) & (packing.heads() - 1));
  }

  VOCO_DEVICE void load_statistics(const QueryTile& tile, const Rows& rows) {
    for (int h = 0; h < 2; ++h) {
      const bool valid = rows.position[h] >= tile.run_start;
      const int64_t i = statistic_index(params, tile.row, head(tile, h), rows.position[h]);
      // exp2(-inf) is 0, so rows that are not in this run have no effect.
      lse[h] = valid ? params.lse[i] : INFINITY_F;
      delta[h] = valid ? params.delta[i] : 0.f;
    }
  }

  // Starts the products for scores and dP of a block, over its last N keys.
  template <int N>
  VOCO_DEVICE void multiply(float (&scores)[N / 2], float (&dp)[N / 2], DqLoads loads, int block) {
    const int keys = loads.keys(block), values = loads.values(block);
    shared.ring.wait_full(keys);
    shared.ring.wait_full(values);
    ptx::wgmma_fence();
    if constexpr (QUERIES_IN_REGISTERS) {
      rows_by_rows<T, D, N>(scores, fragments, shared.ring.slot(keys), BLOCK_ROWS - N);
    } else {
      rows_by_rows<T, D, N>(scores, my(shared.q(loads.fill)), shared.ring.slot(keys), BLOCK_ROWS - N);
    }
    rows_by_rows<T, D, N>(dp, my(shared.dout(loads.fill)), shared.ring.slot(values), BLOCK_ROWS - N);
    ptx::wgmma_commit();
  }

  // Turns dP into dS.
  template <int COUNT>
  VOCO_DEVICE void differentiate(const float (&scores)[COUNT], float (&dp)[COUNT], const Rows& rows,
                                 int start, int first_key) const {
    // Not multiplied when they are loaded, or the first product would have to wait for them.
    const float lse_log2[2] = {lse[0] * LOG2_E, lse[1] * LOG2_E};
    const bool cut = is_cut(rows, start, first_key);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int h = i / 2 % 2;
      const float p = ptx::exp2(fmaf(scores[i], scale_log2, -lse_log2[h]));
      dp[i] = p * (dp[i] - delta[h]);
    }
    if (cut) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        if (!sees(rows, i, start, first_key, me.lane)) dp[i] = 0.f;
      }
    }
  }

  template <int STEPS>
  VOCO_DEVICE void add(const uint32_t (&ds)[STEPS][4], int keys, bool accumulate) {
    ptx::wgmma_fence();
    rows_by_block<T, D>(dq, ds, shared.ring.slot(keys), BLOCK_ROWS - 16 * STEPS, accumulate);
    ptx::wgmma_commit();
  }

  // Computes dS of a tile's first block, over its last N keys.
  template <int N>
  VOCO_DEVICE void begin(uint32_t (&ds)[N / 16][4], DqLoads loads, int block, const Rows& rows,
                         int start, int first_key) {
    float scores[N / 2], dp[N / 2];
    turns.take();
    multiply<N>(scores, dp, loads, block);
    turns.pass();
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
    ptx::pin(dp);
    shared.ring.release(loads.values(block), me.elected);
    differentiate(scores, dp, rows, start + BLOCK_ROWS - N, first_key);
    round_to_operand<T>(ds, dp);
  }

  // Adds block - 1 to dQ while computing dS of `block`.
  template <int STEPS>
  VOCO_DEVICE void advance(const uint32_t (&before)[STEPS][4], uint32_t (&ds)[BLOCK_ROWS / 16][4],
                           DqLoads loads, int block, const Rows& rows, int start, int first_key) {
    float scores[BLOCK_ROWS / 2], dp[BLOCK_ROWS / 2];
    turns.take();
    multiply<BLOCK_ROWS>(scores, dp, loads, block);
    add(before, loads.keys(block - 1), block > 1);
    turns.pass();
    ptx::wgmma_wait<1>();
    ptx::pin(scores);
    ptx::pin(dp);
    shared.ring.release(loads.values(block), me.elected);
    differentiate(scores, dp, rows, start, first_key);
    ptx::wgmma_wait<0>();
    dq.pin();
    shared.ring.release(loads.keys(block - 1), me.elected);
    round_to_operand<T>(ds, dp);
  }

  template <int STEPS>
  VOCO_DEVICE void finish(const uint32_t (&ds)[STEPS][4], DqLoads loads, int block) {
    turns.take();
    add(ds, loads.keys(block), block > 0);
    turns.pass();
    ptx::wgmma_wait<0>();
    dq.pin();
    shared.ring.release(loads.keys(block), me.elected);
  }

 private:
  VOCO_DEVICE void store(const QueryTile& tile, const Rows& rows) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      store_row<T, D>(row_address(params.dq, tile.row, head(tile, h), rows.position[h]),
                      rows.position[h] >= tile.run_start, dq, h, params.scale, 0, params.head_dim,
                      me.lane);
    }
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
    dq_kernel(const __grid_constant__ QueryTileArguments arguments) {
  walk_query_tiles<D, DqLoads, DqConsumer<T, D>, true>(arguments);
}

}  // namespace

void attention_dq_sm90(const AttentionParams& params, void* stream) {
  const QueryTileArguments arguments(params);
  by_type(params, [&](auto type, auto head_dim) {
    constexpr int D = decltype(head_dim)::value;
    runtime::launch(dq_kernel<decltype(type), D>, runtime::multiprocessors(), THREADS,
                    QueryTileShared<D, true>::BYTES, stream, arguments);
  });
}
