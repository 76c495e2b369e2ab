# SPDX-License-Identifier: Apache-2.0
"""A token from logits on the GPU, by the rules of `gru_fast.reference_sampling`.

A tile is (tokens, rows). Logits are one tile in registers, or lie in memory and are read tile by
tile, once for each pass. Weights are summed as integers, in units of 2**-40 of the largest: exact
in any order, so that neither tiles nor warps show in a draw. Nothing is sorted: top_k and top_p
find the last rank that is kept bit by bit.
"""

import triton
import triton.language as tl


@triton.jit
def random_bits(seed_low, seed_high, position, stream):
    """24 random bits of each row, int64: `uniform` of the rules, times 2**24."""
    seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    zero = stream * 0
    word, _, _, _ = tl.philox(seed, zero + position, zero, stream, zero)
    return (word.to(tl.uint32, bitcast=True) >> 8).to(tl.int64)


@triton.jit
def _block(tile, logits_ptr, block, lane, in_rows, V, BLOCK_V: tl.constexpr):
    """The ids of one block of tokens and their logits, -inf beyond V."""
    ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tile
    if logits_ptr is not None:
        at = lane[None, :].to(tl.int64) * V + ids[:, None]
        mask = (ids < V)[:, None] & in_rows[None, :]
        # Other programs may have stored them.
        logits = tl.load(logits_ptr + at, mask=mask, other=-float("inf"), cache_modifier=".cg")
    return ids, logits


@triton.jit
def _scaled(logits, good, temperature, SHAPED: tl.constexpr):
    """Logits over the temperature if it counts; 0 in rows that allow no draw."""
    if SHAPED:
        logits = tl.div_rn(logits, temperature)
    return tl.where(good[None, :], logits, 0.0)


@triton.jit
def _weight(scaled, most):
    return tl.exp(scaled - most[None, :])


@triton.jit
def _units(weight):
    """A weight in units of 2**-40."""
    return (weight * 1099511627776.0).to(tl.int64)


@triton.jit
def _key(scaled, ids, id_bits):
    """Distinct integers in [0, 2**(32 + id_bits)) that order as (scaled, -id)."""
    bits = (scaled + 0.0).to(tl.int32, bitcast=True)  # -0 ties with 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = (1 << id_bits) - 1
    return ((order.to(tl.int64) + 2147483648) << id_bits) | (last - ids)[:, None]


