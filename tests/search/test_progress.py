"""The bar of a search: named phases, one total, what was known before takes no time."""

from __future__ import annotations

import re

import gradient_runs
import pytest
from search_runs import DRAWN, recipe, search

from act_harness.search import by_gradient, run
from act_harness.search.progress import Phase, Progress, phases_of


@pytest.fixture
def bars(monkeypatch):
    """The bars of the searches that follow, drawn nowhere; closed ones keep their numbers."""
    made = []

    class Seen(Progress):
        def __init__(self, phases, *, show):
            super().__init__(phases, show=False)
            self.said, self.steps = [], []
            made.append(self)

        def say(self, line):
            self.said.append(line)

        def _step(self, name, units, *, known):
            self.steps.append((name, units, known))

    for module in (run, by_gradient):
        monkeypatch.setattr(module, "Progress", Seen)
    return made


def test_a_plan_counts_what_each_phase_may_need():
    plain = phases_of(recipe(), DRAWN, 12)  # 16 documents in each split
    assert {name: phase.units for name, phase in plain.items()} == {
        "heads": 12 * 16, "choose": 4 * 16, "judge": 4 * 16,
    }  # fmt: skip
    more = recipe(
        method="screened", keep=0.5, top={"sizes": [1, 2], "refit": True},
        strengths=[{"mass": "damp", "beta": 0.4}, {"mass": "reweight", "gamma": 2.0}],
    )  # fmt: skip
    found = phases_of(more, DRAWN, 12, processes=2)
    assert {name: phase.units for name, phase in found.items()} == {
        "screen": 8, "heads": 6 * 2 * 8, "choose": 3 * 8, "refit": 6 * 2 * 8, "judge": 4 * 8,
    }  # fmt: skip
    assert found["screen"].work == 24
    joint = phases_of(recipe(rule="joint", joint={"candidates": 5}), DRAWN, 12)
    assert joint["choose"].units == 11 * 16
    assert list(phases_of(recipe(rule="paper"), DRAWN, 12)) == ["heads", "judge"]


@pytest.mark.parametrize("method", ["exhaustive", "screened"])
def test_a_search_does_what_was_planned_and_a_continued_one_nothing(tmp_path, bars, method):
    given = recipe(
        method=method,
        keep=0.5,
        top={"sizes": [1, 2, 4], "refit": True},
        controls={"random_sets": 3},
    )
    search(tmp_path, given)
    (first,) = bars
    assert first.said == []
    done = {name: sum(n for one, n, _ in first.steps if one == name) for name in first.phases}
    planned = {name: phase.units for name, phase in first.phases.items()}
    assert done.pop("judge") <= planned.pop("judge")  # a random set may be one that is known
    assert done.pop("choose") <= planned.pop("choose")
    assert done == planned
    assert not any(known for *_, known in first.steps)
    order = [name for name, *_ in first.steps]
    assert sorted(order, key=list(first.phases).index) == order
    again = search(tmp_path, given)
    second = bars[1]
    assert all(known for *_, known in second.steps)
    assert second.said[0].startswith("continuing ")
    assert "units are there already" in second.said[0]
    assert "continued:" in again.summary()


def test_a_gradient_search_does_what_was_planned_and_says_how_it_goes(tmp_path, bars, monkeypatch):
    said = []
    monkeypatch.setattr(by_gradient.Progress, "figures", lambda self, text: said.append(text))
    given = gradient_runs.recipe(objective="entropy")
    gradient_runs.search(tmp_path, given)
    (first,) = bars
    done = {name: sum(n for one, n, _ in first.steps if one == name) for name in first.phases}
    # 16 documents a split: 4 epochs of a forward and a backward, and 1 + 4 forwards on verify;
    # 2 sizes on verify and the baseline; untouched, chosen and 2 random sets on judge
    assert done == {"train": 4 * 2 * 16 + 5 * 16, "choose": 3 * 16, "judge": 4 * 16}
    assert done == {name: phase.units for name, phase in first.phases.items()}
    assert not any(known for *_, known in first.steps)
    assert re.fullmatch(r"epoch 4, loss \d\.\d{3}, rate 0\.\d{3}, verify -\d\.\d{3}", said[-1])
    gradient_runs.search(tmp_path, given)
    assert all(known for *_, known in bars[1].steps)
    tuned = [step for step in bars[1].steps if step[0] != "judge"]
    assert tuned == [(name, n, True) for name, n, _ in first.steps if name != "judge"]


def test_one_bar_over_all_phases_and_no_time_for_what_was_known(capsys):
    phases = {"a": Phase("first", 10, 3.0), "b": Phase("second", 20), "c": Phase("third", 5, 2.0)}
    with Progress(phases, show=True) as progress:
        bar = progress.bar
        assert bar.total == 60
        progress.known("a")(4)
        assert (bar.n, bar.initial) == (12, 12)
        progress.done("a")(2)
        assert (bar.n, bar.initial) == (18, 12)
        assert bar.desc == "1/3 first"
        progress.done("b")(15)  # the first phase needed no more: 12 of its 30 leave the total
        assert bar.desc == "2/3 second"
        assert (bar.n, bar.total) == (33, 48)
        progress.done("b")(10)  # more than was planned
        assert (bar.n, bar.total) == (43, 48)
        progress.done("c")(1)
        assert (bar.n, bar.total) == (45, 53)
        progress.say("a line")
    assert (bar.n, bar.total) == (45, 45)
    seen = capsys.readouterr()
    assert "a line" in seen.err
    assert "3/3 third" in seen.err
    with Progress(phases, show=False) as progress:
        progress.say("nothing")
        progress.done("a")(1)
    assert capsys.readouterr() == ("", "")
