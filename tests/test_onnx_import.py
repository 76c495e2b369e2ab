# SPDX-License-Identifier: Apache-2.0
"""Modules from ONNX's GRU nodes, checked with onnx's own node tests and with ONNX Runtime."""

import importlib
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gru_fast
from gru_fast import notations

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import gru_fast.onnx  # noqa: E402
from gru_fast.onnx import ReverseGRU, from_node, load_gru  # noqa: E402

I, H, T, B = 3, 4, 5, 2  # noqa: E741

# torch's own, while its exporter copies what torch.export made.
torch_exports = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")


def weights(D=1, bias=True, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"W": (D, 3 * H, I), "R": (D, 3 * H, H)} | ({"B": (D, 6 * H)} if bias else {})
    return {k: rng.normal(0, 0.7, shape).astype(np.float32) for k, shape in shapes.items()}


def model_of(
    initializers, inputs=("X",), outputs=("Y", "Y_h"), name="gru", before=(), **attributes
):
    """A model with one GRU node, whose weights are the initializers."""
    order = ("X", "W", "R", "B", "sequence_lens", "initial_h")
    has = {*initializers, *inputs, *(o for node in before for o in node.output)}
    node = onnx.helper.make_node(
        "GRU", [n if n in has else "" for n in order], list(outputs), name=name,
        **{"hidden_size": H, **attributes},
    )  # fmt: skip
    types = {"sequence_lens": onnx.TensorProto.INT32}
    graph = onnx.helper.make_graph(
        [*before, node],
        "graph",
        [onnx.helper.make_tensor_value_info(n, types.get(n, 1), None) for n in inputs],
        [onnx.helper.make_tensor_value_info(n, 1, None) for n in outputs if n],
        [onnx.numpy_helper.from_array(a, n) for n, a in initializers.items()],
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8
    )


