// The framework of the kernels that process query tiles (forward, dQ): shared memory, and the warpgroup
// that copies.
//
// There is one CTA per multiprocessor. It takes work items of 128 query rows until there are none left.
// The first of its three warpgroups copies (jobs.cuh); the other two compute, 64 rows each.
#pragma once

#include "jobs.cuh"
#include "launch.cuh"
#include "mask.cuh"
#include "pipeline.cuh"
#include "tiles.cuh"

// A block of keys or values that a consumer reads.
struct Load {
  int block;
  bool values;
};

// A kernel's argument. In the tensor maps, q and dout are [batch, packs, length, heads per pack,
// head_dim] (see Packing); k and v are the same with one head per pack.
struct QueryTileArguments {
  AttentionParams params;
  Packing packing;
  ptx::TensorMap q, dout, k, v;

  explicit QueryTileArguments(const AttentionParams& params)
      : params(params), packing{packing_log2(params.heads, params.kv_heads)} {
    const int heads = 1 << packing.log2;
    q = panel_map(params.q, params, params.heads, heads);
    if (params.dout.data) dout = panel_map(params.dout, params, params.heads, heads);
    k = panel_map(params.k, params, params.kv_heads, 1);
    v = panel_map(params.v, params, params.kv_heads, 1);
  }
};

// WITH_DOUT: dout is loaded for each item, as well as q.
template <int D, bool WITH_DOUT>
struct QueryTileShared {
  static constexpr int OPERAND_BYTES = CONSUMERS * BLOCK_BYTES<D>;
  static constexpr int RESIDENT_BYTES = (WITH_DOUT ? 2 : 1) * OPERAND_BYTES;
  // The buffer of q is free once q is in registers, but dout is read until the item's end. So with dout,
  // the next item's operands have a second buffer if it fits.
  static constexpr int PLACES = WITH_DOUT && D <= 128 ? 2 : 1;
  static constexpr int ALL_RESIDENT_BYTES = PLACES * RESIDENT_BYTES;
  static constexpr int FITTING = (SHARED_LIMIT - SHARED_RESERVE - ALL_RESIDENT_BYTES) / BLOCK_BYTES<D>;
  using Slots = Ring<(FITTING < 16 ? FITTING : 16), BLOCK_BYTES<D>>;
  static constexpr int BYTES = ALL_RESIDENT_BYTES + Slots::BYTES + SHARED_RESERVE;

  uint32_t operands;
  Slots ring;
  Resident<PLACES> resident;
  WorkQueue<QueryTile> queue;
  JobQueue jobs;
  unsigned char* memory;

  VOCO_DEVICE QueryTileShared() {
    memory = ptx::dynamic_shared();
    operands = ptx::shared_address(memory);
    ring.slots = operands + ALL_RESIDENT_BYTES;
    ring.barriers = ring.slots + Slots::BYTES;
    resident.barriers = ring.barriers + Slots::BARRIER_BYTES;
    queue.barriers = resident.barriers + resident.BARRIER_BYTES;
    jobs.barriers = queue.barriers + queue.BARRIER_BYTES;
    queue.entries =
        reinterpret_cast<QueryTile*>(memory + (jobs.barriers - operands) + JobQueue::BARRIER_BYTES);
    jobs.jobs = reinterpret_cast<Job*>(queue.entries + queue.DEPTH);
    static_assert(Slots::BARRIER_BYTES + resident.BARRIER_BYTES + queue.BYTES + JobQueue::BYTES <=
                  SHARED_RESERVE);
  }
  // A block for each consumer.
  VOCO_DEVICE uint32_t q(int fill) const { return operands + fill % PLACES * RESIDENT_BYTES; }
  VOCO_DEVICE uint32_t dout(int fill) const { return q(fill) + OPERAND_BYTES; }

  VOCO_DEVICE void init() const {
    ring.init();
    resident.init();
    queue.init();
    jobs.init();
    ptx::barrier_init_fence();
  }
};

