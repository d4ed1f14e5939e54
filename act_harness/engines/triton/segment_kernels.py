"""Triton kernels of packed rows: sinks and calibrated rows of segments, without pads.

A program of :func:`segment_sinks` works for one context and one selected head ("slot"): it sums the
attention that every column gets from the prompt's rows, block of columns by block, flags the sinks
and, where it is ``FUSED``, calibrates the rows itself. :func:`segment_rows` does that for a block of
rows: of long contexts, and of answers, which see the sinks of their context. Rows are always summed
directly, sinks and others apart in float32, never corrected by a difference: prompts of a benchmark
are short, and one launch costs more than the products that the difference would save.

What a segment is: :class:`act_harness.engines.segments.Segments`. N queries, M gathered keys.
Whatever a model fixes (strides, settings) is a constant, so that one compiled kernel serves all
forwards and few arguments are left to pass; see :mod:`act_harness.engines.triton.segments`.
"""

# ruff: noqa: E501 - kernels: Triton's own conventions
from __future__ import annotations

import triton
import triton.language as tl

from act_harness.engines.triton.prefill_kernels import (
    add_values,
    dense,
    factors,
    left,
    moves,
    strengths_of,
)

__all__ = ["segment_rows", "segment_sinks"]

_LOG2E = tl.constexpr(1.4426950408889634)
_LIFT = tl.constexpr(14.0)
"""Weights are held times 2 to this power: where nearly all mass lies on the sinks, the others' are
too small for fp16, which ends at 6e-8, and those are what a strong damping leaves."""
_DOWN = tl.constexpr(2.0**-14)


