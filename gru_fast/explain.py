# SPDX-License-Identifier: Apache-2.0
"""`explain`: which kernel takes a call, why the others do not, and what the call costs at least."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gru_fast import backends, measured
from gru_fast.cell import GRUCell
from gru_fast.checks import check_rows
from gru_fast.gru import GRU
from gru_fast.layer_norm_gru import LayerNormGRU
from gru_fast.recurrence_norm import needs_composition
from gru_fast.recurrent import weights_of
from gru_fast.reference import GATES, SLOTS
from gru_fast.reference_norm import NORM_SLOTS
from gru_fast.stack import check_input_width

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found out; `print()` shows it as text.

    Attributes:
        call: The call in words: sizes, dtype, device.
        backend: Name of the backend that takes the call; None if the call raises.
        kernel: The code that runs, with the instruction set on CPU.
        why_not: Name of a backend, or of a form of the GPU's sampler (`generate_cta`), to the
            reason why it does not take the call.
        error: Text of the RuntimeError that the call raises because a backend was asked for by
            name that cannot take it, or None.
        flops: Floating-point operations of the matrix products of the forward call, a
            multiply-add counted as two. Padding past `lengths` is not counted.
        bytes: Bytes that the forward call moves at least: every input, weight and result once,
            and what is saved for backward.
        saved_bytes: The part of `bytes` that is the workspace saved for backward.
        backward_flops: Floating-point operations of the products of backward; 0 if the call
            records none.
        dependent_steps: Time steps, over all layers, that have to run one after the other.
        bound_seconds: Time of the forward call that the given peaks allow at best,
            max(flops / peak_flops, bytes / peak_bytes), or None without both peaks.
        measured_seconds: What a call of these sizes took in the committed benchmark run, forward
            and, in training, backward with every gradient; None: not measured.
        measured_bound_seconds: The time that the peaks of that machine allow at best, or None.
        measured_on: That machine, and its number of threads.
    """

    call: str
    backend: str | None
    kernel: str
    why_not: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    flops: int = 0
    bytes: int = 0
    saved_bytes: int = 0
    backward_flops: int = 0
    dependent_steps: int = 0
    bound_seconds: float | None = None
    measured_seconds: float | None = None
    measured_bound_seconds: float | None = None
    measured_on: str | None = None

    def __str__(self) -> str:
        """Several lines of text."""
        taken = (
            f"raises RuntimeError: {self.error}"
            if self.error
            else f"{self.backend} ({self.kernel})"
        )
        bound = "unknown without peak_flops= and peak_bytes="
        if self.bound_seconds is not None:
            bound = f"at least {_unit(self.bound_seconds, 's')}"
        width = max(11, *(len(name) + 2 for name in self.why_not))
        lines = [
            self.call,
            f"  taken by   {taken}",
            *(f"  not {name + ':':<{width}}{reason}" for name, reason in self.why_not.items()),
            f"  forward    {_unit(self.flops, 'FLOP')}, {_unit(self.bytes, 'B')} moved at least, "
            f"{self.dependent_steps} steps one after the other",
        ]
        if self.backward_flops:
            lines.append(
                f"  backward   {_unit(self.backward_flops, 'FLOP')}, "
                f"{_unit(self.saved_bytes, 'B')} saved for it beside the output"
            )
        figure = "not measured"
        if self.measured_seconds is not None:
            passes = "forward and backward" if self.backward_flops else "forward"
            figure = f"{passes} {_unit(self.measured_seconds, 's')}"
            if self.measured_bound_seconds is not None:
                figure += f" where {_unit(self.measured_bound_seconds, 's')} is the bound"
            figure += f", on {self.measured_on}"
        return "\n".join([*lines, f"  bound      {bound}", f"  measured   {figure}"])


