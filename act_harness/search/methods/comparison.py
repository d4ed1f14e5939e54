"""A comparison of methods: find every head set, score it, and once more at equal strength.

One folder holds all of it: ``artifacts/`` and ``scores/`` a file a method, ``equal/`` the same at
equal strength, ``labels.json`` the right choices, beside the ledgers of the searches. What is there
is not computed again, so that a comparison that was killed, or gets another method, goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from act_harness.artifact import Artifact, load_artifact
from act_harness.errors import RecipeError, ResultError
from act_harness.evidence.calibrators import lengths_of
from act_harness.search.methods.arms import Arm, ArmScorer, Parts, identity_of, parts_of
from act_harness.search.methods.context import Method, MethodContext
from act_harness.search.methods.recorded import record_judgements
from act_harness.search.methods.registry import METHODS
from act_harness.search.methods.strength import Match, divergence, matching_power, scaled
from act_harness.support import atomic, places, reading
from act_harness.support.interruption import saved
from act_harness.support.processes import Processes
from act_harness.support.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from act_harness.artifact import ModelFacts
    from act_harness.search.documents import Document, TaskDocuments
    from act_harness.search.recipe import Recipe

__all__ = ["EqualArm", "MethodArms", "compare_methods"]

_VERSION = 2
_REFERENCE = "signed"
"""Whose strength the others are brought to, where it is compared and found heads."""


class EqualArm(NamedTuple):
    """A method at the strength of another."""

    arm: Arm
    match: Match


@dataclass(frozen=True)
class MethodArms:
    """Every method's scores."""

    model: ModelFacts
    parts: Parts
    untouched: Arm
    arms: tuple[Arm, ...]
    divergences: dict[str, float]
    """How far each moves the answers on verify, in nats."""
    reference: str | None
    """Method whose divergence the others were brought to; None: there is no second table."""
    equal: tuple[EqualArm, ...]


@dataclass
class _Comparison:
    """What is computed once and kept in the folder."""

    folder: Path
    context: MethodContext
    scorer: ArmScorer
    parts: Parts

    def artifact(self, method: Method) -> Artifact | None:
        """Return what a method finds, from its file where it is there."""
        path = self._artifact_file(method)
        if path.is_file():
            stored = load_artifact(path)
            stored.verify(self.context.facts)
            return stored
        if method.name != "none":
            self.say(f"{method.name}: finding heads ({method.note})")
        found = method.find(self.context)
        if found is not None:
            found.save(path)
        return found

    def _artifact_file(self, method: Method) -> Path:
        return self.folder / "artifacts" / f"{method.name}.json"

    def _scores_file(self, method: Method) -> Path:
        return self.folder / "scores" / f"{method.name}.json"

    def arm(self, method: Method) -> Arm:
        """Return the scores of a method's head set, from their file where it is there.

        Raises:
            ResultError: the file was changed, or is not of the head set beside it.
        """
        path = self._scores_file(method)
        if not path.is_file():
            artifact = self.artifact(method)
            note = ""
            if method.name != "none" and (artifact is None or not artifact.head_count()):
                note = "found no heads: the untouched model"
            self.say(f"{method.name}: scoring")
            arm = self.scorer.arm(method.name, artifact, self.parts, note=note)
            write_sealed(path, arm._asdict())
        arm = Arm(**read_sealed(path))
        there = arm.heads or self._artifact_file(method).is_file()
        artifact = self.artifact(method) if there else None
        scored = artifact.sha256() if artifact and artifact.head_count() else None
        if (arm.method, arm.artifact_sha256) != (method.name, scored):
            raise ResultError(
                f"{path} is not of the head set in {self._artifact_file(method)}; delete the "
                "scores and they are computed again, or put back what was there"
            )
        return arm

    def other_arms(self, methods: Sequence[Method]) -> list[Arm]:
        """Return the arms that earlier calls have scored: what a head set is held against stays."""
        others = (one for one in METHODS.values() if one not in methods)
        return [self.arm(one) for one in others if self._scores_file(one).is_file()]

    def equal_arm(self, method: Method, untouched: Arm, wanted: float) -> EqualArm:
        """Return a method's scores at the power that moves the answers as far as ``wanted``."""
        path = self.folder / "equal" / f"{method.name}.json"
        artifact = self.artifact(method)
        if artifact is None:
            raise RecipeError(f"method {method.name!r} found no heads that could be scaled")
        new = {"of": artifact.sha256(), "wanted": wanted}
        kept = read_sealed(path) if path.is_file() else {}
        if {key: kept.get(key) for key in new} != new:
            kept = {**new, "tried": []}
        tried: dict[float, float] = dict(kept["tried"])

        def measure(power: float) -> float:
            if power not in tried:
                parts = {"verify": self.parts["verify"]}
                found = self.scorer.scores(scaled(artifact, power), parts)
                tried[power] = divergence(untouched.scores["verify"], found["verify"])
                kept["tried"] = list(tried.items())
                write_sealed(path, kept)
            return tried[power]

        self.say(f"{method.name}: at equal strength")
        match = matching_power(measure, wanted)
        if "arm" not in kept:
            arm = self.scorer.arm(method.name, scaled(artifact, match.power), self.parts)
            kept["arm"] = arm._asdict()
            write_sealed(path, kept)
        return EqualArm(Arm(**kept["arm"]), match)

    def say(self, text: str) -> None:
        """Tell what begins."""
        if self.context.show_progress:
            print(f"methods: {text}", file=sys.stderr, flush=True)


