// Where top-k and top-p cut a row of scores, exactly: one block a row, which nearly always finds both cuts
// among the few tokens that accept_list has listed, and otherwise reads the row.
//
// Both cuts are "the first token, in ascending (score, index) order, at which a running sum exceeds a limit":
// a sum of ones for top-k, of weights for top-p. For a row that is not listed, one pass sorts tokens into
// bins by their distance from the best (linear in the logit, so that neighbours in time rarely share a bin:
// 150k atomics on one address would take over 100 microseconds); the bin in which the sum crosses is listed
// and searched byte by byte. Tokens 32 or more below the best weigh nothing and need no bin.
#pragma once

#include "accept.cuh"

namespace vispec::kernels {

constexpr uint32_t kFilterThreads = 512;
constexpr uint32_t kBins = 1024;
constexpr float kBinsPerUnit = 32.0f;
constexpr uint32_t kFilterList = 2048;

inline size_t accept_filter_shared_bytes() {
  return 2 * vs::shared_bytes<uint64_t>(kBins) + vs::shared_bytes<uint64_t>(kFilterList) +
         vs::shared_bytes<uint64_t>(256) + vs::shared_bytes<uint64_t>(4) +
         vs::shared_bytes<uint64_t>(kFilterThreads / vs::kWarpSize);
}

template <typename T>
struct FilterRow {
  const T* logits;
  uint32_t V;
  float temperature, best;
  uint64_t* list;     // [kFilterList]
  uint64_t* digits;   // [256]
  uint64_t* state;    // [4] listed, bits seen one, bits seen zero, crossing
  uint64_t* scratch;  // [warps]

  // Bins ascend with the score; kBins for a token that weighs nothing.
  VS_DEVICE uint32_t bin(float score) const {
    const float distance = best - score;
    return distance < 32.0f ? kBins - 1 - static_cast<uint32_t>(distance * kBinsPerUnit) : kBins;
  }
  VS_DEVICE float score(float logit) const { return vs::divide(logit, temperature); }
  VS_DEVICE uint64_t weight(uint64_t key) const {
    return static_cast<uint64_t>(token_weight(key_value(static_cast<uint32_t>(key >> 32)) - best));
  }

  // f(filter key) for the tokens of one bin that are not below `cut`, read from the row.
  template <typename F>
  VS_DEVICE void each_in_row(uint32_t wanted, uint64_t cut, F&& f) const {
    for_each_column(logits, 0, V, [&](float x, uint32_t column) {
      const float s = score(x);
      const uint64_t key = filter_key(order_key(s), column);
      if (bin(s) == wanted && key >= cut) f(key);
    });
  }
  // The same from the list, where it was long enough.
  template <typename F>
  VS_DEVICE void each(uint32_t wanted, uint64_t cut, uint64_t listed, F&& f) const {
    if (listed > kFilterList) {
      each_in_row(wanted, cut, f);
      return;
    }
    for (uint32_t i = vs::thread_index(); i < listed; i += vs::thread_count()) {
      if (list[i] >= cut) f(list[i]);
    }
  }

  // Lists the tokens of one bin; returns how many there are, which may be more than fit.
  VS_DEVICE uint64_t gather(uint32_t wanted, uint64_t cut) const {
    if (vs::thread_index() == 0) state[0] = state[1] = state[2] = 0;
    vs::sync_block();
    uint64_t ones = 0, zeros = 0;
    each_in_row(wanted, cut, [&](uint64_t key) {
      const uint64_t place = vs::atomic_add(&state[0], uint64_t{1});
      if (place < kFilterList) list[place] = key;
      ones |= key;
      zeros |= ~key;
    });
    vs::atomic_or(&state[1], ones);
    vs::atomic_or(&state[2], zeros);
    vs::sync_block();
    return state[0];
  }

