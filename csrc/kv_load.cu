// The compact cache's loader: moves the keys and values of a few tokens between compact entries and a
// cache, all layers in one launch.
//
// An entry, [L, 2, Hkv, n, D], is divided into units of 8 elements. Neighbouring threads take
// neighbouring units, so that a warp reads whole lines of the entry, each once. That matters most when
// the entry is in host memory, across PCIe. The tables may be there too, and then the latency of a load
// is about a microsecond. Therefore a thread issues all its loads before it uses any of them, and it
// loads a unit, for which it only needs the entry's address, before it computes where in the cache the
// unit goes. A launch waits for memory twice: for that address, and for everything else.
#include <algorithm>

#include "kv_move.h"
#include "runtime.cuh"

namespace {

constexpr int THREADS = 128;
// Blocks per multiprocessor, which leaves 80 registers per thread. All their loads in flight are about
// enough to hide the latency of HBM, and far more than PCIe needs.
constexpr int BLOCKS = 6;
constexpr int LOADS = 4;        // in flight per thread, in a copy
constexpr int UNIT = 8;         // elements
constexpr int COPY_BYTES = 16;  // which a thread of a copy loads at once

// Columns of the tables (voco_kernels/kv/move.py), which are read two at a time.
constexpr int ENTRY_COLUMNS = 4;
constexpr int FIRST_TOKEN = 2;
constexpr int TOKEN_COLUMNS = 2;

__host__ __device__ constexpr int bytes_of(Element type) {
  return type == Element::fp32 ? 4 : type == Element::bf16 || type == Element::fp16 ? 2 : 1;
}

// ---- Addresses. Units of an entry are counted in 32 bits, elements and bytes in 64.

// Two adjacent numbers of a table.
struct Pair {
  int64_t first, second;
};

VOCO_DEVICE Pair load_pair(const int64_t* address) {
  const uint4 data = ptx::load_16(address);
  return {int64_t(data.x | uint64_t{data.y} << 32), int64_t(data.z | uint64_t{data.w} << 32)};
}

struct Entry {
  unsigned char* data;
  const float* scales;    // [rows], or null
  const int64_t* tokens;  // the table, from the entry's first token on
  unsigned num_tokens, rows;
};

VOCO_DEVICE Entry entry_of_block(const KvMoveParams& params) {
  const int64_t* row = params.entries + ENTRY_COLUMNS * int64_t{blockIdx.x / params.blocks_per_entry};
  const Pair addresses = load_pair(row), tokens = load_pair(row + FIRST_TOKEN);
  Entry entry;
  entry.data = reinterpret_cast<unsigned char*>(addresses.first);
  entry.scales = reinterpret_cast<const float*>(addresses.second);
  entry.tokens = params.tokens + TOKEN_COLUMNS * tokens.first;
  entry.num_tokens = tokens.second;
  entry.rows = 2u * params.num_layers * params.num_kv_heads * entry.num_tokens;
  return entry;
}

// The address in the cache of a row of the entry, and the number of positions to rotate it by if it is a
// key.
struct Row {
  unsigned char* address;
  int64_t shift;
  bool is_key;
};

VOCO_DEVICE Row row_of(const KvMoveParams& params, const Entry& entry, unsigned index) {
  const unsigned heads = index / entry.num_tokens;  // of all layers' keys and values
  const unsigned token = index - heads * entry.num_tokens;
  const unsigned plane = heads / params.num_kv_heads;  // layer * 2 + c
  const unsigned head = heads - plane * params.num_kv_heads;
  const int64_t base = params.bases[plane];
  const Pair offset_and_shift = load_pair(entry.tokens + TOKEN_COLUMNS * int64_t{token});
  const int64_t element = offset_and_shift.first + head * params.head_stride;
  return {reinterpret_cast<unsigned char*>(base) + element * bytes_of(params.cache_type),
          offset_and_shift.second, plane % 2 == 0};
}

// The index of this thread among all threads of its entry.
VOCO_DEVICE unsigned first_item(const KvMoveParams& params) {
  return blockIdx.x % params.blocks_per_entry * THREADS + threadIdx.x;
}

// The lengths are written by one more block, after those of the entries. In any other block they would
// add a wait for a table.
VOCO_DEVICE bool is_for_lengths(const KvMoveParams& params) {
  return blockIdx.x == unsigned(params.num_entries) * params.blocks_per_entry;
}

VOCO_DEVICE void write_lengths(const KvMoveParams& params) {
  for (int layer = threadIdx.x; layer < params.num_layers; layer += THREADS) {
    *reinterpret_cast<int64_t*>(params.lengths[layer]) = params.length;
  }
}

// ---- Copies, 16 bytes at a time.

// One kernel per direction, because only loads from the cache have to wait for the tables.
template <bool TO_CACHE>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    kv_copy_kernel(const __grid_constant__ KvMoveParams params) {
  if (is_for_lengths(params)) return write_lengths(params);
  const Entry entry = entry_of_block(params);
  const unsigned row_units = params.head_dim * bytes_of(params.cache_type) / COPY_BYTES;
  const unsigned units = entry.rows * row_units;
  const unsigned step = params.blocks_per_entry * THREADS;
  for (unsigned first = first_item(params); first < units; first += LOADS * step) {
    unsigned char *in_entry[LOADS], *in_cache[LOADS];
    uint4 data[LOADS] = {};
    const auto load = [&](unsigned char* const(&from)[LOADS]) {
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
        if (first + i * step < units) data[i] = ptx::load_16(from[i]);
      }
    };
#pragma unroll
    for (int i = 0; i < LOADS; ++i) in_entry[i] = entry.data + int64_t{first + i * step} * COPY_BYTES;
    if (TO_CACHE) load(in_entry);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const unsigned unit =
          min(first + i * step, units - 1);  // no branch: loads of all tables are in flight together
      const unsigned row = unit / row_units;
      in_cache[i] = row_of(params, entry, row).address + (unit - row * row_units) * COPY_BYTES;
    }
    if (!TO_CACHE) load(in_cache);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      if (first + i * step < units) ptx::store_16(TO_CACHE ? in_cache[i] : in_entry[i], data[i]);
    }
  }
}

