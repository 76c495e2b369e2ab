# SPDX-License-Identifier: Apache-2.0
"""Train a character GRU on names, then sample names that nobody has yet.

Training feeds the zero vector and then always the TRUE previous character, whatever the model
predicted. Sampling feeds the zero vector and then the character that was DRAWN from the softmax.

    python examples/novel_names.py                       # US census names (PyPI package `names`)
    python examples/novel_names.py --corpus words.txt    # any file with one name a line
"""

import argparse
import copy
import statistics
import time
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import gru_fast
from gru_fast.reference_sampling import draw, uniform

EOS = 0
PADDING = -100  # what cross_entropy ignores
LONGEST = 40


def read_names(corpus: Path | None) -> list[str]:
    """Distinct names in alphabetical order: those of a file, or of the 1990 US census."""
    if corpus is not None:
        lines = corpus.read_text(encoding="utf-8").splitlines()
        return sorted({line.strip() for line in lines} - {""})
    data = resources.files("names")
    files = ("dist.all.last", "dist.female.first", "dist.male.first")
    lines = [line for file in files for line in (data / file).read_text("ascii").splitlines()]
    return sorted({line.split()[0].lower() for line in lines if line.strip()})


def encode(names: list[str], alphabet: str) -> Tensor:
    """(N, longest + 1) character numbers from 1, EOS after the last, PADDING after that."""
    number = {c: i for i, c in enumerate(alphabet, start=1)}
    rows = [torch.tensor([*(number[c] for c in name[:LONGEST]), EOS]) for name in names]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)


class NameModel(nn.Module):
    """One-hot characters -> GRU -> a logit for every character and EOS."""

    def __init__(self, vocabulary: int, hidden: int, cell: str) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.gru = gru_fast.GRU(vocabulary, hidden, cell=cell)
        self.head = nn.Linear(hidden, vocabulary)

    def one_hot(self, characters: Tensor) -> Tensor:
        return F.one_hot(characters, self.vocabulary).to(self.head.weight.dtype)

    def loss(self, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the real characters of (B, T) targets, EOS included."""
        y = targets[:, : int((targets != PADDING).sum(1).max())].T
        x = torch.zeros(*y.shape, self.vocabulary)
        x[1:] = self.one_hot(y[:-1].clamp(min=0))
        output, _ = self.gru(x)
        return F.cross_entropy(self.head(output).flatten(0, 1), y.flatten(), ignore_index=PADDING)

    @torch.inference_mode()
    def sample(self, count: int, temperature: float, seed: int) -> list[list[int]]:
        """Names as character numbers; name i depends on the seed and on i alone."""
        drawn = torch.empty(LONGEST, count, dtype=torch.long)
        alive = torch.ones(count, dtype=torch.bool)
        u = uniform(seed, torch.arange(LONGEST)[:, None], torch.arange(count))
        x, h = torch.zeros(1, count, self.vocabulary), None
        for t in range(LONGEST):
            output, h = self.gru(x, h)
            drawn[t] = draw(self.head(output[0]), u[t], temperature)
            alive &= drawn[t] != EOS
            if not alive.any():
                break
            x = self.one_hot(drawn[t : t + 1])
        rows = drawn[: t + 1].T.tolist()
        return [row[: row.index(EOS)] if EOS in row else row for row in rows]


def train(model: NameModel, training: Tensor, held_out: Tensor, args: argparse.Namespace) -> float:
    """Adam on random batches; the last loss on the held-out names."""
    optimiser = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.steps)
    every = max(1, args.steps // 20)
    losses: list[float] = []
    with tqdm(total=args.steps, unit="step", mininterval=0.5) as progress:
        for step in range(1, args.steps + 1):
            loss = model.loss(training[torch.randint(len(training), (args.batch,))])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            if step % every == 0 or step == args.steps:
                with torch.no_grad():
                    held_out_loss = model.loss(held_out).item()
                recent = statistics.mean(losses[-every:])
                progress.set_postfix_str(f"train {recent:.3f}, held out {held_out_loss:.3f}", False)
            progress.update()
    return held_out_loss


def tokens_per_second(model: NameModel, batch: Tensor, kind: str) -> float:
    """Speed of one training step, or of sampling 64 names together or 4 one by one."""
    start = time.perf_counter()
    if kind == "training":
        tokens = int((batch != PADDING).sum())
        model.zero_grad()
        model.loss(batch).backward()
    else:
        calls, count = (1, 64) if kind == "sampling 64 names" else (4, 1)
        rows = [row for i in range(calls) for row in model.sample(count, 1.0, seed=i)]
        tokens = sum(len(row) + 1 for row in rows)
    return tokens / (time.perf_counter() - start)


def compare(model: NameModel, batch: Tensor, rounds: int) -> None:
    """The same script on torch.nn.GRU: both in turn, median of the rounds."""
    other = copy.deepcopy(model)
    if not gru_fast.revert(other).converted:
        print(f"\ntorch.nn.GRU has no cell={model.gru.cell!r} to compare with")
        return
    print(f"\n{'tokens/s':20}{'gru_fast.GRU':>14}{'torch.nn.GRU':>14}{'ratio':>8}")
    for kind in ("training", "sampling 64 names", "sampling 1 name"):
        speeds = [[tokens_per_second(m, batch, kind) for m in (model, other)]
                  for _ in range(rounds + 1)][1:]  # fmt: skip
        ours, theirs = (statistics.median(column) for column in zip(*speeds, strict=True))
        print(f"{kind:20}{ours:14,.0f}{theirs:14,.0f}{ours / theirs:8.2f}")


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Run the script; returns what it printed, for the tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="file with one name a line")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--num", type=int, default=20, help="names to print")
    parser.add_argument("--cell", default="reset_after", help="reset_after, reset_before, no_reset")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the timing, 0 for none")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    names = read_names(args.corpus)
    alphabet = "".join(sorted(set("".join(names))))
    data = encode(names, alphabet)[torch.randperm(len(names))]
    split = min(len(data) // 20, 2000)
    held_out, training = data[:split], data[split:]
    model = NameModel(len(alphabet) + 1, args.hidden, args.cell)
    print(f"{len(names):,} names of {len(alphabet)} characters, {split:,} held out")
    print(gru_fast.explain(model.gru, torch.zeros(12, args.batch, len(alphabet) + 1)), "\n")
    with torch.no_grad():
        first_loss = model.loss(held_out).item()
    last_loss = train(model, training, held_out, args)

    known = {tuple(row[row > 0].tolist()) for row in training}
    rows = model.sample(max(1000, args.num), args.temperature, args.seed)
    sampled = ["".join(alphabet[c - 1] for c in row) for row in rows]
    novel = [bool(row) and tuple(row) not in known for row in rows]
    print(f"\nheld-out loss {first_loss:.3f} -> {last_loss:.3f} nats a character")
    print(f"{sum(novel) / len(novel):.0%} of {len(novel):,} sampled names are novel (marked *):")
    for name, new in list(zip(sampled, novel, strict=True))[: args.num]:
        print(f"  {name.title()}{' *' if new else ''}")
    if args.rounds:
        compare(model, training[: args.batch], args.rounds)
    return {"first_loss": first_loss, "last_loss": last_loss, "names": sampled, "novel": novel}


if __name__ == "__main__":
    main()
