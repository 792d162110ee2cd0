// The ops of a prompt's prefill, one short block each: adaptor.
#include "bind.h"

#if defined(VISPEC_HAS_KERNELS)

namespace vispec::bindings {
namespace {

void adaptor(py::handle queries_, py::handle rows_, py::handle starts_, py::handle lengths, py::handle output,
             py::handle workspace, uintptr_t stream) {
  const TensorView queries("queries", queries_), rows("rows", rows_), starts("starts", starts_);
  Adaptor op{};
  op.queries = queries.data();
  op.rows = rows.data();
  op.query_row_stride = queries.stride(0);
  op.row_stride = rows.stride(0);
  op.starts = starts.int64s();
  op.lengths = TensorView("lengths", lengths).int64s();
  op.output = TensorView("output", output).data();
  op.dtype = rows.floating();
  op.N = rows.size(0);
  op.C = rows.size(1);
  op.R = queries.size(0);
  op.P = starts.size(0);
  op.workspace = TensorView("workspace", workspace).data();
  op.stream = stream_of(stream);
  run(cuda::adaptor, op);
}

}  // namespace

void bind_prefill(py::module_& module) {
  using py::arg;
  module.def("adaptor", adaptor, arg("queries"), arg("rows"), arg("starts"), arg("lengths"), py::kw_only(),
             arg("output"), arg("workspace"), arg("stream"));
  module.def("adaptor_workspace_bytes", cuda::adaptor_workspace_bytes, arg("N"), arg("C"), arg("R"),
             arg("P"));
}

}  // namespace vispec::bindings

#endif