  // The first token of the gathered bin at which the running sum of `amount` exceeds `limit`; with kKeysOnly
  // only its score's half of the filter key (the rest 0).
  template <bool kKeysOnly, typename Amount>
  VS_DEVICE uint64_t select(uint32_t wanted, uint64_t cut, uint64_t listed, uint64_t limit,
                            Amount&& amount) const {
    const uint64_t ones = state[1], differing = state[1] & state[2];
    uint64_t found = 0;
    for (int shift = 56; shift >= (kKeysOnly ? 32 : 0); shift -= 8) {
      if ((differing >> shift & 255u) == 0) {
        found |= ones & uint64_t{255} << shift;
        continue;
      }
      for (uint32_t i = vs::thread_index(); i < 256; i += vs::thread_count()) digits[i] = 0;
      vs::sync_block();
      each(wanted, cut, listed, [&](uint64_t key) {
        // Only tokens that agree with what has been found above this byte.
        if (((key ^ found) >> shift) < 256u) vs::shared_add(&digits[key >> shift & 255u], amount(key));
      });
      vs::sync_block();
      if (vs::warp_index() == 0) {
        const Crossing at = find_crossing(digits, 256, limit);
        vs::sync_warp();
        if (vs::thread_index() == 0) {
          state[3] = at.bin;
          digits[0] = at.below;  // the bytes' sums are done with
        }
      }
      vs::sync_block();
      found |= state[3] << shift;
      limit -= digits[0];
      vs::sync_block();
    }
    return found;
  }
};

// The crossing of some bins, found by the first warp and known to every thread.
VS_DEVICE Crossing block_crossing(const uint64_t* bins, uint32_t count, uint64_t limit, uint64_t* pair) {
  if (vs::warp_index() == 0) {
    const Crossing at = find_crossing(bins, count, limit);
    if (vs::lane_index() == 0) {
      pair[0] = at.bin;
      pair[1] = at.below;
    }
  }
  vs::sync_block();
  const Crossing at{static_cast<uint32_t>(pair[0]), pair[1]};
  vs::sync_block();
  return at;
}

VS_DEVICE uint64_t bins_total(const uint64_t* bins, uint64_t* scratch) {
  uint64_t sum = 0;
  for (uint32_t i = vs::thread_index(); i < kBins; i += vs::thread_count()) sum += bins[i];
  return block_sum(sum, scratch);
}

// What top-p removes at most of a mass, so that its last token stays.
VS_DEVICE uint64_t mass_limit(float top_p, uint64_t mass) {
  const double removed = (1.0 - static_cast<double>(top_p)) * static_cast<double>(mass);
  return removed < static_cast<double>(mass - 1) ? static_cast<uint64_t>(removed) : mass - 1;
}

// Both cuts found among the listed tokens, which is nearly always possible: false where the list is too long,
// or the mass is cut below it.
template <typename T>
VS_DEVICE bool cut_listed(const Accept& p, const AcceptWorkspace& work, const FilterRow<T>& row, int64_t b,
                          int64_t t, uint32_t chunks, uint64_t* ascending, uint64_t* weights, uint64_t* cut) {
  const int64_t out = b * p.T + t;
  const Cuts cuts = row_cuts(p, b);
  const uint32_t thread = vs::thread_index();
  if (work.listed[out] > kShortList) return false;
  const uint32_t listed = static_cast<uint32_t>(work.listed[out]);
  if (thread < listed) row.list[thread] = work.list[out * kShortList + thread];
  vs::sync_block();
  if (thread < listed) {
    uint32_t below = 0;
    for (uint32_t i = 0; i < listed; ++i) below += row.list[i] < row.list[thread];
    ascending[below] = row.list[thread];
  }
  vs::sync_block();
  *cut = cuts.by_count ? ascending[listed - p.top_k[b]] >> 32 << 32 : 0;
  if (!cuts.by_mass) return true;
  const uint64_t own = thread < listed && ascending[thread] >= *cut ? row.weight(ascending[thread]) : 0;
  if (thread < listed) weights[thread] = own;
  const uint64_t above = block_sum(own, row.scratch);
  uint64_t mass = above;
  if (!cuts.by_count) {
    mass = 0;
    for (uint32_t c = thread; c < chunks; c += kFilterThreads) mass += work.sums[out * chunks + c];
    mass = block_sum(mass, row.scratch);
  }
  const uint64_t limit = mass_limit(p.top_p[b], mass);
  if (mass - above > limit) return false;
  *cut = ascending[block_crossing(weights, listed, limit - (mass - above), row.digits).bin];
  return true;
}

// The same from the row itself.
template <typename T>
VS_DEVICE uint64_t cut_row(const Accept& p, const FilterRow<T>& row, int64_t b, uint64_t* counts,
                           uint64_t* masses) {
  const Cuts cuts = row_cuts(p, b);
  const uint32_t thread = vs::thread_index();
  for (uint32_t i = thread; i < kBins; i += kFilterThreads) counts[i] = masses[i] = 0;
  vs::sync_block();
  for_each_column(row.logits, 0, row.V, [&](float x, uint32_t column) {
    const float score = row.score(x);
    const uint32_t bin = row.bin(score);
    if (bin == kBins) return;
    vs::shared_add(&counts[bin], uint64_t{1});
    if (cuts.by_mass) vs::shared_add(&masses[bin], row.weight(filter_key(order_key(score), column)));
  });
  vs::sync_block();
  uint64_t cut = 0;
  const uint64_t total = bins_total(counts, row.scratch), k = static_cast<uint64_t>(p.top_k[b]);
  if (cuts.by_count && k < total) {  // otherwise only weightless tokens fall
    const Crossing at = block_crossing(counts, kBins, total - k, row.digits);
    const uint64_t listed = row.gather(at.bin, 0);
    cut = row.template select<true>(at.bin, 0, listed, total - k - at.below,
                                    [](uint64_t) { return uint64_t{1}; });
    // What the cut takes from the masses.
    uint64_t left = 0;
    row.each(at.bin, cut, listed, [&](uint64_t key) { left += row.weight(key); });
    left = block_sum(left, row.scratch);
    for (uint32_t i = thread; i <= at.bin; i += kFilterThreads) masses[i] = i < at.bin ? 0 : left;
    vs::sync_block();
  }
  if (!cuts.by_mass) return cut;
  const uint64_t limit = mass_limit(p.top_p[b], bins_total(masses, row.scratch));
  const Crossing at = block_crossing(masses, kBins, limit, row.digits);
  const uint64_t listed = row.gather(at.bin, cut);
  return row.template select<false>(at.bin, cut, listed, limit - at.below,
                                    [&](uint64_t key) { return row.weight(key); });
}

template <typename T>
VS_KERNEL void VS_BOUNDS(kFilterThreads, 1) accept_filter(Accept p, AcceptWorkspace work, uint32_t chunks) {
  vs::Shared shared;
  uint64_t* counts = shared.array<uint64_t>(kBins);
  uint64_t* masses = shared.array<uint64_t>(kBins);
  FilterRow<T> row;
  row.list = shared.array<uint64_t>(kFilterList);
  row.digits = shared.array<uint64_t>(256);
  row.state = shared.array<uint64_t>(4);
  row.scratch = shared.array<uint64_t>(kFilterThreads / vs::kWarpSize);
  const int64_t t = vs::block_index().x, b = vs::block_index().y;
  if (!emits(p, b)) return;
  const uint32_t thread = vs::thread_index();
  const int64_t out = b * p.T + t;
  const Cuts cuts = row_cuts(p, b);
  if (vs::warp_index() == 0) {
    const uint64_t rank = row_best(work.best + out * chunks, chunks);
    if (thread == 0) row.state[0] = rank;
  }
  vs::sync_block();
  const Best best = best_score(row.state[0], p.temperature[b]);
  uint64_t cut = 0;
  if (best.usable && (cuts.by_count || cuts.by_mass)) {
    row.logits = accept_row<T>(p, b, t);
    row.V = static_cast<uint32_t>(p.V);
    row.temperature = p.temperature[b];
    row.best = best.score;
    if (!cut_listed(p, work, row, b, t, chunks, counts, masses, &cut))
      cut = cut_row(p, row, b, counts, masses);
  }
  if (thread == 0) work.cuts[out] = cut;
}

}  // namespace vispec::kernels
