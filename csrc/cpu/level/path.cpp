// Attention of one node along its path, compiled once for each instruction set. Nothing is contracted, and a
// key takes part by its place on the path alone, so that the bits are those of the path, whatever the tree.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/level/vectors.h"
#include "cpu/rows.h"

namespace vispec::cpu::VISPEC_LEVEL {
namespace {

constexpr int kTile = kLanes;  // keys that are widened together

VISPEC_INLINE Floats from(const float* at) {
  Floats v;
  memcpy(&v, at, sizeof(v));
  return v;
}

VISPEC_INLINE void to(float* at, Floats v) { memcpy(at, &v, sizeof(v)); }

template <class Element>
VISPEC_INLINE void widen(const char* row, int64_t width, float* out) {
  for (int64_t column = 0; column < width; column += kLanes)
    to(out + column, load<Element>(row + column * Element::bytes, width - column));
}

template <class Element>
void attend_node(const TreeAttention& op, const PathNode& node, float* scratch) {
  constexpr int kBytes = Element::bytes;
  const int64_t group = op.H / op.G, padded = padded_to_lanes(op.head), run = padded_to_lanes(node.seen);
  float* queries = scratch;
  float* sums = queries + group * padded;
  float* weights = sums + group * padded;
  float* tile = weights + group * run;

  const int64_t first_head = node.g * group;
  const char* query = static_cast<const char*>(op.queries) +
                      (node.b * op.query_batch_stride + node.t * op.query_row_stride) * kBytes;
  for (int64_t h = 0; h < group; ++h) {
    widen<Element>(query + (first_head + h) * op.query_head_stride * kBytes, op.head, queries + h * padded);
    for (int64_t column = 0; column < padded; column += kLanes) {
      to(queries + h * padded + column, from(queries + h * padded + column) * op.scale);
      to(sums + h * padded + column, Floats{});
    }
  }
  const int64_t head_offset = node.b * op.cache_batch_stride + node.g * op.cache_head_stride;
  const auto widen_tile = [&](const void* store, int64_t base, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = base + i < node.committed ? base + i : node.tail[base + i - node.committed];
      widen<Element>(static_cast<const char*>(store) + (head_offset + slot * op.cache_slot_stride) * kBytes,
                     op.head, tile + i * padded);
    }
  };

  for (int64_t base = 0; base < node.seen; base += kTile) {
    const int64_t count = node.seen - base < kTile ? node.seen - base : kTile;
    widen_tile(op.keys, base, count);
    for (int64_t h = 0; h < group; ++h) {
      Floats products[kTile] = {};
      for (int64_t column = 0; column < padded; column += kLanes) {
        const Floats q = from(queries + h * padded + column);
        for (int i = 0; i < kTile; ++i) products[i] += q * from(tile + i * padded + column);
      }
      to(weights + h * run + base, lane_sums(products));
    }
  }
  for (int64_t h = 0; h < group; ++h) {
    float* own = weights + h * run;
    float best = -INFINITY;
    for (int64_t i = 0; i < node.seen; ++i) best = own[i] > best ? own[i] : best;
    if (best == -INFINITY) best = 0.0f;
    for (int64_t i = node.seen; i < run; ++i) own[i] = -INFINITY;  // what the last tile held there
    Floats total = {};
    for (int64_t i = 0; i < run; i += kLanes) {
      const Floats x = from(own + i) - best;
      const Exponential e = exponential(x < -87.0f ? all(-87.0f) : x);
      Floats weight = floats_of(bits_of(e.power) + (Words(e.exponent) << 23));
      weight = x < -87.0f ? Floats{} : weight;
      weight = x == x ? weight : x;
      to(own + i, weight);
      total += weight;
    }
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += total[i];
    if (sum == 0.0f) sum = 1.0f;
    for (int64_t i = 0; i < run; i += kLanes) to(own + i, from(own + i) / sum);
  }
  for (int64_t base = 0; base < node.seen; base += kTile) {
    const int64_t count = node.seen - base < kTile ? node.seen - base : kTile;
    widen_tile(op.values, base, count);
    for (int64_t h = 0; h < group; ++h)
      for (int64_t column = 0; column < padded; column += kLanes) {
        Floats sum = from(sums + h * padded + column);
        for (int64_t i = 0; i < count; ++i)
          sum += from(tile + i * padded + column) * weights[h * run + base + i];
        to(sums + h * padded + column, sum);
      }
  }
  char* out = static_cast<char*>(op.output) +
              (node.b * op.output_batch_stride + node.t * op.output_row_stride) * kBytes;
  for (int64_t h = 0; h < group; ++h)
    for (int64_t column = 0; column < op.head; column += kLanes)
      store<Element>(out + ((first_head + h) * op.output_head_stride + column) * kBytes, op.head - column,
                     from(sums + h * padded + column));
}

}  // namespace

void attend(const TreeAttention& op, const PathNode& node, float* scratch) {
#define VISPEC_CALL(Element) attend_node<Element>(op, node, scratch)
  VISPEC_BY_DTYPE(op.dtype, VISPEC_CALL);
#undef VISPEC_CALL
}

}  // namespace vispec::cpu::VISPEC_LEVEL
