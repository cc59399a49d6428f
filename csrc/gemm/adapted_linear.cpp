#include "gemm/adapted_linear.h"

#include <algorithm>

namespace lorasb {
namespace {

// s·R in fp32.
Tensor scaled(const Layer& layer) {
  const Tensor core = layer.core.to(at::kFloat);
  return layer.scale == 1.0 ? core : core * layer.scale;
}

// The unpacked path: few tokens, and a dense W or none.
bool is_few(int64_t tokens, const Layer& layer) {
  return tokens <= kFewRows && (!layer.w.has_value() || layer.w->packed == nullptr);
}

Tensor zero_sums(const Tensor& x, int64_t width) {
  return at::zeros({x.size(0), width}, x.options().dtype(at::kFloat));
}

OptionalTensor rows_of_mask(const OptionalTensor& mask, int64_t low, int64_t count) {
  return mask.has_value() ? OptionalTensor(mask->narrow(0, low, count)) : std::nullopt;
}

// y and u; `adapter_x` is x under dropout.
TensorPair forward_few(const Tensor& x, const Layer& layer, const Tensor& adapter_x) {
  // The order of the sum: base, adapter, bias.
  const Tensor u = multiply_few_tokens(adapter_x, as_weight(layer.a, false));
  Tensor sums = zero_sums(x, layer.b.size(0));
  if (layer.w.has_value()) add_few_tokens(x, *layer.w, sums);
  add_few_tokens(at::mm(u, scaled(layer).t()), as_weight(layer.b, false), sums);
  if (layer.bias.has_value()) sums.add_(*layer.bias);
  return {sums.to(x.scalar_type()), u.to(x.scalar_type())};
}

// The same for any number of tokens: base and adapter are terms of one product.
TensorPair forward_packed(const PackedTokens& x, const Layer& layer, const PackedTokens& adapter_x,
                          at::ScalarType dtype) {
  const Weight a = as_weight(layer.a, false), b = as_weight(layer.b, false);
  const Tensor u = fp32_gemm({{&adapter_x, &a}}, at::kFloat);
  const PackedTokens v = pack_tokens(at::mm(u, scaled(layer).t()));
  std::vector<Term> terms;
  if (layer.w.has_value()) terms.push_back({&x, &*layer.w});
  terms.push_back({&v, &b});
  return {fp32_gemm(terms, dtype, layer.bias), u.to(dtype)};
}

TensorPair forward_part(const Tensor& x, const Layer& layer, const OptionalTensor& mask) {
  const Tensor masked = mask.has_value() ? x * *mask : x;
  if (is_few(x.size(0), layer)) return forward_few(x, layer, masked);
  const PackedTokens packed = pack_tokens(x, true);
  return forward_packed(packed, layer, mask.has_value() ? pack_tokens(masked) : packed, x.scalar_type());
}

Tensor core_gradient(const Tensor& t, const Tensor& u, const Layer& layer) {
  return at::mm(t.t(), u.to(at::kFloat)).mul_(layer.scale).to(layer.core.scalar_type());
}

// dx of few tokens as one sum over the layers of a group, and their dR, if they are needed. The order of the sum: the
// adapter's part, then the base's, layer after layer.
Gradients backward_few(const std::vector<Tensor>& dys, const std::vector<Layer>& layers, const std::vector<Tensor>& us,
                       const OptionalTensor& mask, bool need_dx, bool need_dcore) {
  Tensor sums = zero_sums(dys.front(), layers.front().a.size(1));
  std::vector<Tensor> dcores;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const Tensor t = multiply_few_tokens(dys[i], as_weight(layer.b, true));
    if (need_dcore) dcores.push_back(core_gradient(t, us[i], layer));
    if (!need_dx) continue;
    add_few_tokens(at::mm(t, scaled(layer)), as_weight(layer.a, true), sums);
    if (mask.has_value()) sums.mul_(*mask);
    if (layer.w.has_value()) add_few_tokens(dys[i], *layer.w, sums);
  }
  return {sums.to(dys.front().scalar_type()), dcores};
}

// The same for any number of tokens. Terms: dy W, then c A of each layer. Under dropout c A is computed separately,
// masked, and added to the sum of dy W.
Gradients backward_packed(const std::vector<Tensor>& dys, const std::vector<Layer>& layers,
                          const std::vector<Tensor>& us, const OptionalTensor& mask, bool need_dx, bool need_dcore) {
  std::vector<PackedTokens> panels;  // dy and c of each layer
  std::vector<Weight> factors;
  panels.reserve(2 * layers.size());  // terms refer to elements of both: they must not move
  factors.reserve(layers.size());
  std::vector<Term> terms;
  std::vector<Tensor> dcores;
  OptionalTensor start;  // the adapter's part under dropout
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const Weight b = as_weight(layer.b, true);
    const PackedTokens& dy = panels.emplace_back(pack_tokens(dys[i], i == 0));  // one operand at a time in scratch
    const Tensor t = fp32_gemm({{&dy, &b}}, at::kFloat);
    if (need_dcore) dcores.push_back(core_gradient(t, us[i], layer));
    if (!need_dx) continue;
    if (layer.w.has_value()) terms.push_back({&dy, &*layer.w});
    const PackedTokens& c = panels.emplace_back(pack_tokens(at::mm(t, scaled(layer))));
    const Weight& a = factors.emplace_back(as_weight(layer.a, true));
    if (mask.has_value()) {
      start = fp32_gemm({{&c, &a}}, at::kFloat).mul_(*mask);
    } else {
      terms.push_back({&c, &a});
    }
  }
  const auto dtype = dys.front().scalar_type();
  if (terms.empty()) return {start.has_value() ? start->to(dtype) : Tensor(), dcores};
  return {fp32_gemm(terms, dtype, start), dcores};
}

}  // namespace

