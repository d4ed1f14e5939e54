"""``act-harness regress``: does this revision still give the scores that were stored?

A suite (:mod:`.suite`) says what to run; its baseline (:mod:`.baseline`) holds what came of it, per
document, as hashes and numbers without any text. A run (:mod:`.measure`) is held against it in two
layers: exact goldens (:mod:`.goldens`) and statistical gates (:mod:`.gates`). Whatever keeps a run
from being finished (no model, no data, no memory, no GPU, no baseline) is an
:class:`~act_harness.errors.InfrastructureError`, never a score.

Not here: comparing two arbitrary runs (:mod:`act_harness.evidence.compare`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_harness import lazy_attributes

__all__ = ["RegressOutcome", "RegressSettings", "run_regress", "update_baseline"]

_HOMES = {
    "RegressOutcome": "act_harness.regress.outcome",
    "RegressSettings": "act_harness.regress.run",
    "run_regress": "act_harness.regress.run",
    "update_baseline": "act_harness.regress.run",
}

if TYPE_CHECKING:
    from act_harness.regress.outcome import RegressOutcome
    from act_harness.regress.run import RegressSettings, run_regress, update_baseline

__getattr__ = lazy_attributes(__name__, _HOMES)
