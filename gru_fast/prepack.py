# SPDX-License-Identifier: Apache-2.0
"""`prepacked`: weights of fixed layers packed once instead of in every call."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gru_fast import direct
from gru_fast.cell import GRUCell
from gru_fast.gru import GRU

__all__ = ["prepacked"]


@contextmanager
def prepacked(module: nn.Module) -> Iterator[None]:
    """For the length of a `with` block, keep the weights of a module's layers packed for the CPU.

    A call of `GRU` or `GRUCell` packs its weights into the order in which the CPU's kernels read
    them, which for a few steps takes longer than the steps. Within the block a weight is packed
    when it is first used and again after it has changed; the numbers stay the same to the bit. It
    is for programs that call a layer often with few steps: acting, serving, streaming.

    It serves calls without gradients on the CPU, without `reset_state` or `return_gates`, of at
    most 8 layers and, in one direction only, at most 64 heads; in float16, and in bfloat16 where
    the CPU does not multiply it (AVX512-BF16), of at most 262,144 numbers in and out. Every other
    call, also on other devices, is as outside. Meanwhile each weight that is used stands in memory
    twice, the second time in the type that is computed in, which for those two is float32.

    PyTorch counts changes in place, as those by `load_state_dict` or by `copy_` under
    `torch.no_grad()`, and each step of any optimiser counts as one of all weights. Another tensor
    in place of a `Parameter`, or other memory by `.data = tensor`, is used where it lies. **What is
    written past the `Parameter` is counted by nobody, and may be used after the block only:**
    through `.data`, NumPy, DLPack, a tensor that was given the same memory by `.data = tensor`, or
    by another process.

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
                heads = layer.num_heads if isinstance(layer, GRU) else 1
                weights.append((weight, layer.cell, own.startswith("weight_hh"), heads))
    with direct.prepacked(weights):
        yield
