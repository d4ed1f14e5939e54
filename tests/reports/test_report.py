"""``act-harness report``: what is recognised, what comes first, what the files hold, the page."""

import csv
import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import browser as pages
import numpy as np
import pytest
from installed import REPOSITORY
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from act_harness.artifact import shipped_artifacts
from act_harness.cli.app import app
from act_harness.errors import ArtifactError, ResultError
from act_harness.evidence import stats
from act_harness.evidence.comparison import Comparison, Row, RunInfo, Settings
from act_harness.evidence.figures import figure_text, new_figure, save_figure
from act_harness.evidence.tables import visible
from act_harness.reports.command import report_on
from act_harness.reports.evaluations import _forest
from act_harness.reports.searches import search_section
from act_harness.reports.sources import Source

pytest.importorskip("matplotlib")

HOSTILE = (
    "<script>window.harmed = 1</script>",
    '"><img src=x onerror="window.harmed = 2">',
    "\\<script>window.harmed = 3</script>",
    "\u202egnirts a\u202c",
    "مرحبا 语 👩‍👧",
    "zero\u200bwidth $\\frac{1$",
    "x" * 10_000,
    "[a](javascript:alert(1)) ![b](http://example.org/b.png) `c` | d",
    "</style></svg>{{ title }}",
)
DATE = "2024-05-01T12-00-00.000001"


def row(name, *, gained=0, lost=0, metric="acc", better=True, **more):
    a, b = np.zeros(200), np.zeros(200)
    b[:gained], a[gained : gained + lost] = 1, 1
    found = stats.paired_difference(a, b)
    given = {
        "kind": "task", "filter": "none", "headline": True, "derived": False, "clustered_by": None,
        "verdict": stats.verdict(found, higher_is_better=better), "p_adjusted": found.p_value,
    }  # fmt: skip
    return Row(
        name=name, metric=metric, higher_is_better=better, score_a=found.score_a,
        score_b=found.score_b, result=found, **(given | more),
    )  # fmt: skip


def comparison(*rows, a="m__baseline", b="m__act"):
    infos = [RunInfo(one, f"x/{one}/results_{DATE}.json", "m", None, 0.0, {}) for one in (a, b)]
    return Comparison(*infos, Settings(0.95, 0.05, 1e-4, 9999, 0), rows, ("a note",))


def stored(folder, content, name):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def run_file(folder, scores, **more):
    found = {t: {"acc,none": value, "acc_stderr,none": e} for t, (value, e) in scores.items()}
    content = {"results": found, "configs": {task: {} for task in scores}, **more}
    return stored(folder, content, f"results_{DATE}.json")


def methods(difference=0.04, task="t", method="signed"):
    def cell(change):
        return {"accuracy": 0.5 + change, "difference": change, "verdict": "inconclusive",
                "interval": [change - 0.02, change + 0.03], "p": 0.2, "p_adjusted": 0.3,
                "by_task": {task: 0.5 + change}}  # fmt: skip

    return {
        "schema": "act-harness/methods/1", "recipe": {"name": "r"},
        "documents": {"evaluation": {task: 50}}, "columns": {"raw": [task], "batch": [task]},
        "untouched": {"raw": {task: 0.5}, "batch": {task: 0.6}},
        "methods": {
            method: {"note": "n", "said": "", "heads": 3, "divergence": 0.1,
                     "columns": {"raw": cell(difference), "batch": cell(0.01)}},
            "worse": {"note": "n", "said": "s", "heads": 1, "divergence": 0.1,
                      "columns": {"raw": cell(-0.1), "batch": cell(0.02)}},
        },
    }  # fmt: skip


