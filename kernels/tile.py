# SPDX-License-Identifier: Apache-2.0
"""Device functions that the kernels share. Equation numbers are those of `gru_fast.reference`.

A tile is (units, rows): hidden units along axis 0, rows of the batch along axis 1, so that a
product is `weight (units, k) @ state (k, rows)` and W_hh is the left operand, read where it lies.
`first_row` and `g` are int64 scalars: offsets within a tile fit int32, offsets of tiles need not.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _exp2(a):
    """2 ** a, to 2 ulp, 0 below the normal numbers: one instruction, where tl.exp2 is four."""
    if INTERPRETED or not is_cuda():
        return tl.exp2(a)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _reciprocal(a):
    """1 / a, to 1 ulp, for a normal number: one instruction, where a division is eight."""
    if INTERPRETED or not is_cuda():
        return 1.0 / a
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def anew(number):
    """The same int32, or tile of them, of which the compiler knows nothing.

    At the head of a loop's body it keeps there what follows from it, which otherwise is computed
    before the loop and holds registers through all of it.
    """
    if INTERPRETED or not is_cuda():
        return number
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def anew_in_a_row(numbers):
    """`anew` of N int32s in a row from a multiple of N on; else loads would go one by one."""
    N: tl.constexpr = numbers.shape[0]
    return tl.max_contiguous(tl.multiple_of(anew(numbers), N), N)


@triton.jit
def sigmoid(a):
    return _reciprocal(1.0 + _exp2(-1.4426950408889634 * a))


@triton.jit
def tanh(a):
    e = _exp2(-2.8853900817779268 * tl.abs(a))
    magnitude = (1.0 - e) * _reciprocal(1.0 + e)
    return tl.where(a < 0, -magnitude, magnitude)


@triton.jit
def is_backwards(reverse_bits, group):
    """1 if a group is scanned from the end, else 0; bit 31, the sign, is that of all after it."""
    return (reverse_bits >> tl.minimum(group, 31)) & 1


@triton.jit
def time_of(step, T, backwards):
    """The time that a scan step visits."""
    return (step + backwards * (T - 1 - 2 * step)).to(tl.int64)


@triton.jit
def row_lengths(
    lengths_ptr,  # (B) or None
    first_row,
    lane,
    in_rows,
    T,
):
    """Valid steps of each row of the tile, brought into 0 ... T."""
    if lengths_ptr is None:
        return lane * 0 + T
    else:
        length = tl.load(lengths_ptr + first_row + lane, mask=in_rows, other=0).to(tl.int64)
        return tl.minimum(tl.maximum(length, 0), T).to(tl.int32)


@triton.jit
def row_resets(
    reset_mask_ptr,  # (T, B)
    t,
    length,
    first_row,
    lane,
    in_rows,
    B,
    backwards,
):
    """Not 0 for rows that begin an episode with the step at time t; 0 at times out of 0 ... T-1."""
    at = lane * 0 + t + backwards
    mask = in_rows & (at < length) & (at >= backwards)
    return tl.load(reset_mask_ptr + at * B + first_row + lane, mask=mask, other=0)


@triton.jit
def enter(
    h,
    t,
    length,
    reset_mask_ptr,  # (T, B) or None
    reset_state_ptr,  # (G, B, H) or None
    state_at,
    state_tile,
    first_row,
    lane,
    in_rows,
    inside,
    B,
    backwards,
):
    """p, the state that the step at time t starts from: equation (14) read forwards."""
    if reset_mask_ptr is None:
        return h
    else:
        reset = row_resets(reset_mask_ptr, t, length, first_row, lane, in_rows, B, backwards) != 0
        start = 0.0
        if reset_state_ptr is not None:
            at = reset_state_ptr + state_at + state_tile
            start = tl.load(at, mask=inside & reset[None, :], other=0.0).to(tl.float32)
        return tl.where(reset[None, :], start, h)


@triton.jit
def load_scale(
    h_scale_ptr,  # (B, G*H) or None
    first_row,
    g,
    units,
    lane,
    inside,
    G,
    H: tl.constexpr,
):
    """What the state is multiplied by before the recurrent product, equation (1); 1 if nothing."""
    if h_scale_ptr is None:
        return 1.0
    else:
        at = (first_row * G + g) * H + lane[None, :] * (G * H) + units[:, None]
        return tl.load(h_scale_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_per_unit(
    values_ptr,  # (G, N*H) or None
    g,
    gate: tl.constexpr,
    units,
    N: tl.constexpr,
    H: tl.constexpr,
):
    """Of a bias or gain: (units, 1), or 0 if there is none."""
    if values_ptr is None:
        return 0.0
    else:
        at = values_ptr + g * (N * H) + gate * H + units
        return tl.load(at, mask=units < H, other=0.0).to(tl.float32)[:, None]


@triton.jit
def row_starts(rows, H: tl.constexpr):
    """Where rows of a (H, H) matrix begin: in 64 bits if 32 do not hold all of them."""
    if H * H >= 2147483648:
        rows = rows.to(tl.int64)
    return rows * H


@triton.jit
def load_weight(
    weight_ptr,  # (H, H), one gate, or that transposed
    rows,
    columns,
    H: tl.constexpr,
):
    """weight[rows, columns], 0 beyond H."""
    at = weight_ptr + row_starts(rows[:, None], H) + columns[None, :]
    return tl.load(at, mask=(rows[:, None] < H) & (columns[None, :] < H), other=0.0)


@triton.jit
def load_gate(
    gates_ptr,  # (..., B, G, K*H): gates_x, a workspace, or gradients of either
    at,
    tile,
    slot: tl.constexpr,
    mask,
    H: tl.constexpr,
):
    return tl.load(gates_ptr + at + tile + slot * H, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_gate(
    gates_ptr,  # (..., B, G, K*H)
    at,
    tile,
    slot: tl.constexpr,
    value,
    mask,
    H: tl.constexpr,
):
    tl.store(gates_ptr + at + tile + slot * H, value.to(gates_ptr.dtype.element_ty), mask=mask)


@triton.jit
def next_state(p, z, n, t, length, LENGTHS: tl.constexpr):
    """Equation (6), or p where the row is not valid."""
    state = n + z * (p - n)
    if LENGTHS:
        state = tl.where((t < length)[None, :], state, p)
    return state


@triton.jit
def store_step(
    output_ptr,  # (T, B, G*H)
    workspace_ptr,  # (T, B, G, S*H) or None
    state,
    q,
    r,
    z,
    n,
    t,
    length,
    first_row,
    g,
    units,
    lane,
    inside,
    B,
    G,
    CELL: tl.constexpr,
    H: tl.constexpr,
    LENGTHS: tl.constexpr,
    GATES: tl.constexpr,  # whether r and z are still to be saved
):
    """Output and workspace at time t, 0 where the row is not valid."""
    h = state
    if LENGTHS:
        h = tl.where((t < length)[None, :], state, 0.0)
    row = (t * B + first_row) * G + g
    tile = lane[None, :] * (G * H) + units[:, None]
    tl.store(output_ptr + row * H + tile, h.to(output_ptr.dtype.element_ty), mask=inside)
    save_gates(
        workspace_ptr, q, r, z, n, t, length, row, units, lane, inside, G,
        CELL, H, LENGTHS, GATES, True,
    )  # fmt: skip


@triton.jit
def save_gates(
    workspace_ptr,  # (T, B, G, S*H) or None
    q,
    r,
    z,
    n,
    t,
    length,
    row,
    units,
    lane,
    inside,
    G,
    CELL: tl.constexpr,
    H: tl.constexpr,
    LENGTHS: tl.constexpr,
    GATES: tl.constexpr,
    CANDIDATE: tl.constexpr,
):
    """The slots q, r, z, n | r, z, n | z, n; 0 where the row is not valid."""
    if workspace_ptr is not None:
        S: tl.constexpr = 4 if CELL == "reset_after" else (3 if CELL == "reset_before" else 2)
        if LENGTHS:
            valid = (t < length)[None, :]
            z = tl.where(valid, z, 0.0)
            n = tl.where(valid, n, 0.0)
            r = tl.where(valid, r, 0.0)
            q = tl.where(valid, q, 0.0)
        tile = lane[None, :] * (G * S * H) + units[:, None]
        at = row * (S * H)
        dtype = workspace_ptr.dtype.element_ty
        if CELL == "reset_after" and GATES and CANDIDATE and dtype == tl.float32:
            # One change of layout, hence two barriers of the program, in place of four.
            slots = 2 * tl.arange(0, 2)[None, None, :, None] + tl.arange(0, 2)[None, None, None, :]
            packed = tl.join(tl.join(q, z), tl.join(r, n))
            mask = inside[:, :, None, None] & (slots >= 0)
            tl.store(workspace_ptr + at + tile[:, :, None, None] + slots * H, packed, mask=mask)
        else:
            if CELL == "reset_after":
                store_gate(workspace_ptr, at, tile, 0, q, inside, H)
            if GATES:
                store_gate(workspace_ptr, at, tile, S - 2, z, inside, H)
                if CELL != "no_reset":
                    store_gate(workspace_ptr, at, tile, S - 3, r, inside, H)
            if CANDIDATE:
                store_gate(workspace_ptr, at, tile, S - 1, n, inside, H)
