// Attention over the cache, one short block an op.
#include "bind.h"

#if defined(VISPEC_HAS_KERNELS)
namespace vispec::bindings {
namespace {

void tree_attention(py::handle queries_, py::handle keys_, py::handle values, py::handle ancestors_,
                    py::handle lengths, py::handle output_, int64_t slots, float scale, py::handle workspace,
                    uintptr_t stream) {
  const TensorView queries("queries", queries_), keys("keys", keys_), output("output", output_);
  const TensorView ancestors("ancestors", ancestors_);
  TreeAttention op{};
  op.queries = queries.data();
  op.keys = keys.data();
  op.values = TensorView("values", values).data();
  op.output = output.data();
  op.query_batch_stride = queries.stride(0);
  op.query_head_stride = queries.stride(1);
  op.query_row_stride = queries.stride(2);
  op.cache_batch_stride = keys.stride(0);
  op.cache_head_stride = keys.stride(1);
  op.cache_slot_stride = keys.stride(2);
  op.output_batch_stride = output.stride(0);
  op.output_head_stride = output.stride(1);
  op.output_row_stride = output.stride(2);
  op.dtype = queries.floating();
  op.lengths = TensorView("lengths", lengths).int64s();
  op.ancestors = ancestors.int64s();
  op.scale = scale;
  op.B = queries.size(0);
  op.H = queries.size(1);
  op.G = keys.size(1);
  op.T = queries.size(2);
  op.S = slots;
  op.L = keys.size(2);
  op.W = ancestors.size(2);
  op.head = queries.size(3);
  op.workspace = TensorView("workspace", workspace).data();
  op.stream = stream_of(stream);
  run(cuda::tree_attention, op);
}

int64_t tree_attention_workspace_bytes(int64_t B, int64_t H, int64_t G, int64_t T, int64_t L, int64_t head) {
  TreeAttention op{};
  op.B = B, op.H = H, op.G = G, op.T = T, op.L = L, op.head = head;
  return cuda::tree_attention_workspace_bytes(op);
}

}  // namespace

void bind_attention(py::module_& module) {
  using py::arg;
  module.def("tree_attention", tree_attention, arg("queries"), arg("keys"), arg("values"), arg("ancestors"),
             arg("lengths"), py::kw_only(), arg("output"), arg("slots"), arg("scale"), arg("workspace"),
             arg("stream"));
  module.def("tree_attention_workspace_bytes", tree_attention_workspace_bytes, py::kw_only(), arg("B"),
             arg("H"), arg("G"), arg("T"), arg("L"), arg("head"));
}

}  // namespace vispec::bindings
#endif
