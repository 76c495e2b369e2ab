# SPDX-License-Identifier: Apache-2.0
"""A drop-in, high-performance GRU for PyTorch."""

from gru_fast import functional, init, notations
from gru_fast._version import __version__
from gru_fast.backends import available_backends
from gru_fast.cell import GRUCell
from gru_fast.convert import ConvertReport, convert, revert
from gru_fast.explain import Explanation, explain
from gru_fast.explain_generate import explain_generate
from gru_fast.gates import Gates
from gru_fast.gru import GRU
from gru_fast.language_model import GRULanguageModel
from gru_fast.layer_norm_gru import LayerNormGRU
from gru_fast.memory import MemoryEstimate, memory_estimate
from gru_fast.patch import patch, patched, unpatch
from gru_fast.prepack import prepacked
from gru_fast.sampler import Sampler, Stream
from gru_fast.sampling import GenerateOutput
from gru_fast.tbptt import Chunk, tbptt

__all__ = [
    "GRU",
    "Chunk",
    "ConvertReport",
    "Explanation",
    "GRUCell",
    "GRULanguageModel",
    "Gates",
    "GenerateOutput",
    "LayerNormGRU",
    "MemoryEstimate",
    "Sampler",
    "Stream",
    "__version__",
    "available_backends",
    "convert",
    "explain",
    "explain_generate",
    "functional",
    "init",
    "memory_estimate",
    "notations",
    "patch",
    "patched",
    "prepacked",
    "revert",
    "tbptt",
    "unpatch",
]
