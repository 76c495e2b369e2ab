# SPDX-License-Identifier: Apache-2.0
"""torchrl's Triton kernels under the interpreter, through our provider; run by test_cuda_peers.py.

Nothing of torchrl is replaced. It asks for a CUDA device around each launch, which here does
nothing, and tries out tile sizes by their time, of which there is one here.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from repository_tools import load
from triton_support import interpreter

interpreter.install_numerics()
interpreter.install_tanh()

kernels = pytest.importorskip("torchrl.modules.tensordict_module._rnn_triton")
cases = load("benchmarks.cases")
peers = load("benchmarks.providers_cuda_peers")
problem_module = load("benchmarks.problem")
runner = load("benchmarks.runner")
timing = load("benchmarks.timing")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for kernel in (kernels._gru_fwd_kernel, kernels._gru_bwd_kernel):
        (tiles,) = [
            config
            for config in kernel.configs
            if (config.kwargs, config.num_warps) == ({"BLOCK_B": 16, "BLOCK_K": 16}, 2)
        ]
        monkeypatch.setattr(kernel, "configs", [tiles])


def verdict(problem, peer):
    setting = runner.Setting(1, timing.DRY, footprint=False)
    (found,), _ = runner.run_problem(problem, [peer], setting)
    return found.parity, found.error


def a_problem(suite, dtype, resets):
    case = cases.Case(5, 19, 17, 3, resets=resets)
    return problem_module.Problem(case, suite, dtype, "cpu")


@pytest.mark.parametrize("resets", [0.0, 0.4])
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("suite", ["infer", "train"])
def test_torchrl_is_called_right(suite, dtype, resets):
    assert verdict(a_problem(suite, dtype, resets), peers.TorchRL()) == ("ok", None)


class Mistaken(peers.TorchRL):
    def __init__(self, mistake):
        self.mistake = mistake

    def prepare(self, problem, threads):
        wrong = replace(problem)
        wrong.__dict__["tensors"] = tensors = dict(problem.tensors)
        wrong.__dict__["reset_mask"] = problem.reset_mask
        self.mistake(wrong, tensors)
        return super().prepare(wrong, threads)


def gates_swapped(problem, tensors):
    for name in problem_module.WEIGHTS:
        r, z, n = tensors[name].chunk(3)
        tensors[name] = torch.cat([z, r, n])


def biases_swapped(problem, tensors):
    a, b = "bias_ih_l0", "bias_hh_l0"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def resets_a_step_late(problem, tensors):
    problem.__dict__["reset_mask"] = problem.reset_mask.roll(1, 0)


@pytest.mark.parametrize("mistake", [gates_swapped, biases_swapped, resets_a_step_late])
def test_torchrl_called_wrongly_is_found(mistake):
    parity, error = verdict(a_problem("infer", "float32", 0.4), Mistaken(mistake))
    assert parity == "wrong" and "output" in error
