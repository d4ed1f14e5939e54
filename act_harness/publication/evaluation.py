"""From a folder on the disk to the evaluation in it: both arms, by few-shot seed.

``act-harness eval`` writes ``MODEL__ARM__STAMP`` folders side by side, with ``seed-N`` in them
where there were several seeds; lm-eval writes one folder a model. Which arm a result is stands in
the result itself. Any folder of an evaluation stands for all of it.

Not here: what is made of it (:mod:`act_harness.publication.publish`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from act_harness.errors import ResultError
from act_harness.evidence.compare import compare
from act_harness.evidence.comparison import Comparison, RunInfo
from act_harness.evidence.results import Run, load_run
from act_harness.support import hub, places, reading
from act_harness.tracking.tracker import RUN_FILE

__all__ = ["Arm", "Evaluation", "find_evaluation", "is_hub_id"]

_STAMP = re.compile(r"\d{4}-\d\d-\d\dT")
_SEED = re.compile(r"seed-(\d+)")
_LATEST = 1e11
_EXPECTED = "give the output folder of act-harness eval, or of lm_eval --output_path"


def is_hub_id(text: str) -> bool:
    """Say whether a text can be OWNER/NAME on the hub, and is no folder here."""
    return hub.is_repository(text) and not reading.is_folder(text)


@dataclass(frozen=True)
class Arm:
    """One result: one arm under one few-shot seed."""

    run: Run
    seed: int | None
    """Of the examples, where an evaluation has several; otherwise None."""
    named: str | None = None
    """The base model as the user names it; None: as the result does."""

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """What hf-act notes of itself in a result; empty for lm-eval's own models."""
        found = self.run.data.get("config", {}).get("act_harness")
        return found if isinstance(found, Mapping) else {}

    @cached_property
    def date(self) -> float | None:
        """When the evaluation began, in seconds since 1970."""
        found = self.run.data.get("date")
        if not isinstance(found, (int, float)) or not 0 <= found < _LATEST:
            return None
        return float(found)

    def noted(self, part: str, name: str) -> Any:  # noqa: ANN401 - as the result has it
        """Return what a part of the result says of a task or group; None where it says nothing."""
        found = self.run.data.get(part)
        return found.get(name) if isinstance(found, Mapping) else None

    def documents(self, name: str) -> Mapping[str, Any]:
        """Return how many documents a task has (``original``) and were scored (``effective``)."""
        found = self.noted("n-samples", name)
        return found if isinstance(found, Mapping) else {}

    @property
    def skipped(self) -> int:
        """Requests that were too long to be scored; lm-eval's scores count their documents."""
        counters = self.record.get("counters")
        found = counters.get("requests_skipped") if isinstance(counters, Mapping) else None
        return found if isinstance(found, int) else 0

    @property
    def calibrated(self) -> bool:
        """Whether a head set was applied."""
        return bool(self.record.get("artifact_sha256"))

    @property
    def name(self) -> str:
        """``baseline`` or ``act``."""
        return "act" if self.calibrated else "baseline"

    @cached_property
    def evaluated(self) -> str:
        """The base model as the result names it: a hub id or a folder."""
        facts, config = self.record.get("model"), self.run.data.get("config", {})
        if isinstance(facts, Mapping) and facts.get("id"):
            return str(facts["id"])
        given = config.get("model_args")
        named = given.get("pretrained") if isinstance(given, Mapping) else None
        return str(self.run.data.get("model_name") or named or config.get("model") or "")

    @property
    def base_model(self) -> str:
        """The base model as OWNER/NAME.

        Raises:
            ResultError: The result names a folder, or an adapter, and the user nothing.
        """
        if self.named is not None:
            return self.named
        facts = self.record.get("model")
        if isinstance(facts, Mapping) and facts.get("adapter"):
            raise ResultError(
                f"{self.run.label}: evaluated with an adapter, which {self.evaluated!r} does not "
                "name; give --model-id OWNER/NAME"
            )
        if not is_hub_id(self.evaluated):
            raise ResultError(
                f"{self.run.label}: the results name the model by {self.evaluated!r}, which nobody "
                "else can look up; give --model-id OWNER/NAME"
            )
        return self.evaluated

    @property
    def model_id(self) -> str:
        """OWNER/NAME of what was evaluated: a calibrated model is another one than its base."""
        if not self.calibrated:
            return self.base_model
        own = places.file_name(str(self.record.get("artifact")), longest=40)
        return f"{self.base_model}__act-{own}-{str(self.record['artifact_sha256'])[:8]}"

    @property
    def tracked_at(self) -> str | None:
        """Address of its W&B run, None where there is none."""
        folder = self.run.path.parent if self.run.path else Path()
        for place in (folder, folder.parent) if self.seed is not None else (folder,):
            if reading.is_file(place / RUN_FILE):
                found = reading.read_json(place / RUN_FILE, advice="delete it")
                url = found.get("url") if isinstance(found, Mapping) else None
                return url if isinstance(url, str) and url.startswith("https://") else None
        return None


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated together."""

    arms: tuple[Arm, ...]
    """By seed, the baseline before the calibrated arm."""
    stamp: str
    """When it began, as in the names of its folders or, for lm-eval's own, of its file."""
    folder: Path
    """Where its folders lie."""
    notes: tuple[str, ...] = ()

    @cached_property
    def comparisons(self) -> Mapping[int | None, Comparison]:
        """The calibrated arm against the baseline, by seed; empty where only one was evaluated."""
        pairs: dict[int | None, dict[str, Arm]] = {}
        for arm in self.arms:
            pairs.setdefault(arm.seed, {})[arm.name] = arm
        return {
            seed: _nameless(compare(pair["baseline"].run, pair["act"].run), pair)
            for seed, pair in pairs.items()
            if len(pair) == 2
        }

    def of(self, name: str) -> tuple[Arm, ...]:
        """Return one arm's results, by seed."""
        return tuple(arm for arm in self.arms if arm.name == name)


