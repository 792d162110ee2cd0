// The ops between a decoder layer's products: rms_norm, silu_mul, rope_append. A row is a task; few or short
// rows are done by the caller, since waking a thread takes as long as a few tens of thousands of elements.

#include "cpu/pool.h"
#include "cpu/rows.h"
#include "ops.h"

namespace vispec::cpu {
namespace {

constexpr int64_t kWorthSharing = 1 << 17;  // elements

template <class Body>
void for_rows(int64_t count, int64_t elements, const Body& body) {
  if (count * elements >= kWorthSharing) return parallel_for(count, body);
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace

void rms_norm(const RmsNorm& op) {
  for_rows(op.M, op.C, [&](int64_t row) { rows().norm(op, row); });
}

void silu_mul(const SiluMul& op) {
  for_rows(op.M, op.I, [&](int64_t row) { rows().silu(op, row); });
}

void rope_append(const RopeAppend& op) {
  for_rows(op.B * op.T, (op.H + 2 * op.G) * op.head,
           [&](int64_t token) { rows().turn(op, token / op.T, token % op.T); });
}

}  // namespace vispec::cpu
