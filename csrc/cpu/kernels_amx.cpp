// AMX: products of 16 x 32 tiles in bf16 (Sapphire Rapids and newer). AVX-512 does the packing and everything else.
//
// A tile register is 16 rows of 64 bytes. The micro-kernel's tile of C, up to 32 tokens by 32 columns, is four of them:
//
//                          W columns 0-15 (tmm6)   W columns 16-31 (tmm7)
//   tokens 0-15   (tmm4)   tmm0                    tmm1
//   tokens 16-31  (tmm5)   tmm2                    tmm3
//
// A step of 32 elements of k is one TDPBF16PS for each of the four; its operands are a step of the packed micro-panels
// (cpu/bf16_microkernel.h), read in place. Rows of tokens that do not exist are multiplied as well; their sums go to
// rows of the scratch sums that are never read.
#include "cpu/kernel_table.h"

#ifdef LORASB_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/target.h"

LORASB_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")

namespace lorasb {
namespace {

constexpr int kAmxMr = 32;                       // tokens of a tile of C: the rows of two registers
constexpr int kHalfTokens = 16 * kBf16KStep;     // bf16 of one register of tokens
constexpr int kTokenStep = kAmxMr * kBf16KStep;  // of one step of a micro-panel of tokens
constexpr int kStepSize = kBf16KStep * kBf16Nr;  // of one step of a micro-panel of W
constexpr int kTokenBytes = kBf16KStep * 2;      // from one token to the next
constexpr int kPairBytes = kBf16Nr * 4;          // from one pair of k to the next

// The operand of LDTILECFG: all eight registers have 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void begin_tiles() {
  const TileConfig config;
  _tile_loadconfig(&config);
}

void end_tiles() { _tile_release(); }

// kTwo: more than 16 tokens, so that all four registers of sums are in use.
template <bool kTwo>
inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <bool kTwo>
inline void load_sums(MutableMatrixView c) {
  _tile_loadd(0, c.data, c.ld * 4);
  _tile_loadd(1, c.data + 16, c.ld * 4);
  if constexpr (kTwo) {
    _tile_loadd(2, c.data + 16 * c.ld, c.ld * 4);
    _tile_loadd(3, c.data + 16 * c.ld + 16, c.ld * 4);
  }
}

template <bool kTwo>
inline void store_sums(MutableMatrixView c) {
  _tile_stored(0, c.data, c.ld * 4);
  _tile_stored(1, c.data + 16, c.ld * 4);
  if constexpr (kTwo) {
    _tile_stored(2, c.data + 16 * c.ld, c.ld * 4);
    _tile_stored(3, c.data + 16 * c.ld + 16, c.ld * 4);
  }
}

// Multiplies a step of a micro-panel of tokens by one of W. Loads and products alternate, so that they overlap.
template <bool kTwo>
inline void add_step(const uint16_t* tokens, const uint16_t* weight) {
  _tile_loadd(6, weight, kPairBytes);
  _tile_loadd(4, tokens, kTokenBytes);
  _tile_loadd(7, weight + 32, kPairBytes);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kTwo) _tile_loadd(5, tokens + kHalfTokens, kTokenBytes);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kTwo) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <bool kTwo>
inline void micro_kernel_rows(const uint16_t* tokens, PackedPanel weight, bool overwrite, MutableMatrixView c) {
  if (overwrite) {
    clear_sums<kTwo>();
  } else {
    load_sums<kTwo>(c);
  }
  for (int64_t s = 0; s < weight.steps; ++s) add_step<kTwo>(tokens + s * kTokenStep, weight.data + s * kStepSize);
  store_sums<kTwo>(c);
}

void amx_micro_kernel(const uint16_t* tokens, int64_t rows, PackedPanel weight, bool overwrite, MutableMatrixView c) {
  const auto kernel = rows > 16 ? micro_kernel_rows<true> : micro_kernel_rows<false>;
  kernel(tokens, weight, overwrite, c);
}

