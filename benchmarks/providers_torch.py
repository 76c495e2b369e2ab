# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own: nn.GRU (cuDNN on the GPU) and a loop over nn.GRUCell."""

from __future__ import annotations

import os
from functools import cache
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import DTYPES
from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Provider, module_call

CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class TorchGRU(Provider):
    """nn.GRU, the baseline."""

    is_baseline = True

    def __init__(self, device: str) -> None:
        self.name = "cudnn" if device == "cuda" else "nn.GRU"

    def why_not(self, problem: Problem) -> str | None:
        return "nn.GRU has no resets" if problem.case.resets else None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        module = nn.GRU(
            problem.case.I, problem.case.H, device=problem.device, dtype=DTYPES[problem.dtype]
        )
        return module_call(module, problem, module)


class SplitAndPad(Provider):
    """nn.GRU on the episodes as rows of their own: what its users do about resets."""

    is_baseline = True

    def __init__(self, device: str) -> None:
        self.name = ("cudnn" if device == "cuda" else "nn.GRU") + ".split_pad"

    def why_not(self, problem: Problem) -> str | None:
        return None if problem.case.resets else "there is nothing to split"

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        case = problem.case
        module = nn.GRU(case.I, case.H, device=problem.device, dtype=DTYPES[problem.dtype])
        assert problem.reset_mask is not None
        starts = problem.reset_mask.clone()
        starts[0] = True

        def forward(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
            row, step, lengths, last, first = episodes(starts)
            padded = x.new_zeros(int(lengths.max()), len(lengths), case.I)
            padded[step, row] = x
            fresh = problem.reset_mask[0, :, None] if problem.reset_mask is not None else None
            state = h0.new_zeros(1, len(lengths), case.H)
            state[0, first] = h0[0] if fresh is None else torch.where(fresh, 0.0, h0[0])
            packed = pack_padded_sequence(padded, lengths.cpu(), enforce_sorted=False)
            out, h_n = module(packed, state)
            return pad_packed_sequence(out)[0][step, row], h_n[:, last]

        return module_call(forward, problem, module)


def episodes(starts: Tensor) -> tuple[Tensor, ...]:
    """Where each (t, b) goes when every episode becomes a row.

    Args:
        starts: (T, B) bool, true where an episode begins; true in all of row 0.

    Returns:
        Row (T, B) and step (T, B) of each place, length of each row, and the rows (B,) that hold
        the last and the first episode of each b.
    """
    T, B = starts.shape
    by_batch = starts.T.reshape(-1)
    row = (by_batch.cumsum(0) - 1).reshape(B, T).T
    time = torch.arange(T, device=starts.device)[:, None].expand(T, B)
    began = torch.where(starts, time, 0).cummax(0).values
    lengths = torch.bincount(row.reshape(-1))
    return row, time - began, lengths, row[-1], row[0]


class CellLoop(Provider):
    """A Python loop over a cell.

    Args:
        cell: nn.GRUCell or another of its form.
        name: its name.
        baseline: whether ratios are to this one.
    """

    def __init__(
        self, cell: type[nn.RNNCellBase] = nn.GRUCell, name: str = "nn.GRUCell", *,
        baseline: bool = False,
    ) -> None:  # fmt: skip
        self.cell, self.name = cell, name
        self.is_baseline = baseline  # type: ignore[misc]

    def why_not(self, problem: Problem) -> str | None:
        return None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        case = problem.case
        cell = self.cell(case.I, case.H, device=problem.device, dtype=DTYPES[problem.dtype])
        mask = problem.reset_mask

        def forward(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
            h, outputs = h0[0], []
            for t, x_t in enumerate(x.unbind(0)):
                if mask is not None:
                    h = torch.where(mask[t, :, None], 0.0, h)
                h = cell(x_t, h)
                outputs.append(h)
            return torch.stack(outputs), h.unsqueeze(0)

        def one_step(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
            h = cell(x[0], h0[0])
            return h.unsqueeze(0), h.unsqueeze(0)

        single = problem.suite == "step" and case.T == 1 and mask is None
        return module_call(one_step if single else forward, problem, cell, CELL_WEIGHTS)


class TorchLSTM(Provider):
    """nn.LSTM of the same sizes, for scale: four gates where a GRU has three."""

    judged = False

    def __init__(self, device: str) -> None:
        self.name = "cudnn.lstm" if device == "cuda" else "nn.LSTM"

    def why_not(self, problem: Problem) -> str | None:
        return "nn.LSTM has no resets" if problem.case.resets else None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        case, dtype, tensors = problem.case, DTYPES[problem.dtype], problem.tensors
        module = nn.LSTM(case.I, case.H, device=problem.device, dtype=dtype)
        x, h0 = (tensors[name].clone().requires_grad_(problem.training) for name in ("x", "h0"))
        c0 = torch.zeros_like(h0)

        def infer() -> None:
            with torch.no_grad():
                module(x, (h0, c0))

        def train() -> None:
            output, (h_n, _) = module(x, (h0, c0))
            torch.autograd.grad(
                (output, h_n),
                [x, h0, *module.parameters()],
                (tensors["grad_output"], tensors["grad_h_n"]),
            )

        return Prepared(train if problem.training else infer, lambda _: {})


COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@cache
def empty_folder() -> TemporaryDirectory[str]:
    """Of this process, gone with it."""
    return TemporaryDirectory(prefix="gru_fast-benchmarks-")


class CompiledGRU(Provider):
    """nn.GRU under torch.compile that was told to take it.

    By itself torch.compile leaves nn.GRU as it is, at the cost of a graph break. Told to
    (`torch._dynamo.config.allow_rnn`), it unrolls the time steps.
    """

    on_request = True
    most_steps = 8

    def __init__(self, device: str) -> None:
        self.name = ("cudnn" if device == "cuda" else "nn.GRU") + ".compile"

    def why_not(self, problem: Problem) -> str | None:
        if problem.case.T > self.most_steps:
            return (
                "torch.compile unrolls the steps of nn.GRU and takes about a second for each: "
                f"T <= {self.most_steps} only"
            )
        return "nn.GRU has no resets" if problem.case.resets else None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        case, dtype = problem.case, DTYPES[problem.dtype]
        module = nn.GRU(case.I, case.H, device=problem.device, dtype=dtype)
        # A first call compiles, and nothing that others left is used.
        os.environ[COMPILER_CACHE] = empty_folder().name
        torch._dynamo.config.allow_rnn = True
        torch._dynamo.reset()
        return module_call(torch.compile(module, dynamic=False), problem, module)


def providers(device: str) -> list[Provider]:
    return [
        TorchGRU(device),
        SplitAndPad(device),
        CellLoop(),
        TorchLSTM(device),
        CompiledGRU(device),
    ]
