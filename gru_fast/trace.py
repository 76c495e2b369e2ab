# SPDX-License-Identifier: Apache-2.0
"""Looking into a language model: what it is fed, what it predicts, what its gates do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gru_fast.errors import InputError
from gru_fast.gates import Gates
from gru_fast.language_model import GRULanguageModel
from gru_fast.reference_sampling import draw, uniform
from gru_fast.sampled_model import a_weight
from gru_fast.sampling import SamplingOptions
from gru_fast.tokenizers import EOS, Tokenizer

__all__ = ["gate_values", "image_formats", "plot_gates", "trace"]

_TOP = 3


@torch.no_grad()
def trace(
    model: GRULanguageModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    has_eos: bool = True,
    temperature: float = 1.0,
    seed: int = 0,
) -> str:
    """Two tables side by side: the text under teacher forcing, and a sample of as many steps.

    Columns: step t; the token x<t> that is fed; the three likeliest tokens of the prediction
    y^<t> with their probabilities; the target y<t>, or the token that was drawn.

    Args:
        model: The model.
        tokenizer: Its vocabulary.
        text: The text whose tokens are the targets; one step more for EOS.
        has_eos: Whether sequences end with EOS.
        temperature: Of the draws; the probabilities shown are those after it.
        seed: Of the draws.

    Returns:
        Lines of text.

    Raises:
        InputError: The text is empty or has tokens that the vocabulary has not.
        ValueError: The temperature is outside the range of `SamplingOptions`, or the logits hold
            NaN or +inf.
    """
    ids = tokenizer.encode(text) + ([EOS] if has_eos else [])
    SamplingOptions(len(ids), temperature=temperature, seed=seed)  # checks them
    if not ids:
        raise InputError("the text to trace is empty; expected some text")
    tokens = torch.tensor([ids], dtype=torch.int64, device=a_weight(model).device)
    forced = model.head(model.run(model.teacher_forcing(tokens))[0])[:, 0]
    left = _table(tokenizer, [None, *ids[:-1]], forced.softmax(-1), ids, "target")

    sampled, predictions, hidden = [], [], None
    fed = tokens.new_full((1, 1), model.start)
    for t in range(len(ids)):
        output, hidden = model.run(fed, hidden)
        logits = model.head(output[0, 0])
        u = uniform(seed, torch.tensor(t), torch.tensor(0)).to(logits.device)
        fed = draw(logits, u, temperature).reshape(1, 1)
        predictions.append((logits / temperature).softmax(-1))
        sampled.append(int(fed))
        if has_eos and sampled[-1] == EOS:
            break
    right = _table(tokenizer, [None, *sampled[:-1]], torch.stack(predictions), sampled, "drawn")

    titles = ("teacher forcing: the TRUE token is fed", "sampling: the token that was DRAWN is fed")
    left, right = [titles[0], *left], [titles[1], *right]
    width = max(map(len, left))
    left += [""] * (len(right) - len(left))
    right += [""] * (len(left) - len(right))
    return "\n".join(f"{a:<{width}}  |  {b}".rstrip() for a, b in zip(left, right, strict=True))


def _table(
    tokenizer: Tokenizer,
    fed: list[int | None],
    probabilities: Tensor,
    chosen: list[int],
    title: str,
) -> list[str]:
    rows = [["t", "fed x<t>", "top 3 of y^<t>", title]]
    for t, (x, p, y) in enumerate(zip(fed, probabilities, chosen, strict=False), start=1):
        top = p.topk(min(_TOP, len(p)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        likeliest = "  ".join(f"{_show(tokenizer, i)} {value:.2f}" for i, value in pairs)
        x_shown = "0 vector" if x is None else _show(tokenizer, x)
        rows.append([str(t), x_shown, likeliest, f"{_show(tokenizer, y)} {p[y]:.2f}"])
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = []
    for t_shown, *cells in rows:
        shown = [f"{cell:<{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"{t_shown:>{widths[0]}}", *shown]))
    return lines


def _show(tokenizer: Tokenizer, token: int) -> str:
    if token == EOS:
        return "EOS"
    text = tokenizer.tokens[token]
    return text if text.isprintable() and not text.isspace() else repr(text)


@torch.no_grad()
def gate_values(model: GRULanguageModel, tokens: Tensor) -> Gates:
    """The gates of every layer while a sequence is fed, dropout off.

    Args:
        model: The model.
        tokens: (T,) int64, 0 <= id < V; the zero vector is fed before the first.

    Returns:
        Each gate (L, T + 1, H): the values after the zero vector and after each token.
    """
    inputs = torch.cat([tokens.new_tensor([model.start]), tokens])
    gates: Gates = model.gru(model._features(inputs), return_gates=True)[2]
    return gates


def plot_gates(model: GRULanguageModel, tokenizer: Tokenizer, text: str) -> Any:
    """A matplotlib figure of the gates while a text is fed: time to the right, units upwards.

    For each layer the reset gate (1: the past is used in the candidate) and the update gate in the
    sense 1 - z (1: the state is replaced by the candidate); units are sorted by their mean.

    Raises:
        InputError: The text has tokens that the vocabulary has not.
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    ids = tokenizer.encode(text)
    tokens = torch.tensor(ids, dtype=torch.int64, device=a_weight(model).device)
    gates = gate_values(model, tokens)
    panels = []
    for k, z in enumerate(gates.z):
        if gates.r is not None:
            panels.append((f"layer {k + 1}: reset gate r", gates.r[k]))
        panels.append((f"layer {k + 1}: update gate 1 - z", 1 - z))
    labels = ["0", *(_show(tokenizer, i) for i in ids)]
    figure = Figure(
        figsize=(min(2.5 + 0.28 * len(labels), 40), 2.6 * len(panels) + 0.6), layout="constrained"
    )
    for axes, (title, values) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
    ):
        rows = values[:, values.mean(0).argsort()].T.cpu().float().numpy()
        image = axes.imshow(
            rows, aspect="auto", origin="lower", vmin=0, vmax=1, interpolation="nearest"
        )
        axes.set(title=title, ylabel="unit, by mean")
        axes.set_xticks(range(len(labels)), labels, parse_math=False)
        figure.colorbar(image, ax=axes)
    axes.set_xlabel("fed x<t> (0: the zero vector)")
    return figure


def image_formats() -> list[str]:
    """What the name of a file that `plot_gates(...).savefig` writes may end with.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    return sorted(Figure().canvas.get_supported_filetypes())
