# SPDX-License-Identifier: Apache-2.0
"""GRUs with diagonal recurrent matrices that others solve in parallel over time.

Two packages are imported as `pararnn`: pararnn-torch of the package index (its Triton kernels on a
GPU, plain torch elsewhere; proven on the CPU by tests/test_cuda_peers.py), and Apple's ml-pararnn,
which has to be built from its sources on a machine with CUDA, cannot be imported without what was
compiled there, and has not been run by us: its call was written from the sources of October 2025.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES
from benchmarks.diagonal import DiagonalProblem
from benchmarks.problem import WEIGHTS, Problem
from benchmarks.providers import Prepared, Provider, Results

ITERATIONS = 3
"""Newton's steps, as pararnn-torch and the paper have them. The gate passes them from H = 32 on."""


def to_theirs(rows: Tensor) -> Tensor:
    """Rows r, z, n to z, r, n; their update gate is 1 - z."""
    r, z, n = rows.chunk(3)
    return torch.cat([-z, r, n])


def to_ours(rows: Tensor) -> Tensor:
    """And back."""
    z, r, n = rows.chunk(3)
    return torch.cat([r, -z, n])


class _Solver(Provider):
    """Batch first, one bias.

    Attributes:
        package: its name in the metadata.
        holds: a module that tells the two packages apart.
    """

    package: str
    holds: str

    def version(self) -> str:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return "unknown"

    def is_installed(self) -> bool:
        try:
            return find_spec(self.holds) is not None
        except ImportError:
            return False

    def why_not(self, problem: Problem) -> str | None:
        if not isinstance(problem, DiagonalProblem):
            return "it takes diagonal recurrent matrices"
        if problem.dtype != "float32":
            return "its solver computes in float32"
        return "it has no resets" if problem.case.resets else None


def _weights(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Of inputs (3H, I), the diagonals (3, H), and the biases (3H,), in their order."""
    w_ih, w_hh, b_ih, b_hh = (problem.tensors[name] for name in WEIGHTS)
    return to_theirs(w_ih), to_theirs(w_hh).view(3, -1), to_theirs(b_ih + b_hh)


def _prepared(
    call: Any, problem: Problem, x: Tensor, h0: list[Tensor], weights: list[nn.Parameter]
) -> Prepared:
    """`call` without arguments returns every state, (B, T, H).

    Gradients are those of x, h0 where that is taken, and weights, in their order of `_weights`;
    `weights` may hold the three diagonals one by one.
    """
    tensors = problem.tensors
    gradient = tensors["grad_output"].clone()
    gradient[-1] += tensors["grad_h_n"][0]
    gradient = gradient.transpose(0, 1).contiguous()

    def infer() -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.no_grad():
            return call(), ()

    def train() -> tuple[Tensor, tuple[Tensor, ...]]:
        states = call()
        return states, torch.autograd.grad(states, [x, *h0, *weights], gradient)

    def results(returned: Any) -> Results:
        states, gradients = returned
        found = {"output": states.transpose(0, 1), "h_n": states[None, :, -1]}
        if gradients:
            x_, *others = gradients
            if h0:
                found["grad_h0"] = others.pop(0)[None]
            w_ih, bias, *diagonals = others
            found["grad_x"] = x_.transpose(0, 1)
            found["grad_weight_ih_l0"] = to_ours(w_ih)
            found["grad_weight_hh_l0"] = to_ours(torch.cat(diagonals).view(-1, 1))
            found["grad_bias_ih_l0"] = found["grad_bias_hh_l0"] = to_ours(bias)
        return {name: t.detach() for name, t in found.items()}

    return Prepared(train if problem.training else infer, results)


class ParaRNNTorch(_Solver):
    """pararnn-torch: on a GPU one fused kernel for all of Newton's steps.

    Checks of the residual, each of which waits for the device, are off: the gate judges.
    """

    name, package, holds = "pararnn_torch.newton", "pararnn-torch", "pararnn.solvers"

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        pararnn, solvers = import_module("pararnn"), import_module("pararnn.solvers")
        case, tensors, dtype = problem.case, problem.tensors, DTYPES[problem.dtype]
        # Without the cap its cell computes what it is given.
        cell = pararnn.ParaGRU(
            case.I, case.H, max_recurrent_norm=None, device=problem.device, dtype=dtype
        )
        weights = [cell.W_x.weight, cell.W_x.bias, cell.a_z, cell.a_r, cell.a_n]
        w_ih, diagonals, bias = _weights(problem)
        with torch.no_grad():
            for parameter, value in zip(weights, (w_ih, bias, *diagonals), strict=True):
                parameter.copy_(value)
        x = tensors["x"].transpose(0, 1).contiguous().requires_grad_(problem.training)
        h0 = tensors["h0"][0].clone().requires_grad_(problem.training)
        config = pararnn.NewtonConfig(max_iters=ITERATIONS, residual_atol=None, residual_fail=None)

        def call() -> Tensor:
            states: Tensor = solvers.newton_apply(cell, x, config, h0=h0)
            return states

        return _prepared(call, problem, x, [h0], weights)


class ParaRNN(_Solver):
    """ml-pararnn's fused CUDA kernel, which starts from zero."""

    name, package, holds = "pararnn.fused", "pararnn", "pararnn.rnn_cell"

    def asked(self, truth: Results) -> Results:
        return {name: t for name, t in truth.items() if name != "grad_h0"}

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        cells = import_module("pararnn.rnn_cell.gru_diag_mh")
        case = problem.case
        config = cells.GRUDiagMHConfig(
            state_dim=case.H,
            input_dim=case.I,
            num_heads=1,
            mode="parallel_FUSED",
            device=problem.device,
            dtype=DTYPES[problem.dtype],
        )
        cell = cells.GRUDiagMH(config)
        w_ih, diagonals, bias = _weights(problem)
        with torch.no_grad():
            cell.A.copy_(diagonals)
            cell.B.copy_(w_ih.view(3, case.H, case.I).permute(2, 0, 1)[None])
            cell.b.copy_(bias.view(3, case.H))
        x = problem.tensors["x"].transpose(0, 1).contiguous().requires_grad_(problem.training)
        plain = _prepared(lambda: cell(x), problem, x, [], [cell.B, cell.b, cell.A])

        def results(returned: Any) -> Results:
            states, gradients = returned
            if gradients:
                x_, inputs, bias_, diagonals_ = gradients
                inputs = inputs[0].permute(1, 2, 0).flatten(0, 1)
                gradients = (x_, inputs, bias_.flatten(), diagonals_)
            return plain.results((states, gradients))

        return Prepared(plain.call, results)


def providers() -> list[Provider]:
    """Those whose package is installed."""
    return [peer for peer in (ParaRNNTorch(), ParaRNN()) if peer.is_installed()]
