// AVX-512 without bf16 instructions (Skylake and newer).
#include "kernels.h"

#ifdef LORASB_X86
#include <immintrin.h>

#include "target.h"

LORASB_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#include "vector_avx512.h"

namespace lorasb {

const Kernels& avx512_kernels() {
  static const Kernels kernels = {"AVX-512",      decode<F32>,       decode<BF16>, decode<F16>, dot,
                                  dot_transposed, nullptr,           nullptr,      nullptr,     nullptr,
                                  nullptr,        pack_signs_avx512, nullptr};
  return kernels;
}

}  // namespace lorasb

LORASB_TARGET_END
#endif
