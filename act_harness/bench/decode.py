"""Whole-model decode steps over a filled cache: stock beside calibrated attention.

Run as ``python -m act_harness.bench.decode --help``. Each arm prefills its own cache once and then
generates; a sample is one token for every sequence of the batch, as ``generate`` computes it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from act_harness.attention.cache import cache_argument, cache_of
from act_harness.bench.common import Timing, alternate, ratio
from act_harness.bench.models import Arms, bench_model, random_tokens

__all__ = ["main", "measure"]

_logger = logging.getLogger(__name__)
_COLUMNS = ("batch", "context", "variant", "ms", "spread", "ratio")


class _Generation:
    """One arm in the middle of generating."""

    def __init__(self, model: Any, tokens: torch.Tensor) -> None:  # noqa: ANN401 - any model
        self.model = model
        with torch.no_grad():
            out = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        self.given = {cache_argument(model.forward): cache_of(out), "use_cache": True}
        self.token = out.logits[:, -1:].argmax(dim=-1)

    def step(self) -> None:
        """Generate one token."""
        with torch.no_grad():
            out = self.model(input_ids=self.token, **self.given, logits_to_keep=1)
        self.token = out.logits[:, -1:].argmax(dim=-1)


def measure(
    pair: Arms, batch: int, context: int, *, device: str, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """Time both arms' decode steps; return a record for each, and the timings."""
    tokens = random_tokens(pair.stock, batch, context, 0)
    running = {name: _Generation(model, tokens) for name, model in pair.items()}
    variants = {name: (lambda turn, arm=arm: arm.step()) for name, arm in running.items()}
    timings = alternate(variants, device=device, rounds=rounds, warmup=4)
    records = []
    for name, timing in timings.items():
        records.append(
            {
                "batch": batch,
                "context": context,
                "variant": name,
                "ms": timing.median * 1e3,
                "spread": timing.spread,
                "ratio": ratio(timings, name, "stock"),
            }
        )
        _logger.info("%s", records[-1])
    return records, timings


def main(arguments: list[str] | None = None) -> Path:
    """Run the benchmark from a command line; return the report's path."""
    return bench_model(
        arguments,
        measure,
        name="decode",
        title="Decode steps with calibrated attention",
        description=__doc__,
        shapes=("1x4096,16x4096", "batch x context"),
        columns=_COLUMNS,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(main())
