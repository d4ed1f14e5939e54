from __future__ import annotations

import dataclasses
import json
import math
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread
from matplotlib.patches import Rectangle

from act_harness.errors import InputError, ResultError
from act_harness.evidence import head_plots, stats, tables
from act_harness.evidence import plots as report
from act_harness.evidence.comparison import Comparison, Row, RunInfo, Settings
from act_harness.mtbench.judge.scores import ArmScores, Score
from act_harness.mtbench.judge.summary import summary_text
from act_harness.regress.goldens import Finding
from act_harness.regress.outcome import RegressOutcome


def row(name, *, gained=0, lost=0, kind="task", metric="acc", documents=200, headline=True):
    a, b = np.zeros(documents), np.zeros(documents)
    b[:gained], a[gained : gained + lost] = 1, 1
    result = stats.paired_difference(a, b)
    return Row(
        kind=kind, name=name, metric=metric, filter="none", headline=headline, derived=False,
        higher_is_better=True, score_a=result.score_a, score_b=result.score_b, result=result,
        p_adjusted=result.p_value, verdict=stats.verdict(result), clustered_by=None,
    )  # fmt: skip


def comparison(*rows):
    run = RunInfo("m__x", None, "m", {}, None, {})
    return Comparison(run, run, Settings(0.95, 0.05, 1e-4, 9999, 0), tuple(rows))


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures instead of writing them."""
    figures = []
    for module in (report, head_plots):
        monkeypatch.setattr(
            module, "save_figure", lambda figure, path: figures.append(figure) or path
        )
    return figures


def size(path):
    height, width = imread(path).shape[:2]
    return width, height


def test_comparison_files(tmp_path):
    found = comparison(row("sst2", gained=20), row("boolq", lost=2), row("x", metric="margin",
                                                                      headline=False))  # fmt: skip
    written = report.comparison_files(found, tmp_path / "new")
    assert set(written) == {"comparison.json", "comparison.md", "forest.png"}
    assert json.loads(written["comparison.json"].read_text())["rows"][0]["name"] == "sst2"
    assert "![differences](forest.png)" in written["comparison.md"].read_text()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(written)
    nothing = comparison(dataclasses.replace(row("x"), result=None))
    assert set(report.comparison_files(nothing, tmp_path)) == {"comparison.json", "comparison.md"}


def test_forest_plot_draws_every_interval_where_it_is(drawn, tmp_path):
    rows = [row("up", gained=20), row("down", lost=30), row("all", gained=3, kind="group"),
            row("other", gained=9, metric="exact_match")]  # fmt: skip
    report.forest_plot([*rows, row("one", documents=1)], tmp_path / "f.png", names=("base", "act"))
    first, second = drawn[0].axes
    intervals = {tuple(line.get_xdata()) for line in first.lines if len(line.get_xdata()) == 2}
    assert {tuple(one.result.interval) for one in rows[:3]} <= intervals
    assert [label.get_text() for label in first.get_yticklabels()] == ["all (group)", "down", "up"]
    assert first.get_xlabel() == "acc: act - base, with interval"
    assert [label.get_text() for label in second.get_yticklabels()] == ["other"]
    low, high = first.get_xlim()
    assert low < rows[1].result.interval.low
    assert rows[0].result.interval.high < high
    colours = {line.get_color() for line in first.lines}
    assert {report._COLOURS["improved"], report._COLOURS["regressed"]} <= colours


def test_forest_plot_grows_with_its_rows_and_is_the_same_each_time(tmp_path):
    few = report.forest_plot([row("t", gained=9)], tmp_path / "a.png", title="title")
    many = report.forest_plot([row(f"t{i}", gained=9) for i in range(30)], tmp_path / "b.png")
    assert size(many)[1] > 2 * size(few)[1]
    again = report.forest_plot([row("t", gained=9)], tmp_path / "c.png", title="title")
    assert again.read_bytes() == few.read_bytes()
    with pytest.raises(ResultError, match="nothing to draw"):
        report.forest_plot([], tmp_path / "d.png")


def test_head_map_frames_the_selected_heads(drawn, tmp_path):
    effects = np.random.default_rng(0).normal(size=(6, 4))
    effects[2, 3] = math.nan
    head_plots.head_map(effects, tmp_path / "m.png", selected={0: [1], 5: [0, 3]}, label="margin")
    axes = drawn[0].axes[0]
    frames = {
        (patch.get_y() + 0.44, patch.get_x() + 0.44)
        for patch in axes.patches
        if isinstance(patch, Rectangle)
    }
    assert {(round(y), round(x)) for y, x in frames} == {(0, 1), (5, 0), (5, 3)}
    shown = axes.images[0].get_array()
    assert shown.shape == (6, 4)
    assert np.ma.getmaskarray(shown)[2, 3]
    low, high = axes.images[0].get_clim()
    assert low == -high
    assert "3 of 24 heads selected" in drawn[0].get_suptitle()
    assert "not measured" in drawn[0].get_suptitle()


def test_one_odd_head_does_not_bleach_the_map(drawn, tmp_path):
    effects = np.full((32, 32), 0.1)
    effects[0, 0] = 100
    head_plots.head_map(effects, tmp_path / "m.png")
    assert drawn[0].axes[0].images[0].get_clim()[1] < 1


@pytest.mark.parametrize("effects", [np.zeros((3, 3)), np.full((2, 2), math.nan), np.ones((1, 1))])
def test_head_map_of_nothing_special(tmp_path, effects):
    assert size(head_plots.head_map(effects, tmp_path / "m.png"))[0] > 300


def test_rank_plot_sorts_and_shows_the_controls(drawn, tmp_path):
    curve = head_plots.Curve([5, 10, 20], [1.0, 2.0, 1.5], [0.5, 1, 1], [2.0, 3, 2])
    head_plots.rank_plot([0.1, -0.2, 0.4], tmp_path / "r.png", stderr=[0.1] * 3, selected=10,
                     curve=curve, controls=[(10, 0.1), (10, -0.3)],
                     judged=head_plots.Curve([10], [0.5], [-0.5], [0.75]),
                     sets_label="points")  # fmt: skip
    left, middle, right = drawn[0].axes
    assert left.lines[0].get_ydata().tolist() == [0.4, 0.1, -0.2]
    sizes = middle.containers[0]
    assert sizes.lines[0].get_xydata().tolist() == [[5, 1], [10, 2], [20, 1.5]]
    bars = [segment[:, 1].tolist() for segment in sizes.lines[2][0].get_segments()]
    assert bars == [[0.5, 2], [1, 3], [1, 2]]
    taken = next(line for line in middle.lines if "taken" in str(line.get_label()))
    assert taken.get_xydata().tolist() == [[10, 2]]
    (bar,) = right.containers[0].lines[2][0].get_segments()
    assert bar[:, 1].tolist() == [-0.5, 0.75]
    random = next(line for line in right.lines if "random" in str(line.get_label()))
    assert list(random.get_ydata()) == [0.1, -0.3]
    assert "2 sets" in random.get_label()
    assert [text.get_text() for text in right.get_xticklabels()] == ["the 10 taken", "10 at random"]
    assert middle.get_ylabel() == right.get_ylabel() == "points"
    head_plots.rank_plot([1.0], tmp_path / "r.png")
    assert len(drawn[1].axes) == 1


@pytest.mark.parametrize(("call", "message"), [
    (lambda path: head_plots.head_map(np.zeros(3), path), r"\(layers, heads\)"),
    (lambda path: head_plots.head_map(np.zeros((2, 2)), path, selected={2: [0]}),
     "head 0 of layer 2"),
    (lambda path: head_plots.rank_plot([math.nan], path), "finite"),
    (lambda path: head_plots.rank_plot([1, 2], path, stderr=[1]), "as many errors; found 1"),
    (lambda path: tables.markdown_table(["a"], [[1, 2]]), "2 cells for 1 columns"),
])  # fmt: skip
def test_what_cannot_be_drawn(tmp_path, call, message):
    with pytest.raises(ResultError, match=message):
        call(tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_without_matplotlib_the_pip_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'matplotlib>="):
        head_plots.head_map(np.zeros((2, 2)), tmp_path / "m.png")


def test_markdown_table():
    text = tables.markdown_table(["task", "acc"], [["a|b", 0.5], ["c", 1.0]])
    assert text == "| task | acc |\n| --- | --: |\n| a\\|b | 0.5000 |\n| c | 1.0000 |\n"
    text = tables.markdown_table(["a", "b"], [["x", "1"]], right=(1,), compact=True)
    assert text == "| a | b |\n|---|--:|\n| x | 1 |\n"


def test_no_name_breaks_a_table():
    found = Finding("drift", "a|b", "x|y", "one\ntwo")
    outcome = RegressOutcome(
        suite="s", layers=("goldens",), findings=(found,), notes=(), drifts=(), comparison=None,
        tolerance=1e-4, baseline={}, provenance={},
    )  # fmt: skip
    assert "| a\\|b | x\\|y | drift | one two |" in outcome.to_markdown().splitlines()
    arms = [ArmScores(arm="a|b", overall=Score(5.0, None, None, 1, 2), turns={}, categories={},
                      missing={}, repeat_spread=None)]  # fmt: skip
    lines = summary_text(arms, [], 0.02).splitlines()
    assert lines == ["| arm | what | score | interval | questions | answers |",
                     "| --- | --- | --: | --- | --: | --: |",
                     "| a\\|b | overall | 5.00 | - | 1 | 2 |"]  # fmt: skip


def test_counts_of_heads_have_whole_numbers_on_their_axis(drawn, tmp_path):
    curve = head_plots.Curve([5, 10, 20], [0.1, 0.2, 0.3], [0.0] * 3, [1.0] * 3)
    head_plots.rank_plot([0.3, 0.2, 0.1], tmp_path / "x.png", curve=curve, selected=5)
    (figure,) = drawn
    for axes in figure.axes:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