@triton.jit
def _last_of_top_k(
    tile, logits_ptr, lane, in_rows, V, blocks, good, temperature, top_k, id_bits,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The largest key that at least top_k tokens reach."""
    last = lane.to(tl.int64) * 0
    for i in range(32 + id_bits):
        candidate = last | (last * 0 + 1) << (31 + id_bits - i)
        reached = lane * 0
        for block in range(blocks):
            ids, logits = _block(tile, logits_ptr, block, lane, in_rows, V, BLOCK_V)
            key = _key(_scaled(logits, good, temperature, True), ids, id_bits)
            reached += tl.sum((key >= candidate[None, :]).to(tl.int32), 0)
        last = tl.where(reached >= top_k, candidate, last)
    return last


@triton.jit
def _last_of_top_p(
    tile, logits_ptr, lane, in_rows, V, blocks, good, temperature, most, last_of_k, total, top_p,
    id_bits, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The smallest key with less than top_p of the total above it."""
    # The one operation in float64: a product of rounded numbers decides ties, as in the rules.
    share = top_p.to(tl.float64, bitcast=True) * total.to(tl.float64)
    last = lane.to(tl.int64) * 0 + (tl.full((1,), 1, tl.int64) << (32 + id_bits)) - 1
    for i in range(32 + id_bits):
        candidate = last - ((last * 0 + 1) << (31 + id_bits - i))
        above = last * 0
        for block in range(blocks):
            ids, logits = _block(tile, logits_ptr, block, lane, in_rows, V, BLOCK_V)
            scaled = _scaled(logits, good, temperature, True)
            key = _key(scaled, ids, id_bits)
            counted = (key > candidate[None, :]) & (key >= last_of_k[None, :])
            above += tl.sum(tl.where(counted, _units(_weight(scaled, most)), 0), 0)
        last = tl.where(above.to(tl.float64) < share, candidate, last)
    return tl.maximum(last, last_of_k)


@triton.jit
def _kept(scaled, weight, ids, last, min_p, id_bits, SHAPED: tl.constexpr, RANKED: tl.constexpr):
    """Weights that no filter takes out, in units."""
    units = _units(weight)
    if SHAPED:
        units = tl.where(weight >= min_p, units, 0)
    if RANKED:
        units = tl.where(_key(scaled, ids, id_bits) >= last[None, :], units, 0)
    return units


@triton.jit
def draw(
    tile,  # (BLOCK_V, rows) float32, -inf beyond V; unless logits_ptr
    logits_ptr,  # (rows, V) float32, of this tile; or None
    lane,
    in_rows,
    V,
    bits,
    temperature,
    top_k,
    top_p,  # the bits of a float64 as int64
    min_p,
    id_bits,
    BLOCK_V: tl.constexpr,
    SAMPLE: tl.constexpr,
    SHAPED: tl.constexpr,  # a temperature other than 1, or a filter
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
):
    """Of each row a token, its log-probability, and whether the logits allow a draw.

    The log-probability is that of temperature 1 without a filter. Rows with NaN or +inf, or with
    nothing above -inf, allow none: their token is 0.
    """
    blocks = 1
    if logits_ptr is not None:
        blocks = (V + BLOCK_V - 1) // BLOCK_V
    top = tl.full(lane.shape, -float("inf"), tl.float32)
    for block in range(blocks):
        _, logits = _block(tile, logits_ptr, block, lane, in_rows, V, BLOCK_V)
        top = tl.maximum(top, tl.max(tl.where(logits == logits, logits, float("inf")), 0))
    most = top
    if SHAPED:
        most = tl.div_rn(top, temperature)
    good = (tl.abs(top) < float("inf")) & (tl.abs(most) < float("inf"))
    top = tl.where(good, top, 0.0)
    most = tl.where(good, most, 0.0)

    last = lane.to(tl.int64) * 0
    if TOP_K:
        last = _last_of_top_k(
            tile, logits_ptr, lane, in_rows, V, blocks, good, temperature, top_k, id_bits, BLOCK_V
        )
    if TOP_P:
        total = last * 0
        for block in range(blocks):
            ids, logits = _block(tile, logits_ptr, block, lane, in_rows, V, BLOCK_V)
            scaled = _scaled(logits, good, temperature, True)
            total += tl.sum(
                _kept(scaled, _weight(scaled, most), ids, last, 0.0, id_bits, False, TOP_K), 0
            )
        last = _last_of_top_p(
            tile, logits_ptr, lane, in_rows, V, blocks, good, temperature, most, last, total,
            top_p, id_bits, BLOCK_V,
        )  # fmt: skip

    # Sums of what may be drawn, and of the softmax that log-probabilities are of.
    RANKED: tl.constexpr = TOP_K or TOP_P
    total = lane.to(tl.int64) * 0
    mass = total
    for block in range(blocks):
        ids, logits = _block(tile, logits_ptr, block, lane, in_rows, V, BLOCK_V)
        scaled = _scaled(logits, good, temperature, SHAPED)
        weight = _weight(scaled, most)
        units = _kept(scaled, weight, ids, last, min_p, id_bits, SHAPED, RANKED)
        if SHAPED:
            model = _units(_weight(_scaled(logits, good, temperature, False), top))
            # One exchange between warps in place of two.
            sums = tl.sum(tl.join(units, model), 0)
            kept_here, model_here = tl.split(sums)
            total += kept_here
            mass += model_here
        else:
            total += tl.sum(units, 0)
    if not SHAPED:
        mass = total

    # The token that is hit, with the bits of its logit.
    found = total * 0
    # The whole part of u * total, by parts: bits * total has more than 64 bits.
    target = bits * (total >> 24) + (bits * (total & 0xFFFFFF) >> 24)
    before = total * 0
    for block in range(blocks):
        ids, logits = _block(tile, logits_ptr, block, lane, in_rows, V, BLOCK_V)
        if SAMPLE:
            scaled = _scaled(logits, good, temperature, SHAPED)
            weight = _weight(scaled, most)
            units = _kept(scaled, weight, ids, last, min_p, id_bits, SHAPED, RANKED)
            reached = before[None, :] + tl.cumsum(units, 0)
            hit = (reached > target[None, :]) & (reached - units <= target[None, :])
            if logits_ptr is not None:
                before += tl.sum(units, 0)
        else:
            largest = (logits == top[None, :]) & (before == 0)[None, :]
            first = tl.min(tl.where(largest, ids[:, None], 2147483647), 0)
            hit = largest & (ids[:, None] == first[None, :])
            before += tl.sum(hit.to(tl.int64), 0)
        pair = (ids.to(tl.int64) << 32)[:, None] | (
            logits.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        )
        found += tl.sum(tl.where(hit, pair, 0), 0)
    token = tl.where(good, found >> 32, 0).to(tl.int32)
    chosen = tl.where(good, found.to(tl.int32).to(tl.float32, bitcast=True), 0.0)
    share = tl.where(good, mass, 1).to(tl.float32) * 9.094947017729282e-13
    return token, chosen - top - tl.log(share), good
