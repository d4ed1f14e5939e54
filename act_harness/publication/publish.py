"""``act-harness publish``: a finished evaluation in the formats that others read.

A folder, or one commit to a model repository on the hub: records of Every Eval Ever, entries for
``.eval_results/``, the paired comparison, the report page where there is one, and a page that says
what is what. The results themselves are read and left as they are; what is written names no path of
this machine and no argument of the model, which may be a key. Everything is put together first, so
that nothing half is left.

Not here: the artifact (``act-harness artifact push``).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from act_harness.errors import InfrastructureError, InputError, ResultError
from act_harness.evidence.tables import markdown_cell, markdown_table
from act_harness.publication.eval_results import FOLDER, eval_result_entries
from act_harness.publication.evaluation import Arm, Evaluation, find_evaluation
from act_harness.publication.every_eval_ever import every_eval_ever_records
from act_harness.support import atomic, hub, reading

__all__ = ["Published", "publish"]

_REPORT = "report.html"
_ON_THE_HUB = "act-harness-results"
"""Folder of a repository; the rest of it, its README too, is left alone."""


@dataclass(frozen=True)
class Published:
    """Where the results are now."""

    where: str
    """The folder, or the address of the commit or pull request."""
    files: tuple[str, ...]
    """Paths in the folder or repository."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""

    def summary(self) -> str:
        """Return what is printed at the end."""
        lines = [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"published: {self.where} ({len(self.files)} files)"])


def publish(
    results: str | os.PathLike[str],
    to: str,
    *,
    model_id: str | None = None,
    organization: str | None = None,
    create_pr: bool = False,
) -> Published:
    """Publish a finished evaluation of ``act-harness eval``, or a result of lm-eval's own.

    Args:
        results: The output folder, an arm's folder or the comparison's; or a results file.
        to: A folder that is not there yet, or ``hub:OWNER/REPO``, a model repository.
        model_id: OWNER/NAME of the base model, where the results name a folder.
        organization: Who evaluated; on the hub the repository's owner by default.
        create_pr: Open a pull request instead of a commit to the main branch.

    Raises:
        InputError: A name is malformed, or the folder is there already.
        ResultError: Nothing to publish, more than one evaluation, or one that is not finished.
        InfrastructureError: The folder cannot be written, or the hub refuses or is not reached.
    """
    repository = _repository(to)
    if create_pr and repository is None:
        raise InputError("--create-pr is for the hub; give --to hub:OWNER/REPO")
    if model_id is not None:
        hub.check_repository(model_id)
    address = None
    if repository is None:
        _check_free(Path(to))
    else:
        address = f"{_reach_hub()}/{repository}"
    evaluation = find_evaluation(results, model_id=model_id)
    if organization is None and repository is not None:
        organization = repository.partition("/")[0]
    files, entries, notes = _contents(evaluation, organization, address)
    if repository is None:
        every = files | {
            f"{arm}/{name}": data for arm in entries for name, data in entries[arm].items()
        }
        _write_folder(Path(to), every)
        return Published(to, tuple(sorted(every)), notes)
    every = {f"{_ON_THE_HUB}/{evaluation.stamp}/{name}": data for name, data in files.items()}
    own, said = _own_entries(evaluation, repository, entries)
    every |= own
    where = _commit(repository, every, create_pr=create_pr)
    return Published(where, tuple(sorted(every)), (*notes, *said))


Files = dict[str, bytes]


def _contents(
    evaluation: Evaluation, organization: str | None, address: str | None
) -> tuple[Files, dict[str, Files], tuple[str, ...]]:
    """Return the files that both targets get, the entries by arm, and what was left out."""
    notes = list(evaluation.notes)
    records = every_eval_ever_records(
        evaluation, organization=organization, created=int(time.time())
    )
    if not records:
        raise ResultError(
            f"{evaluation.arms[0].run.label}: no score is a number with a known direction; there "
            "is nothing to publish"
        )
    files = {f"every_eval_ever/{path}": _json(record) for path, record in records.items()}
    entries: dict[str, Files] = {}
    for arm in dict.fromkeys(one.name for one in evaluation.arms):
        found, said = eval_result_entries(evaluation.of(arm), source=address)
        entries[arm] = {name: _yaml(content) for name, content in found.items()}
        notes += [note for note in said if note not in notes]
    for seed, comparison in evaluation.comparisons.items():
        place = "" if seed is None else f"seed-{seed}/"
        files[f"{place}comparison.json"] = _json(comparison.to_json())
        files[f"{place}comparison.md"] = comparison.to_markdown().encode()
    notes += _skipped(evaluation)
    if not evaluation.comparisons:
        notes.append("one arm alone: no paired difference")
    report = _report(evaluation)
    here = str(evaluation.folder.resolve()).encode()
    if any(here in content for content in report.values()):
        report = {}
        notes.append(
            "no report: its page names folders of this machine; make it from a path relative to "
            "where you are"
        )
    files |= report
    files["README.md"] = _page(evaluation, entries, report).encode()
    return files, entries, tuple(notes)


def _own_entries(
    evaluation: Evaluation, repository: str, entries: Mapping[str, Files]
) -> tuple[Files, tuple[str, ...]]:
    """Return the entries of the arm whose repository it is: no other's may stand in it."""
    base = evaluation.arms[0].base_model
    arm = "baseline" if repository.casefold() == base.casefold() else "act"
    if arm in entries:
        return entries[arm], ()
    return {}, (f"no {FOLDER}: {repository} is not the repository of {base}, which was evaluated",)


