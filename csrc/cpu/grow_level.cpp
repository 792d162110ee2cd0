#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/pool.h"
#include "cpu/rows.h"
#include "ops.h"

namespace vispec::cpu {
namespace {

// Columns per task. Fixed, so that sums are split alike for any number of threads; large enough that a task
// (a few microseconds) outweighs handing it over.
constexpr int64_t kPartColumns = 16384;

// Entry `entry` of the best list of a row that was scanned in `count` parts; parts are in order of columns,
// so the strict comparison gives ties to the lower column.
struct Merge {
  const RowPart* parts;
  int64_t count;
  std::vector<int64_t> used;

  Merge(const RowPart* first, int64_t number) : parts(first), count(number), used(number, 0) {}

  void next(float* value, int64_t* column) {
    int64_t from = -1;
    for (int64_t p = 0; p < count; ++p)
      if (used[p] < parts[p].found && (from < 0 || parts[p].best[used[p]] > parts[from].best[used[from]]))
        from = p;
    *value = parts[from].best[used[from]];
    *column = parts[from].columns[used[from]];
    ++used[from];
  }
};

void write_row(const GrowLevel& op, int64_t b, int64_t r, const RowPart* parts, int64_t count) {
  float max = parts[0].max;
  for (int64_t p = 1; p < count; ++p) max = std::max(max, parts[p].max);
  double sum = 0;
  for (int64_t p = 0; p < count; ++p)
    sum += parts[p].sum * std::exp(static_cast<double>(parts[p].max) - static_cast<double>(max));
  const float log_sum = std::max(static_cast<float>(std::log(sum)), 0.0f);
  const float before = op.frontier_scores[b * op.R + r];
  Merge merge(parts, count);
  for (int64_t k = 0; k < op.K; ++k) {
    const int64_t at = b * op.N + op.offset + r * op.K + k;
    float value;
    int64_t column;
    merge.next(&value, &column);
    const float score = before + ((value - max) - log_sum);
    op.candidate_tokens[at] = op.head_tokens == nullptr ? column : op.head_tokens[column];
    op.candidate_scores[at] = std::isnan(score) ? -INFINITY : score;
    op.candidate_parents[at] = op.frontier[b * op.R + r];
  }
}

void write_frontier(const GrowLevel& op, int64_t b) {
  const float* scores = op.candidate_scores + b * op.N + op.offset;
  std::vector<int64_t> children(op.R * op.K);
  for (int64_t i = 0; i < op.R * op.K; ++i) children[i] = i;
  std::partial_sort(
      children.begin(), children.begin() + op.K, children.end(),
      [scores](int64_t x, int64_t y) { return scores[x] != scores[y] ? scores[x] > scores[y] : x < y; });
  for (int64_t k = 0; k < op.K; ++k) {
    const int64_t at = b * op.K + k, child = children[k];
    op.next_frontier[at] = op.offset + child;
    op.next_rows[at] = child / op.K;
    op.next_tokens[at] = op.candidate_tokens[b * op.N + op.offset + child];
    op.next_scores[at] = scores[child];
  }
}

// Each node sees what its row sees, and its own slot.
void write_ancestors(const GrowLevel& op, int64_t b) {
  const int64_t before = (op.slots + 63) / 64, words = (op.slots + op.K + 63) / 64;
  for (int64_t k = 0; k < op.K; ++k) {
    int64_t* out = op.next_ancestors + (b * op.K + k) * words;
    const int64_t row = b * op.R + op.next_rows[b * op.K + k], own = op.slots + k;
    for (int64_t w = 0; w < words; ++w) {
      uint64_t word = own / 64 == w ? uint64_t{1} << own % 64 : 0;
      if (w < before) word |= static_cast<uint64_t>(op.ancestors[row * before + w]);
      out[w] = static_cast<int64_t>(word);
    }
  }
}

void gather_hidden(const GrowLevel& op, int64_t b) {
  const char* source = static_cast<const char*>(op.hidden) + b * op.hidden_batch_stride * op.hidden_bytes;
  const int64_t bytes = op.C * op.hidden_bytes;
  for (int64_t at = b * op.K; at < (b + 1) * op.K; ++at) {
    const char* row = source + op.next_rows[at] * op.hidden_row_stride * op.hidden_bytes;
    std::memcpy(static_cast<char*>(op.next_hidden) + at * bytes, row, static_cast<size_t>(bytes));
  }
}

}  // namespace

void grow_level(const GrowLevel& op) {
  const int64_t rows_total = op.B * op.R;
  const int64_t per_row = (op.V + kPartColumns - 1) / kPartColumns;
  std::vector<RowPart> parts(rows_total * per_row);
  const RowFunctions& functions = rows();
  const auto scan = [&](int64_t task) {
    const int64_t row = task / per_row, begin = task % per_row * kPartColumns;
    const int64_t at = row / op.R * op.logits_batch_stride + row % op.R * op.logits_row_stride;
    parts[task].top_k = op.K;
    functions.scan(row_at(op.logits, op.dtype, at), op.dtype, begin, std::min(begin + kPartColumns, op.V),
                   &parts[task]);
  };
  // Below this, waking a second thread costs more than the scan.
  constexpr int64_t kWorthSharing = 65536;
  const int64_t tasks = rows_total * per_row;
  if (rows_total * op.V >= kWorthSharing)
    parallel_for(tasks, scan);
  else
    for (int64_t task = 0; task < tasks; ++task) scan(task);
  for (int64_t row = 0; row < rows_total; ++row)
    write_row(op, row / op.R, row % op.R, parts.data() + row * per_row, per_row);
  for (int64_t b = 0; b < op.B; ++b) {
    write_frontier(op, b);
    if (op.next_ancestors != nullptr) write_ancestors(op, b);
    if (op.next_hidden != nullptr) gather_hidden(op, b);
  }
}

}  // namespace vispec::cpu
