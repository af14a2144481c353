// A test kernel for C[M, N] = A B with the techniques of the attention kernels: one warpgroup copies
// tiles of 64 columns of K with TMA to a ring of two stages, and two multiply 64 rows each; each block
// processes several tiles.
#include "descriptor.cuh"
#include "exported.h"
#include "ptx.cuh"
#include "runtime.cuh"

constexpr int BLOCK_M = 128, BLOCK_K = 64, STAGES = 2, THREADS = 384;
constexpr int PANEL = 64 * ROW;  // 64 rows of 64 elements, bytes
constexpr int A_BYTES = 2 * PANEL;

struct Gemm {
  ptx::TensorMap a, b;
  float* c;  // [m, n]
  int m, n, k;
};

// B in shared memory: rows of N, or columns of N in panels of 64, of which one is never left out.
template <int N, bool MN_MAJOR_B>
constexpr int B_BYTES = MN_MAJOR_B ? (N + 63) / 64 * PANEL : N * ROW;

template <int N, bool MN_MAJOR_A, bool MN_MAJOR_B>
VOCO_DEVICE void copy_tiles(const Gemm& gemm, uint32_t tiles, uint32_t full, uint32_t empty) {
  constexpr int BYTES = A_BYTES + B_BYTES<N, MN_MAJOR_B>;
  int step = 0;
  for (int m = blockIdx.x * BLOCK_M; m < gemm.m; m += gridDim.x * BLOCK_M) {
    for (int k = 0; k < gemm.k; k += BLOCK_K, ++step) {
      const int stage = step % STAGES;
      const uint32_t barrier = full + 8 * stage, a = tiles + stage * BYTES, b = a + A_BYTES;
#ifndef FAULT_NO_EMPTY_WAIT
      ptx::barrier_wait(empty + 8 * stage, (step / STAGES & 1) ^ 1);
#endif
#if defined(FAULT_FEW_BYTES)
      ptx::barrier_arrive_expect(barrier, A_BYTES);
#elif defined(FAULT_MANY_BYTES)
      ptx::barrier_arrive_expect(barrier, BYTES + 16);
#else
      ptx::barrier_arrive_expect(barrier, BYTES);
#endif
      if constexpr (MN_MAJOR_A) {
        ptx::tma_load(a, &gemm.a, barrier, 0, k, m / 64, 0, 0);
      } else {
        ptx::tma_load(a, &gemm.a, barrier, k, m, 0, 0, 0);
      }
      if constexpr (MN_MAJOR_B) {
        ptx::tma_load(b, &gemm.b, barrier, 0, k, 0, 0, 0);
      } else {
        ptx::tma_load(b, &gemm.b, barrier, k, 0, 0, 0, 0);
      }
    }
  }
}

template <typename T, int N, bool MN_MAJOR_A, bool MN_MAJOR_B, bool A_IN_REGISTERS>
VOCO_DEVICE void multiply_tile(float (&d)[N / 2], uint32_t a, uint32_t b, bool accumulate) {
#pragma unroll
  for (int k = 0; k < BLOCK_K; k += 16) {
    const uint64_t b_operand =
        MN_MAJOR_B ? descriptor(b + k * ROW, PANEL, PATTERN) : descriptor(b + k * 2, 16, PATTERN);
    if constexpr (A_IN_REGISTERS) {
      const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
      uint32_t registers[4];
      ptx::ldmatrix_x4(registers, swizzled(a + (16 * warp + lane % 16) * ROW + k * 2 + lane / 16 * 16));
      ptx::wgmma_fence();
      ptx::wgmma<T, N, MN_MAJOR_B>(d, registers, b_operand, accumulate || k > 0);
    } else {
      const uint64_t a_operand =
          MN_MAJOR_A ? descriptor(a + k * ROW, PANEL, PATTERN) : descriptor(a + k * 2, 16, PATTERN);
      ptx::wgmma<T, N, MN_MAJOR_A, MN_MAJOR_B>(d, a_operand, b_operand, accumulate || k > 0);
    }
  }
}

