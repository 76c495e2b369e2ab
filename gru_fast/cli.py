# SPDX-License-Identifier: Apache-2.0
"""The command line `gru-fast`: results on stdout, everything else on stderr.

A mistake of the user is one line and exit code 2; an interrupted command is exit code 130.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from tqdm import tqdm

from gru_fast import backends, checkpoint, corpus, ops
from gru_fast._version import __version__
from gru_fast.beside_torch import compare_sampling, compare_training
from gru_fast.checkpoint import Run, load_run
from gru_fast.commands import Commands, Count, Finite
from gru_fast.errors import InputError
from gru_fast.gru import GRU
from gru_fast.language_model import GRULanguageModel
from gru_fast.recurrent import CANDIDATES, DEFAULT_CELL
from gru_fast.reference_sampling import seed_from_generator
from gru_fast.tokenizers import EOS, CharacterTokenizer, Tokenizer, WordTokenizer
from gru_fast.trace import plot_gates, trace
from gru_fast.training import Lines, Report, Text, TrainingOptions, lines_loss, text_loss, train

__all__ = ["cli"]

_NOVELTY_ROWS = 1000

_SEED = click.IntRange(-(2**63), 2**64 - 1)  # what torch.manual_seed takes


@click.group(cls=Commands, context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(__version__)
@click.option("--threads", type=Count(1), help="Threads of PyTorch.")
def cli(threads: int | None) -> None:
    """Train a GRU language model, sample from it, look inside."""
    if threads:
        torch.set_num_threads(threads)


def _say(text: str) -> None:
    click.echo(text, err=True)


@contextmanager
def _refusing_values() -> Iterator[None]:
    """Make an `InputError` of what the draw says about options, or logits, that it cannot use."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


_run_argument = click.argument("run", type=click.Path())
_beside_option = click.option(
    "--beside-torch", is_flag=True, help="Then time the same network on torch.nn.GRU: one line."
)


@cli.command("train")
@click.argument("source", metavar="[CORPUS]", required=False)
@click.option("--lines", "mode", flag_value="lines", default=None, help="One sequence a line.")
@click.option("--text", "mode", flag_value="text", help="Running text.")
@click.option("--words", is_flag=True, help="Tokens are words between white space.")
@click.option("--max-words", type=Count(1), help="Keep the most frequent words only.")
@click.option("--cell", type=click.Choice(list(CANDIDATES)), default=DEFAULT_CELL)
@click.option("--hidden", type=Count(1), default=256, help="Units of a layer.")
@click.option("--layers", type=Count(1), default=1)
@click.option("--embedding", type=Count(1), help="Size; without it inputs are one-hot.")
@click.option("--tie", is_flag=True, help="The head uses the embedding's weights.")
@click.option("--dropout", type=Finite(0, 1), default=0.0)
@click.option("--batch", type=Count(1), help="Sequences a step.  [default: 128, text: 32]")
@click.option("--chunk", type=Count(1), default=128, help="Steps a chunk of --text.")
@click.option("--max-length", type=Count(1), default=256, help="Lines are cut there.")
@click.option("--steps", type=Count(1), default=800, help="Updates of the weights in all.")
@click.option("--lr", type=Finite(0, 1e30, min_open=True), default=4e-3)
@click.option("--clip", type=Finite(0, min_open=True), default=1.0)
@click.option("--seed", type=_SEED, default=0)
@click.option("--device", default="cpu")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on with the run in that folder, as it was begun.")
@click.option("--save-every", type=Finite(0), default=60.0, help="Seconds.")
@_beside_option
@click.pass_context
def _train(context: click.Context, /, **options: Any) -> None:
    """Train a model on CORPUS: a UTF-8 file, builtin:names or builtin:python.

    --resume --out RUN goes on with a run that was stopped; what is not given is taken from the
    run. With another number of --steps, a run that has ended goes on too: from there the learning
    rate is that of the longer training. With another --device, the run goes on there.
    """
    if options["resume"]:
        parameters = {parameter.name: parameter for parameter in context.command.params}
        for name, value in _options_of(options["out"]).items():
            if context.get_parameter_source(name) is ParameterSource.DEFAULT:
                options[name] = parameters[name].process_value(context, value)
    elif options["source"] is None:
        raise click.MissingParameter(ctx=context, param_type="argument", param_hint="'CORPUS'")
    _train_on(**options)


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
_MAY_BE_NONE = {"max_words", "embedding"}


def _options_of(out: Path) -> dict[str, Any]:
    """The options of `train` that the run in a folder was begun with."""
    config = checkpoint.load_config(out)
    try:
        options = {name: config[part][key] for name, (part, key) in _STORED.items()}
        options["words"] = config["tokens"]["kind"] == WordTokenizer.kind
        if "device" in config["training"]:  # not in runs of before
            options["device"] = config["training"]["device"]
        if None in (value for name, value in options.items() if name not in _MAY_BE_NONE):
            raise TypeError("null in place of a value")
    except (KeyError, TypeError):
        raise InputError(f"{out / checkpoint.CONFIG} is damaged; restore it") from None
    return options


