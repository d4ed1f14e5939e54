"""Which judgments a run needs, which of them it has, and what the rest will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from act_harness.errors import RecipeError
from act_harness.mtbench.judge.answers import Arm
from act_harness.mtbench.judge.ledger import Judgments, judgment_key
from act_harness.mtbench.judge.prompts import (
    REFERENCE_CATEGORIES,
    PromptSet,
    References,
    missing_references,
    references_of,
)
from act_harness.mtbench.judge.settings import JudgeSettings

__all__ = ["CostEstimate", "Place", "Request", "estimate", "plan"]

_LETTERS_PER_TOKEN = 4.0
"""Of English text; OpenAI's own rule of thumb for its tokenisers."""
_TOKENS_PER_MESSAGE = 8
_TYPICAL_VERDICT = 250
"""Tokens of a verdict with a short explanation."""


@dataclass(frozen=True)
class Place:
    """Where a judgment belongs: one answer of one arm, judged for the ``repeat``-th time."""

    arm: str
    question: str
    category: str
    turn: int
    repeat: int


@dataclass(frozen=True)
class Request:
    """One judgment to be had; several places share it if their answers are equal."""

    key: str
    messages: list[dict[str, str]]
    prompt: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class CostEstimate:
    """What is about to be spent, before retries."""

    judgments: int
    """Judgments needed in all, by arm, question, turn and repeat."""
    known: int
    """Of them, those that need no call: kept from earlier, or equal to another."""
    calls: int
    input_tokens: int
    output_tokens: int
    """Expected; the limit is ``calls * max_tokens``."""
    output_limit: int | None
    cost: float | None
    """In the currency of the prices; None without prices."""

    def text(self) -> str:
        """Return the estimate as lines for people."""
        lines = [
            f"{self.judgments} judgments, {self.known} of them known or shared: "
            f"{self.calls} calls before retries",
            f"about {self.input_tokens:,} tokens in and {self.output_tokens:,} tokens out"
            + (f" (at most {self.output_limit:,})" if self.output_limit is not None else ""),
        ]
        if self.cost is not None:
            lines.append(f"about {self.cost:.2f} at the prices given")
        return "\n".join(lines)


def plan(
    arms: Sequence[Arm],
    settings: JudgeSettings,
    *,
    prompts: PromptSet,
    references: References | None,
) -> list[Request]:
    """Return every request of a run, in the order of questions, turns and repeats.

    Raises:
        RecipeError: a reference-guided question has no reference, or the prompts lack a case.
    """
    missing = missing_references(arms, references)
    if missing and not settings.allow_missing_references:
        names = ", ".join(f"{question} (turn {turn})" for question, turn in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise RecipeError(
            f"no reference answer for question {names}{more}; give --references with a file in "
            "FastChat's format, or --allow-missing-references to judge them without"
        )
    judge = settings.judge_identity()
    found: dict[str, Request] = {}
    for arm in arms:
        for talk in arm.talks:
            known = references_of(talk.question, references)
            guided = talk.question.category in REFERENCE_CATEGORIES
            for turn in range(1, len(talk.question.turns) + 1):
                shown = guided and len(known) >= turn and all(known[:turn])
                prompt = prompts.of(turn, shown)
                messages = prompt.messages(
                    talk.question.turns[:turn],
                    [talk.answers[:turn]],
                    known if shown else (),
                )
                for repeat in range(settings.rejudge):
                    key = judgment_key(messages, judge, repeat)
                    place = Place(arm.label, talk.question.id, talk.question.category, turn, repeat)
                    places = found[key].places if key in found else ()
                    found[key] = Request(key, messages, prompt.name, (*places, place))
    return list(found.values())


def estimate(requests: Sequence[Request], kept: Judgments, settings: JudgeSettings) -> CostEstimate:
    """Count what is still to be asked for."""
    waiting = [request for request in requests if not kept.rated(request.key)]
    letters = sum(len(m["content"]) for request in waiting for m in request.messages)
    messages = sum(len(request.messages) for request in waiting)
    tokens_in = round(letters / _LETTERS_PER_TOKEN) + _TOKENS_PER_MESSAGE * messages
    typical = min(_TYPICAL_VERDICT, settings.max_tokens or _TYPICAL_VERDICT)
    tokens_out = typical * len(waiting)
    cost = None
    if settings.price_input is not None or settings.price_output is not None:
        cost = tokens_in * (settings.price_input or 0.0) + tokens_out * (
            settings.price_output or 0.0
        )
        cost /= 1e6
    judgments = sum(len(request.places) for request in requests)
    return CostEstimate(
        judgments=judgments,
        known=judgments - len(waiting),
        calls=len(waiting),
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        output_limit=settings.max_tokens and settings.max_tokens * len(waiting),
        cost=cost,
    )