def run(model, **inputs):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def as_node(module, X, sequence_lens=None, initial_h=None, layout=0):
    """The module's outputs in the node's layout, Y (T, D, B, H) and Y_h, or batch first."""
    X = torch.from_numpy(X)
    hx = None if initial_h is None else torch.from_numpy(initial_h)
    lengths = None if sequence_lens is None else torch.from_numpy(sequence_lens)
    if layout and hx is not None:
        hx = hx.transpose(0, 1)
    with torch.no_grad():
        output, h_n = module(X, hx, lengths=lengths)
    Y = output.unflatten(2, (len(h_n), -1))
    return (Y.numpy(), h_n.transpose(0, 1).numpy()) if layout else (
        Y.transpose(1, 2).numpy(), h_n.numpy(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def node_tests():
    # Not collect_testcases("GRU"), which runs those of all operators on the way.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("onnx.backend.test.case.node.gru")
    cases = importlib.import_module("onnx.backend.test.case.node")._NodeTestCases
    return {
        case.name.removeprefix("test_gru_"): case
        for case in cases
        if case.name.startswith("test_gru_")
    }


NODE_TESTS = ("defaults", "with_initial_bias", "seq_length", "batchwise")
LATER_NODE_TESTS = ("bidirectional", "reverse")


@pytest.mark.parametrize("name", NODE_TESTS + LATER_NODE_TESTS)
def test_onnxs_own_node_tests(name, node_tests):
    if name in LATER_NODE_TESTS and name not in node_tests:
        pytest.skip(f"this onnx has no node test {name}")
    case = node_tests[name]
    [node] = case.model.graph.node
    names = [i.name for i in case.model.graph.input]
    for inputs, outputs in case.data_sets:
        arrays = dict(zip(names, inputs, strict=True))
        module = from_node(node, {k: arrays.pop(k) for k in ("W", "R", "B") if k in arrays})
        layout = {a.name: a.i for a in node.attribute}.get("layout", 0)
        got = dict(zip(("Y", "Y_h"), as_node(module, **arrays, layout=layout), strict=True))
        for output, expected in zip([o for o in node.output if o], outputs, strict=True):
            np.testing.assert_allclose(got[output], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("linear_before_reset", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_node_and_its_module_agree(direction, linear_before_reset, bias):
    D = 2 if direction == "bidirectional" else 1
    inputs = {
        "X": np.random.default_rng(1).normal(size=(T, B, I)).astype(np.float32),
        "sequence_lens": np.array([5, 3], np.int32),
        "initial_h": np.random.default_rng(2).normal(size=(D, B, H)).astype(np.float32),
    }
    model = model_of(
        weights(D, bias), tuple(inputs), direction=direction,
        linear_before_reset=linear_before_reset,
    )  # fmt: skip
    module = load_gru(model)
    assert isinstance(module, ReverseGRU if direction == "reverse" else gru_fast.GRU)
    for given, expected in zip(as_node(module, **inputs), run(model, **inputs), strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)
    model.graph.node[0].attribute.pop()
    model.graph.node[0].attribute.append(
        onnx.helper.make_attribute("linear_before_reset", 1 - linear_before_reset)
    )
    other = as_node(load_gru(model), **inputs)
    assert np.abs(other[0] - as_node(module, **inputs)[0]).max() > 1e-3


def test_defaults_of_the_attributes_and_a_path(tmp_path):
    model = model_of(weights())
    del model.graph.node[0].attribute[:]
    onnx.save(model, tmp_path / "model.onnx")
    for module in (load_gru(tmp_path / "model.onnx"), load_gru(str(tmp_path / "model.onnx"))):
        assert (module.input_size, module.hidden_size, module.cell) == (I, H, "reset_before")
        assert module.bias and not module.bidirectional and not module.batch_first
    with pytest.raises(FileNotFoundError):
        load_gru(tmp_path / "nothing.onnx")


def test_activations_that_are_the_defaults_are_taken():
    given = load_gru(model_of(weights(), activations=["sigmoid", "TANH"]))
    assert torch.equal(given.weight_ih_l0, load_gru(model_of(weights())).weight_ih_l0)


@pytest.mark.parametrize("value", [np.float64, np.float16])
def test_dtypes(value):
    arrays = {k: a.astype(value) for k, a in weights().items()}
    assert load_gru(model_of(arrays)).weight_hh_l0.dtype == torch.from_numpy(arrays["W"]).dtype


def test_bfloat16_weights_become_float32():
    import ml_dtypes  # onnx needs it too

    arrays = {k: a.astype(ml_dtypes.bfloat16) for k, a in weights().items()}
    loaded = load_gru(model_of(arrays))
    expected = load_gru(model_of({k: a.astype(np.float32) for k, a in arrays.items()}))
    for name, p in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p)


def test_weights_that_the_graph_computes_from_constants():
    """As torch.onnx.export leaves them: sliced and concatenated from PyTorch's order of gates."""
    plain = weights()
    helper = onnx.helper
    initializers = {k: a for k, a in plain.items() if k != "W"} | {
        "parts": plain["W"][0], "axes": np.array([0]),
    }  # fmt: skip
    before = [
        helper.make_node("Unsqueeze", ["parts", "axes"], ["raised"]),
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["raised", "two"], ["W"]),
    ]
    module = load_gru(model_of(initializers, before=before))
    expected = load_gru(model_of(plain | {"W": 2 * plain["W"]}))
    assert torch.equal(module.weight_ih_l0, expected.weight_ih_l0)


def test_weights_that_depend_on_an_input_are_refused():
    with pytest.raises(ValueError, match="gru: expected a constant W, got one that is computed"):
        load_gru(model_of({k: a for k, a in weights().items() if k != "W"}, ("X", "W")))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"clip": 1.0}, "gru: clip: expected none, got 1.0"),
        (
            {"activations": ["Relu", "Tanh"]},
            r"activations: expected \['Sigmoid', 'Tanh'\], got \['Relu', 'Tanh'\]",
        ),
        ({"activation_alpha": [0.5]}, r"activation_alpha: expected none, got \[0.5\]"),
        ({"activation_beta": [0.5]}, r"activation_beta: expected none, got \[0.5\]"),
        ({"direction": "sideways"}, "direction: expected .*got 'sideways'"),
        ({"direction": "bidirectional"}, "W: expected 2 directions, got 1"),
        ({"hidden_size": 5}, "W: expected 5 hidden_size, got 4"),
        ({"odd": 1}, "unknown attribute odd"),
    ],
)
def test_what_this_library_has_not_is_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        load_gru(model_of(weights(), **attributes))


