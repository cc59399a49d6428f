#include "cpu/dispatch.h"

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#ifdef LORASB_X86
#include <cpuid.h>
#endif

namespace lorasb {
namespace {

// Values of LORASB_MAX_CPU_ISA, the best first. It leaves out every instruction set that is better than the one it
// names: for tests, and to see what a less capable processor does.
const char* const kCaps[] = {"amx", "avx512_bf16", "avx512", "avx2", "portable"};

// How many of kCaps the variable leaves out.
int capped() {
  const char* cap = std::getenv("LORASB_MAX_CPU_ISA");
  if (cap == nullptr || *cap == '\0') return 0;
  for (int i = 0; i < 5; ++i) {
    if (std::strcmp(cap, kCaps[i]) == 0) return i;
  }
  TORCH_CHECK_VALUE(false, "expected LORASB_MAX_CPU_ISA to be amx, avx512_bf16, avx512, avx2 or portable, got '", cap,
                    "'");
}

std::vector<Kernels> available() {
  std::vector<Kernels> tables;
#ifdef LORASB_X86
  const int cap = capped();
  __builtin_cpu_init();
  // All or nothing: a processor with only AVX-512F gets AVX2, since the kernels need BW, VL and DQ, too.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef LORASB_AMX
  if (cap < 1 && avx512_bf16 && has_amx() && amx_permitted()) tables.push_back(amx_kernels());
#endif
  if (cap < 2 && avx512_bf16) tables.push_back(avx512_bf16_kernels());
  if (cap < 3 && avx512) tables.push_back(avx512_kernels());
  if (cap < 4 && avx2) tables.push_back(avx2_kernels());
#endif
  tables.push_back(portable_kernels());
  return tables;
}

const std::vector<Kernels>& all() {
  static const std::vector<Kernels> tables = available();
  return tables;
}

std::atomic<const Kernels*> chosen{nullptr};  // null: the best one

// A bit of EDX in CPUID leaf 7.
bool has_feature(int bit) {
#ifdef LORASB_X86
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && ((d >> bit) & 1) != 0;
#else
  return false;
#endif
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  return table != nullptr ? *table : all().front();
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& table : all()) names.emplace_back(table.name);
  return names;
}

bool has_amx() {
  static const bool amx = has_feature(22);  // AMX-BF16
  return amx;
}

bool multiplies_fp16() {
  static const bool native = capped() == 0 && has_feature(23);  // AVX512-FP16
  return native;
}

void use_instruction_set(const std::string& name) {
  for (const Kernels& table : all()) {
    if (name.empty() || name == table.name) return chosen.store(&table, std::memory_order_relaxed);
  }
  TORCH_CHECK_VALUE(false, "this processor has no instruction set '", name, "', expected one of ",
                    c10::ArrayRef<std::string>(instruction_sets()));
}

}  // namespace lorasb
