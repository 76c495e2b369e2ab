# SPDX-License-Identifier: Apache-2.0
"""`GRUCell`: `torch.nn.GRUCell` with faster kernels and more cells."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import GRUCell as TorchGRUCell

from gru_fast import direct, functional
from gru_fast.backends import NAMES
from gru_fast.recurrent import (
    CANDIDATES,
    DEFAULT_CELL,
    Unscriptable,
    check_choice,
    is_traced,
    node_of_call,
    options_repr,
    refuse_tracing,
)
from gru_fast.reference import GATES, WEIGHTS

__all__ = ["GRUCell"]


class GRUCell(Unscriptable, nn.RNNCellBase):
    """One step of a GRU with the interface and numbers of `torch.nn.GRUCell`.

    The equations, and the meaning of `cell`, are those of `gru_fast.GRU`.

    Args:
        input_size: Features I of the input.
        hidden_size: Features H of the hidden state.
        bias: Whether the cell has `bias_ih` and `bias_hh`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        cell: `"reset_after"`, `"reset_before"` or `"no_reset"`.
        backend: `"auto"`, or the name of the backend that must take the calls.

    Attributes:
        weight_ih: (N * H, I), N is 3 (rows of r, z, n), or 2 (z, n) for `cell="no_reset"`.
        weight_hh: (N * H, H).
        bias_ih: (N * H), or None.
        bias_hh: (N * H), or None.

    Raises:
        ValueError: Unknown `cell` or `backend`.
        TypeError: A size is not an integer.
        RuntimeError: A size is negative.

    Example:
        >>> cell = GRUCell(10, 20)
        >>> h = cell(torch.randn(3, 10), torch.randn(3, 20))
    """

    cell: str = DEFAULT_CELL
    backend: str = "auto"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        cell: str = DEFAULT_CELL,
        backend: str = "auto",
    ) -> None:
        """See the class."""
        check_choice("cell", cell, CANDIDATES)
        check_choice("backend", backend, NAMES)
        self.cell = cell
        self.backend = backend
        super().__init__(input_size, hidden_size, bias, GATES[cell], device=device, dtype=dtype)

    def _own_weights(self) -> list[Any]:
        # Not a property: torch would report an attribute that is missing as the property itself.
        return [getattr(self, name) for name in WEIGHTS]

    def extra_repr(self) -> str:
        """`torch.nn.GRUCell`'s, and the extras that are not at their defaults."""
        return super().extra_repr() + options_repr(self.cell, self.backend)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step.

        Args:
            input: (B, I) or (I,).
            hx: State before the step, (B, H), or (H,) with an (I,) input. None means zeros.

        Returns:
            The state after the step: (B, H) or (H,).

        Raises:
            ValueError: `input` or `hx` is not 1-D or 2-D.
            AttributeError: A weight or a bias was deleted.
            TypeError: A weight is None.
            RuntimeError: A shape, dtype or device does not fit, or `backend` was named and cannot
                take the call.
        """
        if isinstance(input, Proxy) and is_traced(self, input):
            return node_of_call(self, input, hx)
        if torch._C._get_tracing_state():
            if self.cell != DEFAULT_CELL or self.backend != "auto":
                refuse_tracing(f"cell={self.cell!r}, backend={self.backend!r}")
            return TorchGRUCell.forward(self, input, hx)  # type: ignore[arg-type]
        params: dict[str, Any] = self._parameters
        try:
            weights = [params[name] for name in WEIGHTS]
        except KeyError:  # parametrized, weight_norm, a DataParallel replica, or deleted
            weights = self._own_weights()
        h = direct.gru_cell(input, hx, weights, self.cell, self.backend)
        if h is not None:
            return h
        for name, weight in zip(WEIGHTS[:2], weights, strict=False):
            if weight is None:
                raise TypeError(f"{name} should be a Tensor, got: NoneType")
        dtype = weights[0].dtype
        if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
            input.dim()  # torch's error for what is no Tensor but has a dtype, as NumPy's arrays do
            # torch.nn.GRUCell's type of exception; torch.nn.GRU raises a ValueError.
            raise RuntimeError(
                f"input: expected the dtype of the weights, {dtype}, got {input.dtype}"
            )
        return functional.gru_cell(input, hx, *weights, cell=self.cell, backend=self.backend)
