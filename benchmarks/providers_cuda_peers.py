# SPDX-License-Identifier: Apache-2.0
"""GRU kernels of other packages for the GPU, where importable.

Written from the packages' sources (torchrl 0.14.1, flashrnn 1.0.8, ml-pararnn of October 2025);
not yet run: docs/gpu-backlog.md.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES
from benchmarks.problem import WEIGHTS, Problem
from benchmarks.providers import Prepared, Provider, module_call


class _Peer(Provider):
    package: str

    def version(self) -> str:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return "unknown"


class TorchRL(_Peer):
    """torchrl's Triton kernels, which take resets; batch first, state for every step."""

    name, package = "torchrl.triton", "torchrl"

    def why_not(self, problem: Problem) -> str | None:
        if problem.dtype not in ("float32", "tf32", "bfloat16"):
            return "it computes in float32, TF32 or bfloat16"
        return None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        gru_triton = import_module("torchrl.modules.tensordict_module._rnn_triton").gru_triton
        case, dtype = problem.case, DTYPES[problem.dtype]
        # It takes float32 tensors and rounds operands by itself.
        module = nn.GRU(case.I, case.H, device=problem.device)
        mask = problem.reset_mask
        starts = torch.zeros(case.T, case.B, dtype=torch.bool, device=problem.device)
        starts = (starts if mask is None else mask).T.contiguous()
        fresh = torch.zeros(case.B, case.T, case.H, device=problem.device)
        weights = [module.get_parameter(name) for name in WEIGHTS]
        precision = "tf32" if problem.dtype == "tf32" else "ieee"

        def forward(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
            first = h0[0].float()
            if mask is not None:
                first = torch.where(mask[0, :, None], 0.0, first)
            states = torch.cat([first[:, None], fresh[:, 1:]], 1)
            output, h_n = gru_triton(
                x.float().transpose(0, 1).contiguous(),
                states,
                *weights,
                starts,
                dtype,
                input_precision=precision,
            )
            return output.transpose(0, 1), h_n[None]

        return module_call(forward, problem, module)


class FlashRNN(_Peer):
    """flashrnn's CUDA kernels: one launch of cuBLAS and one pointwise kernel for each step.

    Its `cuda_fused` has no GRU. The biases of the candidate stand on both sides as in nn.GRU; r and
    z have one each.
    """

    name, package = "flashrnn.cuda", "flashrnn"
    backend = "cuda"

    def why_not(self, problem: Problem) -> str | None:
        if problem.dtype not in ("float32", "bfloat16", "float16"):
            return "it computes in float32, bfloat16 or float16"
        return "its kernels have no resets" if problem.case.resets else None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        flashrnn = import_module("flashrnn").flashrnn
        case, dtype = problem.case, DTYPES[problem.dtype]
        module = nn.GRU(case.I, case.H, device=problem.device, dtype=dtype)
        w_ih, w_hh, b_ih, b_hh = (module.get_parameter(name) for name in WEIGHTS)
        H = case.H

        def forward(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
            # Its order is r, z, n for inputs and n, r, z for states; biases n_h, r, z, n_x.
            given = nn.functional.linear(x, w_ih).view(case.T, case.B, 3, 1, H).transpose(0, 1)
            r, z, n = w_hh.view(3, H, H)
            recurrent = torch.stack([n, r, z])[:, None]
            both = b_ih.view(3, H) + b_hh.view(3, H)
            bias = torch.stack([b_hh[2 * H :], both[0], both[1], b_ih[2 * H :]])[:, None]
            states = h0[:, :, None, None]
            output, last = flashrnn(
                given.contiguous(),
                recurrent.contiguous(),
                bias.contiguous(),
                states.contiguous(),
                function="gru",
                backend=self.backend,
                dtype=str(dtype).removeprefix("torch."),
            )
            return output[0, :, :, 0].transpose(0, 1), last[0, :, -1:, 0].transpose(0, 1)

        return module_call(forward, problem, module)


class ParaRNN(_Peer):
    """ml-pararnn's fused Newton solver of a GRU whose recurrent matrices are diagonal.

    A smaller function (3H recurrent weights instead of 3H * H) that is parallel in time: for scale.
    """

    name, package, judged = "pararnn.diagonal", "pararnn", False

    def why_not(self, problem: Problem) -> str | None:
        if problem.dtype != "float32":
            return "its solver computes in float32"
        return "it has no resets" if problem.case.resets else None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        cell = import_module("pararnn.rnn_cell.gru_diag_mh")
        case, tensors = problem.case, problem.tensors
        config = cell.GRUDiagMHConfig(
            state_dim=case.H,
            input_dim=case.I,
            num_heads=1,
            mode="parallel_FUSED",
            device=problem.device,
            dtype=DTYPES[problem.dtype],
        )
        module = cell.GRUDiagMH(config)
        x = tensors["x"].transpose(0, 1).contiguous().requires_grad_(problem.training)
        gradient = tensors["grad_output"].transpose(0, 1).contiguous()

        def infer() -> Any:
            with torch.no_grad():
                return module(x)

        def train() -> Any:
            return torch.autograd.grad(module(x), [x, *module.parameters()], gradient)

        return Prepared(train if problem.training else infer, lambda _: {})


def providers() -> list[Provider]:
    """Those whose package is installed."""
    return [peer() for peer in (TorchRL, FlashRNN, ParaRNN) if find_spec(peer.package)]