def test_another_type_of_node_is_refused():
    node = onnx.helper.make_node("LSTM", ["X", "W", "R"], ["Y"])
    with pytest.raises(ValueError, match="node: expected the type GRU, got LSTM"):
        from_node(node, weights())
    node = onnx.helper.make_node("GRU", ["X", "W", "R"], ["Y"])
    with pytest.raises(ValueError, match=r"GRU: expected an array W, got \['R'\]"):
        from_node(node, {"R": weights()["R"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": np.zeros((1, 11, I), np.float32)}, r"W: expected .*got \(1, 11, 3\)"),
        ({"W": np.zeros((12, I), np.float32)}, r"W: expected .*got \(12, 3\)"),
        ({"R": np.zeros((1, 12, 5), np.float32)}, r"R: expected \(1, 12, 4\), got \(1, 12, 5\)"),
        ({"B": np.zeros((1, 12), np.float32)}, r"B: expected \(1, 24\), got \(1, 12\)"),
    ],
)
def test_weights_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        load_gru(model_of(weights() | change))


def test_constant_lengths_and_states_that_differ_are_not_dropped_silently():
    for constant in (
        {"initial_h": np.arange(B * H, dtype=np.float32).reshape(1, B, H)},
        {"sequence_lens": np.array([1, 2], np.int32)},
    ):
        [name] = constant
        with pytest.raises(ValueError, match=f"gru: {name} is a constant of the model"):
            load_gru(model_of(weights() | constant))
        load_gru(model_of(weights() | constant), ignore=(name,))
        load_gru(model_of(weights() | constant), ignore=name)
    # Rows are the first axis there.
    differ = {"initial_h": np.arange(B * H, dtype=np.float32).reshape(B, 1, H)}
    with pytest.raises(ValueError, match="gru: initial_h is a constant of the model"):
        load_gru(model_of(weights() | differ, direction="reverse", layout=1))
    with pytest.raises(ValueError, match="ignore: expected initial_h or sequence_lens, got"):
        load_gru(model_of(weights()), ignore=("B",))


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_a_constant_state_of_all_rows_is_a_learned_one(direction):
    D = 2 if direction == "bidirectional" else 1
    assert not load_gru(
        model_of(weights() | {"initial_h": np.zeros((1, B, H), np.float32)})
    ).learn_h0
    state = np.random.default_rng(3).normal(size=(D, 1, H)).astype(np.float32)
    X = np.random.default_rng(1).normal(size=(T, B, I)).astype(np.float32)
    helper = onnx.helper
    # The state of a batch of any size, as exporters write it.
    before = [
        helper.make_node("Shape", ["X"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["batch"], axis=0),
        helper.make_node("Concat", ["D", "batch", "H"], ["wanted"], axis=0),
        helper.make_node("Expand", ["h0", "wanted"], ["initial_h"]),
    ]
    sizes = {"one": np.array([1]), "D": np.array([D]), "H": np.array([H]), "h0": state}
    for model in (
        model_of(weights(D) | {"initial_h": state.repeat(B, 1)}, direction=direction),
        model_of(weights(D) | sizes, before=before, direction=direction),
    ):
        del model.graph.input[0].type.tensor_type.shape.dim[:]
        for size in ("steps", "batch", I):
            dim = model.graph.input[0].type.tensor_type.shape.dim.add()
            setattr(dim, "dim_param" if isinstance(size, str) else "dim_value", size)
        module = load_gru(model)
        for given, expected in zip(as_node(module, X), run(model, X=X), strict=True):
            np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)
        assert dict(module.named_parameters())[
            "gru.h0" if direction == "reverse" else "h0"
        ].requires_grad


def two_nodes():
    first = model_of(weights(), outputs=("Y",), name="first")
    second = model_of(weights(seed=1), outputs=("Z",), name="")
    for node in second.graph.node:
        node.input[1:4] = [n + "2" for n in node.input[1:4]]
    for tensor in second.graph.initializer:
        tensor.name += "2"
    first.graph.node.extend(second.graph.node)
    first.graph.initializer.extend(second.graph.initializer)
    return first


def test_nodes_are_found_by_name_or_by_output():
    model = two_nodes()
    with pytest.raises(ValueError, match=r"name: expected one .*\['Z', 'first'\], got None"):
        load_gru(model)
    with pytest.raises(ValueError, match=r"name: expected names .*\['Z', 'first'\], got 'third'"):
        load_gru(model, "third")
    assert torch.equal(
        load_gru(model, "Z").weight_ih_l0, load_gru(model_of(weights(seed=1))).weight_ih_l0
    )
    with pytest.raises(ValueError, match="layer 1 does not fit on the first, expected input"):
        load_gru(model, ["first", "Z"])
    model.graph.node[0].name = "Z"
    with pytest.raises(ValueError, match=r"name: expected one .*\['Z', 'Z'\], got None"):
        load_gru(model)
    with pytest.raises(ValueError, match="name: expected one GRU node named 'Z', got 2"):
        load_gru(model, "Z")
    with pytest.raises(ValueError, match="name: expected one"):
        load_gru(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])))


