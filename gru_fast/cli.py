# SPDX-License-Identifier: Apache-2.0
"""The command line `gru-fast`: results on stdout, everything else on stderr.

A mistake of the user is one line and exit code 2; an interrupted command is exit code 130.
"""

from __future__ import annotations

import math
import platform
import time
from pathlib import Path

import click
import torch

from gru_fast import backends, corpus, ops
from gru_fast._version import __version__
from gru_fast.checkpoint import load_run
from gru_fast.cli_sample import sample_command
from gru_fast.cli_train import train_command
from gru_fast.commands import SEED, Commands, Count, Finite, refusing_values, run_argument, say
from gru_fast.errors import InputError
from gru_fast.gru import GRU
from gru_fast.tokenizers import EOS
from gru_fast.trace import image_formats, plot_gates, trace
from gru_fast.training import lines_loss, text_loss

__all__ = ["cli"]

# `trace` has no --greedy.
_TRACE_FLAGS = {
    "temperature:": "--temperature:",
    " (do_sample=False takes the most likely token)": "",
}


@click.group(cls=Commands, context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(__version__)
@click.option("--threads", type=Count(1), help="Threads of PyTorch.")
def cli(threads: int | None) -> None:
    """Train a GRU language model, sample from it, look inside."""
    if threads:
        torch.set_num_threads(threads)


cli.add_command(train_command)
cli.add_command(sample_command)


@cli.command("score")
@run_argument
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
@run_argument
@click.argument("text")
@click.option("--temperature", type=Finite(0, min_open=True), default=1.0)
@click.option("--seed", type=SEED, default=0)
def _trace(run: str, text: str, temperature: float, seed: int) -> None:
    """Show what is fed and predicted: TEXT under teacher forcing, beside a sample."""
    loaded = load_run(run)
    with refusing_values(_TRACE_FLAGS):
        shown = trace(
            loaded.model, loaded.tokenizer, text, has_eos=loaded.has_eos, temperature=temperature,
            seed=seed,
        )  # fmt: skip
    click.echo(shown)


@cli.command("gates")
@run_argument
@click.argument("text")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Image to write.")
def _gates(run: str, text: str, out: Path) -> None:
    """Draw the gates of the model of RUN while TEXT is fed."""
    try:
        formats = image_formats()
        # matplotlib would add a suffix of its own, and write beside a folder.
        if out.suffix[1:].lower() not in formats:
            raise InputError(
                f"{out}: expected a path of an image, such as x.png; it may end with "
                + ", ".join(f".{name}" for name in formats)
            )
        if out.is_dir():
            raise InputError(f"{out} is a folder; expected a path of an image, such as x.png")
        loaded = load_run(run)
        with refusing_values():  # an image of too many layers
            plot_gates(loaded.model, loaded.tokenizer, text).savefig(out, dpi=120)
    except ModuleNotFoundError as error:
        raise InputError(f"gates needs {error.name}: pip install 'gru_fast[plot]'") from None
    except OSError as error:
        raise InputError(f"{out}: {error.strerror or error}; cannot write there") from None
    say(f"wrote {out}")


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

        with refusing_values():  # GRU_FAST_CPU_ISA
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
