# SPDX-License-Identifier: Apache-2.0
"""What the modules share: their options, and a stack of layers that keeps no list of weights."""

from collections.abc import Iterable
from operator import is_
from typing import Any

import torch
from torch import nn

__all__ = [
    "CANDIDATES",
    "DEFAULT_CELL",
    "Recurrent",
    "check_choice",
    "check_flag",
    "check_int",
    "check_probability",
    "is_traced",
    "node_of_call",
    "options_repr",
    "refuse_tracing",
    "weights_of",
]

DEFAULT_CELL = "reset_after"
CANDIDATES = {
    "reset_after": "n = tanh(W_in x + b_in + r * (W_hn h + b_hn))",
    "reset_before": "n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)",
    "no_reset": "n = tanh(W_in x + b_in + W_hn h + b_hn)",
}


def check_choice(argument: str, given: str, expected: Iterable[str]) -> None:
    """Raise a ValueError unless `given` is one of `expected`."""
    if given not in tuple(expected):
        names = ", ".join(map(repr, expected))
        raise ValueError(f"{argument}: expected one of {names}, got {given!r}")


def check_flag(argument: str, given: object) -> None:
    """Raise a TypeError unless `given` is a bool, as torch does."""
    if not isinstance(given, bool):
        raise TypeError(f"{argument} should be of type bool, got: {type(given).__name__}")


def check_int(argument: str, given: object) -> None:
    """Raise a TypeError unless `given` is an int, which a bool is not here."""
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{argument} should be of type int, got: {type(given).__name__}")


def check_probability(argument: str, given: object) -> None:
    """Raise a ValueError unless `given` is a number in [0, 1]."""
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= 1:
        raise ValueError(f"{argument}: expected a number in [0, 1], got {given!r}")


def options_repr(cell: str, backend: str, **others: object) -> str:
    """The options that are not at their defaults, as the tail of an `extra_repr`."""
    text = ""
    if cell != DEFAULT_CELL:
        text += f", cell={cell!r} ({CANDIDATES[cell]})"
    if backend != "auto":
        text += f", backend={backend!r}"
    return text + "".join(f", {name}={value}" for name, value in others.items() if value)


def is_traced(module: nn.Module, input: object) -> bool:
    """Whether `torch.fx.symbolic_trace` of a larger module is calling this one."""
    return isinstance(input, torch.fx.Proxy) and getattr(input.tracer, "root", None) is not module


def node_of_call(module: nn.Module, input: Any, hx: object, **options: object) -> Any:
    """The `call_module` node that stands for a module, as for everything in `torch.nn`.

    A tracer walks into modules that are not torch's own, unless told otherwise.
    """
    arguments = (input,) if hx is None else (input, hx)
    given = {name: value for name, value in options.items() if value is not None}
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, given)


def refuse_tracing(what: str) -> None:
    """Raise a RuntimeError if `torch.jit.trace`, or ONNX's exporter built on it, is recording.

    They cannot record the ops of this library, and say so in words about lists of bool.
    """
    if torch._C._get_tracing_state():
        raise RuntimeError(
            f"torch.jit.trace can record only what torch.nn.GRU has, got {what}; use torch.export "
            "or torch.onnx.export(..., dynamo=True)"
        )


class Unscriptable:
    """The answer to `torch.jit.script`, which cannot compile optional keywords."""

    def __prepare_scriptable__(self) -> Any:
        """`torch.jit.script` calls it first."""
        raise RuntimeError(
            f"torch.jit.script cannot compile gru_fast.{type(self).__name__}; use torch.jit.trace, "
            "torch.compile or torch.export, or gru_fast.revert(model) first"
        )


class Recurrent(Unscriptable, nn.RNNBase):
    """`nn.RNNBase` without its stored list of weights: what our stacks of layers have in common."""

    _given_weights: tuple[list[Any], list[Any]] | None = None
    """A list that was assigned to `_flat_weights`, and the module's own weights at that time."""

    @property
    def _flat_weights(self) -> list[Any]:
        # Not a stored list as in RNNBase: a stored one goes stale under functional_call.
        params = self._parameters
        try:
            own = [params[name] for name in self._flat_weights_names]
        except KeyError:  # parametrized, weight_norm, a DataParallel replica, partly built
            own = [getattr(self, name, None) for name in self._flat_weights_names]
        given = self._given_weights
        if given is None or not all(map(is_, given[1], own)):
            return own
        return given[0]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any] | None) -> None:
        # Layers of others assign dropped or quantized weights for the length of a call. As in
        # RNNBase they hold until the module is moved or has another weight.
        self.__dict__.pop("_given_weights", None)
        own = self._flat_weights
        if value is not None and not (len(value) == len(own) and all(map(is_, value, own))):
            self.__dict__["_given_weights"] = value, own

    def _init_flat_weights(self) -> None:
        self.__dict__.pop("_given_weights", None)
        self.flatten_parameters()

    def _update_flat_weights(self) -> None:
        pass

    def _weights_have_changed(self) -> bool:
        return False

    def flatten_parameters(self) -> None:
        """Do nothing: kernels read each weight where it lies."""

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle and deepcopy, without what is derived from the parameters."""
        state = self.__dict__.copy()
        state.pop("_flat_weight_refs", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state of this class or of `torch.nn.GRU`, also of older versions."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.pop("_flat_weights", None)
        self.__dict__.pop("_flat_weight_refs", None)

    def _replicate_for_data_parallel(self) -> "Recurrent":
        # Not RNNBase's, which copies the stored list of weights.
        replica: Recurrent = nn.Module._replicate_for_data_parallel(self)  # type: ignore[no-untyped-call]
        return replica


def weights_of(module: Recurrent) -> list[Any]:
    """The weights that a call computes with; a TypeError names one that is missing or None."""
    weights = module._flat_weights
    for name, weight in zip(module._flat_weights_names, weights, strict=False):
        if weight is None:
            raise TypeError(f"{name} should be a Tensor, got: NoneType")
    return weights