template <int N>
VOCO_DEVICE void store(const Gemm& gemm, const float (&d)[N / 2], int m) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int row = m + 16 * warp + lane / 4 + i / 2 % 2 * 8;
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < gemm.m && column < gemm.n) gemm.c[row * gemm.n + column] = d[i];
  }
}

template <typename T, int N, bool MN_MAJOR_A, bool MN_MAJOR_B, bool A_IN_REGISTERS>
VOCO_DEVICE void multiply_tiles(const Gemm& gemm, uint32_t tiles, uint32_t full, uint32_t empty) {
  constexpr int BYTES = A_BYTES + B_BYTES<N, MN_MAJOR_B>;
  const int consumer = threadIdx.x / 128 - 1;
  float d[N / 2];
  int step = 0;
  for (int m = blockIdx.x * BLOCK_M; m < gemm.m; m += gridDim.x * BLOCK_M) {
    for (int k = 0; k < gemm.k; k += BLOCK_K, ++step) {
      const int stage = step % STAGES;
      const uint32_t a = tiles + stage * BYTES;
#if defined(FAULT_PARITY)
      ptx::barrier_wait(full + 8 * stage, (step / STAGES & 1) ^ 1);
#elif !defined(FAULT_NO_FULL_WAIT)
      ptx::barrier_wait(full + 8 * stage, step / STAGES & 1);
#endif
      ptx::pin(d);
#ifndef FAULT_NO_WGMMA_FENCE
      ptx::wgmma_fence();
#endif
      multiply_tile<T, N, MN_MAJOR_A, MN_MAJOR_B, A_IN_REGISTERS>(d, a + consumer * PANEL, a + A_BYTES,
                                                                  k > 0);
      ptx::wgmma_commit();
#ifdef FAULT_EARLY_RELEASE
      ptx::barrier_arrive(empty + 8 * stage);
#endif
#ifdef FAULT_EARLY_READ
      store<N>(gemm, d, m + 64 * consumer);
#endif
      ptx::wgmma_wait<0>();
      ptx::pin(d);
#ifndef FAULT_EARLY_RELEASE
      ptx::barrier_arrive(empty + 8 * stage);
#endif
    }
#ifndef FAULT_EARLY_READ
    store<N>(gemm, d, m + 64 * consumer);
#endif
  }
}

template <typename T, int N, bool MN_MAJOR_A, bool MN_MAJOR_B, bool A_IN_REGISTERS>
__global__ void __launch_bounds__(THREADS, 1) gemm_kernel(const __grid_constant__ Gemm gemm) {
  const uint32_t tiles = ptx::shared_address(ptx::dynamic_shared());
  const uint32_t full = tiles + STAGES * (A_BYTES + B_BYTES<N, MN_MAJOR_B>);
  const uint32_t empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      ptx::barrier_init(full + 8 * stage, 1);
      ptx::barrier_init(empty + 8 * stage, 256);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::give_registers<24>();
    if (threadIdx.x == 0) copy_tiles<N, MN_MAJOR_A, MN_MAJOR_B>(gemm, tiles, full, empty);
  } else {
    ptx::take_registers<240>();
    multiply_tiles<T, N, MN_MAJOR_A, MN_MAJOR_B, A_IN_REGISTERS>(gemm, tiles, full, empty);
  }
}

