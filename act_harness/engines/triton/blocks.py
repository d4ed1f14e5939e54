"""Block sizes of the kernels of a prefill, and which are chosen for a shape."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Blocks", "default_blocks"]


class Blocks(NamedTuple):
    """Block sizes of the kernels (powers of two; at least 16 for rows, columns and sinks)."""

    sums_rows: int
    sums_columns: int
    sums_warps: int
    apply_rows: int
    direct_rows: int
    direct_columns: int
    sinks: int = 16
    stages: int = 3
    fold: bool = True
    apply_warps: int = 4
    direct_warps: int = 4
    direct_stages: int = 3
    direct_registers: int | None = None
    """Most registers of a thread, so that more programs fit side by side; None: as needed."""
    sums_registers: int | None = None
    apply_registers: int | None = None
    apply_stages: int = 3
    items: int = 132
    """Programs that listed rows are split for, to fill the chip."""
    least: int = 256
    """Fewest columns of a split."""
    finish_rows: int = 32
    """Rows whose parts one program adds up; at most ``direct_rows``."""


_ENOUGH_SHARED = 96 << 10
"""Bytes of shared memory that the blocks below need at most (88 KiB, compiled for Ada)."""


def default_blocks(
    size: int, dtype: torch.dtype, rows: int, *, shared: int | None = None
) -> Blocks:
    """Choose blocks for heads of ``size`` values, by what the tuner measured.

    Args:
        size: D.
        dtype: of the inputs.
        rows: queries of a sequence.
        shared: bytes of shared memory that a program may have; None: enough. Turing has 64 KiB.

    Measured on an H100 with bf16, 128 values, 7 and 32 heads, 4 x 2048 to 32768 tokens.

    - Sums of columns, of 64 x 128: three programs fit a multiprocessor and hide each other's waits;
      of 16384 rows and more the queries no longer come from the L2 cache alone, and twice the
      columns halve what is read.
    - Corrections, of 64 rows: the same at all lengths.
    - Rows summed anew, 64 a block: two programs fit a multiprocessor, the exponentials of one run
      beside the products of the other (128 rows read keys and values half as often and were 6 to
      8 % slower); split for two programs a multiprocessor, since more parts cost more than they
      bring.
    """
    if shared is not None and shared < _ENOUGH_SHARED:
        width = max(256, (1 << (size - 1).bit_length()) * dtype.itemsize)  # bytes of a row
        few = max(16, 16384 // width)
        return Blocks(
            few, min(64, 32768 // width), 4, min(32, few), few, 32 if width == 256 else 16,
            stages=2, direct_stages=2 if width <= 512 else 1, finish_rows=16,
        )  # fmt: skip
    if rows <= 16:
        return Blocks(16, 64, 4, 16, 16, 64, finish_rows=16)
    if dtype == torch.float32 or size > 128:
        columns = 16 if dtype == torch.float32 and size > 128 else 32  # 32: 100 KiB, of Ada's 99
        return Blocks(32, 64, 4, 32, 32, columns, stages=2, direct_stages=2)
    if rows < 1024:
        return Blocks(128, 64, 4, 64, 64, 64)
    chosen = Blocks(
        64, 128, 4, 64, 64, 64, sums_registers=168, apply_stages=1, apply_registers=168,
        items=264, finish_rows=16,
    )  # fmt: skip
    if rows >= 16384:
        chosen = chosen._replace(sums_columns=256, sums_warps=8, stages=2, sums_registers=128)
    return chosen