// c [rows, kBf16Nr] = or += block * scales, for the sums of one block.
inline void add_scaled(const float* block, int64_t rows, const float* scales, bool overwrite, MutableMatrixView c) {
  const __m512 low = _mm512_loadu_ps(scales), high = _mm512_loadu_ps(scales + 16);
  for (int64_t i = 0; i < rows; ++i, block += kBf16Nr, c.data += c.ld) {
    const __m512 first = overwrite ? _mm512_setzero_ps() : _mm512_loadu_ps(c.data);
    const __m512 second = overwrite ? _mm512_setzero_ps() : _mm512_loadu_ps(c.data + 16);
    _mm512_storeu_ps(c.data, _mm512_fmadd_ps(_mm512_loadu_ps(block), low, first));
    _mm512_storeu_ps(c.data + 16, _mm512_fmadd_ps(_mm512_loadu_ps(block + 16), high, second));
  }
}

// Tile registers have no product with a vector: the sums of a block go through memory, where its scales are applied.
template <bool kTwo>
inline void unscaled_micro_kernel_rows(const uint16_t* tokens, int64_t rows, const UnscaledPanel& weight,
                                       bool overwrite, MutableMatrixView c) {
  const int64_t steps = weight.panel.steps, steps_per_scale = weight.steps_per_scale;
  const float* scales = weight.scales;
  alignas(64) float sums[2][kAmxMr * kBf16Nr];  // used in turn, so that a store has finished before it is read
  for (int64_t begin = 0, block = 0; begin < steps; begin += steps_per_scale, ++block) {
    clear_sums<kTwo>();
    for (int64_t s = begin; s < begin + steps_per_scale; ++s) {
      add_step<kTwo>(tokens + s * kTokenStep, weight.panel.data + s * kStepSize);
    }
    store_sums<kTwo>({sums[block & 1], kBf16Nr});
    if (block > 0) {
      add_scaled(sums[(block - 1) & 1], rows, scales + (block - 1) * kBf16Nr, overwrite && block == 1, c);
    }
  }
  const int64_t last = steps / steps_per_scale - 1;
  add_scaled(sums[last & 1], rows, scales + last * kBf16Nr, overwrite && last == 0, c);
}

void amx_unscaled_micro_kernel(const uint16_t* tokens, int64_t rows, const UnscaledPanel& weight, bool overwrite,
                               MutableMatrixView c) {
  const auto kernel = rows > 16 ? unscaled_micro_kernel_rows<true> : unscaled_micro_kernel_rows<false>;
  kernel(tokens, rows, weight, overwrite, c);
}

}  // namespace
}  // namespace lorasb

// clang-format off
#include "cpu/bf16_vectors_avx512.h"
#include "cpu/bf16_unpacked_amx.h"
// clang-format on

namespace lorasb {

bool amx_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}

Kernels amx_kernels() {
  Kernels k = avx512_bf16_kernels();
  k.name = "AMX";
  k.bf16_gemm.mr = kAmxMr;
  k.bf16_gemm.max_unscaled_tokens = 32;  // measured at 4096 x 4096
  k.bf16_gemm.block = {6, 256};          // 96 KiB of a second-level cache
  k.bf16_gemm.begin = begin_tiles;
  k.bf16_gemm.end = end_tiles;
  k.bf16_gemm.micro_kernel = amx_micro_kernel;
  k.bf16_gemm.unscaled_micro_kernel = amx_unscaled_micro_kernel;
  k.max_few_tokens = 2;         // for more, the blocked product by tiles is faster
  k.max_unpacked_tokens = 128;  // measured from 576 x 576 to 11008 x 4096
  k.max_unpacked_products = std::numeric_limits<int64_t>::max();
  k.arrange_tokens = arrange_pairs_of_tokens;
  k.multiply_unpacked = multiply_by_tiles;
  return k;
}

}  // namespace lorasb

LORASB_TARGET_END
#endif
