"""How far a search is: named phases, and one bar with the time left over all of them.

Phases cost different work a unit, so the bar counts forwards of a document. What a phase turns out
not to need (a set that is known, a rule that stops early) leaves the total when the next begins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from act_harness.search.documents import TaskDocuments
    from act_harness.search.recipe import Recipe

__all__ = ["Phase", "Progress", "phases_of"]

_SCREEN = 3.0
"""Forwards of a document that its forward and backward pass cost."""
_PAIR = 0.25
"""Forwards that a head costs: from its layer on, the rows that change, documents where any does."""


@dataclass(frozen=True)
class Phase:
    """A part of a search as it is planned."""

    title: str
    units: float
    """How many of its own units (documents, or heads times documents) it may need."""
    cost: float = 1.0
    """Forwards of a document that a unit costs."""

    @property
    def work(self) -> float:
        """Forwards of a document that it may need."""
        return self.units * self.cost


def phases_of(
    recipe: Recipe, documents: list[TaskDocuments], heads: int, *, processes: int = 1
) -> dict[str, Phase]:
    """Plan a search: ``screen``, ``heads``, ``choose``, ``refit`` and ``judge``, as far as it has.

    Args:
        recipe: method, rule and controls.
        documents: of every task.
        heads: how many are searched.
        processes: that share the work.
    """
    searched, verify, judge = (
        sum(len(one.of(split)) for one in documents) / processes
        for split in ("search", "verify", "judge")
    )
    maps, measured = len(recipe.mass_maps()), float(heads)
    found = {}
    if recipe.method == "screened":
        measured = max(1.0, recipe.keep * heads)
        found["screen"] = Phase("estimating all heads", searched, _SCREEN)
    found["heads"] = Phase("measuring heads", measured * maps * searched, _PAIR)
    if recipe.rule in ("top", "joint"):
        # `joint` looks at every candidate at most twice: to add it and to drop it
        tries = len(recipe.top.sizes) if recipe.rule == "top" else 2 * recipe.joint.candidates
        found["choose"] = Phase("choosing a set", (1 + tries) * verify)
    if recipe.rule == "top" and recipe.top.refit:
        found["refit"] = Phase("measuring heads on verify", measured * maps * verify, _PAIR)
    if judge:
        found["judge"] = Phase("judging the set", (2 + recipe.controls.random_sets) * judge)
    return found


class Progress:
    """One bar over all phases; use as a context manager."""

    def __init__(self, phases: Mapping[str, Phase], *, show: bool) -> None:
        """Draw the bar.

        Args:
            phases: by name, in their order.
            show: whether anything is drawn or said.
        """
        self.phases, self.show = dict(phases), show
        self.before = 0.0
        """Work done in the phases before the one under way."""
        self.current = -1
        self.bar = tqdm(
            total=self._total(),
            disable=not show,
            desc=self._title(0) if self.phases else None,
            smoothing=0,  # the mean rate: phases differ in theirs
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self.show:
            self.before, self.current = self.bar.n, len(self.phases)
            self.bar.total = self.bar.n
            self.bar.refresh()
        self.bar.close()

    def say(self, line: str) -> None:
        """Write a line above the bar."""
        if self.show:
            tqdm.write(line, file=sys.stderr)

    def figures(self, text: str) -> None:
        """Show a few figures of the phase under way beside its title."""
        if self.show:
            title = self._title(max(self.current, 0))
            self.bar.set_description_str(f"{title} ({text})")

    def done(self, name: str) -> Callable[[int], object]:
        """Return what is called with units of a phase that were just computed."""
        return lambda units: self._step(name, units, known=False)

    def known(self, name: str) -> Callable[[int], object]:
        """Return what is called with units that the ledger had: they took no time."""
        return lambda units: self._step(name, units, known=True)

    def _step(self, name: str, units: int, *, known: bool) -> None:
        if not self.show:  # a bar that is not drawn counts nothing
            return
        place = list(self.phases).index(name)
        if place != self.current:
            self.before, self.current = self.bar.n, place
            self.bar.total = self._total()
            self.bar.set_description_str(self._title(place), refresh=False)
        work = units * self.phases[name].cost
        self.bar.total = max(self.bar.total, self.bar.n + work)
        if known:
            self.bar.initial += work
            self.bar.n += work
            self.bar.refresh()
        else:
            self.bar.update(work)

    def _title(self, place: int) -> str:
        return f"{place + 1}/{len(self.phases)} {list(self.phases.values())[place].title}"

    def _total(self) -> float:
        """Return the work done in earlier phases and planned for this and later ones."""
        left = list(self.phases.values())[max(self.current, 0) :]
        return self.before + sum(phase.work for phase in left)
