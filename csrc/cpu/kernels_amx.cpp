// AMX: products of 16 x 32 tiles in bf16 (Sapphire Rapids and newer). Everything else is AVX-512's.
#include "cpu/kernel_table.h"

#ifdef LORASB_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/target.h"

LORASB_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")

namespace lorasb {
namespace {

constexpr int kTokens = 32;                            // rows of x in a tile: two registers' rows
constexpr int kHalfWords = 16 * kStripDepth;           // bf16 of a register of tokens
constexpr int kTileWords = kTokens * kStripDepth;      // of one step of a tile
constexpr int kStepWords = kStripDepth * kStripLanes;  // of one step of a strip
constexpr int kTokenBytes = kStripDepth * 2, kPairBytes = kStripLanes * 4;

// Registers 0 to 3 hold sums, 4 and 5 tokens, 6 and 7 weights: each 16 rows of 64 bytes.
struct alignas(64) Layout {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void begin_tiles() {
  const Layout layout;
  _tile_loadconfig(&layout);
}

void end_tiles() { _tile_release(); }

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
inline void load_sums(const float* from, int64_t stride) {
  _tile_loadd(0, from, stride * 4);
  _tile_loadd(1, from + 16, stride * 4);
  if constexpr (kTwo) {
    _tile_loadd(2, from + 16 * stride, stride * 4);
    _tile_loadd(3, from + 16 * stride + 16, stride * 4);
  }
}

template <bool kTwo>
inline void store_sums(float* to, int64_t stride) {
  _tile_stored(0, to, stride * 4);
  _tile_stored(1, to + 16, stride * 4);
  if constexpr (kTwo) {
    _tile_stored(2, to + 16 * stride, stride * 4);
    _tile_stored(3, to + 16 * stride + 16, stride * 4);
  }
}

// One step of a tile against one of a strip.
template <bool kTwo>
inline void add_step(const uint16_t* tile, const uint16_t* strip) {
  _tile_loadd(6, strip, kPairBytes);
  _tile_loadd(4, tile, kTokenBytes);
  _tile_loadd(7, strip + 32, kPairBytes);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kTwo) _tile_loadd(5, tile + kHalfWords, kTokenBytes);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kTwo) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <bool kTwo>
inline void multiply_rows(const uint16_t* tile, const uint16_t* strip, int64_t steps, bool fresh, float* sums,
                          int64_t stride) {
  if (fresh) {
    clear_sums<kTwo>();
  } else {
    load_sums<kTwo>(sums, stride);
  }
  for (int64_t s = 0; s < steps; ++s) add_step<kTwo>(tile + s * kTileWords, strip + s * kStepWords);
  store_sums<kTwo>(sums, stride);
}

void multiply_tiles(const uint16_t* tile, int64_t rows, const uint16_t* strip, int64_t steps, bool fresh, float* sums,
                    int64_t stride) {
  const auto multiply = rows > 16 ? multiply_rows<true> : multiply_rows<false>;
  multiply(tile, strip, steps, fresh, sums, stride);
}

// sums [rows, kStripLanes] = (fresh) or += part * scales.
inline void add_scaled(const float* part, int64_t rows, const float* scales, bool fresh, float* sums, int64_t stride) {
  const __m512 low = _mm512_loadu_ps(scales), high = _mm512_loadu_ps(scales + 16);
  for (int64_t i = 0; i < rows; ++i, part += kStripLanes, sums += stride) {
    const __m512 first = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums);
    const __m512 second = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + 16);
    _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(part), low, first));
    _mm512_storeu_ps(sums + 16, _mm512_fmadd_ps(_mm512_loadu_ps(part + 16), high, second));
  }
}

template <bool kTwo>
inline void multiply_scaled_rows(const uint16_t* tile, int64_t rows, const uint16_t* strip, int64_t steps, int64_t run,
                                 const float* scales, bool fresh, float* sums, int64_t stride) {
  alignas(64) float part[2][kTokens * kStripLanes];  // in turns, so that a store is over before it is read
  for (int64_t begin = 0, turn = 0; begin < steps; begin += run, ++turn) {
    clear_sums<kTwo>();
    for (int64_t s = begin; s < begin + run; ++s) add_step<kTwo>(tile + s * kTileWords, strip + s * kStepWords);
    store_sums<kTwo>(part[turn & 1], kStripLanes);
    if (turn > 0) {
      add_scaled(part[(turn - 1) & 1], rows, scales + (turn - 1) * kStripLanes, fresh && turn == 1, sums, stride);
    }
  }
  const int64_t last = steps / run - 1;
  add_scaled(part[last & 1], rows, scales + last * kStripLanes, fresh && last == 0, sums, stride);
}

void multiply_scaled_tiles(const uint16_t* tile, int64_t rows, const uint16_t* strip, int64_t steps, int64_t run,
                           const float* scales, bool fresh, float* sums, int64_t stride) {
  const auto multiply = rows > 16 ? multiply_scaled_rows<true> : multiply_scaled_rows<false>;
  multiply(tile, rows, strip, steps, run, scales, fresh, sums, stride);
}

}  // namespace

bool may_use_tiles() {
  constexpr long kAskForState = 0x1023, kTileData = 18;  // arch_prctl: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
  return allowed;
}

const Kernels& amx_kernels() {
  static const StripKernels strips = [] {
    StripKernels k = *avx512_bf16_kernels().strips;
    k.tile_tokens = kTokens;
    k.plain_tokens = 32;  // measured at 4096 x 4096
    k.wide = {6, 256};
    k.begin = begin_tiles;
    k.end = end_tiles;
    k.multiply = multiply_tiles;
    k.multiply_scaled = multiply_scaled_tiles;
    return k;
  }();
  static const Kernels kernels = [] {
    Kernels k = avx512_bf16_kernels();
    k.name = "AMX";
    k.strips = &strips;
    k.few_tokens = 2;  // for more, tiles are faster
    return k;
  }();
  return kernels;
}

}  // namespace lorasb

LORASB_TARGET_END
#endif
