# SPDX-License-Identifier: Apache-2.0
"""What `import gru_fast` must not need, load or change."""

import subprocess
import sys

HEAVY = ("triton", "torch._dynamo", "torch._inductor", "onnx", "tqdm")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_loads_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import gru_fast; "
        f"print(*sorted((set(sys.modules) - before) & set({HEAVY!r})))"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_works_without_optional_packages():
    code = (
        "import sys\n"
        "for name in ('triton', 'onnx', 'onnxruntime', 'tqdm', 'names', 'pytest'):\n"
        "    sys.modules[name] = None\n"
        "import torch, gru_fast\n"
        "print(gru_fast.GRU(3, 4)(torch.zeros(2, 1, 3))[0].shape)\n"
        "print(gru_fast.__version__, gru_fast.available_backends())\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("torch.Size([2, 1, 4])")


def test_one_step_may_be_changed_in_place_without_compiled_kernels_too():
    code = (
        "import sys, warnings\n"
        "sys.modules['gru_fast._C'] = None\n"
        "warnings.simplefilter('ignore')\n"
        "import torch, gru_fast\n"
        "layer, cell = gru_fast.GRU(3, 4, batch_first=True), gru_fast.GRUCell(4, 4)\n"
        "output, h_n = layer(torch.ones(2, 1, 3))\n"
        "output[:, 0] += 1\n"
        "h_n *= 2\n"
        "h = cell(output[:, 0], h_n[0])\n"
        "h[0] = 0\n"
        "h.relu_().sum().backward()\n"
        "print(layer.weight_hh_l0.grad.shape, cell.weight_hh.grad.shape)\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_changes_no_global_state():
    code = (
        "import torch\n"
        "def state():\n"
        "    return (torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype(),\n"
        "            torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,\n"
        "            torch.backends.cudnn.benchmark, torch.is_grad_enabled(),\n"
        "            torch.are_deterministic_algorithms_enabled(),\n"
        "            torch.get_rng_state().tolist())\n"
        "before = state()\n"
        "import gru_fast\n"
        "assert state() == before\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_every_public_name_exists_and_is_documented():
    import gru_fast

    assert set(gru_fast.__all__) == {
        "MemoryEstimate",
        "memory_estimate",
        "notations",
        "GRU",
        "GRUCell",
        "GRULanguageModel",
        "Chunk",
        "Gates",
        "GenerateOutput",
        "LayerNormGRU",
        "Sampler",
        "Stream",
        "ConvertReport",
        "Explanation",
        "__version__",
        "available_backends",
        "convert",
        "explain",
        "explain_generate",
        "functional",
        "init",
        "patch",
        "patched",
        "prepacked",
        "revert",
        "tbptt",
        "unpatch",
    }
    for name in gru_fast.__all__:
        assert getattr(gru_fast, name).__doc__
