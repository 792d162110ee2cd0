#include <stdexcept>
#include <string>

#include "accept.cuh"
#include "accept_filter.cuh"
#include "accept_list.cuh"
#include "accept_log_probabilities.cuh"

namespace vispec::cuda {
namespace {

template <typename T>
void run(const Accept& p) {
  const kernels::AcceptWorkspace work = kernels::accept_workspace(p);
  const unsigned B = static_cast<unsigned>(p.B), nodes = static_cast<unsigned>(p.T);
  const unsigned chunks = static_cast<unsigned>(kernels::accept_chunks(p.V));
  const auto words = [](size_t count) { return vs::shared_bytes<uint64_t>(count); };
  const size_t scan_bytes = words(kernels::kScanThreads / vs::kWarpSize);
  vs::launch("accept", kernels::accept_scan<T>, {chunks, nodes, B}, kernels::kScanThreads, scan_bytes,
             p.stream, p, work);
  if (p.do_sample != 0) {
    const size_t list_bytes = vs::shared_bytes<uint32_t>(chunks * kernels::kScanWarps) +
                              words(kernels::kShortList) + scan_bytes + words(1) +
                              vs::shared_bytes<uint32_t>(3);
    vs::launch("accept", kernels::accept_list<T>, {chunks, nodes, B}, kernels::kScanThreads, list_bytes,
               p.stream, p, work);
    vs::launch("accept", kernels::accept_filter<T>, {nodes, B, 1}, kernels::kFilterThreads,
               kernels::accept_filter_shared_bytes(), p.stream, p, work, chunks);
    vs::launch("accept", kernels::accept_weigh<T>, {chunks, nodes, B}, kernels::kScanThreads,
               scan_bytes + words(1), p.stream, p, work);
    vs::launch("accept", kernels::accept_choose<T>, {nodes, B, 1}, kernels::kChooseThreads,
               words(kernels::kChooseThreads) + 3 * words(1), p.stream, p, work, chunks);
  }
  vs::launch("accept", kernels::accept_walk, {B, 1, 1}, kernels::kWalkThreads,
             vs::shared_bytes<int>(kernels::kWalkThreads / vs::kWarpSize) + words(1), p.stream, p, work,
             chunks);
  if (p.log_probabilities != nullptr) {
    vs::launch("accept", kernels::accept_log_probabilities<T>, {static_cast<unsigned>(p.D), B, 1},
               kernels::kLogProbabilityThreads,
               words(kernels::kLogProbabilityThreads / vs::kWarpSize) + words(1), p.stream, p, work, chunks);
  }
}

}  // namespace

int64_t accept_workspace_bytes(int64_t B, int64_t T, int64_t V) {
  return static_cast<int64_t>(sizeof(uint64_t)) * kernels::accept_workspace_words(B, T, V);
}

void accept(const Accept& p) {
  if (p.V < 1 || p.V > kMaxVocabulary || p.T < 1 || p.workspace == nullptr) {
    throw std::invalid_argument(
        "accept: V must be from 1 to 524287, T at least 1 and workspace given, got V=" + std::to_string(p.V) +
        ", T=" + std::to_string(p.T) + (p.workspace == nullptr ? ", no workspace" : ""));
  }
  switch (p.dtype) {
    case DType::f32: return run<float>(p);
    case DType::f16: return run<vs::Half>(p);
    case DType::bf16: return run<vs::BFloat16>(p);
  }
}

}  // namespace vispec::cuda
