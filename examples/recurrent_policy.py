# SPDX-License-Identifier: Apache-2.0
"""A policy with memory, trained with episodes that end in the middle of a rollout.

    python examples/recurrent_policy.py            # about a minute
    python examples/recurrent_policy.py --updates 20 --envs 256

The task is a T-maze (Bakker 2002): a signal at the entrance tells which way to turn at the
junction, which comes 4 to 12 steps later. Without memory half of the turns are right. Rollouts have
a fixed number of steps, so most of them cut episodes at both ends and hold several of each maze.

The same actor-critic is trained twice from the same seed. Its GRU sees a rollout either as it is,
with `reset_mask` where an episode begins, or cut into episodes that are padded to the longest,
which is what one does where a layer has no resets. Both give the same gradients.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gru_fast

FEATURES = 4  # signal left, signal right, at the junction, noise
ACTIONS = 2  # left, right; in the corridor both walk on


class Mazes:
    """B mazes side by side, each begun anew when its episode ends."""

    def __init__(self, envs: int, seed: int, shortest: int = 4, longest: int = 12) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shortest, self.longest = shortest, longest
        self.signal = torch.zeros(envs, dtype=torch.int64)
        self.left = torch.zeros(envs, dtype=torch.int64)  # steps to the junction
        self.first = torch.ones(envs, dtype=torch.bool)  # whether an episode begins here
        self._begin(self.first)

    def _begin(self, which: Tensor) -> None:
        shape = which.shape
        signal = torch.randint(2, shape, generator=self.generator)
        left = torch.randint(self.shortest, self.longest + 1, shape, generator=self.generator)
        self.signal = torch.where(which, signal, self.signal)
        self.left = torch.where(which, left, self.left)
        self.first = which

    def observe(self) -> Tensor:
        """What is seen now, (B, FEATURES); the signal only where an episode begins."""
        shown = F.one_hot(self.signal, 2) * self.first[:, None]
        noise = torch.randn(self.signal.shape, generator=self.generator)
        return torch.stack([*shown.unbind(1), self.left == 0, noise], 1).float()

    def act(self, action: Tensor) -> Tensor:
        """Take a step; rewards (B,): 1 or -1 for a turn at the junction, 0 elsewhere."""
        at_junction = self.left == 0
        reward = torch.where(action == self.signal, 1.0, -1.0) * at_junction
        self.left = self.left - 1
        self._begin(at_junction)
        return reward


class Policy(nn.Module):
    """Actor and critic on one GRU layer, time first."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gru = gru_fast.GRU(FEATURES, hidden)
        self.actor, self.critic = nn.Linear(hidden, ACTIONS), nn.Linear(hidden, 1)

    def heads(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (..., ACTIONS) and values (...)."""
        return self.actor(output), self.critic(output).squeeze(-1)


@dataclass
class Rollout:
    """T steps of B mazes, (T, B) each but what is noted."""

    seen: Tensor  # (T, B, FEATURES)
    first: Tensor
    action: Tensor
    reward: Tensor
    hx: Tensor  # (1, B, H), before the first step
    h_n: Tensor  # (1, B, H), after the last step


@torch.no_grad()
def roll_out(policy: Policy, mazes: Mazes, hx: Tensor, steps: int) -> Rollout:
    """Act step by step. A reset is the same here and in training: the mask of the observation."""
    columns: list[tuple[Tensor, ...]] = []
    state = hx
    for _ in range(steps):
        seen, first = mazes.observe(), mazes.first
        output, state = policy.gru(seen[None], state, reset_mask=first[None])
        action = torch.distributions.Categorical(logits=policy.heads(output[0])[0]).sample()
        columns.append((seen, first, action, mazes.act(action)))
    seen, first, action, reward = (torch.stack(column) for column in zip(*columns, strict=True))
    return Rollout(seen, first, action, reward, hx, state)


def with_resets(gru: nn.Module, rollout: Rollout) -> Tensor:
    """The GRU's output over a rollout, (T, B, H): one call."""
    output: Tensor = gru(rollout.seen, rollout.hx, reset_mask=rollout.first)[0]
    return output


def split_and_pad(gru: nn.Module, rollout: Rollout) -> Tensor:
    """The same without resets: every episode a row of its own, padded to the longest."""
    T, B = rollout.first.shape
    begins = rollout.first.clone()
    begins[0] = True
    row = (begins.T.reshape(-1).cumsum(0) - 1).reshape(B, T).T
    at = torch.arange(T)[:, None].expand(T, B)
    step = at - torch.where(begins, at, 0).cummax(0).values
    lengths = torch.bincount(row.reshape(-1))
    padded = rollout.seen.new_zeros(int(lengths.max()), len(lengths), FEATURES)
    padded[step, row] = rollout.seen
    hx = rollout.hx.new_zeros(1, len(lengths), rollout.hx.shape[-1])
    hx[0, row[0]] = torch.where(rollout.first[0, :, None], 0.0, rollout.hx[0])
    packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
    return pad_packed_sequence(gru(packed, hx)[0])[0][step, row]


def returns(rollout: Rollout, values: Tensor, discount: float) -> Tensor:
    """Discounted rewards to the end of each episode; a cut one goes on with the last value."""
    # A reward is given where an episode ends, and only there.
    total, found = torch.where(rollout.reward[-1] != 0, 0.0, values[-1] * discount), []
    for t in reversed(range(len(rollout.reward))):
        total = rollout.reward[t] + total
        found.append(total)
        total = torch.where(rollout.first[t], 0.0, total * discount)
    return torch.stack(found[::-1])


def loss_of(
    policy: Policy, rollout: Rollout, way: Callable[[nn.Module, Rollout], Tensor]
) -> Tensor:
    """Advantage actor-critic (Mnih et al. 2016) with an entropy bonus."""
    logits, values = policy.heads(way(policy.gru, rollout))
    target = returns(rollout, values.detach(), 0.95)
    policy_of = torch.distributions.Categorical(logits=logits)
    gain = (policy_of.log_prob(rollout.action) * (target - values.detach())).mean()
    return 0.5 * F.mse_loss(values, target) - gain - 0.01 * policy_of.entropy().mean()


@dataclass
class Training:
    """What came of a run."""

    right: list[float]  # share of right turns, by update
    acting: float  # seconds
    learning: float  # seconds


def train(
    way: Callable[[nn.Module, Rollout], Tensor],
    *,
    updates: int,
    envs: int = 64,
    steps: int = 64,
    hidden: int = 64,
    seed: int = 0,
) -> Training:
    """Act and learn in turns; the state goes on from rollout to rollout."""
    torch.manual_seed(seed)
    policy, mazes = Policy(hidden), Mazes(envs, seed)
    optimizer = torch.optim.Adam(policy.parameters(), 5e-3)
    state = torch.zeros(1, envs, hidden)
    found = Training([], 0.0, 0.0)
    for _ in range(updates):
        start = time.perf_counter()
        rollout = roll_out(policy, mazes, state, steps)
        state = rollout.h_n
        middle = time.perf_counter()
        optimizer.zero_grad()
        loss_of(policy, rollout, way).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
        found.acting += middle - start
        found.learning += time.perf_counter() - middle
        turns = rollout.reward != 0
        found.right.append(float((rollout.reward[turns] > 0).float().mean()))
    return found


def main() -> None:
    """Train both ways and say how they went."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--envs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)  # steps this small are not worth more
    for way in (with_resets, split_and_pad):
        found = train(way, **vars(options))
        last = found.right[-10:]
        print(
            f"{way.__name__:<14} right turns {found.right[0]:.0%} at first, "
            f"{sum(last) / len(last):.0%} in the last updates; "
            f"acting {found.acting:.1f} s, learning {found.learning:.1f} s"
        )


if __name__ == "__main__":
    main()
