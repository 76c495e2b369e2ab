# SPDX-License-Identifier: Apache-2.0
"""`generate`: tokens drawn one after the other for a whole batch, in few launches and no others.

A launch runs positions of every row: position 0 feeds the zero vector, the next ones the prompt,
those after it what was drawn. The state between two launches is float32 in memory, as on chip, so
where a call is cut does not show in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from .generate_tables import FORMS, Model, choose, config_of, unfit
from .generation import (
    ALIVE,
    BAD_ID,
    ENDED,
    PADDING,
    Generation,
    Rows,
    Rules,
    Weights,
    model_of,
    new_rows,
)
from .problem import call_on, on_device
from .tiling import Device, device_of

OnTokens = Callable[[Tensor], None]

LAUNCH = 8192
"""Positions of a launch at most: between two of them the host sees whether rows are left."""

QUEUED = 128
"""Positions of `step`, whose launches end no earlier, that are queued at a time."""

STREAMED = 32
"""Positions of a launch whose tokens are waited for."""


def generate(
    weights: Weights,
    prompts: Tensor,
    lengths: Tensor,
    rules: Rules,
    max_new_tokens: int,
    on_tokens: OnTokens | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw at most max_new_tokens >= 1 tokens for each of B >= 1 rows.

    Args:
        weights: The model.
        prompts: (B, P) int64, ids where they count.
        lengths: (B,) int64, 0 <= length <= P.
        rules: How to draw.
        max_new_tokens: S.
        on_tokens: Called with the (B,) tokens of each step, some steps at a time.
        form: A name of `FORMS`, or None to choose.

    Returns:
        tokens (B, S) int64, PADDING after a row's end; log_probs (B, S) float32, 0 there;
        hidden (L, B, H) float32, the state that the last token of each row was drawn from.

    Raises:
        ValueError: An unknown form, a prompt with an id outside 0 ... V - 1, or logits with NaN or
            +inf, or nothing above -inf.
        RuntimeError: A named form does not fit this call on this device.
    """
    device, model = device_of(prompts), model_of(weights, len(prompts))
    if form is None:
        form = choose(device, model)
    elif form not in FORMS:
        raise ValueError(f"form: expected one of {FORMS}, got {form!r}")
    config = config_of(form, device, model)
    if config is None:
        raise RuntimeError(f"form={form!r}: {unfit(device, model)}")
    rows = new_rows(weights, prompts, lengths, max_new_tokens)
    launch = _launcher(form)
    call = Generation(weights, rules, rows)
    end = rows.longest + max_new_tokens
    begin = seen = 0
    while begin < end:
        upto = min(end, begin + (QUEUED if form == "step" else LAUNCH))
        if on_tokens is not None:
            upto = min(end, max(begin, rows.longest) + STREAMED)
        with on_device(prompts):  # not where on_tokens is called, which may change the device
            launch(call, (begin, upto), config)
        begin = upto
        least, most = (int(word) for word in torch.stack(rows.status.aminmax()).tolist())
        if most > ENDED:
            raise ValueError(_complaint(rows, most, weights.V, rules))
        if on_tokens is not None:
            complete = begin - rows.longest if least == ALIVE else max_new_tokens
            seen = _hand_over(rows.tokens, seen, complete, on_tokens)
        if least != ALIVE:
            break
    return rows.tokens, rows.log_probs, rows.state[..., : weights.units].contiguous()


def _hand_over(tokens: Tensor, seen: int, complete: int, on_tokens: OnTokens) -> int:
    """Give columns seen ... complete - 1 to on_tokens, but none after the end of every row."""
    for column in tokens[:, seen:complete].unbind(1):
        if bool((column == PADDING).all()):
            break
        on_tokens(column.clone())
    return complete


def _complaint(rows: Rows, status: int, V: int, rules: Rules) -> str:
    row = int((rows.status == status).nonzero()[0])
    if status == BAD_ID:
        return f"prompts: expected 0 <= id < V = {V}, got another in row {row}"
    divided = rules.do_sample and rules.temperature != 1
    name = f"logits / temperature {rules.temperature}" if divided else "logits"
    return (
        f"{name}: expected no NaN or +inf and at least one finite value in every row, got others "
        f"in sequence {row}"
    )


def chosen_form(
    device: torch.device, dtype: torch.dtype, B: int, H: int, L: int, V: int, cell: str
) -> str:
    """The form that a call without a named one takes.

    Args:
        device: Where.
        dtype: Of the weights.
        B: Sequences.
        H: Hidden size.
        L: Layers.
        V: Vocabulary size.
        cell: The kind of cell.
    """
    return choose(*_call(device, dtype, B, H, L, V, cell))


def why_not_form(
    form: str, device: torch.device, dtype: torch.dtype, B: int, H: int, L: int, V: int, cell: str
) -> str | None:
    """Why a form cannot run a call; None if it can.

    Args:
        form: A name of `FORMS`.
        device: As in `chosen_form`, like the others.
        dtype: Of the weights.
        B: Sequences.
        H: Hidden size.
        L: Layers.
        V: Vocabulary size.
        cell: The kind of cell.
    """
    found, model = _call(device, dtype, B, H, L, V, cell)
    return unfit(found, model) if config_of(form, found, model) is None else None


def _call(
    device: torch.device, dtype: torch.dtype, B: int, H: int, L: int, V: int, cell: str
) -> tuple[Device, Model]:
    found, sizes = call_on(device, dtype, (1, B, 1, H), cell)
    return found, Model(sizes, L, V)


@cache
def _launcher(form: str) -> Callable[..., None]:
    """Imported on first use, as triton is with it."""
    launch: Callable[..., None] = getattr(
        import_module(f".generate_{form}", __package__), f"launch_generate_{form}"
    )
    return launch
