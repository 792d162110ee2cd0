// The extension module: what was built, and the ops of every room.
#include "bind.h"
#if defined(VISPEC_EMULATED)
#include "emu/emulator.h"
#else
#include "cpu/pool.h"
#include "cpu/rows.h"
#endif

#if defined(VISPEC_EMULATED)
#define VISPEC_MODULE _emulated
#else
#define VISPEC_MODULE _ext
#endif

namespace {

namespace py = pybind11;
using namespace vispec;

py::dict build_info() {
  py::dict info;
  info["version"] = VISPEC_VERSION;
#if defined(VISPEC_HAS_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["archs"] = VISPEC_ARCHS;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["openmp"] = false;
#if defined(VISPEC_EMULATED)
  info["emulated"] = true;
#else
  info["emulated"] = false;
  info["instructions"] = cpu::rows().name;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(VISPEC_MODULE, module) {
  using py::arg;
  module.doc() = "Native ops of vispec; call them through vispec.ops, which checks the arguments.";
  bindings::bind_round(module);
  bindings::bind_layer(module);
  bindings::bind_attention(module);
#if defined(VISPEC_HAS_KERNELS)
  bindings::bind_prefill(module);
#endif
  module.def("build_info", build_info);
#if !defined(VISPEC_EMULATED)
  module.def("set_num_threads", cpu::set_num_threads, arg("count"));
#else
  module.def("set_num_threads", [](int) {}, arg("count"));
  module.def("set_shared_limit", vs::emu::set_shared_limit, arg("bytes"));
#endif
}