// A K-major matrix is [rows, k], an MN-major one [k, rows]; pitch is in elements. Rows of the last box
// can be outside of the matrix.
inline ptx::TensorMap matrix_map(const void* pointer, bool bf16, bool mn_major, int rows, int k,
                                 int pitch, int box_rows) {
  const uint64_t bytes = 2 * static_cast<uint64_t>(pitch), all = bytes * (mn_major ? k : rows);
  const uint32_t panels = (box_rows + 63) / 64, panels_there = (rows + 63) / 64;
  if (mn_major && panels_there > 1) {
    return runtime::tensor_map(pointer, bf16, {64, uint64_t(k), panels_there, 1, 1},
                               {bytes, ROW, all, all}, {64, BLOCK_K, panels, 1, 1});
  }
  if (mn_major) {
    return runtime::tensor_map(pointer, bf16, {uint64_t(rows), uint64_t(k), 1, 1, 1},
                               {bytes, ROW, all, all}, {64, BLOCK_K, panels, 1, 1});
  }
  return runtime::tensor_map(pointer, bf16, {uint64_t(k), uint64_t(rows), 1, 1, 1},
                             {bytes, all, all, all}, {BLOCK_K, uint32_t(box_rows), 1, 1, 1});
}

template <typename T, int N, bool MN_MAJOR_A, bool MN_MAJOR_B, bool A_IN_REGISTERS>
void run(const void* a, const void* b, float* c, int m, int k, int a_pitch, int b_pitch) {
  const bool bf16 = ptx::is_bf16<T>;
  Gemm gemm;
  gemm.a = matrix_map(a, bf16, MN_MAJOR_A, m, k, a_pitch, BLOCK_M);
  gemm.b = matrix_map(b, bf16, MN_MAJOR_B, N, k, b_pitch, N);
  gemm.c = c;
  gemm.m = m;
  gemm.n = N;
  gemm.k = k;
  const int shared = STAGES * (A_BYTES + B_BYTES<N, MN_MAJOR_B> + 16);
  runtime::launch(gemm_kernel<T, N, MN_MAJOR_A, MN_MAJOR_B, A_IN_REGISTERS>, runtime::multiprocessors(),
                  THREADS, shared, runtime::Stream{}, gemm);
}

#ifndef ONE_FORM_ONLY
template <typename T, int N>
void run_form(const std::string& form, const void* a, const void* b, float* c, int m, int k, int a_pitch,
              int b_pitch) {
  if (form == "kk") run<T, N, false, false, false>(a, b, c, m, k, a_pitch, b_pitch);
  if (form == "km") run<T, N, false, true, false>(a, b, c, m, k, a_pitch, b_pitch);
  if (form == "mk") run<T, N, true, false, false>(a, b, c, m, k, a_pitch, b_pitch);
  if (form == "mm") run<T, N, true, true, false>(a, b, c, m, k, a_pitch, b_pitch);
  if (form == "rk") run<T, N, false, false, true>(a, b, c, m, k, a_pitch, b_pitch);
  if (form == "rm") run<T, N, false, true, true>(a, b, c, m, k, a_pitch, b_pitch);
}

template <typename T>
void run_columns(int n, const std::string& form, const void* a, const void* b, float* c, int m, int k,
                 int a_pitch, int b_pitch) {
  if (n == 16) run_form<T, 16>(form, a, b, c, m, k, a_pitch, b_pitch);
  if (n == 64) run_form<T, 64>(form, a, b, c, m, k, a_pitch, b_pitch);
  if (n == 128) run_form<T, 128>(form, a, b, c, m, k, a_pitch, b_pitch);
}
#endif

// form: the layouts of A and B, k (K-major), m (MN-major) or r (K-major, but multiplied from registers).
EXPORTED gemm(bool bf16, int n, const char* form, const void* a, const void* b, float* c, int m, int k,
              int a_pitch, int b_pitch) {
  return message_of([=] {
#ifdef ONE_FORM_ONLY  // a planted fault is a compilation of its own
    run<BF16, 64, false, false, false>(a, b, c, m, k, a_pitch, b_pitch);
#else
    if (bf16) {
      run_columns<BF16>(n, form, a, b, c, m, k, a_pitch, b_pitch);
    } else {
      run_columns<FP16>(n, form, a, b, c, m, k, a_pitch, b_pitch);
    }
#endif
  });
}
