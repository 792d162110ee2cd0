// Threads of our own for the CPU ops.
//
// Why not OpenMP: torch ships its own copy of the OpenMP library; a second copy in this module would bring a
// second set of spinning threads to the same cores. These threads sleep between calls, and a call never waits
// for one that has not started: on a busy machine the caller simply does all the work itself.
#pragma once

#include <cstdint>
#include <functional>

namespace vispec::cpu {

// Most threads that one call may use, the caller included.
void set_num_threads(int count);
int num_threads();

// body(i) for every i in [0, count), in any order, on up to num_threads() threads; returns when all are done.
// Runs on the caller alone when nested or when another thread uses the pool. `body` must not throw.
void parallel_for(int64_t count, const std::function<void(int64_t)>& body);

}  // namespace vispec::cpu
