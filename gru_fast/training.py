# SPDX-License-Identifier: Apache-2.0
"""Training a `GRULanguageModel`: two kinds of data, one loop that can be stopped and resumed.

Every step begins with a seed of its own, made of the run's seed and the number of the step. So the
state of a run is the weights, the optimiser's moments, the state carried across chunks and the
number of the step; nothing else, and taking it up again gives the same bits.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gru_fast.checkpoint import load_checkpoint, load_model, model_tensors, save_checkpoint
from gru_fast.errors import InputError
from gru_fast.language_model import GRULanguageModel
from gru_fast.reference_sampling import philox
from gru_fast.sampled_model import a_weight
from gru_fast.token_ids import PADDING
from gru_fast.tokenizers import EOS

__all__ = ["Lines", "Report", "Text", "TrainingOptions", "lines_loss", "text_loss", "train"]

_LOGITS_AT_ONCE = 1 << 22
_HELD_OUT_ROWS = 16


@dataclass(frozen=True)
class TrainingOptions:
    """How a model is trained: Adam, gradient norm clipped, learning rate along half a cosine to 0.

    Attributes:
        steps: Updates of the weights.
        batch: Sequences, or parallel streams of a running text, in each step.
        chunk: Tokens of each stream in a step; for running text only.
        max_length: Lines are cut after so many tokens.
        lr: Learning rate of the first step.
        clip: Largest norm of the gradient.
        seed: Of the split, the batches and dropout.
    """

    steps: int = 800
    batch: int = 128
    chunk: int = 128
    max_length: int = 256
    lr: float = 4e-3
    clip: float = 1.0
    seed: int = 0


class Data(Protocol):
    """What `train` needs: the loss of a step, and that of what is held out."""

    def loss(
        self, model: GRULanguageModel, step: int, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """Loss of step 1, 2, ...; the state to carry on; how many tokens it is the mean of."""

    def held_out_loss(self, model: GRULanguageModel) -> float:
        """Nats per token."""


class Lines:
    """Short sequences, each ending with EOS; a step draws rows at random, with replacement.

    Of N lines, N // 20 (at least 1, at most 2000) are held out.

    Args:
        sequences: Token ids without EOS. What is longer than `max_length` is cut and gets no EOS.
        options: Batch size, longest row and seed.
        device: Where batches go.

    Attributes:
        training: Indices of the sequences that are trained on.
        held_out: Indices of the others.

    Raises:
        InputError: There are fewer than two sequences.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        options: TrainingOptions,
        device: torch.device | str = "cpu",
    ) -> None:
        """See the class."""
        if len(sequences) < 2:
            raise InputError(
                f"expected at least 2 different lines to train on, got {len(sequences)}"
            )
        rows = [torch.tensor([*ids, EOS][: options.max_length]) for ids in sequences]
        self._flat = torch.cat(rows).to(device)
        self._lengths = torch.tensor([len(row) for row in rows])
        self._starts = self._lengths.cumsum(0) - self._lengths
        order = torch.randperm(len(rows), generator=_generator(options.seed, 0))
        split = min(max(len(rows) // 20, 1), 2000)
        self.held_out, self.training = order[:split], order[split:]
        self._held_out_rows = [rows[i].to(device) for i in self.held_out.tolist()]
        self._options = options

    def rows(self, indices: Tensor) -> Tensor:
        """(B, longest) tokens of some sequences, PADDING after each."""
        lengths = self._lengths[indices]
        column = torch.arange(int(lengths.max()))
        places = self._starts[indices][:, None] + column.clamp(max=lengths[:, None] - 1)
        device = self._flat.device
        ended = (column >= lengths[:, None]).to(device)
        return self._flat[places.to(device)].masked_fill(ended, PADDING)

    def batch(self, step: int) -> Tensor:
        """(B, T) tokens of a step."""
        generator = _generator(self._options.seed, step)
        picks = torch.randint(len(self.training), (self._options.batch,), generator=generator)
        return self.rows(self.training[picks])

    def loss(
        self, model: GRULanguageModel, step: int, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """See `Data`."""
        tokens = self.batch(step)
        return model.loss(tokens), None, int((tokens != PADDING).sum())

    def held_out_loss(self, model: GRULanguageModel) -> float:
        """See `Data`."""
        return lines_loss(model, self._held_out_rows)


class Text:
    """A running text cut into B parallel streams; a step reads the next chunk of each.

    The state is carried from chunk to chunk; at the end all streams start again, from zero. The
    last N // 20 tokens (at most 100,000) are held out.

    Args:
        ids: The tokens.
        options: Batch and chunk; a short text gets fewer streams.
        device: Where chunks go.

    Raises:
        InputError: There are fewer than 40 tokens.
    """

    def __init__(
        self,
        ids: Sequence[int],
        options: TrainingOptions,
        device: torch.device | str = "cpu",
    ) -> None:
        """See the class."""
        if len(ids) < 40:
            raise InputError(f"expected at least 40 tokens to train on, got {len(ids)}")
        tokens = torch.tensor(ids, device=device)
        split = min(len(tokens) // 20, 100_000)
        self._held_out = tokens[-split:]
        kept = tokens[:-split]
        B = max(1, min(options.batch, len(kept) // (options.chunk + 1)))
        self._streams = kept[: len(kept) // B * B].reshape(B, -1)
        self._chunk = options.chunk
        self._chunks = math.ceil(self._streams.shape[1] / options.chunk)

    def batch(self, step: int) -> Tensor:
        """(B, T) tokens of a step."""
        first = (step - 1) % self._chunks * self._chunk
        return self._streams[:, first : first + self._chunk]

    def loss(
        self, model: GRULanguageModel, step: int, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """See `Data`."""
        tokens = self.batch(step)
        inputs = model.teacher_forcing(tokens)
        first = (step - 1) % self._chunks * self._chunk
        if first:
            inputs[:, 0] = self._streams[:, first - 1]
        else:
            hidden = None
        logits, hidden = model(inputs, hidden)
        loss = F.cross_entropy(logits.transpose(0, 1).flatten(0, 1), tokens.T.flatten())
        return loss, hidden.detach(), tokens.numel()

    def held_out_loss(self, model: GRULanguageModel) -> float:
        """See `Data`."""
        rows = max(1, min(_HELD_OUT_ROWS, len(self._held_out) // 100))
        return text_loss(model, self._held_out, rows)


def lines_loss(model: GRULanguageModel, rows: Sequence[Tensor]) -> float:
    """Nats per token over sequences of any lengths, each (T,) int64."""
    rows = sorted(rows, key=len)
    at_once = max(1, _LOGITS_AT_ONCE // (len(rows[-1]) * model.vocab_size))
    total = 0.0
    for first in range(0, len(rows), at_once):
        part = nn.utils.rnn.pad_sequence(
            list(rows[first : first + at_once]), batch_first=True, padding_value=PADDING
        )
        total -= model.score(part).double().sum().item()
    return total / sum(map(len, rows))


@torch.no_grad()
def text_loss(model: GRULanguageModel, ids: Tensor, rows: int = 1) -> float:
    """Nats per token of a text, read in so many parallel streams, the state carried along."""
    streams = ids[: len(ids) // rows * rows].reshape(rows, -1)
    inputs = model.teacher_forcing(streams)
    total, hidden = 0.0, None
    width = max(1, _LOGITS_AT_ONCE // (rows * model.vocab_size))
    for x, y in zip(torch.split(inputs, width, 1), torch.split(streams, width, 1), strict=True):
        output, hidden = model.run(x, hidden)
        logits = model.head(output).flatten(0, 1)
        total += F.cross_entropy(logits, y.T.flatten(), reduction="sum").item()
    return total / streams.numel()


@dataclass
class Report:
    """How a training went.

    Attributes:
        losses: The training loss of every step from the first, in nats per token.
        held_out: Pairs of step and held-out loss, step 0 included.
        tokens_per_second: Of this process, held-out losses and checkpoints not counted.
        finished: False if it was asked to stop before the last step.
    """

    losses: list[float]
    held_out: list[tuple[int, float]]
    tokens_per_second: float = 0.0
    finished: bool = False


def train(
    model: GRULanguageModel,
    data: Data,
    options: TrainingOptions,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 60.0,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, Report], None] = lambda step, report: None,
) -> Report:
    """Train until the last step, going on from the checkpoint if that file exists.

    It seeds torch's default generators at every step. The model is in eval mode afterwards, also
    after an error or an interrupt in a step.

    Args:
        model: The model, on the device of the data.
        data: `Lines` or `Text`.
        options: The options.
        checkpoint: A file to keep the state of the training in.
        save_every: Seconds between two checkpoints; 0 saves after every step. The last step, and
            the one that it stops at, are saved in any case.
        should_stop: Asked after every step.
        on_step: Told about every step.

    Returns:
        A report over all steps, those before the checkpoint included.

    Raises:
        InputError: The checkpoint is damaged or of another model, or the loss, the held-out loss or
            the gradient is not finite; the checkpoint is then that of a step before.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=options.lr)
    hidden: Tensor | None = None
    step = 0
    report = Report([], [])
    if checkpoint is not None and os.path.exists(checkpoint):
        step, hidden, report = _resume(checkpoint, model, optimiser)
    if not report.held_out:
        report.held_out.append((0, data.held_out_loss(model)))
    every = max(1, options.steps // 20)
    saved, seconds, seen = time.monotonic(), 0.0, 0
    stopped = False
    model.train()
    try:
        while step < options.steps and not stopped:
            step += 1
            began = time.perf_counter()
            torch.manual_seed(_seed(options.seed, step))
            for group in optimiser.param_groups:
                group["lr"] = options.lr * (1 + math.cos(math.pi * (step - 1) / options.steps)) / 2
            loss, hidden, tokens = data.loss(model, step, hidden)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            report.losses.append(loss.item())
            _check_finite("loss", report.losses[-1], step, options)
            _check_finite("gradient's norm", norm.item(), step, options)
            optimiser.step()
            seconds += time.perf_counter() - began
            seen += tokens
            report.tokens_per_second = seen / seconds
            report.finished = step == options.steps
            if step % every == 0 or report.finished:
                report.held_out.append((step, data.held_out_loss(model)))
                _check_finite("held-out loss", report.held_out[-1][1], step, options)
            stopped = should_stop()
            due = time.monotonic() - saved >= save_every or report.finished or stopped
            if checkpoint is not None and due:
                _save(checkpoint, model, optimiser, step, hidden, report)
                saved = time.monotonic()
            on_step(step, report)
    finally:
        model.eval()
    report.finished = step >= options.steps
    return report


def _check_finite(name: str, value: float, step: int, options: TrainingOptions) -> None:
    if not math.isfinite(value):
        raise InputError(
            f"the {name} is {value} at step {step}; use a learning rate below {options.lr}"
        )


def _seed(seed: int, step: int) -> int:
    return int(philox(seed, torch.tensor(step), torch.tensor(0)))


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, step))


_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _save(
    path: str | os.PathLike[str],
    model: GRULanguageModel,
    optimiser: torch.optim.Optimizer,
    step: int,
    hidden: Tensor | None,
    report: Report,
) -> None:
    tensors = model_tensors(model)
    for name, parameter in model.named_parameters():
        for moment in _MOMENTS:
            tensors[f"optimiser.{moment}.{name}"] = optimiser.state[parameter][moment]
    if hidden is not None:
        tensors["hidden"] = hidden
    tensors["losses"] = torch.tensor(report.losses, dtype=torch.float64)
    tensors["held_out"] = torch.tensor(report.held_out, dtype=torch.float64)
    save_checkpoint(path, tensors, {"step": step})


def _resume(
    path: str | os.PathLike[str], model: GRULanguageModel, optimiser: torch.optim.Optimizer
) -> tuple[int, Tensor | None, Report]:
    tensors, meta = load_checkpoint(path)
    device = a_weight(model).device
    try:
        load_model(model, tensors)
        state = {
            i: {moment: tensors[f"optimiser.{moment}.{name}"] for moment in _MOMENTS}
            for i, (name, _) in enumerate(model.named_parameters())
        }
        for moments, parameter in zip(state.values(), model.parameters(), strict=True):
            shapes = [moments[moment].shape for moment in _MOMENTS]
            if shapes != [parameter.shape, parameter.shape, ()]:  # the optimiser takes any
                raise ValueError("moments of other shapes")
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": state, "param_groups": groups})
        hidden = tensors.get("hidden")
        held_out = [(int(at), loss) for at, loss in tensors["held_out"].tolist()]
        report = Report(tensors["losses"].tolist(), held_out)
        if tensors["losses"].shape != (meta["step"],):
            raise ValueError("not the losses of these steps")
    except (ValueError, KeyError, TypeError, RuntimeError):
        raise InputError(
            f"{os.fspath(path)} does not fit this model; choose another folder"
        ) from None
    return meta["step"], None if hidden is None else hidden.to(device), report
