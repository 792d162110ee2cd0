// For test programs that run the same kernels under the emulator (g++) and on a GPU (nvcc).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "rt.h"

namespace test {

// An array that host and kernels see; its ends are exact, for AddressSanitizer and compute-sanitizer.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count, T value = T{}) : count_(count) {
#if defined(VISPEC_EMULATED)
    data_ = static_cast<T*>(std::malloc(count * sizeof(T)));
#else
    if (cudaMallocManaged(&data_, count * sizeof(T)) != cudaSuccess) std::abort();
#endif
    for (size_t i = 0; i < count; ++i) data_[i] = value;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#if defined(VISPEC_EMULATED)
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }
  T* get() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

inline void wait() {
#if !defined(VISPEC_EMULATED)
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) {
    std::fprintf(stderr, "kernel failed: %s\n", cudaGetErrorString(error));
    std::exit(1);
  }
#endif
}

template <typename... Params, typename... Args>
void run(void (*kernel)(Params...), vs::Dim3 grid, unsigned threads, size_t shared_bytes,
         const Args&... args) {
  vs::launch("test", kernel, grid, threads, shared_bytes, nullptr, args...);
  wait();
}

inline int failures = 0;

inline void expect(bool good, const char* what, long long where, const char* file, int line) {
  if (good) return;
  ++failures;
  std::fprintf(stderr, "%s:%d: %s does not hold at %lld\n", file, line, what, where);
}

}  // namespace test

#define EXPECT(condition, where) ::test::expect((condition), #condition, (where), __FILE__, __LINE__)
