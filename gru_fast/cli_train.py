# SPDX-License-Identifier: Apache-2.0
"""`gru-fast train`: a model of a corpus, in a folder of its own."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from tqdm import tqdm

from gru_fast import checkpoint, corpus
from gru_fast.beside_torch import compare_training
from gru_fast.commands import SEED, Count, Finite, beside_option, say
from gru_fast.errors import InputError
from gru_fast.language_model import GRULanguageModel
from gru_fast.recurrent import CANDIDATES, DEFAULT_CELL
from gru_fast.tokenizers import CharacterTokenizer, Tokenizer, WordTokenizer
from gru_fast.training import Lines, Report, Text, TrainingOptions, train

__all__ = ["train_command"]


@click.command("train")
@click.argument("source", metavar="[CORPUS]", required=False)
@click.option("--lines", is_flag=True, help="One sequence a line.")
@click.option("--text", is_flag=True, help="Running text.")
@click.option("--words", is_flag=True, help="Tokens are words between white space.")
@click.option("--max-words", type=Count(1), help="Keep the most frequent words only.")
@click.option("--cell", type=click.Choice(list(CANDIDATES)), default=DEFAULT_CELL)
@click.option("--hidden", type=Count(1), default=256, help="Units of a layer.")
@click.option("--layers", type=Count(1), default=1)
@click.option("--embedding", type=Count(1), help="Size; without it inputs are one-hot.")
@click.option("--tie", is_flag=True, help="The head uses the embedding's weights.")
@click.option("--dropout", type=Finite(0, 1), default=0.0)
@click.option("--batch", type=Count(1), help="Sequences a step.  [default: 128, text: 32]")
@click.option("--chunk", type=Count(1), default=128, help="Steps a chunk of a running text.")
@click.option("--max-length", type=Count(1), default=256, help="Lines are cut there.")
@click.option("--steps", type=Count(1), default=800, help="Updates of the weights in all.")
@click.option("--lr", type=Finite(0, 1e30, min_open=True), default=4e-3)
@click.option("--clip", type=Finite(0, min_open=True), default=1.0)
@click.option("--seed", type=SEED, default=0)
@click.option("--device", default="cpu")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on with the run in that folder, as it was begun.")
@click.option("--save-every", type=Finite(0), default=60.0, help="Seconds.")
@beside_option
@click.pass_context
def train_command(context: click.Context, /, **options: Any) -> None:
    """Train a model on CORPUS: a UTF-8 file, builtin:names or builtin:python.

    --resume --out RUN goes on with a run that was stopped; what is not given is taken from the
    run. With another number of --steps, a run that has ended goes on too: from there the learning
    rate is that of the longer training. With another --device, the run goes on there.
    """
    kinds = [kind for kind in ("lines", "text") if options.pop(kind)]
    if len(kinds) == 2:
        raise click.UsageError("--lines, --text: expected one of them, got both", context)
    mode = kinds[0] if kinds else None
    parameters = {parameter.name: parameter for parameter in context.command.params}
    given = {
        name
        for name in parameters
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if options["resume"]:
        before = _options_of(options["out"])
        mode = mode or before.pop("mode")
        for name, value in before.items():
            if name in parameters and name not in given:
                options[name] = parameters[name].process_value(context, value)
    elif options["source"] is None:
        raise click.MissingParameter(ctx=context, param_type="argument", param_hint="'CORPUS'")
    mode = mode or _mode_of(options["source"])
    name, needed = ("chunk", "text") if mode == "lines" else ("max_length", "lines")
    if name in given:
        flag = parameters[name].opts[0]
        raise click.UsageError(f"{flag} is for --{needed} only, and this is --{mode}", context)
    _train_on(mode=mode, **options)


def _mode_of(source: str) -> str:
    """What a corpus is where neither --lines nor --text is given."""
    known = {"builtin:names": "lines", "builtin:python": "text"}
    if source.startswith("builtin:") and source not in known:
        corpus.read_text(source)  # says which there are
    if source not in known:
        raise InputError(f"{source}: say --lines (one sequence a line) or --text (running)")
    return known[source]


# Where config.json has the options that make a run what it is.
_STORED = {
    "source": ("corpus", "source"),
    "mode": ("corpus", "mode"),
    "max_words": ("tokens", "max_words"),
    "cell": ("model", "cell"),
    "hidden": ("model", "hidden_size"),
    "layers": ("model", "num_layers"),
    "embedding": ("model", "embedding_size"),
    "tie": ("model", "tie_weights"),
    "dropout": ("model", "dropout"),
    **{field.name: ("training", field.name) for field in dataclasses.fields(TrainingOptions)},
}


def _options_of(out: Path) -> dict[str, Any]:
    """The options of `train` that the run in a folder was begun with."""
    config = checkpoint.load_config(out)
    options = {name: config[part][key] for name, (part, key) in _STORED.items()}
    options["words"] = config["tokens"]["kind"] == WordTokenizer.kind
    if "device" in config["training"]:  # not in runs of before
        options["device"] = config["training"]["device"]
    return options


def _train_on(
    source: str,
    mode: str,
    words: bool,
    max_words: int | None,
    cell: str,
    hidden: int,
    layers: int,
    embedding: int | None,
    tie: bool,
    dropout: float,
    batch: int | None,
    device: str,
    out: Path,
    resume: bool,
    save_every: float,
    beside_torch: bool,
    **training: Any,
) -> None:
    if tie and embedding != hidden:
        given = "none" if embedding is None else embedding
        raise InputError(f"--tie: expected --embedding {hidden}, the size of --hidden, got {given}")
    text = corpus.read_text(source)
    _check_device(device)
    options = TrainingOptions(batch=batch or (128 if mode == "lines" else 32), **training)
    tokenizer = _tokenizer(text, mode, words, max_words)
    model_config: dict[str, Any] = {
        "vocab_size": len(tokenizer), "embedding_size": embedding, "hidden_size": hidden,
        "num_layers": layers, "cell": cell, "dropout": dropout, "tie_weights": tie,
    }  # fmt: skip
    torch.manual_seed(options.seed)
    try:
        model = GRULanguageModel(**model_config, device=device)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(str(error).split("\n")[0]) from None
    data = _data(text, mode, tokenizer, options, device)
    config = {
        "model": model_config,
        "corpus": {"source": source, "mode": mode, "sha256": corpus.digest(text)},
        "tokens": {"kind": tokenizer.kind, "max_words": max_words},
        "training": {**dataclasses.asdict(options), "device": device},
    }
    done = 0
    with checkpoint.claimed(out) as alone:
        if resume:
            done, status = checkpoint.reopen_run(out, config, tokenizer)
            say(status)
        else:
            checkpoint.create_run(out, config, tokenizer, alone)
        report = _fit(model, data, options, out, save_every, done)
    first, last = report.held_out[0][1], report.held_out[-1][1]
    speed = report.tokens_per_second  # 0 where no step was left
    say(
        f"held-out loss {first:.3f} -> {last:.3f} nats per {tokenizer.kind}"
        + f", {speed:,.0f} tokens/s" * bool(speed)
    )
    if not report.finished:
        say(f"stopped after step {len(report.losses)}; gru-fast train --out {out} --resume goes on")
        sys.exit(130)
    if beside_torch:
        say(compare_training(model.train(), data.batch(1)))


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise InputError(f"--device {device}: {reason}") from None


def _tokenizer(text: str, mode: str, words: bool, max_words: int | None) -> Tokenizer:
    if words or max_words:
        return WordTokenizer.from_text(text, max_words)
    if mode == "lines":
        text = "".join(corpus.split_lines(text))
    return CharacterTokenizer.from_text(text)


def _data(
    text: str, mode: str, tokenizer: Tokenizer, options: TrainingOptions, device: str
) -> Lines | Text:
    if mode == "text":
        ids = tokenizer.encode(text)
        say(f"{len(ids):,} {tokenizer.kind}s, vocabulary {len(tokenizer)}")
        return Text(ids, options, device)
    rows = [tokenizer.encode(line) for line in corpus.split_lines(text)]
    data = Lines(rows, options, device)
    cut = sum(len(row) >= options.max_length for row in rows)
    say(
        f"{len(rows):,} different lines, {len(data.held_out):,} of them held out, vocabulary "
        f"{len(tokenizer)}"
        + (f", {cut:,} cut at {options.max_length} {tokenizer.kind}s" * bool(cut))
    )
    return data


def _fit(
    model: GRULanguageModel,
    data: Lines | Text,
    options: TrainingOptions,
    out: Path,
    every: float,
    done: int,
) -> Report:
    with (
        _stop_on_interrupt() as should_stop,
        tqdm(
            total=options.steps, initial=done, unit="step", mininterval=0.5,
            disable=sys.stderr is None,  # where that is closed
        ) as bar,
    ):  # fmt: skip

        def on_step(step: int, report: Report) -> None:
            recent = report.losses[-20:]
            bar.set_postfix_str(
                f"loss {sum(recent) / len(recent):.3f}, held out {report.held_out[-1][1]:.3f}, "
                f"{report.tokens_per_second:,.0f} tokens/s",
                refresh=False,
            )
            bar.update(step - bar.n)

        return train(
            model, data, options, checkpoint=out / checkpoint.CHECKPOINT, save_every=every,
            should_stop=should_stop, on_step=on_step,
        )  # fmt: skip


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C lets the step end and be saved; the second one interrupts."""
    stop = threading.Event()

    def handler(signum: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)
