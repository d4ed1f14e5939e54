"""Triton kernels that sum listed rows anew: mass and values off the sinks, in float32.

``apply_sinks`` finds the rows where a difference would lose digits; how many there are is known on
the device only. ``gather_rows`` makes one list of them for every sequence and slot (a *pair*) and
cuts it into blocks of rows, and its last program to arrive splits the columns of the longest blocks
(as flash-decoding does) into about as many items as fill the chip; ``direct_sums`` has a program for
every item, and ``finish_direct`` adds up the parts of split blocks, in order. So the same inputs
give the same bits, whatever the order in which programs ran.

Shapes and names are those of :mod:`act_harness.engines.triton.prefill_kernels`. ``work`` holds for every
block of rows (``per_pair`` for each pair; most are empty): 0 its first column, 1 its blocks of
columns (0: empty), 2 into how many items they are split, 3 its first item, 4 its first part among
``values``, -1 where nothing is split. ``items`` holds the block of every item, and which blocks
are split; ``facts`` the number of either. A pair's later blocks of rows see more columns, so items
are taken from the last on: what ends last is short.
"""

# ruff: noqa: E501 - kernels: Triton's own conventions
from __future__ import annotations

import triton
import triton.language as tl

from act_harness.engines.triton.prefill_kernels import (
    dense,
    factors,
    left,
    logits,
    moves,
    on_sinks,
    store_tally,
    strengths_of,
)

