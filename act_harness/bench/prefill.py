"""Whole-model prefill: the stock model beside the same model with calibrated attention.

Run as ``python -m act_harness.bench.prefill --help``. Logits are computed for the last token only,
so that the output head does not hide the attention.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from act_harness.bench.common import Timing, alternate, peak_memory, ratio
from act_harness.bench.models import Arms, bench_model, random_tokens

__all__ = ["main", "measure"]

_logger = logging.getLogger(__name__)
_COLUMNS = ("batch", "tokens", "variant", "ms", "spread", "ratio", "peak_ratio")


def measure(
    pair: Arms, batch: int, tokens: int, *, device: str, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """Time both arms on prompts of one shape; return a record for each, and the timings."""
    inputs = [random_tokens(pair.stock, batch, tokens, seed) for seed in range(3)]

    def run(model: Any, turn: int) -> None:  # noqa: ANN401 - a model of either arm
        with torch.no_grad():
            model(input_ids=inputs[turn % 3], use_cache=False, logits_to_keep=1)

    variants = {name: (lambda turn, model=model: run(model, turn)) for name, model in pair.items()}
    peaks = {
        name: peak_memory(lambda function=function: function(0), device=device)  # type: ignore[misc]
        for name, function in variants.items()
    }
    timings = alternate(variants, device=device, rounds=rounds)
    records = []
    for name, timing in timings.items():
        peak, stock_peak = peaks[name], peaks["stock"]
        records.append(
            {
                "batch": batch,
                "tokens": tokens,
                "variant": name,
                "ms": timing.median * 1e3,
                "spread": timing.spread,
                "ratio": ratio(timings, name, "stock"),
                "peak_ratio": None if peak is None or not stock_peak else peak / stock_peak,
            }
        )
        _logger.info("%s", records[-1])
    return records, timings


def main(arguments: list[str] | None = None) -> Path:
    """Run the benchmark from a command line; return the report's path."""
    return bench_model(
        arguments,
        measure,
        name="prefill",
        title="Whole-model prefill with calibrated attention",
        description=__doc__,
        shapes=("4x2048,1x8192", "batch x tokens"),
        columns=_COLUMNS,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(main())