TensorPair adapted_linear(const Tensor& x, const Layer& layer, const Dropout& dropout) {
  const OptionalTensor mask = dropout.mask(x.sizes());
  std::vector<Tensor> ys, us;
  over_parts(x.size(0), x.size(1), [&](int64_t low, int64_t count) {
    auto [y, u] = forward_part(x.narrow(0, low, count), layer, rows_of_mask(mask, low, count));
    ys.push_back(y);
    us.push_back(u);
  });
  return {joined(ys), joined(us)};
}

std::vector<TensorPair> adapted_group(const Tensor& x, const std::vector<Layer>& layers) {
  std::vector<TensorPair> results;
  const bool shared = x.size(0) > kFewRows && x.size(0) <= max_packed_tokens(x.size(1));
  const PackedTokens packed = shared ? pack_tokens(x, true) : PackedTokens{};
  for (const Layer& layer : layers) {
    results.push_back(shared ? forward_packed(packed, layer, packed, x.scalar_type()) : adapted_linear(x, layer, {}));
  }
  return results;
}

Gradients adapted_backward(const std::vector<Tensor>& dys, const std::vector<Layer>& layers,
                           const std::vector<Tensor>& us, const Dropout& dropout, bool need_dx, bool need_dcore) {
  int64_t k = 0;
  for (const Tensor& dy : dys) k = std::max(k, dy.size(1));
  const int64_t tokens = dys.front().size(0);
  const OptionalTensor mask = need_dx ? dropout.mask({tokens, layers.front().a.size(1)}) : std::nullopt;
  std::vector<Tensor> dxs, dcores;
  over_parts(tokens, k, [&](int64_t low, int64_t count) {
    std::vector<Tensor> part_dys, part_us;
    for (size_t i = 0; i < layers.size(); ++i) {
      part_dys.push_back(dys[i].narrow(0, low, count));
      // u is empty if it is not needed
      part_us.push_back(us[i].size(0) == tokens ? us[i].narrow(0, low, count) : us[i]);
    }
    const auto backward = is_few(count, layers.front()) ? backward_few : backward_packed;
    const auto [dx, part_dcores] =
        backward(part_dys, layers, part_us, rows_of_mask(mask, low, count), need_dx, need_dcore);
    if (need_dx) dxs.push_back(dx);
    if (low == 0) dcores = part_dcores;
    for (size_t i = 0; low > 0 && i < part_dcores.size(); ++i) dcores[i].add_(part_dcores[i]);
  });
  if (!need_dcore) {
    for (const Layer& layer : layers) dcores.push_back(at::empty({0}, layer.core.options()));
  }
  return {need_dx ? joined(dxs) : at::empty({0}, dys.front().options()), dcores};
}

}  // namespace lorasb