def sinks(text=" the", task="t"):
    heads = [{"layer": i, "head": j, "sinks": 1.5, "sinks_min_rows_auto": 0.5,
              "share_of_documents_with_sinks": 0.9, "mass_on_sinks": 0.2,
              "mass_on_first_token": 0.3} for i in (0, 1) for j in (0, 1)]  # fmt: skip
    return {
        "schema": "act-harness/sinks/1", "model": {"id": "m"}, "documents": 4,
        "flags": {"min_rows_1": {"flags": 10.0, "on_last_token": 0.1, "on_last_three_tokens": 0.25,
                                 "on_last_fifth": None}},
        "tasks": [{"task": task, "documents": 4, "tokens": 9.5, "sinks_per_head": 2.5,
                   "share_of_heads_with_sinks": 0.7, "mass_on_sinks": 0.2,
                   "mass_on_first_token": 0.3}],
        "heads": heads,
        "positions": [{"from": 0.0, "to": 0.5, "flags": 6.0, "flags_min_rows_auto": 4.0},
                      {"from": 0.5, "to": 1.0, "flags": 4.0, "flags_min_rows_auto": 0.0}],
        "tokens": [{"token": 1, "text": text, "kind": "word", "occurrences": 5.0, "flags": 9.0,
                    "share_of_flags": 0.9, "mean_attention_by_threshold": 1.1}],
        "kinds": [{"kind": "word", "occurrences": 5.0, "flags": 9.0, "share_of_occurrences": 0.5,
                   "share_of_flags": 0.9}],
    }  # fmt: skip


def bench(title="Scoring with m"):
    columns = ["requests of", "requests", "token ceiling", "none / stock", "ACT / stock", "ACT GiB"]
    rows = [["fast", 8, 2.0, 3.0, 2.5, 1.5], ["slow", 8, 2.0, 1.5, 0.5, 1.25]]
    return {"name": "s", "title": title, "machine": {"chip": "c", "versions": {"torch": "2"}},
            "command": "bench", "remarks": ["r"], "figure": None,
            "tables": [{"title": "T", "columns": columns, "rows": rows, "note": ""}]}  # fmt: skip


