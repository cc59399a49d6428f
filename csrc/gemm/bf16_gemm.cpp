#include "gemm/bf16_gemm.h"

#include <functional>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch_memory.h"

namespace lorasb {
namespace {

// Measured on two Zen 4 cores at 4096 x 4096.
constexpr int64_t kMc = 512;                 // tokens whose sums stay in a second-level cache
constexpr int64_t kMaxTokensBesideAmx = 32;  // where the BLAS has AMX and these kernels do not use it

constexpr BlockShape kUnscaledBlock = {1, kBf16MaxKc / 2};  // 16 KiB, for a first-level cache

// Bytes of packed tokens in scratch memory: fresh pages take longer than filling them. Less is cheap to allocate, and
// more should not stay allocated.
constexpr int64_t kMinScratch = int64_t{1} << 18, kMaxScratch = int64_t{16} << 20;

const Bf16GemmKernels& gemm() { return kernels().bf16_gemm; }

// One term of the sum: packed tokens [m, k], and how the part of B that they multiply is packed.
struct Term {
  Tensor tokens;  // [k / kc] blocks of [panels][steps][mr][32]
  std::function<void(const PanelBlock&, uint16_t* panels, float* scales)> pack;
  int64_t elements_per_scale = 0;  // 0: micro-panels include their scales

  int64_t k() const { return tokens.size(1) * kBf16KStep; }  // whole steps
};

// C [m, n], its leading dimension being n.
struct Output {
  int64_t m, n;
  Epilogue epilogue;
  uint16_t* y;
  BlockShape block;
};

Tensor allocate_tokens(at::IntArrayRef shape, const at::TensorOptions& options, bool use_scratch) {
  const int64_t size = c10::multiply_integers(shape) * static_cast<int64_t>(sizeof(uint16_t));
  if (!use_scratch || size < kMinScratch || size > kMaxScratch) return at::empty(shape, options);
  return at::from_blob(thread_scratch(size, Scratch::packed_tokens), shape, options);
}

// `use_scratch`: at most one term of a sum can use the thread's scratch memory.
Tensor pack_tokens(const Tensor& x, int pair_distance, const BlockShape& block, bool use_scratch) {
  const int mr = gemm().mr;
  const int64_t m = x.size(0), k = x.size(1), panels = ceil_div(m, mr);
  Tensor packed = allocate_tokens({panels, ceil_div(k, kBf16KStep), mr, kBf16KStep}, x.options(), use_scratch);
  const Bf16Matrix src{bits(x), x.stride(0), m, k};
  const TokenLayout layout{mr, pair_distance, block.kc / kBf16KStep};
  uint16_t* dst = mutable_bits(packed);
  at::parallel_for(0, panels, grain(mr * k),
                   [&](int64_t low, int64_t high) { gemm().pack_tokens(src, layout, {low, high}, dst); });
  return packed;
}

// A thread's scratch memory: a block of micro-panels, their scales if these are separate, and sums [mc, nc]. Sums have
// whole micro-panels of tokens, since AMX stores all of a register's rows.
struct Workspace {
  uint16_t* panels;
  float *scales, *sums;

