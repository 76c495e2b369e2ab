// SPDX-License-Identifier: Apache-2.0
// The CPU implementation of the ops whose schemas stand in gru_fast/ops_norm.py: as ops.cpp.
#include <limits>
#include <tuple>

#include "arguments.h"
#include "cpu/norm_problem.h"
#include "run_team.h"

namespace gru_fast {
namespace {

using NormResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using NormGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Real>
const NormTable<Real>& norm_table() {
  if constexpr (std::is_same_v<Real, double>) {
    return norm_kernels().f64;
  } else {
    return norm_kernels().f32;
  }
}

// Reads gamma and eps too, into a NormForward or NormBackward.
template <class Real, class Call>
void read_norm(Marshal<Real>& m, Call& call, const Arguments& a, const Tensor& gamma, double eps) {
  call.in = read_problem(m, a);
  STD_TORCH_CHECK(call.in.G > 0 && call.in.H > 0, "h0: expected G >= 1 and H >= 1, got ",
                  shape_text(a.h0.sizes()).c_str());
  call.in.order = call.in.alive_before = nullptr;  // padding is computed and held
  call.gamma = m.read("gamma_hh", gamma, {call.in.G, 3 * call.in.H});
  STD_TORCH_CHECK(eps > 0 && eps < std::numeric_limits<double>::infinity(),
                  "eps: expected a positive number, got ", eps);
  call.eps = static_cast<Real>(eps);
}

template <class Real>
NormResult run_forward(const Arguments& a, const Tensor& gamma, double eps, bool recompute) {
  Marshal<Real> m(a.x);
  NormForward<Real> f{};
  read_norm(m, f, a, gamma, eps);
  const auto& [T, B, G, H] = std::tie(f.in.T, f.in.B, f.in.G, f.in.H);
  const bool empty = T == 0 || B == 0;
  Tensor output = m.template make<Real>({T, B, G * H}, empty);
  Tensor h_n = m.template make<Real>({G, B, H}, empty);
  Tensor workspace = recompute ? m.template make<Real>({0})
                               : m.template make<Real>({T, B, G, kNormSlots * H}, empty);
  Tensor rstd = recompute ? m.template make<Real>({0}) : m.template make<Real>({T, B, G}, empty);
  if (empty) {
    torch::stable::copy_(h_n, a.h0);
  } else {
    f.output = output.mutable_data_ptr<Real>();
    f.h_n = h_n.mutable_data_ptr<Real>();
    f.workspace = recompute ? nullptr : workspace.mutable_data_ptr<Real>();
    f.rstd = recompute ? nullptr : rstd.mutable_data_ptr<Real>();
    const NormTable<Real>& table = norm_table<Real>();
    run_on_team(f, 1, table.forward_scratch_bytes, table.forward);
  }
  return {m.give_back(output), m.give_back(h_n), m.give_back(workspace), m.give_back(rstd)};
}

struct BackwardArguments {
  const MaybeTensor& grad_output;
  const MaybeTensor& grad_h_n;
  const Tensor& output;
  const Tensor& workspace;
  const Tensor& rstd;
  bool recompute;
  // Which of gates_x, h0, weight_hh, gamma_hh, bias_hh, reset_state, h_scale want a gradient.
  std::vector<bool> wanted;
};

template <class Real>
NormGrads run_backward(const Arguments& a, const Tensor& gamma, double eps, BackwardArguments b) {
  Marshal<Real> m(a.x);
  NormBackward<Real> f{};
  read_norm(m, f, a, gamma, eps);
  const Problem<Real>& p = f.in;
  const int64_t rows = 3 * p.H;
  const bool empty = p.T == 0 || p.B == 0;
  f.output = m.read("output", b.output, {p.T, p.B, p.G * p.H});
  if (b.recompute) {
    m.read("workspace", b.workspace, {0});
    m.read("rstd", b.rstd, {0});
  } else {
    f.workspace = m.read("workspace", b.workspace, {p.T, p.B, p.G, kNormSlots * p.H});
    f.rstd = m.read("rstd", b.rstd, {p.T, p.B, p.G});
  }
  f.grad_output = m.read("grad_output", b.grad_output, {p.T, p.B, p.G * p.H});
  f.grad_h_n = m.read("grad_h_n", b.grad_h_n, {p.G, p.B, p.H});

  STD_TORCH_CHECK(b.wanted.size() == 7, "output_mask: expected 7 values, got ", b.wanted.size());
  // Not by pointer: that of a tensor without elements is null.
  b.wanted[4] = b.wanted[4] && a.bias_hh.has_value();
  b.wanted[5] = b.wanted[5] && a.reset_state.has_value();
  b.wanted[6] = b.wanted[6] && a.h_scale.has_value();
  Gradients<Real> grads(m, b.wanted, empty);
  grads.next(f.grad_gates_x, {p.T, p.B, p.G, rows});
  grads.next(f.grad_h0, {p.G, p.B, p.H});
  grads.next(f.grad_weight, {p.G, rows, p.H});
  grads.next(f.grad_gamma, {p.G, rows});
  grads.next(f.grad_bias, {p.G, rows});
  grads.next(f.grad_reset_state, {p.G, p.B, p.H}, true);
  grads.next(f.grad_h_scale, {p.B, p.G * p.H}, true);
  if (empty) {
    grads.pass_on(b.grad_h_n);
  } else {
    const NormTable<Real>& table = norm_table<Real>();
    run_on_team(f, kBackwardPasses, table.backward_scratch_bytes, table.backward);
  }
  return grads.template give_back<7>();
}

Arguments arguments_of(const Tensor& gates_x, const Tensor& h0, const Tensor& weight_hh,
                       const MaybeTensor& bias_hh, const MaybeTensor& lengths,
                       const MaybeTensor& reset_mask, const MaybeTensor& reset_state,
                       const MaybeTensor& h_scale, const std::vector<bool>& reverse) {
  return {gates_x,     h0,      nullptr,           weight_hh,
          nullptr,     bias_hh, lengths,           reset_mask,
          reset_state, h_scale, Cell::kResetAfter, {reverse.begin(), reverse.end()},
          "gates_x"};
}

NormResult norm_scan(Tensor gates_x, Tensor h0, Tensor weight_hh, Tensor gamma_hh,
                     MaybeTensor bias_hh, MaybeTensor lengths, MaybeTensor reset_mask,
                     MaybeTensor reset_state, MaybeTensor h_scale, double eps,
                     std::vector<bool> reverse, bool recompute) {
  const Arguments a = arguments_of(gates_x, h0, weight_hh, bias_hh, lengths, reset_mask,
                                   reset_state, h_scale, reverse);
  return with_compute_type("gates_x", gates_x, [&](auto real) {
    return run_forward<decltype(real)>(a, gamma_hh, eps, recompute);
  });
}

NormGrads norm_scan_backward(MaybeTensor grad_output, MaybeTensor grad_h_n, Tensor gates_x,
                             Tensor h0, Tensor weight_hh, Tensor gamma_hh, MaybeTensor bias_hh,
                             MaybeTensor lengths, MaybeTensor reset_mask, MaybeTensor reset_state,
                             MaybeTensor h_scale, Tensor output, Tensor workspace, Tensor rstd,
                             double eps, std::vector<bool> reverse, bool recompute,
                             std::vector<bool> output_mask) {
  const Arguments a = arguments_of(gates_x, h0, weight_hh, bias_hh, lengths, reset_mask,
                                   reset_state, h_scale, reverse);
  const BackwardArguments b{grad_output, grad_h_n, output, workspace, rstd, recompute, output_mask};
  return with_compute_type("gates_x", gates_x, [&](auto real) {
    return run_backward<decltype(real)>(a, gamma_hh, eps, b);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gru_fast, CPU, m) {
  m.impl("norm_scan", TORCH_BOX(&norm_scan));
  m.impl("norm_scan_backward", TORCH_BOX(&norm_scan_backward));
}

}  // namespace gru_fast
