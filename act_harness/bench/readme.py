"""The pages' tables of speed and accuracy, made from the stored results: nothing is typed by hand.

    python -m act_harness.bench.readme            # print the tables
    python -m act_harness.bench.readme --write    # put them into README.md and docs/measured.md

Run it after the benchmarks or the reports were made anew. Every row names the file that its figures
stand in, with the commit that was measured; weak figures come first. Rounding: two decimals below
10, one below 100, none above; accuracies and their differences in percent with one decimal.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from act_harness.artifact import load_artifact
from act_harness.bench.stock import LM_EVAL
from act_harness.bench.summary import summary_table
from act_harness.errors import InputError
from act_harness.evidence.tables import Markup, markdown_table
from act_harness.support import reading
from act_harness.support.atomic import write_text

__all__ = ["PAGES", "accuracy_table", "main", "replaced", "speed_table"]

BENCHMARKS = Path("results/benchmarks")
REPORTS = Path("results/reports")
PAGES = {"README.md": ("summary",), "docs/measured.md": ("speed", "accuracy")}
"""Pages of a checkout, and the tables that are on each."""


class Line(NamedTuple):
    """A row of a table."""

    what: str
    where: str
    figures: str
    weakest: float
    """For the order: the least of the figures, as a share of stock's speed."""
    source: str


def number(value: float) -> str:
    """Return a figure as the pages show it."""
    size = abs(value)
    return f"{value:.2f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:.0f}"


def percent(value: float) -> str:
    """Return a share as the pages show it, in percent."""
    return f"{100 * value:.1f}"


# -- speed -----------------------------------------------------------------------------------------


def speed_table(root: Path) -> str:
    """Return the table of speed from the benchmarks below a checkout."""
    rows: list[list[str]] = []
    for make in (_scoring, _whole_models, _attention, _search, _equality, _rounding):
        rows += [
            [Markup(line.what), line.where, line.figures, Markup(line.source)]
            for line in sorted(make(root), key=lambda line: line.weakest)
        ]
    return markdown_table(["what", "where", "figures", "file, commit"], rows, compact=True).rstrip()


