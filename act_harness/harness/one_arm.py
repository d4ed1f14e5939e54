"""One arm of an evaluation: lm-eval's ``simple_evaluate`` on the loaded model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_harness.harness.calibrator_inputs import InputsOfArm, Labelled, Prompts
from act_harness.harness.task_lookup import TaskSelection, load_tasks, single_tasks
from act_harness.search.prompting import Prompting
from act_harness.support import provenance
from act_harness.support.failures import running

if TYPE_CHECKING:
    from act_harness.harness.eval_settings import EvalSettings
    from act_harness.model import CalibratedHFLM

__all__ = ["evaluate_arm"]


def _calibrator_inputs(
    lm: CalibratedHFLM, settings: EvalSettings, seed: int, labelled: Labelled
) -> InputsOfArm:
    prompting = Prompting(
        fewshot_seed=seed,
        apply_chat_template=bool(settings.apply_chat_template),
        fewshot_as_multiturn=settings.multiturn,
        system_instruction=settings.system_instruction,
    )
    template = lm.apply_chat_template if settings.apply_chat_template else None
    return InputsOfArm(lm, settings.calibrators, Prompts(prompting, template), labelled)


def evaluate_arm(
    lm: CalibratedHFLM,
    settings: EvalSettings,
    selection: TaskSelection,
    seed: int,
    tasks: list[Any] | None,
    labelled: Labelled,
    *,
    write_out: bool,
) -> dict[str, Any] | None:
    """Evaluate one arm; None on every process but the first."""
    import lm_eval

    built = tasks or load_tasks(selection)
    with (
        _setting("DISABLE_MULTIPROC", "1"),  # no process for every core, for a hundred draws
        # a model's processes ask all that follows together; lm-eval answers the first one alone
        _setting("LOCAL_RANK", "0") if lm.head_group.is_split else nullcontext(),
        _hashes_of_any_text(),
        _without_a_repository(),
        running("the evaluation"),
    ):
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=built,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            samples=None if settings.samples is None else dict(settings.samples),
            bootstrap_iters=_RESAMPLES,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.multiturn,
            system_instruction=settings.system_instruction,
            gen_kwargs=dict(settings.gen_kwargs) or None,
            log_samples=True,
            predict_only=settings.predict_only,
            write_out=write_out and lm.leads,
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            task_manager=selection.manager,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=seed,
        )
    if results is None:
        return None
    further = _calibrator_inputs(lm, settings, seed, labelled)
    results["calibrators"] = further.collect(single_tasks(built), results.get("samples", {}))
    results["act_harness"] = {"fewshot_seed": seed, "provenance": provenance.collect().to_json()}
    return dict(results)


_RESAMPLES = 100
"""lm-eval's bootstraps behind the standard errors of f1, mcc, perplexity and their like; its own
number for BLEU. 100,000 are its default and cost minutes. What is reported here rests on the paired
intervals of the comparison; standard errors of means have a formula and cost nothing."""


@contextmanager
def _setting(name: str, value: str) -> Iterator[None]:
    """Have a variable of the environment inside the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _hashes_of_any_text() -> Iterator[None]:
    """Let lm-eval hash a document with half a surrogate pair; it would lose the arm, all scored.

    Every other text keeps its hash, so that runs of lm-eval itself can be paired with these.
    """
    from lm_eval import evaluator

    before = evaluator.hash_string
    evaluator.hash_string = provenance.sha256_text
    try:
        yield
    finally:
        evaluator.hash_string = before


@contextmanager
def _without_a_repository() -> Iterator[None]:
    """Keep git from saying "fatal" where nothing failed: lm-eval asks it in any folder.

    Where there is no repository lm-eval's answer is None, with git's word for it on the terminal.
    """
    from lm_eval import evaluator

    before = evaluator.get_git_commit_hash
    here = Path.cwd()
    named = "GIT_DIR" in os.environ
    if not named and not any((folder / ".git").exists() for folder in (here, *here.parents)):
        evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = before