@triton.jit
def calibrated_rows(
    q_base, k_base, v_base, out_base, lse_base, flags_base, first_row, queries, keys, prompt,
    strength, initial, mass_map, sqn, skn, svn, son, scale, few_rows, min_other,
    CONTEXT: tl.constexpr, CONTINUE: tl.constexpr, PRECISION: tl.constexpr, MAPS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Calibrate a block of a segment's rows; return three sums over prompt rows.

    They are m - m', its share on columns that few rows see, and the number of rows left alone.
    """
    d = tl.arange(0, BD)
    m = first_row + tl.arange(0, BM)
    hi = m + (keys - queries)  # last column that a row sees
    given = hi < prompt
    active = m < queries
    if not CONTINUE:
        active = active & given
    q = tl.load(
        q_base + m[:, None] * sqn + d[None, :],
        mask=dense(active[:, None], d[None, :], D, BD), other=0.0,
    )  # fmt: skip
    lse = tl.load(lse_base + m, mask=active, other=float("inf")) * _LOG2E - _LIFT
    on = tl.zeros([BM], tl.float32)
    off = tl.zeros([BM], tl.float32)
    few = tl.zeros([BM], tl.float32)
    share = tl.zeros([BM], tl.float32)
    few_share = tl.zeros([BM], tl.float32)
    hit = tl.zeros([BM, BD], tl.float32)
    rest = tl.zeros([BM, BD], tl.float32)
    last = tl.minimum(first_row + BM, queries) + (keys - queries)
    for start in range(0, last, BN):
        n = start + tl.arange(0, BN)
        held = n < keys
        k = tl.load(
            k_base + n[None, :] * skn + d[:, None],
            mask=dense(held[None, :], d[:, None], D, BD), other=0.0,
        )  # fmt: skip
        v = tl.load(
            v_base + n[:, None] * svn + d[None, :],
            mask=dense(held[:, None], d[None, :], D, BD), other=0.0,
        )  # fmt: skip
        flag = tl.load(flags_base + n, mask=n < prompt, other=0)
        value = tl.dot(q, k, input_precision=PRECISION) * (scale * _LOG2E) - lse[:, None]
        weight = tl.exp2(tl.where(n[None, :] <= hi[:, None], value, float("-inf")))
        other = tl.where((flag != 0)[None, :], 0.0, weight)
        off += tl.sum(other, axis=1)
        rest += tl.dot(other.to(v.dtype), v, input_precision=PRECISION)
        if tl.max(flag.to(tl.int32), axis=0) > 0:
            sink = weight - other
            on += tl.sum(sink, axis=1)
            rare = (n > prompt - few_rows)[None, :]
            if CONTEXT:
                few += tl.sum(tl.where(rare, sink, 0.0), axis=1)
            if MAPS == "both":
                sink = sink * tl.where(n == 0, initial, strength)[None, :]
                share += tl.sum(sink, axis=1)
                if CONTEXT:
                    few_share += tl.sum(tl.where(rare, sink, 0.0), axis=1)
            hit = add_values(hit, sink, v, False, PRECISION, MAPS)
    on, off, few = on * _DOWN, off * _DOWN, few * _DOWN
    share, few_share = share * _DOWN, few_share * _DOWN
    moved, nothing = moves(on, strength, mass_map, MAPS)
    alone = active & (((mass_map == 1) & (off < min_other)) | nothing)
    changes = active & moved & (alone == 0)
    inside, outside = factors(on, share, tl.where(changes, off, 1.0), strength, mass_map, MAPS)
    result = (outside * _DOWN)[:, None] * rest + (inside * _DOWN)[:, None] * hit
    at = out_base + m[:, None] * son + d[None, :]
    tl.store(
        at, result.to(out_base.dtype.element_ty), mask=dense(changes[:, None], d[None, :], D, BD)
    )
    counts = changes & given
    lost_on = tl.where(counts, left(on, share, inside, outside, MAPS), 0.0)
    lost_few = tl.where(counts, left(few, few_share, inside, outside, MAPS), 0.0)
    number = tl.sum((alone & given).to(tl.float32), axis=0)
    return tl.sum(lost_on, axis=0), tl.sum(lost_few, axis=0), number


@triton.jit(do_not_specialize=["slh", "width"])
def segment_sinks(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table_ptr, heads_ptr, strength_ptr, map_ptr,
    flags_ptr, facts_ptr, slh, width,
    sqn: tl.constexpr, sqh: tl.constexpr, skn: tl.constexpr, skh: tl.constexpr,
    svn: tl.constexpr, svh: tl.constexpr, son: tl.constexpr, soh: tl.constexpr,
    slots: tl.constexpr, per_group: tl.constexpr, scale: tl.constexpr, few_rows: tl.constexpr,
    min_other: tl.constexpr, limit: tl.constexpr, min_rows: tl.constexpr, boundary: tl.constexpr,
    TARGET: tl.constexpr, RELATIVE: tl.constexpr, PROTECT: tl.constexpr, AUTO: tl.constexpr,
    FUSED: tl.constexpr, CONTINUE: tl.constexpr, PRECISION: tl.constexpr, MAPS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """Write flags (contexts, h, width) uint8 and facts (6, contexts, h) of the contexts."""
    pair = tl.program_id(0)
    pairs = tl.num_programs(0)
    context = pair // slots
    slot = pair % slots
    head = tl.load(heads_ptr + slot).to(tl.int64)
    row = table_ptr + context * 6
    first = tl.load(row).to(tl.int64)
    queries = tl.load(row + 1)
    prompt = tl.load(row + 4)
    d = tl.arange(0, BD)
    q_base = q_ptr + first * sqn + head * sqh
    k_base = k_ptr + tl.load(row + 2).to(tl.int64) * skn + (head // per_group) * skh
    lse_base = lse_ptr + head * slh + first
    flags_base = flags_ptr + pair.to(tl.int64) * width
    most = tl.maximum(prompt, 1).to(tl.float32)
    threshold = limit / most if RELATIVE else limit
    needed = tl.ceil(most / limit) if AUTO else min_rows * 1.0
    count = tl.zeros([], tl.int32)
    flagged = tl.zeros([], tl.int32)
    few = tl.zeros([], tl.int32)
    near = tl.zeros([], tl.int32)
    for start in range(0, prompt, BN):
        t = start + tl.arange(0, BN)
        held = t < prompt
        if TARGET == "initial":
            sink = t == 0
        else:
            k = tl.load(
                k_base + t[:, None] * skn + d[None, :],
                mask=dense(held[:, None], d[None, :], D, BD), other=0.0,
            )  # fmt: skip
            mass = tl.zeros([BN], tl.float32)
            for begin in range((start // BM) * BM, prompt, BM):
                m = begin + tl.arange(0, BM)
                q = tl.load(
                    q_base + m[None, :] * sqn + d[:, None],
                    mask=dense((m < prompt)[None, :], d[:, None], D, BD), other=0.0,
                )  # fmt: skip
                lse = tl.load(lse_base + m, mask=m < prompt, other=float("inf")) * _LOG2E
                value = tl.dot(k, q, input_precision=PRECISION) * (scale * _LOG2E) - lse[None, :]
                weight = tl.exp2(tl.where(t[:, None] <= m[None, :], value, float("-inf")))
                mass += tl.sum(weight, axis=1)
            seen = (prompt - t).to(tl.float32)
            eligible = held & (seen >= needed)
            if PROTECT == 1:
                eligible = eligible & (t != 0)
            ratio = tl.where(eligible, mass / tl.maximum(seen, 1.0) / threshold, 0.0)
            near = tl.maximum(near, tl.max((tl.abs(ratio - 1.0) < boundary).to(tl.int32), axis=0))
            sink = ratio > 1.0
            if PROTECT == 2:
                order = flagged + tl.cumsum(sink.to(tl.int32), axis=0)
                flagged += tl.sum(sink.to(tl.int32), axis=0)
                sink = sink & (order != 1)
            if TARGET == "both":
                sink = sink | (t == 0)
        tl.store(flags_base + t, sink.to(tl.uint8), mask=held)
        count += tl.sum((sink & held).to(tl.int32), axis=0)
        few += tl.sum((sink & held & (t > prompt - few_rows)).to(tl.int32), axis=0)
    moved = tl.zeros([], tl.float32)
    few_moved = tl.zeros([], tl.float32)
    alone = tl.zeros([], tl.float32)
    if FUSED:
        tl.debug_barrier()  # the flags that other threads stored
        if count > 0:
            strength, initial = strengths_of(strength_ptr, slot, slots, MAPS)
            mass_map = tl.load(map_ptr + slot)
            v_base = v_ptr + tl.load(row + 2).to(tl.int64) * svn + (head // per_group) * svh
            out_base = out_ptr + first * son + head * soh
            for begin in range(0, queries, BM):
                one, two, three = calibrated_rows(
                    q_base, k_base, v_base, out_base, lse_base, flags_base, begin, queries, queries,
                    prompt, strength, initial, mass_map, sqn, skn, svn, son, scale, few_rows,
                    min_other, True, CONTINUE, PRECISION, MAPS, D, BD, BM, BN,
                )  # fmt: skip
                moved += one
                few_moved += two
                alone += three
    facts = facts_ptr + pair
    tl.store(facts, count.to(tl.float32))
    tl.store(facts + pairs, few.to(tl.float32))
    tl.store(facts + 2 * pairs, moved)
    tl.store(facts + 3 * pairs, few_moved)
    tl.store(facts + 4 * pairs, alone)
    tl.store(facts + 5 * pairs, near.to(tl.float32))


@triton.jit(do_not_specialize=["slh", "width", "first_segment", "contexts"])
def segment_rows(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table_ptr, heads_ptr, strength_ptr, map_ptr,
    flags_ptr, facts_ptr, tally_ptr, slh, width, first_segment, contexts,
    sqn: tl.constexpr, sqh: tl.constexpr, skn: tl.constexpr, skh: tl.constexpr,
    svn: tl.constexpr, svh: tl.constexpr, son: tl.constexpr, soh: tl.constexpr,
    slots: tl.constexpr, per_group: tl.constexpr, scale: tl.constexpr, few_rows: tl.constexpr,
    min_other: tl.constexpr,
    CONTEXT: tl.constexpr, CONTINUE: tl.constexpr, PRECISION: tl.constexpr, MAPS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """Calibrate the rows of segments by the flags of their contexts.

    ``CONTEXT``: the segments are the contexts, and tally (3, contexts, h, blocks) gets what their
    blocks of rows contribute to the facts; ``facts`` holds the numbers of sinks in any case.
    """
    block = tl.program_id(0)
    pair = tl.program_id(1)
    slot = pair % slots
    row = table_ptr + (first_segment + pair // slots) * 6
    queries = tl.load(row + 1)
    place = tl.load(row + 5) * slots + slot
    count = tl.load(facts_ptr + place)
    moved = tl.zeros([], tl.float32)
    few_moved = tl.zeros([], tl.float32)
    alone = tl.zeros([], tl.float32)
    if (block * BM < queries) & (count > 0):
        head = tl.load(heads_ptr + slot).to(tl.int64)
        first = tl.load(row).to(tl.int64)
        key = tl.load(row + 2).to(tl.int64)
        strength, initial = strengths_of(strength_ptr, slot, slots, MAPS)
        moved, few_moved, alone = calibrated_rows(
            q_ptr + first * sqn + head * sqh,
            k_ptr + key * skn + (head // per_group) * skh,
            v_ptr + key * svn + (head // per_group) * svh,
            out_ptr + first * son + head * soh,
            lse_ptr + head * slh + first,
            flags_ptr + place.to(tl.int64) * width,
            block * BM, queries, tl.load(row + 3), tl.load(row + 4),
            strength, initial, tl.load(map_ptr + slot),
            sqn, skn, svn, son, scale, few_rows, min_other,
            CONTEXT, CONTINUE, PRECISION, MAPS, D, BD, BM, BN,
        )  # fmt: skip
    if CONTEXT:
        blocks = tl.num_programs(0)
        plane = contexts.to(tl.int64) * slots * blocks
        tally = tally_ptr + pair.to(tl.int64) * blocks + block
        tl.store(tally, moved)
        tl.store(tally + plane, few_moved)
        tl.store(tally + 2 * plane, alone)
