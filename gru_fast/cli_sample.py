# SPDX-License-Identifier: Apache-2.0
"""`gru-fast sample`: sequences that a trained model makes up."""

from __future__ import annotations

import os
from typing import Any

import click

from gru_fast import corpus
from gru_fast.beside_torch import compare_sampling
from gru_fast.checkpoint import Run, load_run
from gru_fast.commands import SEED, Finite, beside_option, refusing_values, run_argument, say
from gru_fast.errors import InputError
from gru_fast.reference_sampling import seed_from_generator
from gru_fast.tokenizers import EOS

__all__ = ["sample_command"]

_NOVELTY_ROWS = 1000
_FLAGS = {
    "max_new_tokens:": "--length:",
    "num_return_sequences:": "--num:",
    "temperature:": "--temperature:",
    "do_sample=False": "--greedy",
}


@click.command("sample")
@run_argument
@click.option("--num", type=click.IntRange(1), default=1, help="Sequences to print.")
@click.option("--prompt", default="", help="Text that each begins with.")
@click.option("--length", type=click.IntRange(1), help="Tokens at most.  [default: 100, text: 500]")
@click.option("--temperature", type=Finite(0, min_open=True), default=1.0)
@click.option("--top-k", type=click.IntRange(1))
@click.option("--top-p", type=Finite(0, 1, min_open=True))
@click.option("--min-p", type=Finite(0, 1))
@click.option("--greedy", is_flag=True, help="Take the likeliest token instead of a draw.")
@click.option("--seed", type=SEED, help="The same seed gives the same text.")
@click.option("--novel", is_flag=True, help="Print only whole lines that are not in the corpus.")
@beside_option
def sample_command(
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
        say(
            f"{len(new) / rows:.0%} of {rows:,} sampled lines are not in {source}"
            + f"; {cut:,} were cut at {length} {loaded.tokenizer.kind}s" * bool(cut)
        )
    if novel and len(new) < num:
        say(f"only {len(new):,} of {num:,} novel lines were found")
    if beside_torch:
        for count in (64, 1):
            say(compare_sampling(loaded.model, count, length, eos))


def _drawn_texts(run: Run, prompt: list[int], **options: Any) -> tuple[list[str], list[str]]:
    """What `generate` draws as texts, and those of them that end with EOS."""
    with refusing_values(_FLAGS):
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