def compare_methods(
    recipe: Recipe,
    *,
    model: PreTrainedModel,
    facts: ModelFacts,
    documents: Sequence[TaskDocuments],
    methods: Sequence[Method],
    folder: Path,
    ledgers: Path | None = None,
    equal_strength: bool = True,
    show_progress: bool = True,
) -> MethodArms:
    """Find, score, and bring to equal strength what several methods make of a recipe.

    Args:
        recipe: tasks, samples, seeds, detection and settings of the searches.
        model: a loaded causal language model.
        facts: what identifies it.
        documents: of every task, with held-out documents or the split ``judge``.
        methods: of :mod:`act_harness.search.methods.registry`; the first is ``none``.
        folder: of everything; one that holds another comparison is refused.
        ledgers: folder of the searches' ledgers; None: in ``folder``.
        equal_strength: whether methods are scored at equal strength too.
        show_progress: say what begins, and draw the searches' bars.

    Raises:
        RecipeError: the folder is of another recipe, model or documents; documents lack what a
            table needs; several processes were started.
        ResultError: what the folder holds was changed since it was written.
        InfrastructureError: a file cannot be written; what was computed is kept.
    """
    if Processes.here().count > 1:
        raise RecipeError("methods are compared in one process; start it without torchrun")
    parts = parts_of(documents)
    scorer = ArmScorer(model, facts, recipe.engine)
    identity = {"version": _VERSION, **identity_of(recipe, facts, parts, scorer.device)}
    refusal = f"another process compares methods in {folder}; wait for it or end it"
    with (
        places.sole_writer(folder / "lock", refusal),
        saved(lambda: f"what was found and scored is in {folder}"),
    ):
        _claim(folder, identity)
        for kind in ("artifacts", "scores", "equal"):
            atomic.remove_halves(folder / kind)
        atomic.write_json(folder / "labels.json", _labels(parts), canonical=True)
        context = MethodContext(
            recipe, facts, [replace(one, judge=(), held_out=()) for one in documents], scorer,
            ledgers or folder / "ledgers", lambda name: run.artifact(METHODS[name]), show_progress,
        )  # fmt: skip
        run = _Comparison(folder, context, scorer, parts)
        untouched, *arms = [run.arm(method) for method in methods]
        known = [*arms, *run.other_arms(methods)]
        record_judgements(folder / "artifacts", untouched, known, parts["evaluation"])
        moved = {
            arm.method: divergence(untouched.scores["verify"], arm.scores["verify"]) for arm in arms
        }
        able = [name for name, found in moved.items() if found > 0.0]
        reference = _REFERENCE if _REFERENCE in able else next(iter(able), None)
        if not equal_strength or reference is None:
            return MethodArms(facts, parts, untouched, tuple(arms), moved, None, ())
        equal = tuple(
            run.equal_arm(method, untouched, moved[reference])
            for method in methods
            if method.name in able
        )
    return MethodArms(facts, parts, untouched, tuple(arms), moved, reference, equal)


def _labels(parts: Parts) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return what columns need of each document beside its scores, in the order of their rows."""
    return {
        split: {task: [_label(document) for document in found] for task, found in tasks.items()}
        for split, tasks in parts.items()
    }


def _label(document: Document) -> dict[str, Any]:
    return {
        "key": document.key,
        "right": document.right,
        "characters": [len(text) for text in document.choices],
        "characters_without_spaces_around": lengths_of(document.choices),
        "tokens": [len(answer) for _, answer in document.requests],
    }


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Take a folder for a comparison, or refuse one that holds another."""
    path = folder / "identity.json"
    if not path.is_file():
        atomic.write_json(path, identity)
    stored, here = reading.read_json(path), atomic.plain(identity)
    other = [key for key in here if not isinstance(stored, dict) or stored.get(key) != here[key]]
    if other:
        what = "other documents" if other[0] == "documents" else f"another {other[0]}"
        raise RecipeError(f"{folder} holds a comparison with {what}; give another --output")
