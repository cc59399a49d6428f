#include "cpu/dispatch.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#ifdef LORASB_X86
#include <cpuid.h>
#endif

namespace lorasb {
namespace {

// LORASB_MAX_CPU_ISA leaves out what is better than it names: to try what a lesser processor does, and for tests.
const char* const kCaps[] = {"amx", "avx512_bf16", "avx512", "avx2", "portable"};

// How many instruction sets, the best first, the cap leaves out.
int capped() {
  const char* cap = std::getenv(kCapVariable);
  if (cap == nullptr || *cap == '\0') return 0;
  for (int i = 0; i < 5; ++i) {
    if (std::strcmp(cap, kCaps[i]) == 0) return i;
  }
  TORCH_CHECK_VALUE(false, "expected ", kCapVariable, " to be amx, avx512_bf16, avx512, avx2 or portable, got '", cap,
                    "'");
}

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#ifdef LORASB_X86
  const int cap = capped();
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef LORASB_AMX
  if (cap < 1 && avx512 && __builtin_cpu_supports("avx512bf16") && has_matrix_tiles() && may_use_tiles()) {
    found.push_back(&amx_kernels());
  }
#endif
  if (cap < 2 && avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16_kernels());
  if (cap < 3 && avx512) found.push_back(&avx512_kernels());
  if (cap < 4 && avx2) found.push_back(&avx2_kernels());
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

bool multiplies_fp16() {
#ifdef LORASB_X86
  static const bool native = [] {
    constexpr unsigned kAvx512Fp16 = 1u << 23;
    unsigned a = 0, b = 0, c = 0, d = 0;
    return capped() == 0 && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAvx512Fp16) != 0;
  }();
  return native;
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
