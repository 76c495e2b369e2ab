# SPDX-License-Identifier: Apache-2.0
"""Figures that no table of tokens a second shows: latency, its tail, threads, prompts, batching,
Ctrl-C, and what narrow weights and other instruction sets change.

Each function returns named numbers for the `figures` of a results file. `quick`: sizes that only
show that it works.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import interrupts, timing
from benchmarks.machine import OtherLoad, processors
from benchmarks.markdown import details
from gru_fast import _C, GRU, GRULanguageModel, Sampler, Stream, packed, reference_sampling
from gru_fast.corpus import read_text, split_lines
from gru_fast.sampling import PADDING
from gru_fast.tokenizers import CharacterTokenizer
from gru_fast.training import Lines, TrainingOptions, lines_loss

Figure = dict[str, Any]
V = 65


def line(figure: Figure) -> str:
    """One figure as text."""
    return f"{figure['name']:<28}{figure['value']:>12.4g} {figure['unit']:<20} {details(figure)}"


def effort(quick: bool) -> timing.Effort:
    return timing.QUICK if quick else timing.Effort(budget_s=4.0)


def medians(calls: dict[str, Callable[[], Any]], quick: bool) -> dict[str, float]:
    samples = timing.interleave(calls, timing.cpu_clock, effort(quick))
    return {name: timing.summary(seconds).median_s for name, seconds in samples.items()}


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(name)
    try:
        yield
    finally:
        _C.set_cpu_isa(before)


def language_model(H: int) -> GRULanguageModel:
    torch.manual_seed(0)
    return GRULanguageModel(V, H, H)


def step(quick: bool) -> list[Figure]:
    """`Stream.step` from Python, one layer of float32, beside `nn.GRU` (T = 1) and `nn.GRUCell`."""
    torch.set_num_threads(1)
    found = []
    for H in (64,) if quick else (64, 128, 256):
        stream, theirs, cell = Stream(GRU(H, H)), nn.GRU(H, H), nn.GRUCell(H, H)
        frame, x, state = torch.randn(H), torch.randn(1, 1, H), torch.zeros(1, 1, H)

        def by_torch(theirs: nn.GRU = theirs, x: Tensor = x, state: Tensor = state) -> None:
            with torch.inference_mode():
                theirs(x, state)

        def by_cell(cell: nn.GRUCell = cell, x: Tensor = x[0], state: Tensor = state[0]) -> None:
            with torch.inference_mode():
                cell(x, state)

        load = OtherLoad()
        us = medians(
            {
                "ours": lambda s=stream, x=frame: s.step(x),
                "nn.GRU": by_torch,
                "nn.GRUCell": by_cell,
            },
            quick,
        )
        found.append({
            "name": "stream.step", "value": us["ours"] * 1e6, "unit": "us", "H": H,
            "nn_gru_us": us["nn.GRU"] * 1e6, "ratio": us["nn.GRU"] / us["ours"],
            "nn_gru_cell_us": us["nn.GRUCell"] * 1e6,
            "ratio_to_cell": us["nn.GRUCell"] / us["ours"], "other_cpu": load.share(),
        })  # fmt: skip
    return found


def tail(quick: bool) -> list[Figure]:
    """How much longer than the median the slowest hundredth of the steps takes."""
    torch.set_num_threads(1)
    H, steps = 128, 2_000 if quick else 100_000
    stream, frame = Stream(GRU(H, H)), torch.randn(H)
    for _ in range(2_000):
        stream.step(frame)
    ns = np.empty(steps, np.int64)
    load, clock, one = OtherLoad(), time.perf_counter_ns, stream.step
    gc.collect()
    gc.disable()
    for i in range(steps):
        start = clock()
        one(frame)
        ns[i] = clock() - start
    gc.enable()
    p50, p99, worst = np.percentile(ns, [50, 99, 100]) / 1e3
    return [{
        "name": "stream.tail", "value": float(p99 / p50), "unit": "p99 / p50", "H": H,
        "steps": steps, "p50_us": float(p50), "p99_us": float(p99), "worst_us": float(worst),
        "other_cpu": load.share(),
    }]  # fmt: skip


def together(works: list[Callable[[], Any]]) -> float:
    """Seconds until all are done, each on a thread of Python of its own."""
    threads = [threading.Thread(target=work) for work in works]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def threads(quick: bool) -> list[Figure]:
    """Two threads of Python against one: a Stream each, and one Sampler for both."""
    torch.set_num_threads(1)
    H, n, rounds = 256, 2_000 if quick else 20_000, 3 if quick else 9
    gru, sampler = GRU(H, H), Sampler(language_model(H), threads=1)
    frames = torch.randn(n, H)
    streams = [Stream(gru), Stream(gru)]
    works = {
        "streams": [lambda s=s: s.push(frames) for s in streams],
        "sampler": [lambda i=i: sampler.generate(max_new_tokens=n, seed=i) for i in range(2)],
    }
    found = []
    for name, both in works.items():
        load = OtherLoad()
        scale = []
        for _ in range(rounds):
            alone = together(both[:1])
            scale.append(2 * alone / together(both))
        found.append({
            "name": f"threads.{name}", "value": float(np.median(scale)), "unit": "x one thread",
            "H": H, "cpus": processors(), "other_cpu": load.share(),
        })  # fmt: skip
    return found


def interrupt(quick: bool) -> list[Figure]:
    """From the signal to KeyboardInterrupt in a call that would take ten seconds and more."""
    sampler = Sampler(language_model(256))
    found = []
    for rows in (1, 64):
        call = partial(
            sampler.generate, max_new_tokens=3_000_000 // rows, num_return_sequences=rows
        )
        found += interrupts.waits(call, [0.2] if quick else [0.2] * 5)
    return [{
        "name": "interrupt", "value": max(found) * 1e3, "unit": "ms at most",
        "calls": len(found), "median_ms": float(np.median(found)) * 1e3,
    }]  # fmt: skip


def prompt(quick: bool) -> list[Figure]:
    """Reading a prompt, beside the layer on the same tokens and beside drawing as many."""
    torch.set_num_threads(1)
    H, length = 256, 100 if quick else 1000
    model = language_model(H)
    sampler = Sampler(model, threads=1)
    tokens = torch.randint(V, (1, length))
    with torch.no_grad():
        table = model.token_table()

    def layer() -> None:
        with torch.no_grad():
            model.run(tokens, table=table)

    load = OtherLoad()
    seconds = medians(
        {
            "prompt": lambda: sampler.generate(tokens, max_new_tokens=1, seed=0),
            "layer": layer,
            "drawn": lambda: sampler.generate(max_new_tokens=length, seed=0),
        },
        quick,
    )
    return [{
        "name": "prompt", "value": seconds["layer"] / seconds["prompt"], "unit": "x the layer",
        "H": H, "tokens": length, "prompt_us": seconds["prompt"] * 1e6,
        "layer_us": seconds["layer"] * 1e6, "drawn_us": seconds["drawn"] * 1e6,
        "other_cpu": load.share(),
    }]  # fmt: skip


def batching(quick: bool) -> list[Figure]:
    """Many sequences that end at EOS, of very different lengths, beside as many equal ones."""
    torch.set_num_threads(1)
    n, H = (300, 64) if quick else (10_000, 128)
    model = language_model(H)
    with torch.no_grad():
        model.head.bias[0] -= 0.5
    sampler = Sampler(model, threads=1)
    options = {"num_return_sequences": n, "seed": 0}

    def ragged() -> Tensor:
        tokens = sampler.generate(max_new_tokens=1000, eos_token_id=0, **options)
        assert isinstance(tokens, Tensor)
        return tokens

    lengths = (ragged() != PADDING).sum(1).double()
    mean = round(float(lengths.mean()))
    load = OtherLoad()
    seconds = medians(
        {"ragged": ragged, "equal": lambda: sampler.generate(max_new_tokens=mean, **options)}, quick
    )
    rate = float(lengths.sum()) / seconds["ragged"]
    equal = n * mean / seconds["equal"]
    return [{
        "name": "batching", "value": rate / equal, "unit": "x equal lengths", "H": H,
        "sequences": n, "shortest": int(lengths.min()), "mean": float(lengths.mean()),
        "longest": int(lengths.max()), "tokens_per_s": rate, "equal_tokens_per_s": equal,
        "other_cpu": load.share(),
    }]  # fmt: skip


def streamer(quick: bool) -> list[Figure]:
    """What it costs to see every token as it is drawn."""
    torch.set_num_threads(1)

    class Count:
        def put(self, value: Tensor) -> None:
            pass

        def end(self) -> None:
            pass

    found = []
    for H in (64,) if quick else (128, 512):
        n = 200 if quick else 2000
        call = partial(language_model(H).generate, max_new_tokens=n, seed=0)
        seconds = medians(
            {
                "streamed": partial(call, streamer=Count()),
                "plain": call,
            },
            quick,
        )
        found.append({
            "name": "streamer", "value": seconds["streamed"] / n * 1e6, "unit": "us/token",
            "H": H, "without_us": seconds["plain"] / n * 1e6,
        })  # fmt: skip
    return found


def trained(quick: bool) -> tuple[GRULanguageModel, Lines]:
    """A character model of surnames, trained for seconds."""
    lines = split_lines(read_text("builtin:names"))
    if quick:
        lines = lines[:500]
    tokenizer = CharacterTokenizer.from_text("".join(lines))
    options = TrainingOptions(steps=20 if quick else 800, batch=64, max_length=20, seed=0)
    data = Lines([tokenizer.encode(text) for text in lines], options)
    torch.manual_seed(0)
    model = GRULanguageModel(len(tokenizer), 32, 128)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for n in range(1, options.steps + 1):
        optimiser.zero_grad()
        data.loss(model, n, None)[0].backward()
        optimiser.step()
    return model, data


def narrow(quick: bool) -> list[Figure]:
    """Nats per character that narrow weights cost on held-out names."""
    torch.set_num_threads(processors())
    model, data = trained(quick)
    rows = [data.rows(i[None])[0] for i in data.held_out]
    exact, found = lines_loss(model, rows), []
    for weights in ("bfloat16", "int8"):
        stream, total, count = Stream(model, weights), 0.0, 0
        for row in rows:
            stream.reset()
            logits = stream.push(model.teacher_forcing(row[None])[0])
            total += float(nn.functional.cross_entropy(logits, row, reduction="sum"))
            count += len(row)
        found.append({
            "name": "nats_lost", "value": total / count - exact, "unit": "nats/character",
            "weights": weights, "float32": exact, "characters": count,
        })  # fmt: skip
    return found


def without_vnni(quick: bool) -> list[Figure]:
    """int8 on AVX2, where no instruction multiplies bytes into 32-bit sums."""
    if "avx2" not in _C.cpu_isas():
        return []
    torch.set_num_threads(1)
    found = []
    for H in (64,) if quick else (128, 256, 512):
        model, n = language_model(H), 200 if quick else 2000
        with instruction_set("avx2"):
            samplers = {w: Sampler(model, w, threads=1) for w in ("float32", "int8")}
        calls = {w: partial(s.generate, max_new_tokens=n, seed=0) for w, s in samplers.items()}
        seconds = medians(calls, quick)
        found.append({
            "name": "int8_on_avx2", "value": seconds["float32"] / seconds["int8"],
            "unit": "x float32", "H": H, "float32_us": seconds["float32"] / n * 1e6,
            "int8_us": seconds["int8"] / n * 1e6,
        })  # fmt: skip
    return found


def flips(quick: bool) -> list[Figure]:
    """Draws that come out differently on another instruction set, after the same prefix."""
    model, n = trained(quick)[0], 500 if quick else 20_000
    tokens = Sampler(model).generate(max_new_tokens=n, seed=1)
    assert isinstance(tokens, Tensor)
    inputs = model.teacher_forcing(tokens)
    position, stream = np.arange(n), np.zeros(n, np.int64)
    found = []
    for weights in packed.WEIGHTS:
        drawn = {}
        for isa in _C.cpu_isas():
            with instruction_set(isa):
                logits = packed.stream(packed.pack_model(model, weights)).push(inputs[0].numpy())
                drawn[isa] = _C.draw(logits, 1, position, stream)[0]
        if weights == "float32":
            exact = GRULanguageModel(**model.config).double()
            exact.load_state_dict(model.state_dict())
            with torch.no_grad():
                logits = exact(inputs)[0][0]
            u = reference_sampling.uniform(1, torch.arange(n), torch.zeros(n, dtype=torch.int64))
            drawn["float64"] = reference_sampling.draw(logits, u).numpy()
        for (one, a), (other, b) in pairwise(drawn.items()):
            found.append({
                "name": "flips", "value": int((a != b).sum()) / n, "unit": "of all draws",
                "weights": weights, "between": f"{one}, {other}", "draws": n,
            })  # fmt: skip
    return found


FACTS: dict[str, Callable[[bool], list[Figure]]] = {
    "step": step,
    "tail": tail,
    "threads": threads,
    "interrupt": interrupt,
    "prompt": prompt,
    "batching": batching,
    "streamer": streamer,
    "narrow": narrow,
    "without_vnni": without_vnni,
    "flips": flips,
}
