#include "gemm/adapted_linear.h"

#include <algorithm>

#include "gemm/dropout.h"

namespace lorasb {
namespace {

// s·R in fp32.
at::Tensor scaled(const Adapter& adapter) {
  const at::Tensor core = adapter.core.to(at::kFloat);
  return adapter.scale == 1.0 ? core : core * adapter.scale;
}

// Few tokens and a dense W, or none: products that pack nothing.
bool is_few(int64_t tokens, const std::optional<Weight>& w) {
  return tokens <= kFewRows && (!w.has_value() || w->packed == nullptr);
}

at::Tensor zero_sums(const at::Tensor& x, int64_t width) {
  return at::zeros({x.size(0), width}, x.options().dtype(at::kFloat));
}

std::optional<at::Tensor> dropout_mask(const Dropout& dropout, int64_t rows, int64_t columns) {
  if (!dropout.seed.has_value()) return std::nullopt;
  return keep_mask({rows, columns}, dropout.probability, *dropout.seed);
}

std::optional<at::Tensor> rows_of_mask(const std::optional<at::Tensor>& mask, int64_t low, int64_t count) {
  return mask.has_value() ? std::optional<at::Tensor>(mask->narrow(0, low, count)) : std::nullopt;
}

// Calls part(first, count) for as many tokens as are packed at once, and once for no tokens.
template <typename F>
void over_parts(int64_t tokens, int64_t k, const F& part) {
  const int64_t most = max_packed_tokens(k);
  for (int64_t low = 0; low == 0 || low < tokens; low += most) part(low, std::min(most, tokens - low));
}

at::Tensor joined(const std::vector<at::Tensor>& parts) { return parts.size() == 1 ? parts.front() : at::cat(parts); }

// y and u; `adapter_x` is x under dropout.
std::tuple<at::Tensor, at::Tensor> forward_few(const at::Tensor& x, const std::optional<Weight>& w,
                                               const Adapter& adapter, const std::optional<at::Tensor>& bias,
                                               const at::Tensor& adapter_x) {
  // The order of the sum: base, adapter, bias.
  const at::Tensor u = multiply_few_tokens(adapter_x, transposed_weight(adapter.a));
  at::Tensor sums = zero_sums(x, adapter.b.size(0));
  if (w.has_value()) add_few_tokens(x, *w, sums);
  add_few_tokens(at::mm(u, scaled(adapter).t()), transposed_weight(adapter.b), sums);
  if (bias.has_value()) sums.add_(*bias);
  return {sums.to(x.scalar_type()), u.to(x.scalar_type())};
}

// The same for any number of tokens: base and adapter are terms of one product.
std::tuple<at::Tensor, at::Tensor> forward_packed(const PackedTokens& x, const std::optional<Weight>& w,
                                                  const Adapter& adapter, const std::optional<at::Tensor>& bias,
                                                  const PackedTokens& adapter_x, at::ScalarType dtype) {
  const Weight a = transposed_weight(adapter.a), b = transposed_weight(adapter.b);
  const at::Tensor u = fp32_gemm({{&adapter_x, &a}}, at::kFloat);
  const PackedTokens v = pack_tokens(at::mm(u, scaled(adapter).t()));
  std::vector<Term> terms;
  if (w.has_value()) terms.push_back({&x, &*w});
  terms.push_back({&v, &b});
  return {fp32_gemm(terms, dtype, bias), u.to(dtype)};
}

std::tuple<at::Tensor, at::Tensor> forward_part(const at::Tensor& x, const std::optional<Weight>& w,
                                                const Adapter& adapter, const std::optional<at::Tensor>& bias,
                                                const std::optional<at::Tensor>& mask) {
  const at::Tensor masked = mask.has_value() ? x * *mask : x;
  if (is_few(x.size(0), w)) return forward_few(x, w, adapter, bias, masked);
  const PackedTokens packed = pack_tokens(x, true);
  if (!mask.has_value()) return forward_packed(packed, w, adapter, bias, packed, x.scalar_type());
  return forward_packed(packed, w, adapter, bias, pack_tokens(masked), x.scalar_type());
}

// dx of some tokens as one sum over the members of a group, and their dR.
class BackwardPart {
 public:
  BackwardPart(const std::vector<Member>& members, bool need_dx, bool need_dcore)
      : need_dx_(need_dx), need_dcore_(need_dcore) {
    panels_.reserve(2 * members.size());  // terms refer to elements of both: they must not move
    factors_.reserve(members.size());
  }

  // `mask` of dropout is for a group of one: it is applied to the adapter's part of dx and not to the base's.
  void add(const Member& member, const at::Tensor& dy, const at::Tensor& u, const std::optional<at::Tensor>& mask) {
    const Adapter& adapter = member.adapter;
    const bool few = is_few(dy.size(0), member.w);
    const bool use_scratch = panels_.empty();  // one operand at a time
    const PackedTokens* packed = few ? nullptr : &panels_.emplace_back(pack_tokens(dy, use_scratch));
    const Weight b = plain_weight(adapter.b);
    const at::Tensor t = few ? multiply_few_tokens(dy, b) : fp32_gemm({{packed, &b}}, at::kFloat);
    dcores.push_back(need_dcore_ ? core_gradient(t, u, adapter) : at::empty({0}, adapter.core.options()));
    if (!need_dx_) return;
    const at::Tensor c = at::mm(t, scaled(adapter));
    if (few) {
      add_few(member, dy, c, mask);
    } else {
      add_terms(member, packed, c, mask);
    }
  }

  at::Tensor dx(at::ScalarType dtype) const {
    return terms_.empty() ? start_->to(dtype) : fp32_gemm(terms_, dtype, start_);
  }

