// Kernel bodies of adaptor: scores of all rows, weights of runs of rows, weighted sums of those runs, merge.
//
// The work goes through the rows in chunks that stay in L2 between their two readings: adaptor_scores reads a
// chunk from memory, adaptor_sum reads it again. The sums of R queries over C columns are larger than an SM's
// registers, and so are the queries than its shared memory: both kernels give a block some of the columns,
// and partial results meet in the workspace, always in the same order.
//
// Within a chunk the spans' rows, span after span, are dealt to `workers` in equal shares of 32-row tiles. A
// run is what one worker has of one span. Worker w's run of span s has the number w + s: from one run to the
// next the worker, the span or both go up, so that no two runs share a number, and there are fewer than
// workers + P of them however the spans lie.
#pragma once

#include "ops.h"
#include "rt.h"

namespace vispec::kernels {

constexpr unsigned kScoreThreads = 128;
constexpr int kScoreRows = 64;                  // of a block
constexpr int kScoreColumns = 64;               // of a stage
constexpr int kScorePitch = kScoreColumns + 8;  // an odd number of 16-byte units: no bank is met twice
constexpr int kScoreStages = 4;
constexpr unsigned kWeighThreads = 256;
constexpr int kWeighQueries = 8;  // of a block: 32 bytes of scores, the unit of a memory access
constexpr unsigned kSumThreads = 256;
constexpr int kSumRows = 32;      // of a stage
constexpr int kSumColumns = 256;  // of a block: 32 for each of 8 warps
constexpr int kSumPitch = kSumColumns + 8;
constexpr int kSumStages = 4;
constexpr unsigned kMergeThreads = 256;
constexpr int kMergeColumns = 4 * static_cast<int>(kMergeThreads);

// Sizes that follow from N, C, R and P, and the workspace.
struct AdaptorPlan {
  int64_t chunks, chunk_rows;     // chunk_rows: a multiple of kScoreRows
  int64_t query_blocks, padded;   // padded: R rounded up to whole query blocks
  int64_t slices, slice_columns;  // of adaptor_scores; slice_columns: a multiple of kScoreColumns
  int64_t workers, runs;          // runs: the numbers of a chunk, not all of them taken
  float* scores;                  // [slices, chunk_rows, padded] in powers of two, of one chunk
  float* sums;                    // [chunks, runs, R, C] weighted rows
  float* maxima;                  // [chunks, runs, padded] of the scores
  float* totals;                  // [chunks, runs, padded] of the weights
  uint16_t* weights;              // [P, chunk_rows, padded] dtype, of one chunk
};

template <int kQueries>
size_t adaptor_scores_shared_bytes() {
  return vs::shared_bytes<uint16_t>(kScoreStages * (kScoreRows + kQueries) * kScorePitch);
}

template <int kQueries>
size_t adaptor_sum_shared_bytes() {
  return vs::shared_bytes<uint16_t>(kSumStages * kSumRows * (kSumPitch + kQueries + 8));
}

struct AdaptorRows {
  int64_t first, last;  // [first, last)
};

// The rows of a span that lie in a chunk. Starts and lengths may be stale during a graph's warm-up.
VS_DEVICE AdaptorRows adaptor_rows(const Adaptor& p, const AdaptorPlan& plan, int64_t chunk, int64_t span) {
  const auto clamped = [](int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
  };
  const int64_t start = clamped(p.starts[span], 0, p.N);
  const int64_t stop = start + clamped(p.lengths[span], 0, p.N - start);
  const int64_t first = chunk * plan.chunk_rows, last = first + plan.chunk_rows;
  return {clamped(start, first, last), clamped(stop, first, last)};
}

VS_DEVICE int64_t adaptor_tiles(const AdaptorRows& rows) {
  return (rows.last - rows.first + kSumRows - 1) / kSumRows;
}

// A chunk's tiles: of the spans before one, of that one, and of a worker.
struct AdaptorShare {
  int64_t before, own, share;
};

// Every warp for itself; all its lanes get the same.
VS_DEVICE AdaptorShare adaptor_share(const Adaptor& p, const AdaptorPlan& plan, int64_t chunk, int64_t span) {
  int64_t before = 0, own = 0, all = 0;
  for (int64_t first = 0; first < p.P; first += vs::kWarpSize) {
    const int64_t s = first + vs::lane_index();
    const int64_t tiles = s < p.P ? adaptor_tiles(adaptor_rows(p, plan, chunk, s)) : 0;
    before += vs::warp_sum(s < span ? tiles : 0);
    own += vs::warp_sum(s == span ? tiles : 0);
    all += vs::warp_sum(tiles);
  }
  return {before, own, (all + plan.workers - 1) / plan.workers};
}

struct AdaptorRun {
  int64_t span;         // -1: the number is not taken
  int64_t first, last;  // rows [first, last)
};

// The run of a number: a span's tiles in a worker's share. Every warp for itself; all its lanes get the same.
VS_DEVICE AdaptorRun adaptor_run(const Adaptor& p, const AdaptorPlan& plan, int64_t chunk, int64_t number) {
  const int64_t share = adaptor_share(p, plan, chunk, -1).share;
  AdaptorRun run{-1, 0, 0};
  if (share == 0) return run;
  int64_t base = 0;
  for (int64_t first = 0; first < p.P; first += vs::kWarpSize) {
    const int64_t s = first + vs::lane_index(), worker = number - s;
    const AdaptorRows rows = s < p.P ? adaptor_rows(p, plan, chunk, s) : AdaptorRows{0, 0};
    const int64_t tiles = adaptor_tiles(rows), end = base + vs::warp_prefix_sum(tiles), begin = end - tiles;
    const int64_t low = worker * share > begin ? worker * share : begin;
    const int64_t high = (worker + 1) * share < end ? (worker + 1) * share : end;
    const uint32_t found = vs::ballot(low < high);
    if (found != 0) {
      const unsigned lane = static_cast<unsigned>(vs::lowest_bit(found));
      const int64_t stop = rows.first + (high - begin) * kSumRows;
      run.span = vs::shuffle(s, lane);
      run.first = vs::shuffle(rows.first + (low - begin) * kSumRows, lane);
      run.last = vs::shuffle(stop < rows.last ? stop : rows.last, lane);
      return run;
    }
    base = vs::shuffle(end, vs::kWarpSize - 1);
  }
  return run;
}

// One stage: 64 columns of 64 rows and of the block's queries. Beyond the last row, query or column: zeros.
template <int kQueries>
VS_DEVICE void copy_score_stage(const Adaptor& p, int64_t first_row, int64_t first_query, int64_t column,
                                int64_t last_column, uint16_t* stage) {
  constexpr int kUnits = kScoreColumns / 8;
  const uint16_t* rows = static_cast<const uint16_t*>(p.rows);
  const uint16_t* queries = static_cast<const uint16_t*>(p.queries);
  for (int i = static_cast<int>(vs::thread_index()); i < (kScoreRows + kQueries) * kUnits;
       i += static_cast<int>(kScoreThreads)) {
    const int line = i / kUnits, unit = i % kUnits;
    const bool is_row = line < kScoreRows;
    const int64_t index = is_row ? first_row + line : first_query + line - kScoreRows;
    const bool there = index < (is_row ? p.N : p.R) && column + unit * 8 < last_column;
    const uint16_t* source = is_row ? rows : queries;
    if (there) source += index * (is_row ? p.row_stride : p.query_row_stride) + column + unit * 8;
    vs::copy_async<16>(stage + line * kScorePitch + unit * 8, source, there ? 16 : 0);
  }
}

// Each of 4 warps: 32 rows by half of the queries.
template <typename T, int kQueries>
VS_DEVICE void multiply_scores(float (&scores)[2][kQueries / 16][4], const uint16_t* stage) {
  const unsigned lane = vs::lane_index(), warp = vs::warp_index();
  const uint16_t* row = stage + (warp % 2 * 32 + lane % 16) * kScorePitch + lane / 16 * 8;
  const uint16_t* query = stage +
                          (kScoreRows + warp / 2 * (kQueries / 2) + lane / 16 * 8 + lane % 8) * kScorePitch +
                          lane / 8 % 2 * 8;
  VS_UNROLL
  for (int k = 0; k < kScoreColumns; k += 16) {
    uint32_t a[2][4];
    vs::load_matrix<4, false>(a[0], row + k);
    vs::load_matrix<4, false>(a[1], row + 16 * kScorePitch + k);
    VS_UNROLL
    for (int n = 0; n < kQueries / 32; ++n) {
      uint32_t b[4];
      vs::load_matrix<4, false>(b, query + n * 16 * kScorePitch + k);
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      VS_UNROLL
      for (int m = 0; m < 2; ++m) {
        vs::mma<T>(scores[m][2 * n], a[m], low);
        vs::mma<T>(scores[m][2 * n + 1], a[m], high);
      }
    }
  }
}

// Products of 64 rows and a block of queries over one slice of the columns.
template <typename T, int kQueries>
VS_KERNEL void VS_BOUNDS(kScoreThreads, 2) adaptor_scores(Adaptor p, AdaptorPlan plan, int64_t chunk) {
  constexpr int kStage = (kScoreRows + kQueries) * kScorePitch;
  vs::Shared shared;
  uint16_t* stages = shared.array<uint16_t>(kScoreStages * kStage);
  const int64_t first_row = chunk * plan.chunk_rows + int64_t{vs::block_index().x} * kScoreRows;
  const int64_t first_query = int64_t{vs::block_index().y} * kQueries, slice = vs::block_index().z;

  bool used = false;  // rows outside every span are not read
  for (int64_t first = 0; first < p.P; first += vs::kWarpSize) {
    const int64_t s = first + vs::lane_index();
    const AdaptorRows rows = s < p.P ? adaptor_rows(p, plan, chunk, s) : AdaptorRows{0, 0};
    used |= vs::any(rows.first < rows.last && rows.first < first_row + kScoreRows && rows.last > first_row);
  }
  if (!used) return;

  const int64_t begin = slice * plan.slice_columns;
  const int64_t end = begin + plan.slice_columns < p.C ? begin + plan.slice_columns : p.C;
  const int64_t steps = (end - begin + kScoreColumns - 1) / kScoreColumns;
  const auto fetch = [&](int64_t step) {
    if (step < steps) {
      copy_score_stage<kQueries>(p, first_row, first_query, begin + step * kScoreColumns, end,
                                 stages + step % kScoreStages * kStage);
    }
    vs::copy_commit();
  };
  float scores[2][kQueries / 16][4] = {};
  for (int64_t step = 0; step < kScoreStages - 1; ++step) fetch(step);
  for (int64_t step = 0; step < steps; ++step) {
    vs::copy_wait<kScoreStages - 2>();
    vs::sync_block();  // this stage has come, and all warps are done with the one that is fetched next
    fetch(step + kScoreStages - 1);
    multiply_scores<T, kQueries>(scores, stages + step % kScoreStages * kStage);
  }
  vs::copy_wait<0>();

  const unsigned lane = vs::lane_index(), warp = vs::warp_index();
  float* out = plan.scores + slice * plan.chunk_rows * plan.padded + first_query + warp / 2 * (kQueries / 2) +
               lane % 4 * 2;
  VS_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + warp % 2 * 32 + i * 8 + lane / 4;
    if (row >= p.N) continue;
    float* place = out + (row - chunk * plan.chunk_rows) * plan.padded;
    VS_UNROLL
    for (int n = 0; n < kQueries / 16; ++n) {
      const float* pair = &scores[i / 2][n][i % 2 * 2];
      vs::store<vs::Word8>(place + n * 8, {{vs::bit_cast<uint32_t>(pair[0] * 1.44269504f),
                                            vs::bit_cast<uint32_t>(pair[1] * 1.44269504f)}});
    }
  }
}