def table(folder, name):
    with (folder / "figures" / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A report over one result of each kind, all found in one folder."""
    place = tmp_path_factory.mktemp("results")
    rows = [row("up", gained=30), row("loss", gained=40, metric="perplexity", better=False),
            row("down", lost=30), row("flat", gained=2, lost=1),
            row("flat", gained=4, metric="acc_corrected", derived=True, headline=False),
            ]  # fmt: skip
    stored(place / "c", comparison(*rows).to_json(), "comparison.json")
    run_file(place / "x" / "m__baseline", {"down": (0.15, 0.02)})
    stored(place / "methods", methods(), "methods.json")
    artifact = REPOSITORY / "search/artifacts/smollm2-135m-instruct/classification.json"
    (place / "methods" / "artifacts").mkdir()
    (place / "methods" / "artifacts" / "signed.json").write_bytes(artifact.read_bytes())
    (place / "classification.json").write_bytes(artifact.read_bytes())
    stored(place, sinks(), "sinks.json")
    stored(place, bench(), "bench.json")
    stored(place, {"other": 1}, "config.json")
    (place / "broken.json").write_text("{", encoding="utf-8")
    stored(place / ".venv" / "x", sinks(text="other"), "sinks.json")
    out = tmp_path_factory.mktemp("out") / "new"
    return out, report_on([place, place / "sinks.json"], out, title="All of it")


def test_every_kind_is_found_once_and_has_its_section(everything):
    text = (everything[0] / "report.md").read_text(encoding="utf-8")
    sections = [line for line in text.splitlines() if line.startswith("## ")]
    assert sections == [
        "## m__act against m__baseline", "## Methods: r", "## Head set classification",
        "## Attention sinks of m in 4 documents", "## Scoring with m",
    ]  # fmt: skip


def test_every_figure_has_its_three_files(everything):
    out, files = everything
    figures = sorted(file.name for file in (out / "figures").iterdir())
    assert files[0] == out / "report.html"
    assert sorted(file.name for file in files[2:]) == figures
    stems = [
        "1-calibrators", "1-differences", "1-scores", "2-methods", "3-map", "3-ranks", "4-sinks",
        "5-memory", "5-speed",
    ]  # fmt: skip
    assert figures == sorted(f"{stem}.{kind}" for stem in stems for kind in ("csv", "png", "svg"))


def test_what_got_worse_comes_first_in_text_figures_and_data(everything):
    out, _ = everything
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "- m__act against m__baseline: loss perplexity +0.2000" in text
    names = [one["name"] for one in table(out, "1-differences.csv")]
    assert names == ["loss", "down", "flat", "up"]
    assert [one["of"] for one in table(out, "5-speed.csv")][:2] == ["slow, requests 8"] * 2
    assert [one["name"] for one in table(out, "2-methods.csv")][:2] == ["worse", "signed"]
    lines = [line for line in text.splitlines() if line.startswith(("| none |", "| worse |"))]
    assert lines[0] == "| none | 0 | 50.0 | 60.0 |"
    assert "40.0 (-10.0; -12.0 to -7.0; p 0.300; inconclusive)" in lines[1]


def test_data_are_the_numbers_of_the_comparison(everything):
    (found,) = [one for one in table(everything[0], "1-differences.csv") if one["name"] == "down"]
    known = row("down", lost=30).result
    assert float(found["value"]) == known.difference == -0.15
    assert (float(found["low"]), float(found["high"])) == tuple(known.interval)
    assert found["verdict"] == "regressed"
    (corrected,) = table(everything[0], "1-calibrators.csv")
    assert (corrected["metric"], float(corrected["value"])) == ("acc_corrected", 0.02)


def test_an_arm_has_the_interval_of_its_run_or_of_its_answers(everything):
    scores = {(one["task"], one["run"]): one for one in table(everything[0], "1-scores.csv")}
    mine = scores["down", "A: m__baseline"]  # lm-eval's standard error, from the run in the folder
    assert float(mine["low"]) == pytest.approx(0.15 - 1.959964 * 0.02, abs=1e-6)
    wilson = scores["up", "B: m__act"]  # 30 of 200; Wilson 1927 by hand
    z, share = 1.959964, 30 / 200
    middle = (share + z * z / 400) / (1 + z * z / 200)
    half = z / (1 + z * z / 200) * math.sqrt(share * (1 - share) / 200 + z * z / (4 * 200**2))
    assert float(wilson["low"]) == pytest.approx(middle - half, abs=1e-6)
    assert float(wilson["high"]) == pytest.approx(middle + half, abs=1e-6)


def test_the_map_of_heads_is_that_of_the_artifact(everything):
    artifact = REPOSITORY / "search/artifacts/smollm2-135m-instruct/classification.json"
    content = json.loads(artifact.read_text(encoding="utf-8"))
    rows = {(one["layer"], one["head"]): one for one in table(everything[0], "3-map.csv")}
    for layer, head, _, effect, stderr, *_ in content["search"]["table"]["heads"]["rows"][::40]:
        found = rows[str(layer), str(head)]
        assert (float(found["effect"]), float(found["stderr"])) == (effect, stderr)
        assert (found["selected"] == "True") == (head in content["heads"].get(str(layer), []))


def test_two_runs_alone_are_compared(tmp_path):
    def samples(folder, values):
        rows = [
            {"doc_id": i, "doc": {}, "target": "0", "arguments": {}, "resps": [], "filter": "none",
             "filtered_resps": ["x"], "metrics": ["acc"], "doc_hash": f"d{i}",
             "prompt_hash": f"p{i}", "target_hash": "t", "acc": value}
            for i, value in enumerate(values)
        ]  # fmt: skip
        run_file(folder, {"t": (float(np.mean(values)), 0.1)})
        text = "".join(f"{json.dumps(one)}\n" for one in rows)
        (folder / f"samples_t_{DATE}.jsonl").write_text(text, encoding="utf-8")

    samples(tmp_path / "a__act", [1.0] * 30 + [0.0] * 10)
    samples(tmp_path / "z__baseline", [1.0] * 20 + [0.0] * 20)
    report_on([tmp_path / "a__act", tmp_path / "z__baseline"], tmp_path / "out")
    (found,) = table(tmp_path / "out", "1-differences.csv")
    assert (found["name"], float(found["value"]), found["verdict"]) == ("t", 0.25, "improved")


def test_runs_that_cannot_be_compared_are_shown_each(tmp_path):
    one = run_file(tmp_path / "one", {"t": (0.5, 0.1), "u": (0.2, "N/A")})
    two = run_file(tmp_path / "two", {"t": (0.25, 0.1)})
    report_on([one, two], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "The two runs cannot be compared: no samples to pair" in text
    assert "| two | t | acc | none | 0.2500 | 0.0540 to 0.4460 |" in text
    assert [one["value"] for one in table(tmp_path / "out", "1-scores.csv")] == [
        "0.2",
        "0.25",
        "0.5",
    ]


def test_a_figure_of_hundreds_of_tasks_shows_the_weakest():
    rows = [row(f"t{i}", gained=i % 40) for i in range(130)]
    figure = _forest("differences", "Differences", rows)
    assert (len(figure.rows), figure.title) == (100, "Differences, the 100 weakest")


def test_a_comparison_is_read_as_it_was_written():
    infinite = replace(row("one").result, stderr=math.inf, minimum_detectable=math.inf)
    rows = [
        row("t", gained=9),
        replace(row("one"), result=infinite),
        replace(row("x"), result=None),
    ]
    found = comparison(*rows)
    content = json.loads(json.dumps(found.to_json()))
    assert Comparison.from_json(content, "f") == found


@pytest.mark.parametrize(("content", "said"), [
    ({"a": 1}, "is no result that a report can show"),
    ({"schema": "act-harness/comparison/1", "rows": 3}, "is no comparison"),
    ({"schema": "act-harness/comparison/1", "rows": [3]}, "is no comparison"),
    ({"schema": "act-harness/methods/1"}, "cannot be shown .KeyError: 'methods'"),
    ({"schema": "act-harness/sinks/1", "tasks": 3}, "cannot be shown"),
    ({**bench(), "tables": [{}]}, "cannot be shown"),
    ({**methods(), "methods": {}}, "cannot be shown"),
    ([], "is no result"),
    ({**sinks(), "heads": [{**sinks()["heads"][0], "sinks": "x"}]}, "cannot be drawn"),
    ({**methods(), "columns": {"other": ["t"]}}, "cannot be shown"),
])  # fmt: skip
def test_what_is_no_result_is_refused_in_a_line(tmp_path, content, said):
    path = stored(tmp_path, content, "f.json")
    with pytest.raises(ResultError, match=said):
        report_on([path], tmp_path / "out")


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ResultError, match="no such file or folder"):
        report_on([tmp_path / "absent"], tmp_path / "out")
    with pytest.raises(ResultError, match="nothing to report in"):
        report_on([tmp_path], tmp_path / "out")
    path = stored(tmp_path, {"schema": "act-harness/heads/1"}, "h.json")
    with pytest.raises(ArtifactError):
        report_on([path], tmp_path / "out")


def test_a_method_on_one_document_has_no_interval(tmp_path):
    content = methods()
    content["methods"]["worse"]["columns"]["raw"]["interval"] = [None, None]
    report_on([stored(tmp_path, content, "methods.json")], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "worse, raw -0.1000, inconclusive" in text
    names = [one["name"] for one in table(tmp_path / "out", "1-methods.csv")]
    assert names == ["signed", "signed", "worse"]


def test_a_method_without_heads_shows_the_untouched_model_alone(tmp_path):
    content = methods()
    content["methods"]["worse"]["heads"] = 0
    report_on([stored(tmp_path, content, "methods.json")], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| worse | 0 | 50.0 | 60.0 |" in text
    assert "worse, raw" not in text
    names = {one["name"] for one in table(tmp_path / "out", "1-methods.csv")}
    assert names == {"signed"}


@pytest.mark.parametrize("path", sorted(shipped_artifacts().values()), ids=lambda p: p.stem)
def test_every_shipped_head_set_can_be_shown(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    found = search_section(Source("search", path, content))
    assert content["name"] in found.title
    kinds = {"map", "curves"} if "training" in (content["search"] or {}) else {"map", "ranks"}
    assert {one.name for one in found.figures} == (kinds if content["search"] else set())
    assert all(len(one.columns) == len(line) for one in found.figures for line in one.rows)


def test_the_command_says_what_it_wrote(tmp_path):
    path = stored(tmp_path, sinks(), "sinks.json")
    found = CliRunner().invoke(app, ["report", str(path), "--output", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert f"written: {tmp_path / 'out' / 'report.html'}" in found.output
    assert "3 files of figures" in found.output


# -- hostile text ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A report in which every name is hostile."""
    place = tmp_path_factory.mktemp("hostile")
    rows = [row(text, gained=3 + i) for i, text in enumerate(HOSTILE)]
    found = comparison(*rows, a=HOSTILE[0], b=HOSTILE[1])
    paths = [
        stored(place, replace(found, notes=HOSTILE).to_json(), "comparison.json"),
        stored(place, methods(task=HOSTILE[0], method=HOSTILE[1]), "methods.json"),
        stored(place, sinks(text=HOSTILE[0], task=HOSTILE[4]), "sinks.json"),
        stored(place, bench(title=HOSTILE[1]), "bench.json"),
    ]
    report_on(paths, place / "out", title=HOSTILE[0])
    return place / "out"


class _Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.pictures = set(), []

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        if tag in ("a", "img"):
            self.pictures.append(dict(attrs).get("src") or dict(attrs)["href"])


def test_hostile_names_are_text_in_markdown(hostile):
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    seen = _Elements()
    seen.feed(reader.render((hostile / "report.md").read_text(encoding="utf-8")))
    usual = {"h1", "h2", "p", "ul", "li", "img", "a", "br", "table", "thead", "tbody", "tr", "th",
             "td", "strong"}  # fmt: skip
    assert seen.found <= usual
    assert all(place.startswith("figures/") for place in seen.pictures)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with pages.chromium(tmp_path_factory.mktemp("downloads")) as one:
        yield one


@pytest.mark.slow  # starts a browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_quiet_and_fits_and_shows_hostile_names_as_text(
    browser, hostile, width, scheme
):
    pages.show(browser, hostile / "report.html", width=width, scheme=scheme)
    assert pages.transgressions(browser) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return window.harmed === undefined")
    assert browser.execute_script("return document.scripts.length") == 0
    names = browser.execute_script(
        "return [...document.querySelectorAll('#section-1 tbody tr td:first-child')]"
        ".map((cell) => cell.textContent)"
    )
    assert names == [visible(text) for text in HOSTILE]
    drawn = browser.execute_script("return [...document.images].map((one) => one.naturalWidth)")
    assert len(drawn) == 6
    assert min(drawn) > 100
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.slow  # starts a browser
def test_figures_have_the_ink_of_the_scheme(browser, hostile):
    """Drawn into a canvas: how bright the darkest and the brightest grey of a figure is."""
    found = {}
    for scheme in ("light", "dark"):
        pages.show(browser, hostile / "report.html", scheme=scheme)
        found[scheme] = browser.execute_script("""
            const image = document.images[0], canvas = document.createElement("canvas");
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
            const grey = [];
            for (let i = 0; i < data.length; i += 4) {
                if (data[i + 3] > 250) grey.push((data[i] + data[i + 1] + data[i + 2]) / 3);
            }
            return [Math.min(...grey.slice(0, 9e4)), Math.max(...grey.slice(0, 9e4)),
                    data[3]];
        """)
    assert found["light"][0] < 60
    assert found["dark"][1] > 200
    assert found["light"][2] == found["dark"][2] == 0  # the ground is the page's


def test_names_in_figures_can_be_drawn():
    assert figure_text("act_sst2") == "act_sst2"
    assert figure_text("üñé Ωж") == "üñé Ωж"
    assert figure_text("语\u202e$x$") == r"\u8bed<U+202E>\$x\$"
    both = figure_text("a" * 50 + "middle" + "b" * 50)
    assert len(both) == 60
    assert both.startswith("a" * 40 + "...b")


def test_a_dollar_is_drawn_as_one(tmp_path):
    """Once by its mark and once by what the figure takes for formulas, it was a backslash more."""
    files = []
    for name, text, formulas in (("a", figure_text("$x$ $y$"), True), ("b", "$x$ $y$", False)):
        figure = new_figure(width=2.0, height=1.0)
        figure.text(0.1, 0.5, text).set_parse_math(formulas)
        files.append(save_figure(figure, tmp_path / f"{name}.png").read_bytes())
    assert files[0] == files[1]
