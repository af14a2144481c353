// The backward pass: first delta; then either dQ by query tiles, and dK and dV by key tiles, so that
// each row is written once; or all three by key tiles, with dQ accumulated in float32 and rounded at the
// end. docs/hopper.md compares the two.
#include "attention.h"
#include "launch.cuh"
#include "pipeline.cuh"

namespace {

// Threads that read one row of out and dout.
constexpr int THREADS_A_ROW = 8;
constexpr int ROW_THREADS = 256;

// delta = rowsum(out * dout) - dlse, so that dS = P * (dP - delta).
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    delta_kernel(const __grid_constant__ AttentionParams params) {
  const int64_t rows = static_cast<int64_t>(params.batch) * params.heads * params.length;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * ROW_THREADS + threadIdx.x) / THREADS_A_ROW;
  const int part = threadIdx.x % THREADS_A_ROW;
  float sum = 0.f;
  if (row < rows) {
    const int token = row % params.length;
    const int head = row / params.length % params.heads;
    const int batch = row / params.length / params.heads;
    const uint16_t* out = row_address(params.out, batch, head, token);
    const uint16_t* dout = row_address(params.dout, batch, head, token);
    for (int column = part * CHUNK; column < params.head_dim; column += THREADS_A_ROW * CHUNK) {
      const uint4 x = *reinterpret_cast<const uint4*>(out + column);
      const uint4 y = *reinterpret_cast<const uint4*>(dout + column);
      const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 a = ptx::unpack<T>(xs[i]), b = ptx::unpack<T>(ys[i]);
        sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
      }
    }
  }
  for (int distance = THREADS_A_ROW / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (row < rows && part == 0) params.delta[row] = sum - (params.dlse ? params.dlse[row] : 0.f);
}

// dq = scale * dq_sum, rounded; each thread handles 8 columns of a row.
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS)
    finish_sums_kernel(const __grid_constant__ AttentionParams params) {
  const int chunks = params.head_dim / CHUNK;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * ROW_THREADS + threadIdx.x;
  const int64_t row = index / chunks;
  if (row >= static_cast<int64_t>(params.batch) * params.heads * params.length) return;
  const int column = index % chunks * CHUNK;
  const int token = row % params.length;
  const int head = row / params.length % params.heads;
  const int batch = row / params.length / params.heads;
  const float4* sum = reinterpret_cast<const float4*>(params.dq_sum + row * params.head_dim + column);
  const float4 x = sum[0], y = sum[1];
  const float scale = params.scale;
  *reinterpret_cast<uint4*>(row_address(params.dq, batch, head, token) + column) = {
      ptx::pack<T>(x.x * scale, x.y * scale), ptx::pack<T>(x.z * scale, x.w * scale),
      ptx::pack<T>(y.x * scale, y.y * scale), ptx::pack<T>(y.z * scale, y.w * scale)};
}

int blocks_for(int64_t threads) { return static_cast<int>((threads + ROW_THREADS - 1) / ROW_THREADS); }

}  // namespace

void attention_delta(const AttentionParams& params, void* stream) {
  const int64_t rows = static_cast<int64_t>(params.batch) * params.heads * params.length;
  runtime::launch(params.bf16 ? delta_kernel<BF16> : delta_kernel<FP16>,
                  blocks_for(rows * THREADS_A_ROW), ROW_THREADS, 0, stream, params);
}

void attention_backward_sm90(const AttentionParams& params, void* stream) {
  const runtime::DeviceGuard guard(params.device);
  runtime::set_zero(params.next_item, 2 * sizeof(int), stream);
  attention_delta(params, stream);
  if (!params.dq_sum) {
    attention_dq_sm90(params, stream);
    attention_dkdv_sm90(params, stream);
    return;
  }
  const int64_t elements =
      static_cast<int64_t>(params.batch) * params.heads * params.length * params.head_dim;
  runtime::set_zero(params.dq_sum, elements * sizeof(float), stream);
  attention_dkdv_and_dq_sm90(params, stream);
  runtime::launch(params.bf16 ? finish_sums_kernel<BF16> : finish_sums_kernel<FP16>,
                  blocks_for(elements / CHUNK), ROW_THREADS, 0, stream, params);
}
