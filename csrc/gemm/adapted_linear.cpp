#include "gemm/adapted_linear.h"

#include <algorithm>

#include "gemm/dropout.h"

namespace lorasb {
namespace {

// core·scale in fp32.
at::Tensor scaled(const Adapter& adapter) {
  const at::Tensor core = adapter.core.to(at::kFloat);
  return adapter.scale == 1.0 ? core : core * adapter.scale;
}

bool walks_rows(int64_t tokens, const std::optional<Weight>& w) {
  return tokens <= kFewRows && (!w.has_value() || w->packed == nullptr);
}

at::Tensor zero_sums(const at::Tensor& x, int64_t width) {
  return at::zeros({x.size(0), width}, x.options().dtype(at::kFloat));
}

// y and u of a few tokens: every matrix is read once, as it lies.
std::tuple<at::Tensor, at::Tensor> few_tokens_forward(const at::Tensor& x, const std::optional<Weight>& w,
                                                      const Adapter& adapter, const std::optional<at::Tensor>& bias,
                                                      const at::Tensor& adapter_x) {
  const at::Tensor u = few_rows(adapter_x, weight_rows(adapter.a));
  at::Tensor sums = zero_sums(x, adapter.b.size(0));
  if (w.has_value()) add_few_rows(x, *w, sums);
  add_few_rows(at::mm(u, scaled(adapter).t()), weight_rows(adapter.b), sums);
  if (bias.has_value()) sums.add_(*bias);
  return {sums.to(x.scalar_type()), u.to(x.scalar_type())};
}

// The same of any number, x being packed.
std::tuple<at::Tensor, at::Tensor> many_tokens_forward(const TokenPanels& x, const std::optional<Weight>& w,
                                                       const Adapter& adapter, const std::optional<at::Tensor>& bias,
                                                       const TokenPanels& adapter_x, at::ScalarType dtype) {
  const Weight a = weight_rows(adapter.a), b = weight_rows(adapter.b);
  const at::Tensor u = product({{&adapter_x, &a}}, at::kFloat);
  const TokenPanels v = pack_tokens(at::mm(u, scaled(adapter).t()));
  std::vector<Term> terms;
  if (w.has_value()) terms.push_back({&x, &*w});
  terms.push_back({&v, &b});
  return {product(terms, dtype, bias), u.to(dtype)};
}

std::tuple<at::Tensor, at::Tensor> forward_part(const at::Tensor& x, const std::optional<Weight>& w,
                                                const Adapter& adapter, const std::optional<at::Tensor>& bias,
                                                const std::optional<at::Tensor>& mask) {
  const at::Tensor masked = mask.has_value() ? x * *mask : x;
  if (walks_rows(x.size(0), w)) return few_tokens_forward(x, w, adapter, bias, masked);
  const TokenPanels panels = pack_tokens(x, true);
  if (!mask.has_value()) return many_tokens_forward(panels, w, adapter, bias, panels, x.scalar_type());
  return many_tokens_forward(panels, w, adapter, bias, pack_tokens(masked), x.scalar_type());
}

// t = dy B in fp32.
at::Tensor through_b(const at::Tensor& dy, const TokenPanels* panels, const Adapter& adapter) {
  const Weight b = weight_columns(adapter.b);
  return panels == nullptr ? few_rows(dy, b) : product({{panels, &b}}, at::kFloat);
}

at::Tensor core_gradient(const at::Tensor& t, const at::Tensor& u, const Adapter& adapter) {
  return at::mm(t.t(), u.to(at::kFloat)).mul_(adapter.scale).to(adapter.core.scalar_type());
}

at::Tensor few_tokens_dx(const at::Tensor& dy, const std::optional<Weight>& w, const Adapter& adapter,
                         const at::Tensor& c, const std::optional<at::Tensor>& mask) {
  at::Tensor sums = zero_sums(dy, adapter.a.size(1));
  add_few_rows(c, weight_columns(adapter.a), sums);
  if (mask.has_value()) sums.mul_(*mask);
  if (w.has_value()) add_few_rows(dy, *w, sums);
  return sums.to(dy.scalar_type());
}

at::Tensor many_tokens_dx(const TokenPanels& dy, const std::optional<Weight>& w, const Adapter& adapter,
                          const at::Tensor& c, const std::optional<at::Tensor>& mask, at::ScalarType dtype) {
  const TokenPanels panels = pack_tokens(c);
  const Weight a = weight_columns(adapter.a);
  const Term adapted{&panels, &a};
  if (!w.has_value() && !mask.has_value()) return product({adapted}, dtype);
  if (!mask.has_value()) return product({{&dy, &*w}, adapted}, dtype);
  const at::Tensor start = product({adapted}, at::kFloat).mul_(*mask);
  return w.has_value() ? product({{&dy, &*w}}, dtype, start) : start.to(dtype);
}

std::tuple<at::Tensor, at::Tensor> backward_part(const at::Tensor& dy, const std::optional<Weight>& w,
                                                 const Adapter& adapter, const at::Tensor& u,
                                                 const std::optional<at::Tensor>& mask, bool need_dx, bool need_dcore) {
  const bool few = walks_rows(dy.size(0), w);
  const TokenPanels panels = few ? TokenPanels{} : pack_tokens(dy, true);
  const at::Tensor t = through_b(dy, few ? nullptr : &panels, adapter);
  at::Tensor dx = at::empty({0}, dy.options()), dcore = at::empty({0}, adapter.core.options());
  if (need_dcore) dcore = core_gradient(t, u, adapter);
  if (!need_dx) return {dx, dcore};
  const at::Tensor c = at::mm(t, scaled(adapter));
  dx = few ? few_tokens_dx(dy, w, adapter, c, mask) : many_tokens_dx(panels, w, adapter, c, mask, dy.scalar_type());
  return {dx, dcore};
}

std::optional<at::Tensor> part_of(const std::optional<at::Tensor>& mask, int64_t low, int64_t count) {
  return mask.has_value() ? std::optional<at::Tensor>(mask->narrow(0, low, count)) : std::nullopt;
}

std::optional<at::Tensor> mask_of(const Dropout& dropout, int64_t rows, int64_t columns) {
  if (!dropout.seed.has_value()) return std::nullopt;
  return keep_mask({rows, columns}, dropout.probability, *dropout.seed);
}

// Calls part(first, count) for as many tokens as are packed at once.
template <typename F>
void over_parts(int64_t tokens, int64_t depth, const F& part) {
  const int64_t most = tokens_at_once(depth);
  for (int64_t low = 0; low == 0 || low < tokens; low += most) part(low, std::min(most, tokens - low));
}

// dx of some tokens as one sum over the members of a group.
struct GroupPart {
  bool need_dcore;
  std::vector<at::Tensor> dcores;
  std::vector<TokenPanels> panels;  // two a member, which the terms refer to
  std::vector<Weight> factors;
  std::vector<Term> terms;
  at::Tensor sums;  // of few tokens

