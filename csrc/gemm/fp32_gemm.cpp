#include "gemm/fp32_gemm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch_memory.h"

namespace lorasb {
namespace {

// Measured on two Zen 3 cores: a packed panel and its sums stay in a second-level cache of 256 KiB, and a micro-panel
// of each kind in a first-level one.
constexpr int64_t kKc = 256;
constexpr int64_t kNc = 64;
constexpr int64_t kWideNc = 128;     // where tokens, and so sums, are few: full cache lines of 4-bit rows
constexpr int64_t kFewTokens = 128;  // up to these, kWideNc applies
constexpr int64_t kMc = 512;         // tokens whose sums are open at once
constexpr int64_t kMinMc = 48;       // and at least this many where columns are few
constexpr int64_t kPackedBytes = int64_t{32} << 20;  // of tokens in fp32 that are packed at once
constexpr int64_t kSmallWork = int64_t{1} << 18;     // multiplications that are not worth a second thread
constexpr int64_t kMinScratch = int64_t{1} << 18;    // bytes of packed tokens; less is cheap to allocate

// Leading dimension of rows of kc elements that are read side by side: 1 KiB and 32 bytes, so that they do not fall
// into the same sets of a first-level cache.
constexpr int64_t kRowStride = kKc + 8;

const Fp32GemmKernels& gemm() { return kernels().fp32_gemm; }

DenseView view_of(const Tensor& dense) {
  return {dense.const_data_ptr(), element_of(dense.scalar_type()), dense.stride(0)};
}

const char* element_at(const DenseView& d, int64_t row, int64_t column) {
  return static_cast<const char*>(d.data) + (row * d.ld + column) * size_of(d.element);
}

// The part of B that is packed at a time: rows [k0, k0 + kc), columns [n0, n0 + nc); nc is whole micro-panels and may
// end beyond B.
struct PanelShape {
  int64_t k0, kc, n0, nc;
};

// Elements [first, first + count) of a row of W, in fp32.
void widen_run(const Weight& w, int64_t row, int64_t first, int64_t count, float* dst) {
  if (w.packed != nullptr) {
    kernels().decode_f32(*w.packed, row * w.columns + first, count, dst);
    return;
  }
  const DenseView d = view_of(w.dense);
  gemm().widen(element_at(d, row, first), d.element, count, dst);
}

// B = Wᵀ: nr rows of W, widened into `rows` [nr, kRowStride], are one micro-panel.
void pack_transposed(const Weight& w, const PanelShape& shape, float* rows, float* panel) {
  const int64_t nr = gemm().nr, kc = shape.kc;
  for (int64_t j = 0; j < shape.nc; j += nr, panel += nr * kc) {
    const int64_t row = shape.n0 + j, count = std::max<int64_t>(0, std::min(nr, w.rows - row));
    if (w.packed == nullptr && w.dense.scalar_type() == at::kBFloat16) {
      const auto* src = static_cast<const uint16_t*>(w.dense.const_data_ptr()) + row * w.dense.stride(0) + shape.k0;
      gemm().pack_transposed_bf16({src, w.dense.stride(0)}, count, kc, panel);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) widen_run(w, row + i, shape.k0, kc, rows + i * kRowStride);
    gemm().pack_transposed({rows, kRowStride}, count, kc, panel);
  }
}

// Prefetches what decoding elements [first, first + count) will read: codes, and the first scale.
void prefetch_elements(const Packed& w, int64_t first, int64_t count) {
  if (w.codes != nullptr) return prefetch_bytes(w.codes + first, count);
  prefetch_bytes(w.bytes + first / 2, (count + 1) / 2);
  const int64_t b = first / w.block;
  __builtin_prefetch(w.absmax != nullptr ? static_cast<const void*>(w.absmax + b) : w.absmax8 + b);
}

// B = W: a piece of a row of W is row k of all micro-panels. `row` has room for nc elements.
void pack_plain(const Weight& w, const PanelShape& shape, float* row, float* panel) {
  constexpr int64_t kAhead = 16;  // rows: a row's piece is too short for the hardware prefetcher
  const int64_t nr = gemm().nr, count = std::min(shape.nc, w.columns - shape.n0), panel_stride = nr * shape.kc;
  if (w.packed != nullptr) {
    for (int64_t k = 0; k < shape.kc; ++k) {
      const int64_t first = (shape.k0 + k) * w.columns + shape.n0;
      if (k + kAhead < shape.kc) prefetch_elements(*w.packed, first + kAhead * w.columns, count);
      kernels().decode_f32(*w.packed, first, count, row);
      gemm().pack_row(row, Element::f32, count, panel + k * nr, panel_stride);
    }
    return;
  }
  const DenseView d = view_of(w.dense);
  for (int64_t k = 0; k < shape.kc; ++k) {
    if (k + kAhead < shape.kc) {
      prefetch_bytes(element_at(d, shape.k0 + k + kAhead, shape.n0), count * size_of(d.element));
    }
    gemm().pack_row(element_at(d, shape.k0 + k, shape.n0), d.element, count, panel + k * nr, panel_stride);
  }
}

// The size of a piece of C.
struct TileShape {
  int64_t mc, nc;  // whole micro-panels
};

// A piece as large as the cache can hold, but small enough that there are pieces for all threads.
TileShape choose_tile(int64_t tokens, int64_t n, int64_t threads) {
  const Fp32GemmKernels& k = gemm();
  const int64_t panels = ceil_div(n, k.nr);
  const int64_t max_panels = std::max<int64_t>(1, (tokens <= kFewTokens ? kWideNc : kNc) / k.nr);
  const auto whole = [&](int64_t count) { return ceil_div(count, k.mr) * k.mr; };
  if (tokens > kMinMc && panels < 2 * threads * max_panels) {  // few columns: cut the tokens, and use each panel longer
    const int64_t parts = std::max<int64_t>(1, std::min(2 * threads, tokens / kMinMc));
    return {whole(std::min(kMc, ceil_div(tokens, parts))), std::min(2 * max_panels, panels) * k.nr};
  }
  int64_t best = 1, shortest = ceil_div(panels, threads);
  for (int64_t each = 2; each <= max_panels; ++each) {  // micro-panels of the thread that has the most
    const int64_t longest = ceil_div(ceil_div(panels, each), threads) * each;
    if (longest <= shortest) {
      best = each;
      shortest = longest;
    }
  }
  const int64_t blocks = ceil_div(tokens, kMc);
  return {whole(ceil_div(tokens, blocks)), best * k.nr};
}

// A thread's scratch memory: rows of W in fp32 before they are packed, the packed panel, and the sums [mc, nc].
struct Workspace {
  float *rows, *panel, *sums;