  std::vector<at::Tensor> dcores;

 private:
  static at::Tensor core_gradient(const at::Tensor& t, const at::Tensor& u, const Adapter& adapter) {
    return at::mm(t.t(), u.to(at::kFloat)).mul_(adapter.scale).to(adapter.core.scalar_type());
  }

  // The order of the sum: the adapter's part, then the base's, member after member.
  void add_few(const Member& member, const at::Tensor& dy, const at::Tensor& c, const std::optional<at::Tensor>& mask) {
    if (!start_.has_value()) start_ = zero_sums(dy, member.adapter.a.size(1));
    add_few_tokens(c, plain_weight(member.adapter.a), *start_);
    if (mask.has_value()) start_->mul_(*mask);
    if (member.w.has_value()) add_few_tokens(dy, *member.w, *start_);
  }

  // Terms: dy W, then c A. Under dropout c A is computed on its own, masked, and added to the sum of dy W.
  void add_terms(const Member& member, const PackedTokens* dy, const at::Tensor& c,
                 const std::optional<at::Tensor>& mask) {
    if (member.w.has_value()) terms_.push_back({dy, &*member.w});
    const PackedTokens& packed_c = panels_.emplace_back(pack_tokens(c));
    const Weight& a = factors_.emplace_back(plain_weight(member.adapter.a));
    if (mask.has_value()) {
      start_ = fp32_gemm({{&packed_c, &a}}, at::kFloat).mul_(*mask);
    } else {
      terms_.push_back({&packed_c, &a});
    }
  }

  bool need_dx_, need_dcore_;
  std::vector<PackedTokens> panels_;  // dy and c of each member
  std::vector<Weight> factors_;
  std::vector<Term> terms_;
  std::optional<at::Tensor> start_;  // sums of few tokens, or the adapter's part under dropout
};

std::tuple<at::Tensor, std::vector<at::Tensor>> backward(const std::vector<at::Tensor>& dys,
                                                         const std::vector<Member>& members,
                                                         const std::vector<at::Tensor>& us, const Dropout& dropout,
                                                         bool need_dx, bool need_dcore) {
  int64_t k = 0;
  for (const at::Tensor& dy : dys) k = std::max(k, dy.size(1));
  const int64_t tokens = dys.front().size(0);
  const std::optional<at::Tensor> mask =
      need_dx ? dropout_mask(dropout, tokens, members.front().adapter.a.size(1)) : std::nullopt;
  std::vector<at::Tensor> dxs, dcores;
  over_parts(tokens, k, [&](int64_t low, int64_t count) {
    BackwardPart part(members, need_dx, need_dcore);
    const std::optional<at::Tensor> part_mask = rows_of_mask(mask, low, count);
    for (size_t i = 0; i < members.size(); ++i) {
      const at::Tensor u = us[i].size(0) == tokens ? us[i].narrow(0, low, count) : us[i];  // u is empty if unneeded
      part.add(members[i], dys[i].narrow(0, low, count), u, part_mask);
    }
    if (need_dx) dxs.push_back(part.dx(dys.front().scalar_type()));
    for (size_t i = 0; i < members.size(); ++i) {
      if (low == 0) {
        dcores.push_back(part.dcores[i]);
      } else if (need_dcore) {
        dcores[i].add_(part.dcores[i]);
      }
    }
  });
  return {need_dx ? joined(dxs) : at::empty({0}, dys.front().options()), dcores};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> adapted_linear(const at::Tensor& x, const std::optional<Weight>& w,
                                                  const Adapter& adapter, const std::optional<at::Tensor>& bias,
                                                  const Dropout& dropout) {
  const std::optional<at::Tensor> mask = dropout_mask(dropout, x.size(0), x.size(1));
  std::vector<at::Tensor> ys, us;
  over_parts(x.size(0), x.size(1), [&](int64_t low, int64_t count) {
    auto [y, u] = forward_part(x.narrow(0, low, count), w, adapter, bias, rows_of_mask(mask, low, count));
    ys.push_back(y);
    us.push_back(u);
  });
  return {joined(ys), joined(us)};
}

std::tuple<at::Tensor, at::Tensor> adapted_backward(const at::Tensor& dy, const std::optional<Weight>& w,
                                                    const Adapter& adapter, const at::Tensor& u, const Dropout& dropout,
                                                    bool need_dx, bool need_dcore) {
  auto [dx, dcores] = backward({dy}, {{w, adapter}}, {u}, dropout, need_dx, need_dcore);
  return {dx, dcores.front()};
}

std::vector<std::tuple<at::Tensor, at::Tensor>> adapted_group(const at::Tensor& x, const std::vector<Member>& members,
                                                              const std::vector<std::optional<at::Tensor>>& biases) {
  std::vector<std::tuple<at::Tensor, at::Tensor>> results;
  const bool shared = x.size(0) > kFewRows && x.size(0) <= max_packed_tokens(x.size(1));
  const PackedTokens packed = shared ? pack_tokens(x, true) : PackedTokens{};
  for (size_t i = 0; i < members.size(); ++i) {
    const auto& [w, adapter] = members[i];
    results.push_back(shared ? forward_packed(packed, w, adapter, biases[i], packed, x.scalar_type())
                             : adapted_linear(x, w, adapter, biases[i], {}));
  }
  return results;
}

std::tuple<at::Tensor, std::vector<at::Tensor>> adapted_group_backward(const std::vector<at::Tensor>& dys,
                                                                       const std::vector<Member>& members,
                                                                       const std::vector<at::Tensor>& us, bool need_dx,
                                                                       bool need_dcore) {
  return backward(dys, members, us, {}, need_dx, need_dcore);
}

}  // namespace lorasb
