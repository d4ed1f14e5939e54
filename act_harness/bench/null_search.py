r"""Searches in worlds whose truth is known: do the flags of an artifact keep what they claim?

Synthetic scores take the place of a model's; everything above them (effects, rules, refit, random
sets, the judgement) is the code of a real search. In a world without planted heads every head is
noise, built so that the untouched model and any head set are exchangeable on each document: a
choice's score is signal + bias + spread * u, and a set S moves u to ``cos(a) u + sin(a) e(S)`` with
``e(S)`` the normalised sum of its heads' own noise, which has the same distribution. So the true
change of any set is zero, in every column, whatever was chosen how; what a search shows beyond that
is its own doing. Planted heads add to the right choice's score, each the same.

    python -m act_harness.bench.null_search --searches 400 --output results/benchmarks
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats  # type: ignore[import-untyped]

from act_harness.errors import InputError, unknown_name
from act_harness.evidence.tables import markdown_table
from act_harness.search.choose.effects import Array, TaskScores, both_splits, head_effects
from act_harness.search.choose.judgement import LEVEL, conclude
from act_harness.search.choose.select import Selection, refitted
from act_harness.search.choose.sets import Place, SetMeasurement
from act_harness.search.documents import Document
from act_harness.search.recipe import Recipe, make_recipe
from act_harness.support import atomic, provenance
from act_harness.support.processes import Processes

__all__ = ["RULES", "Tally", "World", "search_world", "simulate"]

Split = Literal["search", "verify", "judge"]

RULES: dict[str, dict[str, Any]] = {
    "top": {"rule": "top"},
    "top, refit": {"rule": "top", "top": {"sizes": (2, 4, 8, 12), "refit": True}},
    "top, corrected": {"rule": "top", "objective": "corrected"},
    "joint": {"rule": "joint"},
    # Where nothing is there, a 5 % share of false discoveries leaves most searches empty.
    "significant": {"rule": "significant", "significant": {"q": 0.5}},
    "paper": {"rule": "paper"},
}
"""Recipes by name; each is simulated on the same worlds."""

RESAMPLES = 999
"""Resamples of an interval in a simulated search: its end is rounded to 1 % of its tail."""


@dataclass(frozen=True)
class World:
    """Sizes and truth of a simulated search."""

    layers: int = 4
    heads: int = 6
    tasks: int = 2
    choices: int = 2
    documents: int = 40
    """Of each task in each split."""
    signal: float = 0.8
    """Of the right choice over a wrong one; the noise of a choice's score is 1."""
    turn: float = 0.3
    """Angle by which one head turns a score's noise; k heads turn it by sqrt(k) times that."""
    planted: int = 0
    """How many heads help."""
    gain: float = 0.0
    """What each of them adds to the right choice's score."""

    def grid(self) -> dict[int, tuple[int, ...]]:
        """Return all heads by layer."""
        return {layer: tuple(range(self.heads)) for layer in range(self.layers)}

    def places(self) -> list[Place]:
        """Return every head with the one mass map."""
        return [(layer, head, 0) for layer, heads in self.grid().items() for head in heads]


class _Split(NamedTuple):
    """The drawn truth of one task's split."""

    documents: list[Document]
    right: Array
    """(documents, choices) 1 at the right choice."""
    level: Array
    """(documents, choices) signal and label bias."""
    own: Array
    """(documents, choices) the untouched model's noise."""
    moves: dict[Place, Array]
    """The heads' noise, (documents, choices) each."""