  explicit Workspace(const TileShape& tile) {
    const int64_t row_count = std::max<int64_t>(gemm().nr * kRowStride, tile.nc), panel_count = tile.nc * kKc;
    const int64_t count = row_count + panel_count + tile.mc * tile.nc;
    rows = static_cast<float*>(thread_scratch(count * sizeof(float), Scratch::weight_block));
    panel = rows + row_count;
    sums = panel + panel_count;
  }
};

struct Output {
  char* y;
  Element element;
  int64_t n;
  MatrixView start;  // null for none; ld is 0 for a vector
};

// A piece of C: rows `tokens`, columns [n0, n0 + nc).
struct Piece {
  Range tokens;
  int64_t n0, nc;
};

void multiply_piece(const std::vector<Term>& terms, const Piece& piece, const Workspace& work) {
  const Fp32GemmKernels& k = gemm();
  const int64_t nc = piece.nc;
  bool overwrite = true;
  for (const Term& term : terms) {
    const float* packed_x = term.x->panels.const_data_ptr<float>();
    const int64_t padded_tokens = ceil_div(term.x->tokens, k.mr) * k.mr;
    const auto pack = term.w->transposed ? pack_transposed : pack_plain;
    for (int64_t k0 = 0; k0 < term.x->k; k0 += kKc, overwrite = false) {
      const int64_t kc = std::min(kKc, term.x->k - k0);
      pack(*term.w, {k0, kc, piece.n0, nc}, work.rows, work.panel);
      for (int64_t i = piece.tokens.begin; i < piece.tokens.end; i += k.mr) {
        const float* tokens = packed_x + k0 * padded_tokens + i * kc;
        const int64_t rows = std::min<int64_t>(k.mr, piece.tokens.end - i);
        float* sums = work.sums + (i - piece.tokens.begin) * nc;
        for (int64_t j = 0; j < nc; j += k.nr) {
          k.micro_kernel(tokens, work.panel + j * kc, kc, rows, overwrite, {sums + j, nc});
        }
      }
    }
  }
  if (overwrite) std::fill(work.sums, work.sums + piece.tokens.size() * nc, 0.0f);  // k = 0
}

void store_piece(const Output& out, const Piece& piece, float* sums) {
  const int64_t count = std::min(piece.nc, out.n - piece.n0);
  for (int64_t t = piece.tokens.begin; t < piece.tokens.end; ++t, sums += piece.nc) {
    if (out.start.data != nullptr) {
      const float* start = out.start.data + t * out.start.ld + piece.n0;
      for (int64_t j = 0; j < count; ++j) sums[j] += start[j];
    }
    gemm().narrow(sums, out.element, count, out.y + (t * out.n + piece.n0) * size_of(out.element));
  }
}

Tensor allocate_panels(int64_t count, const Tensor& like, bool use_scratch) {
  const at::TensorOptions options = like.options().dtype(at::kFloat);
  const int64_t size = count * static_cast<int64_t>(sizeof(float));
  if (!use_scratch || size < kMinScratch) return at::empty({count}, options);
  return at::from_blob(thread_scratch(size, Scratch::packed_tokens), {count}, options);
}

}  // namespace

Weight as_weight(const Tensor& dense, bool plain) {
  if (dense.stride(1) != 1 && dense.stride(0) == 1 && dense.size(0) > 1) {  // stored column by column: take Wᵀ
    return {dense.t(), nullptr, dense.size(1), dense.size(0), plain};
  }
  const Tensor rows = dense.stride(1) == 1 || dense.size(1) == 1 ? dense : dense.contiguous();
  return {rows, nullptr, dense.size(0), dense.size(1), !plain};
}

Weight as_weight(const Packed& w, bool plain) { return {Tensor(), &w, w.rows, w.columns, !plain}; }

int64_t max_packed_tokens(int64_t k) { return std::max(kMc, kPackedBytes / 4 / std::max<int64_t>(1, k) / kMc * kMc); }

PackedTokens pack_tokens(const Tensor& x, bool use_scratch) {
  const Fp32GemmKernels& kernel = gemm();
  const int64_t mr = kernel.mr, tokens = x.size(0), k = x.size(1), panels = ceil_div(tokens, mr);
  PackedTokens packed{allocate_panels(panels * mr * k, x, use_scratch), tokens, k};
  const DenseView src = view_of(x);
  float* dst = packed.panels.mutable_data_ptr<float>();
  at::parallel_for(0, panels, grain(mr * k), [&](int64_t begin, int64_t end) {
    std::vector<float> rows(mr * kRowStride);
    for (int64_t k0 = 0; k0 < k; k0 += kKc) {
      const int64_t kc = std::min(kKc, k - k0);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t count = std::min(mr, tokens - panel * mr);
        for (int64_t i = 0; i < count; ++i) {
          kernel.widen(element_at(src, panel * mr + i, k0), src.element, kc, rows.data() + i * kRowStride);
        }
        kernel.pack_tokens({rows.data(), kRowStride}, count, kc, dst + k0 * panels * mr + panel * mr * kc);
      }
    }
  });
  return packed;
}

