r"""What head sets are worth on held-out documents: raw and label-prior corrected, with intervals.

Every claim about a head set needs both columns and the random heads beside it: much of a raw gain
can be a shift of the model's label bias, which a correction of the label prior alone gives as well.
Documents come prepared (``act-harness search --prepare FILE --held-out N``), artifacts from the
search. Differences are paired by document, intervals from the bootstrap within tasks.

    python -m act_harness.search.choose.heldout --model DIR --documents FILE --output FOLDER \
        --sizes 20,40,80 ARTIFACT...
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from act_harness.artifact import Artifact, ModelFacts, load_artifact
from act_harness.attention import attach, model_facts
from act_harness.attention.load import load_plain_model, load_plain_tokenizer
from act_harness.attention.probe import attending_layers
from act_harness.errors import InputError
from act_harness.evidence.tables import markdown_cell, markdown_table
from act_harness.scoring.scorer import Item, Scorer
from act_harness.search.choose.effects import TaskScores
from act_harness.search.choose.judgement import judgement
from act_harness.search.choose.sets import Outcome, Reading, chosen_by, make_heads
from act_harness.search.documents import Document, facts_of_tokens, read_documents
from act_harness.search.recipe import make_recipe
from act_harness.support import atomic, places, provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from act_harness.evidence.stats import PairedDifference

__all__ = ["ArmResult", "best_heads", "compare_arms", "random_artifact"]


class ArmResult(NamedTuple):
    """One arm against the untouched model on the same documents."""

    name: str
    heads: int
    outcome: Outcome
    columns: dict[Reading, PairedDifference]
    """By column, means over its tasks; raw and corrected are of the same tasks, the rest has a
    column of its own."""

    def to_json(self) -> dict[str, Any]:
        """Return the columns, the tasks of each, and both accuracies of every task."""
        return {
            "name": self.name,
            "heads": self.heads,
            **{name: vars(found) for name, found in self.columns.items()},
            "tasks": {name: self.outcome.tasks_of(name) for name in self.columns},
            "by_task": {
                task: (arm.accuracy, arm.corrected) for task, arm in self.outcome.arms.items()
            },
        }


@dataclass(frozen=True)
class _Judge:
    model: PreTrainedModel
    facts: ModelFacts
    tasks: dict[str, Sequence[Document]]
    token_budget: int

    def scores(self, artifact: Artifact | None) -> dict[str, TaskScores]:
        attachment = attach(self.model, artifact, facts=self.facts)
        try:
            scorer = Scorer(self.model, attachment, token_budget=self.token_budget)
            found = {}
            for task, documents in self.tasks.items():
                items = [Item(*request) for d in documents for request in d.requests]
                rows = iter(scorer.score(items))
                scores = [[next(rows).loglikelihood for _ in d.requests] for d in documents]
                found[task] = TaskScores.of(documents, scores, objective="margin")
            return found
        finally:
            attachment.detach()


def compare_arms(
    model: PreTrainedModel,
    arms: dict[str, Artifact],
    tasks: dict[str, Sequence[Document]],
    *,
    facts: ModelFacts | None = None,
    token_budget: int = 8192,
) -> list[ArmResult]:
    """Score every arm and the untouched model on the same documents.

    Args:
        model: a loaded causal language model.
        arms: head sets by name.
        tasks: documents by task.
        facts: what identifies the model.
        token_budget: tokens of a forward.
    """
    judge = _Judge(model, facts or model_facts(model), tasks, token_budget)
    for artifact in arms.values():  # one that does not fit is found before anything is scored
        attach(model, artifact, facts=judge.facts).detach()
    stock = judge.scores(None)
    return [
        _compare(name, artifact, stock, judge.scores(artifact)) for name, artifact in arms.items()
    ]


def _compare(
    name: str, artifact: Artifact, stock: dict[str, TaskScores], found: dict[str, TaskScores]
) -> ArmResult:
    outcome = Outcome(
        stock={task: base.arm(base.scores) for task, base in stock.items()},
        arms={task: base.arm(found[task].scores) for task, base in stock.items()},
        spreads={task: base.spread for task, base in stock.items()},
    )
    columns = {name: outcome.difference(name) for name in outcome.readings()}
    return ArmResult(name, artifact.head_count(), outcome, columns)


def random_artifact(
    like: Artifact, *, seed: int, layers: Collection[int] | None = None
) -> Artifact:
    """Return an artifact of as many random heads of the whole model, with the same mass maps.

    Args:
        like: whose size and strengths it has.
        seed: of the draw.
        layers: those that attend; None: all.
    """
    facts = like.model
    places = [
        (layer, head)
        for layer in sorted(range(facts.num_hidden_layers) if layers is None else layers)
        for head in range(facts.num_attention_heads)
    ]
    source = random.Random(f"held-out/{seed}")  # noqa: S311 - no secret
    drawn = sorted(source.sample(places, like.head_count()))
    own = [s for plan in like.plans().values() for s in plan.strengths]
    mixed = source.sample(own, len(own))
    heads: dict[int, list[int]] = {}
    strengths: dict[int, dict[int, Any]] = {}
    for (layer, head), strength in zip(drawn, mixed, strict=True):
        heads.setdefault(layer, []).append(head)
        strengths.setdefault(layer, {})[head] = strength
    return like.model_copy(
        update={
            "name": f"random-{seed}",
            "heads": {layer: tuple(found) for layer, found in heads.items()},
            "strengths": strengths,
            "search": None,
        }
    )


def best_heads(artifact: Artifact, size: int) -> Artifact:
    """Return the ``size`` heads of largest effect that a search measured, whatever it selected.

    Where the heads were ordered anew by the documents of both splits, that order counts.

    Raises:
        InputError: the artifact has no such table, or too few heads in it have a positive effect.
    """
    if not artifact.search:
        raise InputError(f"artifact {artifact.name!r} has no search table to take heads from")
    recipe = make_recipe({k: v for k, v in artifact.search["recipe"].items() if v is not None})
    best: dict[tuple[int, int], tuple[float, int]] = {}
    table = artifact.search["rule"].get("refit") or artifact.search["table"]["heads"]
    for layer, head, strength, effect, *_ in table["rows"]:
        if effect > best.get((layer, head), (0.0, 0))[0]:
            best[layer, head] = (effect, strength)
    ordered = sorted(best, key=lambda place: (-best[place][0], place))[:size]
    if len(ordered) < size:
        raise InputError(
            f"artifact {artifact.name!r} has {len(ordered)} heads of positive effect, not {size}"
        )
    heads, strengths = make_heads([(*place, best[place][1]) for place in ordered], recipe)
    update = {"name": f"{artifact.name}-{size}", "heads": heads, "strengths": strengths}
    return artifact.model_copy(update=update)


_TITLES: dict[Reading, str] = {
    "raw": "raw",
    "corrected": "label-prior corrected",
    "raw_other_tasks": "raw, choices differ by document",
}


def _figure(found: PairedDifference) -> str:
    low, high = found.interval
    return (
        f"{100 * found.score_b:.1f} ({100 * found.difference:+.1f}; "
        f"{100 * low:+.1f} to {100 * high:+.1f})"
    )


def _markdown(
    results: Sequence[ArmResult], tasks: dict[str, Sequence[Document]], title: str
) -> str:
    first = results[0]
    counts = ", ".join(
        f"{markdown_cell(task)} {len(documents)}" for task, documents in tasks.items()
    )
    columns = list(first.columns)
    said = [
        f"{_TITLES[name]}: {', '.join(map(markdown_cell, first.outcome.tasks_of(name)))}"
        for name in columns
    ]
    stock = [f"{100 * first.columns[name].score_a:.1f}" for name in columns]
    rows = [
        ["none", "0", *stock],
        *([arm.name, str(arm.heads), *map(_figure, arm.columns.values())] for arm in results),
    ]
    lines = [
        f"# {markdown_cell(title)}",
        "",
        f"Held-out documents: {counts}. Mean accuracy over tasks in %; in brackets the change "
        "against no heads, paired by document, with its 95 % bootstrap interval.",
        *([f"Tasks by column: {'; '.join(said)}."] if "raw_other_tasks" in columns else []),
        "",
        markdown_table(["heads", "number", *(_TITLES[name] for name in columns)], rows),
    ]
    return "\n".join(lines)


def _record(paths: Sequence[str], results: Sequence[ArmResult]) -> None:
    """Write into each artifact what these documents say of it, as ``search.held_out``."""
    drawn = [arm for arm in results if arm.name.startswith("random ")]
    by_name = {arm.name: arm for arm in results}
    for path in paths:
        artifact, arm = load_artifact(path), by_name[Path(path).stem]
        if artifact.search is None or not arm.heads:
            continue
        own = make_recipe({k: v for k, v in artifact.search["recipe"].items() if v is not None})
        found = judgement(
            arm.outcome,
            [one.outcome for one in drawn if one.heads == arm.heads],
            chosen_by=chosen_by(own),
            heads=arm.heads,
        )
        search = {**artifact.search, "held_out": found}
        artifact.model_copy(update={"search": search}).save(path)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Compare artifacts on prepared held-out documents; return the path of the report."""
    parser = argparse.ArgumentParser(description="Head sets on held-out documents.")
    parser.add_argument("artifacts", nargs="+", help="artifacts; the first has the controls")
    parser.add_argument("--model", required=True)
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--tasks", default="", help="only these, separated by commas")
    parser.add_argument("--random-sets", type=int, default=5)
    parser.add_argument(
        "--sizes", default="", help="also so many best heads of the first artifact, 20,40,80"
    )
    parser.add_argument(
        "--random-size", type=int, help="heads of the random sets; else the first artifact's"
    )
    parser.add_argument("--token-budget", type=int, default=8192, help="tokens of a forward")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--title", default="Head sets on held-out documents")
    parser.add_argument("--output", type=Path, default=Path("results/reports"))
    parser.add_argument("--name", default="heldout")
    parser.add_argument(
        "--record", action="store_true", help="also write the figures into the artifacts"
    )
    given = parser.parse_args(arguments)
    places.prepare_folder(given.output)
    model = load_plain_model(given.model, dtype=given.dtype, device=given.device)
    documents = read_documents(given.documents)
    facts = model_facts(model, load_plain_tokenizer(given.model), name=Path(given.model).name)
    facts = facts_of_tokens(facts, documents)
    wanted = [name for name in given.tasks.split(",") if name]
    tasks: dict[str, Sequence[Document]] = {
        d.task: d.held_out for d in documents if d.held_out and (not wanted or d.task in wanted)
    }
    if not tasks:
        raise InputError(
            f"{given.documents} holds no held-out documents of these tasks; prepare it with "
            "--held-out N"
        )
    arms = {Path(path).stem: load_artifact(path) for path in given.artifacts}
    first = next(iter(arms.values()))
    for size in [int(text) for text in given.sizes.split(",") if text]:
        arms[f"{size} best of {first.name}"] = best_heads(first, size)
    like = first if given.random_size is None else best_heads(first, given.random_size)
    layers = attending_layers(model) if given.random_sets else ()
    for seed in range(given.random_sets):
        arms[f"random {seed + 1}"] = random_artifact(like, seed=seed, layers=layers)
    results = compare_arms(model, arms, tasks, facts=facts, token_budget=given.token_budget)
    content = {
        "arms": [arm.to_json() for arm in results],
        "documents": {task: len(documents) for task, documents in tasks.items()},
        "provenance": provenance.collect(device=given.device).to_json(),
    }
    atomic.write_json(given.output / f"{given.name}.json", content, default=vars)
    if given.record:
        _record(given.artifacts, results)
    text = _markdown(results, tasks, given.title)
    print(text)
    return atomic.write_text(given.output / f"{given.name}.md", text)


if __name__ == "__main__":
    main()
