"""What is stored of a run: ``baseline.json``, readable, one document a line, no text of any row.

Of every document there are hashes (document, prompt, all requests, right answer) and, for each
arm, the choices' log-likelihoods, the prediction, the metrics and what calibration did. Hashes are
the first 16 hexadecimal digits of a SHA-256, so no row of a dataset can be read from the file.

Not here: filling it from an evaluation (:mod:`.measure`) or comparing two of them.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from act_harness.artifact import ModelFacts
from act_harness.calibration import validation_line
from act_harness.errors import InfrastructureError, ResultError
from act_harness.support import atomic, reading

__all__ = [
    "ArmInfo",
    "Baseline",
    "Spread",
    "StoredAnswer",
    "StoredDocument",
    "StoredMeasurement",
    "TaskRecord",
    "load_baseline",
    "save_baseline",
]

FILE = "baseline.json"
SCHEMA = "act-harness/baseline/1"
_STRICT = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
Value = float | tuple[float, float] | None

ABOUT = (
    "Layer 1, goldens: for every document and arm the prediction and the metrics must be equal and "
    "each log-likelihood within 'drift' nats; hashes of documents, prompts, requests and right "
    "answers, task versions, head sets and what calibration did must be equal too. Documents "
    "marked 'near' have an attention column so near the sink threshold that rounding decides about "
    "it; their drift is reported, not judged.",
    "Layer 2, statistics: arm by arm and task by task, paired with these documents. A task "
    "regressed when it is worse with an adjusted p of at most 'alpha' (exact McNemar for 0/1 "
    "metrics, Benjamini-Hochberg over all tasks and arms), its interval leaves out zero, and the "
    "loss is larger than its 'spread': the largest change of the score among the repetitions under "
    "'variations', which change nothing but rounding.",
)


class _Record(BaseModel):
    model_config = _STRICT


class StoredAnswer(_Record):
    """What one arm made of one document, under one of the task's filters."""

    scores: tuple[float | None, ...] = ()
    """Log-likelihood of each request in nats, to six decimals; None: not finite. Empty for text."""
    prediction: int | str | None = None
    """Index of the most likely choice, or the generated text's hash."""
    metrics: dict[str, Value] = Field(default_factory=dict)
    """As the task reports them; a pair is (log-likelihood, words or bytes)."""
    sinks: int | None = None
    """Sinks in all selected heads over the document's prompts; None without calibration."""
    moved: float | None = None
    """Attention mass moved off them, summed over heads and rows."""
    near: bool = False
    """Whether rounding could decide about some column (invariant I3 promises nothing then)."""


class StoredDocument(_Record):
    """One document under one filter, in all arms."""

    id: int
    filter: str
    doc: str
    """Hash of the row; likewise, of the prompt, of everything sent, of the right answer."""
    prompt: str
    requests: str
    target: str
    label: int | None = None
    """Index of the right choice of a multiple-choice document."""
    choices: str | None = None
    """Hash of the choices' texts."""
    shared: dict[str, str] = Field(default_factory=dict)
    """Hash of the passage, context or subject that documents may share."""
    arms: dict[str, StoredAnswer]

    @property
    def key(self) -> tuple[int, str]:
        """What pairs a document with the baseline's."""
        return self.id, self.filter


class TaskRecord(_Record):
    """One task in all arms."""

    version: str
    num_fewshot: int | None = None
    higher_is_better: dict[str, bool] = Field(default_factory=dict)
    scores: dict[str, dict[str, float]]
    """Arm to ``metric,filter`` to score, as reported."""
    documents: tuple[StoredDocument, ...]


class ArmInfo(_Record):
    """One arm: the head set, content and all."""

    artifact: str | None = None
    sha256: str | None = None
    """Of what decides scores: calibration, heads, strengths."""
    calibration: dict[str, Any] | None = None
    heads: dict[str, list[int]] | None = None
    strengths: dict[str, Any] | None = None
    engine: str | None = None


class StoredMeasurement(_Record):
    """What one run of a suite gave."""

    model: ModelFacts
    arms: dict[str, ArmInfo]
    tasks: dict[str, TaskRecord]


class Spread(_Record):
    """How much one arm of one task changed among repetitions that should change nothing."""

    drift: float
    """Largest change of a log-likelihood in nats, documents near the threshold left out."""
    flips: int
    """Largest number of documents with another prediction or metric."""
    spread: dict[str, float]
    """``metric,filter`` to the largest change of the score."""


class Baseline(_Record):
    """A stored run with everything it is held against."""

    schema_: Literal["act-harness/baseline/1"] = Field(
        default="act-harness/baseline/1", alias="schema"
    )
    about: tuple[str, ...] = ABOUT
    suite: str
    identity: dict[str, Any]
    """The settings that decide the scores, see :meth:`.suite.Suite.identity`."""
    reason: str = Field(min_length=1)
    """Why it was made."""
    provenance: dict[str, Any]
    """Date, commit, versions, machine."""
    drift: float = Field(gt=0)
    alpha: float = Field(gt=0, lt=1)
    variations: tuple[str, ...]
    """The repetitions, in words."""
    spread: dict[str, dict[str, Spread]]
    """Task to arm to what was measured among the repetitions."""
    measurement: StoredMeasurement


def load_baseline(folder: Path, *, suite: str) -> Baseline:
    """Read a suite's baseline.

    Raises:
        InfrastructureError: There is none, or it cannot be read.
        ResultError: It is malformed.
    """
    path = folder / FILE
    if not path.exists():
        raise InfrastructureError(
            f"suite {suite!r} has no baseline at {path}, so there is nothing to hold a run "
            f"against; make one with: act-harness regress --suite {shlex.quote(str(folder))} "
            "--update --reason TEXT"
        )
    content = reading.read_json(path, advice="restore it from version control")
    try:
        return reading.validated(Baseline, content)
    except ValidationError as error:
        raise ResultError(f"baseline {path}: {validation_line(error)}") from None


def save_baseline(baseline: Baseline, folder: Path) -> Path:
    """Write a baseline whole or not at all.

    Raises:
        InfrastructureError: It cannot be written; the old one is untouched.
    """
    content = baseline.model_dump(mode="json", by_alias=True)
    tasks = content["measurement"]["tasks"]
    lines: dict[str, list[str]] = {}
    for task, record in tasks.items():
        # One document a line: readable as a difference between two revisions.
        mark = f"@{task}@"
        lines[json.dumps(mark, ensure_ascii=False)] = [
            json.dumps(_compact(one), separators=(",", ":")) for one in record["documents"]
        ]
        record["documents"] = mark
    text = json.dumps(content, indent=1, ensure_ascii=False)
    for mark, documents in lines.items():
        text = text.replace(mark, "[\n" + ",\n".join(documents) + "\n]", 1)
    return atomic.write_text(folder / FILE, text + "\n")


def _compact(document: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is absent; a count or an index of zero stays."""
    kept = {key: value for key, value in document.items() if value is not None and value != {}}
    kept["arms"] = {
        arm: {
            key: value
            for key, value in answer.items()
            if value is not None and value is not False and value not in ([], {})
        }
        for arm, answer in document["arms"].items()
    }
    return kept
