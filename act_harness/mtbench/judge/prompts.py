"""Judge prompts and reference answers: our own, the dataset's, and files in FastChat's format.

A prompt is chosen by two questions: which turn is judged, and is there a reference answer.
FastChat's file (``fastchat/llm_judge/data/judge_prompts.jsonl``) holds eight: single-answer grading
and pairwise comparison, each for turn 1 and for turn 2, each plain and with references. All eight
can be filled in here; ``act-harness judge`` grades single answers.

Templates are filled in one pass, so a brace or a placeholder inside an answer stays what it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from act_harness.errors import RecipeError, unknown_name
from act_harness.mtbench.judge.answers import Arm, Question
from act_harness.support import reading

__all__ = [
    "REFERENCE_CATEGORIES",
    "JudgePrompt",
    "PromptSet",
    "References",
    "load_prompts",
    "load_references",
    "missing_references",
    "own_prompts",
    "references_of",
]

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
"""Judged against a reference answer, as in the original (``NEED_REF_CATS``)."""

Kind = Literal["single", "pairwise"]
References = Mapping[str, Sequence[str]]

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_KEYS = ("name", "type", "system_prompt", "prompt_template", "output_format")
_OUTPUTS = {"single": "[[rating]]", "pairwise": "[[A]]"}

_ASKED: dict[tuple[Kind, int], tuple[str, ...]] = {
    ("single", 1): ("question", "answer"),
    ("single", 2): ("question_1", "answer_1", "question_2", "answer_2"),
    ("pairwise", 1): ("question", "answer_a", "answer_b"),
    ("pairwise", 2): (
        "question_1",
        "question_2",
        "answer_a_1",
        "answer_a_2",
        "answer_b_1",
        "answer_b_2",
    ),
}
"""Placeholders that a prompt of each kind has to have."""


@dataclass(frozen=True)
class JudgePrompt:
    """One template."""

    name: str
    kind: Kind
    turn: int
    references: bool
    """Whether it shows reference answers."""
    system: str
    template: str

    def messages(
        self,
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        references: Sequence[str] = (),
    ) -> list[dict[str, str]]:
        """Fill the template in.

        Args:
            questions: the user's turns.
            answers: the turns of one assistant, or of two for a pairwise prompt.
            references: reference answers by turn.

        Returns:
            Messages of a chat completion: the system's, if there is one, and the user's.
        """
        values: dict[str, str] = {"question": questions[0]}
        for number, text in enumerate(questions, start=1):
            values[f"question_{number}"] = text
        for number, text in enumerate(references, start=1):
            values[f"ref_answer_{number}"] = text
        if self.kind == "single":
            values["answer"] = answers[0][0]
            for number, text in enumerate(answers[0], start=1):
                values[f"answer_{number}"] = text
        else:
            for letter, turns in zip("ab", answers, strict=True):
                values[f"answer_{letter}"] = turns[0]
                for number, text in enumerate(turns, start=1):
                    values[f"answer_{letter}_{number}"] = text
        user = _PLACEHOLDER.sub(lambda match: values[match[1]], self.template)
        system = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return [*system, {"role": "user", "content": user}]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file, by kind, turn and use of references."""

    source: str
    prompts: Mapping[tuple[Kind, int, bool], JudgePrompt]

    def of(self, turn: int, references: bool, kind: Kind = "single") -> JudgePrompt:
        """Return the prompt for a turn.

        Raises:
            RecipeError: the file has none.
        """
        found = self.prompts.get((kind, turn, references))
        if found is None:
            with_them = "with reference answers" if references else "without reference answers"
            raise RecipeError(
                f"{self.source} has no prompt of type {kind!r} for turn {turn} {with_them}; add "
                "one, or leave --judge-prompts out"
            )
        return found


# -- our own wording -------------------------------------------------------------------------------

_ROLE = (
    "You grade answers of a chat assistant. You are strict, fair, and you judge the answer that is "
    "there, not its length, its tone or who wrote it."
)
_SCALE = (
    "First say in a few sentences what is good and what is wrong. Then finish with one line that "
    "holds your grade, a number from 1 (useless) to 10 (could not be better), in double square "
    "brackets and nothing else in brackets, like this: Grade: [[4]]"
)
_GENERAL = (
    "Judge how well the answer does what the user asked: is it correct, does it help, does it say "
    "enough and nothing beside the point, is it well made where invention was asked for."
)
_CHECKED = (
    "Judge whether the answer is right. A correct solution is given for comparison: go through the "
    "answer step by step, hold its result against the correct one, and name every mistake. Another "
    "way to the same result is as good."
)
_TALK = (
    "Below is a conversation of two turns. Grade only the assistant's second answer; the first "
    "exchange is there so that you understand it."
)


def _section(title: str, placeholder: str) -> str:
    return f"<{title}>\n{{{placeholder}}}\n</{title}>"


