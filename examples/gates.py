# SPDX-License-Identifier: Apache-2.0
"""What does the reset gate do? The experiments and plots of docs/gates.md.

    python examples/gates.py                 # all, about ten CPU minutes
    python examples/gates.py paper sizes     # parts of it: paper, sizes, intervention
    python examples/gates.py --plots-only    # tables and plots from docs/gates.json

Five networks with seeds of their own are trained at once, as five groups of one layer.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gru_fast import functional
from gru_fast.corpus import read_text, split_lines
from gru_fast.sampling import PADDING
from gru_fast.tokenizers import EOS, CharacterTokenizer

CELLS = ("reset_after", "reset_before", "no_reset")
SIZES = (1, 2, 4, 8, 16)
SEEDS = 5
RATE = 0.02


class Networks(nn.Module):
    """G networks of one cell, GRU and linear head; each gate row has one bias."""

    def __init__(self, cell: str, inputs: int, hidden: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.cell, self.hidden, self.groups = cell, hidden, groups
        rows = (2 if cell == "no_reset" else 3) * hidden

        def weight(*shape: int) -> nn.Parameter:
            bound = hidden**-0.5
            return nn.Parameter(torch.empty(groups, *shape).uniform_(-bound, bound))

        self.weight_ih, self.weight_hh = weight(rows, inputs), weight(rows, hidden)
        self.bias = weight(rows)
        self.head, self.head_bias = weight(hidden, outputs), weight(outputs)

    @property
    def size(self) -> int:
        """Parameters of one network."""
        return sum(p[0].numel() for p in self.parameters())

    def forward(self, x: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(T, B, G, outputs) and the last state, from (T, B, inputs) or (T, B, G, inputs)."""
        if h0 is None:
            h0 = x.new_zeros(self.groups, x.shape[1], self.hidden)
        weights = (self.weight_ih, self.weight_hh, self.bias)
        output, h_n = functional.layer(
            x, h0, *weights, cell=self.cell, reverse=[False] * self.groups
        )
        states = output.unflatten(-1, (self.groups, self.hidden))
        return torch.einsum("tbgh,gho->tbgo", states, self.head) + self.head_bias, h_n


def size_of(cell: str, inputs: int, hidden: int, outputs: int) -> int:
    rows = (2 if cell == "no_reset" else 3) * hidden
    return rows * (inputs + hidden + 1) + outputs * (hidden + 1)


def equal_hidden(inputs: int, hidden: int, outputs: int) -> int:
    """Units of a no_reset network with as many parameters as a full one, as nearly as can be."""
    wanted = size_of("reset_after", inputs, hidden, outputs)
    return min(
        range(1, 2 * hidden + 2),
        key=lambda h: abs(size_of("no_reset", inputs, h, outputs) - wanted),
    )


@dataclass
class Task:
    """Sequences to learn: `batch` gives x (T, B, inputs) and what `loss` compares outputs with."""

    name: str
    inputs: int
    outputs: int
    steps: int
    batch: Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    test: tuple[Tensor, Tensor]


def segment_sums(generator: torch.Generator, B: int, T: int = 30) -> tuple[Tensor, Tensor]:
    """Numbers and a flag; the target is the sum since the last flag, that number included."""
    x = torch.rand(T, B, generator=generator) * 2 - 1
    flag = torch.rand(T, B, generator=generator) < 0.15
    flag[0] = True
    total, totals = torch.zeros(B), []
    for t in range(T):
        total = torch.where(flag[t], x[t], total + x[t])
        totals.append(total)
    return torch.stack([x, flag.float()], -1), torch.stack(totals)[..., None]


