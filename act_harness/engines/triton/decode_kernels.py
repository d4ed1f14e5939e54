"""Triton kernels of a decode step: one row over the cache, in one launch.

A step touches the columns of the prompt's sinks only, unless subtraction would lose digits (see
``kernels``); then, and where the stock kernel gives no log-sum-exp, a program reads all columns of
its row. One program works for one sequence and one selected head; products are summed in float32.

What a layer's prefill found, and what its plan asks for, come in one *sheet*, (B, h, 5 + T) int32:
the number of sinks, the head, its strength (the bits of a float32), its mass map, the strength of
the initial token (maps ``both``). Then come T entries: entry i is the column of the i-th sink as
``flag_sinks`` lists it, plus ``FLAG`` where column i itself is a sink.

``step_dense`` takes contiguous tensors, so that one integer says where everything lies;
``step_sinks`` takes any strides. Numbers that grow with the sequence are not specialised on: a
kernel compiled once serves all steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from act_harness.engines.triton.prefill_kernels import dense, factors, moves

__all__ = ["FLAG", "HEADER", "step_dense", "step_sinks"]

HEADER = 5
"""Numbers before a sheet's entries."""

FLAG = 1 << 30
"""What an entry of a sheet has added where its own column is a sink."""

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def products(q, k, scale, softcap, SOFTCAP: tl.constexpr):
    """Scaled products of one row with a tile of keys, in units of log 2."""
    product = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
    if SOFTCAP:
        product = product * (2.0 * scale / softcap)
        result = (2.0 * tl.sigmoid(product) - 1.0) * (softcap * _LOG2E)
    else:
        result = product * (scale * _LOG2E)
    return result


@triton.jit
def row_of_a_pair(
    q_at, k_base, v_base, out_at, lse_at, sheet_at, seen_at,
    skn, svn, columns, first_column, sink_total, scale, softcap, min_other, most_on,
    OWN_LSE: tl.constexpr, PLAIN: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, MAPS: tl.constexpr,
) -> None:  # fmt: skip
    """Calibrate one row of one head; the pointers are the pair's own."""
    count = tl.load(sheet_at)
    if count > 0:
        entries = sheet_at + 5
        d = tl.arange(0, BD)
        q = tl.load(q_at + d, mask=d < D, other=0.0).to(tl.float32)
        if OWN_LSE:
            top = tl.full([BN], -1e30, tl.float32)
            mass = tl.zeros([BN], tl.float32)
            for start in range(0, columns, BN):
                n = start + tl.arange(0, BN)
                sees = n < columns
                k = tl.load(
                    k_base + n[:, None] * skn + d[None, :],
                    mask=dense(sees[:, None], d[None, :], D, BD), other=0.0,
                )  # fmt: skip
                if not PLAIN:
                    sees = tl.load(seen_at + n, mask=sees, other=0) != 0
                value = tl.where(sees, products(q, k, scale, softcap, SOFTCAP), -1e30)
                new_top = tl.maximum(top, value)
                mass = mass * tl.exp2(top - new_top) + tl.where(sees, tl.exp2(value - new_top), 0.0)
                top = new_top
            highest = tl.max(top, axis=0)
            lse = highest + tl.log2(tl.sum(mass * tl.exp2(top - highest), axis=0))
        else:
            lse = tl.load(lse_at) * _LOG2E
        strength = tl.load(sheet_at + 2).to(tl.float32, bitcast=True)
        on = tl.zeros([BS], tl.float32)
        acc = tl.zeros([BD], tl.float32)
        scaled = tl.zeros([BS], tl.float32)  # weights, and values by them, times their strengths
        acc_scaled = tl.zeros([BD], tl.float32)
        if MAPS == "both":
            initial = tl.load(sheet_at + 4).to(tl.float32, bitcast=True)
        for start in range(0, count, BS):
            s = start + tl.arange(0, BS)
            position = tl.load(entries + s, mask=s < count, other=0) & 0x3FFFFFFF
            if MAPS == "both":
                own = tl.where(position >= 0x20000000, initial, strength)
                position = position & 0x1FFFFFFF
            n = position - first_column
            sees = (s < count) & (n >= 0) & (n < columns)
            if not PLAIN:
                sees = sees & (tl.load(seen_at + n, mask=sees, other=0) != 0)
            tile = dense(sees[:, None], d[None, :], D, BD)
            k = tl.load(k_base + n[:, None] * skn + d[None, :], mask=tile, other=0.0)
            v = tl.load(v_base + n[:, None] * svn + d[None, :], mask=tile, other=0.0)
            value = products(q, k, scale, softcap, SOFTCAP) - lse
            weight = tl.exp2(tl.where(sees, value, float("-inf")))
            on += weight
            acc += tl.sum(weight[:, None] * v.to(tl.float32), axis=0)
            if MAPS == "both":
                weight = weight * own
                scaled += weight
                acc_scaled += tl.sum(weight[:, None] * v.to(tl.float32), axis=0)
        m = tl.sum(on, axis=0)
        share = tl.sum(scaled, axis=0)
        mass_map = tl.load(sheet_at + 3)
        changes, _ = moves(m, strength, mass_map, MAPS)
        if changes:
            damp = mass_map == 1
            inside, outside = factors(m, share, 1.0 - m, strength, mass_map, MAPS)
            old = outside * tl.load(out_at + d, mask=d < D, other=0.0).to(tl.float32)
            if MAPS == "both":
                result = old + outside * (acc_scaled - acc)
                acc = acc_scaled
            else:
                result = old + (inside - outside) * acc
            lost = tl.sum(old * old, axis=0) > 4.0 * tl.sum(result * result, axis=0)
            written = tl.where(m > 0, D, 0)
            if lost | (m > most_on):
                off = tl.zeros([BN], tl.float32)
                rest = tl.zeros([BD], tl.float32)
                for start in range(0, columns, BN):
                    n = start + tl.arange(0, BN)
                    t = first_column + n
                    sees = n < columns
                    tile = dense(sees[:, None], d[None, :], D, BD)
                    k = tl.load(k_base + n[:, None] * skn + d[None, :], mask=tile, other=0.0)
                    v = tl.load(v_base + n[:, None] * svn + d[None, :], mask=tile, other=0.0)
                    entry = tl.load(entries + t, mask=sees & (t < sink_total), other=0)
                    if not PLAIN:
                        sees = tl.load(seen_at + n, mask=sees, other=0) != 0
                    value = products(q, k, scale, softcap, SOFTCAP) - lse
                    weight = tl.exp2(tl.where(sees & (entry < 0x40000000), value, float("-inf")))
                    off += weight
                    rest += tl.sum(weight[:, None] * v.to(tl.float32), axis=0)
                u = tl.sum(off, axis=0)
                inside, outside = factors(m, share, u, strength, mass_map, MAPS)
                result = outside * rest + inside * acc
                written = tl.where(damp, tl.where(u >= min_other, D, 0), D)
            tl.store(out_at + d, result.to(out_at.dtype.element_ty), mask=d < written)