def _stored(root: Path, pattern: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted((root / BENCHMARKS).glob(pattern)):
        yield path, reading.read_json(path, lenient=True)


def _records(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def _source(path: Path, report: dict[str, Any], root: Path) -> str:
    machine = report.get("machine") or report.get("provenance") or {}
    commit = (machine.get("commit") or "unknown")[:7]
    changed = ", with local changes" if machine.get("dirty") else ""
    return f"[{path.stem}]({path.relative_to(root).as_posix()}), {commit}{changed}"


def _chip(report: dict[str, Any]) -> str:
    """Return the machine in a few words: ``H200``, ``AMD EPYC, 2 cores``."""
    chip = report["machine"]["chip"]
    found = re.search(r"\b[ABHL]\d+\w*", chip) if "NVIDIA" in chip else None
    if found:
        return found[0]
    threads = report["machine"]["threads"]
    return f"{chip.split('(R)')[0]} CPU, {threads} thread{'s' if threads > 1 else ''}"


def _attention(root: Path) -> Iterator[Line]:
    for path, report in _stored(root, "attention-cuda.json"):
        records = [r for r in _records(report["tables"][0]) if r["variant"] == "triton"]
        for selected in dict.fromkeys(r["selected"] for r in records):
            mine = [r for r in records if r["selected"] == selected]
            for how, key in (("each call from the host", "ratio"), ("CUDA graph", "device_ratio")):
                each = ", ".join(f"{number(r[key])} ({r['batch']} x {r['tokens']})" for r in mine)
                yield Line(
                    f"attention alone, {selected} of 32 heads: time over stock's, {how}",
                    _chip(report),
                    each,
                    1 / max(r[key] for r in mine),
                    _source(path, report, root),
                )


def _whole_models(root: Path) -> Iterator[Line]:
    for kind, size in (("prefill", "tokens"), ("decode", "context")):
        for path, report in _stored(root, f"attention-{kind}-*.json"):
            for table in report["tables"]:
                mine = [r for r in _records(table) if str(r["variant"]).startswith("act")]
                if not mine:
                    continue
                yield Line(
                    f"whole-model {kind}: time over stock's",
                    f"{_chip(report)}, {table['title']}",
                    ", ".join(f"{number(r['ratio'])} ({r['batch']} x {r[size]})" for r in mine),
                    1 / max(r["ratio"] for r in mine),
                    _source(path, report, root),
                )


def _scoring(root: Path) -> Iterator[Line]:
    for path, report in _stored(root, "scoring-*.json"):
        own = any(LM_EVAL in remark for remark in report["remarks"])
        stock = "lm-eval's `hf`" if own else "a stand-in for lm-eval's `hf`"
        model = report["title"].removeprefix("Scoring with ")
        model = model.replace("7b,", "random weights of a 7B shape,")
        for table in report["tables"]:
            records = [r for r in _records(table) if "ACT / stock" in r]
            if not records:
                continue
            records.sort(key=lambda r: r["ACT / stock"])
            title = "batch size 8" if table["title"] == "Requests per second" else table["title"]
            where = f"{_chip(report)}, {model}: {title[0].lower() + title[1:]}"
            each = ", ".join(
                f"{number(r['ACT / stock'])} ({r['requests of'].removesuffix(' 0-shot')})"
                for r in records
            )
            weakest, source = records[0]["ACT / stock"], _source(path, report, root)
            yield Line(f"scoring: requests per second over {stock}", where, each, weakest, source)


def _search(root: Path) -> Iterator[Line]:
    for path, report in _stored(root, "search-c*.json"):
        table = next((t for t in report["tables"] if t["title"] == "Cost"), None)
        if table is None:
            continue
        found = {r["way"]: r["times faster"] for r in _records(table)}
        documents = table["note"].split(" documents")[0]
        yield Line(
            "head search: times faster than one head at a time at batch 1 (scaled)",
            f"{_chip(report)}, SmolLM2, {documents} documents",
            f"{number(found['exhaustive'])} exhaustive, {number(found['screened'])} screened",
            found["exhaustive"],
            _source(path, report, root),
        )


def _equality(root: Path) -> Iterator[Line]:
    for path, report in _stored(root, "equality-*.json"):
        records = _records(report["tables"][0])
        worst = {
            kind: max(v for r in records for name, v in r.items() if name.startswith(f"{kind},"))
            for kind in ("stock", "none", "ACT")
        }
        yield Line(
            "largest difference of a log-likelihood, nats",
            f"{_chip(report)}, {report['title'].split(' with ')[-1]}",
            f"{worst['none']:.1e} none against stock, {worst['ACT']:.1e} ACT against one forward a "
            f"request; stock against itself at another batch size {worst['stock']:.1e}",
            math.inf,
            _source(path, report, root),
        )


def _rounding(root: Path) -> Iterator[Line]:
    for path, report in _stored(root, "rounding-*.json"):
        worst = dict.fromkeys(("none against hf", "hf against hf", "none against none"), 0.0)
        for row in _records(report["tables"][0]):
            if "softmax" not in row["what"] + row["against"]:
                kinds = f"{row['what'].split(',')[0]} against {row['against'].split(',')[0]}"
                worst[kinds] = max(worst[kinds], row["largest difference"])
        yield Line(
            "the same: `none` against `hf`, and each against itself at other batch sizes",
            f"{_chip(report)}, {report['title'].split(': ')[-1]}",
            f"{number(worst['none against hf'])} none against hf, "
            f"{number(worst['hf against hf'])} hf against itself, "
            f"{number(worst['none against none'])} none against itself",
            math.inf,
            _source(path, report, root),
        )


# -- accuracy --------------------------------------------------------------------------------------


def accuracy_table(root: Path) -> str:
    """Return the table of accuracy from the held-out reports below a checkout.

    A row for each shipped head set, one for as many best heads as the random sets have where a
    report has that arm, and one for the random sets. Sets whose corrected gain is not shown (its
    interval holds 0) come first.
    """
    artifacts = {path.stem: path for path in (root / "search" / "artifacts").rglob("*.json")}
    shipped = set(artifacts)
    rows: list[tuple[float, list[str]]] = []
    judged: set[str] = set()
    for path in sorted((root / REPORTS).glob("*.json")):
        report = reading.read_json(path, lenient=True)
        if "arms" in report:
            rows += _accuracy_rows(path, report, shipped, root)
            judged |= {arm["name"] for arm in report["arms"]}
    header = [
        "heads", "raw accuracy, %", "label-prior corrected, %", "documents", "file, commit",
    ]  # fmt: skip
    cells = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    table = markdown_table(header, cells, compact=True).rstrip()
    left = [
        f"\n- {name}: {load_artifact(artifacts[name]).judgement()[0]}"
        for name in sorted(shipped - judged)
    ]
    if not left:
        return table
    said = "Shipped without a stored held-out report, and what their records say"
    return f"{table}\n\n{said}:\n{''.join(left)}"


def _accuracy_rows(
    path: Path, report: dict[str, Any], shipped: set[str], root: Path
) -> Iterator[tuple[float, list[str]]]:
    documents = sum(report["documents"].values())
    tasks = len(report["documents"])
    end = [f"{documents} of {tasks} tasks", Markup(_source(path, report, root))]
    draws = [arm for arm in report["arms"] if arm["name"].startswith("random")]
    equal = {f"{arm['heads']} best of" for arm in draws}
    for arm in report["arms"]:
        same_size = any(arm["name"].startswith(start) for start in equal)
        if arm["name"] not in shipped and not same_size:
            continue
        judged = arm.get("corrected") or arm["raw"]
        heads = "" if same_size else f", {arm['heads']} heads"
        yield (
            judged["interval"][0],
            [f"{arm['name']}{heads}", _raw(arm), _change(arm.get("corrected")), *end],
        )
    if draws:
        sizes = sorted({arm["heads"] for arm in draws})
        name = f"{len(draws)} random sets of {' or '.join(map(str, sizes))}"
        yield (
            -math.inf,
            [name, _range(draws, "raw"), _range(draws, "corrected"), *end],
        )


def _raw(arm: dict[str, Any]) -> str:
    """Both columns are of the same tasks; those whose choices differ by document stand apart."""
    other = arm.get("raw_other_tasks")
    return _change(arm["raw"]) + (f"; other tasks {_change(other)}" if other else "")


def _change(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = (percent(end) for end in found["interval"])
    change = f"{100 * found['difference']:+.1f}"
    shown = "" if found["interval"][0] > 0 else ", not shown"
    scores = f"{percent(found['score_a'])} to {percent(found['score_b'])}"
    return f"{change} ({low} to {high}{shown}), {scores}"


def _range(draws: Sequence[dict[str, Any]], column: str) -> str:
    changes = [arm[column]["difference"] for arm in draws if arm.get(column)]
    return f"{100 * min(changes):+.1f} to {100 * max(changes):+.1f}" if changes else "-"


# -- the pages -------------------------------------------------------------------------------------


def replaced(page: str, text: str, root: Path) -> str:
    """Return a page's text with its tables as the files have them.

    Args:
        page: One of :data:`PAGES`; links of its tables lead from there.
        text: What stands on it now.
        root: The checkout.

    Raises:
        InputError: A mark is missing.
    """
    tables = {"summary": summary_table, "speed": speed_table, "accuracy": accuracy_table}
    up = "../" * page.count("/")
    for block in PAGES[page]:
        before, first, rest = text.partition(f"<!-- {block}: ")
        mark, opened, rest = rest.partition("-->\n")
        _, last, after = rest.partition(f"<!-- end of {block} -->")
        if not (first and opened and last):
            raise InputError(f"{page} has no marks around the table of {block}; put them back")
        made = tables[block](root).replace("](results/", f"]({up}results/")
        text = f"{before}{first}{mark}{opened}{made}\n{last}{after}"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or write them into the pages."""
    parser = argparse.ArgumentParser(description="The pages' tables from the stored results.")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the checkout")
    parser.add_argument("--write", action="store_true", help=f"into {' and '.join(PAGES)}")
    given = parser.parse_args(arguments)
    if given.write:
        for page in PAGES:
            path = given.root / page
            write_text(path, replaced(page, path.read_text(encoding="utf-8"), given.root))
    else:
        made = (summary_table(given.root), speed_table(given.root), accuracy_table(given.root))
        print(*made, sep="\n\n")


if __name__ == "__main__":
    main()
