// The ops of a round, one short block each: grow_level, build_tree, accept, commit.
#include <vector>

#include "bind.h"

namespace vispec::bindings {
namespace {

void grow_level(py::handle logits_, py::handle frontier_scores, py::handle frontier,
                py::handle candidate_tokens_, py::handle candidate_scores, py::handle candidate_parents,
                int64_t offset, py::handle next_frontier_, py::handle next_rows, py::handle next_tokens,
                py::handle next_scores, py::handle head_tokens, int64_t slots, py::handle ancestors,
                py::handle next_ancestors, py::handle hidden_, py::handle next_hidden, py::handle arrivals,
                py::handle workspace, uintptr_t stream) {
  const TensorView logits("logits", logits_), candidate_tokens("candidate_tokens", candidate_tokens_);
  const TensorView next_frontier("next_frontier", next_frontier_);
  GrowLevel op{};
  op.logits = logits.data();
  op.logits_batch_stride = logits.stride(0);
  op.logits_row_stride = logits.stride(1);
  op.dtype = logits.floating();
  op.frontier_scores = TensorView("frontier_scores", frontier_scores).floats();
  op.frontier = TensorView("frontier", frontier).int64s();
  op.head_tokens = head_tokens.is_none() ? nullptr : TensorView("head_tokens", head_tokens).int64s();
  op.candidate_tokens = candidate_tokens.int64s();
  op.candidate_scores = TensorView("candidate_scores", candidate_scores).floats();
  op.candidate_parents = TensorView("candidate_parents", candidate_parents).int64s();
  op.next_frontier = next_frontier.int64s();
  op.next_rows = TensorView("next_rows", next_rows).int64s();
  op.next_tokens = TensorView("next_tokens", next_tokens).int64s();
  op.next_scores = TensorView("next_scores", next_scores).floats();
  op.ancestors = ancestors.is_none() ? nullptr : TensorView("ancestors", ancestors).int64s();
  op.next_ancestors =
      next_ancestors.is_none() ? nullptr : TensorView("next_ancestors", next_ancestors).int64s();
  op.slots = slots;
  if (!next_hidden.is_none()) {
    const TensorView hidden("hidden", hidden_);
    op.hidden = hidden.data();
    op.hidden_batch_stride = hidden.stride(0);
    op.hidden_row_stride = hidden.stride(1);
    op.next_hidden = TensorView("next_hidden", next_hidden).data();
    op.C = hidden.size(2);
    op.hidden_bytes = hidden.element_bytes();
  }
  op.B = logits.size(0);
  op.R = logits.size(1);
  op.V = logits.size(2);
  op.K = next_frontier.size(1);
  op.N = candidate_tokens.size(1);
  op.offset = offset;
  op.arrivals = reinterpret_cast<uint32_t*>(TensorView("arrivals", arrivals).int32s());
  op.workspace = workspace.is_none() ? nullptr : TensorView("workspace", workspace).data();
  op.stream = stream_of(stream);
  run(VISPEC_DISPATCH(grow_level, logits.cuda()), op);
}

int64_t grow_level_workspace_bytes(int64_t B, int64_t R, int64_t V, int64_t K, bool on_gpu) {
  return VISPEC_WORKSPACE(grow_level_workspace_bytes(B, R, V, K), on_gpu);
}

void build_tree(py::handle root_tokens, py::handle candidate_tokens, py::handle candidate_scores_,
                py::handle candidate_parents, py::handle tokens_, py::handle parents, py::handle depths,
                py::handle ancestors_, py::handle scores, uintptr_t stream) {
  const TensorView candidate_scores("candidate_scores", candidate_scores_), tokens("tokens", tokens_);
  const TensorView ancestors("ancestors", ancestors_);
  BuildTree op{};
  op.root_tokens = TensorView("root_tokens", root_tokens).int64s();
  op.candidate_tokens = TensorView("candidate_tokens", candidate_tokens).int64s();
  op.candidate_scores = candidate_scores.floats();
  op.candidate_parents = TensorView("candidate_parents", candidate_parents).int64s();
  op.tokens = tokens.int64s();
  op.parents = TensorView("parents", parents).int64s();
  op.depths = TensorView("depths", depths).int64s();
  op.ancestors = ancestors.int64s();
  op.scores = TensorView("scores", scores).floats();
  op.B = tokens.size(0);
  op.N = candidate_scores.size(1);
  op.T = tokens.size(1);
  op.W = ancestors.size(2);
  op.stream = stream_of(stream);
  run(VISPEC_DISPATCH(build_tree, tokens.cuda()), op);
}

void accept(py::handle logits_, py::handle tokens, py::handle parents, py::handle lengths,
            py::handle end_tokens_, py::handle remaining, py::handle finished, py::handle path_,
            py::handle emitted, py::handle counts, py::handle status, py::handle log_probabilities,
            py::object sampling, py::handle workspace, uintptr_t stream) {
  const TensorView logits("logits", logits_), end_tokens("end_tokens", end_tokens_), path("path", path_);
  Accept op{};
  op.logits = logits.data();
  op.logits_batch_stride = logits.stride(0);
  op.logits_row_stride = logits.stride(1);
  op.dtype = logits.floating();
  op.tokens = TensorView("tokens", tokens).int64s();
  op.parents = TensorView("parents", parents).int64s();
  op.lengths = TensorView("lengths", lengths).int64s();
  op.do_sample = sampling.is_none() ? 0 : 1;
  if (op.do_sample) {
    const py::tuple settings = sampling;
    op.temperature = TensorView("temperature", settings[0]).floats();
    op.top_k = TensorView("top_k", settings[1]).int64s();
    op.top_p = TensorView("top_p", settings[2]).floats();
    op.min_p = TensorView("min_p", settings[3]).floats();
    op.seeds = TensorView("seeds", settings[4]).int64s();
  }
  op.end_tokens = end_tokens.int64s();
  op.remaining = TensorView("remaining", remaining).int64s();
  op.finished = TensorView("finished", finished).int64s();
  op.path = path.int64s();
  op.emitted = TensorView("emitted", emitted).int64s();
  op.counts = TensorView("counts", counts).int64s();
  op.status = TensorView("status", status).int64s();
  if (!log_probabilities.is_none())
    op.log_probabilities = TensorView("log_probabilities", log_probabilities).floats();
  op.B = logits.size(0);
  op.T = logits.size(1);
  op.V = logits.size(2);
  op.D = path.size(1);
  op.E = end_tokens.size(0);
  op.workspace = workspace.is_none() ? nullptr : TensorView("workspace", workspace).data();
  op.stream = stream_of(stream);
  run(VISPEC_DISPATCH(accept, logits.cuda()), op);
}

int64_t accept_workspace_bytes(int64_t B, int64_t T, int64_t V, bool on_gpu) {
  return VISPEC_WORKSPACE(accept_workspace_bytes(B, T, V), on_gpu);
}

// `table` holds the addresses on the GPU; elsewhere they are taken from the tensors.
void commit(py::list tensors, py::handle path_, py::handle emitted, py::handle counts, py::handle starts_,
            py::handle table, py::object rows, py::object gather, uintptr_t stream) {
  const TensorView path("path", path_), starts("starts", starts_);
  std::vector<void*> addresses;
  Commit op{};
  op.path = path.int64s();
  op.emitted = TensorView("emitted", emitted).int64s();
  op.counts = TensorView("counts", counts).int64s();
  op.starts = starts.int64s();
  op.starts_stride = starts.stride(0);
  op.B = path.size(0);
  op.D = path.size(1);
  if (!tensors.empty()) {
    const TensorView first("tensors[0]", tensors[0]);
    if (first.cuda()) {
      op.tensors = static_cast<void* const*>(static_cast<void*>(TensorView("table", table).int64s()));
    } else {
      for (const py::handle& tensor : tensors)
        addresses.push_back(reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>()));
      op.tensors = addresses.data();
    }
    op.tensor_count = static_cast<int64_t>(tensors.size());
    op.element_bytes = first.element_bytes();
    op.batch_stride = first.stride(0);
    op.head_stride = first.stride(1);
    op.slot_stride = first.stride(2);
    op.G = first.size(1);
    op.L = first.size(2);
    op.head = first.size(3);
  }
  if (!rows.is_none()) {
    const py::tuple state = rows;
    op.lengths = TensorView("lengths", state[0]).int64s();
    op.positions = TensorView("positions", state[1]).int64s();
    op.remaining = TensorView("remaining", state[2]).int64s();
    op.roots = TensorView("roots", state[3]).int64s();
  }
  if (!gather.is_none()) {
    const py::tuple parts = gather;
    const TensorView features("features", parts[0]);
    op.features = features.data();
    op.features_batch_stride = features.stride(0);
    op.features_row_stride = features.stride(1);
    op.feature_bytes = features.element_bytes();
    op.T = features.size(1);
    op.C = features.size(2);
    op.picked = TensorView("picked", parts[1]).data();
    op.tokens = TensorView("tokens", parts[2]).int64s();
  }
  op.stream = stream_of(stream);
  run(VISPEC_DISPATCH(commit, path.cuda()), op);
}

}  // namespace

