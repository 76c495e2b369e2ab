# SPDX-License-Identifier: Apache-2.0
"""Initial values gate by gate, in the manner of `torch.nn.init`: in place, and the module returned.

A weight of a GRU holds the rows of all gates. `torch.nn.init.orthogonal_` on the whole weight makes
the columns of the (3H, H) matrix orthogonal, not those of any gate. The functions here take
`gru_fast.GRU`, `gru_fast.GRUCell`, `torch.nn.GRU` and `torch.nn.GRUCell`; the modules' own default
stays torch's, uniform between -1 / sqrt(H) and 1 / sqrt(H).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import GRUCell as TorchGRUCell

from gru_fast.cell import GRUCell
from gru_fast.reference import WEIGHTS

__all__ = ["chrono_", "orthogonal_", "per_gate_"]

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def per_gate_(module: Module, kind: str, function: Callable[..., Any], **options: Any) -> Module:
    """Apply a function of `torch.nn.init` to the rows of each gate on its own.

    Weights are visited layer by layer, forward direction first, gates in the order r, z, n.

    Args:
        module: A GRU or GRUCell, of this library or of torch.
        kind: `"weight_ih"`, `"weight_hh"`, `"bias_ih"` or `"bias_hh"`.
        function: Called with the (H, I) or (H, H) weight, or (H,) bias, of one gate, with
            `num_heads` the square weight of one gate and head; in place.
            Weights of less than float32 are handed over in float32 and rounded.
        **options: Passed on, `generator=` for one.

    Returns:
        `module`.

    Raises:
        TypeError: `module` is no GRU.
        ValueError: An unknown `kind`, or a bias of a module that has none.
        AttributeError: The weight is no parameter, but computed by a parametrization.

    Example:
        >>> gru = per_gate_(gru_fast.GRU(8, 16), "weight_ih", nn.init.xavier_uniform_)
    """
    if kind not in WEIGHTS:
        raise ValueError(f"kind: expected one of {', '.join(WEIGHTS)}, got {kind!r}")
    for parameter in list(_parameters(module, kind)):
        heads = getattr(module, "num_heads", 1) if kind == "weight_hh" else 1
        for block in parameter.chunk(_gates(module) * heads):
            exact = block if block.dtype in (torch.float32, torch.float64) else block.float()
            function(exact, **options)
            if exact is not block:
                block.copy_(exact)
    return module


def orthogonal_(
    module: Module, gain: float = 1.0, generator: torch.Generator | None = None
) -> Module:
    """Make the recurrent (H, H) weight of each gate (and head) an orthogonal matrix times `gain`.

    Args:
        module: As for `per_gate_`.
        gain: Every singular value.
        generator: Source of the random numbers; None: torch's default.

    Returns:
        `module`.

    Raises:
        TypeError: `module` is no GRU, or `gain` no number.
        ValueError: `gain` is not finite.
        AttributeError: A weight is computed by a parametrization.

    Source: Saxe et al. 2014, arXiv:1312.6120.
    """
    if not math.isfinite(gain):
        raise ValueError(f"gain: expected a finite number, got {gain}")
    return per_gate_(module, "weight_hh", nn.init.orthogonal_, gain=gain, generator=generator)


@torch.no_grad()
def chrono_(
    module: Module, t_max: float, t_min: float = 2.0, generator: torch.Generator | None = None
) -> Module:
    """Set the biases of the update gate so that the units remember for t_min to t_max steps.

    With h = (1 - z) * n + z * h_prev a unit forgets at the rate 1 - z, over T = 1 / (1 - z) steps.
    For T drawn uniformly between `t_min` and `t_max` the bias of z is log(T - 1): its sigmoid is
    1 - 1 / T. Sources that write h = z * n + (1 - z) * h_prev have the bias -log(T - 1).

    `bias_ih` gets the value and `bias_hh` 0, in the rows of z; all else stays as it is.

    Args:
        module: As for `per_gate_`, with biases.
        t_max: The longest memory, in steps: the range of the dependencies that are expected.
        t_min: The shortest.
        generator: Source of the random numbers; None: torch's default.

    Returns:
        `module`.

    Raises:
        TypeError: `module` is no GRU.
        ValueError: `module` has no biases, or not 1 < t_min <= t_max < infinity.
        AttributeError: A bias is computed by a parametrization.

    Source: Tallec and Ollivier 2018, "Can recurrent neural networks warp time?", arXiv:1804.11188.
    """
    numbers = all(isinstance(t, Real) for t in (t_min, t_max))
    if not numbers or not 1 < t_min <= t_max < float("inf"):
        raise ValueError(
            f"t_min, t_max: expected 1 < t_min <= t_max < infinity, got {t_min!r}, {t_max!r}"
        )
    gates = _gates(module)
    biases = list(zip(_parameters(module, "bias_ih"), _parameters(module, "bias_hh"), strict=True))
    for bias_ih, bias_hh in biases:
        z = bias_ih.chunk(gates)[gates - 2]
        drawn = torch.empty_like(z, dtype=torch.promote_types(z.dtype, torch.float32))
        z.copy_(drawn.uniform_(t_min - 1, t_max - 1, generator=generator).log_())
        bias_hh.chunk(gates)[gates - 2].zero_()
    return module


def _gates(module: nn.Module) -> int:
    is_gru = isinstance(module, nn.RNNBase) and module.mode == "GRU"
    if not is_gru and not isinstance(module, (GRUCell, TorchGRUCell)):
        raise TypeError(f"module should be a GRU or a GRUCell, got: {type(module).__name__}")
    return 2 if getattr(module, "cell", "") == "no_reset" else 3


def _parameters(module: nn.Module, kind: str) -> Iterator[Tensor]:
    _gates(module)
    if kind.startswith("bias") and not module.bias:
        raise ValueError(f"module: expected one with biases to set its {kind}, got bias=False")
    suffixes = [""]
    if isinstance(module, nn.RNNBase):
        directions = ("", "_reverse") if module.bidirectional else ("",)
        suffixes = [f"_l{k}{d}" for k in range(module.num_layers) for d in directions]
    for suffix in suffixes:
        yield module.get_parameter(kind + suffix)