class _Drawn:
    """One world's draws; scores any head set on any split."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        source = np.random.default_rng([20260101, seed])
        self.places = world.places()
        order = source.permutation(len(self.places))[: world.planted]
        self.planted = {self.places[number] for number in order}
        self.splits: dict[tuple[Split, str], _Split] = {}
        for number in range(world.tasks):
            bias = source.normal(size=world.choices) * 0.5
            for split in ("search", "verify", "judge"):
                self.splits[split, f"task-{number}"] = self._draw(source, split, number, bias)

    def _draw(self, source: np.random.Generator, split: Split, number: int, bias: Array) -> _Split:
        world, name = self.world, f"task-{number}"
        right = source.integers(world.choices, size=world.documents)
        size = (world.documents, world.choices)
        request = (((0,), (1,)),) * world.choices
        labels = tuple(map(str, range(world.choices)))
        documents = [
            Document(name, f"{split}-{row}", request, int(one), labels)
            for row, one in enumerate(right)
        ]
        marked = np.eye(world.choices)[right]
        moves = {place: source.normal(size=size) for place in self.places}
        own = source.normal(size=size)
        return _Split(documents, marked, bias + world.signal * marked, own, moves)

    def scores(self, split: Split, task: str, places: Sequence[Place]) -> Array:
        """Return the choices' scores with a set calibrated, (documents, choices)."""
        found, count = self.splits[split, task], len(places)
        angle = min(self.world.turn * math.sqrt(count), math.pi / 3)
        noise = math.cos(angle) * found.own
        if count:
            moved = np.sum([found.moves[place] for place in places], axis=0)
            noise = noise + math.sin(angle) * moved / math.sqrt(count)
        gain = self.world.gain * len(self.planted.intersection(places))
        return np.asarray(found.level + noise + gain * found.right)

    def measured(
        self, split: Split, objective: str
    ) -> tuple[list[TaskScores], dict[Place, list[Array]]]:
        """Return baselines and every single head's change of the scores, as a search has them."""
        stock, changes = [], {place: [] for place in self.places}  # type: ignore[var-annotated]
        for task in self.tasks():
            scores = self.scores(split, task, ())
            documents = self.splits[split, task].documents
            stock.append(TaskScores.of(documents, scores.tolist(), objective=objective))
            for place in self.places:
                changes[place].append(self.scores(split, task, [place]) - scores)
        return stock, changes

    def tasks(self) -> list[str]:
        """Return the names of the tasks."""
        return [f"task-{number}" for number in range(self.world.tasks)]

    def sets(self, split: Split, recipe: Recipe) -> SetMeasurement:
        """Return what measures head sets on a split."""

        def score(places: tuple[Place, ...], documents: Sequence[Document]) -> list[list[float]]:
            return self.scores(split, documents[0].task, places).tolist()  # type: ignore[no-any-return]

        tasks: dict[str, Sequence[Document]] = {
            task: self.splits[split, task].documents for task in self.tasks()
        }
        return SetMeasurement(score, recipe, tasks, _Memory(), Processes())


class _Memory(dict[tuple[Any, ...], dict[str, Any]]):
    """A ledger that is kept in memory alone."""

    def add(self, key: tuple[Any, ...], value: dict[str, Any]) -> None:
        self[key] = value

    def get(self, key: tuple[Any, ...], default: Any = None) -> dict[str, Any]:  # noqa: ANN401
        return self[key]

    def reload(self) -> None:
        """Do nothing: there is one process."""


def search_world(
    world: World, seed: int, recipe: Recipe, *, judge: Split = "judge"
) -> tuple[Selection, dict[str, Any]]:
    """Run one search in a simulated world; return what it chose and what it says about that.

    Args:
        world: sizes and truth.
        seed: of its draws; the same seed is the same world for every recipe.
        recipe: rule, objective and controls.
        judge: documents that judge; ``verify`` shows what judging on the choosing ones would do.
    """
    drawn = _Drawn(world, seed)
    first = drawn.measured("search", recipe.objective)
    arms = [task.arm(task.scores) for task in first[0]]

    def refit(selection: Selection) -> Selection:
        tasks, changes = both_splits(first, drawn.measured("verify", recipe.objective))
        count = sum(len(task.right) for task in tasks)
        return refitted(selection, head_effects(tasks, changes), count)

    return conclude(
        head_effects(*first),
        recipe,
        baseline_accuracy=math.fsum(arm.accuracy for arm in arms) / len(arms),
        grid=world.grid(),
        verify=drawn.sets("verify", recipe),
        judge=drawn.sets(judge, recipe),
        refit=refit,
        resamples=RESAMPLES,
    )


