#include "gemm/bf16_gemm.h"

#include <functional>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch_memory.h"

namespace lorasb {
namespace {

// Measured on two Zen 4 cores at 4096 x 4096.
constexpr int64_t kTokensAtOnce = 512;      // their sums stay in a second-level cache
constexpr int64_t kTokensBesideTiles = 32;  // where the processor has matrix tiles, the BLAS uses them for more

constexpr Shape kNarrow = {1, kStripChunk / 2};  // plain strips: 16 KiB for a first-level cache

int64_t tile_tokens() { return kernels().strips->tile_tokens; }
Shape wide() { return kernels().strips->wide; }

// One term of a sum: tokens [M, depth] in tiles, and the strips that they meet.
struct Term {
  at::Tensor tiles;
  int64_t depth;  // whole steps
  std::function<void(const Piece&, uint16_t* out, float* scales)> decode;
  int64_t run = 0;  // elements that share a scale, where strips are plain
};

struct Result {
  int64_t tokens, lanes;
  bool apart, add;
  const uint16_t* bias;
  uint16_t* y;
  Shape shape;
};

// Memory for tiles: fresh pages take longer than filling them, so what is large and not too large is kept.
at::Tensor tile_room(at::IntArrayRef shape, const at::TensorOptions& options) {
  constexpr int64_t kLeast = int64_t{1} << 18, kMost = int64_t{16} << 20;
  const int64_t size = c10::multiply_integers(shape) * static_cast<int64_t>(sizeof(uint16_t));
  if (size < kLeast || size > kMost) return at::empty(shape, options);
  return at::from_blob(kept_room(size, Keeps::tokens), shape, options);
}

at::Tensor tiles_of(const at::Tensor& x, int apart, const Shape& shape, bool kept) {
  const int64_t tokens = tile_tokens(), M = x.size(0), steps = ceil_div(x.size(1), kStripDepth),
                tiles = ceil_div(M, tokens);
  const std::vector<int64_t> sizes = {tiles, steps, tokens, kStripDepth};
  at::Tensor found = kept ? tile_room(sizes, x.options()) : at::empty(sizes, x.options());
  uint16_t* to = mutable_bits(found);
  const uint16_t* from = bits(x);
  at::parallel_for(0, tiles, grain(tokens * x.size(1)), [&](int64_t low, int64_t high) {
    kernels().strips->tiles(from, x.stride(0), M, x.size(1), tokens, apart, shape.depth / kStripDepth, low, high, to);
  });
  return found;
}

// `kept`: the tiles lie in memory that the thread keeps, which is one term's.
Term term(const at::Tensor& x, int apart, const Shape& shape, bool kept, decltype(Term::decode) decode) {
  return {tiles_of(x, apart, shape, kept), ceil_div(x.size(1), kStripDepth) * kStripDepth, std::move(decode)};
}

// What a thread works in.
struct Room {
  uint16_t* strips;
  float *scales, *sums;