def explain(
    module: GRU | GRUCell | LayerNormGRU,
    input: Tensor | PackedSequence,
    hx: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
    return_gates: bool = False,
    peak_flops: float | None = None,
    peak_bytes: float | None = None,
) -> Explanation:
    """Explain the call `module(input, hx, ...)` without running it.

    What it says depends, as the call does, on grad mode and on live transforms: call it in the
    same context.

    Args:
        module: A `gru_fast.GRU`, `gru_fast.GRUCell` or `gru_fast.LayerNormGRU`.
        input: As in the call.
        hx: As in the call.
        lengths: As in the call; their values are read.
        reset_mask: As in the call.
        reset_state: As in the call.
        return_gates: As in the call.
        peak_flops: Peak of the machine in FLOP/s for the dtype.
        peak_bytes: Peak of the machine's memory in B/s.

    Returns:
        An `Explanation`.

    Raises:
        TypeError: `module` is none of these, `input` is not a Tensor or `PackedSequence`,
            `lengths`, `reset_mask` or `reset_state` not a Tensor, or an argument given that the
            module does not take.
        ValueError: `input` has too few or too many dimensions.
        RuntimeError: The width of `input`, or `lengths` or `reset_mask`, does not fit.
    """
    if not isinstance(module, (GRU, GRUCell, LayerNormGRU)):
        raise TypeError(
            "module should be a gru_fast.GRU (or GRUCell, LayerNormGRU), got: "
            f"{type(module).__module__}.{type(module).__qualname__} (gru_fast.convert turns "
            "torch.nn.GRU into one)"
        )
    if not isinstance(input, (Tensor, PackedSequence)):
        raise TypeError(f"input should be a Tensor, got: {type(input).__name__}")
    extras: dict[str, Tensor | bool | None] = {}
    if not isinstance(module, GRU):
        extras["return_gates"] = return_gates or None
    if isinstance(module, GRUCell):
        extras |= {"lengths": lengths, "reset_mask": reset_mask, "reset_state": reset_state}
    for name, extra in extras.items():
        if extra is not None:
            raise TypeError(f"{name}: {type(module).__name__} has no such argument")
    data = input.data if isinstance(input, PackedSequence) else input
    if isinstance(input, Tensor):
        fewest = 1 if isinstance(module, GRUCell) else 2
        if not fewest <= input.dim() <= fewest + 1:
            raise ValueError(
                f"input: expected {fewest} or {fewest + 1} dimensions, got {input.dim()}"
            )
        if not isinstance(module, GRUCell):
            check_rows(input.shape[:-1], module.batch_first, lengths, reset_mask, reset_state)
    with _undisturbed(module):
        weights = module._own_weights() if isinstance(module, GRUCell) else weights_of(module)
        h0 = module.h0 if getattr(module, "learn_h0", False) else None
    check_input_width(data, weights[0])
    facts: dict[str, Any] = {
        "lengths": lengths is not None or isinstance(input, PackedSequence),
        "resets": reset_mask is not None,
        "h_scale": module.training and getattr(module, "recurrent_dropout", 0.0) > 0,
        "gates": return_gates,
        "grouped": getattr(module, "num_heads", 1) > 1,
        "composed": backends.needs_composition(data),
    }
    given = weights[0].dtype if torch._C._is_any_autocast_enabled() else data.dtype
    dtype = backends.dtype_of_call(data.device.type, given)
    T, B, steps = _sizes(module, input, lengths)
    facts["empty"] = T == 0 or B == 0
    if hx is not None and (reset_mask is None or reset_state is not None):
        h0 = None
    tensors = (data, hx, reset_state, h0, *weights)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    heads = getattr(module, "num_heads", 1)
    directions = 2 if getattr(module, "bidirectional", False) else 1
    groups = heads * directions
    recompute = getattr(module, "recompute", False) and not return_gates
    sizes = (T, B, groups, module.hidden_size // heads)
    preferred = None
    select: Callable[[], str]
    if isinstance(module, LayerNormGRU):
        norm: dict[str, Any] = {
            "unfit": backends.norm_unfit(data.device, dtype, sizes[3], _is_plain(facts)),
            "composed": needs_composition(data),
        }
        why_not = backends.why_not_norm(data.device.type, dtype, **norm)
        select = partial(backends.select_norm, module.backend, data.device.type, dtype, **norm)
    else:
        place = (data.device.type, dtype, module.cell)
        why_not = backends.why_not(*place, **facts)
        if data.is_cuda and module.backend == "auto":
            preferred = backends.why_cudnn(data.device, dtype, sizes, module.cell, training)
        select = partial(
            backends.select, module.backend, *place, **facts, prefer_cudnn=preferred is not None
        )
    error = backend = None
    try:
        backend = select()
    except RuntimeError as raised:
        error = str(raised)
    if backend is not None and module.backend != "auto":
        named = f"backend={module.backend!r} was asked for"
        why_not = dict.fromkeys((*backends.available_backends(), *why_not), named) | why_not
    elif backend == "cudnn" and preferred is not None:
        why_not.setdefault("triton", f"cuDNN takes this call: {preferred}")
    elif backend == "triton":
        why_not.setdefault("cudnn", "a Triton kernel was measured faster near this size")
    why_not.pop(backend or "", None)

    kept = return_gates or (training and not recompute)
    flops, moved, workspace = _cost(module, hx, T, B, steps, kept)
    moved, workspace = moved * dtype.itemsize, workspace * dtype.itemsize
    first = 2 * steps * weights[0].numel() * directions
    backward = 2 * flops - (0 if data.requires_grad else first) + (flops if recompute else 0)
    bound = None
    if peak_flops is not None and peak_bytes is not None:
        bound = max(flops / peak_flops, moved / peak_bytes)
    shown = str(data.dtype).removeprefix("torch.")
    kernel = _kernel(backend, module, data.device, dtype, sizes, kept, facts)
    plain = not any(facts.values())
    seconds, committed_bound, machine = _committed(
        _code(backend, kernel, module) if plain else None, module, data, T, B, dtype, training
    )
    return Explanation(
        call=f"{module}, {'training' if training else 'inference'}, input T={T} B={B} "
        f"I={data.shape[-1]} {shown} {data.device}",
        backend=backend,
        kernel=kernel,
        why_not=why_not,
        error=error,
        flops=flops,
        bytes=moved,
        saved_bytes=workspace if training else 0,
        backward_flops=backward if training else 0,
        dependent_steps=T * getattr(module, "num_layers", 1),
        bound_seconds=bound,
        measured_seconds=seconds,
        measured_bound_seconds=committed_bound,
        measured_on=machine,
    )


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Parametrizations in evaluation mode: in training, a look at the weight may change them.

    Spectral normalisation takes a step of its power iteration.
    """
    computed = getattr(module, "parametrizations", None)
    modes = {} if computed is None else {part: part.training for part in computed.modules()}
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _code(backend: str | None, kernel: str, module: GRU | GRUCell | LayerNormGRU) -> str | None:
    """The name of what runs in `measured`."""
    if backend == "cpu":
        return "cpu.cell" if isinstance(module, GRUCell) else "cpu"
    return kernel.split(", ")[1] if kernel.startswith("Triton, ") else None


def _committed(
    code: str | None,
    module: GRU | GRUCell | LayerNormGRU,
    data: Tensor,
    T: int,
    B: int,
    dtype: torch.dtype,
    training: bool,
) -> tuple[float | None, float | None, str | None]:
    """Seconds, bound and machine of the committed figure; None where there is none.

    Figures are of one layer and one direction of the default cell, with biases.
    """
    options = {
        "num_layers": 1,
        "bidirectional": False,
        "bias": True,
        "cell": "reset_after",
        "recompute": False,
        "recurrent_dropout": 0.0,
        "num_heads": 1,
        "layer_norm": False,
    }
    if code is None or any(getattr(module, n, value) != value for n, value in options.items()):
        return None, None, None
    name = str(dtype).removeprefix("torch.")
    if (
        data.is_cuda
        and name == "float32"
        and getattr(torch.backends.cudnn.rnn, "fp32_precision", None) == "tf32"
    ):
        name = "tf32"
    threads = 0 if data.is_cuda else torch.get_num_threads()
    suite = "train" if training else "infer"
    key = (code, suite, name, threads, data.shape[-1], module.hidden_size, B, T)
    if key not in measured.MEASURED:
        return None, None, None
    seconds, bound = measured.MEASURED[key]
    machine = measured.MACHINES[data.device.type]
    if threads:
        machine += f", {threads} thread{'s' if threads > 1 else ''}"
    return seconds * 1e-6, bound * 1e-6 or None, machine


def _is_plain(facts: dict[str, Any]) -> bool:
    return not (facts["lengths"] or facts["resets"] or facts["h_scale"])


def _kernel(
    backend: str | None,
    module: GRU | GRUCell | LayerNormGRU,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    kept: bool,
    facts: dict[str, Any],
) -> str:
    """The code that runs; `kept` is whether the gates are written to memory."""
    if backend is None:
        return "none"
    if backend == "cpu":
        from gru_fast import _C

        if dtype not in (torch.bfloat16, torch.float16):
            return f"C++, {_C.cpu_isa()}"
        narrow = dtype == torch.bfloat16 and _C.multiplies_bfloat16()
        return f"C++, {_C.cpu_isa()}, {'bfloat16 products' if narrow else 'computes in float32'}"
    if backend == "cudnn":
        return "cuDNN, through PyTorch"
    if backend == "triton":
        if 0 in sizes:
            return "none: the call is empty"
        if isinstance(module, LayerNormGRU):
            return "Triton, norm, because it fits; not measured"
        kernels = import_module("gru_fast.kernels")
        suite = "train" if kept else "infer"
        plain = _is_plain(facts)
        name, measured = kernels.chosen(device, dtype, sizes, module.cell, suite, plain)
        how = "as measured" if measured else "because it fits; not measured at this size"
        return f"Triton, {name}, {how}"
    return "PyTorch operations"


def _sizes(
    module: nn.Module, input: Tensor | PackedSequence, lengths: Tensor | None
) -> tuple[int, int, int]:
    """T, B and the number of (time step, row) pairs that are not padding."""
    if isinstance(input, PackedSequence):
        return len(input.batch_sizes), int(input.batch_sizes[0]), len(input.data)
    if isinstance(module, GRUCell):
        B = 1 if input.dim() == 1 else input.shape[0]
        return 1, B, B
    if input.dim() == 2:
        return input.shape[0], 1, input.shape[0]
    T, B = input.shape[:2]
    if module.batch_first:
        T, B = B, T
    return T, B, T * B if lengths is None else int(lengths.sum())


def _cost(
    module: GRU | GRUCell | LayerNormGRU,
    hx: Tensor | None,
    T: int,
    B: int,
    steps: int,
    kept: bool,
) -> tuple[int, int, int]:
    """FLOP of the forward call, values moved and, among them, those of the gates if kept."""
    H, vectors = module.hidden_size, 2 if module.bias else 0
    if isinstance(module, LayerNormGRU):
        # rstd, one value a row, is left out.
        N, S, vectors = 3, NORM_SLOTS, vectors + 2
    else:
        N, S = GATES[module.cell], SLOTS[module.cell]
    layers, heads = getattr(module, "num_layers", 1), getattr(module, "num_heads", 1)
    directions = 2 if getattr(module, "bidirectional", False) else 1
    flops = moved = workspace = 0
    width = module.input_size
    for _ in range(layers):
        flops += 2 * steps * directions * N * H * (width + H // heads)
        moved += steps * (width + directions * H)
        moved += directions * N * H * (width + H // heads + vectors)
        moved += directions * B * H * (1 if hx is None else 2)
        workspace += steps * directions * S * H if kept else 0
        width = directions * H
    return flops, moved + workspace, workspace


def _unit(value: float, unit: str) -> str:
    scales = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u"))
    factor, prefix = next((s for s in scales if value >= s[0]), (1, ""))
    return f"{value / factor:.3g} {prefix}{unit}"
