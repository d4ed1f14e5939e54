r"""Triton kernels of the prefill and of extensions: log-sum-exp, column means, correction.

Shapes: B sequences, C rows (queries), K columns (keys), H query heads, G key heads, h selected
heads ("slots"), D values per head. A program works for one sequence and one slot. Columns are
counted locally (0..K-1); ``first_column`` turns them into absolute positions 0..T-1.

What a row sees is an interval of columns, ``lo..hi``, less the pads; ``kind`` says what a row is
(0 pad, 1 prompt, 2 continuation). ``PLAIN`` is a causal prefill without visible pads, where
neither needs to be loaded. Logarithms are natural in memory and of base 2 inside.

::

    columns ->    BN BN BN BN     \  a tile on the diagonal: what a row does not see is masked
    rows     BM   \               #  a tile that is seen whole
      |      BM   #  \
      v      BM   #  #  \         row_lse      holds a block of rows, walks along its columns
             BM   #  #  #  \      column_sums  holds a block of columns, walks down its rows
                                  apply_sinks  holds a block of rows, visits flagged columns
    flagged:         ^     ^                   only, BS at a time, wherever they lie

So no map is stored: a weight is made again from its product and the row's log-sum-exp, in the walk
that adds up columns and in the one that corrects rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["apply_sinks", "column_sums", "flag_sinks", "row_lse"]

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def logits(q, k_transposed, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scaled products in units of log 2."""
    product = tl.dot(q, k_transposed, input_precision=PRECISION)
    if SOFTCAP:
        product = product * (2.0 * scale / softcap)
        result = (2.0 * tl.sigmoid(product) - 1.0) * (softcap * _LOG2E)
    else:
        result = product * (scale * _LOG2E)  # one factor: it fuses with what is added next
    return result


@triton.jit
def dense(held, d, D: tl.constexpr, BD: tl.constexpr):
    """Mask of a tile of rows (or columns) and values; no values to mask where D is a block."""
    if D == BD:
        mask = held
    else:
        mask = held & (d < D)
    return mask