// Run by one thread: draws the items, and issues all copies as TMA loads or jobs.
template <int D, typename Loads, bool WITH_DOUT>
VOCO_DEVICE void copy_items(const QueryTileArguments& arguments,
                            const QueryTileShared<D, WITH_DOUT>& shared) {
  const auto& [params, packing, q_map, dout_map, k_map, v_map] = arguments;
  const auto& ring = shared.ring;
  const auto& resident = shared.resident;
  int next_load = 0, next_fill = 0, next_job = 0;
  int item = shared.queue.draw(0, params.next_item);
  for (int i = 0;; ++i) {
    QueryTile drawn = query_tile(params, packing, item);
    drawn.fill = next_fill;
    drawn.first_load = next_load;
    const QueryTile& tile = shared.queue.publish(i, drawn);
    if (tile.is_end()) break;
    item = shared.queue.draw(i + 1, params.next_item);
    if (tile.blocks == 0) continue;

    const int fill = next_fill++;
    resident.wait_empty(fill);
    ptx::barrier_arrive_expect(resident.full(fill), shared.RESIDENT_BYTES);
    for (int block = 0; block < CONSUMERS; ++block) {
      const int position = tile.start + block * packing.positions();
      for (int panel = 0; panel < D / PANEL_COLUMNS; ++panel) {
        const int offset = block * BLOCK_BYTES<D> + panel * PANEL_BYTES, column = panel * PANEL_COLUMNS;
        ptx::tma_load(shared.q(fill) + offset, &q_map, resident.full(fill), column, 0, position,
                      tile.pack, tile.row);
        if constexpr (WITH_DOUT) {
          ptx::tma_load(shared.dout(fill) + offset, &dout_map, resident.full(fill), column, 0, position,
                        tile.pack, tile.row);
        }
      }
    }
    const Loads loads(tile);
    for (int n = 0; n < 2 * tile.blocks; ++n, ++next_load) {
      const Load load = loads.at(n);
      ring.wait_empty(next_load);
      if (!tile.contiguous(load.block)) {
        Job job = {};
        job.what = load.values ? Copy::V : Copy::K;
        job.target = ring.slot(next_load);
        job.barrier = ring.full(next_load);
        job.row = tile.row;
        job.head = tile.kv_head;
        job.begin = load.block == 0 && tile.narrow() ? BLOCK_ROWS - NARROW_ROWS : 0;
        job.end = BLOCK_ROWS;
        job.start = tile.block_start(load.block);
        job.low = tile.first_key;
        job.high = tile.end;
        job.direct_from = tile.key_start;
        job.list_offset = tile.prefix_stop - tile.key_start;
        shared.jobs.publish(next_job, job);
        continue;
      }
      ptx::barrier_arrive_expect(ring.full(next_load), BLOCK_BYTES<D>);
      for (int panel = 0; panel < D / PANEL_COLUMNS; ++panel) {
        ptx::tma_load(ring.slot(next_load) + panel * PANEL_BYTES, load.values ? &v_map : &k_map,
                      ring.full(next_load), panel * PANEL_COLUMNS, 0, tile.block_start(load.block),
                      tile.kv_head, tile.row);
      }
    }
  }
  shared.jobs.publish_end(next_job);
}

// Processes the first `mine` blocks of a tile. For each block, the consumer computes an operand [64
// queries, keys] (probabilities, or dS) and multiplies it by keys or values of the block. It has
//   begin<N>     computes the operand for a block's last N keys, with nothing else in flight
//   advance      computes a block's operand while the product with the previous operand is in flight
//   finish       computes the product with an operand, with nothing else in flight
// and PIPELINED, whether to use advance. All of the tile's turns are taken and all of its loads are
// released, including those of blocks that only the other consumer needs.
template <typename Consumer, typename Loads>
VOCO_DEVICE void walk_keys(Consumer& consumer, const Loads& loads, const QueryTile& tile,
                           const Rows& rows, int mine) {
  constexpr bool PIPELINED = Consumer::PIPELINED;
  const int start = tile.block_start(0), first_key = tile.first_key, blocks = tile.blocks;
  const bool narrow = tile.narrow();
  int block = 0;
  if (narrow && mine > 0 && (mine == 1 || !PIPELINED)) {
    uint32_t few[NARROW_ROWS / 16][4];
    consumer.template begin<NARROW_ROWS>(few, loads, 0, rows, start, first_key);
    consumer.finish(few, loads, 0);
    block = 1;
  }
  if constexpr (!PIPELINED) {
    for (; block < mine; ++block) {
      uint32_t operand[BLOCK_ROWS / 16][4];
      consumer.template begin<BLOCK_ROWS>(operand, loads, block, rows, start + BLOCK_ROWS * block,
                                          first_key);
      consumer.finish(operand, loads, block);
    }
  } else if (block < mine) {
    uint32_t operand[BLOCK_ROWS / 16][4];
    if (narrow) {
      uint32_t few[NARROW_ROWS / 16][4];
      consumer.template begin<NARROW_ROWS>(few, loads, 0, rows, start, first_key);
      consumer.advance(few, operand, loads, 1, rows, start + BLOCK_ROWS, first_key);
    } else {
      consumer.template begin<BLOCK_ROWS>(operand, loads, 0, rows, start, first_key);
    }
    for (block = narrow ? 2 : 1; block < mine; ++block) {
      consumer.advance(operand, operand, loads, block, rows, start + BLOCK_ROWS * block, first_key);
    }
    consumer.finish(operand, loads, mine - 1);
  }

  // Stays in step with the other consumer, which waits for both turns and slots.
  for (block = mine; block < blocks; ++block) {
    consumer.turns.forgo();
    if constexpr (!PIPELINED) consumer.turns.forgo();
    consumer.shared.ring.skip(loads.keys(block), loads.values(block), consumer.me);
  }
  if (PIPELINED && mine == 0) consumer.turns.forgo();  // the one in which it finishes
}

// The body of such a kernel, for all threads. `Consumer(arguments, shared).run()` reads the items.
template <int D, typename Loads, typename Consumer, bool WITH_DOUT>
VOCO_DEVICE void walk_query_tiles(const QueryTileArguments& arguments) {
  const QueryTileShared<D, WITH_DOUT> shared;
  take_roles<D>(
      arguments.params, shared, shared.operands, [&] { copy_items<D, Loads>(arguments, shared); },
      [&] { Consumer(arguments, shared).run(); });
}
