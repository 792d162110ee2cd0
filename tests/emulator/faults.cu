// Kernels with one fault each, which the emulator or a sanitizer must report, and their sound twins, which
// must run. Usage: faults NAME. Prints "ran" and returns 0 where nothing was reported.
#include <cmath>
#include <cstring>

#include "harness.h"

namespace {

using test::Buffer;

// Each thread writes its place and reads its neighbour's in the other half of the block.
template <bool kBarrier>
VS_KERNEL void exchange(int* out) {
  vs::Shared shared;
  int* values = shared.array<int>(64);
  const unsigned t = vs::thread_index();
  values[t] = static_cast<int>(t);
  if (kBarrier) vs::sync_block();
  out[t] = values[(t + 32) % 64];
}

// The same inside one warp; a shuffle orders no memory and must not stand in for the barrier.
template <bool kBarrier>
VS_KERNEL void exchange_in_warp(int* out) {
  vs::Shared shared;
  int* values = shared.array<int>(32);
  const unsigned t = vs::thread_index();
  values[t] = static_cast<int>(t);
  if (kBarrier) {
    vs::sync_warp();
  } else {
    vs::shuffle(0u, 0u);
  }
  out[t] = values[(t + 1) % 32];
}

// Reads of one round and writes of the next: the second barrier of a loop.
template <bool kBarrier>
VS_KERNEL void rounds(int* out) {
  vs::Shared shared;
  int* values = shared.array<int>(64);
  const unsigned t = vs::thread_index();
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    values[t] = round;
    vs::sync_block();
    sum += values[(t + 32) % 64];
    if (kBarrier) vs::sync_block();
  }
  out[t] = sum;
}

template <bool kOwnPlace>
VS_KERNEL void blocks_write(int* out) {
  if (vs::thread_index() == 0) out[kOwnPlace ? vs::block_index().x : 0] = 1;
}

// The last block sums what the others wrote; without the counter's ordering this is a race.
template <bool kOrdered>
VS_KERNEL void last_sums(uint32_t* counter, int* parts, int* out) {
  if (vs::thread_index() != 0) return;
  parts[vs::block_index().x] = 1;
  const bool last = kOrdered ? vs::arrive_last(counter, vs::grid_size().x)
                             : vs::atomic_add(counter, 1u) == vs::grid_size().x - 1;
  if (!last) return;
  for (unsigned b = 0; b < vs::grid_size().x; ++b) *out += parts[b];
}

// The same with barriers on the way, which order a block's own threads and no other's.
template <bool kOrdered>
VS_KERNEL void last_block_sums(uint32_t* counter, int* parts, int* out) {
  vs::Shared shared;
  int* last = shared.array<int>(1);
  const unsigned t = vs::thread_index(), blocks = vs::grid_size().x;
  if (t < 8) parts[vs::block_index().x * 8 + t] = 1;
  vs::sync_block();
  if (t == 0) *last = kOrdered ? vs::arrive_last(counter, blocks) : vs::atomic_add(counter, 1u) == blocks - 1;
  vs::sync_block();
  if (*last == 0 || t != 0) return;
  for (unsigned i = 0; i < blocks * 8; ++i) *out += parts[i];
}

VS_KERNEL void arrive(uint32_t* counter, int* out) {
  if (vs::thread_index() == 0 && vs::arrive_last(counter, vs::grid_size().x)) ++*out;
}

template <int kBeyond>
VS_KERNEL void overflow(int* out, int offset) {
  vs::Shared shared;
  int* first = shared.array<int>(5);
  int* second = shared.array<int>(8);
  const int t = static_cast<int>(vs::thread_index());
  if (t < 8) second[t] = t;
  if (t < 5) first[t + offset * kBeyond] = t;
  vs::sync_block();
  out[t] = first[t % 5] + second[t % 8];
}

VS_KERNEL void read_beyond(int* out, int offset) {
  vs::Shared shared;
  int* values = shared.array<int>(32);
  const int t = static_cast<int>(vs::thread_index());
  values[t] = t;
  vs::sync_block();
  out[t] = values[t + offset];
}