def _train_on(
    source: str,
    mode: str | None,
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
    if mode is None:
        mode = {"builtin:names": "lines", "builtin:python": "text"}.get(source)
        if mode is None and source.startswith("builtin:"):
            corpus.read_text(source)  # says which there are
        if mode is None:
            raise InputError(f"{source}: say --lines (one sequence a line) or --text (running)")
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
    if not resume:
        checkpoint.create_run(out, config, tokenizer)
    done = 0
    with checkpoint.claimed(out):
        if resume:
            done, status = checkpoint.reopen_run(out, config)
            _say(status)
        report = _fit(model, data, options, out, save_every, done)
    first, last = report.held_out[0][1], report.held_out[-1][1]
    speed = report.tokens_per_second  # 0 where no step was left
    _say(
        f"held-out loss {first:.3f} -> {last:.3f} nats per {tokenizer.kind}"
        + f", {speed:,.0f} tokens/s" * bool(speed)
    )
    if not report.finished:
        _say(
            f"stopped after step {len(report.losses)}; gru-fast train --out {out} --resume goes on"
        )
        sys.exit(130)
    if beside_torch:
        _say(compare_training(model.train(), data.batch(1)))


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
        _say(f"{len(ids):,} {tokenizer.kind}s, vocabulary {len(tokenizer)}")
        return Text(ids, options, device)
    rows = [tokenizer.encode(line) for line in corpus.split_lines(text)]
    data = Lines(rows, options, device)
    cut = sum(len(row) >= options.max_length for row in rows)
    _say(
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


@cli.command("sample")
@_run_argument
@click.option("--num", type=click.IntRange(1), default=1, help="Sequences to print.")
@click.option("--prompt", default="", help="Text that each begins with.")
@click.option("--length", type=click.IntRange(1), help="Tokens at most.  [default: 100, text: 500]")
@click.option("--temperature", type=Finite(0, min_open=True), default=1.0)
@click.option("--top-k", type=click.IntRange(1))
@click.option("--top-p", type=Finite(0, 1, min_open=True))
@click.option("--min-p", type=Finite(0, 1))
@click.option("--greedy", is_flag=True, help="Take the likeliest token instead of a draw.")
@click.option("--seed", type=_SEED, help="The same seed gives the same text.")
@click.option("--novel", is_flag=True, help="Print only whole lines that are not in the corpus.")
@_beside_option
def _sample(
    run: str,
    num: int,
    prompt: str,
    length: int | None,
    greedy: bool,
    novel: bool,
    beside_torch: bool,
    **options: Any,
) -> None:
    """Print sequences that the model of RUN makes up.

    With --novel they are the first of those of the same --seed that end within --length and are
    no line of the corpus; at most 16,000 sequences, or 16 times --num, are drawn to find them.
    """
    loaded = load_run(run)
    known = _known_lines(loaded, required=novel)
    eos = EOS if loaded.has_eos else None
    length = length or (100 if loaded.has_eos else 500)
    prompt_ids = loaded.tokenizer.encode(prompt)
    if options["seed"] is None:
        options["seed"] = seed_from_generator()
    first = max(num, _NOVELTY_ROWS) if novel else num
    # A row depends on the seed and its number only: the rows of before come again.
    for rows in (first, 4 * first, 16 * first):
        texts, whole = _drawn_texts(
            loaded, prompt_ids, max_new_tokens=length, num_return_sequences=rows,
            do_sample=not greedy, eos_token_id=eos, **options,
        )  # fmt: skip
        new = [text for text in whole if text.strip() and text.strip() not in known]
        if not novel or len(new) >= num:
            break
    for text in (new if novel else texts)[:num]:
        click.echo(text)
    if known:
        source, cut = loaded.config["corpus"]["source"], rows - len(whole)
        _say(
            f"{len(new) / rows:.0%} of {rows:,} sampled lines are not in {source}"
            + f"; {cut:,} were cut at {length} {loaded.tokenizer.kind}s" * bool(cut)
        )
    if novel and len(new) < num:
        _say(f"only {len(new):,} of {num:,} novel lines were found")
    if beside_torch:
        for count in (64, 1):
            _say(compare_sampling(loaded.model, count, length, eos))


def _drawn_texts(run: Run, prompt: list[int], **options: Any) -> tuple[list[str], list[str]]:
    """What `generate` draws as texts, and those of them that end with EOS."""
    with _refusing_values():
        sequences = run.model.generate([prompt], **options)
    # A running text has no end: EOS, which no training has seen, stands for nothing there.
    rows = sequences.tolist() if run.has_eos else [row[row != EOS].tolist() for row in sequences]
    texts = [run.tokenizer.decode(row) for row in rows]
    return texts, [text for text, row in zip(texts, rows, strict=True) if EOS in row]


def _known_lines(run: Run, required: bool) -> set[str]:
    """The lines of the run's corpus as the model spells them; empty where they cannot be had."""
    source = run.config["corpus"]["source"]
    problem = "is a running text" if not run.has_eos else ""
    text = ""
    if not problem and source not in corpus.BUILTIN and not os.path.isfile(source):
        problem = "cannot be read any more"  # least of all a pipe: it would wait for another text
    if not problem:
        try:
            text = corpus.read_text(source)
        except InputError:
            problem = "cannot be read any more"
        else:
            if corpus.digest(text) != run.config["corpus"]["sha256"]:
                problem = "has changed since the training"
    if problem:
        if required:
            raise InputError(f"--novel: {source} {problem}; leave --novel out")
        return set()
    lines = corpus.split_lines(text)
    if run.tokenizer.kind == "character":
        return set(lines)
    return {run.tokenizer.decode(run.tokenizer.encode(line)) for line in lines}


@cli.command("score")
@_run_argument
@click.argument("file")
def _score(run: str, file: str) -> None:
    """Print how well the model of RUN predicts FILE: nats per token, perplexity."""
    loaded = load_run(run)
    text = corpus.read_text(file)
    if loaded.has_eos:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        rows = [torch.tensor([*loaded.tokenizer.encode(line), EOS]) for line in lines]
        nats, count = lines_loss(loaded.model, rows), sum(map(len, rows))
    else:
        ids = torch.tensor(loaded.tokenizer.encode(text))
        nats, count = text_loss(loaded.model, ids), len(ids)
    perplexity = math.exp(min(nats, 700))
    click.echo(
        f"{nats:.4f} nats per {loaded.tokenizer.kind}, perplexity {perplexity:.4g}, "
        f"{count:,} {loaded.tokenizer.kind}s"
    )


@cli.command("trace")
@_run_argument
@click.argument("text")
@click.option("--temperature", type=Finite(0, min_open=True), default=1.0)
@click.option("--seed", type=_SEED, default=0)
def _trace(run: str, text: str, temperature: float, seed: int) -> None:
    """Show what is fed and predicted: TEXT under teacher forcing, beside a sample."""
    loaded = load_run(run)
    with _refusing_values():
        shown = trace(
            loaded.model, loaded.tokenizer, text, has_eos=loaded.has_eos, temperature=temperature,
            seed=seed,
        )  # fmt: skip
    click.echo(shown)


@cli.command("gates")
@_run_argument
@click.argument("text")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Image to write.")
def _gates(run: str, text: str, out: Path) -> None:
    """Draw the gates of the model of RUN while TEXT is fed."""
    loaded = load_run(run)
    try:
        plot_gates(loaded.model, loaded.tokenizer, text).savefig(out, dpi=120)
    except ModuleNotFoundError as error:
        raise InputError(f"gates needs {error.name}: pip install 'gru_fast[plot]'") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{out}: {error}; expected a path of an image, such as x.png") from None
    _say(f"wrote {out}")


@cli.command("doctor")
def _doctor() -> None:
    """Show what this installation can do, and test it for a second."""
    click.echo(
        f"gru_fast {__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    isa = "none"
    if ops.HAS_CPU_KERNELS:
        from gru_fast import _C

        isa = _C.cpu_isa()
    click.echo(f"compiled CPU kernels: {isa}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = backends.why_not(device, torch.float32)
    for name in backends.NAMES[1:]:
        click.echo(f"backend {name} on {device}: {reasons.get(name, 'available')}")
    error, ratio = _self_test()
    click.echo(
        f"self-test: largest difference from torch.nn.GRU {error:.1e}, speed-up {ratio:.1f}x"
    )
    if not error < 1e-5:
        raise InputError("the self-test failed: the numbers differ; install gru_fast again")


def _self_test() -> tuple[float, float]:
    """Largest difference from nn.GRU in outputs and gradients, and the ratio of speeds."""
    theirs, ours = torch.nn.GRU(32, 128), GRU(32, 128)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(50, 8, 32)
    results, seconds = [], []
    for module in (theirs, ours):
        times: list[float] = []
        end = time.perf_counter() + 0.4
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            module.zero_grad()
            output, _ = module(x)
            output.square().mean().backward()
            times.append(time.perf_counter() - start)
        results.append([output.detach(), *(p.grad for p in module.parameters())])
        seconds.append(sorted(times)[len(times) // 2])
    error = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
    return error, seconds[0] / seconds[1]
