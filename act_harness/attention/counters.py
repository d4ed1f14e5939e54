"""The figures of a run: how often, and how much, calibration changed anything.

Counters are kept per distinct prompt and summed over the selected heads, so neither batching nor
sharing one prefill among several answers can change them. Only prompt rows are counted: what a
continuation adds depends on how many answers a task asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from act_harness.support.provenance import sha256_text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CalibrationCounters", "PromptRecord", "prompt_key"]


def prompt_key(tokens: Sequence[int]) -> str:
    """Return the key under which the counters hold a prompt or a request."""
    return sha256_text(",".join(map(str, tokens)))


@dataclass(frozen=True)
class PromptRecord:
    """Sums over the selected heads of all layers for one prompt."""

    pairs: int
    """Selected (layer, head) pairs."""
    rows: int
    """Prompt rows (tokens)."""
    with_sink: int
    """Pairs with at least one sink."""
    sinks: int
    """Sinks, summed over pairs."""
    few_sinks: int
    """Of them, sinks on columns that fewer than four prompt rows see."""
    moved: float
    """Sum over pairs and rows of m - m'."""
    few_moved: float
    """The share of ``moved`` that left columns seen by fewer than four rows."""
    rows_alone: int
    """(pair, row) combinations left alone because the mass off the sinks was under 1e-6."""
    near_threshold: bool
    """Whether rounding could decide about some column: batch invariance is not promised here."""
    too_short: bool
    """Whether the prompt has no more columns than alpha, so that nothing can be a sink."""


@dataclass
class CalibrationCounters:
    """Records by prompt, and the requests that could not be taken as they were."""

    records: dict[str, PromptRecord] = field(default_factory=dict)
    truncated: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    empty_continuation: set[str] = field(default_factory=set)
    not_finite: set[str] = field(default_factory=set)
    """Requests whose log-likelihood is NaN or infinite, those that were skipped excepted."""

    def record(self, prompt: Sequence[int], found: PromptRecord) -> None:
        """Keep what calibration did to a prompt; a prompt that comes twice counts once."""
        self.records[prompt_key(prompt)] = found

    def merge(self, other: CalibrationCounters) -> None:
        """Add what another process counted; prompts that both saw count once."""
        self.records.update(other.records)
        for name in ("truncated", "skipped", "empty_continuation", "not_finite"):
            getattr(self, name).update(getattr(other, name))

    def summary(self) -> dict[str, Any]:
        """Return the figures, JSON-ready; shares are of 0..1, None where nothing was counted."""
        records = self.records.values()
        pairs = sum(r.pairs for r in records)
        pair_rows = sum(r.pairs * r.rows for r in records)
        sinks = sum(r.sinks for r in records)
        moved = math.fsum(r.moved for r in records)
        few_moved = math.fsum(r.few_moved for r in records)
        return {
            "prompts": len(self.records),
            "pairs": pairs,
            "share_of_pairs_with_sink": _share(sum(r.with_sink for r in records), pairs),
            "mean_sinks_per_head": _share(sinks, pairs),
            "mean_moved_mass": _share(moved, pair_rows),
            "share_of_sinks_seen_by_few_rows": _share(sum(r.few_sinks for r in records), sinks),
            "share_of_moved_mass_seen_by_few_rows": _share(few_moved, moved),
            "rows_left_alone": sum(r.rows_alone for r in records),
            "prompts_near_threshold": sum(r.near_threshold for r in records),
            "prompts_too_short": sum(r.too_short for r in records),
            "prompts_truncated": len(self.truncated),
            "prompts_without_first_token": len(self.truncated),  # cut from the left
            "requests_skipped": len(self.skipped),
            "requests_with_empty_continuation": len(self.empty_continuation),
            "answers_not_finite": len(self.not_finite),
        }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
