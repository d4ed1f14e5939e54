"""What a batch finds out, on its way to the results: token scores summed, answers given out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from act_harness.scoring.groups import Group, Score, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from act_harness.attention.counters import PromptRecord
    from act_harness.scoring.forwards import BatchResult
    from act_harness.scoring.logits import RowScores

__all__ = ["Given", "Started", "Tally"]


class Tally:
    """Sums token scores by (context, answer)."""

    def __init__(self) -> None:
        self._logprobs: dict[tuple[int, Tokens], list[float]] = {}
        self._greedy: dict[tuple[int, Tokens], bool] = {}

    def expect(
        self, batch: Sequence[Group]
    ) -> tuple[list[int], list[int], list[tuple[int, Tokens]]]:
        """Expect token scores of a batch's answers.

        Returns:
            Row, token and (context, answer) of the scores in the contexts' own rows.
        """
        rows: list[int] = []
        tokens: list[int] = []
        owners: list[tuple[int, Tokens]] = []
        first = 0
        for b, group in enumerate(batch):
            for answer in group.answers:
                self._logprobs[b, answer], self._greedy[b, answer] = [], True
                here = answer if answer == group.alone else answer[:1]
                rows.extend(range(first, first + len(here)))
                tokens.extend(here)
                owners.extend([(b, answer)] * len(here))
            first += len(group.rows)
        return rows, tokens, owners

    def add(
        self, owners: list[tuple[int, Tokens]], logprobs: list[float], greedy: list[bool]
    ) -> None:
        """Add scores of single tokens to the answers that own them."""
        for owner, logprob, best in zip(owners, logprobs, greedy, strict=True):
            self._logprobs[owner].append(logprob)
            self._greedy[owner] = self._greedy[owner] and best and not math.isnan(logprob)

    def score(self, b: int, answer: Tokens) -> Score:
        """Return an answer's sum; NaN is never greedy."""
        return Score(math.fsum(self._logprobs[b, answer]), self._greedy[b, answer])


@dataclass(frozen=True)
class Given:
    """Where results go and who is told of them."""

    results: list[Score | None]
    progress: Callable[[int], object] | None
    on_prompt: Callable[[Tokens, PromptRecord], object] | None
    unsure: list[Group] = field(default_factory=list)
    """Groups with a score that is not finite, where other requests may be to blame."""

    def take(self, group: Group, scores: dict[Tokens, Score], *, together: int) -> bool:
        """Store scores of a group that was computed in a batch of ``together`` groups.

        Returns:
            Whether its context is sound: not every score is NaN or infinite.
        """
        for answer, score in scores.items():
            for number in group.answers[answer]:
                self.results[number] = score
        finite = [math.isfinite(score.loglikelihood) for answer, score in scores.items() if answer]
        if not all(finite) and (together > 1 or len(group.answers) > 1):
            self.unsure.append(group)
        return not finite or any(finite)


@dataclass
class Started:
    """A batch on the device."""

    batch: list[Group]
    told: BatchResult
    tally: Tally = field(default_factory=Tally)
    reads: list[tuple[list[tuple[int, Tokens]], RowScores]] = field(default_factory=list)
    """(context, answer) of every token read, and what was found."""
    wait: Callable[[], None] = lambda: None
