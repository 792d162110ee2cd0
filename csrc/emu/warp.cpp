#include "emu/scheduler.h"

namespace vs::emu {
namespace {

VS_RAW float float_of_bits(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } pun{bits};
  return pun.value;
}

VS_RAW float float_of_half(uint32_t half, bool bf16) {
  half &= 0xFFFF;
  if (bf16) return float_of_bits(half << 16);
  const uint32_t sign = (half & 0x8000) << 16;
  const uint32_t rest = half & 0x7FFF;
  if (rest >= 0x7C00) return float_of_bits(sign | 0x7F800000 | ((rest & 0x3FF) << 13));
  // Exponents differ by 112; multiplying by 2^112 also brings subnormals out right.
  const float magnitude = float_of_bits(rest << 13) * 0x1p112f;
  return sign != 0 ? -magnitude : magnitude;
}

}  // namespace

VS_RAW uint64_t shuffle(uint64_t value, unsigned source_lane, Site site) {
  slots(warp_phase())[self().thread % kWarp].word = value;
  const unsigned phase = meet_warp(Kind::shuffle, site, false);
  return slots(phase)[source_lane % kWarp].word;
}

VS_RAW uint32_t ballot(bool vote, Site site) {
  slots(warp_phase())[self().thread % kWarp].word = vote ? 1 : 0;
  const unsigned phase = meet_warp(Kind::ballot, site, false);
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (slots(phase)[lane].word != 0) votes |= 1u << lane;
  }
  return votes;
}

VS_RAW void spread_matrix(uint32_t* out, const uint32_t* row, int matrices, bool transposed, Site site) {
  const unsigned lane = self().thread % kWarp;
  Slot& mine = slots(warp_phase())[lane];
  for (int i = 0; i < 4; ++i) mine.row[i] = row[i];
  const Slot* all = slots(meet_warp(Kind::load_matrix, site, false));
  for (int m = 0; m < matrices; ++m) {
    uint32_t pair = 0;
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned r = transposed ? lane % 4 * 2 + half : lane / 4;
      const unsigned c = transposed ? lane / 4 : lane % 4 * 2 + half;
      pair |= ((all[8 * m + r].row[c / 2] >> (c % 2 * 16)) & 0xFFFF) << (half * 16);
    }
    out[m] = pair;
  }
}

VS_RAW void mma_16x8x16(float* d, const uint32_t* a, const uint32_t* b, bool bf16, Site site) {
  const unsigned lane = self().thread % kWarp;
  Slot& mine = slots(warp_phase())[lane];
  for (int i = 0; i < 4; ++i) {
    mine.operands[2 * i] = float_of_half(a[i], bf16);
    mine.operands[2 * i + 1] = float_of_half(a[i] >> 16, bf16);
  }
  for (int i = 0; i < 2; ++i) {
    mine.operands[8 + 2 * i] = float_of_half(b[i], bf16);
    mine.operands[9 + 2 * i] = float_of_half(b[i] >> 16, bf16);
  }
  const Slot* all = slots(meet_warp(Kind::mma, site, false));
  // Lane 4g + t holds A[g | g+8][2t, 2t+1 | 2t+8, 2t+9] in the order (g, lo) (g+8, lo) (g, hi) (g+8, hi),
  // B[2t, 2t+1 | 2t+8, 2t+9][g], and D[g | g+8][2t, 2t+1].
  const unsigned g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned below = i / 2;
    const unsigned column = 2 * t + i % 2;
    float sum = d[i];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned high = k / 8, owner = k % 8 / 2, odd = k % 2;
      const float left = all[4 * g + owner].operands[4 * high + 2 * below + odd];
      const float right = all[4 * column + owner].operands[8 + 2 * high + odd];
      sum += left * right;
    }
    d[i] = sum;
  }
}

VS_RAW void queue_copy(AsyncCopy copy, Site site) {
  Fiber& me = self();
  if (me.copies == kMaxCopies) fail(site, "more than 128 asynchronous copies in flight in one thread");
  copy.group = me.groups;
  me.queue[(me.first_copy + me.copies++) % kMaxCopies] = copy;
}

VS_RAW void commit_copies() { ++self().groups; }

VS_RAW bool finish_copy(unsigned pending, AsyncCopy* copy) {
  Fiber& me = self();
  if (me.copies == 0) return false;
  const AsyncCopy& oldest = me.queue[me.first_copy];
  if (oldest.group + pending >= me.groups) return false;
  *copy = oldest;
  me.first_copy = (me.first_copy + 1) % kMaxCopies;
  --me.copies;
  return true;
}

}  // namespace vs::emu
