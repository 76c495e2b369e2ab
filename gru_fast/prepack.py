# SPDX-License-Identifier: Apache-2.0
"""`prepacked`: weights of fixed layers packed once instead of in every call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from gru_fast import direct
from gru_fast.cell import GRUCell
from gru_fast.gru import GRU

__all__ = ["prepacked"]


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    """Count a step as a change of its parameters, which a fused optimiser does not (torch 2.13)."""
    for group in optimizer.param_groups:
        increment_version(group["params"])


# Compiled with a step it would count once, while it is traced. What torch.compiler.disable sets:
# that function itself loads the whole compiler.
_count_step._torchdynamo_disable = True  # type: ignore[attr-defined]


@contextmanager
def prepacked(module: nn.Module) -> Iterator[None]:
    """For the length of a `with` block, keep the weights of a module's layers packed for the CPU.

    A call of `GRU` or `GRUCell` packs its weights into the order in which the CPU's kernels read
    them, which for a few steps takes longer than the steps. Within the block a weight is packed
    when it is first used and again after it has changed; the numbers stay the same to the bit. It
    is for programs that call a layer often with few steps: acting, serving, streaming.

    It serves calls without gradients on the CPU, in float32 or, where the CPU multiplies it
    (AVX512-BF16), bfloat16, in one direction and with `num_heads` of 1, without `lengths`,
    `reset_mask` or `return_gates`. Every other call, also on other devices, is as outside.
    Meanwhile each weight that is used stands in memory twice.

    PyTorch counts changes in place: an optimiser's step, `load_state_dict`, `copy_` under
    `torch.no_grad()`. Another `Parameter`, or other memory by `.data = tensor`, is used where it
    lies. **What is written through `.data` or NumPy is counted by nobody: it is used after the
    block only.**

    Args:
        module: A `GRU`, a `GRUCell` or a module that contains some; those that it gets later do not
            count.

    Raises:
        TypeError: `module` is no `nn.Module`.
        RuntimeError: A weight was made under `torch.inference_mode()`, where PyTorch counts no
            changes.

    Example:
        >>> with gru_fast.prepacked(policy), torch.no_grad():
        ...     for observation in environment:
        ...         action, state = policy(observation, state)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    weights = []
    for name, layer in module.named_modules():
        if not isinstance(layer, GRU | GRUCell):
            continue
        for own, weight in layer.named_parameters(recurse=False):
            if not own.startswith("weight_"):
                continue
            if weight.is_inference():
                raise RuntimeError(
                    f"{name}{'.' if name else ''}{own}: expected a tensor made outside of "
                    "torch.inference_mode(), which does not count changes"
                )
            if weight.device.type == "cpu":
                weights.append((weight, layer.cell, own.startswith("weight_hh")))
    counting = register_optimizer_step_post_hook(_count_step)
    try:
        with direct.prepacked(weights):
            yield
    finally:
        counting.remove()
