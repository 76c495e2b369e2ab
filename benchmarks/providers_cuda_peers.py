# SPDX-License-Identifier: Apache-2.0
"""GRU kernels of other packages for the GPU, where importable.

tests/test_cuda_peers.py proves that they are called right, without a GPU: torchrl's kernels in
Triton's interpreter, flashrnn by its twin in plain torch. Their speed is not measured yet:
docs/gpu-backlog.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES
from benchmarks.problem import WEIGHTS, Problem
from benchmarks.providers import Prepared, Provider, Results

Pair = tuple[Tensor, Tensor]
"""Outputs and last state."""


def _peer_call(
    forward: Callable[..., Pair],
    tensors: Sequence[Tensor],
    gradients: Pair,
    problem: Problem,
    named: Callable[[Pair, Sequence[Tensor]], Results],
) -> Prepared:
    """A function of tensors in the peer's own layout, which are made before the timing.

    Args:
        forward: from the tensors to outputs and last state.
        tensors: under training the gradient of each is taken.
        gradients: of outputs and last state, in the peer's layout.
        problem: says whether it is training.
        named: from what `forward` returned and the gradients, of which there are none in inference,
            to the results in the problem's layout; not timed.
    """
    leaves = [t.detach().requires_grad_(problem.training) for t in tensors]

    def infer() -> tuple[Pair, tuple[Tensor, ...]]:
        with torch.no_grad():
            return forward(*leaves), ()

    def train() -> tuple[Pair, tuple[Tensor, ...]]:
        out = forward(*leaves)
        return out, torch.autograd.grad(out, leaves, gradients)

    def results(returned: Any) -> Results:
        return {name: t.detach() for name, t in named(*returned).items()}

    return Prepared(train if problem.training else infer, results)


class TorchRL(Provider):
    """torchrl's Triton kernels, which take resets; batch first, a state for every step.

    They take float32 tensors and round the operands of products by themselves.
    """

    name, package = "torchrl.triton", "torchrl"

    def version(self) -> str:
        return version(self.package)

    def why_not(self, problem: Problem) -> str | None:
        if problem.dtype not in ("float32", "tf32", "bfloat16"):
            return "it computes in float32, TF32 or bfloat16"
        return None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        gru_triton = import_module("torchrl.modules.tensordict_module._rnn_triton").gru_triton
        case, dtype = problem.case, DTYPES[problem.dtype]
        given = {name: t.float() for name, t in problem.tensors.items()}
        starts = torch.zeros(case.T, case.B, dtype=torch.bool, device=problem.device)
        if problem.reset_mask is not None:
            starts = problem.reset_mask
        # Step 0 begins from states[:, 0] whether or not it is marked; a marked step elsewhere too.
        states = given["h0"].new_zeros(case.B, case.T, case.H)
        states[:, 0] = torch.where(starts[0, :, None], 0.0, given["h0"][0])
        marks = starts.T.contiguous()
        precision = "tf32" if problem.dtype == "tf32" else "ieee"

        def forward(x: Tensor, states: Tensor, *weights: Tensor) -> Pair:
            found: Pair = gru_triton(x, states, *weights, marks, dtype, input_precision=precision)
            return found

        def named(out: Pair, gradients: Sequence[Tensor]) -> Results:
            found = {"output": out[0].transpose(0, 1), "h_n": out[1][None]}
            if gradients:
                x, of_states, *weights = gradients
                found["grad_x"] = x.transpose(0, 1)
                found["grad_h0"] = torch.where(starts[0, :, None], 0.0, of_states[:, 0])[None]
                found |= {f"grad_{n}": g for n, g in zip(WEIGHTS, weights, strict=True)}
            return found

        x = given["x"].transpose(0, 1).contiguous()
        outer = given["grad_output"].transpose(0, 1).contiguous(), given["grad_h_n"][0]
        weights = [given[name] for name in WEIGHTS]
        return _peer_call(forward, [x, states, *weights], outer, problem, named)


class FlashRNN(Provider):
    """flashrnn's CUDA kernels: one launch of cuBLAS and one pointwise kernel for each step.

    They are compiled with nvcc for each hidden size and batch, for a minute or more. Its
    `cuda_fused` has no GRU. The biases of the candidate stand on both sides as in nn.GRU; r and z
    have one each.
    """

    name, package = "flashrnn.cuda", "flashrnn"
    backend = "cuda"

    def version(self) -> str:
        return version(self.package)

    def why_not(self, problem: Problem) -> str | None:
        if problem.dtype not in ("float32", "bfloat16", "float16"):
            return "it computes in float32, bfloat16 or float16"
        if problem.case.resets:
            return "its kernels have no resets"
        if self.backend == "cuda" and which("nvcc") is None:
            return "it compiles its kernels with nvcc, which is not on the path"
        return None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        flashrnn = import_module("flashrnn")
        case, H, given = problem.case, problem.case.H, problem.tensors
        w_ih, w_hh, b_ih, b_hh = (given[name] for name in WEIGHTS)
        # Its order is r, z, n for inputs and n, r, z for states; biases n_h, r, z, n_x.
        r, z, n = w_hh.view(3, 1, H, H)
        both = (b_ih + b_hh).view(3, H)
        recurrent = torch.stack([n, r, z])
        biases = torch.stack([b_hh[2 * H :], both[0], both[1], b_ih[2 * H :]])[:, None]
        config = flashrnn.FlashRNNConfig(
            function="gru",
            backend=self.backend,
            num_heads=1,
            head_dim=H,
            batch_size=case.B,
            input_shape="TBGHD",
            output_shape="STBHD",
            dtype=str(DTYPES[problem.dtype]).removeprefix("torch."),
        )

        def forward(x: Tensor, h0: Tensor, w_ih: Tensor, recurrent: Tensor, biases: Tensor) -> Pair:
            gates = nn.functional.linear(x, w_ih).view(case.T, case.B, 3, 1, H)
            output, last = flashrnn.flashrnn(gates, recurrent, biases, h0, config=config)
            return output.squeeze((0, 3)), last.squeeze((0, 3))

        def named(out: Pair, gradients: Sequence[Tensor]) -> Results:
            found = dict(zip(("output", "h_n"), out, strict=True))
            if gradients:
                x, h0, w_ih, recurrent, biases = gradients
                n, r, z = recurrent[:, 0]
                n_h, r_both, z_both, n_x = biases[:, 0]
                grads = (
                    w_ih,
                    torch.cat([r, z, n]),
                    torch.cat([r_both, z_both, n_x]),
                    torch.cat([r_both, z_both, n_h]),
                )
                found |= {"grad_x": x, "grad_h0": h0[0, :, :, 0]}
                found |= {f"grad_{n}": g for n, g in zip(WEIGHTS, grads, strict=True)}
            return found

        tensors = [given["x"], given["h0"][None, :, :, None], w_ih, recurrent, biases]
        outer = given["grad_output"], given["grad_h_n"]
        return _peer_call(forward, tensors, outer, problem, named)


def providers() -> list[Provider]:
    """Those whose package is installed."""
    return [peer() for peer in (TorchRL, FlashRNN) if find_spec(peer.package)]
