# SPDX-License-Identifier: Apache-2.0
"""`explain_generate`: which loop takes a call of `generate`, and why the others do not."""

from __future__ import annotations

from typing import Any

from gru_fast import gpu_sampling, packed, sampling
from gru_fast.explain import Explanation
from gru_fast.language_model import GRULanguageModel
from gru_fast.reference import GATES
from gru_fast.sampled_model import a_weight, check_language_model
from gru_fast.token_ids import TokenIds, padded

__all__ = ["explain_generate"]


def explain_generate(
    model: GRULanguageModel,
    input_ids: TokenIds | None = None,
    *,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    **_: Any,
) -> Explanation:
    """Explain the call `model.generate(input_ids, ...)` without running it.

    Args:
        model: A `GRULanguageModel`.
        input_ids: As in the call.
        max_new_tokens: As in the call.
        num_return_sequences: As in the call.
        **_: Others of the call, which do not change the answer.

    Returns:
        An `Explanation`: costs are those of rows that draw all their tokens; products of the
        token table are not counted, and any head is counted as an `nn.Linear`. On a GPU `why_not`
        has the forms of the kernel that do not fit as well.

    Raises:
        ValueError: An id is outside its range.
        TypeError: Ids that are not integers, or `model` is no language model.
        RuntimeError: Its `gru` is no layer of gru_fast.
    """
    check_language_model(model)
    gru, weight = model.gru, a_weight(model)
    prompts, lengths = padded(input_ids, model.vocab_size, weight.device)
    N, P, S = len(prompts) * num_return_sequences, prompts.shape[1], max_new_tokens
    loop = sampling.choose_loop(model)
    on_cpu = packed.why_not_model(model)
    why_not = {} if on_cpu is None else {"cpu": on_cpu}
    on_gpu = gpu_sampling.why_not(model)
    if on_gpu is not None:
        why_not["triton"] = on_gpu
    elif S == 0 or N == 0:
        why_not["triton"] = "nothing to draw"
    backend, kernel = "reference", "PyTorch operations, one step at a time"
    if loop is sampling.native_loop:
        from gru_fast import _C

        backend, kernel = "cpu", f"C++ sampler, {_C.cpu_isa()}"
    elif loop is sampling.mixed_loop:
        kernel = "the model's own calls, one step at a time, and draws in C++"
    elif loop is sampling.triton_loop and "triton" not in why_not:
        form = gpu_sampling.chosen_form(model, N)
        backend, kernel = "triton", f"Triton, generate_{form}, because it fits; not measured"
        for other, reason in gpu_sampling.why_not_forms(model, N).items():
            why_not[f"generate_{other}"] = reason
    if gru.backend != "auto":
        named = f"backend={gru.backend!r} was asked for"
        why_not = {name: why_not.get(name, named) for name in ("cpu", "triton", *why_not)}
    why_not.pop(backend, None)

    fed = int(lengths.sum()) * num_return_sequences + N * S
    H, L, V = gru.hidden_size, gru.num_layers, model.vocab_size
    rows = GATES[gru.cell] * H
    products = rows * H * (2 * L - 1)
    weights = products + V * H + (V + 1) * rows
    return Explanation(
        call=f"generate, N={N} prompts to {P} tokens, {S} new tokens, V={V} H={H} L={L} "
        f"{gru.cell} {str(weight.dtype).removeprefix('torch.')} {weight.device}",
        backend=backend,
        kernel=kernel,
        why_not=why_not,
        flops=2 * (fed * products + N * S * V * H),
        bytes=weights * weight.element_size() + 8 * (prompts.numel() + N * S),
        dependent_steps=(P + S) * L,
    )
