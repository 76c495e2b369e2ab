# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks sample`: tokens drawn one after the other, by us and by a loop over peers.

A call draws T tokens for each of B sequences from a character model: table or embedding, GRU, head,
softmax, draw, feed back. Every provider gets the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine, probe, program, timing
from benchmarks.bound import bandwidth_of
from benchmarks.cases import Case, parse
from benchmarks.providers_onnx import onnx_rows
from benchmarks.records import Record
from benchmarks.report import threads as threads_of
from benchmarks.report import warnings
from benchmarks.runner import describe_error, note_claims, note_times
from gru_fast import GRULanguageModel, Sampler, sampling
from gru_fast.packed import WEIGHTS

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
VOCABULARY = 65
SHAPES = [
    *(Case(H, H, 1, 2000, V=VOCABULARY) for H in (128, 256, 512)),
    *(Case(H, H, 64, 200, V=VOCABULARY) for H in (128, 256, 512)),
    Case(384, 384, 1, 2000, V=256),
]
QUICK = [Case(64, 64, 1, 200, V=VOCABULARY), Case(64, 64, 8, 50, V=VOCABULARY)]

GATE_TOKENS = 48
REGRET = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.1}
"""How far below the largest logit, in float64, the token that a greedy run takes may be."""

Draw = Callable[[int, bool], Tensor]
"""(T, greedy) to (B, T) tokens."""


def nn_gru_loop(model: GRULanguageModel, B: int) -> Draw:
    """What one writes with torch.nn: five calls a token."""
    H = model.gru.hidden_size
    gru = nn.GRU(H, H, model.gru.num_layers)
    gru.load_state_dict(model.gru.state_dict())
    embedding, head = model.embedding, model.head
    assert embedding is not None

    @torch.inference_mode()
    def draw(T: int, greedy: bool) -> Tensor:
        x, h, tokens = torch.zeros(1, B, H), torch.zeros(gru.num_layers, B, H), []
        for _ in range(T):
            output, h = gru(x, h)
            logits = head(output[0])
            if greedy:
                token = logits.argmax(-1)
            else:
                token = torch.multinomial(torch.softmax(logits, -1), 1)[:, 0]
            tokens.append(token)
            x = embedding(token)[None]
        return torch.stack(tokens, 1)

    return draw


