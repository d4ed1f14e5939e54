"""MT-Bench's second half: scoring the conversations of an ``mt_bench`` run with a judge.

Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (NeurIPS 2023, arXiv
2306.05685). The ACT paper reports MT-Bench scores in its open-ended generation experiments. The
first half, generation, is :mod:`act_harness.mtbench.chat` and ``tasks/mt_bench``.

``openai`` and ``tenacity`` (the extra ``mtbench``) are imported by :mod:`.client` alone, when the
first judgment is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_harness import lazy_attributes

__all__ = [
    "JudgeOutcome",
    "JudgeSettings",
    "judge",
    "load_judge_settings",
    "track_judge",
    "track_outcome",
]

_HOMES = {
    "JudgeOutcome": "act_harness.mtbench.judge.judging",
    "JudgeSettings": "act_harness.mtbench.judge.settings",
    "judge": "act_harness.mtbench.judge.judging",
    "load_judge_settings": "act_harness.mtbench.judge.settings",
    "track_judge": "act_harness.mtbench.judge.tracking",
    "track_outcome": "act_harness.mtbench.judge.tracking",
}

if TYPE_CHECKING:
    from act_harness.mtbench.judge.judging import JudgeOutcome, judge
    from act_harness.mtbench.judge.settings import JudgeSettings, load_judge_settings
    from act_harness.mtbench.judge.tracking import track_judge, track_outcome

__getattr__ = lazy_attributes(__name__, _HOMES)
