# SPDX-License-Identifier: Apache-2.0
"""`patch`, `unpatch` and `patched`: gru_fast's classes under torch's names.

For code that builds `torch.nn.GRU` itself. Where a model is at hand, `convert` is the better way:
it changes nothing but that model. docs/patch.md tells what a patch reaches and what it cannot.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gru_fast.convert import FAST_CLASSES

__all__ = ["patch", "patched", "unpatch"]

_MODULES = (nn, nn.modules, nn.modules.rnn)


def patch() -> None:
    """Bind `torch.nn.GRU` and `torch.nn.GRUCell`, and the same names below it, to our classes.

    From here on `torch.nn.GRU(...)` makes a `gru_fast.GRU`, in all threads, until `unpatch`. Names
    that were taken before (`from torch.nn import GRU`), modules that exist and classes that were
    derived stay torch's. A second call changes nothing.
    """
    for module in _MODULES:
        for torch_class, fast in FAST_CLASSES.items():
            setattr(module, torch_class.__name__, fast)


def unpatch() -> None:
    """Bind the names to torch's classes again; modules that were made meanwhile stay ours.

    A name that something else has bound since is left alone. Without a patch it does nothing.
    """
    for module in _MODULES:
        for torch_class, fast in FAST_CLASSES.items():
            if getattr(module, torch_class.__name__) is fast:
                setattr(module, torch_class.__name__, torch_class)


@contextmanager
def patched() -> Iterator[None]:
    """`patch` for the length of a `with` block, or of a function that it decorates.

    What was bound before, a patch included, is bound again afterwards, also after an exception.

    Example:
        >>> with gru_fast.patched():
        ...     model = Model()
    """
    before = {
        (module, name): getattr(module, name)
        for module in _MODULES
        for name in (torch_class.__name__ for torch_class in FAST_CLASSES)
    }
    patch()
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
