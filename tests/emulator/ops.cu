// The ops' own launches on small inputs, for ThreadSanitizer: every kernel and every way through it, no
// Python.
#include <cmath>
#include <vector>

#include "harness.h"
#include "ops.h"

namespace {

using test::Buffer;
using vispec::DType;

unsigned state = 1;
unsigned next() { return state = state * 1664525u + 1013904223u; }
float logit(int kind) {  // spread, tied in steps of 1/4, or all equal
  const float x = static_cast<float>(next() >> 8) * 0x1p-24f * 8.0f - 4.0f;
  return kind == 0 ? x : kind == 1 ? std::floor(x * 4.0f) / 4.0f : 1.0f;
}

// [rows, V] logits of a dtype with `gap` unused elements before the first, so that vectors start inside a
// row.
struct Logits {
  Logits(int64_t rows, int64_t V, DType dtype, int kind) : dtype(dtype), stride(V + 3) {
    const size_t element = dtype == DType::f32 ? 4 : 2;
    bytes.resize(static_cast<size_t>(rows * stride + 1) * element);
    for (int64_t i = 0; i < rows * stride + 1; ++i) {
      const float x = logit(kind);
      if (dtype == DType::f32) {
        std::memcpy(&bytes[static_cast<size_t>(i) * 4], &x, 4);
      } else {
        const uint16_t bits =
            dtype == DType::f16 ? vs::from_float<vs::Half>(x).bits : vs::from_float<vs::BFloat16>(x).bits;
        std::memcpy(&bytes[static_cast<size_t>(i) * 2], &bits, 2);
      }
    }
    data = bytes.data() + element;
  }
  DType dtype;
  int64_t stride;
  std::vector<unsigned char> bytes;
  void* data;
};

void grow(DType dtype, int kind, int64_t V) {
  constexpr int64_t B = 2, R = 2, K = 4, N = R * K + 1, C = 40, slots = 62;
  Logits logits(B * R, V, dtype, kind);
  Buffer<float> frontier_scores(B * R, -1.0f), scores(B * N), next_scores(B * K);
  Buffer<int64_t> frontier(B * R, 3), tokens(B * N), parents(B * N), next_frontier(B * K), rows(B * K),
      next(B * K);
  vispec::GrowLevel p{};
  p.logits = logits.data;
  p.logits_batch_stride = R * logits.stride;
  p.logits_row_stride = logits.stride;
  p.dtype = dtype;
  p.frontier_scores = frontier_scores.get();
  p.frontier = frontier.get();
  p.candidate_tokens = tokens.get();
  p.candidate_scores = scores.get();
  p.candidate_parents = parents.get();
  p.next_frontier = next_frontier.get();
  p.next_rows = rows.get();
  p.next_tokens = next.get();
  p.next_scores = next_scores.get();
  p.B = B, p.R = R, p.V = V, p.K = K, p.N = N, p.offset = 1;
  Buffer<int64_t> ancestors(B * R, 5), next_ancestors(B * K * 2);
  Buffer<uint16_t> hidden(B * R * C), next_hidden(B * K * C);
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = static_cast<uint16_t>(i / C % R);
  p.ancestors = ancestors.get(), p.next_ancestors = next_ancestors.get(), p.slots = slots;
  p.hidden = hidden.get(), p.next_hidden = next_hidden.get();
  p.hidden_batch_stride = R * C, p.hidden_row_stride = C, p.hidden_bytes = 2, p.C = C;
  Buffer<uint32_t> arrivals(B);
  p.arrivals = arrivals.get();
  Buffer<uint64_t> workspace(static_cast<size_t>(vispec::cuda::grow_level_workspace_bytes(B, R, V, K)) / 8,
                             ~uint64_t{0});
  p.workspace = workspace.get();
  for (int call = 0; call < 2; ++call) {  // the second finds the counters as the first left them
    vispec::cuda::grow_level(p);
    for (size_t i = 0; i < B * K; ++i) {
      const size_t k = i % K, own = slots + k, word = 2 * i + own / 64, other = 2 * i + 1 - own / 64;
      const int64_t bit = static_cast<int64_t>(uint64_t{1} << own % 64);
      EXPECT(k == 0 || next_scores[i] <= next_scores[i - 1], static_cast<long long>(i));
      EXPECT(next_ancestors[word] == (own < 64 ? bit | 5 : bit), static_cast<long long>(i));
      EXPECT(next_ancestors[other] == (own < 64 ? 0 : 5), static_cast<long long>(i));
      for (size_t c = 0; c < C; ++c)
        EXPECT(next_hidden[i * C + c] == static_cast<uint16_t>(rows[i]), static_cast<long long>(i));
    }
    for (size_t b = 0; b < B; ++b) EXPECT(arrivals[b] == 0, static_cast<long long>(b));
  }
}

void build() {
  constexpr int64_t B = 2, N = 70, T = 66, W = 2;
  Buffer<int64_t> root(B, 9), tokens(B * N), parents(B * N), out(B * T), above(B * T), depths(B * T),
      bits(B * T * W);
  Buffer<float> scores(B * N), out_scores(B * T);
  for (int64_t i = 0; i < B * N; ++i) {
    const int64_t c = i % N;
    parents[static_cast<size_t>(i)] = c < 8 ? -1 : c / 2 - 4;
    scores[static_cast<size_t>(i)] = -static_cast<float>(c / 8);
  }
  vispec::BuildTree p{};
  p.root_tokens = root.get(), p.candidate_tokens = tokens.get();
  p.candidate_scores = scores.get(), p.candidate_parents = parents.get();
  p.tokens = out.get(), p.parents = above.get(), p.depths = depths.get(), p.ancestors = bits.get();
  p.scores = out_scores.get();
  p.B = B, p.N = N, p.T = T, p.W = W;
  vispec::cuda::build_tree(p);
  for (size_t t = 1; t < T; ++t)
    EXPECT(depths[t] == depths[static_cast<size_t>(above[t])] + 1, static_cast<long long>(t));
}

void accept(DType dtype, int kind, int64_t V, bool sample, int64_t top_k, float top_p) {
  constexpr int64_t B = 1, T = 2, D = 2, E = 1;
  Logits logits(B * T, V, dtype, kind);
  Buffer<int64_t> tokens(B * T), parents(B * T), lengths(B, 7), ks(B, top_k), seeds(B, 5), ends(E, -5),
      remaining(B, 9);
  Buffer<int64_t> finished(B), path(B * D), emitted(B * D), counts(B), status(B);
  Buffer<float> temperature(B, 0.7f), ps(B, top_p), least(B, 0.01f), scores(B * D, 1.0f);
  for (size_t i = 0; i < B * T; ++i) parents[i] = static_cast<int64_t>(i % T) - 1;
  Buffer<uint64_t> workspace(static_cast<size_t>(vispec::cuda::accept_workspace_bytes(B, T, V)) / 8,
                             ~uint64_t{0});
  vispec::Accept p{};
  p.logits = logits.data;
  p.logits_batch_stride = T * logits.stride;
  p.logits_row_stride = logits.stride;
  p.dtype = dtype;
  p.tokens = tokens.get(), p.parents = parents.get(), p.lengths = lengths.get();
  p.do_sample = sample;
  p.temperature = temperature.get(), p.top_k = ks.get(), p.top_p = ps.get(), p.min_p = least.get();
  p.seeds = seeds.get(), p.end_tokens = ends.get(), p.remaining = remaining.get(),
  p.finished = finished.get();
  p.path = path.get(), p.emitted = emitted.get(), p.counts = counts.get(), p.status = status.get();
  p.B = B, p.T = T, p.V = V, p.D = D, p.E = E;
  p.log_probabilities = scores.get();
  p.workspace = workspace.get();
  vispec::cuda::accept(p);
  for (size_t b = 0; b < B; ++b)
    EXPECT(counts[b] >= 1 && counts[b] <= D && status[b] == 0 && scores[b * D] <= 0.0f,
           static_cast<long long>(b));
}

void commit() {
  constexpr int64_t B = 2, G = 2, L = 12, head = 24, D = 10, count = 2;
  Buffer<uint16_t> first(B * G * L * head), second(B * G * L * head);
  Buffer<void*> tensors(count);
  tensors[0] = first.get(), tensors[1] = second.get();
  for (size_t i = 0; i < first.size(); ++i) first[i] = second[i] = static_cast<uint16_t>(i / head % L);
  constexpr int64_t T = 10, C = 3000;
  Buffer<int64_t> path(B * D, -1), emitted(B * D, 5), counts(B, 9), starts(B, 2);
  Buffer<int64_t> lengths(B, 2), positions(B, 4), remaining(B, 20), roots(B), tokens(B * D, -1);
  Buffer<float> features(B * T * C, 3.0f), picked(B * D * C, -1.0f);
  for (size_t j = 0; j < 9; ++j) path[j] = path[D + j] = static_cast<int64_t>(j + 1);
  vispec::Commit p{};
  p.tensors = tensors.get();
  p.tensor_count = count, p.element_bytes = 2;
  p.batch_stride = G * L * head, p.head_stride = L * head, p.slot_stride = head;
  p.path = path.get(), p.emitted = emitted.get(), p.counts = counts.get();
  p.starts = starts.get(), p.starts_stride = 1;
  p.lengths = lengths.get(), p.positions = positions.get();
  p.remaining = remaining.get(), p.roots = roots.get();
  p.features = features.get(), p.picked = picked.get(), p.tokens = tokens.get();
  p.features_batch_stride = T * C, p.features_row_stride = C, p.feature_bytes = 4;
  p.B = B, p.G = G, p.L = L, p.head = head, p.D = D, p.T = T, p.C = C;
  vispec::cuda::commit(p);
  for (size_t b = 0; b < B; ++b)
    EXPECT(lengths[b] == 11 && positions[b] == 13 && remaining[b] == 11 && roots[b] == 5,
           static_cast<long long>(b));
  for (size_t i = 0; i < picked.size(); ++i) {
    const bool there = i / C % D < 9;
    EXPECT(picked[i] == (there ? 3.0f : 0.0f) && tokens[i / C] == (there ? 5 : 0), static_cast<long long>(i));
  }
  for (size_t i = 0; i < first.size(); ++i) {
    const size_t slot = i / head % L;
    EXPECT(second[i] == (slot >= 2 && slot < 11 ? slot + 1 : slot), static_cast<long long>(i));
  }
}

// Runs of keys, and a tail that shares a tile with the committed slots; then the same with the tail appended
// on the way. With 9 nodes there is a second row block, with one the warps share the keys of a tile.
void attend(size_t T, bool append) {
  constexpr size_t B = 1, H = 8, G = 1, L = 300, W = 1, head = 64;
  Buffer<uint16_t> queries(B * H * T * head, 0x3F80), keys(B * G * L * head, 0x3E80),
      values(keys.size(), 0x4000);
  Buffer<uint16_t> output(queries.size()), new_values(B * G * T * head, 0x4000);
  Buffer<uint16_t> cosines(B * T * head, 0x3F80), sines(cosines.size()), bias(H * head);
  Buffer<int64_t> lengths(B, 280), ancestors(B * T, 1);
  vispec::TreeAttention p{};
  if (append) {
    for (size_t i = 280 * head; i < (280 + T) * head; ++i)
      keys[i] = values[i] = 0x7FFF;  // NaN until appended
    p.tail.keys = queries.get(), p.tail.values = new_values.get();
    p.tail.batch_stride = p.tail.head_stride = T * head, p.tail.row_stride = head;
    p.tail.cosines = cosines.get(), p.tail.sines = sines.get(), p.tail.rotary = head;
    p.tail.query_bias = p.tail.key_bias = p.tail.value_bias = bias.get();
  }
  p.queries = queries.get(), p.keys = keys.get(), p.values = values.get(), p.output = output.get();
  p.query_batch_stride = p.output_batch_stride = static_cast<int64_t>(H * T * head);
  p.query_head_stride = p.output_head_stride = T * head;
  p.query_row_stride = p.output_row_stride = head;
  p.cache_batch_stride = p.cache_head_stride = L * head, p.cache_slot_stride = head;
  p.dtype = DType::bf16, p.lengths = lengths.get(), p.ancestors = ancestors.get(), p.scale = 0.125f;
  p.B = B, p.H = H, p.G = G, p.T = T, p.S = T, p.L = L, p.W = W, p.head = head;
  Buffer<float> workspace(static_cast<size_t>(vispec::cuda::tree_attention_workspace_bytes(p)) / 4);
  p.workspace = workspace.get();
  vispec::cuda::tree_attention(p);
  for (size_t i = 0; i < output.size(); ++i)
    EXPECT(output[i] == 0x4000, static_cast<long long>(i));  // all values: 2
  for (size_t i = 0; append && i < T * head; ++i)
    EXPECT(keys[280 * head + i] == 0x3F80 && values[280 * head + i] == 0x4000, static_cast<long long>(i));
}

// In place, in a block of several warps and in one warp; all values 2: normalised they are 1.
void normalise(int64_t C) {
  constexpr int64_t M = 2;
  Buffer<uint16_t> hidden(static_cast<size_t>(M * C), 0x3F80), weight(static_cast<size_t>(C), 0x4040),
      residual(static_cast<size_t>(M * C), 0x3F80);
  vispec::RmsNorm p{};
  p.hidden = p.output = hidden.get(), p.weight = weight.get(), p.residual = residual.get();
  p.hidden_stride = p.residual_stride = p.output_stride = C;
  p.dtype = DType::bf16, p.parity = 1, p.M = M, p.C = C;
  vispec::cuda::rms_norm(p);
  for (size_t i = 0; i < hidden.size(); ++i)
    EXPECT(residual[i] == 0x4000 && hidden[i] == 0x4040, static_cast<long long>(i));
}

void activate() {
  constexpr int64_t M = 2, I = 20;
  Buffer<float> gate(M * I, 0.0f), up(M * I, 3.0f);
  vispec::SiluMul p{};
  p.gate = gate.get(), p.up = p.output = up.get();
  p.gate_stride = p.up_stride = p.output_stride = I;
  p.dtype = DType::f32, p.M = M, p.I = I;
  vispec::cuda::silu_mul(p);
  for (size_t i = 0; i < up.size(); ++i) EXPECT(up[i] == 0.0f, static_cast<long long>(i));
}

// More columns than a step a warp, not whole steps of them; a second block of outputs, and of rows with 33.
void multiply(DType dtype, int64_t M) {
  constexpr int64_t N = 33, C = 592;
  const size_t element = dtype == DType::f32 ? 4 : 2;
  Buffer<float> rows(static_cast<size_t>(M * C)), output(static_cast<size_t>(M * N)), scales(N, 0.5f);
  Buffer<int8_t> weight(N * C, -2);
  const auto place = [&](Buffer<float>& values, size_t i) {
    return reinterpret_cast<char*>(values.get()) + i * element;
  };
  const uint32_t one = dtype == DType::f32 ? 0x3F800000u : dtype == DType::f16 ? 0x3C00u : 0x3F80u;
  for (size_t i = 0; i < rows.size(); ++i) std::memcpy(place(rows, i), &one, element);
  vispec::Int8Linear p{};
  p.rows = rows.get(), p.weight = weight.get(), p.scales = scales.get(), p.output = output.get();
  p.row_stride = C, p.output_stride = N;
  p.dtype = dtype, p.M = M, p.N = N, p.C = C;
  vispec::cuda::int8_linear(p);
  const uint32_t sum = dtype == DType::f32 ? 0xC4140000u : dtype == DType::f16 ? 0xE0A0u : 0xC414u;  // -592
  for (size_t i = 0; i < output.size(); ++i)
    EXPECT(std::memcmp(place(output, i), &sum, element) == 0, static_cast<long long>(i));
}

// Overlapping spans over two blocks of columns: each worker's run has more stages than the pipeline holds.
void compress() {
  constexpr int64_t N = 145, C = 264, R = 9, P = 3;
  Buffer<uint16_t> queries(R * C), rows(N * C, 0x7FFF), output(P * R * C);
  for (size_t i = 2 * C; i < 141 * C; ++i) rows[i] = 0x4000;
  Buffer<int64_t> starts(P), lengths(P);
  starts[0] = 2, starts[1] = 2, starts[2] = 9;
  lengths[0] = 139, lengths[1] = 130, lengths[2] = 132;
  vispec::Adaptor p{};
  p.queries = queries.get(), p.rows = rows.get(), p.output = output.get();
  p.query_row_stride = p.row_stride = C;
  p.starts = starts.get(), p.lengths = lengths.get(), p.dtype = DType::bf16;
  p.N = N, p.C = C, p.R = R, p.P = P;
  Buffer<uint32_t> workspace(static_cast<size_t>(vispec::cuda::adaptor_workspace_bytes(N, C, R, P)) / 4,
                             ~uint32_t{0});
  p.workspace = workspace.get();
  vispec::cuda::adaptor(p);
  for (size_t i = 0; i < output.size(); ++i)
    EXPECT(output[i] == 0x4000, static_cast<long long>(i));  // all rows of a span: 2
}

void rest() {
  activate();
  multiply(DType::f32, 2);
  multiply(DType::f16, 9);
  multiply(DType::bf16, 33);
  for (size_t T : {9, 1}) {
    attend(T, false);
    attend(T, true);
  }
  compress();
  build();
  commit();
  normalise(40);
  normalise(1100);
  accept(DType::bf16, 0, 4200, false, 0, 1.0f);
  accept(DType::f16, 0, 60, true, 0, 1.0f);
  accept(DType::bf16, 1, 500, true, 20, 0.8f);
  accept(DType::f32, 0, 4200, true, 5, 1.0f);
  accept(DType::f32, 0, 900, true, 0, 0.1f);     // listed, for its mass
  accept(DType::bf16, 1, 2500, true, 20, 0.8f);  // not listed: more wanted than warps
  accept(DType::f32, 2, 2500, true, 0, 0.5f);    // nor this: one bin, more than any list holds
}

}  // namespace

// Usage: ops [grow]: all of them, or grow_level alone.
int main(int argc, char**) {
  grow(DType::bf16, 0, 300);
  grow(DType::f32, 2, 90);
  grow(DType::f16, 1, 9000);  // two chunks
  if (argc == 1) rest();
  std::printf("%d failures\n", test::failures);
  return test::failures == 0 ? 0 : 1;
}