@dataclass
class Tally:
    """What the searches of one recipe said, counted."""

    searches: int = 0
    judged: int = 0
    """Searches that selected heads."""
    untouched: dict[str, int] = field(default_factory=dict)
    """How often ``beats_untouched`` was true, by column."""
    random: dict[str, int] = field(default_factory=dict)
    """How often ``beats_random`` was true, by column."""
    gains: dict[str, list[float]] = field(default_factory=dict)
    """Shown differences to the untouched model, by column."""
    random_level: float = LEVEL
    verdicts: dict[str, int] = field(default_factory=dict)

    def add(self, judgement: dict[str, Any]) -> None:
        """Count one search."""
        self.searches += 1
        said = judgement["verdict"]
        self.verdicts[said] = self.verdicts.get(said, 0) + 1
        if not judgement["columns"]:
            return
        self.judged += 1
        for name, one in judgement["columns"].items():
            beaten, first = judgement["beats_untouched"][name], judgement["beats_random"][name]
            self.untouched[name] = self.untouched.get(name, 0) + beaten
            self.random[name] = self.random.get(name, 0) + bool(first)
            self.gains.setdefault(name, []).append(one["difference"])
            self.random_level = one["random_sets"]["level"]

    def mean_gain(self, column: str) -> tuple[float, float]:
        """Return the mean shown gain and its standard error."""
        found = np.asarray(self.gains.get(column, [0.0]))
        error = float(found.std(ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else math.inf
        return float(found.mean()), error


def make_rule(name: str, *, random_sets: int = 19) -> Recipe:
    """Return a simulated search's recipe by its name in :data:`RULES`."""
    content = {"top": {"sizes": (2, 4, 8, 12)}, **RULES[name]}
    controls = {"random_sets": random_sets}
    return make_recipe({"name": "null", "tasks": ("simulated",), "controls": controls, **content})


def simulate(
    world: World,
    searches: int,
    *,
    rules: Sequence[str] = tuple(RULES),
    random_sets: int = 19,
    judge: Split = "judge",
) -> dict[str, Tally]:
    """Run many searches in worlds of one kind; return the tally of each recipe.

    Every rule has worlds of its own, so that the tallies are independent.

    Args:
        world: sizes and truth.
        searches: how many worlds a rule.
        rules: names in :data:`RULES`.
        random_sets: controls of each search.
        judge: as for :func:`search_world`.

    Raises:
        InputError: a rule is unknown.
    """
    unknown = [name for name in rules if name not in RULES]
    if unknown:
        raise InputError(unknown_name(f"rule {unknown[0]!r}", unknown[0], RULES))
    found = {name: Tally() for name in rules}
    for name in rules:
        recipe, first = make_rule(name, random_sets=random_sets), list(RULES).index(name) << 32
        for seed in range(first, first + searches):
            found[name].add(search_world(world, seed, recipe, judge=judge)[1])
    return found


PLANTED = World(planted=4, gain=0.15)
"""The world of the power figures: 4 of 24 heads help."""


def _rows(found: dict[str, Tally]) -> Iterator[list[str]]:
    for name, tally in found.items():
        for column in tally.gains:
            mean, error = tally.mean_gain(column)
            yield [
                name,
                f"{tally.judged} of {tally.searches}",
                column,
                _share(tally.untouched[column], tally.judged),
                _share(tally.random[column], tally.judged),
                f"{100 * mean:+.2f} ± {100 * error:.2f}",
            ]


def _share(count: int, total: int) -> str:
    interval = scipy.stats.binomtest(count, total).proportion_ci(method="exact")
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * count / total:.1f} % ({low:.1f} to {high:.1f})"


def _table(title: str, text: str, found: dict[str, Tally]) -> list[str]:
    head = ["rule", "heads selected", "column", "beats untouched", "beats random", "shown gain"]
    return [f"## {title}", "", text, "", markdown_table(head, _rows(found))]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Simulate searches and write ``null-search.json`` and ``.md``; return the latter's path."""
    parser = argparse.ArgumentParser(description="What searches say where the truth is known.")
    parser.add_argument("--searches", type=int, default=400, help="worlds for each rule")
    known = "; ".join(RULES)
    parser.add_argument("--rules", default="", help=f"only these, by semicolons: {known}")
    parser.add_argument("--random-sets", type=int, default=19)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    given = parser.parse_args(arguments)
    rules = [name.strip() for name in given.rules.split(";") if name.strip()] or list(RULES)
    options: dict[str, Any] = {"rules": rules, "random_sets": given.random_sets}
    count = given.searches
    parts = {
        "null": (World(), simulate(World(), count, **options)),
        "null, judged where the set was chosen": (
            World(),
            simulate(World(), count, judge="verify", **options),
        ),
        "planted": (PLANTED, simulate(PLANTED, count, **options)),
    }
    content = {
        "command": f"python -m act_harness.bench.null_search --searches {count}",
        "level": LEVEL,
        "parts": {
            name: {"world": asdict(world), "rules": {k: asdict(v) for k, v in found.items()}}
            for name, (world, found) in parts.items()
        },
        "provenance": provenance.collect().to_json(),
    }
    atomic.write_json(given.output / "null-search.json", content)
    level = next(iter(parts["null"][1].values())).random_level
    world = World()
    lines = [
        "# Searches where the truth is known",
        "",
        f"`{content['command']}`: {count} simulated searches a rule, each in a world of its own "
        f"({world.layers * world.heads} heads, {world.tasks} tasks of {world.choices} choices, "
        f"{world.documents} documents a task and split), through the code of a real search. Shares "
        "are of the searches that selected heads, with 95 % intervals (Clopper-Pearson). Level: "
        f"{100 * LEVEL:g} % two-sided against the untouched model, so {50 * LEVEL:g} % of false "
        f"flags; {100 * level:g} % against {given.random_sets} random sets. Gains in points, "
        "mean and standard error over searches.",
        "",
        *_table(
            "Every head is noise",
            "Flags may be true as often as the level says, and the gain is 0.",
            parts["null"][1],
        ),
        *_table(
            "Every head is noise, judged on the documents that chose",
            "What the artifact would say without a split of its own for the judgement.",
            parts["null, judged where the set was chosen"][1],
        ),
        *_table(
            f"{PLANTED.planted} of {world.layers * world.heads} heads help",
            f"Each adds {PLANTED.gain:g} to the right choice's score, whose noise is 1: the flags' "
            "power.",
            parts["planted"][1],
        ),
    ]
    return atomic.write_text(given.output / "null-search.md", "\n".join(lines))


if __name__ == "__main__":
    main()
