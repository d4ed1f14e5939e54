"""How a prompt is built around a document, by lm-eval's own task object."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Prompting", "prompt_of", "without_itself"]


@dataclass(frozen=True)
class Prompting:
    """How prompts are built around a document, as lm-eval's options of the same names say it."""

    num_fewshot: int | None = None
    """Examples in the prompt; None: the task's own number, or none."""
    fewshot_seed: int = 1234
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None


def prompt_of(
    task: Any,  # noqa: ANN401 - lm-eval's Task
    doc: Any,  # noqa: ANN401 - a row of any dataset
    prompting: Prompting,
    chat_template: Callable[..., str] | None,
) -> Any:  # noqa: ANN401 - a text, or one for each choice
    """Return what lm-eval puts before the answers to a document."""
    return task.fewshot_context(
        doc,
        num_fewshot=int(task.get_config("num_fewshot") or 0),
        system_instruction=prompting.system_instruction,
        apply_chat_template=prompting.apply_chat_template,
        fewshot_as_multiturn=prompting.fewshot_as_multiturn,
        chat_template=chat_template,
        gen_prefix=task.doc_to_prefix(doc),
    )


@contextmanager
def without_itself(task: Any) -> Iterator[None]:  # noqa: ANN401 - lm-eval's Task
    """Keep a document out of its own few-shot examples.

    lm-eval leaves a document out only where the examples come from the test split, since it never
    scores another split's; the search does.
    """
    config, split = task.config, getattr(task.fewshot_cfg, "split", None)
    before = config.test_split
    if split is not None:
        config.test_split = split
    try:
        yield
    finally:
        config.test_split = before
