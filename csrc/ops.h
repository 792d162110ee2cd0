// The contract of every native op: one plain struct of pointers and sizes, one function per backend.
//
// Dimension letters: B batch, R frontier rows, K top_k, N candidates, T tree nodes, D longest path (root
// included), V vocabulary, W ancestor words (64 nodes each), G key-value heads, L cache slots, E end tokens,
// M rows, C hidden units, I units inside the MLP; in adaptor N image rows, R queries, P spans.
// Integers are int64 throughout; strides are in elements; innermost dimensions are contiguous unless a
// stride is given. An op allocates nothing that outlives it, never synchronises, and reads lengths, counts
// and flags from memory, so that a CUDA graph can replay it. `stream` is a cudaStream_t (null on the CPU).
#pragma once

#include <cstdint>

namespace vispec {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

// One level of the draft tree: log-softmax of every frontier row, its best K tokens, cumulative scores,
// and the best K of all R*K children as the next frontier, with what the draft's next pass reads of each.
// Ties: higher score first, then lower index. NaN logits count as -inf; log-probabilities never exceed 0, so
// a child never outranks its parent.
struct GrowLevel {
  const void* logits;           // [B, R, V] dtype
  int64_t logits_batch_stride;  // elements
  int64_t logits_row_stride;    // elements
  DType dtype;
  const float* frontier_scores;  // [B, R] cumulative log-probability of each frontier row
  const int64_t* frontier;       // [B, R] candidate index of each frontier row; -1 is the root
  const int64_t* head_tokens;    // [V] token id of each logit column, or null: the column itself
  int64_t* candidate_tokens;     // [B, N] written at columns [offset, offset + R*K)
  float* candidate_scores;       // [B, N] likewise
  int64_t* candidate_parents;    // [B, N] likewise: the candidate index of the parent
  int64_t* next_frontier;        // [B, K] candidate index
  int64_t* next_rows;            // [B, K] the row in [0, R) that each one descends from
  int64_t* next_tokens;          // [B, K]
  float* next_scores;            // [B, K]
  int64_t slots;                 // of the draft's tail before the next frontier's own
  const int64_t* ancestors;      // [B, R, ceil(slots / 64)] tail slots that each row sees
  int64_t* next_ancestors;       // [B, K, ceil((slots + K) / 64)] its row's, and slot slots + k; or null
  const void* hidden;            // [B, R, C] of hidden_bytes an element
  int64_t hidden_batch_stride;   // elements
  int64_t hidden_row_stride;     // elements
  int64_t hidden_bytes;          // a multiple of 2
  void* next_hidden;             // [B, K, C] the row of `hidden` that each one descends from; or null
  int64_t C;
  int64_t B, R, V, K, N, offset;
  uint32_t* arrivals;  // [B] zeros, and zeros again afterwards; GPU only
  void* workspace;     // GPU only: see grow_level_workspace_bytes
  void* stream;
};

// The final tree: the best T-1 of N candidates (score, then lower index), in order of creation, behind the
// root.
struct BuildTree {
  const int64_t* root_tokens;        // [B]
  const int64_t* candidate_tokens;   // [B, N]
  const float* candidate_scores;     // [B, N]
  const int64_t* candidate_parents;  // [B, N] candidate index, -1: child of the root
  int64_t* tokens;                   // [B, T] node 0 is the root
  int64_t* parents;                  // [B, T] node index, -1 for the root
  int64_t* depths;                   // [B, T] number of ancestors
  int64_t* ancestors;                // [B, T, W] bit i of word i/64: node i is an ancestor or the node itself
  float* scores;                     // [B, T] cumulative log-probability, 0 for the root
  int64_t B, N, T, W;                // T <= N + 1, T <= 256, W = ceil(T / 64)
  void* stream;
};

// Verification: the target's own choice at every visited node (argmax, or one draw keyed by seed and absolute
// position), followed down the tree while a child carries it. Emits at most `remaining` tokens and none
// after an end token. `counts` nodes of `path` (root first) are to be committed: as many as tokens emitted.
struct Accept {
  const void* logits;           // [B, T, V] dtype; +inf or NaN on a visited row sets status
  int64_t logits_batch_stride;  // elements
  int64_t logits_row_stride;    // elements
  DType dtype;
  const int64_t* tokens;      // [B, T]
  const int64_t* parents;     // [B, T]
  const int64_t* lengths;     // [B] committed tokens; the draw at a node uses position lengths + depth
  int64_t do_sample;          // 0: argmax, lowest index wins ties
  const float* temperature;   // [B] > 0
  const int64_t* top_k;       // [B] 0: off
  const float* top_p;         // [B] 1: off
  const float* min_p;         // [B] 0: off
  const int64_t* seeds;       // [B] 64-bit Philox key
  const int64_t* end_tokens;  // [E]
  const int64_t* remaining;   // [B] tokens the row may still emit
  int64_t* finished;          // [B] in and out: nonzero rows emit nothing
  int64_t* path;              // [B, D] node indices, root first, -1 beyond counts
  int64_t* emitted;           // [B, D] token ids, -1 beyond counts
  int64_t* counts;            // [B] tokens emitted = nodes committed
  int64_t* status;            // [B] 0: fine, 1: logits that are not finite on the visited path
  float* log_probabilities;   // [B, D] of each emitted token under the softmax of the raw logits, 0 beyond
                              // counts; or null
  int64_t B, T, V, D, E;
  void* workspace;  // GPU only: see accept_workspace_bytes
  void* stream;
};

// What a round leaves, in one launch: the accepted rows of every layer's keys and values moved in place (slot
// starts + path[j] to starts + j), each row's state advanced, and for the draft the accepted nodes' features
// gathered, with the token behind each.
struct Commit {
  void* const* tensors;  // [tensor_count] base pointers, each [B, G, L, head] with the strides below
  int64_t tensor_count;  // 0: nothing moves
  int64_t element_bytes;
  int64_t batch_stride, head_stride, slot_stride;  // elements
  const int64_t* path;                             // [B, D]
  const int64_t* emitted;                          // [B, D]
  const int64_t* counts;                           // [B]
  const int64_t* starts;  // [B] the slot of node 0; not `lengths`, which a late block would find advanced
  int64_t starts_stride;  // elements
  int64_t* lengths;       // [B] += counts; null: no state
  int64_t* positions;     // [B] += counts
  int64_t* remaining;     // [B] -= counts
  int64_t* roots;         // [B] the last token emitted, left alone where counts is 0
  const void* features;   // [B, T, C]; null: nothing is gathered
  int64_t features_batch_stride, features_row_stride, feature_bytes;  // elements, elements, of one element
  void* picked;                                                       // [B, D, C] zeros beyond counts
  int64_t* tokens;                                                    // [B, D] 0 beyond counts
  int64_t B, G, L, head, D, T, C;
  void* stream;
};

// Keys and values of T new tokens as the projections leave them, and their way into the cache: the bias is
// added, then the first `rotary` columns of queries and keys are rotated (column c with column c + rotary /
// 2), with every product and sum rounded to dtype as elementwise code in PyTorch rounds it.
struct Tail {
  const void* keys;                                // [B, G, T, head] dtype
  const void* values;                              // [B, G, T, head]
  int64_t batch_stride, head_stride, row_stride;   // of keys and values, elements
  const void *cosines, *sines;                     // [B, T, rotary] each frequency twice
  const void *query_bias, *key_bias, *value_bias;  // [H * head], [G * head], [G * head]; null: none
  int64_t rotary;                                  // even, at most head
};

// Rotated queries written to `output`, rotated keys and values appended to the cache: token t at slot
// lengths + offset + t, unless that lies beyond L.
struct RopeAppend {
  Tail tail;
  const void* queries;                                                 // [B, H, T, head] dtype
  void* output;                                                        // [B, H, T, head]
  void *keys, *values;                                                 // [B, G, L, head] the caches
  int64_t query_batch_stride, query_head_stride, query_row_stride;     // elements
  int64_t output_batch_stride, output_head_stride, output_row_stride;  // elements
  int64_t cache_batch_stride, cache_head_stride, cache_slot_stride;    // of both caches
  DType dtype;
  const int64_t* lengths;  // [B] committed slots
  int64_t offset;          // slots between the committed ones and the new tokens' own
  int64_t B, H, G, T, L, head;
  void* stream;
};

// Attention of T tree nodes over a cache: a node sees all committed slots and the tail slots of its
// ancestors. Query heads h of key-value head h / (H / G). Without `tail` the tail's keys and values already
// lie in the cache, and the queries are rotated. With it they are as the projections left them: the same
// launch does what rope_append does at offset S - T. Slots that no node sees may hold anything. fp32 sums.
struct TreeAttention {
  const void* queries;                                               // [B, H, T, head] dtype; GPU: f16, bf16
  void* keys;                                                        // [B, G, L, head] read, and with a tail
  void* values;                                                      // [B, G, L, head] appended to
  void* output;                                                      // [B, H, T, head]
  Tail tail;                                                         // keys null: none
  int64_t query_batch_stride, query_head_stride, query_row_stride;   // elements, multiples of 8
  int64_t cache_batch_stride, cache_head_stride, cache_slot_stride;  // of keys and values, multiples of 8
  int64_t output_batch_stride, output_head_stride, output_row_stride;  // elements
  DType dtype;
  const int64_t* lengths;    // [B] committed slots; the tail follows
  const int64_t* ancestors;  // [B, T, W] bit i of word i/64: tail slot lengths + i is visible to the node
  float scale;               // of the products of queries and keys
  int64_t B, H, G, T, S, L, W, head;  // S tail slots, W = ceil(S / 64); head 64, 80, 96, 128 or 256
  void* workspace;                    // see tree_attention_workspace_bytes
  void* stream;
};

// Root mean square norm over the last dimension, as Llama and Qwen have it. With a residual: hidden is added
// to it first, and the sum is what is normalised. Every row is whole in registers before it is written:
// `output` may be `hidden`.
struct RmsNorm {
  const void* hidden;                                     // [M, C] dtype
  const void* weight;                                     // [C]
  void* residual;                                         // [M, C] in and out, or null
  void* output;                                           // [M, C]
  int64_t hidden_stride, residual_stride, output_stride;  // elements
  DType dtype;
  float epsilon;
  int64_t parity;  // nonzero: the normalised value is rounded to the dtype before the weight, as in the model
  int64_t M, C;
  void* stream;
};

// silu(gate) * up; `output` may be either of them.
struct SiluMul {
  const void* gate;                               // [M, I] dtype
  const void* up;                                 // [M, I]
  void* output;                                   // [M, I]
  int64_t gate_stride, up_stride, output_stride;  // elements
  DType dtype;
  int64_t parity;  // nonzero: silu(gate) is rounded to the dtype before the product, as in the model
  int64_t M, I;
  void* stream;
};

// A linear layer of N output columns whose weight is int8, scaled a column: sums of products with the weight
// in fp32, in an order that depends on C alone, times the scale, plus the bias, rounded once.
struct Int8Linear {
  const void* rows;                   // [M, C] dtype
  const int8_t* weight;               // [N, C] starts at a multiple of 16 bytes
  const float* scales;                // [N]
  const void* bias;                   // [N] dtype, or null
  void* output;                       // [M, N] dtype; no part of `rows`
  int64_t row_stride, output_stride;  // elements
  DType dtype;
  int64_t M, N, C;  // C a multiple of 16, at least 16
  void* stream;
};

// A vision adaptor's attention over the image rows of P spans, which are keys and values at once:
// output[p, r] = softmax over j of (queries[r] . rows[j]), times rows, over the rows j of span p. fp32 sums.
struct Adaptor {
  const void* queries;       // [R, C] dtype f16 or bf16, folded with the key projection and scaled
  const void* rows;          // [N, C] those outside every span may hold anything
  int64_t query_row_stride;  // elements, a multiple of 8
  int64_t row_stride;        // elements, a multiple of 8
  const int64_t* starts;     // [P] first row of each span
  const int64_t* lengths;    // [P] rows of each span; 0: zeros in output
  void* output;              // [P, R, C] dtype
  DType dtype;
  int64_t N, C, R, P;  // C a multiple of 8
  void* workspace;     // see adaptor_workspace_bytes
  void* stream;
};

namespace cpu {
void grow_level(const GrowLevel&);
void build_tree(const BuildTree&);
void accept(const Accept&);
void commit(const Commit&);
void rope_append(const RopeAppend&);
void rms_norm(const RmsNorm&);
void silu_mul(const SiluMul&);
void path_attention(const TreeAttention&);
}  // namespace cpu

namespace cuda {
int64_t accept_workspace_bytes(int64_t B, int64_t T, int64_t V);
int64_t grow_level_workspace_bytes(int64_t B, int64_t R, int64_t V, int64_t K);
void grow_level(const GrowLevel&);
void build_tree(const BuildTree&);
void accept(const Accept&);
void commit(const Commit&);  // `tensors` lies in device memory
void rope_append(const RopeAppend&);
int64_t tree_attention_workspace_bytes(const TreeAttention&);
void tree_attention(const TreeAttention&);
// The same for S = T <= 48 nodes without `tail`, with every row summed along its path in order of positions:
// the same bits whatever the tree.
int64_t path_attention_workspace_bytes(const TreeAttention&);
void path_attention(const TreeAttention&);
void rms_norm(const RmsNorm&);
void silu_mul(const SiluMul&);
void int8_linear(const Int8Linear&);
int64_t adaptor_workspace_bytes(int64_t N, int64_t C, int64_t R, int64_t P);
void adaptor(const Adaptor&);
}  // namespace cuda

}  // namespace vispec
