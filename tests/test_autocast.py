# SPDX-License-Identifier: Apache-2.0
"""Under autocast on the CPU results have the dtype that torch.nn gives them."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import gru_fast

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtypes_of(module, x, hx):
    return [result.data.dtype for result in module(x, hx)]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("form", ["padded", "packed", "cell"])
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16])
def test_dtypes_of_results(asked, form, grad):
    for own, entering, held in itertools.product(DTYPES, DTYPES, (None, *DTYPES)):
        if form == "packed" and own not in (torch.float32, asked):
            continue  # torch's autocast refuses to put rows of that dtype together
        name = "GRUCell" if form == "cell" else "GRU"
        ours, theirs = (getattr(library, name)(3, 6, dtype=own) for library in (gru_fast, nn))
        x, hx = torch.randn(5, 2, 3, dtype=entering), torch.randn(1, 2, 6)
        if form == "cell":
            x, hx = x[0], hx[0]
        elif form == "packed":
            x = pack_padded_sequence(x, torch.tensor([5, 3]))
        hx = None if held is None else hx.to(held)
        with torch.autocast("cpu", asked), torch.set_grad_enabled(grad):
            given, expected = dtypes_of(ours, x, hx), dtypes_of(theirs, x, hx)
        if own is (held or entering) not in (torch.float32, asked):
            expected = [own] * len(expected)  # torch widens it to float32
        assert given == expected, (own, entering, held)


def test_layers_and_a_compiled_call(fresh_compiler):
    """In torch's GRU more than one layer cannot have such an input."""
    x, asked = torch.randn(5, 2, 3).half(), torch.bfloat16
    for module in (
        gru_fast.GRU(3, 6, 2, bidirectional=True), gru_fast.LayerNormGRU(3, 6, 2, True)
    ):  # fmt: skip
        expected = module(x.float())
        for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
            with torch.autocast("cpu", asked):
                given = call(x)
            torch.testing.assert_close(given, expected, rtol=0, atol=0)
