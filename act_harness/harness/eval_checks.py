"""What an evaluation's tasks, model and head set rule out, or make doubtful, before it runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from act_harness.errors import InputError, TaskError, UnsupportedCallError, suggestion
from act_harness.harness.task_lookup import single_tasks

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.harness.eval_settings import EvalSettings
    from act_harness.model import CalibratedHFLM

__all__ = [
    "check_generation",
    "check_samples",
    "check_template",
    "leave_out_idle",
    "searched_documents",
    "warn_of_other_prompts",
]


def warn_of_other_prompts(artifact: Artifact | None, settings: EvalSettings) -> None:
    """Say so where prompts differ from those the heads were found on: sinks sit on both."""
    recipe = ((artifact.search if artifact else None) or {}).get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    for name, given in (
        ("num_fewshot", settings.num_fewshot or 0),
        ("apply_chat_template", settings.apply_chat_template),
        ("system_instruction", settings.system_instruction),
    ):
        if name in recipe and (recipe[name] or None) != (given or None):
            warnings.warn(
                f"artifact {artifact.name if artifact else None!r} was searched with "
                f"{name}={recipe[name]!r}, this evaluation uses {given!r}",
                stacklevel=2,
            )


def searched_documents(
    artifact: Artifact | None, tasks: Sequence[Any], settings: EvalSettings
) -> dict[str, int]:
    """Count, and say, where heads were found on documents of the very split that is scored."""
    from act_harness.search.splits import open_to_search

    splits = ((artifact.search if artifact else None) or {}).get("splits")
    if artifact is None or not artifact.head_count() or not isinstance(splits, dict):
        return {}
    total = 0
    for task in single_tasks(tasks):
        split = splits.get(task.task_name)
        numbers = (settings.samples or {}).get(task.task_name, range(_documents(task, settings)))
        rows = (task.eval_docs[number] for number in numbers)
        source = str(split.get("source")) if isinstance(split, dict) else ""
        if seen := open_to_search(rows, source):
            total += seen
            warnings.warn(
                f"{seen} of the {len(numbers)} documents of {task.task_name!r} are of the half "
                f"from which the search of {artifact.name!r} drew, as the task has no training "
                "split: a gain on them shows nothing; give the task a training_split and search "
                "again",
                stacklevel=2,
            )
    return {"documents_open_to_search": total} if total else {}


def check_samples(tasks: Sequence[Any], samples: Mapping[str, Sequence[int]] | None) -> None:
    """Refuse document numbers that a task does not have, before the model is loaded."""
    if samples is None:
        return
    for task in single_tasks(tasks):
        wanted, have = samples.get(task.task_name, ()), len(task.eval_docs)
        if wanted and max(wanted) >= have:
            raise TaskError(
                f"--samples asks for document {max(wanted)} of {task.task_name!r}, which has "
                f"{have}; expected numbers from 0 to {have - 1}"
            )


def leave_out_idle(lm: CalibratedHFLM, tasks: Sequence[Any], settings: EvalSettings) -> None:
    """Let no more processes take part than the smallest task has documents.

    lm-eval deals out each task's documents by itself and fails in a process that gets none.

    Raises:
        SystemExit: With status 0, on a process that is left out.
    """
    if lm.world_size == 1:
        return
    fewest = min((_documents(task, settings) for task in single_tasks(tasks)), default=1)
    if fewest >= lm.world_size:
        return
    taking_part = lm.processes.first(max(1, fewest))
    if taking_part is None:
        raise SystemExit(0)
    warnings.warn(
        f"a task has {fewest} documents, so {taking_part.count} of {lm.world_size} processes run",
        stacklevel=2,
    )
    lm.share_work(taking_part)


def _documents(task: Any, settings: EvalSettings) -> int:  # noqa: ANN401 - lm-eval's Task
    """Return how many documents of a task are asked for."""
    if settings.samples is not None and task.task_name in settings.samples:
        return len(settings.samples[task.task_name])
    there = len(task.eval_docs)
    if settings.limit is None:
        return there
    wanted = settings.limit if settings.limit >= 1 else math.ceil(there * settings.limit)
    return min(there, int(wanted))


def check_generation(
    lm: CalibratedHFLM, artifact: Artifact | None, tasks: Sequence[Any], changes: Mapping[str, Any]
) -> None:
    """Refuse settings of generation that the calibrated arm cannot take, before any is scored."""
    if artifact is None or not artifact.head_count():
        return
    for task in single_tasks(tasks):
        kind = getattr(task, "request_type", task.get_config("output_type"))
        if kind != "generate_until":  # a conversation's settings are its own, with their checks
            continue
        own = task.get_config("generation_kwargs") or {}
        try:
            lm.check_generation({**own, **changes})
        except UnsupportedCallError as error:
            raise UnsupportedCallError(f"task {task.task_name!r}: {error}") from None


def check_template(lm: CalibratedHFLM, settings: EvalSettings) -> None:
    """Refuse a chat template that there is not, and take the one that was named.

    lm-eval writes the named one into its results and renders prompts with the default one.
    """
    wanted, there = settings.apply_chat_template, lm.tokenizer.chat_template
    if not wanted:
        return
    if there is None:
        raise InputError(
            "the model's tokenizer has no chat template; leave out --apply-chat-template, or give "
            "--model_args tokenizer=DIR"
        )
    known = sorted(there) if isinstance(there, dict) else []
    if isinstance(wanted, str):
        if wanted not in known:
            found = suggestion(wanted, known) or f"; it has {', '.join(known) or 'one, unnamed'}"
            raise InputError(f"the model's tokenizer has no chat template {wanted!r}{found}")
        lm.chat_template_args = {**lm.chat_template_args, "chat_template": wanted}
    elif known and "default" not in known:
        raise InputError(
            f"the model's tokenizer has the chat templates {', '.join(known)}; name one of them "
            "behind --apply-chat-template"
        )
