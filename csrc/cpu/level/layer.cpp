// What a decoder layer does between its products, a row at a time, compiled once for each instruction set.
// Every step is rounded where PyTorch's elementwise code rounds it, so nothing is contracted, and a sum has
// one order on every machine.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/level/vectors.h"
#include "cpu/rows.h"

namespace vispec::cpu::VISPEC_LEVEL {
namespace {

constexpr int kSums = 16;  // column c goes into sum c % 16, whatever the vectors' width
static_assert(kSums % kLanes == 0, "");

template <class Element>
void norm_row(const RmsNorm& op, int64_t row) {
  constexpr int kBytes = Element::bytes;
  const char* hidden = static_cast<const char*>(op.hidden) + row * op.hidden_stride * kBytes;
  const char* weight = static_cast<const char*>(op.weight);
  char* output = static_cast<char*>(op.output) + row * op.output_stride * kBytes;
  char* residual =
      op.residual == nullptr ? nullptr : static_cast<char*>(op.residual) + row * op.residual_stride * kBytes;
  Floats sums[kSums / kLanes] = {};
  for (int64_t start = 0; start < op.C; start += kSums)
    for (int i = 0; i < kSums / kLanes; ++i) {
      const int64_t column = start + i * kLanes, left = op.C - column;
      if (left <= 0) break;
      Floats x = load<Element>(hidden + column * kBytes, left);
      if (residual != nullptr) {
        x = rounded<Element>(load<Element>(residual + column * kBytes, left) + x);
        store<Element>(residual + column * kBytes, left, x);
      }
      sums[i] += x * x;
    }
  float sum = 0.0f;
  for (int i = 0; i < kSums; ++i) sum += sums[i / kLanes][i % kLanes];
  const float inverse = 1.0f / __builtin_sqrtf(sum / static_cast<float>(op.C) + op.epsilon);
  const char* values = residual == nullptr ? hidden : residual;
  for (int64_t column = 0; column < op.C; column += kLanes) {
    const int64_t left = op.C - column;
    Floats x = load<Element>(values + column * kBytes, left) * inverse;
    if (op.parity != 0) x = rounded<Element>(x);
    store<Element>(output + column * kBytes, left, x * load<Element>(weight + column * kBytes, left));
  }
}

template <class Element>
void silu_row(const SiluMul& op, int64_t row) {
  constexpr int kBytes = Element::bytes;
  const char* gate = static_cast<const char*>(op.gate) + row * op.gate_stride * kBytes;
  const char* up = static_cast<const char*>(op.up) + row * op.up_stride * kBytes;
  char* output = static_cast<char*>(op.output) + row * op.output_stride * kBytes;
  for (int64_t column = 0; column < op.I; column += kLanes) {
    const int64_t left = op.I - column;
    const Floats x = load<Element>(gate + column * kBytes, left);
    // exp(-x) is nothing beside 1 below the lower bound, and inf above the upper one, as expf gives it.
    const Floats raised = -x < -87.0f ? all(-87.0f) : -x;
    const Exponential e = exponential(raised > 89.0f ? all(89.0f) : raised);
    // In two factors: 2^128 is no float.
    const Ints half = e.exponent >> 1;
    const Floats rising =
        e.power * floats_of(Words(half + 127) << 23) * floats_of(Words(e.exponent - half + 127) << 23);
    Floats activated = x / (rising + 1.0f);
    if (op.parity != 0) activated = rounded<Element>(activated);
    store<Element>(output + column * kBytes, left, activated * load<Element>(up + column * kBytes, left));
  }
}

// One head of one token: bias, then the rotation of the first `rotary` columns.
template <class Element>
VISPEC_INLINE void turn_head(const char* row, const char* bias, const char* cosines, const char* sines,
                             int64_t rotary, int64_t head, char* out) {
  constexpr int kBytes = Element::bytes;
  const auto biased = [&](int64_t column, int64_t count) {
    const Floats x = load<Element>(row + column * kBytes, count);
    return bias == nullptr ? x : rounded<Element>(x + load<Element>(bias + column * kBytes, count));
  };
  const int64_t half = rotary / 2;
  for (int64_t column = 0; column < half; column += kLanes) {
    const int64_t count = half - column < kLanes ? half - column : kLanes;
    const Floats first = biased(column, count), second = biased(column + half, count);
    const auto place = [&](int64_t at, Floats x, Floats partner) {
      const Floats kept = rounded<Element>(x * load<Element>(cosines + at * kBytes, count));
      const Floats turned = rounded<Element>(partner * load<Element>(sines + at * kBytes, count));
      store<Element>(out + at * kBytes, count, kept + turned);
    };
    place(column, first, -second);
    place(column + half, second, first);
  }
  for (int64_t column = rotary; column < head; column += kLanes)
    store<Element>(out + column * kBytes, head - column, biased(column, head - column));
}

template <class Element>
void turn_token(const RopeAppend& op, int64_t b, int64_t t) {
  constexpr int kBytes = Element::bytes;
  const Tail& tail = op.tail;
  const int64_t table = (b * op.T + t) * tail.rotary * kBytes;
  const char* cosines = static_cast<const char*>(tail.cosines) + table;
  const char* sines = static_cast<const char*>(tail.sines) + table;
  const auto bias_of = [&](const void* bias, int64_t index) {
    return bias == nullptr ? nullptr : static_cast<const char*>(bias) + index * op.head * kBytes;
  };
  for (int64_t h = 0; h < op.H; ++h) {
    const int64_t from = b * op.query_batch_stride + h * op.query_head_stride + t * op.query_row_stride;
    const int64_t to = b * op.output_batch_stride + h * op.output_head_stride + t * op.output_row_stride;
    turn_head<Element>(static_cast<const char*>(op.queries) + from * kBytes, bias_of(tail.query_bias, h),
                       cosines, sines, tail.rotary, op.head, static_cast<char*>(op.output) + to * kBytes);
  }
  const int64_t length = op.lengths[b];
  const int64_t slot = (length < 0 ? 0 : length > op.L ? op.L : length) + op.offset + t;
  if (slot >= op.L) return;
  for (int64_t g = 0; g < op.G; ++g) {
    const int64_t from = (b * tail.batch_stride + g * tail.head_stride + t * tail.row_stride) * kBytes;
    const int64_t to =
        (b * op.cache_batch_stride + g * op.cache_head_stride + slot * op.cache_slot_stride) * kBytes;
    turn_head<Element>(static_cast<const char*>(tail.keys) + from, bias_of(tail.key_bias, g), cosines, sines,
                       tail.rotary, op.head, static_cast<char*>(op.keys) + to);
    turn_head<Element>(static_cast<const char*>(tail.values) + from, bias_of(tail.value_bias, g), cosines,
                       sines, 0, op.head, static_cast<char*>(op.values) + to);
  }
}

}  // namespace

void norm(const RmsNorm& op, int64_t row) {
#define VISPEC_CALL(Element) norm_row<Element>(op, row)
  VISPEC_BY_DTYPE(op.dtype, VISPEC_CALL);
#undef VISPEC_CALL
}

void silu(const SiluMul& op, int64_t row) {
#define VISPEC_CALL(Element) silu_row<Element>(op, row)
  VISPEC_BY_DTYPE(op.dtype, VISPEC_CALL);
#undef VISPEC_CALL
}

void turn(const RopeAppend& op, int64_t b, int64_t t) {
#define VISPEC_CALL(Element) turn_token<Element>(op, b, t)
  VISPEC_BY_DTYPE(op.dtype, VISPEC_CALL);
#undef VISPEC_CALL
}

}  // namespace vispec::cpu::VISPEC_LEVEL