// `combine` over the 32 threads of a block that share a query (thread % 8), in a fixed order.
template <typename Combine>
VS_DEVICE float combine_rows(float value, float* parts, Combine combine) {
  value = combine(value, vs::shuffle_xor(value, 8));
  value = combine(value, vs::shuffle_xor(value, 16));
  if (vs::lane_index() < kWeighQueries) parts[vs::warp_index() * kWeighQueries + vs::lane_index()] = value;
  vs::sync_block();
  value = parts[vs::lane_index() % kWeighQueries];
  for (unsigned warp = 1; warp < kWeighThreads / vs::kWarpSize; ++warp)
    value = combine(value, parts[warp * kWeighQueries + vs::lane_index() % kWeighQueries]);
  return value;
}

// The scores of a run become weights relative to its largest score, for 8 queries.
template <typename T>
VS_KERNEL void VS_BOUNDS(kWeighThreads, 2) adaptor_weigh(Adaptor p, AdaptorPlan plan, int64_t chunk) {
  constexpr int kStep = static_cast<int>(kWeighThreads) / kWeighQueries;
  vs::Shared shared;
  float* best_parts = shared.array<float>(kWeighThreads / vs::kWarpSize * kWeighQueries);
  float* total_parts = shared.array<float>(kWeighThreads / vs::kWarpSize * kWeighQueries);
  const int64_t number = vs::block_index().x;
  const AdaptorRun run = adaptor_run(p, plan, chunk, number);
  if (run.span < 0) return;
  const int64_t query = int64_t{vs::block_index().y} * kWeighQueries + vs::thread_index() % kWeighQueries;
  const int64_t chunk_start = chunk * plan.chunk_rows, slice = plan.chunk_rows * plan.padded;
  const auto score_of = [&](int64_t row) {
    const float* part = plan.scores + (row - chunk_start) * plan.padded + query;
    float sum = part[0];
    for (int64_t s = 1; s < plan.slices; ++s) sum += part[s * slice];
    return sum;
  };

  const int64_t first = run.first + vs::thread_index() / kWeighQueries;
  float best = -vs::infinity();
  for (int64_t row = first; row < run.last; row += kStep) {
    const float score = score_of(row);
    best = score > best ? score : best;
  }
  best = combine_rows(best, best_parts, [](float a, float b) { return b > a ? b : a; });
  float total = 0.0f;
  T* weights = static_cast<T*>(static_cast<void*>(plan.weights)) + run.span * slice + query;
  for (int64_t row = first; row < run.last; row += kStep) {
    const T weight = vs::from_float<T>(vs::exp2_fast(score_of(row) - best));
    weights[(row - chunk_start) * plan.padded] = weight;
    total += vs::to_float(weight);  // rounded: what the sums will hold, so that the shares make 1
  }
  total = combine_rows(total, total_parts, [](float a, float b) { return a + b; });
  if (vs::thread_index() < kWeighQueries) {
    const int64_t place = (chunk * plan.runs + number) * plan.padded + query;
    plan.maxima[place] = best;
    plan.totals[place] = total;
  }
}

