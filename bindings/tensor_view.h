// How a tensor crosses from Python: its address, sizes, strides (in elements), dtype and device are read from
// the object's own attributes. No torch header is needed, so one build serves every version of torch. This is
// the only file to change for another way across (DLPack, for example).
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace vispec::bindings {

namespace py = pybind11;

class TensorView {
 public:
  // Reads everything at once: nothing below touches Python, so that the views can be used without the GIL.
  TensorView(const char* name, const py::handle& tensor) : name_(name) {
    const py::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
    dim_ = shape.size();
    if (dim_ > sizes_.size()) fail("at most " + std::to_string(sizes_.size()) + " dimensions");
    for (size_t i = 0; i < dim_; ++i) {
      sizes_[i] = shape[i].cast<int64_t>();
      strides_[i] = strides[i].cast<int64_t>();
    }
    dtype_ = py::str(tensor.attr("dtype")).cast<std::string>();
    element_bytes_ = tensor.attr("element_size")().cast<int64_t>();
    cuda_ = tensor.attr("is_cuda").cast<bool>();
    address_ = tensor.attr("data_ptr")().cast<uintptr_t>();
  }

  int64_t size(size_t i) const {
    if (i >= dim_) fail("more dimensions");
    return sizes_[i];
  }
  int64_t stride(size_t i) const {
    if (i >= dim_) fail("more dimensions");
    return strides_[i];
  }
  int64_t element_bytes() const { return element_bytes_; }
  bool cuda() const { return cuda_; }
  void* data() const { return reinterpret_cast<void*>(address_); }

  int64_t* int64s() const { return static_cast<int64_t*>(checked("torch.int64")); }
  int32_t* int32s() const { return static_cast<int32_t*>(checked("torch.int32")); }
  int8_t* int8s() const { return static_cast<int8_t*>(checked("torch.int8")); }
  float* floats() const { return static_cast<float*>(checked("torch.float32")); }

  DType floating() const {
    if (dtype_ == "torch.float32") return DType::f32;
    if (dtype_ == "torch.float16") return DType::f16;
    if (dtype_ == "torch.bfloat16") return DType::bf16;
    fail("float32, float16 or bfloat16");
  }

 private:
  void* checked(const char* wanted) const {
    if (dtype_ != wanted) fail(wanted);
    return data();
  }

  [[noreturn]] void fail(const std::string& wanted) const {
    throw std::invalid_argument(std::string(name_) + " must have " + wanted + ", got " + dtype_ + " with " +
                                std::to_string(dim_) + " dimensions");
  }

  const char* name_;
  std::array<int64_t, 4> sizes_{}, strides_{};
  size_t dim_ = 0;
  int64_t element_bytes_ = 0;
  std::string dtype_;
  bool cuda_ = false;
  uintptr_t address_ = 0;
};

}  // namespace vispec::bindings