def onnxruntime_loop(model: GRULanguageModel, B: int) -> Draw:
    """A graph from inputs and state to logits and state; NumPy draws."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        step_graph(model, B), options, providers=["CPUExecutionProvider"]
    )
    H = model.gru.hidden_size
    generator = np.random.default_rng(0)

    def draw(T: int, greedy: bool) -> Tensor:
        h = np.zeros((1, B, H), np.float32)
        token = np.full(B, model.vocab_size)
        tokens = np.empty((B, T), np.int64)
        for t in range(T):
            logits, h = session.run(None, {"token": token, "h": h})
            if greedy:
                token = logits.argmax(-1)
            else:
                cdf = np.exp(logits - logits.max(-1, keepdims=True)).cumsum(-1)
                u = generator.random((B, 1), np.float32) * cdf[:, -1:]
                token = (cdf <= u).sum(-1)
            tokens[:, t] = token
        return torch.from_numpy(tokens)

    return draw


def step_graph(model: GRULanguageModel, B: int) -> bytes:
    """Gather, GRU and Gemm; the row after the last token is the zero vector."""
    from onnx import TensorProto, helper, numpy_helper

    H, V, weights = model.gru.hidden_size, model.vocab_size, model.gru
    assert model.embedding is not None
    bias = [onnx_rows(weights.bias_ih_l0.detach()), onnx_rows(weights.bias_hh_l0.detach())]
    constants = {
        "E": nn.functional.pad(model.embedding.weight.detach(), (0, 0, 0, 1)),
        "W": onnx_rows(weights.weight_ih_l0.detach())[None],
        "R": onnx_rows(weights.weight_hh_l0.detach())[None],
        "B": torch.cat(bias)[None],
        "head": model.head.weight.detach(),
        "c": model.head.bias.detach(),
        "shape": torch.tensor([1, B, H]),
        "flat": torch.tensor([B, H]),
    }
    nodes = [
        helper.make_node("Gather", ["E", "token"], ["rows"]),
        helper.make_node("Reshape", ["rows", "shape"], ["x"]),
        helper.make_node(
            "GRU", ["x", "W", "R", "B", "", "h"], ["", "h_n"],
            hidden_size=H, linear_before_reset=1,
        ),
        helper.make_node("Reshape", ["h_n", "flat"], ["top"]),
        helper.make_node("Gemm", ["top", "head", "c"], ["logits"], transB=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "step",
        [
            helper.make_tensor_value_info("token", TensorProto.INT64, [B]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, B, H]),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [B, V]),
            helper.make_tensor_value_info("h_n", TensorProto.FLOAT, [1, B, H]),
        ],
        [numpy_helper.from_array(t.contiguous().numpy(), n) for n, t in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=8)
    serialised: bytes = made.SerializeToString()
    return serialised


def drawing(generate: Callable[..., Any], B: int, **options: Any) -> Draw:
    """B sequences by a function with the arguments of `GRULanguageModel.generate`."""

    def draw(T: int, greedy: bool) -> Tensor:
        tokens = generate(
            max_new_tokens=T, num_return_sequences=B, do_sample=not greedy, seed=0, **options
        )
        assert isinstance(tokens, Tensor)
        return tokens

    return draw


def gru_fast_loop(model: GRULanguageModel, B: int) -> Draw:
    """Our loop of PyTorch operations, which `generate` uses where the native one cannot."""
    return drawing(partial(sampling.generate, model), B, loop=sampling.generate_loop)


def gru_fast_generate(model: GRULanguageModel, B: int) -> Draw:
    """`model.generate`, which packs the weights in every call."""
    return drawing(model.generate, B)


def gru_fast_sampler(weights: str, model: GRULanguageModel, B: int) -> Draw:
    """One native call with weights packed in advance."""
    return drawing(Sampler(model, weights).generate, B)


def providers() -> dict[tuple[str, str], tuple[str, Callable[[GRULanguageModel, int], Draw]]]:
    """(name, dtype) to (version, prepare); the baseline first."""
    ours = version("gru_fast")
    found = {("nn.GRU.loop", "float32"): (torch.__version__, nn_gru_loop)}
    if find_spec("onnxruntime") and find_spec("onnx"):
        found["onnxruntime.loop", "float32"] = (version("onnxruntime"), onnxruntime_loop)
    found["gru_fast.loop", "float32"] = (ours, gru_fast_loop)
    found["gru_fast.generate", "float32"] = (ours, gru_fast_generate)
    for weights in WEIGHTS:
        found["gru_fast.sampler", weights] = (ours, partial(gru_fast_sampler, weights))
    return found


def gate(draw: Draw, model: GRULanguageModel, dtype: str) -> str | None:
    """None, or how far a greedy run strays from the model in float64."""
    tokens = draw(GATE_TOKENS, True)
    exact = GRULanguageModel(**model.config).double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits, _ = exact(exact.teacher_forcing(tokens))
    regret = float((logits.amax(-1) - logits.gather(-1, tokens[..., None])[..., 0]).max())
    if regret <= REGRET[dtype]:
        return None
    return f"a greedy token {regret:.3g} below the largest logit, expected {REGRET[dtype]}"


def bound(case: Case, dtype: str, threads: int, peaks: probe.Peaks) -> float | None:
    """Seconds of a call at best: the bytes of W_hh and head, or their products; table rows free."""
    weights = 3 * case.H * case.H + case.V * case.H
    moved = weights * BYTES[dtype]
    rate, peak = bandwidth_of(peaks, moved / threads), peaks.flops.get(dtype)
    if rate is None or (peak is None and case.B > 1):
        return None
    operations = 2 * weights * case.B / peak if peak is not None else 0.0
    return case.T * max(moved / rate, operations)


def run_case(
    case: Case, threads: int, effort: timing.Effort, peaks: probe.Peaks | None
) -> list[Record]:
    """Gate, then interleaved rounds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = GRULanguageModel(case.V, case.I, case.H)
    records, calls = {}, {}
    for (name, dtype), (number, prepare) in providers().items():
        key = f"{name} {dtype}"
        record = Record("sample", name, number, "cpu", dtype, threads, case.as_dict())
        records[key] = record
        try:
            draw = prepare(model, case.B)
            record.error = gate(draw, model, dtype)
        except Exception as error:
            record.error = describe_error(error)
            continue
        record.parity = "ok" if record.error is None else "wrong"
        record.parity_T = GATE_TOKENS
        if record.error is None:
            calls[key] = lambda draw=draw: draw(case.T, False)
    load = machine.OtherLoad()
    samples = timing.interleave(calls, timing.cpu_clock, effort)
    other, baseline = load.share(), samples.get("nn.GRU.loop float32")
    for key, seconds in samples.items():
        record = records[key]
        note_times(record, seconds, other)
        best = None if peaks is None else bound(case, record.dtype, threads, peaks)
        note_claims(record, seconds, "nn.GRU.loop", baseline, best)
    return list(records.values())


def table(records: list[Record]) -> str:
    """One line for each provider, with the tokens a second of all sequences together."""
    first = records[0]
    lines = [f"sample {Case(**first.case)} cpu, {threads_of(first)}"]
    lines.append(f"{'provider':<28}{'tokens/s':>12}{'ratio':>9}{'share':>8}  parity")
    for r in records:
        speed, ratio, share = "-", "-", "-"
        if r.median_s is not None:
            speed = f"{r.case['B'] * r.case['T'] / r.median_s:,.0f}"
        if r.ratio_to_torch is not None:
            ratio = f"{r.ratio_to_torch:.2f}x"
        if r.share_of_bound is not None:
            share = f"{r.share_of_bound:.0%}"
        name = f"{r.provider} {r.dtype}"
        lines.append(f"{name:<28}{speed:>12}{ratio:>9}{share:>8}  {r.parity} {r.error or ''}")
    return "\n".join([*lines, *warnings(records)])


def main(suite: str, arguments: list[str]) -> int:
    """Run; 0 if every gate was green and nothing failed, else 1."""
    assert __doc__ is not None
    parser = program.parser("sample", __doc__.split(": ", 1)[1])
    parser.add_argument("--shapes", help="list like H256-B64-T200-V65; default: the goals' table")
    options = parser.parse_args(arguments)
    try:
        threads = program.threads_of(options.threads, options.quick)
        shapes = QUICK if options.quick else SHAPES
        if options.shapes:
            shapes = parse(options.shapes)
        if min(case.V for case in shapes) < 1 or max(case.L for case in shapes) > 1:
            raise ValueError("expected shapes with V >= 1 and one layer")
    except ValueError as error:
        return program.complain("sample", error)
    run = program.Run(options, threads)
    for n in threads:
        for case in shapes:
            records = run_case(case, n, run.effort, run.peaks.get(n))
            run.add(records, table(records))
    return run.finish()
