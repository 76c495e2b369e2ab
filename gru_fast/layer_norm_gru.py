# SPDX-License-Identifier: Apache-2.0
"""`LayerNormGRU`: a stack of GRU layers with a layer norm on both gate products."""

from functools import partial
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gru_fast.backends import NAMES
from gru_fast.dropout import state_scale
from gru_fast.recurrence_norm import norm_layer
from gru_fast.recurrent import (
    Recurrent,
    check_choice,
    check_flag,
    check_probability,
    is_traced,
    node_of_call,
    options_repr,
    refuse_tracing,
    weights_of,
)
from gru_fast.stack import run_layers, state_shape

__all__ = ["LayerNormGRU"]

_KINDS = ("weight_ih", "weight_hh", "gamma_ih", "gamma_hh", "bias_ih", "bias_hh")


class LayerNormGRU(Recurrent):
    """Multi-layer GRU whose gate products are layer-normalised; its interface is `GRU`'s.

    For every step of every layer, with LN(v) = (v - mean(v)) / sqrt(var(v) + eps) over all 3H
    values of v together:

        a_r, a_z, a_n = LN(W_ih x) * gamma_ih + b_ih
        k_r, k_z, k_n = LN(W_hh h) * gamma_hh + b_hh
        r = sigmoid(a_r + k_r)
        z = sigmoid(a_z + k_z)
        n = tanh(a_n + r * k_n)
        h = (1 - z) * n + z * h

    It is the layer that the library haste calls LayerNormGRU, with PyTorch's order of gates; its
    zoneout and DropConnect are not here. It is not a `gru_fast.GRU`: cuDNN, ONNX, the samplers and
    `gru_fast.revert` do not have this cell.

    Args:
        input_size: Features I of the input.
        hidden_size: Features H of the hidden state.
        num_layers: Stacked layers L.
        bias: Whether the norms have `bias_ih` and `bias_hh`.
        batch_first: Input and output are (B, T, features) instead of (T, B, features).
            `hx` and `h_n` are (L * D, B, H) either way.
        dropout: Probability of the dropout between layers, in training mode.
        bidirectional: Adds a second direction: D = 2, and outputs have 2H features.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        eps: Added to the variances, as in `torch.nn.LayerNorm`.
        backend: `"auto"`, or the name of the backend that must take the calls
            (`gru_fast.available_backends()`).
        recompute: Save only inputs and output for the backward pass of the scan and rebuild the
            gates there: less memory for about one more product per step.
        recurrent_dropout: As in `gru_fast.GRU`: the mask is applied before the recurrent product.

    Attributes:
        weight_ih_l[k]: (3H, I) for k = 0, else (3H, D * H), rows in the order r, z, n; drawn as
            `torch.nn.GRU`'s. The second direction adds the suffix `_reverse`.
        weight_hh_l[k]: (3H, H).
        gamma_ih_l[k]: (3H), the gain of the input norm; 1 at first.
        gamma_hh_l[k]: (3H), the gain of the recurrent norm; 1 at first.
        bias_ih_l[k]: (3H), 0 at first.
        bias_hh_l[k]: (3H), 0 at first.

    Raises:
        ValueError: Unknown `backend`, sizes or `eps` that are not positive, or `dropout` or
            `recurrent_dropout` outside [0, 1].
        TypeError: Sizes that are not int; `bias`, `batch_first` or `recompute` that are not bool.

    Sources: Ba et al. 2016 (arXiv:1607.06450); haste (lmnt-com/haste).

    Example:
        >>> rnn = LayerNormGRU(10, 20, 2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
    """

    layer_norm = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        eps: float = 1e-5,
        backend: str = "auto",
        recompute: bool = False,
        recurrent_dropout: float = 0.0,
    ) -> None:
        """See the class."""
        check_choice("backend", backend, NAMES)
        check_flag("recompute", recompute)
        check_probability("recurrent_dropout", recurrent_dropout)
        if not isinstance(eps, (int, float)) or not 0 < eps < float("inf"):
            raise ValueError(f"eps: expected a positive number, got {eps!r}")
        self.eps = float(eps)
        self.backend = backend
        self.recompute = recompute
        self.recurrent_dropout = recurrent_dropout
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._add_gains()

    def _add_gains(self) -> None:
        for names in self._all_weights:
            for side in ("ih", "hh"):
                weight = getattr(self, names[0].replace("_ih_", f"_{side}_"))
                gain = names[0].replace("weight_ih_", f"gamma_{side}_")
                setattr(self, gain, nn.Parameter(weight.new_ones(weight.shape[0])))
                names.insert(2 if side == "ih" else 3, gain)
        self._flat_weights_names = [name for names in self._all_weights for name in names]

    def reset_parameters(self) -> None:
        """Draw all parameters as `torch.nn.GRU` does, but for gains, which are 1, and biases, 0."""
        bound = self.hidden_size**-0.5
        for name, parameter in self.named_parameters():
            if name.startswith(("gamma_ih_l", "gamma_hh_l")):
                nn.init.ones_(parameter)
            elif name.startswith(("bias_ih_l", "bias_hh_l")):
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """`torch.nn.GRU`'s, and the extras that are not at their defaults."""
        text = super().extra_repr()
        if self.eps != 1e-5:
            text += f", eps={self.eps}"
        return text + options_repr(
            "reset_after",
            self.backend,
            recompute=self.recompute,
            recurrent_dropout=self.recurrent_dropout,
        )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset_mask: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run all layers over a sequence.

        Args:
            input: (T, B, I), (B, T, I) with `batch_first`, (T, I) for one sequence without a
                batch dimension, or a `PackedSequence`. T and B may be 0.
            hx: Initial state (L * D, B, H), or (L * D, H) with a (T, I) input; any strides.
                None means zeros.
            lengths: As in `gru_fast.GRU`.
            reset_mask: As in `gru_fast.GRU`.
            reset_state: As in `gru_fast.GRU`.

        Returns:
            `output`: (T, B, D * H) in the layout of `input`, the last layer's h of every step, or
            a `PackedSequence`; and `h_n`: (L * D, B, H), each layer's and direction's last state.

        Raises:
            ValueError: `input` is not 2-D or 3-D, or not of the weights' dtype; or `lengths` is
                given beside a `PackedSequence`, which has its own.
            TypeError: `lengths`, `reset_mask`, `reset_state` or a weight is not a Tensor.
            RuntimeError: A shape, dtype or device does not fit, or `backend` was named and cannot
                take the call.
        """
        if is_traced(self, input):
            return node_of_call(  # type: ignore[no-any-return]
                self, input, hx, lengths=lengths, reset_mask=reset_mask, reset_state=reset_state
            )
        refuse_tracing("LayerNormGRU")
        weights = weights_of(self)  # once: each look evaluates the parametrizations
        h_scale = None
        if self.recurrent_dropout and self.training:
            shape = state_shape(
                input, self.num_layers, self.bidirectional, self.hidden_size, self.batch_first
            )
            h_scale = state_scale(self.recurrent_dropout, shape, weights[0])
        return run_layers(
            input,
            hx,
            weights,
            partial(norm_layer, eps=self.eps, backend=self.backend, recompute=self.recompute),
            num_layers=self.num_layers,
            dropout=self.dropout if self.training else 0.0,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            kinds=_KINDS,
            lengths=lengths,
            reset_mask=reset_mask,
            reset_state=reset_state,
            h_scale=h_scale,
        )
