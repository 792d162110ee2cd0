// Attention over the cache, one short block an op: rope_append, tree_attention, path_attention. A CPU leaves
// tree_attention to torch, so it is bound only where there are kernels.
#include "bind.h"

namespace vispec::bindings {
namespace {

// A dimension of one element has whatever stride PyTorch left there; nothing steps along it.
int64_t step(const TensorView& tensor, size_t i) { return tensor.size(i) > 1 ? tensor.stride(i) : 0; }

// The Python tuple of vispec.ops.Tail, in its order.
Tail tail_of(const py::tuple& tail) {
  const auto data = [&](const char* name, size_t i) {
    return tail[i].is_none() ? nullptr : TensorView(name, tail[i]).data();
  };
  const TensorView keys("tail.keys", tail[0]), cosines("tail.cosines", tail[2]);
  Tail op{};
  op.keys = keys.data();
  op.values = data("tail.values", 1);
  op.batch_stride = step(keys, 0);
  op.head_stride = step(keys, 1);
  op.row_stride = step(keys, 2);
  op.cosines = cosines.data();
  op.sines = data("tail.sines", 3);
  op.rotary = cosines.size(2);
  op.query_bias = data("tail.query_bias", 4);
  op.key_bias = data("tail.key_bias", 5);
  op.value_bias = data("tail.value_bias", 6);
  return op;
}

// The tensors that both ops take, in their params struct.
template <class Params>
Params shared(const TensorView& queries, const TensorView& keys, const py::handle& values,
              const TensorView& output, const py::handle& lengths, uintptr_t stream) {
  Params op{};
  op.queries = queries.data();
  op.keys = keys.data();
  op.values = TensorView("values", values).data();
  op.output = output.data();
  op.query_batch_stride = step(queries, 0);
  op.query_head_stride = step(queries, 1);
  op.query_row_stride = step(queries, 2);
  op.output_batch_stride = step(output, 0);
  op.output_head_stride = step(output, 1);
  op.output_row_stride = step(output, 2);
  op.cache_batch_stride = step(keys, 0);
  op.cache_head_stride = step(keys, 1);
  op.cache_slot_stride = step(keys, 2);
  op.dtype = queries.floating();
  op.lengths = TensorView("lengths", lengths).int64s();
  op.B = queries.size(0);
  op.H = queries.size(1);
  op.G = keys.size(1);
  op.T = queries.size(2);
  op.L = keys.size(2);
  op.head = queries.size(3);
  op.stream = stream_of(stream);
  return op;
}

void rope_append(py::handle queries_, py::tuple tail, py::handle keys_, py::handle values, py::handle lengths,
                 py::handle output_, int64_t offset, uintptr_t stream) {
  const TensorView queries("queries", queries_), keys("keys", keys_), output("output", output_);
  RopeAppend op = shared<RopeAppend>(queries, keys, values, output, lengths, stream);
  op.tail = tail_of(tail);
  op.offset = offset;
  run(VISPEC_DISPATCH(rope_append, queries.cuda()), op);
}

void path_attention(py::handle queries_, py::handle keys_, py::handle values, py::handle ancestors,
                    py::handle lengths, py::handle output_, float scale, py::handle workspace,
                    uintptr_t stream) {
  const TensorView queries("queries", queries_), keys("keys", keys_), output("output", output_);
  TreeAttention op = shared<TreeAttention>(queries, keys, values, output, lengths, stream);
  op.ancestors = TensorView("ancestors", ancestors).int64s();
  op.scale = scale;
  op.S = op.T;
  op.W = 1;
  op.workspace = workspace.is_none() ? nullptr : TensorView("workspace", workspace).data();
  run(VISPEC_DISPATCH(path_attention, queries.cuda()), op);
}

TreeAttention sizes(int64_t B, int64_t H, int64_t G, int64_t T, int64_t L, int64_t head) {
  TreeAttention op{};
  op.B = B, op.H = H, op.G = G, op.T = T, op.L = L, op.head = head;
  return op;
}

int64_t path_attention_workspace_bytes(int64_t B, int64_t H, int64_t G, int64_t T, int64_t L, int64_t head,
                                       bool on_gpu) {
  return VISPEC_WORKSPACE(path_attention_workspace_bytes(sizes(B, H, G, T, L, head)), on_gpu);
}

#if defined(VISPEC_HAS_KERNELS)
void tree_attention(py::handle queries_, py::handle keys_, py::handle values, py::handle ancestors_,
                    py::handle lengths, py::handle output_, py::object tail, int64_t slots, float scale,
                    py::handle workspace, uintptr_t stream) {
  const TensorView queries("queries", queries_), keys("keys", keys_), output("output", output_);
  const TensorView ancestors("ancestors", ancestors_);
  TreeAttention op = shared<TreeAttention>(queries, keys, values, output, lengths, stream);
  if (!tail.is_none()) op.tail = tail_of(tail);
  op.ancestors = ancestors.int64s();
  op.scale = scale;
  op.S = slots;
  op.W = ancestors.size(2);
  op.workspace = TensorView("workspace", workspace).data();
  run(cuda::tree_attention, op);
}

int64_t tree_attention_workspace_bytes(int64_t B, int64_t H, int64_t G, int64_t T, int64_t L, int64_t head) {
  return cuda::tree_attention_workspace_bytes(sizes(B, H, G, T, L, head));
}
#endif

}  // namespace

void bind_attention(py::module_& module) {
  using py::arg;
  module.def("rope_append", rope_append, arg("queries"), arg("tail"), arg("keys"), arg("values"),
             arg("lengths"), py::kw_only(), arg("output"), arg("offset"), arg("stream"));
  module.def("path_attention", path_attention, arg("queries"), arg("keys"), arg("values"), arg("ancestors"),
             arg("lengths"), py::kw_only(), arg("output"), arg("scale"), arg("workspace"), arg("stream"));
  module.def("path_attention_workspace_bytes", path_attention_workspace_bytes, py::kw_only(), arg("B"),
             arg("H"), arg("G"), arg("T"), arg("L"), arg("head"), arg("on_gpu"));
#if defined(VISPEC_HAS_KERNELS)
  module.def("tree_attention", tree_attention, arg("queries"), arg("keys"), arg("values"), arg("ancestors"),
             arg("lengths"), py::kw_only(), arg("output"), arg("tail"), arg("slots"), arg("scale"),
             arg("workspace"), arg("stream"));
  module.def("tree_attention_workspace_bytes", tree_attention_workspace_bytes, py::kw_only(), arg("B"),
             arg("H"), arg("G"), arg("T"), arg("L"), arg("head"));
#endif
}

}  // namespace vispec::bindings