def adding(generator: torch.Generator, B: int, T: int = 30) -> tuple[Tensor, Tensor]:
    """Numbers, two of them marked, one in each half; the target at the end is the sum of both."""
    x = torch.rand(T, B, generator=generator)
    mark = torch.zeros(T, B)
    halves = ((0, T // 2), (T // 2, T))
    for low, high in halves:
        mark.scatter_(0, torch.randint(low, high, (1, B), generator=generator), 1.0)
    return torch.stack([x, mark], -1), (x * mark).sum(0)[None, :, None]


def unexplained(output: Tensor, target: Tensor) -> Tensor:
    """(G,) mean squared error over the variance of the target, at the steps that have one."""
    error = (output[-len(target) :] - target).square().mean((0, 1, 3))
    return error / target.var()


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """(G,) nats per real token; target (T, B, G or 1)."""
    target = target.expand(output.shape[:3])
    losses = F.cross_entropy(
        output.flatten(0, 2), target.flatten(), ignore_index=PADDING, reduction="none"
    )
    return losses.reshape(target.shape).sum((0, 1)) / (target != PADDING).sum((0, 1))


def names_task(steps: int) -> Task:
    """The census names, 2000 of them held out: one-hot characters, the zero vector first."""
    lines = split_lines(read_text("builtin:names"))
    tokenizer = CharacterTokenizer.from_text("".join(lines))
    rows = [torch.tensor([*tokenizer.encode(line), EOS]) for line in lines]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    tokens = tokens[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    V = len(tokenizer)

    def examples(rows: Tensor) -> tuple[Tensor, Tensor]:
        y = rows[:, : int((rows != PADDING).sum(1).max())].T
        x = torch.zeros(*y.shape, V)
        x[1:] = F.one_hot(y[:-1].clamp(min=0), V).float()
        return x, y[..., None]

    def batch(generator: torch.Generator, B: int) -> tuple[Tensor, Tensor]:
        return examples(tokens[torch.randint(2000, len(tokens), (B,), generator=generator)])

    test = examples(tokens[:2000])
    return Task("characters of names", V, V, steps, batch, cross_entropy, test)


def stacked(task: Task, generators: list[torch.Generator], B: int) -> tuple[Tensor, Tensor]:
    """A batch of its own for every group: x (T, B, G, inputs), target (T, B, G[, outputs])."""
    parts = [task.batch(generator, B) for generator in generators]
    T = max(len(x) for x, _ in parts)
    xs = [F.pad(x, (0, 0, 0, 0, 0, T - len(x))) for x, _ in parts]
    if task.loss is unexplained:
        return torch.stack(xs, 2), torch.stack([y for _, y in parts], 2)
    ys = [F.pad(y, (0, 0, 0, 0, 0, T - len(y)), value=PADDING) for _, y in parts]
    return torch.stack(xs, 2), torch.cat(ys, 2)


def fit(task: Task, cell: str, hidden: int, B: int = 64) -> Networks:
    """Train one network for every seed; Adam, the rate along half a cosine to 0."""
    torch.manual_seed(0)
    networks = Networks(cell, task.inputs, hidden, task.outputs, SEEDS)
    generators = [torch.Generator().manual_seed(seed + 1) for seed in range(SEEDS)]
    optimiser = torch.optim.Adam(networks.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, task.steps)
    for _ in range(task.steps):
        x, target = stacked(task, generators, B)
        output, _ = networks(x)
        optimiser.zero_grad()
        task.loss(output, target).sum().backward()
        # The groups share nothing, so each has a norm of its own.
        for g in range(SEEDS):
            norm = torch.stack([p.grad[g].norm() for p in networks.parameters()]).norm()
            for p in networks.parameters():
                p.grad[g] *= (1 / (norm + 1e-6)).clamp(max=1.0)
        optimiser.step()
        schedule.step()
    return networks


@torch.no_grad()
def test_losses(task: Task, networks: Networks) -> list[float]:
    x, target = task.test
    if task.loss is unexplained:
        target = target.unsqueeze(2)
    return task.loss(networks(x)[0], target).tolist()


def paper_network(scale: float = 0.01, far: float = 12.0) -> Networks:
    """H = 1 by hand for `segment_sums`: u = 1, z = 0; r = 0 at a flag and 1 elsewhere."""
    networks = Networks("reset_after", 2, 1, 1, 1)
    with torch.no_grad():
        networks.weight_ih[0] = torch.tensor([[0, -2 * far], [0, 0], [scale, 0]])
        networks.weight_hh[0] = torch.tensor([[0.0], [0.0], [1.0]])
        networks.bias[0] = torch.tensor([far, -far, 0.0])
        networks.head[0], networks.head_bias[0] = 1 / scale, 0.0
    return networks


def paper() -> dict[str, object]:
    """The counter-example: one unit, weights by hand, and what training finds."""
    torch.manual_seed(0)
    task = sums_task(2000)
    by_hand = test_losses(task, paper_network())[0]
    result: dict[str, object] = {"by hand, reset_after": by_hand}
    for cell in CELLS:
        result[cell] = sorted(test_losses(task, fit(task, cell, 1)))
    return result


def sums_task(steps: int) -> Task:
    test = segment_sums(torch.Generator().manual_seed(99), 1000)
    return Task("sum since the flag", 2, 1, steps, segment_sums, unexplained, test)


def sizes() -> dict[str, object]:
    """The three cells at equal numbers of parameters."""
    adding_test = adding(torch.Generator().manual_seed(99), 1000)
    tasks = [
        sums_task(1500),
        Task("adding problem", 2, 1, 1500, adding, unexplained, adding_test),
        names_task(800),
    ]
    result: dict[str, object] = {}
    for task in tasks:
        rows = result[task.name] = []
        for hidden in SIZES:
            cells = {}
            for cell in CELLS:
                H = hidden
                if cell == "no_reset":
                    H = equal_hidden(task.inputs, hidden, task.outputs)
                networks = fit(task, cell, H)
                losses = sorted(test_losses(task, networks))
                cells[cell] = {"hidden": H, "parameters": networks.size, "losses": losses}
            rows.append(cells)
            print(f"{task.name}, H = {hidden}: done", flush=True)
    return result


@torch.no_grad()
def hold_reset(networks: Networks, value: Tensor | float) -> Networks:
    """A copy whose reset gate is a constant, a number or (G, H)."""
    held = Networks(
        networks.cell, networks.weight_ih.shape[2], networks.hidden, networks.head.shape[2],
        networks.groups,
    )  # fmt: skip
    held.load_state_dict(networks.state_dict())
    H = networks.hidden
    held.weight_ih[:, :H] = 0
    held.weight_hh[:, :H] = 0
    value = torch.as_tensor(value, dtype=torch.float32).expand(networks.groups, H)
    held.bias[:, :H] = torch.logit(value.clamp(1e-7, 1 - 1e-7))
    return held


@torch.no_grad()
def mean_reset(networks: Networks, x: Tensor, real: Tensor) -> Tensor:
    """(G, H): each unit's mean reset gate over the real steps of (T, B, inputs)."""
    h0 = x.new_zeros(networks.groups, x.shape[1], networks.hidden)
    output = functional.layer(
        x, h0, networks.weight_ih, networks.weight_hh, networks.bias, cell=networks.cell,
        reverse=[False] * networks.groups,
    )[0]  # fmt: skip
    states = output.unflatten(-1, (networks.groups, networks.hidden))
    before = torch.cat([h0.transpose(0, 1)[None], states[:-1]])
    H = networks.hidden
    gate = torch.sigmoid(
        torch.einsum("tbi,ghi->tbgh", x, networks.weight_ih[:, :H])
        + torch.einsum("tbgk,ghk->tbgh", before, networks.weight_hh[:, :H])
        + networks.bias[:, :H]
    )
    weight = real[..., None, None].float()
    return (gate * weight).sum((0, 1)) / weight.sum((0, 1))


@torch.no_grad()
def by_position(networks: Networks, x: Tensor, y: Tensor, longest: int = 12) -> list[list[float]]:
    """Nats at position 1, 2, ... of a name, for every seed."""
    logits, _ = networks(x)
    target = y.expand(logits.shape[:3])
    losses = F.cross_entropy(
        logits.flatten(0, 2), target.flatten(), ignore_index=PADDING, reduction="none"
    ).reshape(target.shape)
    counts = (target != PADDING).sum(1)
    return (losses.sum(1) / counts)[:longest].T.tolist()


def intervention(hidden: int = 64) -> dict[str, object]:
    """Trained networks, intact and with the reset gate held."""
    task = names_task(1000)
    x, y = task.test
    # Names of the training: the held gate must not know those that it is tested on.
    seen, next_seen = task.batch(torch.Generator().manual_seed(99), 2000)
    real = next_seen[..., 0] != PADDING
    result: dict[str, object] = {}
    for cell in CELLS:
        H = hidden
        if cell == "no_reset":
            H = equal_hidden(task.inputs, hidden, task.outputs)
        networks = fit(task, cell, H)
        variants = {"intact": networks}
        if cell != "no_reset":
            mean = mean_reset(networks, seen, real)
            variants["r = 1"] = hold_reset(networks, 1.0)
            variants["r = its mean"] = hold_reset(networks, mean)
            result[f"{cell}, mean r"] = mean.mean(1).tolist()
        for name, variant in variants.items():
            losses = test_losses(task, variant)
            result[f"{cell}, {name}"] = {
                "losses": losses, "by position": by_position(variant, x, y), "hidden": H,
                "parameters": networks.size,
            }  # fmt: skip
        print(f"{cell}: done", flush=True)
    return result


PARTS = {"paper": paper, "sizes": sizes, "intervention": intervention}
COLOURS = {"reset_after": "tab:blue", "reset_before": "tab:orange", "no_reset": "tab:green"}


def spread(losses: list[float]) -> str:
    digits = ".2g" if max(losses) < 1 else ".3f"
    numbers = (statistics.median(losses), min(losses), max(losses))
    return "{} ({}, {})".format(*(f"{v:{digits}}" for v in numbers))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")


def print_tables(results: dict) -> None:
    """The tables of docs/gates.md."""
    if "paper" in results:
        losses = dict(results["paper"])
        print(f"\nby hand: {losses.pop('by hand, reset_after'):.1g}\n")
        table = [[f"`{c}`", " ".join(f"{v:.3f}" for v in sorted(losses[c]))] for c in CELLS]
        print_table(["H = 1, trained", "unexplained variance"], table)
    for name, rows in results.get("sizes", {}).items():
        table = []
        for row in rows:
            cells = [f"{spread(row[c]['losses'])}, H={row[c]['hidden']}" for c in CELLS]
            both = [str(row[c]["parameters"]) for c in ("reset_after", "no_reset")]
            table.append([" / ".join(both), *cells])
        print(f"\n{name}:\n")
        print_table(["parameters, full / no_reset", *(f"`{c}`" for c in CELLS)], table)
    held = results.get("intervention", {})
    if held:
        print()
        names = ["intact", "r = its mean", "r = 1"]
        table = []
        for c in CELLS:
            values = [held.get(f"{c}, {name}") for name in names]
            size = f"`{c}`, H={values[0]['hidden']}, {values[0]['parameters']:,} parameters"
            table.append([size, *(spread(v["losses"]) if v else "" for v in values)])
        print_table(["network", *names], table)
        for c in CELLS[:2]:
            print(f"\nmean reset gate of {c}: {spread(held[f'{c}, mean r'])}")


def plot_sizes(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(result)), result.items(), strict=True):
        for cell in CELLS:
            at = [row[cell]["parameters"] for row in rows]
            losses = [row[cell]["losses"] for row in rows]
            axes.plot(
                at, [statistics.median(v) for v in losses], "o-", color=COLOURS[cell], label=cell
            )
            axes.fill_between(
                at, [min(v) for v in losses], [max(v) for v in losses], alpha=0.2,
                color=COLOURS[cell],
            )  # fmt: skip
        characters = name.startswith("characters")
        axes.set(title=name, xlabel="parameters", xscale="log")
        axes.set_ylabel("nats per character" if characters else "unexplained variance")
        if not characters:
            axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=110)


def plot_intervention(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    styles = {"intact": "-", "r = its mean": "--", "r = 1": ":"}
    for axes, cell in zip(figure.subplots(1, 2, sharey=True), CELLS[:2], strict=True):
        for key, values in result.items():
            kind, _, name = key.partition(", ")
            if name == "mean r" or kind not in (cell, "no_reset"):
                continue
            curves = list(zip(*values["by position"], strict=True))
            at = range(1, len(curves) + 1)
            label = name if kind == cell else "trained without r"
            axes.plot(
                at, [statistics.median(v) for v in curves], styles[name], color=COLOURS[kind],
                label=label,
            )  # fmt: skip
            low, high = [min(v) for v in curves], [max(v) for v in curves]
            axes.fill_between(at, low, high, alpha=0.15, color=COLOURS[kind])
        axes.set(title=cell, xlabel="position in the name", ylabel="nats per character")
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    docs = Path(__file__).parents[1] / "docs"
    parser.add_argument("--out", type=Path, default=docs, help="folder of plots and figures")
    parser.add_argument("--plots-only", action="store_true", help="train nothing")
    args = parser.parse_args()
    file = args.out / "gates.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for part in [] if args.plots_only else args.parts or PARTS:
        results[part] = PARTS[part]()
        file.write_text(json.dumps(results, indent=1) + "\n")
    print_tables(results)
    if "sizes" in results:
        plot_sizes(results["sizes"], args.out / "gates-sizes.png")
    if "intervention" in results:
        plot_intervention(results["intervention"], args.out / "gates-intervention.png")


if __name__ == "__main__":
    main()