// One stage: 256 columns of 32 rows, and the rows' weights. Beyond the run's last row or the last column:
// zeros, whatever lies there (NaN times 0 is NaN).
template <int kQueries>
VS_DEVICE void copy_sum_stage(const Adaptor& p, const AdaptorPlan& plan, const AdaptorRun& run, int64_t chunk,
                              int64_t first_row, int64_t column, int64_t first_query, uint16_t* rows,
                              uint16_t* weights) {
  constexpr int kUnits = kSumColumns / 8, kWeightUnits = kQueries / 8;
  for (int i = static_cast<int>(vs::thread_index()); i < kSumRows * kUnits;
       i += static_cast<int>(kSumThreads)) {
    const int64_t row = first_row + i / kUnits, at = column + i % kUnits * 8;
    const bool there = row < run.last && at < p.C;
    const uint16_t* source = static_cast<const uint16_t*>(p.rows) + (there ? row * p.row_stride + at : 0);
    vs::copy_async<16>(rows + i / kUnits * kSumPitch + i % kUnits * 8, source, there ? 16 : 0);
  }
  const uint16_t* from =
      plan.weights + (run.span * plan.chunk_rows - chunk * plan.chunk_rows) * plan.padded + first_query;
  for (int i = static_cast<int>(vs::thread_index()); i < kSumRows * kWeightUnits;
       i += static_cast<int>(kSumThreads)) {
    const bool there = first_row + i / kWeightUnits < run.last;
    const int64_t row = there ? first_row + i / kWeightUnits : run.first;
    vs::copy_async<16>(weights + i / kWeightUnits * (kQueries + 8) + i % kWeightUnits * 8,
                       from + row * plan.padded + i % kWeightUnits * 8, there ? 16 : 0);
  }
}

