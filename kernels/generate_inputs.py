# SPDX-License-Identifier: Apache-2.0
"""What every form of `generate` does at both ends of a step: feed the inputs, record the draw."""

import triton
import triton.language as tl


@triton.jit
def table_gates(
    table_ptr,  # (V+1, N*H)
    token,
    units,
    inside,
    CELL: tl.constexpr,
    H: tl.constexpr,
):
    """What the inputs add to the gates of the first layer."""
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    at = table_ptr + token.to(tl.int64)[None, :] * (N * H) + units[:, None]
    a_z = tl.load(at + (N - 2) * H, mask=inside, other=0.0).to(tl.float32)
    a_n = tl.load(at + (N - 1) * H, mask=inside, other=0.0).to(tl.float32)
    a_r = a_z
    if CELL != "no_reset":
        a_r = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return a_r, a_z, a_n


@triton.jit
def next_input(
    prompts_ptr,  # (B, P)
    row,
    position,
    length,
    drawn,
    alive,
    P,
    V,
):
    """What each row is fed at a position, V being the zero vector; and whether that is no token."""
    here = length * 0 + position
    prompted = (here > 0) & (here <= length)
    at = prompts_ptr + row * P + position - 1
    token = tl.load(at, mask=alive & prompted, other=0)
    token = tl.where(prompted, token, drawn.to(tl.int64))
    unknown = ((token < 0) | (token >= V)) & (here > 0)
    return tl.where((here == 0) | unknown, V, token).to(tl.int32), unknown


@triton.jit
def last_drawn(
    tokens_ptr,  # (B, S)
    row,
    position,
    length,
    in_rows,
    S,
):
    """What was drawn at the position before; 0 where a prompt or nothing is fed."""
    here = length * 0 + position
    at = tokens_ptr + row * S + position - length - 1
    # Another program may have stored it. A row that has drawn all is asked for no more.
    mask = in_rows & (here > length) & (here - length <= S)
    return tl.load(at, mask=mask, other=0, cache_modifier=".cg").to(tl.int32)


@triton.jit
def record(
    tokens_ptr,  # (B, S)
    log_probs_ptr,  # (B, S)
    row,
    position,
    length,
    status,
    drawing,
    chosen,
    log_prob,
    good,
    S,
    eos,
):
    """Store what was drawn; the new status of each row."""
    at = row * S + position - length
    tl.store(tokens_ptr + at, chosen.to(tl.int64), mask=drawing & good)
    tl.store(log_probs_ptr + at, log_prob, mask=drawing & good)
    ended = (chosen == eos) | (position - length + 1 >= S)
    return tl.where(drawing, tl.where(good, ended.to(tl.int32), 2), status)
