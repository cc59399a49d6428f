// AVX-512 without bf16 instructions (Skylake and newer).
#include "kernels.h"

#ifdef LORASB_X86
#include <immintrin.h>

#include "target.h"

LORASB_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#include "vector_avx512.h"

namespace lorasb {

const Kernels& avx512_kernels() {
  static const Kernels kernels = [] {
    Kernels k;
    k.name = "AVX-512";
    k.decode_f32 = decode<F32>;
    k.decode_bf16 = decode<BF16>;
    k.decode_f16 = decode<F16>;
    k.dot = dot;
    k.dot_transposed = dot_transposed;
    k.pack_signs = pack_signs_avx512;
    return k;
  }();
  return kernels;
}

}  // namespace lorasb

LORASB_TARGET_END
#endif
