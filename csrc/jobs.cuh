// Copies that TMA can't make: gathered rows, and partial blocks whose other rows must be zeros.
//
// One thread goes through all copies in order and waits until each target is free. It describes each
// copy that is not contiguous as a job; three warps take the jobs in turn, so that several are in flight
// at once. (These warps can't wait for the targets themselves: a barrier only shows the parity of its
// phase, and a warp that skips most of a ring's loads could mistake one phase for another.)
#pragma once

#include "blocks.cuh"
#include "pipeline.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

enum class Copy { END, Q, K, V, DOUT, STATISTICS };

// Row r of the target is element x = start + r of an axis. Outside of [low, high) it is zeros; from
// direct_from on it is token x; before that it is token list[x], where list is `kept` or `readers` of
// the batch row, offset by list_offset.
struct Job {
  Copy what;
  uint32_t target, barrier;  // barrier: gets one arrival when the copy is complete
  int row, head;
  int begin, end;  // the target's rows to write; others are left as they are
  int start, low, high, direct_from, list_offset;
  bool list_readers;
};

// Statistics and positions of the 64 queries of a block.
struct QueryStatistics {
  float lse_log2[BLOCK_ROWS];  // inf if there is no query, so that its probabilities are 0
  float delta[BLOCK_ROWS];
  int token[BLOCK_ROWS];
  int visible_from[BLOCK_ROWS];
};

struct JobQueue {
  static constexpr int DEPTH = 2 * GATHER_WARPS;  // a multiple, so each entry always has the same warp
  static constexpr int BARRIER_BYTES = 2 * DEPTH * 8;
  static constexpr int BYTES = BARRIER_BYTES + DEPTH * sizeof(Job);

  uint32_t barriers;
  Job* jobs;  // [DEPTH], shared memory

  VOCO_DEVICE void init() const {
    for (int i = 0; i < 2 * DEPTH; ++i) ptx::barrier_init(barriers + i * 8, 1);
  }
  VOCO_DEVICE uint32_t full(int i) const { return barriers + i % DEPTH * 8; }
  VOCO_DEVICE uint32_t empty(int i) const { return barriers + (DEPTH + i % DEPTH) * 8; }

  VOCO_DEVICE void publish(int& i, const Job& job) const {
    ptx::barrier_wait(empty(i), (i / DEPTH & 1) ^ 1);
    jobs[i % DEPTH] = job;
    ptx::barrier_arrive(full(i));
    ++i;
  }
  // Publishes an end for each of the warps.
  VOCO_DEVICE void publish_end(int i) const {
    Job end = {};
    end.what = Copy::END;
    for (int warp = 0; warp < GATHER_WARPS; ++warp) publish(i, end);
  }

  // The main loop of a gathering warp. `memory` and `memory_address` are the start of dynamic shared
  // memory, as a pointer and as a shared address.
  template <int D>
  VOCO_DEVICE void work(const AttentionParams& params, unsigned char* memory, uint32_t memory_address,
                        int gather_warp, int lane) const {
    for (int i = gather_warp;; i += GATHER_WARPS) {
      ptx::barrier_wait(full(i), i / DEPTH & 1);
      const Job job = jobs[i % DEPTH];
      if (job.what == Copy::END) return;
      const int64_t row = static_cast<int64_t>(job.row) * params.length;
      const int* list = (job.list_readers ? params.readers : params.kept) + row + job.list_offset;
      const auto token_of = [&](int r) {
        const int x = job.start + r;
        return x < job.low || x >= job.high ? -1 : x >= job.direct_from ? x : list[x];
      };
      if (job.what == Copy::STATISTICS) {
        auto& target = *reinterpret_cast<QueryStatistics*>(memory + (job.target - memory_address));
        for (int r = lane; r < BLOCK_ROWS; r += 32) {
          const int token = token_of(r);
          const int64_t index = statistic_index(params, job.row, job.head, token);
          target.lse_log2[r] = token >= 0 ? params.lse[index] * LOG2_E : INFINITY_F;
          target.delta[r] = token >= 0 ? params.delta[index] : 0.f;
          target.token[r] = token;
          target.visible_from[r] = token >= 0 ? params.visible_from[row + token] : 0;
        }
        __syncwarp();
      } else {
        const Tensor4& tensor = job.what == Copy::Q   ? params.q
                                : job.what == Copy::K ? params.k
                                : job.what == Copy::V ? params.v
                                                      : params.dout;
        copy_rows<D>(job.target, row_address(tensor, job.row, job.head, 0), tensor.token_stride,
                     params.head_dim, job.begin, job.end, lane, token_of);
      }
      if (lane == 0) {
        ptx::barrier_arrive(job.barrier);
        ptx::barrier_arrive(empty(i));
      }
    }
  }
};

// Assigns roles in a CTA: the first thread runs `copy`, three warps run jobs, two warpgroups `compute`.
template <int D, typename Shared, typename CopyAll, typename Compute>
VOCO_DEVICE void take_roles(const AttentionParams& params, const Shared& shared, uint32_t memory_address,
                            CopyAll copy, Compute compute) {
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= WARPGROUP / 32) {
    ptx::take_registers<COMPUTE_REGISTERS>();
    compute();
    return;
  }
  ptx::give_registers<COPY_REGISTERS>();
  if (warp > 0) {
    shared.jobs.template work<D>(params, shared.memory, memory_address, warp - 1, lane);
  } else if (lane == 0) {
    copy();
  }
}