VS_KERNEL void carve(int* out, int count) {
  vs::Shared shared;
  out[vs::thread_index()] = shared.array<int>(static_cast<size_t>(count)) != nullptr;
}

VS_KERNEL void carve_differently(int* out) {
  vs::Shared shared;
  out[vs::thread_index()] = shared.array<int>(vs::thread_index() < 8 ? 4 : 8) != nullptr;
}

VS_KERNEL void unset_shared(int* out) {
  vs::Shared shared;
  const float* values = shared.array<float>(32);
  out[vs::thread_index()] = std::isnan(values[vs::thread_index()]) ? 1 : 0;
}

VS_KERNEL void split_collective(int* out) {
  const int t = static_cast<int>(vs::thread_index());
  if (t % 32 < 16) {
    out[t] = vs::shuffle(t, 0u);
  } else {
    out[t] = vs::shuffle(t, 1u);
  }
}

VS_KERNEL void vote_against_shuffle(int* out) {
  const int t = static_cast<int>(vs::thread_index());
  // clang-format off
  out[t] = t % 2 == 0 ? vs::shuffle(t, 0u) : static_cast<int>(vs::ballot(true));
  // clang-format on
}

VS_KERNEL void half_warp_shuffles(int* out) {
  const int t = static_cast<int>(vs::thread_index());
  out[t] = t % 32 < 16 ? vs::shuffle(t, 0u) : t;
}

VS_KERNEL void two_barriers(int* out) {
  if (vs::thread_index() < 32) {
    vs::sync_block();
  } else {
    vs::sync_block();
  }
  out[vs::thread_index()] = 1;
}

VS_KERNEL void early_exit(int* out) {
  if (vs::thread_index() >= 32) return;
  vs::sync_block();
  out[vs::thread_index()] = 1;
}

VS_KERNEL void vector_at(const uint32_t* in, uint32_t* out, int offset) {
  vs::store<vs::Word16>(out + 4 * vs::thread_index(),
                        vs::load<vs::Word16>(in + 4 * vs::thread_index() + offset));
}

template <bool kWait>
VS_KERNEL void copy(const float* in, int* out) {
  vs::Shared shared;
  float* values = shared.array<float>(32);
  const unsigned t = vs::thread_index();
  values[t] = 0.0f;
  vs::copy_async<4>(values + t, in + t, 4);
  vs::copy_commit();
  if (kWait) vs::copy_wait<0>();
  out[t] = std::isnan(values[t]) ? 0 : 1;
}

VS_KERNEL void copy_at(const uint32_t* in, int* out, int offset) {
  vs::Shared shared;
  uint32_t* values = shared.array<uint32_t>(4 * 32);
  vs::copy_async<16>(values + 4 * vs::thread_index(), in + offset, 16);
  vs::copy_commit();
  vs::copy_wait<0>();
  out[vs::thread_index()] = static_cast<int>(values[4 * vs::thread_index()]);
}

// Whether every thread wrote 1.
bool all_ones(Buffer<int>& out, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (out[i] != 1) return false;
  }
  return true;
}