Tensor fp32_gemm(const std::vector<Term>& terms, at::ScalarType dtype, const OptionalTensor& start) {
  const int64_t tokens = terms.front().x->tokens, n = terms.front().w->n();
  Tensor y = at::empty({tokens, n}, terms.front().x->panels.options().dtype(dtype));
  if (tokens == 0 || n == 0) return y;
  const Tensor initial = start.has_value() ? start->to(at::kFloat).contiguous() : Tensor();
  Output out{static_cast<char*>(y.mutable_data_ptr()), element_of(dtype), n, {nullptr, 0}};
  if (start.has_value()) out.start = {initial.const_data_ptr<float>(), initial.dim() == 2 ? n : 0};
  int64_t multiplications = 0;
  for (const Term& term : terms) multiplications += term.x->k * tokens * n;
  const int64_t threads = multiplications < kSmallWork ? 1 : at::get_num_threads();
  const TileShape tile = choose_tile(tokens, n, threads);
  const int64_t across = ceil_div(n, tile.nc), pieces = across * ceil_div(tokens, tile.mc);
  std::atomic<int64_t> next{0};  // a thread whose core is busy with something else takes fewer pieces
  at::parallel_for(0, std::min(threads, pieces), 1, [&](int64_t, int64_t) {
    const Workspace work(tile);
    for (int64_t index = next++; index < pieces; index = next++) {
      const int64_t low = index / across * tile.mc, n0 = index % across * tile.nc;
      const int64_t nc = std::min(tile.nc, ceil_div(n - n0, gemm().nr) * gemm().nr);
      const Piece piece{{low, std::min(low + tile.mc, tokens)}, n0, nc};
      multiply_piece(terms, piece, work);
      store_piece(out, piece, work.sums);
    }
  });
  return y;
}

Tensor multiply_few_tokens(const Tensor& x, const Weight& w) {
  const at::TensorOptions options = x.options().dtype(at::kFloat);
  return add_few_tokens(x, w, at::zeros({x.size(0), w.n()}, options));
}

Tensor add_few_tokens(const Tensor& x, const Weight& w, Tensor sums) {
  const int64_t tokens = x.size(0);
  if (tokens == 0) return sums;
  const Tensor x_fp32 = x.to(at::kFloat).contiguous();
  const MatrixView src{x_fp32.const_data_ptr<float>(), w.k()};
  const MutableMatrixView dst{sums.mutable_data_ptr<float>(), w.n()};
  const DenseView d = view_of(w.dense);
  if (w.transposed) {
    over_rows(w.rows, w.columns, 16,
              [&](int64_t low, int64_t high) { gemm().dot_rows(src, tokens, d, w.columns, {low, high}, dst); });
    return sums;
  }
  // B = W: a thread has its own columns where there are enough of them, else rows whose partial sums are added. The
  // choice does not depend on the number of threads, as the two sum in different orders.
  constexpr int64_t kWidth = 512;
  if (w.columns >= kWidth || w.rows <= kPartRows) {
    at::parallel_for(0, ceil_div(w.columns, kWidth), grain(kWidth * w.rows), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const Range columns{c * kWidth, std::min((c + 1) * kWidth, w.columns)};
        gemm().add_rows(src, tokens, d, {0, w.rows}, columns, {dst.data + columns.begin, dst.ld});
      }
    });
    return sums;
  }
  add_row_parts(w.rows, sums, [&](Range rows, float* part) {
    gemm().add_rows(src, tokens, d, rows, {0, w.columns}, {part, w.columns});
  });
  return sums;
}

}  // namespace lorasb