def _report(evaluation: Evaluation) -> Files:
    """Return the page of ``act-harness report`` with its figures, where it lies with the results.

    It is taken as it is: whoever made it has seen it.
    """
    own = [p for p in evaluation.folder.glob("*__*") if p.name.endswith(f"__{evaluation.stamp}")]
    folders = [p / below for p in (*sorted(own), evaluation.folder) for below in ("", "report")]
    place = next((p for p in folders if reading.is_file(p / _REPORT)), None)
    if place is None:
        return {}
    figures = sorted(p for p in (place / "figures").glob("*") if reading.is_file(p))
    found = {_REPORT: place / _REPORT} | {f"figures/{p.name}": p for p in figures}
    try:
        return {f"report/{name}": path.read_bytes() for name, path in found.items()}
    except OSError as error:
        raise InfrastructureError(f"cannot read {place}: {error.strerror}; check it") from error


def _page(evaluation: Evaluation, entries: Mapping[str, Files], report: Files) -> str:
    """Return the page that says what was evaluated and what the files are for."""
    arms = {arm.name: arm for arm in reversed(evaluation.arms)}
    digests = [str(arm.record["artifact_sha256"]) for arm in arms.values() if arm.calibrated]
    rows = [(name, arms[name].model_id, _described(arms[name])) for name in sorted(arms)[::-1]]
    parts = [
        f"# Results on {markdown_cell(evaluation.arms[0].base_model)}",
        markdown_table(("arm", "model", "attention"), rows).rstrip(),
        *(f"Artifact: sha256 `{digest}`." for digest in dict.fromkeys(digests)),
    ]
    searched = [arm.noted("act_harness", "documents_open_to_search") for arm in arms.values()]
    parts += [
        f"{number} of the documents scored are of the splits that the heads were found on: what is "
        "gained on them shows nothing."
        for number in searched
        if isinstance(number, int) and number > 0
    ]
    parts += [f"{said[0].upper()}{said[1:]}." for said in _skipped(evaluation)]
    for seed, comparison in evaluation.comparisons.items():
        heading = (
            "Paired comparison" if seed is None else f"Paired comparison, few-shot seed {seed}"
        )
        parts += [f"## {heading}", comparison.to_markdown(headline_only=True).rstrip()]
    items = [
        "`every_eval_ever/data/`: records of Every Eval Ever, schema 0.2.2; its validator takes "
        "the files by their absolute paths.",
    ]
    if any(entries.values()):
        items.append(
            f"`{FOLDER}/`: entries for the model repository on the hub whose arm it is; they count "
            "on a leaderboard where the dataset is a registered benchmark."
        )
    if evaluation.comparisons:
        items.append("`comparison.json`, `comparison.md`: every metric, paired by document.")
    if report:
        items.append(f"`report/{_REPORT}`: the report.")
    tracked = [arm.tracked_at for arm in evaluation.arms if arm.tracked_at]
    items += [f"W&B run: {url}" for url in dict.fromkeys(tracked)]
    parts += ["## Files", "\n".join(f"- {item}" for item in items)]
    return "\n\n".join(parts) + "\n"


def _skipped(evaluation: Evaluation) -> list[str]:
    """Say of which arms the scores count documents that were not scored."""
    counts: dict[str, int] = {}
    for arm in evaluation.arms:
        counts[arm.name] = counts.get(arm.name, 0) + arm.skipped
    return [
        f"of arm {name} {count} requests were too long to be scored: its scores count their "
        "documents, the paired comparison leaves them out"
        for name, count in counts.items()
        if count
    ]


def _described(arm: Arm) -> str:
    if not arm.calibrated:
        return "as trained"
    return f"{arm.record.get('heads')} heads calibrated, artifact {arm.record.get('artifact')}"


def _json(value: Any) -> bytes:  # noqa: ANN401 - what JSON can hold
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _yaml(value: list[dict[str, Any]]) -> bytes:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000)
    return text.encode()


# -- a folder --------------------------------------------------------------------------------------


def _check_free(target: Path) -> None:
    """Refuse a place where something is: two publications are never mixed."""
    if reading.is_file(target):
        raise InputError(f"--to {target}: a file is there; name a new folder")
    if reading.is_folder(target) and any(target.iterdir()):
        raise InputError(f"--to {target}: the folder is not empty; name a new one")


def _write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder with all files, or none."""
    final = target.resolve()
    temporary = final.with_name(f".{final.name[:60]}.{secrets.token_hex(4)}.tmp")
    try:
        for name, data in files.items():
            atomic.write_bytes(temporary / name, data)
        temporary.rename(final)  # over an empty folder too, never over a full one
    except OSError as error:
        raise atomic.cannot_write(target, error, "nothing was left") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -- the hub ---------------------------------------------------------------------------------------


def _repository(to: str) -> str | None:
    """Return OWNER/REPO of a target on the hub, None for a folder."""
    if not to.strip():
        raise InputError("--to is empty; name a new folder, or hub:OWNER/REPO")
    if not to.startswith(hub.PREFIX):
        return None
    name = to.removeprefix(hub.PREFIX)
    hub.check_repository(name)
    return name


def _reach_hub() -> str:
    """See that there is a hub and a token for it, before any work; return the hub's address.

    Raises:
        InputError: There is none.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise InfrastructureError("HF_HUB_OFFLINE is set; unset it, or publish into a folder")
    return str(hub.client().endpoint)


def _commit(repository: str, files: Mapping[str, bytes], *, create_pr: bool) -> str:
    """Put files into a model repository in one commit; return its address."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, data) for name, data in sorted(files.items())]
    with hub.asking(hub.HubFile(repository, FOLDER)):
        done = hub.client().create_commit(
            repository,
            operations,
            commit_message="Evaluation results of act-harness",
            create_pr=create_pr,
        )
    return str(done.pr_url or done.commit_url)
