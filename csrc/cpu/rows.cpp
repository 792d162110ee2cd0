#include "cpu/rows.h"

#include <cstdlib>
#include <cstring>

namespace vispec::cpu {
namespace {

#define VISPEC_LEVEL_TABLE(level)                                       \
  {#level,      level::scan, level::argmax, level::scale, level::weigh, \
   level::norm, level::silu, level::turn,   level::attend}

constexpr RowFunctions kPortable = VISPEC_LEVEL_TABLE(portable);

#if defined(VISPEC_X86_LEVELS)
constexpr RowFunctions kAvx2 = VISPEC_LEVEL_TABLE(avx2);
constexpr RowFunctions kAvx512 = VISPEC_LEVEL_TABLE(avx512);

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// VISPEC_CPU=portable|avx2|avx512 takes one by name where the machine has it, so that tests reach all of
// them.
const RowFunctions& choose() {
#if defined(VISPEC_X86_LEVELS)
  const char* name = std::getenv("VISPEC_CPU");
  const auto wanted = [name](const char* level) { return name == nullptr || std::strcmp(name, level) == 0; };
  if (has_avx512() && wanted("avx512")) return kAvx512;
  if (has_avx2() && wanted("avx2")) return kAvx2;
#endif
  return kPortable;
}

}  // namespace

const RowFunctions& rows() {
  static const RowFunctions& chosen = choose();
  return chosen;
}

}  // namespace vispec::cpu