// Each of 8 warps: all queries of the block by 32 columns.
template <typename T, int kQueries>
VS_DEVICE void multiply_sums(float (&sums)[kQueries / 16][4][4], const uint16_t* rows,
                             const uint16_t* weights) {
  const unsigned lane = vs::lane_index();
  const uint16_t* weight = weights + (lane / 16 * 8 + lane % 8) * (kQueries + 8) + lane / 8 % 2 * 8;
  const uint16_t* row = rows + lane % 16 * kSumPitch + vs::warp_index() * 32 + lane / 16 * 8;
  VS_UNROLL
  for (int k = 0; k < kSumRows; k += 16) {
    uint32_t b[2][4];
    vs::load_matrix<4, true>(b[0], row + k * kSumPitch);
    vs::load_matrix<4, true>(b[1], row + k * kSumPitch + 16);
    VS_UNROLL
    for (int m = 0; m < kQueries / 16; ++m) {
      uint32_t a[4];
      vs::load_matrix<4, true>(a, weight + k * (kQueries + 8) + m * 16);
      VS_UNROLL
      for (int n = 0; n < 2; ++n) {
        const uint32_t low[2] = {b[n][0], b[n][1]}, high[2] = {b[n][2], b[n][3]};
        vs::mma<T>(sums[m][2 * n], a, low);
        vs::mma<T>(sums[m][2 * n + 1], a, high);
      }
    }
  }
}

