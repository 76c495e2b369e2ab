# SPDX-License-Identifier: Apache-2.0
"""Training on lines and on running text: what is fed, what is held out, and taking it up again."""

import itertools
import os

import pytest
import torch
from safetensors.torch import load_file

from gru_fast import GRULanguageModel, checkpoint, training
from gru_fast.checkpoint import load_checkpoint, save_checkpoint
from gru_fast.errors import InputError
from gru_fast.files import write_atomically
from gru_fast.sampling import PADDING
from gru_fast.tokenizers import EOS
from gru_fast.training import Lines, Text, TrainingOptions, lines_loss, text_loss, train

SEQUENCES = [[1 + (a + b) % 5 for b in range(a % 4 + 1)] for a in range(60)]
TEXT = [1 + (i * i) % 5 for i in range(1000)]


def lm(**options):
    torch.manual_seed(1)
    return GRULanguageModel(6, None, 9, 2, **options)


def test_rows_of_lines():
    data = Lines(SEQUENCES, TrainingOptions(batch=7, max_length=4))
    rows = data.rows(torch.tensor([1, 3, 0]))
    assert rows.tolist() == [
        [*SEQUENCES[1], EOS, PADDING],
        SEQUENCES[3],
        [*SEQUENCES[0], EOS, PADDING, PADDING],
    ]
    assert sorted([*data.training.tolist(), *data.held_out.tolist()]) == list(range(60))
    assert len(data.held_out) == 3
    torch.manual_seed(1)
    again = Lines(SEQUENCES, TrainingOptions(batch=7, max_length=4))
    assert torch.equal(again.held_out, data.held_out)
    assert data.batch(1).shape[0] == 7
    assert torch.equal(data.batch(1), data.batch(1))
    assert data.batch(1).shape != data.batch(2).shape or not data.batch(1).equal(data.batch(2))
    allowed = {tuple(([*SEQUENCES[i], EOS])[:4]) for i in data.training.tolist()}
    drawn = {tuple(t for t in row if t != PADDING) for s in range(1, 30) for row in
             data.batch(s).tolist()}  # fmt: skip
    assert drawn <= allowed and len(drawn) > 0.8 * len(allowed)


def test_mean_loss_of_lines_is_that_of_the_model():
    data, model = Lines(SEQUENCES, TrainingOptions()), lm()
    loss = model.loss(data.rows(data.held_out)).item()
    assert data.held_out_loss(model) == pytest.approx(loss, rel=1e-6)


def test_lines_are_scored_in_parts(monkeypatch):
    model, rows = lm(), [torch.tensor(s) for s in SEQUENCES]
    expected = -sum(model.score(s).sum().item() for s in SEQUENCES) / sum(map(len, SEQUENCES))
    for at_once in (1, 100, 1 << 20):
        monkeypatch.setattr(training, "_LOGITS_AT_ONCE", at_once)
        assert lines_loss(model, rows) == pytest.approx(expected, rel=1e-5)


def test_text_chunks_carry_the_state():
    options = TrainingOptions(batch=2, chunk=30)
    data, model = Text(TEXT, options), lm()
    streams = torch.tensor(TEXT[:950]).reshape(2, 475)
    logits, _ = model(model.teacher_forcing(streams))
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), streams.flatten(), reduction="none"
    ).reshape(2, 475)
    hidden = torch.full((2, 2, 9), torch.nan)  # that of a pass that is over
    for step in range(1, 17):
        loss, hidden, tokens = data.loss(model, step, hidden)
        part = expected[:, (step - 1) * 30 : step * 30]
        assert tokens == part.numel() and not hidden.requires_grad
        torch.testing.assert_close(loss, part.mean())
    torch.testing.assert_close(data.loss(model, 17, hidden)[0], expected[:, :30].mean())


def test_text_loss_reads_on(monkeypatch):
    model = lm()
    whole = text_loss(model, torch.tensor(TEXT))
    expected = -model.score(TEXT).mean().item()
    assert whole == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(training, "_LOGITS_AT_ONCE", 384)
    assert text_loss(model, torch.tensor(TEXT)) == pytest.approx(expected, rel=1e-5)
    held_out = torch.tensor(TEXT[950:])
    data = Text(TEXT, TrainingOptions(batch=4, chunk=16))
    assert data.held_out_loss(model) == pytest.approx(text_loss(model, held_out), rel=1e-6)
    held_out = torch.tensor(TEXT).repeat(34)[-1700:]
    one, many = (text_loss(model, held_out, rows) for rows in (1, 16))
    found = Text(TEXT * 34, TrainingOptions()).held_out_loss(model)
    assert found == pytest.approx(many, rel=1e-6) and abs(one - many) > 1e-5


@pytest.mark.parametrize("kind", ["lines", "text"])
def test_an_interrupted_training_has_the_same_bits(kind, tmp_path):
    options = TrainingOptions(steps=23, batch=8, chunk=16, lr=0.02, seed=4)
    data = Lines(SEQUENCES, options) if kind == "lines" else Text(TEXT, options)
    model = lm(dropout=0.3)
    report = train(model, data, options, checkpoint=tmp_path / "whole", save_every=1e9)
    assert report.finished and not model.training
    assert len(report.losses) == 23 and report.losses[-1] < 0.95 * report.losses[0]
    assert [step for step, _ in report.held_out] == list(range(24))
    assert report.held_out[-1][1] < report.held_out[0][1]
    again = lm(dropout=0.3)
    for stop in (5, 6, 17, 99):
        torch.manual_seed(stop)
        steps = []
        again = train_until(stop, again, data, options, tmp_path / "parts", steps)
        assert steps[-1] == min(stop, 23)
        again = lm(dropout=0.3)
        with torch.no_grad():
            again.head.weight.add_(1)
    whole, parts = load_file(tmp_path / "whole"), load_file(tmp_path / "parts")
    assert whole.keys() == parts.keys() and ("hidden" in whole) == (kind == "text")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole["losses"].tolist() == report.losses