def test_nodes_inside_loops_and_functions_are_found():
    inner = model_of(weights(), outputs=("Y",), name="inner").graph
    tensors = list(inner.initializer)
    del inner.initializer[:]
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["X"], ["X2"])],
        "else",
        [],
        [onnx.helper.make_tensor_value_info("X2", 1, None)],
    )
    del inner.input[:]
    node = onnx.helper.make_node("If", ["c"], ["out"], then_branch=inner, else_branch=branch)
    graph = onnx.helper.make_graph(
        [node],
        "outer",
        [
            onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []),
            onnx.helper.make_tensor_value_info("X", 1, None),
        ],
        [onnx.helper.make_tensor_value_info("out", 1, None)],
        tensors,
    )
    opset = onnx.helper.make_opsetid("", 14)
    expected = load_gru(model_of(weights())).weight_ih_l0
    outer = onnx.helper.make_model(graph, opset_imports=[opset])
    assert torch.equal(load_gru(outer, "inner").weight_ih_l0, expected)

    body = model_of(weights(), outputs=("Y",), name="inside").graph.node[0]
    function = onnx.helper.make_function(
        "local", "Wrapped", ["X", "W", "R", "B"], ["Y"], [body], [opset]
    )
    call = onnx.helper.make_node("Wrapped", ["X", "W", "R", "B"], ["Y"], domain="local")
    x = onnx.helper.make_tensor_value_info("X", 1, None)
    y = onnx.helper.make_tensor_value_info("Y", 1, None)
    graph = onnx.helper.make_graph([call], "main", [x], [y], tensors)
    opsets = [opset, onnx.helper.make_opsetid("local", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function])
    assert torch.equal(load_gru(model).weight_ih_l0, expected)


@torch_exports
@pytest.mark.parametrize("export", [gru_fast.onnx.export, torch.onnx.export])
def test_there_and_back(export, tmp_path):
    """Two layers in both directions through a file, ours and torch.nn.GRU's."""
    torch.manual_seed(0)
    options = {"verbose": False}
    if export is torch.onnx.export:
        model = nn.GRU(I, H, 2, bidirectional=True)
    else:
        model = gru_fast.GRU(I, H, 2, bidirectional=True, cell="reset_before", learn_h0=True)
        nn.init.normal_(model.h0)
        options["dynamic_shapes"] = ({1: torch.export.Dim("batch")},)
    path = tmp_path / "model.onnx"
    program = export(model.eval(), (torch.zeros(T, B, I),), path, **options)
    names = [n.name for n in program.model_proto.graph.node if n.op_type == "GRU"]
    loaded = load_gru(path, names)
    assert loaded.cell == getattr(model, "cell", "reset_after")
    assert loaded.learn_h0 == hasattr(model, "h0")
    for name, p in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p)


@pytest.mark.parametrize("cell", ["reset_after", "reset_before"])
def test_notations_both_ways(cell):
    gru = gru_fast.GRU(I, H, 2, bidirectional=True, cell=cell, bias=cell == "reset_after")
    for k, arrays in enumerate(notations.to_onnx(gru)):
        one = notations.from_onnx(**arrays, linear_before_reset=cell == "reset_after")
        assert one.cell == cell
        for name, p in one.named_parameters():
            assert torch.equal(gru.get_parameter(name.replace("_l0", f"_l{k}")), p)
    with pytest.raises(ValueError, match="no GRU without a reset gate"):
        notations.to_onnx(gru_fast.GRU(I, H, cell="no_reset"))


def test_a_reverse_layer_checks_its_arguments():
    with pytest.raises(ValueError, match="got num_layers=2, bidirectional=False"):
        ReverseGRU(gru_fast.GRU(I, H, 2))
    for option, given in (("recurrent_dropout", 0.5), ("num_heads", 2)):
        with pytest.raises(ValueError, match=f"gru: expected {option}=.*, got {given}"):
            ReverseGRU(gru_fast.GRU(I, 2 * H, **{option: given}))
    with pytest.raises(ValueError, match="expected 3 dimensions, got 2"):
        ReverseGRU(gru_fast.GRU(I, H))(torch.zeros(T, I))
    batch_first = ReverseGRU(gru_fast.GRU(I, H, batch_first=True))
    x = torch.randn(B, T, I)
    output, h_n = batch_first(x)
    flipped, h_flipped = batch_first.gru(x.flip(1))
    torch.testing.assert_close(output, flipped.flip(1))
    torch.testing.assert_close(h_n, h_flipped)