// The weighted sums of one run's rows for a block of queries and 256 columns.
template <typename T, int kQueries>
VS_KERNEL void VS_BOUNDS(kSumThreads, kQueries > 64 ? 1 : 2)
    adaptor_sum(Adaptor p, AdaptorPlan plan, int64_t chunk) {
  constexpr int kRowStage = kSumRows * kSumPitch, kWeightStage = kSumRows * (kQueries + 8);
  vs::Shared shared;
  uint16_t* rows = shared.array<uint16_t>(kSumStages * kRowStage);
  uint16_t* weights = shared.array<uint16_t>(kSumStages * kWeightStage);
  const int64_t number = vs::block_index().x, column = int64_t{vs::block_index().y} * kSumColumns;
  const int64_t first_query = int64_t{vs::block_index().z} * kQueries;
  const AdaptorRun run = adaptor_run(p, plan, chunk, number);
  if (run.span < 0) return;

  const int64_t steps = (run.last - run.first + kSumRows - 1) / kSumRows;
  const auto fetch = [&](int64_t step) {
    if (step < steps) {
      copy_sum_stage<kQueries>(p, plan, run, chunk, run.first + step * kSumRows, column, first_query,
                               rows + step % kSumStages * kRowStage,
                               weights + step % kSumStages * kWeightStage);
    }
    vs::copy_commit();
  };
  float sums[kQueries / 16][4][4] = {};
  for (int64_t step = 0; step < kSumStages - 1; ++step) fetch(step);
  for (int64_t step = 0; step < steps; ++step) {
    vs::copy_wait<kSumStages - 2>();
    vs::sync_block();  // this stage has come, and all warps are done with the one that is fetched next
    fetch(step + kSumStages - 1);
    multiply_sums<T, kQueries>(sums, rows + step % kSumStages * kRowStage,
                               weights + step % kSumStages * kWeightStage);
  }
  vs::copy_wait<0>();

  const unsigned lane = vs::lane_index();
  const int64_t first_column = column + vs::warp_index() * 32 + lane % 4 * 2;
  VS_UNROLL
  for (int i = 0; i < kQueries / 8; ++i) {
    const int64_t query = first_query + i * 8 + lane / 4;
    if (query >= p.R) continue;
    float* out = plan.sums + ((chunk * plan.runs + number) * p.R + query) * p.C + first_column;
    VS_UNROLL
    for (int n = 0; n < 4; ++n) {
      const float* pair = &sums[i / 2][n][i % 2 * 2];
      if (first_column + n * 8 < p.C) {
        vs::store<vs::Word8>(out + n * 8,
                             {{vs::bit_cast<uint32_t>(pair[0]), vs::bit_cast<uint32_t>(pair[1])}});
      }
    }
  }
}

