// Launching a kernel: on a GPU, or under VISPEC_EMULATED in the emulator. rt.h includes it.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#if defined(VISPEC_EMULATED)
#include <tuple>

#include "emu/emulator.h"
#endif

namespace vs {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

#if defined(VISPEC_EMULATED)

template <typename... Params, typename... Args>
void launch(const char*, void (*kernel)(Params...), Dim3 grid, unsigned threads, size_t shared_bytes, void*,
            const Args&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> args;
  } call{kernel, std::tuple<Params...>(args...)};
  emu::run(
      {grid.x, grid.y, grid.z}, threads, shared_bytes,
      [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->args); }, &call);
}

inline size_t shared_limit() { return emu::shared_limit(); }

#else

// More than 48 KiB of shared memory must be asked for once per kernel; both calls are legal during capture.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), Dim3 grid, unsigned threads, size_t shared_bytes,
            void* stream, const Args&... args) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > (48u << 10)) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid.x, grid.y, grid.z);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, args...);
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(name) + ": launch failed: " + cudaGetErrorString(error));
  }
}

// Bytes of shared memory that a block may ask for on the current device.
inline size_t shared_limit() {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return static_cast<size_t>(bytes);
}

#endif

}  // namespace vs