@triton.jit(do_not_specialize=["slots"])
def row_lse(
    q_ptr, k_ptr, lse_ptr, heads_ptr, real_ptr, lo_ptr, hi_ptr,
    sqb, sqh, sqm, skb, skh, skn,
    rows, columns, total, first_column, slots, per_group, scale, softcap,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """Write lse (B, h, C) of the selected heads, where the stock kernel gives none."""
    block = tl.program_id(0)
    pair = tl.program_id(1)
    b = (pair // slots).to(tl.int64)
    head = tl.load(heads_ptr + pair % slots).to(tl.int64)
    m = block * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    inside = m < rows
    q = tl.load(
        q_ptr + b * sqb + head * sqh + m[:, None] * sqm + d[None, :],
        mask=inside[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    lo = tl.load(lo_ptr + b * rows + m, mask=inside, other=columns)
    hi = tl.load(hi_ptr + b * rows + m, mask=inside, other=-1)
    top = tl.full([BM], -1e30, tl.float32)
    total_mass = tl.zeros([BM], tl.float32)
    k_base = k_ptr + b * skb + (head // per_group) * skh
    first = (tl.min(lo, axis=0) // BN) * BN
    last = tl.max(hi, axis=0) + 1
    for start in range(first, last, BN):
        n = start + tl.arange(0, BN)
        held = n < columns
        k = tl.load(
            k_base + n[None, :] * skn + d[:, None],
            mask=held[None, :] & (d < D)[:, None], other=0.0,
        )  # fmt: skip
        real = tl.load(real_ptr + b * total + first_column + n, mask=held, other=0)
        sees = (n[None, :] >= lo[:, None]) & (n[None, :] <= hi[:, None]) & (real != 0)[None, :]
        value = tl.where(sees, logits(q, k, scale, softcap, SOFTCAP, PRECISION), -1e30)
        new_top = tl.maximum(top, tl.max(value, axis=1))
        part = tl.exp2(tl.where(sees, value - new_top[:, None], float("-inf")))
        total_mass = total_mass * tl.exp2(top - new_top) + tl.sum(part, axis=1)
        top = new_top
    lse = (top + tl.log2(tl.maximum(total_mass, 1e-37))) / _LOG2E
    tl.store(lse_ptr + pair.to(tl.int64) * rows + m, lse, mask=inside)


@triton.jit(do_not_specialize=["slots", "pairs", "together"])
def column_sums(
    q_ptr, k_ptr, lse_ptr, sums_ptr, heads_ptr, real_ptr, lo_ptr, hi_ptr,
    sqb, sqh, sqm, skb, skh, skn, slb, slh, slm,
    rows, columns, total, first_column, slots, per_group, scale, softcap, pairs, together,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BY_HEAD: tl.constexpr,
    FOLD: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """Write sums (B, h, T): the attention that each column gets from the prompt's rows.

    The log-sum-exp of rows that do not count (pads, continuation) is +inf, so their weights are 0.
    It is loaded a round ahead; nothing else is loaded in the loop beside the queries.

    Every program reads the queries of all rows below its block of columns: large blocks read less.
    ``together`` sequences and slots run side by side, those with most rows first.
    """
    blocks = tl.cdiv(columns, BN)
    turn = tl.program_id(0)
    leader = turn // (blocks * together) * together
    beside = tl.minimum(pairs - leader, together)
    place = turn - leader * blocks
    pair = leader + place % beside
    start = place // beside * BN
    b = (pair // slots).to(tl.int64)
    slot = pair % slots
    head = tl.load(heads_ptr + slot).to(tl.int64)
    lse_base = lse_ptr + b * slb + (head if BY_HEAD else slot.to(tl.int64)) * slh
    q_base = q_ptr + b * sqb + head * sqh
    n = start + tl.arange(0, BN)
    d = tl.arange(0, BD)
    held = n < columns
    k = tl.load(
        k_ptr + b * skb + (head // per_group) * skh + n[:, None] * skn + d[None, :],
        mask=dense(held[:, None], d[None, :], D, BD), other=0.0,
    )  # fmt: skip
    acc = tl.zeros([BN, BM], tl.float32)
    folded = tl.zeros([BN], tl.float32)
    # A causal prefill: rows before the block see none of it, rows past its last column all of it.
    first = (start // BM) * BM if PLAIN else 0
    edge = tl.minimum(tl.cdiv(start + BN, BM) * BM, rows) if PLAIN else rows
    m = first + tl.arange(0, BM)
    lse = tl.load(lse_base + m * slm, mask=m < rows, other=float("inf")) * _LOG2E
    for row in range(first, edge, BM):
        m = row + tl.arange(0, BM)
        q = tl.load(
            q_base + m[None, :] * sqm + d[:, None],
            mask=dense((m < rows)[None, :], d[:, None], D, BD), other=0.0,
        )  # fmt: skip
        next_lse = tl.load(lse_base + (m + BM) * slm, mask=m + BM < rows, other=float("inf"))
        value = logits(k, q, scale, softcap, SOFTCAP, PRECISION) - lse[None, :]
        if PLAIN:
            sees = n[:, None] <= m[None, :]
        else:
            lo = tl.load(lo_ptr + b * rows + m, mask=m < rows, other=columns)
            hi = tl.load(hi_ptr + b * rows + m, mask=m < rows, other=-1)
            sees = (n[:, None] >= lo[None, :]) & (n[:, None] <= hi[None, :])
        weight = tl.exp2(tl.where(sees, value, float("-inf")))
        if FOLD:  # fewer registers against a sum in every round
            folded += tl.sum(weight, axis=1)
        else:
            acc += weight
        lse = next_lse * _LOG2E
    if PLAIN:
        for row in range(edge, rows, BM):
            m = row + tl.arange(0, BM)
            q = tl.load(
                q_base + m[None, :] * sqm + d[:, None],
                mask=dense((m < rows)[None, :], d[:, None], D, BD), other=0.0,
            )  # fmt: skip
            next_lse = tl.load(lse_base + (m + BM) * slm, mask=m + BM < rows, other=float("inf"))
            weight = tl.exp2(logits(k, q, scale, softcap, SOFTCAP, PRECISION) - lse[None, :])
            if FOLD:
                folded += tl.sum(weight, axis=1)
            else:
                acc += weight
            lse = next_lse * _LOG2E
    sums = folded if FOLD else tl.sum(acc, axis=1)
    position = first_column + n
    real = tl.load(real_ptr + b * total + position, mask=held, other=0)
    sums = tl.where(real != 0, sums, 0.0)
    tl.store(sums_ptr + pair.to(tl.int64) * total + position, sums, mask=held)


@triton.jit(do_not_specialize=["slots"])
def flag_sinks(
    sums_ptr, seen_ptr, most_ptr, first_ptr, real_ptr, flags_ptr, index_ptr, count_ptr,
    bias_ptr, holds_ptr, facts_ptr,
    total, slots, limit, min_rows, boundary, few_rows,
    TARGET: tl.constexpr, RELATIVE: tl.constexpr, PROTECT: tl.constexpr, AUTO: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write flags (B, h, T), the flagged columns in order (B, h, T), and their number (B, h).

    ``TARGET`` ``span`` flags given columns: ``sums`` is then (B, T) uint8. Of ``both`` the initial
    token, which has a strength of its own, is listed with 2 ** 29 added.

    ``bias`` (B, h, T) is -inf for sinks and pads, 0 for all other columns; ``holds`` (B, h,
    blocks of BN columns) is 1 where some bias of a block is not 0.

    Of the report's facts (6, B, h), numbers 0, 1 and 5: the number of sinks, of those that few rows
    see, and whether a column is near its threshold. ``limit`` is alpha or tau.
    """
    pair = tl.program_id(0)
    pairs = tl.num_programs(0)
    b = pair // slots
    most = tl.maximum(tl.load(most_ptr + b), 1).to(tl.float32)
    initial = tl.load(first_ptr + b)
    threshold = limit / most if RELATIVE else limit
    needed = tl.ceil(most / limit) if AUTO else min_rows * 1.0
    base = pair.to(tl.int64) * total
    blocks = tl.cdiv(total, BN)
    count = tl.zeros([], tl.int32)
    flagged = tl.zeros([], tl.int32)
    few = tl.zeros([BLOCK], tl.int32)
    near = tl.zeros([BLOCK], tl.int32)
    for start in range(0, total, BLOCK):
        t = start + tl.arange(0, BLOCK)
        held = t < total
        seen = tl.load(seen_ptr + b * total + t, mask=held, other=0)
        real = tl.load(real_ptr + b * total + t, mask=held, other=1)
        first = (t == initial) & (seen > 0)
        if TARGET == "initial":
            sink = first
        elif TARGET == "span":
            sink = tl.load(sums_ptr + b.to(tl.int64) * total + t, mask=held, other=0) != 0
        else:
            mass = tl.load(sums_ptr + base + t, mask=held, other=0.0)
            eligible = (seen > 0) & (seen.to(tl.float32) >= needed)
            if PROTECT == 1:
                eligible = eligible & (t != initial)
            ratio = tl.where(eligible, mass / tl.maximum(seen, 1).to(tl.float32) / threshold, 0.0)
            near = tl.maximum(near, (tl.abs(ratio - 1.0) < boundary).to(tl.int32))
            sink = ratio > 1.0
            if PROTECT == 2:
                order = flagged + tl.cumsum(sink.to(tl.int32), axis=0)
                flagged += tl.sum(sink.to(tl.int32), axis=0)
                sink = sink & (order != 1)
            if TARGET == "both":
                sink = sink | first
        ones = sink.to(tl.int32)
        place = count + tl.cumsum(ones, axis=0) - 1
        tl.store(flags_ptr + base + t, ones.to(tl.uint8), mask=held)
        listed = t
        if TARGET == "both":
            listed = t + first.to(tl.int32) * 0x20000000
        tl.store(index_ptr + base + place, listed, mask=sink)
        hidden = sink | (real == 0)
        tl.store(bias_ptr + base + t, tl.where(hidden, float("-inf"), 0.0), mask=held)
        some = tl.max(tl.reshape(hidden.to(tl.int32), [BLOCK // BN, BN]), axis=1)
        block = start // BN + tl.arange(0, BLOCK // BN)
        tl.store(
            holds_ptr + pair.to(tl.int64) * blocks + block, some.to(tl.uint8), mask=block < blocks
        )
        count += tl.sum(ones, axis=0)
        few += (sink & (seen < few_rows)).to(tl.int32)
    tl.store(count_ptr + pair, count)
    tl.store(facts_ptr + pair, count.to(tl.float32))
    tl.store(facts_ptr + pairs + pair, tl.sum(few, axis=0).to(tl.float32))
    tl.store(facts_ptr + 5 * pairs + pair, tl.max(near, axis=0).to(tl.float32))


@triton.jit
def strengths_of(strength_ptr, slot, slots, MAPS: tl.constexpr):
    """Strength of a head's map, and that of the initial token under maps ``both``."""
    strength = tl.load(strength_ptr + slot)
    initial = strength
    if MAPS == "both":
        initial = tl.load(strength_ptr + slots + slot)
    return strength, initial


@triton.jit
def factors(m, share, u, strength, mass_map, MAPS: tl.constexpr):
    """Factors on the sinks and off them for rows of sink mass m and other mass u.

    Under maps ``both``, ``share`` is the sum of the columns' strengths times their weights; the
    factor on a column is then the one on the sinks times its strength.
    """
    if MAPS == "both":
        outside = 1.0 / tl.maximum(u + share, 1e-30)
        inside = outside
    else:
        damp = mass_map == 1
        scaled = tl.maximum(u + strength * m, 1e-30)
        # with less than 1e-6 a damped row is left alone, and any finite factors will do
        inside = tl.where(damp, strength, strength / scaled)
        outside = tl.where(damp, (1.0 - strength * m) / tl.maximum(u, 1e-6), 1.0 / scaled)
        if MAPS == "raise":
            raised = mass_map == 2
            scaled = u + strength
            inside = tl.where(raised, strength / tl.maximum(m, 1e-30) / scaled, inside)
            outside = tl.where(raised, 1.0 / scaled, outside)
    return inside, outside


@triton.jit
def moves(m, strength, mass_map, MAPS: tl.constexpr):
    """Whether rows of sink mass m change, and whether they are left alone for having so little."""
    changes = m > 0
    nothing = m < 0
    if MAPS == "raise":
        # Of m's shape: Triton 3.9's interpreter makes integers of a scalar truth value beside rows.
        raised = m * 0.0 + mass_map == 2
        nothing = changes & raised & (m < 1e-30)
        changes = changes & (nothing == 0) & ((raised == 0) | (m < strength))
    return changes, nothing


@triton.jit
def left(m, share, inside, outside, MAPS: tl.constexpr):
    """What a mass m on the sinks loses: m - m'; ``share`` as in ``factors``."""
    if MAPS == "both":
        lost = m - share * outside
    else:
        lost = m * (1.0 - inside)
    return lost


@triton.jit
def add_values(acc, weight, v, EXACT: tl.constexpr, PRECISION: tl.constexpr, MAPS: tl.constexpr):
    """Add weighted values; ``EXACT``: with what rounding takes off the weights."""
    if MAPS == "usual":
        high = weight.to(v.dtype)
        acc += tl.dot(high, v, input_precision=PRECISION)
        if EXACT and v.dtype != tl.float32:
            acc += tl.dot((weight - high.to(tl.float32)).to(v.dtype), v)
    else:  # strengths make much of little and little of much: neither fits into fp16
        wide = v.to(tl.float32)
        if EXACT and v.dtype != tl.float32:
            acc += tl.dot(weight, wide, input_precision="tf32x3")
        else:
            acc += tl.dot(weight, wide, input_precision=PRECISION)
    return acc


@triton.jit
def on_sinks(
    q, lse, lo, hi, index_base, seen_base, k_base, v_base, count, first_column, columns,
    skn, svn, scale, softcap, few_rows, strength, initial,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, REPORT: tl.constexpr, MAPS: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Masses and values of a block of rows on the sinks.

    Returns the mass, the same of columns that few rows see, and values by their weights. Under maps
    ``both`` also the two masses with every weight times its column's strength; values are then by
    such weights, and with ``DIFFERENCE`` by what these exceed the weights.
    """
    d = tl.arange(0, BD)
    m = tl.zeros([BM], tl.float32)
    few = tl.zeros([BM], tl.float32)
    share = tl.zeros([BM], tl.float32)
    few_share = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for start in range(0, count, BS):
        s = start + tl.arange(0, BS)
        position = tl.load(index_base + s, mask=s < count, other=0)
        if MAPS == "both":
            own = tl.where(position >= 0x20000000, initial, strength)
            position = position & 0x1FFFFFFF
        n = position - first_column
        held = (s < count) & (n >= 0) & (n < columns)
        k = tl.load(
            k_base + n[None, :] * skn + d[:, None],
            mask=held[None, :] & (d < D)[:, None], other=0.0,
        )  # fmt: skip
        v = tl.load(
            v_base + n[:, None] * svn + d[None, :],
            mask=held[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        sees = held[None, :] & (n[None, :] >= lo[:, None]) & (n[None, :] <= hi[:, None])
        value = logits(q, k, scale, softcap, SOFTCAP, PRECISION) - lse[:, None]
        weight = tl.exp2(tl.where(sees, value, float("-inf")))
        m += tl.sum(weight, axis=1)
        if REPORT:
            rare = tl.load(seen_base + position, mask=s < count, other=few_rows) < few_rows
            few += tl.sum(tl.where(rare[None, :], weight, 0.0), axis=1)
        if MAPS == "both":
            scaled = weight * own[None, :]
            share += tl.sum(scaled, axis=1)
            if REPORT:
                few_share += tl.sum(tl.where(rare[None, :], scaled, 0.0), axis=1)
            if DIFFERENCE:
                weight = weight * (own - 1.0)[None, :]
            else:
                weight = scaled
        # rounding is made up for: these products are subtracted later
        acc = add_values(acc, weight, v, True, PRECISION, MAPS)
    return m, few, share, few_share, acc


@triton.jit
def store_tally(place, plane, moved, few_moved, alone) -> None:
    """Store a program's part of the report."""
    tl.store(place, moved)
    tl.store(place + plane, few_moved)
    tl.store(place + 2 * plane, alone)


@triton.jit(do_not_specialize=["slots", "width"])
def apply_sinks(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, heads_ptr, strength_ptr, map_ptr,
    kind_ptr, lo_ptr, hi_ptr, seen_ptr, index_ptr, count_ptr,
    counts_ptr, found_ptr, arrived_ptr, tally_ptr,
    sqb, sqh, sqm, skb, skh, skn, svb, svh, svn, sob, soh, som, slb, slh, slm,
    rows, columns, total, sink_total, first_column, slots, per_group, scale, softcap,
    few_rows, most_on, width,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BY_HEAD: tl.constexpr,
    CONTINUE: tl.constexpr, REPORT: tl.constexpr, MAPS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
) -> None:  # fmt: skip
    """Calibrate rows of the selected heads in ``out`` (B, C, H, D) by the difference.

    Rows where that would lose digits (what is subtracted from is more than twice as long as the
    result, or the mass on the sinks is above ``most_on``) are left to the module ``direct``, which
    sums them anew: a program writes those of its rows to the front of its part of ``found``
    (B, h, C), and their number to ``counts`` (B, h, programs).
    Of ``tally`` (3, B, h, width) it gets its program's place: the sums over its rows of m - m' and
    of the share of it on columns that few rows see, and how many are left alone. ``arrived`` is
    set to 0 for ``direct``.
    """
    block = tl.program_id(0)
    pair = tl.program_id(1)
    pairs = tl.num_programs(1).to(tl.int64)
    b = (pair // slots).to(tl.int64)
    slot = pair % slots
    count = tl.load(count_ptr + pair)
    d = tl.arange(0, BD)
    m = block * BM + tl.arange(0, BM)
    row_base = pair.to(tl.int64) * rows
    live = m < rows
    counts_at = counts_ptr + pair.to(tl.int64) * tl.num_programs(0) + block
    tally = tally_ptr + pair.to(tl.int64) * width + block
    if (block == 0) & (pair == 0):
        tl.store(arrived_ptr, 0)
    if count == 0:
        tl.store(counts_at, 0)
        if REPORT:
            store_tally(tally, pairs * width, 0.0, 0.0, 0.0)
    if count > 0:
        head = tl.load(heads_ptr + slot).to(tl.int64)
        kind = tl.load(kind_ptr + b * rows + m, mask=live, other=0)
        active = live & ((kind == 1) | (kind == 2)) if CONTINUE else live & (kind == 1)
        tile = dense(active[:, None], d[None, :], D, BD)
        q = tl.load(
            q_ptr + b * sqb + head * sqh + m[:, None] * sqm + d[None, :], mask=tile, other=0.0
        )
        out_at = out_ptr + b * sob + head * soh + m[:, None] * som + d[None, :]
        old = tl.load(out_at, mask=tile, other=0.0)  # before the sinks: its latency hides there
        lse_base = lse_ptr + b * slb + (head if BY_HEAD else slot.to(tl.int64)) * slh
        lse = tl.load(lse_base + m * slm, mask=active, other=float("inf")) * _LOG2E
        if PLAIN:
            lo = tl.zeros([BM], tl.int32)
            hi = tl.where(active, m, -1)
        else:
            lo = tl.load(lo_ptr + b * rows + m, mask=active, other=columns)
            hi = tl.load(hi_ptr + b * rows + m, mask=active, other=-1)
        strength, initial = strengths_of(strength_ptr, slot, slots, MAPS)
        on, few, share, few_share, acc = on_sinks(
            q, lse, lo, hi, index_ptr + pair.to(tl.int64) * sink_total, seen_ptr + b * sink_total,
            k_ptr + b * skb + (head // per_group) * skh,
            v_ptr + b * svb + (head // per_group) * svh,
            count, first_column, columns, skn, svn, scale, softcap, few_rows, strength, initial,
            SOFTCAP, PRECISION, REPORT, MAPS, True, D, BD, BM, BS,
        )  # fmt: skip
        mass_map = tl.load(map_ptr + slot)
        moved, nothing = moves(on, strength, mass_map, MAPS)
        touched = active & moved
        inside, outside = factors(
            on, share, tl.where(touched, 1.0 - on, 1.0), strength, mass_map, MAPS
        )
        old = outside[:, None] * old.to(tl.float32)
        if MAPS == "both":
            result = old + outside[:, None] * acc
        else:
            result = old + (inside - outside)[:, None] * acc
        lost = tl.sum(old * old, axis=1) > 4.0 * tl.sum(result * result, axis=1)
        direct = touched & (lost | (on > most_on))
        changes = touched & (direct == 0)
        ones = direct.to(tl.int32)
        tl.store(counts_at, tl.sum(ones, axis=0))
        place = block * BM + tl.cumsum(ones, axis=0) - 1
        tl.store(found_ptr + row_base + place, m, mask=direct)
        tl.store(
            out_at, result.to(out_ptr.dtype.element_ty),
            mask=dense(changes[:, None], d[None, :], D, BD),
        )  # fmt: skip
        if REPORT:
            counts = changes & (kind == 1)
            lost_on = tl.where(counts, left(on, share, inside, outside, MAPS), 0.0)
            lost_few = tl.where(counts, left(few, few_share, inside, outside, MAPS), 0.0)
            alone = 0.0
            if MAPS == "raise":
                alone = tl.sum((active & nothing & (kind == 1)).to(tl.float32), axis=0)
            store_tally(
                tally, pairs * width, tl.sum(lost_on, axis=0), tl.sum(lost_few, axis=0), alone
            )
