# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, installed as ``gru_fast.kernels``: the operators on CUDA tensors, and `generate`.

`layer`, `scan`, `layer_backward` and `scan_backward` take and return what the ops of those names
do, and a last argument `kernel`: a name of `KERNELS` for a benchmark or a test, None to choose.
`norm_scan` and `norm_scan_backward` are those of the layer-normalised GRU.
`generate` draws tokens from a model that `weights_of` made, by `Rules`.

Modules here import torch and triton only, and each other by relative imports: never ``gru_fast``.
Nothing here is imported before the first call with CUDA tensors, and triton not before the first
launch: `gru_fast` works without it. How the kernels work: docs/gpu-kernels.md.
"""

from importlib import import_module
from typing import Any

from . import measured
from .generate import chosen_form, generate, why_not_form
from .generate_tables import FORMS
from .generation import Rules, weights_of
from .norm_tables import why_not as norm_why_not
from .problem import DTYPES
from .registry import KERNELS, chosen, why_cudnn, why_not

__all__ = [
    "DTYPES", "FORMS", "KERNELS", "Rules", "chosen", "chosen_form", "generate", "layer",
    "layer_backward", "measured", "norm_scan", "norm_scan_backward", "norm_why_not", "scan",
    "scan_backward", "weights_of", "why_cudnn", "why_not", "why_not_form",
]  # fmt: skip

_OPS = ("layer", "scan", "layer_backward", "scan_backward")
_NORM_OPS = ("norm_scan", "norm_scan_backward")


def __getattr__(name: str) -> Any:
    if name in _OPS:
        return getattr(import_module(".ops", __name__), name)
    if name in _NORM_OPS:
        return getattr(import_module(".norm_ops", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
