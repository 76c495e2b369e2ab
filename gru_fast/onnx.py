# SPDX-License-Identifier: Apache-2.0
"""To and from ONNX. Importing this module makes `torch.onnx.export` know gru_fast's operators.

Needs the extra `onnx`. `gru_fast.onnx.export` is `torch.onnx.export` and then folds what its graph
computes from weights alone; `load_gru` makes a module of a GRU node. What ONNX can express is in
docs/onnx.md.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

try:
    import onnx  # noqa: F401
    import onnxscript.optimizer
except ImportError as error:
    raise ImportError(
        f"gru_fast.onnx needs onnx and onnxscript (pip install 'gru_fast[onnx]'): {error}"
    ) from error
import torch

from gru_fast.language_model import GRULanguageModel
from gru_fast.onnx_nodes import ReverseGRU, from_node, load_gru
from gru_fast.onnx_translation import register, translation_table
from gru_fast.sampled_model import a_weight

__all__ = [
    "ReverseGRU",
    "export",
    "export_language_model",
    "from_node",
    "load_gru",
    "translation_table",
]

register()

_SAVING = {
    "export_params": "include_initializers",
    "keep_initializers_as_inputs": "keep_initializers_as_inputs",
    "external_data": "external_data",
}


def export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: Any = (),
    f: str | os.PathLike[str] | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """`torch.onnx.export` for models with gru_fast's layers, the weights folded into the nodes.

    Args:
        model: As there: any module that has gru_fast layers in it, or an ExportedProgram.
        args: Example inputs. Sizes that are to vary go into `dynamic_shapes`.
        f: Path of the file, or None.
        **options: All others of `torch.onnx.export`. Entries of a `custom_translation_table` go
            before gru_fast's.

    Returns:
        The `torch.onnx.ONNXProgram`.

    Raises:
        ValueError: `dynamo=False`: the TorchScript exporter cannot see the operators.
        torch.onnx.OnnxExporterError: The model cannot be captured, or its graph says what ONNX
            cannot; the cause is chained.
    """
    if not options.pop("dynamo", True):
        raise ValueError("dynamo: expected True, TorchScript's exporter knows no gru_fast operator")
    saving = _saving_options(options)
    table = {**translation_table(), **(options.pop("custom_translation_table", None) or {})}
    with warnings.catch_warnings():
        # torch warns that a second axis of the same name gets no name but that.
        same_name = r"# The axis name: (\S+) will not be used, .* with another axis: \1\."
        warnings.filterwarnings("ignore", same_name, UserWarning)
        program = torch.onnx.export(
            model, args, dynamo=True, custom_translation_table=table, **options
        )
    assert program is not None
    _fold(program)
    if f is not None:
        program.save(f, **saving)
    return program


def _saving_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take what `ONNXProgram.save` wants out of the options of `torch.onnx.export`."""
    given = {new: options.pop(old) for old, new in _SAVING.items() if old in options}
    return {"external_data": True, **given}


def _fold(program: torch.onnx.ONNXProgram) -> None:
    """Compute what depends on weights only: W, R and B of the nodes become initializers."""
    everything = 1 << 62
    onnxscript.optimizer.fold_constants(
        program.model, input_size_limit=everything, output_size_limit=everything
    )
    onnxscript.optimizer.remove_unused_nodes(program.model)


def export_language_model(
    model: GRULanguageModel, f: str | os.PathLike[str] | None = None, **options: Any
) -> torch.onnx.ONNXProgram:
    """The language model as a step: token ids and state in, logits and state out.

    Inputs `tokens` (B, T) int64 and `hidden` (L, B, H); outputs `logits` (B, T, V) and
    `next_hidden` (L, B, H). B and T vary: a prompt is fed at once, drawn tokens one at a time.
    Token id V stands for the zero vector that precedes the first token; the metadata entry
    `start_token_id` says so.

    Args:
        model: It is exported in eval mode, without dropout.
        f: Path of the file, or None.
        **options: Of `export`.

    Returns:
        The `torch.onnx.ONNXProgram`.

    Raises:
        TypeError: `model` is not a `GRULanguageModel`.
    """
    if not isinstance(model, GRULanguageModel):
        raise TypeError(f"model should be a GRULanguageModel, got: {type(model).__name__}")
    weight = a_weight(model)
    tokens = torch.zeros(2, 3, dtype=torch.int64, device=weight.device)
    hidden = weight.new_zeros(model.gru.num_layers, 2, model.gru.hidden_size)
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    defaults: dict[str, Any] = {
        "input_names": ["tokens", "hidden"],
        "output_names": ["logits", "next_hidden"],
        "dynamic_shapes": {"inputs": {0: batch, 1: steps}, "hidden": {1: batch}},
    }
    saving = _saving_options(options)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        program = export(model, (tokens, hidden), **{**defaults, **options})
    finally:
        for module in training:
            module.training = True
    program.model.metadata_props["start_token_id"] = str(model.start)
    if f is not None:
        program.save(f, **saving)
    return program