def _nameless(found: Comparison, pair: Mapping[str, Arm]) -> Comparison:
    """Take out what is the evaluating machine's own: paths, and arguments that may hold a key."""

    def info(one: RunInfo, arm: Arm) -> RunInfo:
        return replace(one, label=arm.model_id, path=None, model=arm.model_id, model_args=None)

    return replace(found, a=info(found.a, pair["baseline"]), b=info(found.b, pair["act"]))


def find_evaluation(path: str | os.PathLike[str], *, model_id: str | None = None) -> Evaluation:
    """Find the evaluation that a folder or results file belongs to.

    Args:
        path: The output folder, one of its arms or their comparison; or a results file.
        model_id: The base model's name on the hub, in place of what the results say.

    Raises:
        ResultError: Nothing is there, several evaluations are, or this one is not finished.
        InfrastructureError: A file cannot be read.
    """
    given = Path(path)
    if not reading.is_file(given) and not reading.is_folder(given):
        hint = reading.nearest_beside(given)
        raise ResultError(f"{given}: no such file or folder; {_EXPECTED}{hint}")
    groups: dict[tuple[Path, str], list[Path]] = {}
    for file in _result_files(given):
        groups.setdefault(_belongs_to(file), []).append(file)
    if not groups:
        raise ResultError(f"{given}: no results_*.json in it; {_EXPECTED}")
    if len(groups) > 1:
        shown = ", ".join(sorted(f"{folder.name}/*{stamp}" for folder, stamp in groups)[:6])
        raise ResultError(
            f"{given}: {len(groups)} evaluations in it ({shown}); name a folder of one of them"
        )
    ((folder, stamp), files) = next(iter(groups.items()))
    runs = [load_run(file) for file in files]
    arms = [Arm(run, _seed_of(run), model_id) for run in runs]
    arms.sort(key=lambda arm: (arm.seed or 0, arm.calibrated))
    kept, notes = _newest(arms)
    _check_finished(kept, folder, stamp)
    return Evaluation(tuple(kept), stamp or _date_of(files), folder, tuple(notes))


