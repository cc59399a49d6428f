#include "gemm/fp32_gemm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch_memory.h"

namespace lorasb {
namespace {

// Measured on two Zen 3 cores: a panel of lanes and its sums stay in a second-level cache of 256 KiB, and a micro-panel
// of each kind in a first-level one.
constexpr int64_t kDepth = 256;      // elements of a sum in a panel
constexpr int64_t kLanes = 64;       // lanes of a panel
constexpr int64_t kWideLanes = 128;  // where tokens, and so their sums, are few: whole cache lines of 4-bit rows
constexpr int64_t kFewTokens = 128;
constexpr int64_t kTokens = 512;                    // tokens whose sums are open at once
constexpr int64_t kThinTokens = 48;                 // and at least so many where lanes are few
constexpr int64_t kTokenBytes = int64_t{32} << 20;  // of tokens in fp32 that are packed at once
constexpr int64_t kSmallWork = int64_t{1} << 18;    // products that are not worth a second thread
constexpr int64_t kPartRows = 256;                  // rows of W whose sums are added on their own, in order

const GemmKernels& gemm() { return *kernels().gemm; }

Element element_of(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return Element::bf16;
  return dtype == at::kHalf ? Element::f16 : Element::f32;
}

// Elements [first, first + count) of row `row`, in fp32.
void widen_run(const Weight& w, int64_t row, int64_t first, int64_t count, float* to) {
  if (w.packed != nullptr) {
    kernels().decode_f32(*w.packed, row * w.columns + first, count, to);
    return;
  }
  const Element element = element_of(w.dense.scalar_type());
  const auto* from = static_cast<const char*>(w.dense.const_data_ptr());
  gemm().widen(from + (row * w.dense.stride(0) + first) * size_of(element), element, count, to);
}

// Elements [first, first + depth) of the sums of `lanes` lanes from `lane` on, as micro-panels [.., depth, nr].
void pack_rows(const Weight& w, int64_t lane, int64_t lanes, int64_t first, int64_t depth, float* rows, float* to) {
  const int64_t nr = gemm().nr, stride = kDepth + 8;  // rows that are read side by side: not in the same cache lines
  for (int64_t s = 0; s < lanes; s += nr) {
    const int64_t there = std::max<int64_t>(0, std::min(nr, w.rows - lane - s));
    if (w.packed == nullptr && w.dense.scalar_type() == at::kBFloat16) {
      const auto* from = static_cast<const uint16_t*>(w.dense.const_data_ptr()) + first;
      const int64_t ld = w.dense.stride(0);
      gemm().transpose_bf16_lanes(from + (lane + s) * ld, ld, there, depth, to + s * depth);
      continue;
    }
    for (int64_t i = 0; i < there; ++i) widen_run(w, lane + s + i, first, depth, rows + i * stride);
    gemm().transpose_lanes(rows, stride, there, depth, to + s * depth);
  }
}

// What decoding elements [first, first + count) will read.
void prefetch(const Packed& w, int64_t first, int64_t count) {
  const char* from = w.codes != nullptr ? reinterpret_cast<const char*>(w.codes + first)
                                        : reinterpret_cast<const char*>(w.bytes + first / 2);
  const int64_t bytes = w.codes != nullptr ? count : (count + 1) / 2;
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
  if (w.codes != nullptr) return;
  const int64_t block = first / w.block;
  if (w.absmax != nullptr) {
    __builtin_prefetch(w.absmax + block);
  } else {
    __builtin_prefetch(w.absmax8 + block);
  }
}

void pack_columns(const Weight& w, int64_t lane, int64_t lanes, int64_t first, int64_t depth, float* row, float* to) {
  constexpr int64_t kAhead = 16;  // rows: a row's piece is too short for the processor to guess the next one
  const int64_t nr = gemm().nr, there = std::min(lanes, w.columns - lane), apart = nr * depth;
  if (w.packed != nullptr) {
    for (int64_t k = 0; k < depth; ++k) {
      if (k + kAhead < depth) prefetch(*w.packed, (first + k + kAhead) * w.columns + lane, there);
      kernels().decode_f32(*w.packed, (first + k) * w.columns + lane, there, row);
      gemm().spread_lanes(row, Element::f32, there, to + k * nr, apart);
    }
    return;
  }
  const Element element = element_of(w.dense.scalar_type());
  const int64_t ld = w.dense.stride(0) * size_of(element), bytes = there * size_of(element);
  const char* from = static_cast<const char*>(w.dense.const_data_ptr()) + first * ld + lane * size_of(element);
  for (int64_t k = 0; k < depth; ++k, from += ld) {
    if (k + kAhead < depth) {
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + kAhead * ld + line);
    }
    gemm().spread_lanes(from, element, there, to + k * nr, apart);
  }
}

// What a product is cut into: pieces of so many tokens and lanes, each of one thread and over the whole reduction.
struct Cut {
  int64_t tokens, lanes;
};

Cut cut_of(int64_t tokens, int64_t width, int64_t threads) {
  const GemmKernels& k = gemm();
  const int64_t strips = ceil_div(width, k.nr);
  const int64_t most = std::max<int64_t>(1, (tokens <= kFewTokens ? kWideLanes : kLanes) / k.nr);
  const auto whole = [&](int64_t count) { return ceil_div(count, k.mr) * k.mr; };
  if (tokens > kThinTokens && strips < 2 * threads * most) {  // few lanes: cut the tokens, and share a panel widely
    const int64_t parts = std::max<int64_t>(1, std::min(2 * threads, tokens / kThinTokens));
    return {whole(std::min(kTokens, ceil_div(tokens, parts))), std::min(2 * most, strips) * k.nr};
  }
  int64_t best = 1, least = ceil_div(strips, threads);
  for (int64_t each = 2; each <= most; ++each) {  // the longest thread's strips
    const int64_t longest = ceil_div(ceil_div(strips, each), threads) * each;
    if (longest <= least) {
      best = each;
      least = longest;
    }
  }
  const int64_t blocks = ceil_div(tokens, kTokens);
  return {whole(ceil_div(tokens, blocks)), best * k.nr};
}

// What a thread works in.
struct Workspace {
  float *rows, *panel, *sums;

