// Wrappers of the CUDA calls that the host makes: devices, launches, tensor maps. Every call is checked;
// a failure throws, with the name of the call that failed.
#pragma once

#include "ptx.cuh"

#ifdef VOCO_CUDA_ON_CPU
#include "runtime_on_cpu.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace runtime {

using Stream = void*;  // a cudaStream_t

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ": " +
                             cudaGetErrorString(status));
  }
}

// Makes a device current for the guard's lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// The number of multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

inline void set_zero(void* pointer, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(pointer, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

// Launches a kernel that takes one argument, a struct of parameters.
template <typename Params>
void launch(void (*kernel)(Params), int blocks, int threads, int shared_bytes, Stream stream,
            const Params& params) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute");
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), arguments,
                         shared_bytes, static_cast<cudaStream_t>(stream)),
        "cudaLaunchKernel");
}

// A tensor map for 16-bit elements and boxes whose 128-byte rows are swizzled. Dimensions are ordered
// from the innermost (contiguous) one outwards; strides are those of the other four, in bytes.
inline ptx::TensorMap tensor_map(const void* pointer, bool bf16, const uint64_t (&sizes)[5],
                                 const uint64_t (&strides)[4], const uint32_t (&box)[5]) {
  // Looked up through the runtime, so that the extension need not link against the driver.
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                           &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("cuTensorMapEncodeTiled: not in this driver; CUDA 12.0 or later has it");
    }
    return reinterpret_cast<Encode>(function);
  }();
  const cuuint64_t map_sizes[5] = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  const cuuint64_t map_strides[4] = {strides[0], strides[1], strides[2], strides[3]};
  const cuuint32_t map_box[5] = {box[0], box[1], box[2], box[3], box[4]};
  const cuuint32_t every_element[5] = {1, 1, 1, 1, 1};
  ptx::TensorMap map;
  const CUresult status =
      encode(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5,
             const_cast<void*>(pointer), map_sizes, map_strides, map_box, every_element,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: CUresult " + std::to_string(status));
  }
  return map;
}

}  // namespace runtime

#endif