  GroupPart(const std::vector<Member>& members, bool dcore) : need_dcore(dcore) {
    panels.reserve(2 * members.size());
    factors.reserve(members.size());
  }

  void add(const Member& member, const at::Tensor& dy, const at::Tensor& u, bool need_dx) {
    const Adapter& adapter = member.adapter;
    const bool few = walks_rows(dy.size(0), member.w);
    const TokenPanels* packed = few ? nullptr : &panels.emplace_back(pack_tokens(dy));
    const at::Tensor t = through_b(dy, packed, adapter);
    dcores.push_back(need_dcore ? core_gradient(t, u, adapter) : at::empty({0}, adapter.core.options()));
    if (!need_dx) return;
    const at::Tensor c = at::mm(t, scaled(adapter));
    const Weight& factor = factors.emplace_back(weight_columns(adapter.a));
    if (few) {
      if (!sums.defined()) sums = zero_sums(dy, adapter.a.size(1));
      add_few_rows(c, factor, sums);
      add_few_rows(dy, *member.w, sums);
    } else {
      terms.push_back({packed, &*member.w});
      terms.push_back({&panels.emplace_back(pack_tokens(c)), &factor});
    }
  }

  at::Tensor dx(at::ScalarType dtype) const { return sums.defined() ? sums.to(dtype) : product(terms, dtype); }
};

at::Tensor joined(const std::vector<at::Tensor>& parts) { return parts.size() == 1 ? parts.front() : at::cat(parts); }

}  // namespace

std::tuple<at::Tensor, at::Tensor> adapted_linear(const at::Tensor& x, const std::optional<Weight>& w,
                                                  const Adapter& adapter, const std::optional<at::Tensor>& bias,
                                                  const Dropout& dropout) {
  const std::optional<at::Tensor> mask = mask_of(dropout, x.size(0), x.size(1));
  std::vector<at::Tensor> ys, us;
  over_parts(x.size(0), x.size(1), [&](int64_t low, int64_t count) {
    auto [y, u] = forward_part(x.narrow(0, low, count), w, adapter, bias, part_of(mask, low, count));
    ys.push_back(y);
    us.push_back(u);
  });
  return {joined(ys), joined(us)};
}

std::tuple<at::Tensor, at::Tensor> adapted_backward(const at::Tensor& dy, const std::optional<Weight>& w,
                                                    const Adapter& adapter, const at::Tensor& u, const Dropout& dropout,
                                                    bool need_dx, bool need_dcore) {
  const std::optional<at::Tensor> mask =
      need_dx ? mask_of(dropout, dy.size(0), adapter.a.size(1)) : std::optional<at::Tensor>();
  std::vector<at::Tensor> dxs;
  at::Tensor dcore;
  over_parts(dy.size(0), dy.size(1), [&](int64_t low, int64_t count) {
    const at::Tensor rows = u.size(0) == dy.size(0) ? u.narrow(0, low, count) : u;
    auto [dx, part] =
        backward_part(dy.narrow(0, low, count), w, adapter, rows, part_of(mask, low, count), need_dx, need_dcore);
    dxs.push_back(dx);
    dcore = dcore.defined() && need_dcore ? dcore.add_(part) : part;
  });
  return {joined(dxs), dcore};
}

std::vector<std::tuple<at::Tensor, at::Tensor>> adapted_group(const at::Tensor& x, const std::vector<Member>& members,
                                                              const std::vector<std::optional<at::Tensor>>& biases) {
  std::vector<std::tuple<at::Tensor, at::Tensor>> results;
  const bool shares = x.size(0) > kFewRows && x.size(0) <= tokens_at_once(x.size(1));
  const TokenPanels panels = shares ? pack_tokens(x, true) : TokenPanels{};
  for (size_t i = 0; i < members.size(); ++i) {
    const auto& [w, adapter] = members[i];
    results.push_back(shares ? many_tokens_forward(panels, w, adapter, biases[i], panels, x.scalar_type())
                             : adapted_linear(x, w, adapter, biases[i], {}));
  }
  return results;
}

std::tuple<at::Tensor, std::vector<at::Tensor>> adapted_group_backward(const std::vector<at::Tensor>& dys,
                                                                       const std::vector<Member>& members,
                                                                       const std::vector<at::Tensor>& us, bool need_dx,
                                                                       bool need_dcore) {
  int64_t depth = 0;
  for (const at::Tensor& dy : dys) depth = std::max(depth, dy.size(1));
  std::vector<at::Tensor> dxs, dcores;
  over_parts(dys.front().size(0), depth, [&](int64_t low, int64_t count) {
    GroupPart part(members, need_dcore);
    for (size_t i = 0; i < members.size(); ++i) {
      const at::Tensor u = us[i].size(0) == dys[i].size(0) ? us[i].narrow(0, low, count) : us[i];
      part.add(members[i], dys[i].narrow(0, low, count), u, need_dx);
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

}  // namespace lorasb
