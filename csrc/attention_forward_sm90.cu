// Forward attention with a VoCo mask, for sm_90a (docs/hopper.md).
//
// query_tiles.cuh has the parts shared with the kernel for dQ. This file has what a consumer (a
// warpgroup that computes) does with its 64 rows of a tile: scores, online softmax and output, all in
// registers.
#include "attention.h"
#include "products.cuh"
#include "query_tiles.cuh"
#include "softmax.cuh"
#include "store.cuh"

namespace {

// The order in which blocks are read: a block's scores are computed while the values of the previous
// block are added.
struct ForwardLoads {
  int first, blocks;

  VOCO_DEVICE explicit ForwardLoads(const QueryTile& tile)
      : first(tile.first_load), blocks(tile.blocks) {}

  VOCO_DEVICE int keys(int block) const { return first + max(0, 2 * block - 1); }
  VOCO_DEVICE int values(int block) const { return first + min(2 * block + 2, 2 * blocks - 1); }
  // The inverse: the tile's n-th load.
  VOCO_DEVICE Load at(int n) const {
    if (n == 0 || n == 2 * blocks - 1) return {n / 2, n > 0};
    return n % 2 ? Load{(n + 1) / 2, false} : Load{n / 2 - 1, true};
  }
};

template <typename T, int D>
struct ForwardConsumer {
  // For larger D the queries would take too many registers and are multiplied from shared memory.
  static constexpr bool QUERIES_IN_REGISTERS = D <= 128;
  static constexpr bool PIPELINED = true;

  const AttentionParams& params;
  const Packing packing;
  const QueryTileShared<D, false>& shared;
  const ConsumerThread me;
  const Turns turns{me.warpgroup};
  const float scale_log2;

  uint32_t fragments[QUERIES_IN_REGISTERS ? D / 16 : 1][4];
  RowsByHeadDim<D> out;
  OnlineSoftmax softmax;

