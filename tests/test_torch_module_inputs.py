# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own inputs and error cases for nn.GRU and nn.GRUCell, run against ours."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import gru_fast

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

INFOS = {info.module_cls: info for info in module_db if info.module_cls in (nn.GRU, nn.GRUCell)}
PAIRS = [(nn.GRU, gru_fast.GRU), (nn.GRUCell, gru_fast.GRUCell)]
DTYPES = [torch.float32, torch.float64]


def samples(info, dtype, errors=False):
    function = info.module_error_inputs_func if errors else info.module_inputs_func
    extra = {} if errors or info.module_cls is nn.GRUCell else {"with_packed_sequence": True}
    return function(info, device="cpu", dtype=dtype, requires_grad=True, training=True, **extra)


def flat(result):
    tensors = result if isinstance(result, tuple) else (result,)
    return [t.data if isinstance(t, PackedSequence) else t for t in tensors]


def gradients(module, inputs, result):
    leaves = [t.data if isinstance(t, PackedSequence) else t for t in inputs]
    return torch.autograd.grad(
        sum(t.square().sum() for t in flat(result)), [*leaves, *module.parameters()]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("torch_class", "our_class"), PAIRS)
def test_inputs(torch_class, our_class, dtype):
    cases = samples(INFOS[torch_class], dtype)
    assert len(cases) >= (2 if torch_class is nn.GRUCell else 32)
    for case in cases:
        construct, forward = case.constructor_input, case.forward_input
        ours = our_class(*construct.args, **construct.kwargs).to(dtype)
        theirs = torch_class(*construct.args, **construct.kwargs).to(dtype)
        theirs.load_state_dict(ours.state_dict())
        modules = (ours, theirs)
        results = [m(*forward.args, **forward.kwargs) for m in modules]
        torch.testing.assert_close(flat(results[0]), flat(results[1]))
        if dtype is torch.float64:  # single precision has its own rule, in test_forward
            grads = [gradients(m, forward.args, r) for m, r in zip(modules, results, strict=True)]
            torch.testing.assert_close(grads[0], grads[1])
        if not isinstance(forward.args[0], PackedSequence):
            expected = case.reference_fn(ours, *forward.args)
            torch.testing.assert_close(flat(results[0]), flat(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("torch_class", "our_class"), PAIRS)
def test_errors(torch_class, our_class, dtype):
    cases = samples(INFOS[torch_class], dtype, errors=True)
    assert len(cases) >= 6
    for case in cases:
        construct = case.module_error_input.constructor_input
        forward = case.module_error_input.forward_input
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            # Construction is torch's own code, so the texts agree as well.
            with pytest.raises(case.error_type, match=case.error_regex) as raised:
                our_class(*construct.args, **construct.kwargs)
        else:
            module = our_class(*construct.args, **construct.kwargs)
            if torch_class is nn.GRUCell:  # the cases of GRU choose dtypes themselves
                module.to(dtype)
            with pytest.raises(case.error_type) as raised:
                module(*forward.args, **forward.kwargs)
            numbers = set(re.findall(r"(?:got|expected|size) (\d+)", case.error_regex))
            assert numbers <= set(re.findall(r"\d+", str(raised.value))), raised.value
        assert raised.type is case.error_type
