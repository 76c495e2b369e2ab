# SPDX-License-Identifier: Apache-2.0
"""`GRU`: `torch.nn.GRU` with faster kernels and more cells.

Modules hold parameters and options only. They keep no packed or flattened copy of the weights, so
every way to change a weight (`.data.copy_()`, `.set_()`, a new `Parameter`,
`torch.func.functional_call`, a parametrization) is seen by the next call.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import GRU as TorchGRU
from torch.nn.utils.rnn import PackedSequence

from gru_fast import cudnn, direct, functional
from gru_fast.backends import NAMES
from gru_fast.gates import Gates
from gru_fast.recurrent import (
    CANDIDATES,
    DEFAULT_CELL,
    Recurrent,
    check_choice,
    check_flag,
    check_int,
    check_probability,
    is_traced,
    node_of_call,
    options_repr,
    refuse_tracing,
)
from gru_fast.reference import GATES
from gru_fast.stack import count_layers, state_shape

__all__ = ["GRU"]


class GRU(Recurrent):
    """Multi-layer gated recurrent unit with the interface and numbers of `torch.nn.GRU`.

    For every step of every layer, with reset gate r, update gate z and candidate n:

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))      cell="reset_after", torch.nn.GRU's
            tanh(W_in x + b_in + W_hn (r * h) + b_hn)      cell="reset_before", Cho et al. 2014
            tanh(W_in x + b_in + W_hn h + b_hn)            cell="no_reset", no r at all
        h = (1 - z) * n + z * h

    Positional arguments, parameter names, `state_dict` keys, initial weights for a seed, the
    random stream of dropout and the types of exceptions are `torch.nn.GRU`'s. As there, the
    eighth positional argument is `proj_size`, which a GRU has not and which must be 0.

    Args:
        input_size: Features I of the input.
        hidden_size: Features H of the hidden state.
        num_layers: Stacked layers L.
        bias: Whether the layers have `bias_ih` and `bias_hh`.
        batch_first: Input and output are (B, T, features) instead of (T, B, features).
            `hx` and `h_n` are (L * D, B, H) either way.
        dropout: Probability of the dropout between layers, in training mode.
        bidirectional: Adds a second direction: D = 2, and outputs have 2H features.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        cell: `"reset_after"`, `"reset_before"` or `"no_reset"`.
        backend: `"auto"`, or the name of the backend that must take the calls
            (`gru_fast.available_backends()`).
        recompute: Save only the input and the output for backward and rebuild the gates there:
            less memory for about one more product per step.
        recurrent_dropout: Probability with which a unit of the state is 0 in the recurrent
            products, in training mode: one mask for each row, layer and direction, the same at
            every step and for all gates (Gal and Ghahramani 2016). What is kept of the state
            itself, z * h, is not dropped.
        learn_h0: Adds a parameter `h0`, the state that a call without `hx` begins with and that
            `reset_mask` resets to. It is 0 at first, and when a `state_dict` without it is loaded.
        num_heads: K > 1 makes the recurrent weights block-diagonal: each head has H / K units,
            which see the whole input of the layer, and of the state their own head only. It is
            what a loop over K GRUs of H / K units gives, outputs concatenated. K divides H.

    Attributes:
        weight_ih_l[k]: (N * H, I) for k = 0, else (N * H, D * H). N is 3 (rows of r, z, n), or 2
            (z, n) for `cell="no_reset"`. The second direction adds the suffix `_reverse`.
        weight_hh_l[k]: (N * H, H / num_heads), the columns of a unit's own head.
        bias_ih_l[k]: (N * H).
        bias_hh_l[k]: (N * H).
        h0: (L * D, H), with `learn_h0`.

    Raises:
        ValueError: Unknown `cell` or `backend`, sizes that are not positive, `dropout` or
            `recurrent_dropout` outside [0, 1], a `proj_size`, or a `hidden_size` that `num_heads`
            does not divide.
        TypeError: Sizes or `num_heads` that are not int; `bias`, `batch_first`, `recompute` or
            `learn_h0` that are not bool.

    Sources: Cho et al. 2014 (arXiv:1406.1078); the default candidate is cuDNN's and
    `torch.nn.GRU`'s.

    Example:
        >>> rnn = GRU(10, 20, 2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
    """

    # Class-level, so that states pickled without them, and converted modules, have the defaults.
    cell: str = DEFAULT_CELL
    backend: str = "auto"
    recompute: bool = False
    recurrent_dropout: float = 0.0
    learn_h0: bool = False
    num_heads: int = 1

    @overload
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
        cell: str = DEFAULT_CELL,
        backend: str = "auto",
        recompute: bool = False,
        recurrent_dropout: float = 0.0,
        learn_h0: bool = False,
        num_heads: int = 1,
    ) -> None: ...

    @overload
    def __init__(
        self,
        *args: Any,
        cell: str = DEFAULT_CELL,
        backend: str = "auto",
        recompute: bool = False,
        recurrent_dropout: float = 0.0,
        learn_h0: bool = False,
        num_heads: int = 1,
        **kwargs: Any,
    ) -> None: ...

    def __init__(
        self,
        *args: Any,
        cell: str = DEFAULT_CELL,
        backend: str = "auto",
        recompute: bool = False,
        recurrent_dropout: float = 0.0,
        learn_h0: bool = False,
        num_heads: int = 1,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        check_choice("cell", cell, CANDIDATES)
        check_choice("backend", backend, NAMES)
        check_flag("recompute", recompute)
        check_flag("learn_h0", learn_h0)
        check_probability("recurrent_dropout", recurrent_dropout)
        if "proj_size" in kwargs:
            raise ValueError("proj_size is an argument of LSTM only, GRU has none")
        self.cell = cell
        self.backend = backend
        self.recompute = recompute
        self.recurrent_dropout = recurrent_dropout
        check_int("num_heads", num_heads)
        self.num_heads = num_heads
        super().__init__("GRU", *args, **kwargs)
        if self.proj_size:
            raise ValueError(
                f"proj_size is an argument of LSTM only, expected 0 for GRU, got {self.proj_size}"
            )
        if num_heads < 1 or self.hidden_size % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of hidden_size={self.hidden_size}, got {num_heads}"
            )
        if cell == "no_reset" or num_heads > 1:
            self._reshape_weights()
        self.learn_h0 = learn_h0
        if learn_h0:
            layers = count_layers(self.num_layers, self.bidirectional)
            weight = self.get_parameter("weight_hh_l0")
            self.h0 = nn.Parameter(weight.new_zeros(layers, self.hidden_size))

    def reset_parameters(self) -> None:
        """Draw the weights as `torch.nn.GRU` of a head's size does; `h0` becomes 0.

        An `h0` that pruning or a parametrization computes is drawn as the weights are.
        """
        # RNNBase would draw it too, which is right for an h0 that a derived class has added.
        h0 = self._parameters.pop("h0", None) if self.learn_h0 else None
        try:
            super().reset_parameters()
            if self.num_heads > 1:
                with torch.no_grad():
                    for weight in self.parameters():
                        weight.mul_(self.num_heads**0.5)
        finally:
            if h0 is not None:
                self.h0 = h0
        if h0 is not None:
            nn.init.zeros_(h0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.learn_h0 and "h0" in self._parameters:
            # torch.nn.GRU begins with zeros. Pruning and parametrizations give weights other names.
            names = (k for k in state_dict if k.startswith(prefix) and "weight_ih_l0" in k)
            name = next(names, None)
            if name is not None:
                zeros = state_dict[name].new_zeros(self.h0.shape)
                state_dict.setdefault(prefix + "h0", zeros)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _refuse_tracing(self, *features: object) -> None:
        """Refuse what `torch.nn.GRU`, whose operator is recorded in place of ours, has not."""
        names = ("lengths", "reset_mask", "reset_state", "return_gates")
        for name, given in zip(names, features, strict=True):
            if given is not None and given is not False:
                refuse_tracing(name)
        if self.cell != DEFAULT_CELL or self.backend != "auto":
            refuse_tracing(f"cell={self.cell!r}, backend={self.backend!r}")
        for name in ("num_heads", "learn_h0", "recurrent_dropout"):
            if getattr(self, name) != getattr(GRU, name):
                refuse_tracing(f"{name}={getattr(self, name)}")

    def _start(self, input: Tensor | PackedSequence) -> Tensor:
        """The learned state for each row of an input."""
        shape = state_shape(
            input, self.num_layers, self.bidirectional, self.hidden_size, self.batch_first
        )
        return self.h0 if len(shape) == 2 else self.h0.unsqueeze(1).expand(shape)

    def _reshape_weights(self) -> None:
        rows = GATES[self.cell] * self.hidden_size
        for name in self._flat_weights_names:
            old = getattr(self, name)
            columns = old.shape[1:]
            if name.startswith("weight_hh"):
                columns = (self.hidden_size // self.num_heads,)
            setattr(self, name, nn.Parameter(old.new_empty((rows, *columns))))
        self.reset_parameters()

    def flatten_parameters(self) -> None:
        """Lay the weights of each layer out in one block on CUDA, as cuDNN reads them.

        It is called when the module is made or moved. Our own kernels read each weight where it
        lies: for them, on the CPU, in both directions and for other cells it does nothing.
        """
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return
        weights = self._flat_weights
        if self.cell != DEFAULT_CELL or self.bidirectional or self.num_heads > 1:
            return
        if all(type(w) is nn.Parameter for w in weights):
            for layer in range(self.num_layers):
                count = len(weights) // self.num_layers
                cudnn.flatten(weights[layer * count : (layer + 1) * count])

    def extra_repr(self) -> str:
        """`torch.nn.GRU`'s, and the extras that are not at their defaults."""
        return super().extra_repr() + options_repr(
            self.cell,
            self.backend,
            num_heads=self.num_heads if self.num_heads > 1 else 0,
            recompute=self.recompute,
            recurrent_dropout=self.recurrent_dropout,
            learn_h0=self.learn_h0,
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
        return_gates: Literal[False] = False,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset_mask: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_gates: Literal[False] = False,
    ) -> tuple[PackedSequence, Tensor]: ...

    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_gates: Literal[True],
    ) -> tuple[Tensor | PackedSequence, Tensor, Gates]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_gates: bool = False,
    ) -> tuple[Tensor | PackedSequence, Tensor] | tuple[Tensor | PackedSequence, Tensor, Gates]:
        """Run all layers over a sequence.

        Args:
            input: (T, B, I), (B, T, I) with `batch_first`, (T, I) for one sequence without a
                batch dimension, or a `PackedSequence`. T and B may be 0.
            hx: Initial state (L * D, B, H), or (L * D, H) with a (T, I) input; any strides.
                None means zeros, or `h0`.
            lengths: (B,) int64 or int32, on any device, in any order, 0 <= length <= T: steps from
                there on output 0 and leave the state as it is. Not with a `PackedSequence`.
            reset_mask: (T, B) bool, or (B, T) with `batch_first`: True where step t begins a new
                sequence. The state is replaced there, and no gradient crosses.
            reset_state: What the state is replaced by, shaped as `hx`; None means zeros, or `h0`.
            return_gates: Whether to return the values of the gates too. All of them are kept for
                backward then, also with `recompute`.

        Returns:
            `output`: (T, B, D * H) in the layout of `input`, the last layer's h of every step, or
            a `PackedSequence`; and `h_n`: (L * D, B, H), each layer's and direction's last state.
            With `return_gates` also `gru_fast.Gates`: `r`, `z` and `n`, each (L * D, T, B, H), or
            (L * D, B, T, H) with `batch_first`.

        Raises:
            ValueError: `input` is not 2-D or 3-D, or not of the weights' dtype; or `lengths` is
                given beside a `PackedSequence`, which has its own.
            TypeError: `lengths`, `reset_mask` or `reset_state` is not a Tensor.
            RuntimeError: A shape, dtype or device does not fit, or `backend` was named and cannot
                take the call.
        """
        if isinstance(input, Proxy) and is_traced(self, input):
            return node_of_call(
                self, input, hx, lengths=lengths, reset_mask=reset_mask, reset_state=reset_state,
                return_gates=return_gates or None,
            )  # fmt: skip
        if torch._C._get_tracing_state():
            self._refuse_tracing(lengths, reset_mask, reset_state, return_gates)
            return TorchGRU.forward(self, input, hx)  # type: ignore[call-overload, no-any-return]
        if self.learn_h0 and (hx is None or reset_mask is not None):
            start = self._start(input)
            hx = start if hx is None else hx
            if reset_mask is not None and reset_state is None:
                reset_state = start
        # Once: each look evaluates the parametrizations.
        weights = self._flat_weights
        if (
            reset_state is None
            and not return_gates
            and not (self.training and (self.dropout or self.recurrent_dropout))
        ):
            # functional.gru would come to the same: passing on its arguments takes as long as all
            # else of Python in a small call.
            done = direct.gru(
                input, hx, weights, self.num_layers, self.bias, self.bidirectional,
                self.batch_first, lengths, reset_mask, self.num_heads, self.cell, self.backend,
            )  # fmt: skip
            if done is not None:
                return done
        either: Any = input
        return functional.gru(
            either,
            hx,
            weights,
            num_layers=self.num_layers,
            bias=self.bias,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            cell=self.cell,
            backend=self.backend,
            recompute=self.recompute,
            num_heads=self.num_heads,
            lengths=lengths,
            reset_mask=reset_mask,
            reset_state=reset_state,
            recurrent_dropout=self.recurrent_dropout,
            return_gates=return_gates,
        )