  explicit Workspace(const Cut& cut) {
    const int64_t of_rows = std::max<int64_t>(gemm().nr * (kDepth + 8), cut.lanes), of_panel = cut.lanes * kDepth;
    rows = static_cast<float*>(kept_room((of_rows + of_panel + cut.tokens * cut.lanes) * sizeof(float)));
    panel = rows + of_rows;
    sums = panel + of_panel;
  }
};

struct Output {
  char* y;
  Element element;
  int64_t width;
  const float* start;    // or null
  int64_t start_stride;  // 0 for a vector
};

// Tokens [low, high) of `lanes` lanes from `lane` on.
void multiply_piece(const std::vector<Term>& terms, int64_t low, int64_t high, int64_t lane, int64_t lanes,
                    const Workspace& room) {
  const GemmKernels& k = gemm();
  bool fresh = true;
  for (const Term& term : terms) {
    const float* tokens = term.x->panels.const_data_ptr<float>();
    const int64_t padded = ceil_div(term.x->tokens, k.mr) * k.mr;
    const auto pack = term.w->lanes == Weight::Lanes::rows ? pack_rows : pack_columns;
    for (int64_t first = 0; first < term.x->depth; first += kDepth, fresh = false) {
      const int64_t depth = std::min(kDepth, term.x->depth - first);
      pack(*term.w, lane, lanes, first, depth, room.rows, room.panel);
      for (int64_t t = low; t < high; t += k.mr) {
        const float* tile = tokens + first * padded + t * depth;
        for (int64_t s = 0; s < lanes; s += k.nr) {
          k.multiply(tile, room.panel + s * depth, depth, std::min<int64_t>(k.mr, high - t), fresh,
                     room.sums + (t - low) * lanes + s, lanes);
        }
      }
    }
  }
  if (fresh) std::fill(room.sums, room.sums + (high - low) * lanes, 0.0f);
}

void store_piece(const Output& out, int64_t low, int64_t high, int64_t lane, int64_t lanes, float* sums) {
  const int64_t count = std::min(lanes, out.width - lane);
  for (int64_t t = low; t < high; ++t) {
    float* row = sums + (t - low) * lanes;
    if (out.start != nullptr) {
      const float* start = out.start + t * out.start_stride + lane;
      for (int64_t j = 0; j < count; ++j) row[j] += start[j];
    }
    gemm().narrow(row, out.element, count, out.y + (t * out.width + lane) * size_of(out.element));
  }
}

at::Tensor panels_room(int64_t count, const at::Tensor& like, bool keep) {
  const at::TensorOptions options = like.options().dtype(at::kFloat);
  if (!keep || count * 4 < (int64_t{1} << 18)) return at::empty({count}, options);
  return at::from_blob(kept_room(count * sizeof(float), Keeps::tokens), {count}, options);
}

Weight dense_weight(const at::Tensor& dense, Weight::Lanes lanes) {
  const auto other = lanes == Weight::Lanes::rows ? Weight::Lanes::columns : Weight::Lanes::rows;
  if (dense.stride(1) != 1 && dense.stride(0) == 1 && dense.size(0) > 1) {  // stored the other way round
    return {dense.t(), nullptr, dense.size(1), dense.size(0), other};
  }
  const at::Tensor rows = dense.stride(1) == 1 || dense.size(1) == 1 ? dense : dense.contiguous();
  return {rows, nullptr, dense.size(0), dense.size(1), lanes};
}

}  // namespace

