# SPDX-License-Identifier: Apache-2.0
"""Other packages' GRU kernels for the GPU are called right by the benchmarks: proven without one.

torchrl's kernels run in Triton's interpreter, in a process of their own; flashrnn and pararnn-torch
have twins of their kernels in plain torch. Each package is needed only for its own tests.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from repository_tools import load

cases = load("benchmarks.cases")
diagonal = load("benchmarks.diagonal")
pararnn = load("benchmarks.providers_pararnn")
peers = load("benchmarks.providers_cuda_peers")
problem_module = load("benchmarks.problem")
runner = load("benchmarks.runner")
timing = load("benchmarks.timing")

SUITES = ("infer", "train")


def verdict(problem, peer):
    setting = runner.Setting(1, timing.DRY, footprint=False)
    (found,), _ = runner.run_problem(problem, [peer], setting)
    return found.parity, found.error


def dense(suite, dtype="float32", **sizes):
    case = cases.Case(**{"I": 5, "H": 7, "B": 3, "T": 6, **sizes})
    return problem_module.Problem(case, suite, dtype, "cpu")


def gates_swapped(peer):
    """The peer, given weights whose rows of r and z are the wrong way round."""
    prepare = peer.prepare

    def wrong(problem, threads):
        problem = replace(problem)
        problem.__dict__["tensors"] = tensors = dict(problem.tensors)
        for name in problem_module.WEIGHTS:
            r, z, n = tensors[name].chunk(3)
            tensors[name] = torch.cat([z, r, n])
        return prepare(problem, threads)

    peer.prepare = wrong
    return peer


@pytest.fixture
def flashrnn():
    """Its twin in plain torch, which takes the same arguments in the same layout."""
    if find_spec("flashrnn") is None:
        pytest.skip("flashrnn is not installed: pip install flashrnn")
    peer = peers.FlashRNN()
    peer.backend = "vanilla"
    return peer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("suite", SUITES)
class TestFlashRNN:
    def test_is_called_right(self, flashrnn, suite, dtype):
        assert verdict(dense(suite, dtype), flashrnn) == ("ok", None)

    def test_another_order_of_gates_is_found(self, flashrnn, suite, dtype):
        parity, error = verdict(dense(suite, dtype), gates_swapped(flashrnn))
        assert parity == "wrong" and "output" in error


def test_flashrnn_says_what_it_lacks(monkeypatch):
    monkeypatch.setenv("PATH", "")
    peer = peers.FlashRNN()
    assert "nvcc" in peer.why_not(dense("infer"))
    assert "no resets" in peer.why_not(dense("infer", resets=0.3))
    assert "float32, bfloat16" in peer.why_not(dense("infer", "float64"))


@pytest.mark.skipif(
    find_spec("torchrl") is None or find_spec("triton") is None,
    reason="torchrl or triton is not installed: pip install torchrl triton",
)
def test_torchrl():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "triton_support/interpreted_peers.py"],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "15 passed" in done.stdout


def solved(suite, **sizes):
    case = cases.Case(**{"I": 5, "H": 7, "B": 3, "T": 40, **sizes})
    return diagonal.DiagonalProblem(case, suite, "float32", "cpu", feature=f"diagonal/{suite}")


@pytest.mark.parametrize("suite", SUITES)
class TestDiagonal:
    """What solvers that are parallel in time compute, by ours with a head for each unit."""

    def test_ours(self, suite):
        assert verdict(solved(suite), diagonal.Diagonal()) == ("ok", None)
        parity, error = verdict(solved(suite), gates_swapped(diagonal.Diagonal()))
        assert parity == "wrong" and "output" in error

    def test_the_problem_is_the_plain_one_without_what_is_beside_the_diagonals(self, suite):
        problem = solved(suite)
        blocks = problem.dense(problem.tensors["weight_hh_l0"]).view(3, 7, 7)
        plain = problem_module.Problem(problem.case, suite, "float32", "cpu")
        assert torch.equal(blocks, plain.tensors["weight_hh_l0"].view(3, 7, 7) * torch.eye(7))

    def test_plain_layers_are_not_for_them(self, suite):
        for peer in (diagonal.Diagonal(), pararnn.ParaRNNTorch(), pararnn.ParaRNN()):
            assert "diagonal" in peer.why_not(dense(suite))
            assert "resets" in peer.why_not(solved(suite, resets=0.3))


@pytest.fixture
def newton():
    peer = pararnn.ParaRNNTorch()
    if not peer.is_installed():
        pytest.skip("pararnn-torch is not installed: pip install --no-deps pararnn-torch")
    return peer


@pytest.mark.parametrize("suite", SUITES)
class TestParaRNNTorch:
    def test_is_called_right(self, newton, suite):
        assert verdict(solved(suite, H=32, I=3, B=1, T=64), newton) == ("ok", None)

    def test_odd_sizes(self, newton, suite, monkeypatch):
        """Few units have large weights, with which three steps leave an error of 8e-7."""
        monkeypatch.setattr(pararnn, "ITERATIONS", 4)
        assert verdict(solved(suite), newton) == ("ok", None)

    def test_another_order_of_gates_is_found(self, newton, suite):
        parity, error = verdict(solved(suite, H=32), gates_swapped(newton))
        assert parity == "wrong" and "output" in error

    def test_it_is_newtons_method_and_no_loop(self, newton, suite, monkeypatch):
        """After one step it is not there yet."""
        monkeypatch.setattr(pararnn, "ITERATIONS", 1)
        assert verdict(solved(suite, H=32), newton)[0] == "wrong"


@pytest.mark.parametrize("dtype", ["tf32", "float32"])
def test_torchs_two_switches_for_tf32_agree(dtype):
    """Who reads the old one, as torchrl does, gets an error where they do not."""
    before = torch.backends.cuda.matmul.fp32_precision
    with load("benchmarks.precision").float32_as(dtype):
        assert torch.backends.cuda.matmul.allow_tf32 == (dtype == "tf32")
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if dtype == "tf32" else "ieee")
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert not torch.backends.cuda.matmul.allow_tf32
