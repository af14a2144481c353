// Blocks of 64 rows in shared memory, in the layout that TMA writes and wgmma reads.
//
// A block [64, D] of 16-bit elements is D / 64 consecutive panels. A panel holds 64 columns, as 64 rows
// of 128 bytes whose eight 16-byte chunks are swizzled: chunk c of row r is at index c ^ (r % 8), so
// that neither a row nor a column of chunks has bank conflicts. Panels start at multiples of 1,024
// bytes.
#pragma once

#include "ptx.cuh"

constexpr int BLOCK_ROWS = 64;
constexpr int PANEL_COLUMNS = 64;
constexpr int PANEL_BYTES = BLOCK_ROWS * PANEL_COLUMNS * 2;
constexpr int CHUNK = 8;         // elements in 16 bytes
constexpr int ROW_GROUP = 1024;  // bytes in 8 rows of a panel, the swizzle's period
constexpr int NARROW_ROWS = 16;  // rows used of a block if no more are needed

template <int D>
constexpr int BLOCK_BYTES = D / PANEL_COLUMNS * PANEL_BYTES;

// The wgmma descriptor of a matrix in shared memory with this swizzle.
VOCO_DEVICE uint64_t descriptor(uint32_t address, int leading_bytes, int stride_bytes) {
  constexpr uint64_t SWIZZLE_128_BYTES = 1;
  return static_cast<uint64_t>(address >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | SWIZZLE_128_BYTES << 62;
}

// An operand with a block's rows from `row` (a multiple of 8) on as M or N and its columns as K, 16 per
// step.
struct RowsOperand {
  uint64_t first;

  VOCO_DEVICE RowsOperand(uint32_t block, int row)
      : first(descriptor(ptx::uniform(block) + row * 128, 16, ROW_GROUP)) {}
  VOCO_DEVICE uint64_t step(int i) const { return first + (i / 4 * PANEL_BYTES + i % 4 * 32) / 16; }
};

// An operand with a block's columns from panel `panel` on as M or N and its rows from `row` (a multiple
// of 8) on as K.
struct ColumnsOperand {
  uint64_t first;

  VOCO_DEVICE ColumnsOperand(uint32_t block, int panel, int row)
      : first(
            descriptor(ptx::uniform(block + panel * PANEL_BYTES) + row * 128, PANEL_BYTES, ROW_GROUP)) {}
  VOCO_DEVICE uint64_t step(int i) const { return first + i * 2 * ROW_GROUP / 16; }
};

// The address of chunk `chunk` of row `row`.
VOCO_DEVICE uint32_t chunk_address(uint32_t block, int row, int chunk) {
  const uint32_t panel = block + chunk / CHUNK * PANEL_BYTES;
  return panel + row * 128 + ((chunk % CHUNK) ^ (row % 8)) * 16;
}

// Loads a warp's 16 of the 64 rows of its warpgroup's block, as A operands in registers.
template <int D>
VOCO_DEVICE void load_fragments(uint32_t (&fragments)[D / 16][4], uint32_t block, int warp, int lane) {
  const int matrix = lane / 8;
  const int row = 16 * warp + matrix % 2 * 8 + lane % 8;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    ptx::ldmatrix_x4(fragments[step], chunk_address(block, row, 2 * step + matrix / 2));
  }
}

// Rounds an accumulator [64, 16 * STEPS], which makes it an A operand.
template <typename T, int STEPS>
VOCO_DEVICE void round_to_operand(uint32_t (&operand)[STEPS][4], const float (&values)[8 * STEPS]) {
#pragma unroll
  for (int i = 0; i < 4 * STEPS; ++i) {
    operand[i / 4][i % 4] = ptx::pack<T>(values[2 * i], values[2 * i + 1]);
  }
}

// Copies rows [begin, end) of a block from anywhere, by one warp. `token_of(row)` is a row's token, or
// negative for a row of zeros. Columns from head_dim on are zeros too. end - begin is a multiple of 16.
template <int D, typename TokenOf>
VOCO_DEVICE void copy_rows(uint32_t block, const uint16_t* base, int64_t token_stride, int head_dim,
                           int begin, int end, int lane, TokenOf token_of) {
  constexpr int CHUNKS = D / CHUNK;  // adjacent lanes that copy a row
  constexpr int ROWS = 32 / CHUNKS;  // copied at once
  constexpr int AHEAD = NARROW_ROWS / ROWS < 4 ? NARROW_ROWS / ROWS : 4;  // tokens looked up together
  const int chunk = lane % CHUNKS;
  const bool inside = chunk * CHUNK < head_dim;
  base += inside ? chunk * CHUNK : 0;
#pragma unroll 1
  for (int row = begin + lane / CHUNKS; row < end; row += AHEAD * ROWS) {
    int tokens[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) tokens[i] = token_of(row + i * ROWS);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const bool valid = inside && tokens[i] >= 0;
      ptx::cp_async_16(chunk_address(block, row + i * ROWS, chunk),
                       base + (valid ? tokens[i] * token_stride : 0), valid);
    }
  }
  ptx::cp_async_wait_all();
  ptx::fence_async_proxy();
  __syncwarp();
}