def own_prompts() -> PromptSet:
    """Return the four prompts for single answers in this package's own wording."""
    first = (_section("user-question", "question"),)
    first_reference = (_section("correct-solution", "ref_answer_1"),)
    second = (_section("user-turn-1", "question_1"), _section("assistant-turn-1", "answer_1"),
              _section("user-turn-2", "question_2"))  # fmt: skip
    second_references = (_section("correct-solution-turn-1", "ref_answer_1"),
                         _section("correct-solution-turn-2", "ref_answer_2"))  # fmt: skip
    bodies = {
        (1, False): (_GENERAL, _SCALE, *first, _section("assistant-answer", "answer")),
        (1, True): (
            _CHECKED, _SCALE, *first, *first_reference, _section("assistant-answer", "answer"),
        ),
        (2, False): (_TALK, _GENERAL, _SCALE, *second, _section("assistant-turn-2", "answer_2")),
        (2, True): (
            _TALK, _CHECKED, _SCALE, *second, *second_references,
            _section("assistant-turn-2", "answer_2"),
        ),
    }  # fmt: skip
    prompts: dict[tuple[Kind, int, bool], JudgePrompt] = {}
    for (turn, references), parts in bodies.items():
        name = f"act-harness-1-turn-{turn}{'-reference' if references else ''}"
        text = "\n\n".join(parts)
        prompts["single", turn, references] = JudgePrompt(
            name, "single", turn, references, _ROLE, text
        )
    return PromptSet("the built-in prompts", prompts)


# -- FastChat's format -----------------------------------------------------------------------------


def load_prompts(path: Path | None) -> PromptSet:
    """Return the prompts of a file in FastChat's format; our own for None.

    Raises:
        RecipeError: the file cannot be read, or a prompt is not of a known kind.
    """
    if path is None:
        return own_prompts()
    records = reading.read_lines(
        path, half_line="keep", error=RecipeError, advice="check --judge-prompts", lenient=False
    )
    prompts: dict[tuple[Kind, int, bool], JudgePrompt] = {}
    for number, record in enumerate(records, start=1):
        prompt = _parse(record, f"{path}: prompt {number}")
        place = (prompt.kind, prompt.turn, prompt.references)
        if place in prompts:
            raise RecipeError(
                f"{path}: {prompts[place].name!r} and {prompt.name!r} are for the same case; "
                "remove one of them"
            )
        prompts[place] = prompt
    if not prompts:
        raise RecipeError(f"{path} holds no judge prompt, expected FastChat's judge_prompts.jsonl")
    return PromptSet(str(path), prompts)


def _parse(given: Any, where: str) -> JudgePrompt:  # noqa: ANN401 - any JSON value
    if not isinstance(given, dict) or not all(isinstance(given.get(key), str) for key in _KEYS):
        raise RecipeError(f"{where} is no judge prompt, expected the texts {', '.join(_KEYS)}")
    kind = given["type"]
    if kind not in _OUTPUTS or given["output_format"] != _OUTPUTS[kind]:
        raise RecipeError(
            f"{where}: type {kind!r} with output_format {given['output_format']!r} is unknown, "
            "expected single with [[rating]] or pairwise with [[A]]"
        )
    found = set(_PLACEHOLDER.findall(given["prompt_template"]))
    turn = 2 if "question_2" in found else 1
    known = {*_ASKED[kind, turn], "ref_answer_1", "ref_answer_2"}
    unknown = sorted(found - known)
    if unknown:
        raise RecipeError(
            unknown_name(f"{where}: placeholder {{{unknown[0]}}}", unknown[0], known, listed=False)
        )
    # Turn 1's exchange may be left out of a prompt for turn 2; what is judged may not.
    needed = {1: _ASKED[kind, 1], 2: [n for n in _ASKED[kind, 2] if n.endswith("_2")]}[turn]
    lacking = [name for name in needed if name not in found]
    if lacking:
        raise RecipeError(f"{where}: the prompt_template lacks {{{lacking[0]}}}")
    references = any(name.startswith("ref_answer") for name in found)
    return JudgePrompt(
        given["name"], kind, turn, references, given["system_prompt"], given["prompt_template"]
    )


# -- reference answers -----------------------------------------------------------------------------


def load_references(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the reference answers of a file, question id to texts by turn.

    Args:
        path: JSON lines with ``question_id`` and ``choices[0].turns``, as FastChat's
            ``reference_answer/<model>.jsonl``.

    Raises:
        RecipeError: the file has another form.
    """
    found: dict[str, tuple[str, ...]] = {}
    advice = "check --references"
    records = reading.read_lines(
        path, half_line="keep", error=RecipeError, advice=advice, lenient=False
    )
    for number, record in enumerate(records, start=1):
        try:
            turns = record["choices"][0]["turns"]
            found[str(record["question_id"])] = tuple(str(text) for text in turns)
        except (TypeError, KeyError, IndexError):
            raise RecipeError(
                f"{path}: entry {number} is no reference answer, expected question_id and "
                "choices[0].turns"
            ) from None
    return found


def references_of(question: Question, given: References | None) -> tuple[str, ...]:
    """Return a question's references by turn, without empty ones at the end."""
    found = question.references if given is None else given.get(question.id, ())
    kept = [text.strip() for text in found]
    while kept and not kept[-1]:
        kept.pop()
    return tuple(kept)


def missing_references(arms: Sequence[Arm], given: References | None) -> list[tuple[str, int]]:
    """Return (question id, turn) of reference-guided questions that lack a reference."""
    missing: dict[tuple[str, int], None] = {}
    for arm in arms:
        for talk in arm.talks:
            if talk.question.category in REFERENCE_CATEGORIES:
                known = references_of(talk.question, given)
                for turn in range(1, len(talk.question.turns) + 1):
                    if len(known) < turn or not known[turn - 1]:
                        missing[talk.question.id, turn] = None
    return sorted(missing)