void bind_round(py::module_& module) {
  using py::arg;
  module.def("grow_level", grow_level, arg("logits"), arg("frontier_scores"), arg("frontier"), py::kw_only(),
             arg("candidate_tokens"), arg("candidate_scores"), arg("candidate_parents"), arg("offset"),
             arg("next_frontier"), arg("next_rows"), arg("next_tokens"), arg("next_scores"),
             arg("head_tokens"), arg("slots"), arg("ancestors"), arg("next_ancestors"), arg("hidden"),
             arg("next_hidden"), arg("arrivals"), arg("workspace"), arg("stream"));
  module.def("grow_level_workspace_bytes", grow_level_workspace_bytes, arg("B"), arg("R"), arg("V"), arg("K"),
             arg("on_gpu"));
  module.def("build_tree", build_tree, arg("root_tokens"), arg("candidate_tokens"), arg("candidate_scores"),
             arg("candidate_parents"), py::kw_only(), arg("tokens"), arg("parents"), arg("depths"),
             arg("ancestors"), arg("scores"), arg("stream"));
  module.def("accept", accept, arg("logits"), arg("tokens"), arg("parents"), arg("lengths"), py::kw_only(),
             arg("end_tokens"), arg("remaining"), arg("finished"), arg("path"), arg("emitted"), arg("counts"),
             arg("status"), arg("log_probabilities"), arg("sampling"), arg("workspace"), arg("stream"));
  module.def("accept_workspace_bytes", accept_workspace_bytes, arg("B"), arg("T"), arg("V"), arg("on_gpu"));
  module.def("commit", commit, arg("tensors"), arg("path"), arg("emitted"), arg("counts"), arg("starts"),
             py::kw_only(), arg("table"), arg("rows"), arg("gather"), arg("stream"));
}

}  // namespace vispec::bindings