Weight weight_rows(const at::Tensor& dense) { return dense_weight(dense, Weight::Lanes::rows); }
Weight weight_columns(const at::Tensor& dense) { return dense_weight(dense, Weight::Lanes::columns); }
Weight weight_rows(const Packed& w) { return {at::Tensor(), &w, w.rows, w.columns, Weight::Lanes::rows}; }
Weight weight_columns(const Packed& w) { return {at::Tensor(), &w, w.rows, w.columns, Weight::Lanes::columns}; }

int64_t tokens_at_once(int64_t depth) {
  return std::max(kTokens, kTokenBytes / 4 / std::max<int64_t>(1, depth) / kTokens * kTokens);
}

TokenPanels pack_tokens(const at::Tensor& x, bool keep) {
  const GemmKernels& k = gemm();
  const int64_t tokens = x.size(0), depth = x.size(1), tiles = ceil_div(tokens, k.mr);
  TokenPanels packed{panels_room(tiles * k.mr * depth, x, keep), tokens, depth};
  const Element element = element_of(x.scalar_type());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  float* to = packed.panels.mutable_data_ptr<float>();
  at::parallel_for(0, tiles, grain(k.mr * depth), [&](int64_t begin, int64_t end) {
    std::vector<float> rows(k.mr * (kDepth + 8));
    for (int64_t first = 0; first < depth; first += kDepth) {
      const int64_t count = std::min(kDepth, depth - first);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t there = std::min<int64_t>(k.mr, tokens - tile * k.mr);
        for (int64_t i = 0; i < there; ++i) {
          k.widen(from + ((tile * k.mr + i) * x.stride(0) + first) * size_of(element), element, count,
                  rows.data() + i * (kDepth + 8));
        }
        k.transpose_tokens(rows.data(), kDepth + 8, there, count, to + first * tiles * k.mr + tile * k.mr * count);
      }
    }
  });
  return packed;
}

