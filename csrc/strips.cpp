#include "strips.h"

#include <functional>
#include <vector>

#include "isa.h"
#include "room.h"
#include "tasks.h"

namespace lorasb {
namespace {

// Measured on two Zen 4 cores at 4096 x 4096.
constexpr int64_t kTokensAtOnce = 512;      // their sums stay in a second-level cache
constexpr int64_t kLongTokens = 64;         // up to these, memory is read in long runs
constexpr int64_t kTokensBesideTiles = 32;  // where the processor has matrix tiles, the BLAS uses them for more

// How much of W is decoded at a time: 128 KiB either way.
struct Shape {
  int64_t strips, depth;
  int64_t apart() const { return depth * kStripLanes; }
  int64_t width() const { return strips * kStripLanes; }
};
constexpr Shape kWide = {4, kStripChunk / 4}, kLong = {1, kStripChunk};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One term of a sum: tokens [M, depth] in tiles, and the strips that they meet.
struct Term {
  at::Tensor tiles;
  int64_t depth;  // whole steps
  std::function<void(const Piece&, uint16_t* out)> decode;
};

struct Result {
  int64_t tokens, lanes;
  bool apart, add;
  const uint16_t* bias;
  uint16_t* y;
  Shape shape;
};

at::Tensor tiles_of(const at::Tensor& x, bool apart) {
  const int64_t M = x.size(0), steps = ceil_div(x.size(1), kStripDepth), tiles = ceil_div(M, kTileTokens);
  at::Tensor found = at::empty({tiles, steps, kTileTokens, kStripDepth}, x.options());
  uint16_t* to = mutable_bits(found);
  const uint16_t* from = bits(x);
  at::parallel_for(0, tiles, grain(kTileTokens * x.size(1)), [&](int64_t low, int64_t high) {
    kernels().strips->tiles(from, x.stride(0), M, x.size(1), apart, low, high, to);
  });
  return found;
}

Term term(const at::Tensor& x, bool apart, decltype(Term::decode) decode) {
  return {tiles_of(x, apart), ceil_div(x.size(1), kStripDepth) * kStripDepth, std::move(decode)};
}

// Tokens [low, high) of `count` strips from `lane` on.
void sum_block(const std::vector<Term>& terms, const Result& result, int64_t low, int64_t high, int64_t lane,
               int64_t count, uint16_t* strips, float* sums) {
  const StripKernels& k = *kernels().strips;
  const int64_t apart = result.shape.apart(), width = result.shape.width();
  bool fresh = true;
  for (const Term& term : terms) {
    const uint16_t* tiles = bits(term.tiles);
    for (int64_t first = 0; first < term.depth; first += result.shape.depth, fresh = false) {
      const int64_t depth = std::min(result.shape.depth, term.depth - first), steps = depth / kStripDepth;
      term.decode({lane, count, first, depth, apart}, strips);
      for (int64_t t = low; t < high; t += kTileTokens) {
        const int64_t rows = std::min<int64_t>(kTileTokens, high - t);
        const uint16_t* tile = tiles + (t / kTileTokens * term.depth + first) * kTileTokens;
        for (int64_t s = 0; s < count; ++s) {
          k.multiply(tile, rows, strips + s * apart, steps, fresh, sums + (t - low) * width + s * kStripLanes, width);
        }
      }
    }
  }
  for (int64_t s = 0; s < count; ++s) {
    const int64_t place = lane + s * kStripLanes;
    k.finish(sums + s * kStripLanes, width, high - low, result.lanes - place, result.apart,
             result.bias == nullptr ? nullptr : result.bias + place, result.add, result.y + low * result.lanes + place,
             result.lanes);
  }
}

void sum(const std::vector<Term>& terms, const Result& result) {
  const Shape shape = result.shape;
  const int64_t strips = ceil_div(result.lanes, kStripLanes), blocks = ceil_div(result.tokens, kTokensAtOnce);
  const int64_t tokens = ceil_div(ceil_div(result.tokens, blocks), kTileTokens) * kTileTokens;
  at::parallel_for(0, strips, grain(kStripLanes * terms.front().depth), [&](int64_t begin, int64_t end) {
    const int64_t strip_bytes = shape.strips * shape.apart() * sizeof(uint16_t);
    char* room = static_cast<char*>(kept_room(strip_bytes + tokens * shape.width() * sizeof(float)));
    float* sums = reinterpret_cast<float*>(room + strip_bytes);
    for (int64_t low = 0; low < result.tokens; low += tokens) {
      const int64_t high = std::min(low + tokens, result.tokens);
      for (int64_t s = begin; s < end; s += shape.strips) {
        sum_block(terms, result, low, high, s * kStripLanes, std::min(shape.strips, end - s),
                  reinterpret_cast<uint16_t*>(room), sums);
      }
    }
  });
}

Term weight_columns(const Packed& w, const at::Tensor& dy) {
  return term(dy, false, [&w](const Piece& piece, uint16_t* out) { kernels().strips->of_columns(w, piece, out); });
}

}  // namespace

bool takes_strips(const Packed& w, at::ScalarType dtype, int64_t M) {
  return kernels().strips != nullptr && dtype == at::kBFloat16 && M > 0 && w.rows > 0 && w.columns > 0 &&
         w.whole_blocks() && w.rounding != Rounding::fp16 && (M <= kTokensBesideTiles || !has_matrix_tiles());
}

at::Tensor strips_product(const Packed& w, const at::Tensor& x, const at::Tensor& v, const at::Tensor& b,
                          const std::optional<at::Tensor>& bias) {
  std::vector<Term> terms;
  terms.push_back(term(x, true, [&w](const Piece& piece, uint16_t* out) { kernels().strips->of_rows(w, piece, out); }));
  const at::Tensor factor = b.contiguous(), rows = v.contiguous();
  const uint16_t* d = bits(factor);
  if (b.size(1) > 0) {
    terms.push_back(term(rows, false, [&](const Piece& piece, uint16_t* out) {
      kernels().strips->of_dense_rows(d, b.size(0), b.size(1), piece, out);
    }));
  }
  at::Tensor y = at::empty({x.size(0), w.rows}, x.options());
  const at::Tensor offset = bias.has_value() ? bias->contiguous() : at::Tensor();
  sum(terms, {x.size(0), w.rows, false, false, bias.has_value() ? bits(offset) : nullptr, mutable_bits(y),
              x.size(0) <= kLongTokens ? kLong : kWide});
  return y;
}

at::Tensor strips_product_transposed(const Packed& w, const at::Tensor& dy, const at::Tensor& c, const at::Tensor& a) {
  std::vector<Term> terms;
  terms.push_back(weight_columns(w, dy));
  const at::Tensor factor = a.contiguous(), rows = c.contiguous();
  const uint16_t* d = bits(factor);
  if (a.size(0) > 0) {
    terms.push_back(term(rows, false, [&](const Piece& piece, uint16_t* out) {
      kernels().strips->of_dense_columns(d, a.size(0), a.size(1), piece, out);
    }));
  }
  at::Tensor dx = at::empty({dy.size(0), w.columns}, dy.options());
  sum(terms, {dy.size(0), w.columns, true, false, nullptr, mutable_bits(dx), kWide});
  return dx;
}

void add_strips_product_transposed(const Packed& w, const at::Tensor& dy, at::Tensor& dx) {
  std::vector<Term> terms;
  terms.push_back(weight_columns(w, dy));
  sum(terms, {dy.size(0), w.columns, true, true, nullptr, mutable_bits(dx), kWide});
}

}  // namespace lorasb
