# SPDX-License-Identifier: Apache-2.0
"""`convert` and `revert`: swap the GRUs inside any model, in place.

A module keeps its identity: only its class changes. So its parameters, hooks, parametrizations
and flags, the optimisers that hold its parameters, and every place that refers to the module
itself are the very same objects before and after.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn import GRU as TorchGRU
from torch.nn import GRUCell as TorchGRUCell
from torch.nn.utils import parametrize

from gru_fast.cell import GRUCell
from gru_fast.gru import GRU

__all__ = ["ConvertReport", "Selector", "convert", "revert"]

Selector = str | Iterable[str] | Callable[[str, nn.Module], bool]
"""A name or glob pattern (`"decoder.*"`), several of them, or a function of name and module."""

FAST_CLASSES: dict[type, type] = {TorchGRU: GRU, TorchGRUCell: GRUCell}
_OPTIONS = ("cell", "backend", "recompute", "recurrent_dropout", "learn_h0", "num_heads")

_TO_TORCH: dict[type, type] = {fast: torch_class for torch_class, fast in FAST_CLASSES.items()}


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` or `revert` did.

    Attributes:
        model: The model that was given, changed in place.
        converted: Names of the modules whose class was changed, `""` for the model itself. A
            module that is used under several names is listed under each.
        skipped: Name to reason for each GRU that was left as it is.
    """

    model: nn.Module
    converted: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        """One line a module."""
        lines = [f"converted {len(self.converted)}, skipped {len(self.skipped)}"]
        lines += [f"  {name or '(the model itself)'}" for name in self.converted]
        lines += [
            f"  {name or '(the model itself)'} skipped: {reason}"
            for name, reason in self.skipped.items()
        ]
        return "\n".join(lines)


def convert(
    model: nn.Module, include: Selector | None = None, exclude: Selector | None = None
) -> ConvertReport:
    """Turn every `torch.nn.GRU` and `torch.nn.GRUCell` in a model into gru_fast's, in place.

    Modules of a class that is derived from these are left, and reported as skipped.

    Args:
        model: Any module, a `torch.nn.GRU` included.
        include: Convert only the modules that it selects (default: all): a name or a pattern
            with wildcards, as `"decoder.*"`, several of them, or a function that is called with
            a name and a module.
        exclude: Leave the modules that it selects, given as `include`. A module that is used
            under several names is selected when one of them is.

    Returns:
        A report; `print(report)` lists what was converted, and what was not and why.

    Raises:
        TypeError: `model` is not a module, or a selector is none of the accepted forms.
    """
    return _swap(model, include, exclude, FAST_CLASSES)


def revert(
    model: nn.Module, include: Selector | None = None, exclude: Selector | None = None
) -> ConvertReport:
    """Turn every `gru_fast.GRU` and `gru_fast.GRUCell` in a model into torch's, in place.

    Modules with a `cell`, `recurrent_dropout`, `learn_h0` or heads that torch does not have are
    skipped, and those of a `GRULanguageModel`, which cannot do without. Arguments, result and
    errors are `convert`'s.
    """
    return _swap(model, include, exclude, _TO_TORCH)


def _swap(
    model: nn.Module,
    include: Selector | None,
    exclude: Selector | None,
    classes: dict[type, type],
) -> ConvertReport:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got: {type(model).__name__}")
    included = _predicate("include", include)
    excluded = _predicate("exclude", exclude)

    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(isinstance(module, cls) for cls in classes):
            names.setdefault(module, []).append(name)

    converted: list[str] = []
    skipped: dict[str, str] = {}
    new_classes: list[tuple[nn.Module, type]] = []
    for module, aliases in names.items():
        new_class, reason = _new_class(module, classes)
        if include is not None and not any(included(name, module) for name in aliases):
            reason = "not selected by include"
        elif exclude is not None and any(excluded(name, module) for name in aliases):
            reason = "selected by exclude"
        elif classes is _TO_TORCH and any(_is_needed(model, name) for name in aliases):
            reason = "the language model that it belongs to needs it"
        if reason:
            skipped.update(dict.fromkeys(aliases, reason))
        else:
            converted += aliases
            new_classes.append((module, new_class))

    done: list[tuple[nn.Module, type, dict[str, Any]]] = []
    try:
        for module, new_class in new_classes:
            done.append((module, type(module), module.__dict__.copy()))
            module.__class__ = new_class
            if isinstance(module, (GRU, GRUCell)):
                module.__dict__.pop("_flat_weights", None)
                module.__dict__.pop("_flat_weight_refs", None)
            else:
                for name in (*_OPTIONS, "_given_weights"):
                    module.__dict__.pop(name, None)
                if isinstance(module, TorchGRU):
                    module._init_flat_weights()
    except BaseException:
        for module, old_class, attributes in done:
            module.__class__ = old_class
            module.__dict__.clear()
            module.__dict__.update(attributes)
        raise
    return ConvertReport(model, tuple(converted), skipped)


