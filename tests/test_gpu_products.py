# SPDX-License-Identifier: Apache-2.0
"""How the products beside a Triton scan round; needs no GPU."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from gru_fast.kernels import products


def test_products_round_as_they_do_where_they_are_tuned(monkeypatch):
    """TunableOp asks PyTorch's older switch, which it refuses where the two disagree."""
    settings = SimpleNamespace(fp32_precision="ieee")
    monkeypatch.setattr(products, "_SETTINGS", settings)
    tensor = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    for tuned, expected in ((False, "tf32"), (True, "ieee")):
        monkeypatch.setattr(products, "_is_tuned", lambda tuned=tuned: tuned)
        with products.matmul_precision("tf32", tensor):
            assert settings.fp32_precision == expected


def test_how_products_round_is_restored_where_two_threads_overlap(monkeypatch):
    """Both have looked before either begins."""
    settings = SimpleNamespace(fp32_precision="ieee")
    monkeypatch.setattr(products, "_SETTINGS", settings)
    tensor = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    one, other = (products.matmul_precision("tf32", tensor) for _ in range(2))
    one.__enter__()
    other.__enter__()
    assert settings.fp32_precision == "tf32"
    one.__exit__(None, None, None)
    other.__exit__(None, None, None)
    assert settings.fp32_precision == "ieee"


@pytest.fixture
def switches():
    """PyTorch's, which a build for CPUs has too: of everything, of all of CUDA, of its products."""
    found = (torch.backends, torch.backends.cudnn, torch.backends.cuda.matmul)
    # PyTorch's own tests, of which other files here use parts, have forbidden it to set them so.
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        yield found
        for switch in found:
            switch.fp32_precision = "none"


@pytest.mark.parametrize("above", [0, 1], ids=["everything", "cuda"])
def test_what_products_only_follow_they_follow_afterwards(switches, above):
    tensor = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    switches[above].fp32_precision = "tf32"
    with products.matmul_precision("ieee", tensor):
        assert switches[2].fp32_precision == "ieee"
    assert switches[2].fp32_precision == "tf32"
    switches[above].fp32_precision = "ieee"
    assert switches[2].fp32_precision == "ieee"


def test_what_products_were_told_they_keep(switches):
    tensor = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    switches[2].fp32_precision = "ieee"
    switches[0].fp32_precision = "tf32"
    with products.matmul_precision("tf32", tensor):
        assert switches[2].fp32_precision == "tf32"
    assert switches[2].fp32_precision == "ieee"