@triton.jit(do_not_specialize=["columns", "first_column", "sink_total", "slots"])
def step_dense(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sheet_ptr, seen_ptr,
    columns, first_column, sink_total, slots,
    SCALE: tl.constexpr, CAP: tl.constexpr, MIN_OTHER: tl.constexpr, MOST_ON: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr,
    OWN_LSE: tl.constexpr, PLAIN: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, MAPS: tl.constexpr,
) -> None:  # fmt: skip
    """Calibrate the row of every sequence in ``out`` (B, 1, H, D); all tensors are contiguous."""
    pair = tl.program_id(0).to(tl.int64)
    b = pair // slots
    sheet_at = sheet_ptr + pair * (sink_total + 5)
    head = tl.load(sheet_at + 1)
    row = b * HEADS + head
    group = (b * GROUPS + head // (HEADS // GROUPS)) * columns
    row_of_a_pair(
        q_ptr + row * D, k_ptr + group * D, v_ptr + group * D, out_ptr + row * D, lse_ptr + row,
        sheet_at, seen_ptr + b * columns,
        D, D, columns, first_column, sink_total, SCALE, CAP, MIN_OTHER, MOST_ON,
        OWN_LSE, PLAIN, SOFTCAP, D, BD, BN, BS, MAPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["columns", "first_column", "sink_total", "slots"])
def step_sinks(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sheet_ptr, seen_ptr,
    sqb, sqh, skb, skh, skn, svb, svh, svn, sob, soh, slb, slh,
    columns, first_column, sink_total, slots, per_group, scale, softcap, min_other, most_on,
    OWN_LSE: tl.constexpr, PLAIN: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, MAPS: tl.constexpr,
) -> None:  # fmt: skip
    """Calibrate the row of every sequence in ``out`` (B, 1, H, D), dense in their last axis."""
    pair = tl.program_id(0).to(tl.int64)
    b = pair // slots
    sheet_at = sheet_ptr + pair * (sink_total + 5)
    head = tl.load(sheet_at + 1).to(tl.int64)
    group = head // per_group
    row_of_a_pair(
        q_ptr + b * sqb + head * sqh, k_ptr + b * skb + group * skh, v_ptr + b * svb + group * svh,
        out_ptr + b * sob + head * soh, lse_ptr + b * slb + head * slh,
        sheet_at, seen_ptr + b * columns,
        skn, svn, columns, first_column, sink_total, scale, softcap, min_other, most_on,
        OWN_LSE, PLAIN, SOFTCAP, D, BD, BN, BS, MAPS,
    )  # fmt: skip