  Room(const Shape& shape, int64_t tokens) {
    const int64_t of_strips = shape.strips * shape.apart() * sizeof(uint16_t);
    const int64_t of_scales = kStripChunk * sizeof(float);
    char* room = static_cast<char*>(kept_room(of_strips + of_scales + tokens * shape.width() * sizeof(float)));
    strips = reinterpret_cast<uint16_t*>(room);
    scales = reinterpret_cast<float*>(room + of_strips);
    sums = reinterpret_cast<float*>(room + of_strips + of_scales);
  }
};

// Tokens [low, high) of `count` strips from `lane` on.
void sum_block(const std::vector<Term>& terms, const Result& result, int64_t low, int64_t high, int64_t lane,
               int64_t count, const Room& room) {
  const StripKernels& k = *kernels().strips;
  const int64_t at_once = k.tile_tokens, apart = result.shape.apart(), width = result.shape.width();
  bool fresh = true;
  for (const Term& term : terms) {
    const uint16_t* tiles = bits(term.tiles);
    const int64_t padded = term.tiles.size(0) * at_once;  // tokens
    for (int64_t first = 0; first < term.depth; first += result.shape.depth, fresh = false) {
      const int64_t depth = std::min(result.shape.depth, term.depth - first), steps = depth / kStripDepth;
      const int64_t run = std::min(term.run, depth) / kStripDepth;
      term.decode({lane, count, first, depth, apart}, room.strips, room.scales);
      for (int64_t t = low; t < high; t += at_once) {
        const int64_t rows = std::min(at_once, high - t);
        const uint16_t* tile = tiles + (first * padded + t * depth);
        float* sums = room.sums + (t - low) * width;
        for (int64_t s = 0; s < count; ++s) {
          if (run > 0) {
            k.multiply_scaled(tile, rows, room.strips, steps, run, room.scales, fresh, sums, width);
          } else {
            k.multiply(tile, rows, room.strips + s * apart, steps, fresh, sums + s * kStripLanes, width);
          }
        }
      }
    }
  }
  for (int64_t s = 0; s < count; ++s) {
    const int64_t place = lane + s * kStripLanes;
    k.finish(room.sums + s * kStripLanes, width, high - low, result.lanes - place, result.apart,
             result.bias == nullptr ? nullptr : result.bias + place, result.add, result.y + low * result.lanes + place,
             result.lanes);
  }
}

void sum(const std::vector<Term>& terms, const Result& result) {
  const Shape shape = result.shape;
  const int64_t strips = ceil_div(result.lanes, kStripLanes), blocks = ceil_div(result.tokens, kTokensAtOnce);
  const int64_t tokens = ceil_div(ceil_div(result.tokens, blocks), tile_tokens()) * tile_tokens();
  at::parallel_for(0, strips, grain(kStripLanes * terms.front().depth), [&](int64_t begin, int64_t end) {
    const Room room(shape, tokens);
    if (kernels().strips->begin != nullptr) kernels().strips->begin();
    for (int64_t low = 0; low < result.tokens; low += tokens) {
      const int64_t high = std::min(low + tokens, result.tokens);
      for (int64_t s = begin; s < end; s += shape.strips) {
        sum_block(terms, result, low, high, s * kStripLanes, std::min(shape.strips, end - s), room);
      }
    }
    if (kernels().strips->end != nullptr) kernels().strips->end();
  });
}

Term weight_rows(const Packed& w, const at::Tensor& x) {
  return term(x, 8, wide(), true,
              [&w](const Piece& piece, uint16_t* out, float*) { kernels().strips->of_rows(w, piece, out); });
}

Term plain_weight_rows(const Packed& w, const at::Tensor& x) {
  Term found = term(x, 4, kNarrow, true, [&w](const Piece& piece, uint16_t* out, float* scales) {
    kernels().strips->of_rows_plain(w, piece, out, scales);
  });
  found.run = w.block;
  return found;
}

Term weight_columns(const Packed& w, const at::Tensor& dy) {
  return term(dy, 1, wide(), true,
              [&w](const Piece& piece, uint16_t* out, float*) { kernels().strips->of_columns(w, piece, out); });
}

}  // namespace

bool takes_strips(const Packed& w, at::ScalarType dtype, int64_t M) {
  return kernels().strips != nullptr && dtype == at::kBFloat16 && M > 0 && w.rows > 0 && w.columns > 0 &&
         w.whole_blocks() && w.rounding != Rounding::fp16 &&
         (M <= kTokensBesideTiles || kernels().strips->begin != nullptr || !has_matrix_tiles());
}

at::Tensor strips_product(const Packed& w, const at::Tensor& x, const at::Tensor& v, const at::Tensor& b,
                          const std::optional<at::Tensor>& bias) {
  const bool plain = x.size(0) <= kernels().strips->plain_tokens;
  const Shape shape = plain ? kNarrow : wide();
  std::vector<Term> terms;
  terms.push_back(plain ? plain_weight_rows(w, x) : weight_rows(w, x));
  const at::Tensor factor = b.contiguous(), rows = v.contiguous();
  const uint16_t* d = bits(factor);
  if (b.size(1) > 0) {
    terms.push_back(term(rows, 1, shape, false, [&](const Piece& piece, uint16_t* out, float*) {
      kernels().strips->of_dense_rows(d, b.size(0), b.size(1), piece, out);
    }));
  }
  at::Tensor y = at::empty({x.size(0), w.rows}, x.options());
  const at::Tensor offset = bias.has_value() ? bias->contiguous() : at::Tensor();
  sum(terms, {x.size(0), w.rows, false, false, bias.has_value() ? bits(offset) : nullptr, mutable_bits(y), shape});
  return y;
}

at::Tensor strips_product_transposed(const Packed& w, const at::Tensor& dy, const at::Tensor& c, const at::Tensor& a) {
  std::vector<Term> terms;
  terms.push_back(weight_columns(w, dy));
  const at::Tensor factor = a.contiguous(), rows = c.contiguous();
  const uint16_t* d = bits(factor);
  if (a.size(0) > 0) {
    terms.push_back(term(rows, 1, wide(), false, [&](const Piece& piece, uint16_t* out, float*) {
      kernels().strips->of_dense_columns(d, a.size(0), a.size(1), piece, out);
    }));
  }
  at::Tensor dx = at::empty({dy.size(0), w.columns}, dy.options());
  sum(terms, {dy.size(0), w.columns, true, false, nullptr, mutable_bits(dx), wide()});
  return dx;
}

void add_strips_product_transposed(const Packed& w, const at::Tensor& dy, at::Tensor& dx) {
  std::vector<Term> terms;
  terms.push_back(weight_columns(w, dy));
  sum(terms, {dy.size(0), w.columns, true, true, nullptr, mutable_bits(dx), wide()});
}

}  // namespace lorasb