def _is_needed(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return name != "" and getattr(owner, "needs_fast_gru", False) is True


def _new_class(module: nn.Module, classes: dict[type, type]) -> tuple[type, str]:
    """The class to give to a module, or the reason why it stays as it is."""
    old_class = base = type(module)
    parametrized = parametrize.is_parametrized(module)
    if parametrized:
        base = old_class.__bases__[0]  # register_parametrization derives one class per module
    if base not in classes:
        return old_class, f"{base.__module__}.{base.__qualname__} is a subclass"
    reason = _unusable(module)
    if reason or not parametrized:
        return classes[base], reason
    body = {k: v for k, v in vars(old_class).items() if k not in ("__dict__", "__weakref__")}
    return type(old_class.__name__, (classes[base],), body), ""


def _unusable(module: nn.Module) -> str:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if getattr(module, "proj_size", 0):
        return f"proj_size is {module.proj_size}, expected 0"
    if getattr(module, "cell", "reset_after") != "reset_after":
        return f"torch has no cell={module.cell!r}"
    for option in ("recurrent_dropout", "learn_h0"):
        if getattr(module, option, False):
            return f"torch has no {option}"
    if getattr(module, "num_heads", 1) != 1:
        return f"torch has no num_heads={module.num_heads}"
    hidden = module.hidden_size
    assert isinstance(hidden, int)
    for name, shape in _expected_shapes(module, hidden).items():
        weight = getattr(module, name, None)
        given = None if weight is None else tuple(weight.shape)
        if given != shape:
            return f"{name} is {given}, expected {shape}"
    return ""


def _expected_shapes(module: nn.Module, hidden: int) -> dict[str, tuple[int, ...] | None]:
    shapes: dict[str, tuple[int, ...] | None] = {}
    bias = (3 * hidden,) if module.bias else None
    if isinstance(module, nn.RNNCellBase):
        return {
            "weight_ih": (3 * hidden, module.input_size),
            "weight_hh": (3 * hidden, hidden),
            "bias_ih": bias,
            "bias_hh": bias,
        }
    assert isinstance(module, nn.RNNBase)
    directions = ("", "_reverse") if module.bidirectional else ("",)
    for layer in range(module.num_layers):
        width = len(directions) * hidden if layer else module.input_size
        for suffix in directions:
            shapes[f"weight_ih_l{layer}{suffix}"] = (3 * hidden, width)
            shapes[f"weight_hh_l{layer}{suffix}"] = (3 * hidden, hidden)
            shapes[f"bias_ih_l{layer}{suffix}"] = bias
            shapes[f"bias_hh_l{layer}{suffix}"] = bias
    return shapes


def _predicate(argument: str, selector: Selector | None) -> Callable[[str, nn.Module], bool]:
    if selector is None:
        return lambda name, module: False
    if callable(selector) and not isinstance(selector, (type, nn.Module)):
        return selector
    patterns: list[object] = [selector]
    if isinstance(selector, Iterable) and not isinstance(selector, str):
        patterns = list(selector)
    strings = [pattern for pattern in patterns if isinstance(pattern, str)]
    if len(strings) < len(patterns):
        first = next(pattern for pattern in patterns if not isinstance(pattern, str))
        given = f"the class {first.__name__}" if isinstance(first, type) else type(first).__name__
        raise TypeError(
            f"{argument} should be a name or pattern, several of them, or a function of name and "
            f"module, got: {given}"
        )
    return lambda name, module: any(fnmatchcase(name, pattern) for pattern in strings)
