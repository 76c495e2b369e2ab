# SPDX-License-Identifier: Apache-2.0
"""Models with gru_fast layers as ONNX graphs, run by ONNX Runtime."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gru_fast
from gru_fast import functional

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import gru_fast.onnx  # noqa: E402

pytestmark = [
    # torch's own, while its exporter copies what torch.export made.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
]


BATCH, STEPS = torch.export.Dim("batch"), torch.export.Dim("steps")


def session(program_or_path):
    """An ONNX Runtime session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = program_or_path
    if isinstance(model, torch.onnx.ONNXProgram):
        onnx.checker.check_model(model.model_proto, full_check=True)
        model = model.model_proto.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(program_or_path, *inputs):
    opened = session(program_or_path)
    names = [i.name for i in opened.get_inputs()]
    outputs = opened.run(None, dict(zip(names, [x.numpy() for x in inputs], strict=True)))
    return [torch.from_numpy(y) for y in outputs]


def gru_nodes(program):
    return [node for node in program.model_proto.graph.node if node.op_type == "GRU"]


def attributes(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def assert_same(program, model, *inputs):
    with torch.no_grad():
        expected = model(*inputs)
    given = run(program, *inputs)
    assert len(given) == len(expected)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Everything(nn.Module):
    """Every cell, option and entry to the layers that ONNX can say, in one model."""

    def __init__(self):
        super().__init__()
        self.stack = gru_fast.GRU(5, 7, 2, bidirectional=True, batch_first=True)
        self.before = gru_fast.GRU(14, 6, cell="reset_before", bias=False)
        self.simple = gru_fast.GRU(6, 4, cell="no_reset")
        self.simple_without_bias = gru_fast.GRU(4, 3, cell="no_reset", bias=False)
        self.cell = gru_fast.GRUCell(3, 5)

    def forward(self, x, hx, lengths):
        y, h_n = self.stack(x, hx, lengths=lengths)
        y, h_before = self.before(y.transpose(0, 1))
        y, h_simple = self.simple(y)
        y, _ = self.simple_without_bias(y)
        return y, h_n, h_before, h_simple, self.cell(y[0])


@pytest.fixture(scope="module")
def everything():
    torch.manual_seed(0)
    model = Everything().eval()
    inputs = torch.randn(3, 4, 5), torch.randn(4, 3, 7), torch.tensor([4, 2, 3])
    shapes = {"x": {0: BATCH, 1: STEPS}, "hx": {1: BATCH}, "lengths": {0: BATCH}}
    program = gru_fast.onnx.export(model, inputs, dynamic_shapes=shapes, verbose=False)
    return model, program


@pytest.mark.parametrize(("B", "T"), [(3, 4), (1, 1), (5, 9)])
def test_every_cell_with_any_batch_and_number_of_steps(everything, B, T):
    model, program = everything
    lengths = torch.randint(0, T + 1, (B,))
    lengths[0] = 0
    assert_same(program, model, torch.randn(B, T, 5), torch.randn(4, B, 7), lengths)


def test_layers_are_one_node_each_with_the_weights_as_initializers(everything):
    _, program = everything
    nodes = gru_nodes(program)
    assert [attributes(n)["linear_before_reset"] for n in nodes] == [1, 1, 0, 1, 1, 1]
    assert [attributes(n)["direction"] for n in nodes[:3]] == [b"bidirectional"] * 2 + [b"forward"]
    assert [attributes(n)["hidden_size"] for n in nodes] == [7, 7, 6, 4, 3, 5]
    initializers = {t.name for t in program.model_proto.graph.initializer}
    for node in nodes:
        assert {value for value in node.input[1:4] if value} <= initializers
    assert [bool(n.input[4]) for n in nodes] == [True, True] + [False] * 4
    # Nothing but the layers touches a weight: the old ones are gone.
    sizes = sum(int(np.prod(t.dims)) for t in program.model_proto.graph.initializer)
    weights = sum(w.numel() for w in model_weights(everything[0]))
    assert sizes < weights + 100


def model_weights(model):
    """The weights in ONNX's form: `no_reset` has rows for r there, and always a bias."""
    for module in model.modules():
        for name, w in getattr(module, "_parameters", {}).items():
            yield w
            if getattr(module, "cell", "") == "no_reset":
                yield w[: len(w) // 2]
                if not module.bias and name.startswith("weight_hh"):
                    yield torch.empty(2 * 3 * module.hidden_size)


class Groups(nn.Module):
    """What the module does not reach: groups of their own, a single reverse direction, scan."""

    def __init__(self):
        super().__init__()
        self.weight_ih = nn.Parameter(torch.randn(3, 12, 5) / 2)
        self.weight_hh = nn.Parameter(torch.randn(3, 12, 4) / 2)
        self.bias_hh = nn.Parameter(torch.randn(3, 12))

    def forward(self, x, lengths):
        h0 = x.new_zeros(3, x.shape[1], 4)
        weights = self.weight_ih, self.weight_hh, None, self.bias_hh
        y, h_n = functional.layer(x, h0, *weights, reverse=(True, False, True), lengths=lengths)
        own = torch.stack([x, 2 * x, -x], 2)
        z, _ = functional.layer(
            own, h0, *weights[:2], cell="reset_before", reverse=(False, True, False)
        )
        back, _ = functional.layer(x, h0[:1], *[w[:1] for w in weights[:2]], reverse=(True,))
        gates = torch.einsum("tbgi,gni->tbgn", own, self.weight_ih)
        s, s_n = functional.scan(gates, h0, self.weight_hh, self.bias_hh, reverse=(False,) * 3)
        u, _ = functional.scan(
            gates[..., :8], h0, self.weight_hh[:, :8], cell="no_reset", reverse=(False,) * 3
        )
        return y, h_n, z, back, s, s_n, u


def test_operators_with_groups_and_projected_inputs():
    torch.manual_seed(0)
    model = Groups()
    shapes = {"x": {0: STEPS, 1: BATCH}, "lengths": {0: BATCH}}
    inputs = torch.randn(4, 3, 5), torch.tensor([4, 2, 3])
    program = gru_fast.onnx.export(model.eval(), inputs, dynamic_shapes=shapes, verbose=False)
    assert_same(program, model, torch.randn(6, 2, 5), torch.tensor([1, 6]))
    assert "reverse" in {attributes(n)["direction"].decode() for n in gru_nodes(program)}


def test_torch_onnx_export_knows_the_operators_once_the_module_is_imported():
    model = gru_fast.GRU(5, 128, cell="reset_before").eval()
    call = (model, (torch.randn(4, 3, 5),))
    options = {"dynamic_shapes": ({0: STEPS, 1: BATCH},), "verbose": False}
    program = torch.onnx.export(*call, **options)
    [node] = gru_nodes(program)
    assert_same(program, model, torch.randn(7, 2, 5))
    # It reorders larger weights in the graph; ours folds them.
    initializers = {t.name for t in program.model_proto.graph.initializer}
    assert node.input[2] not in initializers
    program = gru_fast.onnx.export(*call, **options)
    [node] = gru_nodes(program)
    assert {*node.input[1:4]} <= {t.name for t in program.model_proto.graph.initializer}
    assert_same(program, model, torch.randn(7, 2, 5))


def test_the_table_serves_exported_programs_and_the_newest_opset():
    model = gru_fast.GRU(5, 4).eval()
    captured = torch.export.export(model, (torch.randn(4, 3, 5),), dynamic_shapes=({0: STEPS},))
    program = torch.onnx.export(
        captured,
        custom_translation_table=gru_fast.onnx.translation_table(),
        opset_version=23,
        verbose=False,
    )
    assert program.model.opset_imports[""] == 23
    assert_same(program, model, torch.randn(7, 3, 5))


class Resets(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = gru_fast.GRU(5, 4)

    def forward(self, x, mask):
        return self.gru(x, reset_mask=mask)


class Scaled(Resets):
    def forward(self, x, scale):
        return functional.gru(x, None, self.gru._flat_weights, h_scale=scale)


class Gates(Resets):
    def forward(self, x, extra):
        return self.gru(x, return_gates=True)[2].z


@pytest.mark.parametrize(
    ("model", "extra", "message"),
    [
        (Resets(), torch.zeros(4, 3, dtype=torch.bool), "reset_mask: expected None for more than"),
        (Scaled(), torch.ones(1, 3, 4), "h_scale: expected None"),
        (Gates(), torch.ones(1), "return_gates: expected False"),
    ],
    ids=["resets", "h_scale", "gates"],
)
def test_what_onnx_cannot_say_is_an_error_that_names_it(model, extra, message):
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        gru_fast.onnx.export(model.eval(), (torch.randn(4, 3, 5), extra), verbose=False)
    assert message in str(error.value)


class Policy(nn.Module):
    """One step at a time, with everything that may say where an episode begins."""

    def __init__(self):
        super().__init__()
        self.one = gru_fast.GRU(5, 4)
        self.both = gru_fast.GRU(4, 3, bidirectional=True, batch_first=True, cell="reset_before")

    def forward(self, x, h, mask, start, lengths):
        y, h_one = self.one(x, h[:1], reset_mask=mask, lengths=lengths)
        z, h_both = self.both(
            y.transpose(0, 1), h[1:, :, :3], reset_mask=mask.T, reset_state=start, lengths=lengths
        )
        return z, h_one, h_both, self.one(x, h[:1], reset_mask=mask)[0]


def test_resets_of_a_single_step():
    torch.manual_seed(0)
    model = Policy().eval()

    def inputs(B):
        mask = torch.arange(B)[None] % 2 == 0
        lengths = (torch.arange(B) % 3 > 0).long()
        return torch.randn(1, B, 5), torch.randn(3, B, 4), mask, torch.randn(2, B, 3), lengths

    shapes = ({1: BATCH}, {1: BATCH}, {1: BATCH}, {1: BATCH}, {0: BATCH})
    program = gru_fast.onnx.export(model, inputs(3), dynamic_shapes=shapes, verbose=False)
    assert_same(program, model, *inputs(7))


def test_the_torchscript_exporter_is_refused():
    with pytest.raises(ValueError, match="dynamo: expected True"):
        gru_fast.onnx.export(gru_fast.GRU(5, 4), (torch.zeros(1, 1, 5),), dynamo=False)


def test_training_stays_what_it_was_and_the_file_is_whole(tmp_path):
    model = gru_fast.GRULanguageModel(9, 4, 6, dropout=0.5)
    model.head.eval()
    path = tmp_path / "model.onnx"
    program = gru_fast.onnx.export_language_model(model, path, external_data=False, verbose=False)
    assert model.training and model.gru.training and not model.head.training
    assert not [n for n in program.model_proto.graph.node if n.op_type == "Dropout"]
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    opened = session(str(path))
    assert opened.get_modelmeta().custom_metadata_map["start_token_id"] == "9"
    assert [(i.name, i.shape) for i in opened.get_inputs()] == [
        ("tokens", ["batch", "steps"]),
        ("hidden", [1, "batch", 6]),
    ]
    assert [(o.name, o.shape) for o in opened.get_outputs()] == [
        ("logits", ["batch", "steps", 9]),
        ("next_hidden", [1, "batch", 6]),
    ]


def test_only_a_language_model_is_a_step_model():
    with pytest.raises(TypeError, match="model should be a GRULanguageModel, got: GRU"):
        gru_fast.onnx.export_language_model(gru_fast.GRU(3, 4))


def with_another_head(model):
    model.head = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 30))
    return model


LANGUAGE_MODELS = {
    "embedding": lambda: gru_fast.GRULanguageModel(30, 8, 16, 2, tie_weights=False),
    "one-hot": lambda: gru_fast.GRULanguageModel(30, None, 16, cell="reset_before"),
    # More tokens than gates: the table, and a node that multiplies by an identity.
    "table": lambda: gru_fast.GRULanguageModel(30, None, 6, 2, cell="no_reset", bias=False),
    "another head": lambda: with_another_head(gru_fast.GRULanguageModel(30, 8, 16)),
}


def greedy(step, model, prompts, steps):
    """Greedy continuation of each prompt: the prompt at once, then one token at a time."""
    rows = []
    for prompt in prompts:
        tokens = torch.tensor([[model.start, *prompt]])
        hidden = torch.zeros(model.gru.num_layers, 1, model.gru.hidden_size)
        drawn = []
        for _ in range(steps):
            logits, hidden = step(tokens, hidden)
            tokens = logits[:, -1:].argmax(-1)
            drawn.append(int(tokens))
        rows.append(drawn)
    return rows


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_language_model_writes_the_same_text_in_onnx_runtime(kind):
    torch.manual_seed(2)
    model = LANGUAGE_MODELS[kind]()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()  # so that the most likely token varies
    program = gru_fast.onnx.export_language_model(model, verbose=False)
    opened = session(program)

    def step(tokens, hidden):
        feeds = {"tokens": tokens.numpy(), "hidden": hidden.numpy()}
        return [torch.from_numpy(y) for y in opened.run(None, feeds)]

    prompts = [[], [3, 1, 4], [29]]
    expected = [
        model.generate([p], max_new_tokens=40, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert greedy(step, model, prompts, 40) == expected
    assert len({token for row in expected for token in row}) > 5

    inputs = torch.cat([torch.full((4, 1), model.start), torch.randint(30, (4, 6))], 1)
    hidden = torch.randn(model.gru.num_layers, 4, model.gru.hidden_size)
    with torch.no_grad():
        for ours, theirs in zip(model(inputs, hidden), step(inputs, hidden), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_layers_inside_a_larger_model_in_eval_mode():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 5)
            self.gru = gru_fast.GRU(
                5, 4, 2, dropout=0.5, batch_first=True, recurrent_dropout=0.5, learn_h0=True,
                num_heads=2,
            )  # fmt: skip
            nn.init.normal_(self.gru.h0)
            self.head = nn.Linear(4, 3)

        def forward(self, tokens):
            return (F.log_softmax(self.head(self.gru(self.embedding(tokens))[0]), -1),)

    model = Tagger().eval()
    tokens = torch.randint(11, (2, 5))
    program = gru_fast.onnx.export(
        model, (tokens,), dynamic_shapes=({0: BATCH, 1: STEPS},), verbose=False
    )
    assert len(gru_nodes(program)) == 4, "one for each head"
    assert_same(program, model, torch.randint(11, (4, 3)))
