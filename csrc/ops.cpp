// SPDX-License-Identifier: Apache-2.0
// The CPU implementation of the ops whose schemas stand in gru_fast/ops.py, through torch's stable
// ABI: one binary serves every torch from the version it was built for.
#include <algorithm>
#include <tuple>

#include "arguments.h"
#include "cpu/isa.h"
#include "run.h"

namespace gru_fast {
namespace {

using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;
using LayerGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using ScanGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Calls body() with the kernels for tensors of this dtype.
template <class Body>
auto with_kernels(const char* name, const Tensor& tensor, Body body) {
  if (tensor.scalar_type() == ScalarType::BFloat16) {
    if (const auto* table = kernel_table<BFloat16>()) return body(*table);
  }
  return with_compute_type(name, tensor,
                           [&](auto real) { return body(*kernel_table<decltype(real)>()); });
}

template <class Real>
ForwardResult run_forward(const KernelTable<Real>& table, const Arguments& a, bool recompute) {
  Marshal<Real> m(a.x);
  Forward<Real> f{};
  f.in = read_problem(m, a);
  const auto& [T, B, G, H] = std::tie(f.in.T, f.in.B, f.in.G, f.in.H);
  const bool empty = T == 0 || B == 0 || G == 0 || H == 0;
  Tensor output = m.template make<Real>({T, B, G * H}, empty);
  Tensor h_n = m.template make<Real>({G, B, H}, empty);
  Tensor workspace = recompute ? m.template make<Real>({0})
                               : m.template make<Real>({T, B, G, slot_count(a.cell) * H}, empty);
  if (empty) {
    torch::stable::copy_(h_n, a.h0);
  } else {
    f.output = mutable_data_of<Real>(output);
    f.h_n = mutable_data_of<Real>(h_n);
    f.workspace = recompute ? nullptr : mutable_data_of<Real>(workspace);
    run_forward_kernel(table, f);
  }
  return {m.give_back(output), m.give_back(h_n), m.give_back(workspace)};
}

struct BackwardArguments {
  const MaybeTensor& grad_output;
  const MaybeTensor& grad_h_n;
  const MaybeTensor& grad_workspace;
  const Tensor& output;
  const Tensor& workspace;
  bool recompute;
  // Which of x, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset_state, h_scale want a gradient.
  std::vector<bool> wanted;
};

template <class Real>
LayerGrads run_backward(const KernelTable<Real>& table, const Arguments& a, BackwardArguments b) {
  Marshal<Real> m(a.x);
  Backward<Real> f{};
  f.in = read_problem(m, a);
  const Problem<Real>& p = f.in;
  const int64_t slots = slot_count(a.cell) * p.H, rows = gate_count(a.cell) * p.H;
  const bool empty = p.T == 0 || p.B == 0 || p.G == 0 || p.H == 0;
  STD_TORCH_CHECK(!(b.recompute && b.grad_workspace.has_value()),
                  "grad_workspace: expected none with recompute, which saves no workspace");
  f.output = m.read("output", b.output, {p.T, p.B, p.G * p.H});
  f.workspace = b.recompute ? nullptr : m.read("workspace", b.workspace, {p.T, p.B, p.G, slots});
  f.grad_output = m.read("grad_output", b.grad_output, {p.T, p.B, p.G * p.H});
  f.grad_h_n = m.read("grad_h_n", b.grad_h_n, {p.G, p.B, p.H});
  f.grad_workspace = m.read("grad_workspace", b.grad_workspace, {p.T, p.B, p.G, slots});

  b.wanted[2] = b.wanted[2] && a.weight_ih != nullptr;
  // Not by pointer: that of a tensor without elements is null.
  b.wanted[4] = b.wanted[4] && a.bias_ih != nullptr && a.bias_ih->has_value();
  b.wanted[5] = b.wanted[5] && a.bias_hh.has_value();
  b.wanted[6] = b.wanted[6] && a.reset_state.has_value();
  b.wanted[7] = b.wanted[7] && a.h_scale.has_value();
  Gradients<Real> grads(m, b.wanted, empty);
  if (a.weight_ih == nullptr) {
    grads.next(f.grad_x, {p.T, p.B, p.G, rows});
  } else if (p.x_shared) {
    if (p.G > 1) {
      grads.next(f.grad_shared_x, {p.T, p.B, p.I}, true);
    } else {
      grads.next(f.grad_x, {p.T, p.B, p.I});
    }
  } else {
    grads.next(f.grad_x, {p.T, p.B, p.G, p.I});
  }
  grads.next(f.grad_h0, {p.G, p.B, p.H});
  auto next = [&](Groups<Real>& groups, std::initializer_list<int64_t> shape, int64_t count) {
    Real* first = nullptr;
    grads.next(first, shape);
    groups = {first, count};
  };
  next(f.grad_weight_ih, {p.G, rows, p.I}, rows * p.I);
  next(f.grad_weight_hh, {p.G, rows, p.H}, rows * p.H);
  next(f.grad_bias_ih, {p.G, rows}, rows);
  next(f.grad_bias_hh, {p.G, rows}, rows);
  grads.next(f.grad_reset_state, {p.G, p.B, p.H}, true);
  grads.next(f.grad_h_scale, {p.B, p.G * p.H}, true);

  if (empty) {
    grads.pass_on(b.grad_h_n);
  } else {
    run_backward_kernel(table, f);
  }
  return grads.template give_back<8>();
}

std::vector<uint8_t> bytes_of(const std::vector<bool>& flags) {
  return {flags.begin(), flags.end()};
}

ForwardResult layer(Tensor x, Tensor h0, Tensor weight_ih, Tensor weight_hh, MaybeTensor bias_ih,
                    MaybeTensor bias_hh, MaybeTensor lengths, MaybeTensor reset_mask,
                    MaybeTensor reset_state, MaybeTensor h_scale, StringHandle cell,
                    std::vector<bool> reverse, bool recompute) {
  const Arguments a{x,       h0,         &weight_ih,  weight_hh, &bias_ih,        bias_hh,
                    lengths, reset_mask, reset_state, h_scale,   take_cell(cell), bytes_of(reverse),
                    "x"};
  return with_kernels("x", x, [&](const auto& table) { return run_forward(table, a, recompute); });
}

ForwardResult scan(Tensor gates_x, Tensor h0, Tensor weight_hh, MaybeTensor bias_hh,
                   MaybeTensor lengths, MaybeTensor reset_mask, MaybeTensor reset_state,
                   MaybeTensor h_scale, StringHandle cell, std::vector<bool> reverse,
                   bool recompute) {
  const Arguments a{
      gates_x,    h0,          nullptr, weight_hh,       nullptr,           bias_hh,  lengths,
      reset_mask, reset_state, h_scale, take_cell(cell), bytes_of(reverse), "gates_x"};
  return with_kernels("gates_x", gates_x,
                      [&](const auto& table) { return run_forward(table, a, recompute); });
}

void check_output_mask(const std::vector<bool>& output_mask, size_t expected) {
  STD_TORCH_CHECK(output_mask.size() == expected, "output_mask: expected ", expected,
                  " values, got ", output_mask.size());
}

LayerGrads layer_backward(MaybeTensor grad_output, MaybeTensor grad_h_n, MaybeTensor grad_workspace,
                          Tensor x, Tensor h0, Tensor weight_ih, Tensor weight_hh,
                          MaybeTensor bias_ih, MaybeTensor bias_hh, MaybeTensor lengths,
                          MaybeTensor reset_mask, MaybeTensor reset_state, MaybeTensor h_scale,
                          Tensor output, Tensor workspace, StringHandle cell,
                          std::vector<bool> reverse, bool recompute,
                          std::vector<bool> output_mask) {
  const Arguments a{x,       h0,         &weight_ih,  weight_hh, &bias_ih,        bias_hh,
                    lengths, reset_mask, reset_state, h_scale,   take_cell(cell), bytes_of(reverse),
                    "x"};
  check_output_mask(output_mask, 8);
  const BackwardArguments b{grad_output, grad_h_n,  grad_workspace, output,
                            workspace,   recompute, output_mask};
  return with_kernels("x", x, [&](const auto& table) { return run_backward(table, a, b); });
}

ScanGrads scan_backward(MaybeTensor grad_output, MaybeTensor grad_h_n, MaybeTensor grad_workspace,
                        Tensor gates_x, Tensor h0, Tensor weight_hh, MaybeTensor bias_hh,
                        MaybeTensor lengths, MaybeTensor reset_mask, MaybeTensor reset_state,
                        MaybeTensor h_scale, Tensor output, Tensor workspace, StringHandle cell,
                        std::vector<bool> reverse, bool recompute, std::vector<bool> output_mask) {
  const Arguments a{
      gates_x,    h0,          nullptr, weight_hh,       nullptr,           bias_hh,  lengths,
      reset_mask, reset_state, h_scale, take_cell(cell), bytes_of(reverse), "gates_x"};
  check_output_mask(output_mask, 6);
  const auto& want = output_mask;
  const BackwardArguments b{grad_output,
                            grad_h_n,
                            grad_workspace,
                            output,
                            workspace,
                            recompute,
                            {want[0], want[1], false, want[2], false, want[3], want[4], want[5]}};
  auto grads = with_kernels("gates_x", gates_x,
                            [&](const auto& table) { return run_backward(table, a, b); });
  return {std::get<0>(grads), std::get<1>(grads), std::get<3>(grads),
          std::get<5>(grads), std::get<6>(grads), std::get<7>(grads)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gru_fast, CPU, m) {
  m.impl("layer", TORCH_BOX(&layer));
  m.impl("scan", TORCH_BOX(&scan));
  m.impl("layer_backward", TORCH_BOX(&layer_backward));
  m.impl("scan_backward", TORCH_BOX(&scan_backward));
}

}  // namespace gru_fast