__all__ = ["direct_sums", "finish_direct", "gather_rows"]

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def share_out(
    work_ptr, items_ptr, facts_ptr, row_blocks, programs, aim, least, BLOCK: tl.constexpr
) -> None:  # fmt: skip
    """Split the longest blocks so that there are about ``aim`` items (0: split nothing).

    A block of more than ``most`` blocks of columns is split evenly, into at most twice its share,
    so that all parts fit into 2 * aim places.
    """
    summed = tl.zeros([], tl.int64)
    filled = tl.zeros([], tl.int32)
    longest = tl.zeros([], tl.int32)
    for start in range(0, row_blocks, BLOCK):
        g = start + tl.arange(0, BLOCK)
        length = tl.load(work_ptr + row_blocks + g, mask=g < row_blocks, other=0)
        summed += tl.sum(length.to(tl.int64), axis=0)
        filled += tl.sum((length > 0).to(tl.int32), axis=0)
        longest = tl.maximum(longest, tl.max(length, axis=0))
    # Splitting rounds up, by half an item a block on average.
    wanted = tl.maximum(tl.maximum(aim - filled // 2, aim // 2), 1)
    most = tl.maximum(tl.cdiv(summed, wanted).to(tl.int32), least)
    most = tl.where(aim > 0, most, tl.maximum(longest, 1))
    items = tl.zeros([], tl.int32)
    parts = tl.zeros([], tl.int32)
    split_blocks = tl.zeros([], tl.int32)
    for start in range(0, row_blocks, BLOCK):
        g = start + tl.arange(0, BLOCK)
        held = g < row_blocks
        length = tl.load(work_ptr + row_blocks + g, mask=held, other=0)
        number = tl.cdiv(length, most)
        split = number > 1
        ones = split.to(tl.int32)
        shared = tl.where(split, number, 0)
        item = items + tl.cumsum(number, axis=0) - number
        part = parts + tl.cumsum(shared, axis=0) - shared
        place = split_blocks + tl.cumsum(ones, axis=0) - ones
        tl.store(work_ptr + 2 * row_blocks + g, number, mask=held)
        tl.store(work_ptr + 3 * row_blocks + g, item, mask=held)
        tl.store(work_ptr + 4 * row_blocks + g, tl.where(split, part, -1), mask=held)
        for n in range(0, tl.max(number, axis=0)):
            tl.store(items_ptr + item + n, g, mask=n < number)
        tl.store(items_ptr + programs + place, g, mask=split)
        items += tl.sum(number, axis=0)
        parts += tl.sum(shared, axis=0)
        split_blocks += tl.sum(ones, axis=0)
    tl.store(facts_ptr, items)
    tl.store(facts_ptr + 1, split_blocks)


@triton.jit(
    do_not_specialize=[
        "slots", "counted", "per_pair", "row_blocks", "programs", "aim", "least", "width",
    ]
)  # fmt: skip
def gather_rows(
    counts_ptr, found_ptr, lo_ptr, hi_ptr, arrived_ptr, tally_ptr,
    listed_ptr, rows_ptr, work_ptr, items_ptr, facts_ptr,
    rows, columns, slots, counted, per_pair, row_blocks, programs, aim, least, width,
    PLAIN: tl.constexpr, REPORT: tl.constexpr, AM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, SHARED: tl.constexpr,
) -> None:  # fmt: skip
    """Put the rows that programs of ``apply_sinks`` found, AM each, into one list; measure its blocks.

    The program that arrives last shares the blocks of all pairs out.
    """
    pair = tl.program_id(0)
    b = (pair // slots).to(tl.int64)
    row_base = pair.to(tl.int64) * rows
    listed = tl.zeros([], tl.int32)
    j = tl.arange(0, AM)
    for start in range(0, counted, PARTS):
        part = start + tl.arange(0, PARTS)
        number = tl.load(
            counts_ptr + pair.to(tl.int64) * counted + part, mask=part < counted, other=0
        )
        before = listed + tl.cumsum(number, axis=0) - number
        held = j[None, :] < number[:, None]
        row = tl.load(found_ptr + row_base + part[:, None] * AM + j[None, :], mask=held, other=0)
        tl.store(rows_ptr + row_base + before[:, None] + j[None, :], row, mask=held)
        listed += tl.sum(number, axis=0)
    tl.store(listed_ptr + pair, listed)
    tl.debug_barrier()  # other threads wrote what is read below
    for start in range(0, per_pair, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        if PLAIN:  # the last row of a block sees most
            last = tl.minimum(block * BM + (BM - 1), listed - 1)
            low = tl.zeros([BLOCKS], tl.int32)
            high = tl.load(rows_ptr + row_base + last, mask=block * BM < listed, other=-1) + 1
        else:
            place = block[:, None] * BM + tl.arange(0, BM)[None, :]
            live = place < listed
            row = tl.load(rows_ptr + row_base + place, mask=live, other=0)
            low = tl.load(lo_ptr + b * rows + row, mask=live, other=columns)
            low = tl.min(low, axis=1) // BN * BN
            high = tl.max(tl.load(hi_ptr + b * rows + row, mask=live, other=-1), axis=1) + 1
        at = work_ptr + pair * per_pair + block
        tl.store(at, low, mask=block < per_pair)
        tl.store(at + row_blocks, tl.maximum(tl.cdiv(high - low, BN), 0), mask=block < per_pair)
    if REPORT:  # places of the tally that no block of rows may fill
        for start in range(counted, width, 1024):
            place = start + tl.arange(0, 1024)
            for plane in tl.static_range(3):
                at = tally_ptr + (plane * tl.num_programs(0) + pair).to(tl.int64) * width + place
                tl.store(at, 0.0, mask=place < width)
    tl.debug_barrier()  # all threads' part of ``work`` is stored before this program has arrived
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrived_ptr, 0)
        share_out(
            work_ptr, items_ptr, facts_ptr, row_blocks, programs, aim, least, SHARED
        )  # fmt: skip


@triton.jit
def tile(pointers, d, D: tl.constexpr, BD: tl.constexpr):
    """Load a tile of whole rows, or columns, of values."""
    if D == BD:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=d < D, other=0.0)
    return values


@triton.jit
def off_sinks(
    q, lse, lo, hi, off, rest, begin, end,
    k_base, v_base, bias_base, holds_base, flags_base, real_base,
    skn, svn, columns, total, sink_total, first_column, scale, softcap,
    EDGE: tl.constexpr, PLAIN: tl.constexpr, REPORT: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add mass and values off the sinks in columns ``begin..end - 1``.

    Unless ``EDGE``, all of them are held and every row sees all but sinks and pads: no masks. The
    bias is read only where ``holds`` says so, and hardly any block holds a sink: read in every
    round, by threads that all need all of it, it took longer than the products.
    """
    d = tl.arange(0, BD)
    for start in range(begin, end, BN):
        n = start + tl.arange(0, BN)
        t = first_column + n
        if REPORT:  # a prefill: sinks and pads are in the bias, loaded where there are any
            holds = tl.load(holds_base + (first_column + start) // BN)
            if not PLAIN:  # columns may be counted from within a block
                last = tl.minimum(first_column + start + BN, total) - 1
                holds = tl.maximum(holds, tl.load(holds_base + last // BN))
        if EDGE:
            held = n < columns
            near = tl.minimum(n, columns - 1)  # what no row sees may be anything finite: no masks
            k = tile(k_base + near[None, :] * skn + d[:, None], d[:, None], D, BD)
            v = tile(v_base + near[:, None] * svn + d[None, :], d[None, :], D, BD)
            value = logits(q, k, scale, softcap, SOFTCAP, PRECISION) - lse[:, None]
            sees = n[None, :] <= hi[:, None]
            if not PLAIN:
                sees = sees & (n[None, :] >= lo[:, None])
            if not REPORT:
                real = tl.load(real_base + t, mask=held, other=0)
                flag = tl.load(flags_base + t, mask=held & (t < sink_total), other=0)
                sees = sees & ((real != 0) & (flag == 0))[None, :]
            value = tl.where(sees, value, float("-inf"))
            if REPORT:  # noqa: SIM102 - the compiler's own condition, around a program's
                if holds != 0:
                    value += tl.load(bias_base + t, mask=held, other=0.0)[None, :]
        else:
            k = tile(k_base + n[None, :] * skn + d[:, None], d[:, None], D, BD)
            v = tile(v_base + n[:, None] * svn + d[None, :], d[None, :], D, BD)
            value = logits(q, k, scale, softcap, SOFTCAP, PRECISION) - lse[:, None]
            if holds != 0:
                value += tl.load(bias_base + t)[None, :]
        weight = tl.exp2(value)
        off += tl.sum(weight, axis=1)
        rest += tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
    return off, rest


@triton.jit
def settle(
    m, live, q, lse, lo, hi, off, rest, pair, b, slot, head,
    k_base, v_base, out_ptr, strength_ptr, map_ptr, kind_ptr, seen_ptr, index_ptr, count_ptr, tally,
    skn, svn, sob, soh, som, rows, columns, sink_total, first_column, plane, scale, softcap,
    few_rows, min_other, slots,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, REPORT: tl.constexpr, MAPS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
) -> None:  # fmt: skip
    """Add the sinks' part to rows whose sums off the sinks are known, and write them."""
    d = tl.arange(0, BD)
    strength, initial = strengths_of(strength_ptr, slot, slots, MAPS)
    on, few, share, few_share, acc = on_sinks(
        q, lse, lo, hi, index_ptr + pair.to(tl.int64) * sink_total, seen_ptr + b * sink_total,
        k_base, v_base, tl.load(count_ptr + pair), first_column, columns, skn, svn, scale, softcap,
        few_rows, strength, initial, SOFTCAP, PRECISION, REPORT, MAPS, False, D, BD, BM, BS,
    )  # fmt: skip
    mass_map = tl.load(map_ptr + slot)
    moved, _ = moves(on, strength, mass_map, MAPS)
    alone = live & (mass_map == 1) & (off < min_other)
    changes = live & moved & (alone == 0)
    inside, outside = factors(on, share, tl.where(changes, off, 1.0), strength, mass_map, MAPS)
    result = outside[:, None] * rest + inside[:, None] * acc
    tl.store(
        out_ptr + b * sob + head * soh + m[:, None] * som + d[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=dense(changes[:, None], d[None, :], D, BD),
    )  # fmt: skip
    if REPORT:
        kind = tl.load(kind_ptr + b * rows + m, mask=live, other=0)
        counts = changes & (kind == 1)
        lost_on = tl.where(counts, left(on, share, inside, outside, MAPS), 0.0)
        lost_few = tl.where(counts, left(few, few_share, inside, outside, MAPS), 0.0)
        number = tl.sum((alone & (kind == 1)).to(tl.float32), axis=0)
        store_tally(tally, plane, tl.sum(lost_on, axis=0), tl.sum(lost_few, axis=0), number)


@triton.jit(do_not_specialize=["slots", "pairs", "per_pair", "width", "counted", "pieces"])
def direct_sums(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, heads_ptr, strength_ptr, map_ptr,
    kind_ptr, lo_ptr, hi_ptr, real_ptr, flags_ptr, bias_ptr, holds_ptr, seen_ptr, index_ptr, count_ptr,
    listed_ptr, rows_ptr, work_ptr, items_ptr, facts_ptr, tally_ptr, values_ptr, masses_ptr,
    sqb, sqh, sqm, skb, skh, skn, svb, svh, svn, sob, soh, som, slb, slh, slm,
    rows, columns, total, sink_total, first_column, slots, per_group, scale, softcap,
    few_rows, min_other, pairs, per_pair, width, counted, pieces,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BY_HEAD: tl.constexpr,
    REPORT: tl.constexpr, MAPS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
) -> None:  # fmt: skip
    """Sum a block of listed rows off the sinks; write ``out``, or an item's part of the sums.

    Parts: ``values`` (parts, BM, BD) and ``masses`` (parts, BM), float32.
    """
    item = tl.load(facts_ptr) - 1 - tl.program_id(0)
    if item >= 0:
        g = tl.load(items_ptr + item)
        pair = g // per_pair
        row_blocks = pairs * per_pair
        first = tl.load(work_ptr + g)
        length = tl.load(work_ptr + row_blocks + g)
        number = tl.load(work_ptr + 2 * row_blocks + g)
        nth = item - tl.load(work_ptr + 3 * row_blocks + g)
        part = tl.load(work_ptr + 4 * row_blocks + g)
        b = (pair // slots).to(tl.int64)
        slot = pair % slots
        head = tl.load(heads_ptr + slot).to(tl.int64)
        d = tl.arange(0, BD)
        place = g % per_pair * BM + tl.arange(0, BM)
        live = place < tl.load(listed_ptr + pair)
        m = tl.load(rows_ptr + pair.to(tl.int64) * rows + place, mask=live, other=0)
        if PLAIN:
            lo = tl.zeros([BM], tl.int32)
            hi = tl.where(live, m, -1)
        else:
            lo = tl.load(lo_ptr + b * rows + m, mask=live, other=columns)
            hi = tl.load(hi_ptr + b * rows + m, mask=live, other=-1)
        q = tl.load(
            q_ptr + b * sqb + head * sqh + m[:, None] * sqm + d[None, :],
            mask=dense(live[:, None], d[None, :], D, BD), other=0.0,
        )  # fmt: skip
        lse_base = lse_ptr + b * slb + (head if BY_HEAD else slot.to(tl.int64)) * slh
        lse = tl.load(lse_base + m * slm, mask=live, other=float("inf")) * _LOG2E
        k_base = k_ptr + b * skb + (head // per_group) * skh
        v_base = v_ptr + b * svb + (head // per_group) * svh
        bias_base = bias_ptr + pair.to(tl.int64) * total
        holds_base = holds_ptr + pair.to(tl.int64) * tl.cdiv(total, BN)
        flags_base = flags_ptr + pair.to(tl.int64) * sink_total
        real_base = real_ptr + b * total
        off = tl.zeros([BM], tl.float32)
        rest = tl.zeros([BM, BD], tl.float32)
        begin = first + nth * length // number * BN
        end = first + (nth + 1) * length // number * BN
        if PLAIN and REPORT:  # columns up to the first row's own are seen by all
            seen_by_all = (tl.min(tl.where(live, m, columns), axis=0) + 1) // BN * BN
            middle = tl.maximum(begin, tl.minimum(end, seen_by_all))
            off, rest = off_sinks(
                q, lse, lo, hi, off, rest, begin, middle,
                k_base, v_base, bias_base, holds_base, flags_base, real_base,
                skn, svn, columns, total, sink_total, first_column, scale, softcap,
                False, PLAIN, REPORT, SOFTCAP, PRECISION, D, BD, BN,
            )  # fmt: skip
            begin = middle
        off, rest = off_sinks(
            q, lse, lo, hi, off, rest, begin, end,
            k_base, v_base, bias_base, holds_base, flags_base, real_base,
            skn, svn, columns, total, sink_total, first_column, scale, softcap,
            True, PLAIN, REPORT, SOFTCAP, PRECISION, D, BD, BN,
        )  # fmt: skip
        if number > 1:
            at = (part + nth).to(tl.int64) * BM + tl.arange(0, BM)
            tl.store(masses_ptr + at, off)
            tl.store(values_ptr + at[:, None] * BD + d[None, :], rest)
        else:
            tally = tally_ptr + pair.to(tl.int64) * width + counted + g % per_pair * pieces
            settle(
                m, live, q, lse, lo, hi, off, rest, pair, b, slot, head,
                k_base, v_base, out_ptr, strength_ptr, map_ptr, kind_ptr, seen_ptr, index_ptr, count_ptr, tally,
                skn, svn, sob, soh, som, rows, columns, sink_total, first_column, pairs.to(tl.int64) * width, scale, softcap,
                few_rows, min_other, slots, SOFTCAP, PRECISION, REPORT, MAPS, D, BD, BM, BS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["slots", "pairs", "per_pair", "width", "counted", "programs"])
def finish_direct(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, heads_ptr, strength_ptr, map_ptr,
    kind_ptr, lo_ptr, hi_ptr, seen_ptr, index_ptr, count_ptr,
    listed_ptr, rows_ptr, work_ptr, items_ptr, facts_ptr, tally_ptr, values_ptr, masses_ptr,
    sqb, sqh, sqm, skb, skh, skn, svb, svh, svn, sob, soh, som, slb, slh, slm,
    rows, columns, sink_total, first_column, slots, per_group, scale, softcap,
    few_rows, min_other, pairs, per_pair, width, counted, programs,
    PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BY_HEAD: tl.constexpr,
    REPORT: tl.constexpr, MAPS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, FM: tl.constexpr,
) -> None:  # fmt: skip
    """Add up the parts of split blocks, FM rows a program, and write the rows."""
    number = tl.program_id(0) // (BM // FM)
    if number < tl.load(facts_ptr + 1):
        g = tl.load(items_ptr + programs + number)
        pair = g // per_pair
        row_blocks = pairs * per_pair
        inner = tl.program_id(0) % (BM // FM) * FM + tl.arange(0, FM)
        place = g % per_pair * BM + inner
        live = place < tl.load(listed_ptr + pair)
        pieces = tl.load(work_ptr + 2 * row_blocks + g)
        part = tl.load(work_ptr + 4 * row_blocks + g).to(tl.int64)
        m = tl.load(rows_ptr + pair.to(tl.int64) * rows + place, mask=live, other=0)
        b = (pair // slots).to(tl.int64)
        slot = pair % slots
        head = tl.load(heads_ptr + slot).to(tl.int64)
        d = tl.arange(0, BD)
        if PLAIN:
            lo = tl.zeros([FM], tl.int32)
            hi = tl.where(live, m, -1)
        else:
            lo = tl.load(lo_ptr + b * rows + m, mask=live, other=columns)
            hi = tl.load(hi_ptr + b * rows + m, mask=live, other=-1)
        q = tl.load(
            q_ptr + b * sqb + head * sqh + m[:, None] * sqm + d[None, :],
            mask=dense(live[:, None], d[None, :], D, BD), other=0.0,
        )  # fmt: skip
        lse_base = lse_ptr + b * slb + (head if BY_HEAD else slot.to(tl.int64)) * slh
        lse = tl.load(lse_base + m * slm, mask=live, other=float("inf")) * _LOG2E
        off = tl.zeros([FM], tl.float32)
        rest = tl.zeros([FM, BD], tl.float32)
        for nth in tl.range(0, pieces, num_stages=3):
            at = (part + nth) * BM + inner
            off += tl.load(masses_ptr + at)
            rest += tl.load(values_ptr + at[:, None] * BD + d[None, :])
        piece = tl.program_id(0) % (BM // FM)
        tally = tally_ptr + pair.to(tl.int64) * width + counted
        tally += g % per_pair * (BM // FM) + piece
        settle(
            m, live, q, lse, lo, hi, off, rest, pair, b, slot, head,
            k_ptr + b * skb + (head // per_group) * skh,
            v_ptr + b * svb + (head // per_group) * svh,
            out_ptr, strength_ptr, map_ptr, kind_ptr, seen_ptr, index_ptr, count_ptr, tally,
            skn, svn, sob, soh, som, rows, columns, sink_total, first_column, pairs.to(tl.int64) * width, scale, softcap,
            few_rows, min_other, slots, SOFTCAP, PRECISION, REPORT, MAPS, D, BD, FM, BS,
        )  # fmt: skip