// One block a span, a query and 1024 columns: the span's runs, chunk after chunk in ascending order.
template <typename T>
VS_KERNEL void VS_BOUNDS(kMergeThreads, 2) adaptor_merge(Adaptor p, AdaptorPlan plan) {
  vs::Shared shared;
  const size_t most = static_cast<size_t>(plan.chunks * plan.workers);
  float* maxima = shared.array<float>(most);
  float* totals = shared.array<float>(most);
  int64_t* numbers = shared.array<int64_t>(most);
  const int64_t query = vs::block_index().y, span = vs::block_index().z;
  int64_t count = 0;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const AdaptorShare at = adaptor_share(p, plan, chunk, span);
    if (at.own == 0) continue;
    const int64_t first = at.before / at.share, last = (at.before + at.own - 1) / at.share;
    for (int64_t i = vs::thread_index(); i <= last - first; i += kMergeThreads) {
      const int64_t number = chunk * plan.runs + first + span + i;
      maxima[count + i] = plan.maxima[number * plan.padded + query];
      totals[count + i] = plan.totals[number * plan.padded + query];
      numbers[count + i] = number;
    }
    count += last - first + 1;
  }
  vs::sync_block();

  const int64_t column = int64_t{vs::block_index().x} * kMergeColumns + vs::thread_index() * 4;
  if (column >= p.C) return;
  float best = -vs::infinity(), total = 0.0f, sums[4] = {};
  for (int64_t i = 0; i < count; ++i) best = maxima[i] > best ? maxima[i] : best;
  for (int64_t i = 0; i < count; ++i) {
    const float weight = vs::exp2_fast(maxima[i] - best);
    const vs::Word16 part = vs::load<vs::Word16>(plan.sums + (numbers[i] * p.R + query) * p.C + column);
    total += weight * totals[i];
    VS_UNROLL
    for (int j = 0; j < 4; ++j) sums[j] += weight * vs::bit_cast<float>(part.v[j]);
  }
  uint32_t bits[4];
  VS_UNROLL
  for (int j = 0; j < 4; ++j) bits[j] = vs::from_float<T>(count > 0 ? vs::divide(sums[j], total) : 0.0f).bits;
  T* out = static_cast<T*>(p.output) + (span * p.R + query) * p.C + column;
  vs::store<vs::Word8>(out, {{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16}});
}

}  // namespace vispec::kernels