// ---- Conversions, through float. Types are runtime values: the branches cost nothing compared with the
// memory, and there is one kernel instead of fifteen.

// The bits of a unit: 8, 16 or 32 bytes, depending on the type. The rest is unused.
struct Unit {
  uint4 low, high;
};

VOCO_DEVICE Unit load_unit(const unsigned char* address, Element type) {
  Unit unit = {};
  if (bytes_of(type) == 1) {
    const uint2 data = ptx::load_8(address);
    unit.low.x = data.x;
    unit.low.y = data.y;
    return unit;
  }
  unit.low = ptx::load_16(address);
  if (bytes_of(type) == 4) unit.high = ptx::load_16(address + 16);
  return unit;
}

VOCO_DEVICE void decode(const Unit& unit, Element type, float (&values)[UNIT]) {
  const uint32_t words[8] = {unit.low.x,  unit.low.y,  unit.low.z,  unit.low.w,
                             unit.high.x, unit.high.y, unit.high.z, unit.high.w};
  if (type == Element::fp32) {
#pragma unroll
    for (int i = 0; i < UNIT; ++i) values[i] = __uint_as_float(words[i]);
    return;
  }
  if (type == Element::int8) {
#pragma unroll
    for (int i = 0; i < UNIT; ++i) values[i] = static_cast<int8_t>(words[i / 4] >> i % 4 * 8);
    return;
  }
#pragma unroll
  for (int i = 0; i < UNIT / 2; ++i) {
    const float2 pair = type == Element::bf16   ? ptx::unpack<BF16>(words[i])
                        : type == Element::fp16 ? ptx::unpack<FP16>(words[i])
                                                : ptx::unpack_e4m3(words[i / 2] >> i % 2 * 16);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

VOCO_DEVICE void store_unit(unsigned char* address, Element type, const float (&values)[UNIT]) {
  if (type == Element::fp32) {
    uint32_t words[UNIT];
#pragma unroll
    for (int i = 0; i < UNIT; ++i) words[i] = __float_as_uint(values[i]);
    ptx::store_16(address, {words[0], words[1], words[2], words[3]});
    ptx::store_16(address + 16, {words[4], words[5], words[6], words[7]});
    return;
  }
  uint32_t words[UNIT / 2];
#pragma unroll
  for (int i = 0; i < UNIT / 2; ++i) {
    words[i] = type == Element::bf16 ? ptx::pack<BF16>(values[2 * i], values[2 * i + 1])
                                     : ptx::pack<FP16>(values[2 * i], values[2 * i + 1]);
  }
  ptx::store_16(address, {words[0], words[1], words[2], words[3]});
}

// ---- Rotation.

struct Turn {
  float cos, sin;
};

// The turn by shift * inv_freq radians. The angle is double, because the error of a float would be a
// hundredth of a radian at position 100,000. After subtracting whole quarter turns it is a float of at
// most pi / 4, for which Taylor's series as far as written here are more exact than a float: the error
// of both results is below 1.5 * 2^-24. (The library's sinf and cosf would use local memory, for a table
// that only larger angles need.)
VOCO_DEVICE Turn turn_of(int64_t shift, double inv_freq) {
  constexpr double QUARTER_TURN = 1.5707963267948966;  // pi / 2
  const double quarters = static_cast<double>(shift) * inv_freq * (1 / QUARTER_TURN);
  const double whole = rint(quarters);
  const float x = static_cast<float>((quarters - whole) * QUARTER_TURN), z = x * x;
  float sin = fmaf(z, fmaf(z, fmaf(z, 1.f / 362880, -1.f / 5040), 1.f / 120), -1.f / 6);
  sin = fmaf(x * z, sin, x);
  float cos = fmaf(z, fmaf(z, fmaf(z, -1.f / 3628800, 1.f / 40320), -1.f / 720), 1.f / 24);
  cos = fmaf(z, fmaf(z, cos, -0.5f), 1.f);
  const int quadrant = static_cast<int64_t>(whole) & 3;
  const bool odd = quadrant & 1;
  const float c = odd ? sin : cos, s = odd ? cos : sin;
  return {quadrant == 1 || quadrant == 2 ? -c : c, quadrant >= 2 ? -s : s};
}

VOCO_DEVICE void rotate(float& a, float& b, const Turn& turn) {
  const float before = a;
  a = a * turn.cos - b * turn.sin;
  b = b * turn.cos + before * turn.sin;
}

// The turns for the pairs of dimensions in two units of a key, which start at these columns. Each of the
// first unit's 8 dimensions is paired with one of the second unit's; interleaved, pairs are neighbours,
// and each unit has 4.
VOCO_DEVICE void turns_of(const KvMoveParams& params, int64_t shift, const int (&columns)[2],
                          Turn (&turns)[UNIT]) {
#pragma unroll
  for (int i = 0; i < UNIT; ++i) {
    const int pair = params.interleaved ? columns[i / 4] / 2 + i % 4 : columns[0] + i;
    turns[i] = turn_of(shift, params.inv_freq[min(pair, params.rotary_dim / 2 - 1)]);
  }
}

VOCO_DEVICE void rotate(const KvMoveParams& params, const int (&columns)[2], const Turn (&turns)[UNIT],
                        float (&values)[2][UNIT]) {
#pragma unroll
  for (int i = 0; i < UNIT; ++i) {
    if (!params.interleaved) {
      if (columns[0] < params.rotary_dim / 2) rotate(values[0][i], values[1][i], turns[i]);
    } else if (columns[i / 4] + i % 4 * 2 < params.rotary_dim) {
      rotate(values[i / 4][i % 4 * 2], values[i / 4][i % 4 * 2 + 1], turns[i]);
    }
  }
}

// A thread converts two units of a row: units whose dimensions are rotated together, or neighbours.
__global__ void __launch_bounds__(THREADS, BLOCKS)
    kv_convert_kernel(const __grid_constant__ KvMoveParams params) {
  if (is_for_lengths(params)) return write_lengths(params);
  const Entry entry = entry_of_block(params);
  const int entry_bytes = bytes_of(params.entry_type), cache_bytes = bytes_of(params.cache_type);
  const int apart = params.interleaved ? 0 : params.rotary_dim / 2;
  const unsigned row_items = (params.head_dim / UNIT + 1) / 2;
  const unsigned items = entry.rows * row_items;
  const unsigned step = params.blocks_per_entry * THREADS;
  for (unsigned item = first_item(params); item < items; item += step) {
    const unsigned index = item / row_items;
    const int place = (item - index * row_items) * UNIT;
    const bool together = place < apart;
    const int columns[2] = {together ? place : 2 * place, together ? place + apart : 2 * place + UNIT};
    const bool has_second = columns[1] < params.head_dim;
    const unsigned char* from = entry.data + int64_t{index} * params.head_dim * entry_bytes;
    Unit units[2] = {};
    units[0] = load_unit(from + columns[0] * entry_bytes, params.entry_type);
    if (has_second) units[1] = load_unit(from + columns[1] * entry_bytes, params.entry_type);
    const float scale = entry.scales ? entry.scales[index] : 1.f;

    const Row row = row_of(params, entry, index);
    const bool rotates = params.inv_freq && row.is_key && row.shift != 0;
    Turn turns[UNIT];
    if (rotates) turns_of(params, row.shift, columns, turns);
    float values[2][UNIT];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      decode(units[i], params.entry_type, values[i]);
#pragma unroll
      for (float& value : values[i]) value *= scale;
    }
    if (rotates) rotate(params, columns, turns, values);
    store_unit(row.address + columns[0] * cache_bytes, params.cache_type, values[0]);
    if (has_second) {
      store_unit(row.address + columns[1] * cache_bytes, params.cache_type, values[1]);
    }
  }
}

}  // namespace

void kv_move(const KvMoveParams& given, void* stream) {
  const runtime::DeviceGuard guard(given.device);
  KvMoveParams params = given;
  const bool is_copy = params.entry_type == params.cache_type && !params.inv_freq;
  const int64_t row_items = is_copy ? params.head_dim * bytes_of(params.cache_type) / COPY_BYTES
                                    : (params.head_dim / UNIT + 1) / 2;
  const int64_t items =
      int64_t{2} * params.num_layers * params.num_kv_heads * params.most_tokens * row_items;
  // One thread per item, as long as the device can hold all of them at once.
  const int64_t wanted = (items + THREADS - 1) / THREADS;
  const int64_t room = runtime::multiprocessors() * BLOCKS / params.num_entries;
  params.blocks_per_entry = std::max<int64_t>(1, std::min(wanted, room));
  const int blocks = params.num_entries * params.blocks_per_entry + (params.lengths ? 1 : 0);
  runtime::launch(!is_copy          ? kv_convert_kernel
                  : params.to_cache ? kv_copy_kernel<true>
                                    : kv_copy_kernel<false>,
                  blocks, THREADS, 0, stream, params);
}
