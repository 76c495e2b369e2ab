# SPDX-License-Identifier: Apache-2.0
"""`generate` on CUDA by the Triton kernels: who can take a call, and the call."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gru_fast import backends
from gru_fast.autocast import without_autocast
from gru_fast.recurrent import weights_of
from gru_fast.sampled_model import LanguageModel, a_weight, why_not_layers

__all__ = ["chosen_form", "generate", "why_not", "why_not_form", "why_not_forms"]


def why_not(model: LanguageModel) -> str | None:
    """Why the Triton kernels cannot generate from a model; None if they can."""
    gru, head = model.gru, model.head
    if _device_type(model) != "cuda":
        return f"the model is on {a_weight(model).device}, not on cuda"
    if not backends.HAS_TRITON:
        return "triton is not installed: pip install triton"
    reason = model.why_not_weights_alone() or why_not_layers(gru, head)
    if reason is not None:
        return reason
    tensors = [*weights_of(gru), *head.parameters()]
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"its weights are on several devices: {sorted(map(str, devices))}"
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        return f"its weights have several dtypes: {sorted(map(str, dtypes))}"
    dtype = dtypes.pop()
    if dtype not in backends.TRITON_DTYPES:
        return f"there is no kernel for {dtype}"
    return None


def _device_type(model: LanguageModel) -> str:
    return a_weight(model).device.type


@torch.no_grad()
def _weights(model: LanguageModel) -> Any:
    kernels = import_module("gru_fast.kernels")
    gru, head = model.gru, model.head
    per = 4 if gru.bias else 2
    flat = gru._flat_weights
    layers = [flat[i : i + per] for i in range(0, len(flat), per)]
    with without_autocast(head.weight.device.type):
        table = model.token_table().to(head.weight.dtype)
    return kernels.weights_of(gru.cell, table, layers, head.weight, head.bias)


def chosen_form(model: LanguageModel, N: int) -> str:
    """The form of the kernel that generates N sequences: a name of `gru_fast.kernels.FORMS`."""
    name: str = import_module("gru_fast.kernels").chosen_form(*_call(model, N))
    return name


def why_not_forms(model: LanguageModel, N: int) -> dict[str, str]:
    """The forms that cannot generate N sequences, each with the reason."""
    forms = import_module("gru_fast.kernels").FORMS
    reasons = {form: why_not_form(form, model, N) for form in forms}
    return {form: reason for form, reason in reasons.items() if reason is not None}


def why_not_form(form: str, model: LanguageModel, N: int) -> str | None:
    """Why a form cannot generate N sequences; None if it can."""
    kernels = import_module("gru_fast.kernels")
    reason: str | None = kernels.why_not_form(form, *_call(model, N))
    return reason


def _call(model: LanguageModel, N: int) -> tuple[Any, ...]:
    gru, weight = model.gru, model.head.weight
    sizes = (N, gru.hidden_size, gru.num_layers, model.vocab_size)
    return weight.device, weight.dtype, *sizes, gru.cell


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Tensor,
    prompt_lengths: Tensor,
    *,
    max_new_tokens: int,
    on_tokens: Callable[[Tensor], None] | None = None,
    form: str | None = None,
    **rules: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the whole loop in a launch for thousands of steps, or few launches a step.

    Args:
        model: `why_not` has no reason.
        prompts: (N, P) int64, N > 0.
        prompt_lengths: (N,) int64.
        max_new_tokens: > 0.
        on_tokens: Called with the (N,) tokens of each step, some steps at a time.
        form: A name of `gru_fast.kernels.FORMS`, or None to choose.
        **rules: do_sample, temperature, top_k, top_p, min_p, eos, seed: `gru_fast.kernels.Rules`.

    Returns:
        tokens: (N, max_new_tokens) int64, PADDING after a row's end.
        log_probs: (N, max_new_tokens) float32, of the softmax at temperature 1, 0 after that.
        hidden: (L, N, H) float32, the state that the last token of each row was drawn from.

    Raises:
        ValueError: An id is outside its range, or a row of logits holds NaN or +inf.
    """
    kernels = import_module("gru_fast.kernels")
    found: tuple[Tensor, Tensor, Tensor] = kernels.generate(
        _weights(model), prompts, prompt_lengths, kernels.Rules(**rules), max_new_tokens,
        on_tokens, form,
    )  # fmt: skip
    return found