at::Tensor product(const std::vector<Term>& terms, at::ScalarType dtype, const std::optional<at::Tensor>& start) {
  const int64_t tokens = terms.front().x->tokens, width = terms.front().w->width();
  at::Tensor y = at::empty({tokens, width}, terms.front().x->panels.options().dtype(dtype));
  if (tokens == 0 || width == 0) return y;
  const at::Tensor first = start.has_value() ? start->to(at::kFloat).contiguous() : at::Tensor();
  const Output out{static_cast<char*>(y.mutable_data_ptr()), element_of(dtype), width,
                   start.has_value() ? first.const_data_ptr<float>() : nullptr,
                   start.has_value() && first.dim() == 2 ? width : 0};
  int64_t work = 0;
  for (const Term& term : terms) work += term.x->depth * tokens * width;
  const int64_t threads = work < kSmallWork ? 1 : at::get_num_threads();
  const Cut cut = cut_of(tokens, width, threads);
  const int64_t across = ceil_div(width, cut.lanes), pieces = across * ceil_div(tokens, cut.tokens);
  std::atomic<int64_t> next{0};  // a thread whose core is busy with something else takes fewer pieces
  at::parallel_for(0, std::min(threads, pieces), 1, [&](int64_t, int64_t) {
    const Workspace room(cut);
    for (int64_t piece = next++; piece < pieces; piece = next++) {
      const int64_t low = piece / across * cut.tokens, lane = piece % across * cut.lanes;
      const int64_t high = std::min(low + cut.tokens, tokens);
      const int64_t lanes = std::min(cut.lanes, ceil_div(width - lane, gemm().nr) * gemm().nr);
      multiply_piece(terms, low, high, lane, lanes, room);
      store_piece(out, low, high, lane, lanes, room.sums);
    }
  });
  return y;
}

at::Tensor few_rows(const at::Tensor& x, const Weight& w) {
  const at::TensorOptions options = x.options().dtype(at::kFloat);
  return add_few_rows(x, w, at::zeros({x.size(0), w.width()}, options));
}

at::Tensor add_few_rows(const at::Tensor& x, const Weight& w, at::Tensor sums) {
  const at::Tensor wide = x.to(at::kFloat).contiguous();
  const float* from = wide.const_data_ptr<float>();
  float* to = sums.mutable_data_ptr<float>();
  const int64_t tokens = x.size(0), ld = w.dense.stride(0);
  if (tokens == 0) return sums;
  const Element element = element_of(w.dense.scalar_type());
  const void* d = w.dense.const_data_ptr();
  if (w.lanes == Weight::Lanes::rows) {
    over_rows(w.rows, w.columns, 16, [&](int64_t low, int64_t high) {
      gemm().dot_rows(from, w.columns, tokens, d, element, ld, w.columns, low, high, true, to, w.rows);
    });
    return sums;
  }
  // Columns as lanes: a thread has columns of its own where there are enough of them, else rows whose parts are added.
  constexpr int64_t kWidth = 512;
  if (w.columns >= kWidth || w.rows <= kPartRows) {
    at::parallel_for(0, ceil_div(w.columns, kWidth), grain(kWidth * w.rows), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t first = c * kWidth, count = std::min(kWidth, w.columns - first);
        gemm().add_rows(from, w.rows, tokens, d, element, ld, 0, w.rows, first, count, to + first, w.columns);
      }
    });
    return sums;
  }
  const int64_t parts = ceil_div(w.rows, kPartRows);
  at::Tensor partial = at::zeros({parts, tokens, w.columns}, sums.options());
  float* part = partial.mutable_data_ptr<float>();
  at::parallel_for(0, parts, grain(kPartRows * w.columns), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t low = p * kPartRows, high = std::min(low + kPartRows, w.rows);
      gemm().add_rows(from, w.rows, tokens, d, element, ld, low, high, 0, w.columns, part + p * tokens * w.columns,
                      w.columns);
    }
  });
  for (int64_t p = 0; p < parts; ++p) sums.add_(partial[p]);
  return sums;
}

}  // namespace lorasb
