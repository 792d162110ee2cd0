// What every binding shares: Python objects in, the params struct of csrc/ops.h out, the backend of the
// device called without the GIL. Shapes are checked in vispec/ops, where an error can say more. Everything
// here is compiled twice: as `_ext`, and with VISPEC_EMULATED as `_emulated`, where CPU tensors go to the
// CUDA kernels run by the emulator.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "ops.h"
#include "tensor_view.h"

namespace vispec::bindings {

namespace py = pybind11;

// Ops that the CPU leaves to torch are bound where there are kernels, and call them directly.
#if defined(VISPEC_EMULATED) || defined(VISPEC_HAS_CUDA)
#define VISPEC_HAS_KERNELS
#endif

// The CPU's or the GPU's version of an op, and the bytes of workspace that it needs: the CPU's need none.
#if defined(VISPEC_EMULATED)
#define VISPEC_DISPATCH(op, on_gpu) cuda::op
#define VISPEC_WORKSPACE(bytes, on_gpu) ((void)(on_gpu), cuda::bytes)
#elif defined(VISPEC_HAS_CUDA)
#define VISPEC_DISPATCH(op, on_gpu) ((on_gpu) ? cuda::op : cpu::op)
#define VISPEC_WORKSPACE(bytes, on_gpu) ((on_gpu) ? cuda::bytes : 0)
#else
#define VISPEC_DISPATCH(op, on_gpu) (::vispec::bindings::require_cpu(on_gpu), cpu::op)
#define VISPEC_WORKSPACE(bytes, on_gpu) \
  (::vispec::bindings::require_cpu(on_gpu), (void)sizeof(cuda::bytes), int64_t{0})
inline void require_cpu(bool on_gpu) {
  if (on_gpu) throw std::runtime_error("vispec: this build has no CUDA kernels");
}
#endif

template <class Params>
void run(void (*function)(const Params&), const Params& params) {
  py::gil_scoped_release release;
  function(params);
}

inline void* stream_of(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

// One function a room of ops; each defines its ops in the module.
void bind_round(py::module_& module);
void bind_layer(py::module_& module);
void bind_attention(py::module_& module);
#if defined(VISPEC_HAS_KERNELS)
void bind_prefill(py::module_& module);
#endif

}  // namespace vispec::bindings
