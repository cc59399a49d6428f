#include "isa.h"

#include <atomic>

#ifdef LORASB_X86
#include <cpuid.h>
#endif

namespace lorasb {
namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#ifdef LORASB_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef LORASB_AMX
  if (avx512 && __builtin_cpu_supports("avx512bf16") && has_matrix_tiles() && may_use_tiles()) {
    found.push_back(&amx_kernels());
  }
#endif
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16_kernels());
  if (avx512) found.push_back(&avx512_kernels());
  if (avx2) found.push_back(&avx2_kernels());
#endif
  found.push_back(&portable_kernels());
  return found;
}

const std::vector<const Kernels*>& all() {
  static const std::vector<const Kernels*> found = available();
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_relaxed);
  return found != nullptr ? *found : *all().front();
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* each : all()) names.emplace_back(each->name);
  return names;
}

bool has_matrix_tiles() {
#ifdef LORASB_X86
  static const bool found = [] {
    constexpr unsigned kAmxBf16 = 1u << 22;
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAmxBf16) != 0;
  }();
  return found;
#else
  return false;
#endif
}

bool use_instruction_set(const std::string& name) {
  for (const Kernels* each : all()) {
    if (name.empty() || name == each->name) {
      chosen.store(name.empty() ? nullptr : each, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace lorasb