def train_until(stop, model, data, options, path, steps):
    train(
        model, data, options, checkpoint=path, save_every=1e9,
        on_step=lambda step, report: steps.append(step),
        should_stop=lambda: len(load_steps(path)) + len(steps) + 1 >= stop,
    )  # fmt: skip
    return model


def load_steps(path):
    return load_checkpoint(path)[0]["losses"] if path.exists() else []


def test_a_step_repeats_whatever_the_generator_was(tmp_path):
    options = TrainingOptions(steps=3, batch=4)
    data = Lines(SEQUENCES, options)
    losses = []
    for noise in (0, 1):
        model = lm(dropout=0.5)
        torch.manual_seed(noise)
        losses.append(train(model, data, options).losses)
    assert losses[0] == losses[1]
    other = TrainingOptions(steps=3, batch=4, seed=1)
    assert train(lm(dropout=0.5), Lines(SEQUENCES, other), other).losses != losses[0]


def test_learning_rate_falls_along_half_a_cosine(monkeypatch):
    rates = []
    original = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]),
                                                original(self)),
    )  # fmt: skip
    options = TrainingOptions(steps=4, batch=2, lr=0.01)
    train(lm(), Lines(SEQUENCES, options), options)
    assert rates == pytest.approx([0.01, 0.01 * (2 + 2**0.5) / 4, 0.005, 0.01 * (2 - 2**0.5) / 4])


def test_gradients_are_clipped(monkeypatch):
    norms = []
    original = torch.optim.Adam.step

    def step(optimiser):
        gradients = [p.grad.flatten() for p in optimiser.param_groups[0]["params"]]
        norms.append(torch.cat(gradients).norm().item())
        original(optimiser)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    for clip in (1e-3, 1e3):
        options = TrainingOptions(steps=2, batch=4, clip=clip)
        train(lm(), Lines(SEQUENCES, options), options)
    assert norms[:2] == pytest.approx([1e-3] * 2, rel=1e-2) and min(norms[2:]) > 1e-2


def test_speed_is_tokens_over_seconds(monkeypatch):
    """By a clock that counts its readings, each of three steps takes a second."""
    monkeypatch.setattr(training.time, "perf_counter", itertools.count().__next__)
    options = TrainingOptions(steps=3, batch=4, chunk=16)
    assert train(lm(), Text(TEXT, options), options).tokens_per_second == 4 * 16


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(InputError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_no_pickle_is_read(tmp_path):
    class Boom:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = tmp_path / "checkpoint.safetensors"
    torch.save({"step": Boom()}, path)
    with pytest.raises(InputError, match="damaged, or no checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_checkpoints_of_other_models_are_refused(tmp_path):
    path = tmp_path / "c"
    options = TrainingOptions(steps=2, batch=2)
    data = Lines(SEQUENCES, options)
    train(lm(), data, options, checkpoint=path)
    with pytest.raises(InputError, match="does not fit this model"):
        train(lm(cell="no_reset"), data, options, checkpoint=path)
    tensors, meta = load_checkpoint(path)
    save_checkpoint(path, tensors, {**meta, "step": 1})
    with pytest.raises(InputError, match="does not fit this model"):
        train(lm(), data, options, checkpoint=path)
    save_checkpoint(path, tensors, {**meta, "format": 7})
    with pytest.raises(InputError, match="expected format 1, got 7"):
        load_checkpoint(path)
    with pytest.raises(InputError, match="No such file"):
        load_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("tie", [False, True])
def test_weights_come_back_where_a_head_could_be_taken_for_the_embedding(tie):
    saved, loaded = (GRULanguageModel(5, 4, 4, tie_weights=tie) for _ in range(2))
    checkpoint.load_model(loaded, checkpoint.model_tensors(saved))
    theirs = saved.state_dict()
    for name, ours in loaded.state_dict().items():
        assert torch.equal(ours, theirs[name]), name


def test_too_little_data():
    with pytest.raises(InputError, match="at least 2 different lines to train on, got 1"):
        Lines([[1]], TrainingOptions())
    two = Lines([[1], [2]], TrainingOptions())
    assert sorted([*two.held_out.tolist(), *two.training.tolist()]) == [0, 1]
    with pytest.raises(InputError, match="at least 40 tokens to train on, got 39"):
        Text([1] * 39, TrainingOptions())
    options = TrainingOptions(steps=3, batch=50, chunk=16)
    assert train(lm(), Text([1, 2] * 20, options), options).finished


def test_a_loss_that_is_not_finite_stops_it():
    model = lm()
    with torch.no_grad():
        model.head.bias.fill_(torch.inf)
    options = TrainingOptions(steps=3, batch=2)

    class Data:
        held_out = 0.0

        def loss(self, model, step, hidden):
            return model.head.bias.sum(), None, 1

        def held_out_loss(self, model):
            return self.held_out

    with pytest.raises(InputError, match="the loss is inf at step 1; use a learning rate below"):
        train(model, Data(), options)
    assert not model.training
    with torch.no_grad():
        model.head.bias.zero_()
    Data.held_out = float("nan")
    options = TrainingOptions(steps=1, batch=2)
    with pytest.raises(InputError, match="the held-out loss is nan at step 1; use a learning rate"):
        train(model, Data(), options)