  Workspace(const BlockShape& block, int64_t mc) {
    const int64_t panel_bytes = block.panels * block.panel_stride() * sizeof(uint16_t);
    const int64_t scale_bytes = kBf16MaxKc * sizeof(float);  // [kc / 32, 32] at most
    const int64_t size = panel_bytes + scale_bytes + mc * block.nc() * sizeof(float);
    char* memory = static_cast<char*>(thread_scratch(size, Scratch::weight_block));
    panels = reinterpret_cast<uint16_t*>(memory);
    scales = reinterpret_cast<float*>(memory + panel_bytes);
    sums = reinterpret_cast<float*>(memory + panel_bytes + scale_bytes);
  }
};

// A piece of C: rows `tokens`, and `panels` micro-panels of columns from n0 on.
struct Piece {
  Range tokens;
  int64_t n0, panels;
};

// One term's block of B, packed, against all tokens of the piece.
void multiply_block(const Term& term, const Piece& piece, const BlockShape& block, int64_t k0, bool overwrite,
                    const Workspace& work) {
  const Bf16GemmKernels& kernel = gemm();
  const int64_t mr = kernel.mr, nc = block.nc(), padded_tokens = term.tokens.size(0) * mr;
  const int64_t kc = std::min(block.kc, term.k() - k0), steps = kc / kBf16KStep;
  const int64_t steps_per_scale = std::min(term.elements_per_scale, kc) / kBf16KStep;
  const uint16_t* packed = bits(term.tokens) + k0 * padded_tokens;
  term.pack({piece.n0, piece.panels, k0, kc, block.panel_stride()}, work.panels, work.scales);
  for (int64_t i = piece.tokens.begin; i < piece.tokens.end; i += mr) {
    const int64_t rows = std::min(mr, piece.tokens.end - i);
    float* sums = work.sums + (i - piece.tokens.begin) * nc;
    for (int64_t p = 0; p < piece.panels; ++p) {
      const PackedPanel panel{work.panels + p * block.panel_stride(), steps};
      const MutableMatrixView tile{sums + p * kBf16Nr, nc};
      if (steps_per_scale > 0) {
        kernel.unscaled_micro_kernel(packed + i * kc, rows, {panel, steps_per_scale, work.scales}, overwrite, tile);
      } else {
        kernel.micro_kernel(packed + i * kc, rows, panel, overwrite, tile);
      }
    }
  }
}

void compute_piece(const std::vector<Term>& terms, const Output& out, const Piece& piece, const Workspace& work) {
  bool overwrite = true;
  for (const Term& term : terms) {
    for (int64_t k0 = 0; k0 < term.k(); k0 += out.block.kc, overwrite = false) {
      multiply_block(term, piece, out.block, k0, overwrite, work);
    }
  }
  const int64_t low = piece.tokens.begin;
  for (int64_t p = 0; p < piece.panels; ++p) {
    const int64_t column = piece.n0 + p * kBf16Nr;
    Epilogue epilogue = out.epilogue;
    if (epilogue.bias != nullptr) epilogue.bias += column;
    gemm().store({work.sums + p * kBf16Nr, out.block.nc()}, piece.tokens.size(), out.n - column, epilogue,
                 {out.y + low * out.n + column, out.n});
  }
}

void compute(const std::vector<Term>& terms, const Output& out) {
  const int64_t mr = gemm().mr, panels = ceil_div(out.n, kBf16Nr), blocks = ceil_div(out.m, kMc);
  const int64_t mc = ceil_div(ceil_div(out.m, blocks), mr) * mr;
  at::parallel_for(0, panels, grain(kBf16Nr * terms.front().k()), [&](int64_t begin, int64_t end) {
    const Workspace work(out.block, mc);
    if (gemm().begin != nullptr) gemm().begin();
    for (int64_t low = 0; low < out.m; low += mc) {
      const Range tokens{low, std::min(low + mc, out.m)};
      for (int64_t p = begin; p < end; p += out.block.panels) {
        compute_piece(terms, out, {tokens, p * kBf16Nr, std::min(out.block.panels, end - p)}, work);
      }
    }
    if (gemm().end != nullptr) gemm().end();
  });
}

// W's part of y, or of dx if `plain`. Pair distances are those of the packing functions: cpu/bf16_microkernel.h.
Term weight_term(const Packed& w, const Tensor& x, const BlockShape& block, bool plain) {
  const auto pack = plain ? gemm().pack : gemm().pack_transposed;
  return {pack_tokens(x, plain ? 1 : 8, block, true),
          [&w, pack](const PanelBlock& part, uint16_t* panels, float*) { pack(w, part, panels); }};
}

Term unscaled_weight_term(const Packed& w, const Tensor& x) {
  const auto pack = gemm().pack_transposed_unscaled;
  return {pack_tokens(x, 4, kUnscaledBlock, true),
          [&w, pack](const PanelBlock& part, uint16_t* panels, float* scales) { pack(w, part, panels, scales); },
          w.block};
}

Term factor_term(const Bf16Matrix& d, const Tensor& v, const BlockShape& block, bool plain) {
  const auto pack = plain ? gemm().pack_dense : gemm().pack_dense_transposed;
  return {pack_tokens(v, 1, block, false),
          [&d, pack](const PanelBlock& part, uint16_t* panels, float*) { pack(d, part, panels); }};
}

}  // namespace

void round_rows(MatrixView sums, int64_t M, int64_t columns, const uint16_t* bias, MutableBf16View y) {
  for (int64_t j = 0; j < columns; j += kBf16Nr) {
    const Epilogue epilogue{false, bias == nullptr ? nullptr : bias + j, false};
    gemm().store({sums.data + j, sums.ld}, M, columns - j, epilogue, {y.data + j, y.ld});
  }
}

bool bf16_gemm_supported(const Packed& w, at::ScalarType dtype, int64_t M) {
  // Two roundings, to fp16 and then to bf16, differ from rounding the table once.
  return kernels().multiplies_bf16() && dtype == at::kBFloat16 && M > 0 && w.rows > 0 && w.columns > 0 &&
         w.whole_blocks() && w.rounding != Rounding::fp16 &&
         (M <= kMaxTokensBesideAmx || gemm().begin != nullptr || !has_amx());
}

Tensor bf16_gemm(const Packed& w, const Tensor& x, const Tensor& v, const Tensor& factor, const OptionalTensor& bias,
                 bool plain) {
  const bool unscaled = !plain && x.size(0) <= gemm().max_unscaled_tokens;
  const BlockShape block = unscaled ? kUnscaledBlock : gemm().block;
  std::vector<Term> terms{unscaled ? unscaled_weight_term(w, x) : weight_term(w, x, block, plain)};
  const Tensor rows = factor.contiguous();
  const Bf16Matrix d{bits(rows), rows.size(1), rows.size(0), rows.size(1)};
  if (v.size(1) > 0) terms.push_back(factor_term(d, v.contiguous(), block, plain));
  const int64_t n = plain ? w.columns : w.rows;
  Tensor y = at::empty({x.size(0), n}, x.options());
  const Tensor bias_row = bias.has_value() ? bias->contiguous() : Tensor();
  const Epilogue epilogue{plain, bias.has_value() ? bits(bias_row) : nullptr, false};
  compute(terms, {x.size(0), n, epilogue, mutable_bits(y), block});
  return y;
}

void bf16_gemm_add(const Packed& w, const Tensor& dy, Tensor& dx) {
  compute({weight_term(w, dy, gemm().block, true)},
          {dy.size(0), w.columns, {true, nullptr, true}, mutable_bits(dx), gemm().block});
}

}  // namespace lorasb
