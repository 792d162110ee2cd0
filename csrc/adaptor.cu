#include <algorithm>
#include <stdexcept>
#include <string>

#include "adaptor.cuh"

namespace vispec::cuda {
namespace {

using kernels::AdaptorPlan;

constexpr int64_t kChunkBytes = int64_t{32} << 20;  // of rows; an A100 has 40 MiB of L2, an H100 50
constexpr int64_t kMostQueries = 96;                // of a block: 96 sums a thread in adaptor_sum

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t rounded_up(int64_t count, int64_t size) { return blocks_of(count, size) * size; }

// Queries of a block, the same for all blocks: 32, 64 or 96.
int64_t block_queries(int64_t R) { return rounded_up(blocks_of(R, blocks_of(R, kMostQueries)), 32); }

// The sizes of `AdaptorPlan`; no pointers.
AdaptorPlan sizes(int64_t N, int64_t C, int64_t R, int64_t P) {
  AdaptorPlan plan{};
  const int64_t most_rows = std::max<int64_t>(kChunkBytes / (2 * C), kernels::kScoreRows);
  plan.chunks = blocks_of(N, most_rows);
  plan.chunk_rows = rounded_up(blocks_of(N, std::max<int64_t>(plan.chunks, 1)), kernels::kScoreRows);
  plan.padded = rounded_up(R, block_queries(R));
  plan.query_blocks = plan.padded / block_queries(R);
  // Two blocks for each of 132 SMs, as long as a slice keeps 512 columns: partial scores are then at most an
  // eighth of the bytes of the rows at 32 queries, a quarter at 64.
  const int64_t tiles = blocks_of(plan.chunk_rows, kernels::kScoreRows) * plan.query_blocks;
  const int64_t slices = std::max<int64_t>(std::min(264 / std::max<int64_t>(tiles, 1), C / 512), 1);
  plan.slice_columns = rounded_up(blocks_of(C, slices), kernels::kScoreColumns);
  plan.slices = blocks_of(C, plan.slice_columns);
  // One block of sums an SM, as long as a run keeps 64 rows: the sums of a run take 4 R C bytes, its rows 2 C
  // for each row.
  const int64_t columns = blocks_of(C, kernels::kSumColumns) * plan.query_blocks;
  const int64_t most_runs = std::max<int64_t>(blocks_of(plan.chunk_rows, 64), 1);
  plan.workers = std::min(std::max<int64_t>(132 / columns, 1), most_runs);
  plan.runs = plan.workers + P - 1;
  return plan;
}

// Gives out the workspace from its start on, each array a multiple of 16 bytes; returns its size. `start` may
// be null.
int64_t place(AdaptorPlan& plan, const Adaptor& p) {
  char* const start = static_cast<char*>(p.workspace);
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* const array = start == nullptr ? nullptr : start + used;
    used += rounded_up(bytes, 16);
    return static_cast<void*>(array);
  };
  const int64_t scores = plan.chunk_rows * plan.padded, runs = plan.chunks * plan.runs;
  plan.scores = static_cast<float*>(take(4 * plan.slices * scores));
  plan.sums = static_cast<float*>(take(4 * runs * p.R * p.C));
  plan.maxima = static_cast<float*>(take(4 * runs * plan.padded));
  plan.totals = static_cast<float*>(take(4 * runs * plan.padded));
  plan.weights = static_cast<uint16_t*>(take(2 * p.P * scores));
  return used;
}

template <typename T, int kQueries>
void run_chunk(const Adaptor& p, const AdaptorPlan& plan, int64_t chunk) {
  const auto size = [](int64_t count) { return static_cast<unsigned>(count); };
  const int64_t rows = std::min(plan.chunk_rows, p.N - chunk * plan.chunk_rows);
  vs::launch("adaptor", kernels::adaptor_scores<T, kQueries>,
             {size(blocks_of(rows, kernels::kScoreRows)), size(plan.query_blocks), size(plan.slices)},
             kernels::kScoreThreads, kernels::adaptor_scores_shared_bytes<kQueries>(), p.stream, p, plan,
             chunk);
  vs::launch("adaptor", kernels::adaptor_weigh<T>,
             {size(plan.runs), size(plan.padded / kernels::kWeighQueries), 1}, kernels::kWeighThreads,
             2 * vs::shared_bytes<float>(kernels::kWeighThreads / vs::kWarpSize * kernels::kWeighQueries),
             p.stream, p, plan, chunk);
  vs::launch("adaptor", kernels::adaptor_sum<T, kQueries>,
             {size(plan.runs), size(blocks_of(p.C, kernels::kSumColumns)), size(plan.query_blocks)},
             kernels::kSumThreads, kernels::adaptor_sum_shared_bytes<kQueries>(), p.stream, p, plan, chunk);
}

template <typename T>
void run(const Adaptor& p, const AdaptorPlan& plan) {
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    switch (block_queries(p.R)) {
      case 32: run_chunk<T, 32>(p, plan, chunk); break;
      case 64: run_chunk<T, 64>(p, plan, chunk); break;
      case 96: run_chunk<T, 96>(p, plan, chunk); break;
    }
  }
  const size_t most = static_cast<size_t>(plan.chunks * plan.workers);
  vs::launch("adaptor", kernels::adaptor_merge<T>,
             {static_cast<unsigned>(blocks_of(p.C, kernels::kMergeColumns)), static_cast<unsigned>(p.R),
              static_cast<unsigned>(p.P)},
             kernels::kMergeThreads, 2 * vs::shared_bytes<float>(most) + vs::shared_bytes<int64_t>(most),
             p.stream, p, plan);
}

void check(const Adaptor& p) {
  if (p.dtype == DType::f32) throw std::invalid_argument("adaptor: dtype must be f16 or bf16, got f32");
  if (p.C < 8 || p.C % 8 != 0 || p.R < 1 || p.N < 0 || p.P < 1) {
    throw std::invalid_argument(
        "adaptor: C must be a multiple of 8, R and P at least 1, got C=" + std::to_string(p.C) +
        ", R=" + std::to_string(p.R) + ", P=" + std::to_string(p.P));
  }
  const uintptr_t starts = reinterpret_cast<uintptr_t>(p.queries) | reinterpret_cast<uintptr_t>(p.rows) |
                           reinterpret_cast<uintptr_t>(p.output) | reinterpret_cast<uintptr_t>(p.workspace);
  if ((p.query_row_stride | p.row_stride) % 8 != 0 || starts % 16 != 0) {
    throw std::invalid_argument(
        "adaptor: queries, rows, output and workspace must start at a multiple of 16 bytes, with row strides "
        "that are multiples of 8 elements");
  }
}

}  // namespace

int64_t adaptor_workspace_bytes(int64_t N, int64_t C, int64_t R, int64_t P) {
  Adaptor p{};
  p.N = N, p.C = C, p.R = R, p.P = P;
  AdaptorPlan plan = sizes(N, C, R, P);
  return place(plan, p);
}

void adaptor(const Adaptor& p) {
  check(p);
  AdaptorPlan plan = sizes(p.N, p.C, p.R, p.P);
  place(plan, p);
  if (p.dtype == DType::f16) {
    run<vs::Half>(p, plan);
  } else {
    run<vs::BFloat16>(p, plan);
  }
}

}  // namespace vispec::cuda
