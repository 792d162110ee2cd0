#include <vector>

#include "cpu/pool.h"
#include "cpu/rows.h"
#include "ops.h"

namespace vispec::cpu {
namespace {

constexpr int64_t kWorthSharing = int64_t{1} << 18;  // products of a query's and a key's element

}  // namespace

void path_attention(const TreeAttention& op) {
  const int64_t group = op.H / op.G, tasks = op.B * op.G * op.T;
  const auto attend = [&](int64_t task) {
    PathNode node{};
    node.b = task / (op.G * op.T);
    node.g = task / op.T % op.G;
    node.t = task % op.T;
    const int64_t length = op.lengths[node.b];
    node.committed = length < 0 ? 0 : length > op.L ? op.L : length;
    const int64_t word = op.ancestors[node.b * op.T + node.t];
    int64_t tail[64], count = 0;
    for (int64_t i = 0; i < op.T && node.committed + i < op.L; ++i)
      if (word >> i & 1) tail[count++] = node.committed + i;
    node.tail = tail;
    node.seen = node.committed + count;
    std::vector<float> scratch(static_cast<size_t>(2 * group * padded_to_lanes(op.head) +
                                                   group * padded_to_lanes(node.seen) +
                                                   kMostLanes * padded_to_lanes(op.head)));
    rows().attend(op, node, scratch.data());
  };
  if (tasks * group * op.L * op.head >= kWorthSharing) return parallel_for(tasks, attend);
  for (int64_t task = 0; task < tasks; ++task) attend(task);
}

}  // namespace vispec::cpu
