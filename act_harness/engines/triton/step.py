"""Triton kernel of a decode step: one row over the cache, in one launch.

A step touches the columns of the prompt's sinks only, unless subtraction would lose digits (see
``kernels``); then, and where the stock kernel gives no log-sum-exp, a program reads all columns of
its row. One program works for one sequence and one selected head; products are summed in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from act_harness.engines.triton.kernels import dense, factors

__all__ = ["step_sinks"]

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
def step_sinks(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, heads_ptr, strength_ptr, damp_ptr,
    real_ptr, lo_ptr, hi_ptr, flags_ptr, index_ptr, count_ptr,
    sqb, sqh, skb, skh, skn, svb, svh, svn, sob, soh, slb, slh,
    columns, total, sink_total, first_column, slots, per_group, scale, softcap,
    min_other, most_on,
    OWN_LSE: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
) -> None:  # fmt: skip
    """Calibrate the row of every sequence in ``out`` (B, 1, H, D) by the prompt's sinks."""
    pair = tl.program_id(0)
    b = (pair // slots).to(tl.int64)
    slot = pair % slots
    count = tl.load(count_ptr + pair)
    row_real = tl.load(real_ptr + b * total + total - 1)
    if (count > 0) & (row_real != 0):
        head = tl.load(heads_ptr + slot).to(tl.int64)
        d = tl.arange(0, BD)
        q = tl.load(q_ptr + b * sqb + head * sqh + d, mask=d < D, other=0.0).to(tl.float32)
        k_base = k_ptr + b * skb + (head // per_group) * skh
        v_base = v_ptr + b * svb + (head // per_group) * svh
        lo = tl.load(lo_ptr + b)
        hi = tl.load(hi_ptr + b)
        first = (lo // BN) * BN
        if OWN_LSE:
            top = tl.full([BN], -1e30, tl.float32)
            mass = tl.zeros([BN], tl.float32)
            for start in range(first, hi + 1, BN):
                n = start + tl.arange(0, BN)
                held = (n >= lo) & (n <= hi)
                k = tl.load(
                    k_base + n[:, None] * skn + d[None, :],
                    mask=dense(held[:, None], d[None, :], D, BD), other=0.0,
                )  # fmt: skip
                real = tl.load(real_ptr + b * total + first_column + n, mask=held, other=0)
                value = tl.where(real != 0, products(q, k, scale, softcap, SOFTCAP), -1e30)
                new_top = tl.maximum(top, value)
                mass = mass * tl.exp2(top - new_top) + tl.where(
                    real != 0, tl.exp2(value - new_top), 0.0
                )
                top = new_top
            highest = tl.max(top, axis=0)
            lse = highest + tl.log2(tl.sum(mass * tl.exp2(top - highest), axis=0))
        else:
            lse = tl.load(lse_ptr + b * slb + head * slh) * _LOG2E
        on = tl.zeros([BS], tl.float32)
        acc = tl.zeros([BD], tl.float32)
        for start in range(0, count, BS):
            s = start + tl.arange(0, BS)
            position = tl.load(
                index_ptr + pair.to(tl.int64) * sink_total + s, mask=s < count, other=0
            )
            n = position - first_column
            held = (s < count) & (n >= lo) & (n <= hi)
            tile = dense(held[:, None], d[None, :], D, BD)
            k = tl.load(k_base + n[:, None] * skn + d[None, :], mask=tile, other=0.0)
            v = tl.load(v_base + n[:, None] * svn + d[None, :], mask=tile, other=0.0)
            value = products(q, k, scale, softcap, SOFTCAP) - lse
            weight = tl.exp2(tl.where(held, value, float("-inf")))
            on += weight
            acc += tl.sum(weight[:, None] * v.to(tl.float32), axis=0)
        m = tl.sum(on, axis=0)
        if m > 0:
            strength = tl.load(strength_ptr + slot)
            damp = tl.load(damp_ptr + slot) != 0
            out_at = out_ptr + b * sob + head * soh + d
            inside, outside = factors(m, 1.0 - m, strength, damp)
            old = outside * tl.load(out_at, mask=d < D, other=0.0).to(tl.float32)
            result = old + (inside - outside) * acc
            lost = tl.sum(old * old, axis=0) > 4.0 * tl.sum(result * result, axis=0)
            written = tl.where(m > 0, D, 0)
            if lost | (m > most_on):
                off = tl.zeros([BN], tl.float32)
                rest = tl.zeros([BD], tl.float32)
                for start in range(first, hi + 1, BN):
                    n = start + tl.arange(0, BN)
                    t = first_column + n
                    held = (n >= lo) & (n <= hi)
                    tile = dense(held[:, None], d[None, :], D, BD)
                    k = tl.load(k_base + n[:, None] * skn + d[None, :], mask=tile, other=0.0)
                    v = tl.load(v_base + n[:, None] * svn + d[None, :], mask=tile, other=0.0)
                    real = tl.load(real_ptr + b * total + t, mask=held, other=0)
                    flag = tl.load(
                        flags_ptr + pair.to(tl.int64) * sink_total + t,
                        mask=held & (t < sink_total), other=0,
                    )  # fmt: skip
                    value = products(q, k, scale, softcap, SOFTCAP) - lse
                    weight = tl.exp2(
                        tl.where(held & (real != 0) & (flag == 0), value, float("-inf"))
                    )
                    off += weight
                    rest += tl.sum(weight[:, None] * v.to(tl.float32), axis=0)
                u = tl.sum(off, axis=0)
                inside, outside = factors(m, u, strength, damp)
                result = outside * rest + inside * acc
                written = tl.where(damp, tl.where(u >= min_other, D, 0), D)
            tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=d < written)
