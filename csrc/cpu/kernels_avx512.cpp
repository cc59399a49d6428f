// AVX-512 without bf16 instructions (Skylake and newer): 32 registers of 16 lanes. bf16 is widened to fp32, as on AVX2.
#include "cpu/kernel_table.h"

#ifdef LORASB_X86
#include <immintrin.h>

#include "cpu/target.h"

LORASB_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#include "cpu/vector_avx512.h"

namespace lorasb {

Kernels avx512_kernels() {
  Kernels k = common_kernels("AVX-512");
  k.pack_signs = pack_signs_avx512;
  return k;
}

}  // namespace lorasb

LORASB_TARGET_END
#endif