bool run(const char* name) {
  Buffer<int> out(64), parts(64);
  Buffer<uint32_t> counter(1), words(4 * 64 + 4), stored(4 * 64);
  Buffer<float> floats(64, 1.0f);
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  const auto on = [&](void (*kernel)(int*), unsigned threads, size_t ints) {
    test::run(kernel, {1, 1, 1}, threads, vs::shared_bytes<int>(ints), out.get());
    return true;
  };
  const size_t two_arrays = vs::shared_bytes<int>(5) + vs::shared_bytes<int>(8);
  if (is("barrier")) return on(exchange<true>, 64, 64);
  if (is("no_barrier")) return on(exchange<false>, 64, 64);
  if (is("warp_barrier")) return on(exchange_in_warp<true>, 32, 32);
  if (is("no_warp_barrier")) return on(exchange_in_warp<false>, 32, 32);
  if (is("loop_barriers")) return on(rounds<true>, 64, 64);
  if (is("no_loop_barrier")) return on(rounds<false>, 64, 64);
  if (is("own_places")) return test::run(blocks_write<true>, {8, 1, 1}, 32, 0, out.get()), true;
  if (is("same_place")) return test::run(blocks_write<false>, {8, 1, 1}, 32, 0, out.get()), true;
  if (is("ordered_counter") || is("relaxed_counter")) {
    const auto kernel = is("ordered_counter") ? last_sums<true> : last_sums<false>;
    test::run(kernel, {8, 1, 1}, 32, 0, counter.get(), parts.get(), out.get());
    return out[0] == 8;
  }
  if (is("fenced_blocks") || is("unfenced_blocks")) {
    const auto kernel = is("fenced_blocks") ? last_block_sums<true> : last_block_sums<false>;
    test::run(kernel, {8, 1, 1}, 64, vs::shared_bytes<int>(1), counter.get(), parts.get(), out.get());
    return out[0] == 64;
  }
  if (is("counter_used_again") || is("counter_not_clear")) {
    counter[0] = is("counter_not_clear") ? 8 : 0;
    for (int launch = 0; launch < 2; ++launch) {
      test::run(arrive, {8, 1, 1}, 32, 0, counter.get(), out.get());
    }
    return out[0] == 2;
  }
  if (is("inside")) return test::run(overflow<0>, {1, 1, 1}, 32, two_arrays, out.get(), 1), true;
  if (is("one_beyond")) return test::run(overflow<1>, {1, 1, 1}, 32, two_arrays, out.get(), 1), true;
  if (is("one_before")) return test::run(overflow<1>, {1, 1, 1}, 32, two_arrays, out.get(), -1), true;
  if (is("read_beyond")) {
    return test::run(read_beyond, {1, 1, 1}, 32, vs::shared_bytes<int>(32), out.get(), 1), true;
  }
  if (is("carve_too_much")) return test::run(carve, {1, 1, 1}, 32, size_t{64}, out.get(), 17), true;
  if (is("carve_all")) return test::run(carve, {1, 1, 1}, 32, size_t{64}, out.get(), 16), all_ones(out, 32);
  if (is("carve_differently")) return on(carve_differently, 32, 8);
  if (is("unset_shared")) return on(unset_shared, 32, 32), all_ones(out, 32);
  if (is("split_collective")) return on(split_collective, 32, 0);
  if (is("vote_against_shuffle")) return on(vote_against_shuffle, 32, 0);
  if (is("half_warp_shuffles")) return on(half_warp_shuffles, 32, 0);
  if (is("two_barriers")) return on(two_barriers, 64, 0);
  if (is("early_exit")) return on(early_exit, 64, 0);
  if (is("vector_at_4") || is("vector_at_0")) {
    test::run(vector_at, {1, 1, 1}, 32, 0, words.get(), stored.get(), is("vector_at_4") ? 1 : 0);
    return true;
  }
  if (is("copy_waited") || is("copy_not_waited")) {
    test::run(is("copy_waited") ? copy<true> : copy<false>, {1, 1, 1}, 32, vs::shared_bytes<float>(32),
              floats.get(), out.get());
    return all_ones(out, 32);
  }
  if (is("copy_at_4")) {
    return test::run(copy_at, {1, 1, 1}, 32, vs::shared_bytes<uint32_t>(128), words.get(), out.get(), 1),
           true;
  }
  if (is("too_many_threads")) return on(exchange<true>, 1056, 1056);
  if (is("partial_warp")) return on(exchange<true>, 48, 64);
  std::fprintf(stderr, "unknown case %s\n", name);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  if (!run(argv[1])) {
    std::fprintf(stderr, "wrong result\n");
    return 3;
  }
  std::printf("ran\n");
  return 0;
}