def _result_files(given: Path) -> list[Path]:
    """Results below a folder, and those of the same evaluation beside it."""
    if reading.is_file(given):
        if not (given.name.startswith("results_") and given.suffix == ".json"):
            raise ResultError(f"{given}: not a results_*.json; {_EXPECTED}")
        return [given] if _layout_of_eval(given) is None else _of_stamp(*_belongs_to(given))
    # Not rglob: somebody's home folder would be read through.
    files = [f for depth in ("", "*/", "*/*/") for f in given.glob(f"{depth}results_*.json")]
    whole = given.resolve()
    _, mark, stamp = whole.name.rpartition("__")
    if mark and _STAMP.match(stamp) and (not files or _layout_of_eval(files[0]) is not None):
        beside = _of_stamp(whole.parent, whole.name.rpartition("__")[2])
        return beside if beside or not files else files
    return files


def _of_stamp(folder: Path, stamp: str) -> list[Path]:
    found = [place for place in folder.glob("*__*") if place.name.endswith(f"__{stamp}")]
    return [f for place in found for depth in ("", "*/") for f in place.glob(f"{depth}results_*")]


def _layout_of_eval(file: Path) -> tuple[Path, str] | None:
    """Output folder and stamp where a file lies as ``act-harness eval`` lays it out."""
    place = file.resolve().parent
    if _SEED.fullmatch(place.name):
        place = place.parent
    stamp = place.name.rpartition("__")[2]
    own = file.stem.removeprefix("results_")
    return (place.parent, stamp) if re.fullmatch(rf"{re.escape(own)}(-\d+)?", stamp) else None


def _belongs_to(file: Path) -> tuple[Path, str]:
    return _layout_of_eval(file) or (file.resolve().parent, "")


def _date_of(files: list[Path]) -> str:
    return max(file.stem.removeprefix("results_") for file in files)


def _seed_of(run: Run) -> int | None:
    found = _SEED.fullmatch(run.path.parent.name) if run.path else None
    return int(found.group(1)) if found else None


def _newest(arms: list[Arm]) -> tuple[list[Arm], list[str]]:
    """Take of lm-eval's results in one folder the newest; eval has one for each arm and seed."""
    kept: dict[tuple[int | None, bool], Arm] = {}
    notes = []
    for arm in sorted(arms, key=lambda one: one.date or 0.0):
        older = kept.get((arm.seed, arm.calibrated))
        if older is not None:
            notes.append(f"{arm.run.label}: the newest of several results taken")
        kept[arm.seed, arm.calibrated] = arm
    return [arm for arm in arms if arm in kept.values()], notes


def _check_finished(arms: list[Arm], folder: Path, stamp: str) -> None:
    """Refuse an evaluation that was stopped: half of it says what the whole may not say."""
    if not any(arm.run.metrics(name) for arm in arms for name in arm.run.data["results"]):
        raise ResultError(
            f"{arms[0].run.label}: no scores in it; repeat the run without --predict-only"
        )
    if not stamp:
        return
    began = [place for place in folder.glob("*__*") if place.name.endswith(f"__{stamp}")]
    written = {p for arm in arms if arm.run.path for p in arm.run.path.resolve().parents}
    empty = [p for p in began if p not in written and "__comparison__" not in p.name]
    seeds = {name: {a.seed for a in arms if a.name == name} for name in ("baseline", "act")}
    both = len(began) > 1
    if empty or (both and seeds["baseline"] != seeds["act"]):
        lacking = empty[0].name if empty else "an arm"
        raise ResultError(
            f"{folder}: the evaluation of {stamp} is not finished ({lacking} has no results); "
            "repeat act-harness eval"
        )
    if not seeds["baseline"]:
        raise ResultError(
            f"{arms[0].run.label}: its baseline is not beside it, so its gain cannot be told; "
            "give the folder that holds both arms"
        )
