# SPDX-License-Identifier: Apache-2.0
"""torch.jit.trace records torch's operator; what it cannot record is refused in plain words."""

import io
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gru_fast

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


class Model(nn.Module):
    """A classifier with everything that stands in such models: a packed batch, and a cell."""

    def __init__(self, gru, cell):
        super().__init__()
        self.gru = gru(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.cell = cell(8, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, h_n = self.gru(packed)
        output, _ = pad_packed_sequence(output, batch_first=True)
        return self.head(self.cell(output.sum(1), h_n[0]))


LENGTHS = torch.tensor([4, 7, 1])


def kinds(traced):
    return sorted(n.kind() for n in traced.inlined_graph.nodes() if "gru" in n.kind())


def test_a_traced_model_is_that_of_torch_and_can_be_saved():
    ours, theirs = Model(gru_fast.GRU, gru_fast.GRUCell), Model(nn.GRU, nn.GRUCell)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 7, 3)
    traced = torch.jit.trace(ours, (x, LENGTHS))
    assert kinds(traced) == kinds(torch.jit.trace(theirs, (x, LENGTHS)))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert list(loaded.state_dict()) == list(theirs.state_dict())
    x = torch.randn(3, 9, 3)  # other sizes than were traced
    lengths = LENGTHS + 2
    torch.testing.assert_close(loaded(x, lengths), ours(x, lengths))
    loaded(x, lengths).sum().backward()
    ours(x, lengths).sum().backward()
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.grad, ours.get_parameter(name).grad)


def test_a_subclass_is_traced_as_it_is_written():
    class Doubled(gru_fast.GRU):
        def forward(self, x):
            return 2 * super().forward(x)[0]

    model, x = Doubled(3, 4), torch.randn(5, 2, 3)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size:UserWarning")
@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_the_older_exporter_of_onnx():
    import onnxruntime

    model, x = Model(gru_fast.GRU, gru_fast.GRUCell).eval(), torch.randn(3, 7, 3)
    model.forward = lambda x: model.head(model.gru(x)[0][:, -1, :4])
    buffer = io.BytesIO()
    torch.onnx.export(model, (x,), buffer, dynamo=False)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach())


GRU = gru_fast.GRU(3, 4)
CELL = gru_fast.GRUCell(3, 4, cell="no_reset")
LANGUAGE_MODEL = gru_fast.GRULanguageModel(5, 2, 4)


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (lambda x: GRU(x, lengths=torch.tensor([1, 2])), "lengths"),
        (lambda x: GRU(x, return_gates=True), "return_gates"),
        (gru_fast.GRU(3, 4, cell="no_reset"), "cell='no_reset'"),
        (gru_fast.GRU(3, 4, backend="reference"), "backend='reference'"),
        (gru_fast.GRU(3, 4, num_heads=2), "num_heads=2"),
        (gru_fast.GRU(3, 4, learn_h0=True), "learn_h0=True"),
        (gru_fast.GRU(3, 4, recurrent_dropout=0.1), "recurrent_dropout=0.1"),
        (gru_fast.LayerNormGRU(3, 4), "LayerNormGRU"),
        (lambda x: CELL(x[0]), "cell='no_reset'"),
        (lambda x: LANGUAGE_MODEL(x[..., 0].long()), "GRULanguageModel"),
    ],
)
def test_what_cannot_be_traced(module, given):
    with pytest.raises(RuntimeError, match=f"can record only what torch.nn.GRU has, got.*{given}"):
        torch.jit.trace(module, torch.zeros(5, 2, 3))


@pytest.mark.parametrize("layer", ["GRU", "GRUCell", "LayerNormGRU"])
def test_script_is_refused(layer):
    model = nn.Sequential(getattr(gru_fast, layer)(3, 4))
    with pytest.raises(RuntimeError, match=rf"compile gru_fast\.{layer}; use .*revert"):
        torch.jit.script(model)
