"""The pages' figures: each one stands in the file that its row names.

Two checks that do not know of each other. The tables are what the stored results give, to the
letter; and, read by this file alone, every figure of a row is some number of the tables or arms of
the JSON file that the row links to, rounded to the digits that are shown (shares of accuracy
also in percent).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from installed import REPOSITORY

from act_harness.artifact import Artifact, ModelFacts, load_artifact, shipped_artifacts
from act_harness.bench import readme, summary
from act_harness.calibration import Calibration
from act_harness.errors import InputError, ResultError

FIGURE = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.-])")
LINK = re.compile(r"\[[^]]+\]\(([^)]+\.json)\)")


def rows_of(text: str, block: str) -> list[list[str]]:
    """The cells of a marked table's rows, without its heading."""
    inside = text.split(f"<!-- {block}: ")[1].split(f"<!-- end of {block} -->")[0]
    lines = [line for line in inside.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def numbers_of(value: Any) -> Iterator[float]:
    """All numbers anywhere in a JSON value; those inside its texts do not count."""
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        yield float(value)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from numbers_of(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from numbers_of(one)


def stands(figure: str, known: set[float]) -> bool:
    """Whether some number rounds to the figure as it is written."""
    written = Decimal(figure)
    half = float(Decimal(5).scaleb(written.as_tuple().exponent - 1)) * (1 + 1e-9) + 1e-12
    return any(abs(number - float(written)) <= half for number in known)


COLUMNS = {"summary": [1], "speed": [2], "accuracy": [1, 2]}
BLOCKS = [(page, block) for page, blocks in readme.PAGES.items() for block in blocks]


def the(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def unsupported(page: str, text: str) -> list[str]:
    """Figures of a page's tables that their files do not hold, and rows without a file."""
    wrong = []
    for block in readme.PAGES[page]:
        columns = COLUMNS[block]
        rows = rows_of(text, block)
        if not rows:
            wrong.append(f"{block}: no rows")
        for row in rows:
            linked = LINK.search(row[-1])
            file = REPOSITORY / Path(page).parent / (linked[1] if linked else "")
            if not file.is_file():
                wrong.append(f"{block}: no file for {row[0]}")
                continue
            content = json.loads(file.read_text(encoding="utf-8"))
            known = set(numbers_of(content.get("tables", content.get("arms", content))))
            if content.keys() & {"arms", "methods"}:  # whose changes are shares
                known |= {100 * number for number in known}
            for column in columns:
                # Sizes in brackets of the speed table name the row's inputs and are numbers too.
                found = FIGURE.findall(row[column])
                if not found and row[column] != "-":
                    wrong.append(f"{block}: no figure in {row}")
                wrong += [f"{block}: {one} of {row[0]}" for one in found if not stands(one, known)]
    return wrong


@pytest.mark.parametrize("page", readme.PAGES)
def test_every_figure_stands_in_the_file_it_names(page):
    assert unsupported(page, the(page)) == []


@pytest.mark.parametrize("page", readme.PAGES)
def test_the_tables_are_what_the_files_give(page):
    text = the(page)
    assert readme.replaced(page, text, REPOSITORY) == text, (
        f"{page} is not what results/ gives: python -m act_harness.bench.readme --write"
    )


@pytest.mark.parametrize(
    ("page", "block", "row", "column"),
    [
        ("README.md", "summary", 0, 1),
        ("README.md", "summary", -1, 1),
        ("docs/measured.md", "speed", 0, 2),
        ("docs/measured.md", "speed", -1, 2),
        ("docs/measured.md", "accuracy", 1, 2),
    ],
)
def test_a_figure_that_no_file_holds_is_found(page, block, row, column):
    """The check itself: another last digit in one figure does not pass."""
    text = the(page)
    cell = rows_of(text, block)[row][column]
    figure = FIGURE.findall(cell)[0]
    forged = f"{float(figure) + 7.77:.2f}"
    changed = text.replace(cell, cell.replace(figure, forged, 1), 1)
    assert [one for one in unsupported(page, changed) if one.startswith(f"{block}: {forged} ")]
    with pytest.raises(AssertionError):
        assert readme.replaced(page, changed, REPOSITORY) == changed


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_a_row_must_name_a_file_that_is_there(page, block):
    text = the(page)
    link = LINK.search(rows_of(text, block)[0][-1])
    assert link is not None
    changed = text.replace(link[1], "results/benchmarks/none.json")
    assert any("no file for" in one for one in unsupported(page, changed))


def test_rounding_by_value():
    assert [readme.number(v) for v in (0.8146, 2.0195, 11.84, 179.6, 9.999)] == [
        "0.81", "2.02", "11.8", "180", "10.00",
    ]  # fmt: skip
    assert readme.percent(0.56542) == "56.5"
    assert stands("2.02", {2.0195})
    assert stands("2.02", {2.0249})
    assert not stands("2.02", {2.0261})
    assert stands("1.3e-04", {1.29e-4})
    assert not stands("1.3e-04", {1.36e-4})


def stored(folder: Path, name: str, **content: Any) -> None:
    path = folder / "results" / "benchmarks" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"chip": "NVIDIA H200 (cuda)", "threads": 16, "commit": "0123456789", "dirty": False}
    path.write_text(json.dumps({"machine": machine, "remarks": [], **content}))


def test_weak_figures_come_first_and_none_is_dropped(tmp_path):
    columns = ["requests of", "ACT / stock"]
    stored(
        tmp_path, "scoring-x-cuda", title="Scoring with X, bfloat16",
        tables=[
            {"title": "Batch size 8", "columns": columns,
             "rows": [["a 0-shot", 13.26], ["b 10-shot", 0.8146]]},
            {"title": "Batch size 64", "columns": columns, "rows": [["a 0-shot", 0.5]]},
        ],
    )  # fmt: skip
    stored(
        tmp_path, "attention-cuda", title="",
        tables=[{
            "title": "",
            "columns": ["batch", "tokens", "selected", "variant", "ratio", "device_ratio"],
            "rows": [[4, 2048, 7, "stock", 1, 1], [4, 2048, 7, "triton", 2.02, 1.325]],
        }],
    )  # fmt: skip
    lines = readme.speed_table(tmp_path).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[2] for row in cells] == [
        "0.50 (a)", "0.81 (b 10-shot), 13.3 (a)", "2.02 (4 x 2048)", "1.32 (4 x 2048)",
    ]  # fmt: skip
    assert "a stand-in for lm-eval's `hf`" in cells[0][0]  # no remark says it was lm-eval's own
    assert "each call from the host" in cells[2][0]
    assert "CUDA graph" in cells[3][0]
    assert cells[1][1] == "H200, X, bfloat16: batch size 8"
    assert cells[1][3] == ("[scoring-x-cuda](results/benchmarks/scoring-x-cuda.json), 0123456")


def test_accuracy_that_is_not_shown_comes_first(tmp_path):
    def arm(name, heads, low, high):
        judged = {"score_a": 0.5, "score_b": 0.5 + (low + high) / 2,
                  "difference": (low + high) / 2, "interval": [low, high]}  # fmt: skip
        return {"name": name, "heads": heads, "raw": judged, "corrected": judged}

    arms = [arm("good", 9, 0.01, 0.03), arm("weak", 5, -0.02, 0.04), arm("unshipped", 5, 0, 1),
            arm("5 best of good", 5, 0.0, 0.02), arm("random 1", 5, -0.01, 0.01),
            arm("random 2", 5, 0.0, 0.02)]  # fmt: skip
    arms[1]["raw_other_tasks"] = arms[0]["raw"]
    for one in arms[-2:]:
        del one["corrected"]  # no task has fixed choices
    place = tmp_path / "results" / "reports" / "r.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"arms": arms, "documents": {"a": 10, "b": 20}}))
    facts = ModelFacts(id="m", architecture="A", num_hidden_layers=1, num_attention_heads=1)
    for name in ("good", "weak", "unjudged"):
        path = tmp_path / "search" / "artifacts" / "m" / f"{name}.json"
        Artifact(name=name, model=facts, calibration=Calibration(), heads={0: (0,)}).save(path)
    table = readme.accuracy_table(tmp_path)
    cells = [line.strip("|").split(" | ") for line in table.splitlines()[2:6]]
    assert [[row[0].strip(), row[2]] for row in cells] == [
        ["2 random sets of 5", "-"],
        ["weak, 5 heads", "+1.0 (-2.0 to 4.0, not shown), 50.0 to 51.0"],
        ["5 best of good", "+1.0 (0.0 to 2.0, not shown), 50.0 to 51.0"],
        ["good, 9 heads", "+2.0 (1.0 to 3.0), 50.0 to 52.0"],
    ]
    assert cells[0][1] == "+0.0 to +1.0"
    assert cells[1][1].endswith("; other tasks +2.0 (1.0 to 3.0), 50.0 to 52.0")
    assert cells[0][3] == "30 of 2 tasks"
    assert table.endswith("\n\n- unjudged: a published list, not judged here")


def test_what_is_not_shown_in_the_table_is_not_in_the_artifact():
    """What the table says of a shipped set, its own record (and so doctor) says too."""
    shipped = {name.rpartition("/")[2]: path for name, path in shipped_artifacts().items()}
    found = 0
    for row in rows_of(the("docs/measured.md"), "accuracy"):
        path = shipped.get(row[0].split(",")[0])
        if path is None:  # random sets, and parts of a set
            continue
        artifact = load_artifact(path)
        said, stands = artifact.judgement()
        assert row[0] == f"{path.stem}, {artifact.head_count()} heads"
        assert stands is ("not shown" not in f"{row[1]} {row[2]}"), row
        for name, cell in (("raw", row[1]), ("corrected", row[2])):
            change, low, high = (float(one) for one in FIGURE.findall(cell)[:3])
            assert f"{name} {change:+.1f}, {low:+.1f} to {high:+.1f}" in said, row
        found += 1
    assert found >= 6


def test_marks_that_are_gone_are_an_error(tmp_path):
    with pytest.raises(InputError, match=r"measured.md has no marks around the table of speed"):
        readme.replaced("docs/measured.md", "# Figures", tmp_path)


def test_the_short_table_has_the_weakest_gain_first_and_every_split(tmp_path):
    place = tmp_path / "a.json"
    arms = [{"name": "x", "raw": {"difference": 0.02, "interval": [0.011, 0.03]}}]
    splits = {
        "1": {"difference": 0.05, "interval": [0.04, 0.06]},
        "2": {"difference": 0.007, "interval": [-0.005, 0.019]},
    }
    place.write_text(json.dumps({"d": splits, "arms": arms}))
    (tmp_path / "b.json").write_text(
        json.dumps({"tables": [
            {"columns": ["variant", "ratio"],
             "rows": [["stock", 1], ["act x", 1.2], ["act y", 0.9]]},
            {"columns": ["other"], "rows": [[7]]},
        ]})
    )  # fmt: skip
    gains = (
        summary.Gain("arm", "a.json", (("arms", "x", "raw"),)),
        summary.Gain("splits", "a.json", (("d", "1"), ("d", "2"))),
    )
    costs = (summary.Cost("cost", "b.json", "ratio", "act"),)
    table = summary.summary_table(tmp_path, gains, costs)
    assert [line.strip("| ").split(" | ")[:2] for line in table.splitlines()[2:]] == [
        ["splits", "+0.7 (-0.5 to 1.9, not shown); +5.0 (4.0 to 6.0)"],
        ["arm", "+2.0 (1.1 to 3.0)"],
        ["cost", "0.90 to 1.20"],
    ]
    for wrong in (("d", "3"), ("arms", "y", "raw"), ("e", "1")):
        with pytest.raises(ResultError, match=r"a\.json has no "):
            summary.summary_table(tmp_path, (summary.Gain("none", "a.json", (wrong,)),), ())
    with pytest.raises(ResultError, match=r"b\.json has no column 'speed'"):
        summary.summary_table(tmp_path, (), (summary.Cost("none", "b.json", "speed"),))