  VOCO_DEVICE ForwardConsumer(const QueryTileArguments& arguments,
                              const QueryTileShared<D, false>& shared)
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
      softmax.reset();
      if (mine == 0) out.clear();
      if (tile.blocks > 0) {
        shared.resident.wait_full(tile.fill);
        if constexpr (QUERIES_IN_REGISTERS) {
          load_fragments<D>(fragments, my_queries(), me.warp, me.lane);
          shared.resident.release(tile.fill, me.lane);
        }
        walk_keys(*this, ForwardLoads(tile), tile, rows, mine);
        if constexpr (!QUERIES_IN_REGISTERS) shared.resident.release(tile.fill, me.lane);
      }
      store(tile, rows);
      shared.queue.release(i, me.lane);
    }
    turns.close();
  }

  VOCO_DEVICE uint32_t my_queries() const { return shared.q(0) + me.warpgroup * BLOCK_BYTES<D>; }

  template <int N>
  VOCO_DEVICE void multiply_keys(float (&scores)[N / 2], int load) {
    shared.ring.wait_full(load);
    ptx::wgmma_fence();
    if constexpr (QUERIES_IN_REGISTERS) {
      rows_by_rows<T, D, N>(scores, fragments, shared.ring.slot(load), BLOCK_ROWS - N);
    } else {
      rows_by_rows<T, D, N>(scores, my_queries(), shared.ring.slot(load), BLOCK_ROWS - N);
    }
    ptx::wgmma_commit();
  }

  template <int STEPS>
  VOCO_DEVICE void add_values(const uint32_t (&probabilities)[STEPS][4], int load, bool accumulate) {
    shared.ring.wait_full(load);
    ptx::wgmma_fence();
    rows_by_block<T, D>(out, probabilities, shared.ring.slot(load), BLOCK_ROWS - 16 * STEPS, accumulate);
    ptx::wgmma_commit();
  }

  // Waits for the values that are being added, then rescales the sum, which is rare after the first
  // blocks. Each branch has its own wait: ptxas would move a single wait before the branches up to the
  // start of its basic block, before the softmax, which should overlap with the product.
  VOCO_DEVICE void rescale_out(const float (&rescale)[2]) {
    if (__any_sync(0xffffffffu, rescale[0] != 1.f || rescale[1] != 1.f)) {
      ptx::wgmma_wait<0, 1>();
      out.pin();
#pragma unroll
      for (int span = 0; span < SPANS<D>; ++span) multiply_rows(out.values[span], rescale);
    } else {
      ptx::wgmma_wait<0, 2>();
      out.pin();
    }
  }

  // Computes the probabilities of a tile's first block, over its last N keys.
  template <int N>
  VOCO_DEVICE void begin(uint32_t (&probabilities)[N / 16][4], ForwardLoads loads, int block,
                         const Rows& rows, int start, int first_key) {
    float scores[N / 2], rescale[2];
    turns.take();
    multiply_keys<N>(scores, loads.keys(block));
    turns.pass();
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
    shared.ring.release(loads.keys(block), me.elected);
    hide_if_cut(scores, rows, start + BLOCK_ROWS - N, first_key, me.lane);
    softmax.update(scores, scale_log2, rescale);
    round_to_operand<T>(probabilities, scores);
  }

  // Adds the values of block - 1 while computing the probabilities of `block`.
  template <int STEPS>
  VOCO_DEVICE void advance(const uint32_t (&before)[STEPS][4],
                           uint32_t (&probabilities)[BLOCK_ROWS / 16][4], ForwardLoads loads, int block,
                           const Rows& rows, int start, int first_key) {
    float scores[BLOCK_ROWS / 2], rescale[2];
    turns.take();
    multiply_keys<BLOCK_ROWS>(scores, loads.keys(block));
    add_values(before, loads.values(block - 1), block > 1);
    turns.pass();
    ptx::wgmma_wait<1>();
    ptx::pin(scores);
    shared.ring.release(loads.keys(block), me.elected);
    hide_if_cut(scores, rows, start, first_key, me.lane);
    softmax.update(scores, scale_log2, rescale);
    rescale_out(rescale);
    shared.ring.release(loads.values(block - 1), me.elected);
    round_to_operand<T>(probabilities, scores);
  }

  template <int STEPS>
  VOCO_DEVICE void finish(const uint32_t (&probabilities)[STEPS][4], ForwardLoads loads, int block) {
    turns.take();
    add_values(probabilities, loads.values(block), block > 0);
    turns.pass();
    ptx::wgmma_wait<0>();
    out.pin();
    shared.ring.release(loads.values(block), me.elected);
  }

 private:
  VOCO_DEVICE void store(const QueryTile& tile, const Rows& rows) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = rows.position[h];
      const int member = Rows::row(h, me.warp, me.lane) & (packing.heads() - 1);
      const int head = (tile.pack << packing.log2) + member;
      const bool valid = token >= tile.run_start;
      // Padding sees no key: its maximum is -inf and its sum is 0.
      const float sum = row_total(softmax.sum[h]);
      const float lse = (softmax.maximum[h] + ptx::log2(sum)) * LN_2;
      if (valid && me.lane % 4 == 0) params.lse[statistic_index(params, tile.row, head, token)] = lse;
      store_row<T, D>(row_address(params.out, tile.row, head, token), valid, out, h,
                      sum > 0.f ? 1.f / sum : 0.f, 0, params.head_dim, me.lane);
    }
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ QueryTileArguments arguments) {
  walk_query_tiles<D, ForwardLoads, ForwardConsumer<T, D>, false>(arguments);
}

}  // namespace

void attention_forward_sm90(const AttentionParams& params, void* stream) {
  const runtime::DeviceGuard guard(params.device);
  const QueryTileArguments arguments(params);
  runtime::set_zero(params.next_item, sizeof(int), stream);
  by_type(params, [&](auto type, auto head_dim) {
    constexpr int D = decltype(head_dim)::value;
    runtime::launch(forward_kernel<decltype(type), D>, runtime::multiprocessors(), THREADS,
                    QueryTileShared<D, false>::BYTES, stream, arguments);
  });
}
