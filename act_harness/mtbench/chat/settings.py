"""How answers of a conversation are drawn: the task's ``generation_kwargs``, checked.

The defaults are those of MT-Bench's own generation script (FastChat,
``fastchat/llm_judge/common.py`` and ``gen_model_answer.py``): a temperature per category, 1024 new
tokens, and transformers' default of the 50 most probable tokens. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from act_harness.errors import TaskError, suggestion

__all__ = ["TEMPERATURES", "ChatSettings"]

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Sampling temperature of the categories that are sampled; all others are decoded greedily."""

_ALIASES = {"max_new_tokens": "max_gen_toks", "max_tokens": "max_gen_toks"}


class ChatSettings(BaseModel):
    """Settings of one run; the same for every question, but for the category's temperature."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_gen_toks: int = Field(default=1024, gt=0)
    """Most new tokens of a turn."""
    greedy: bool = False
    """Decode every category greedily."""
    temperatures: dict[str, float] = Field(default_factory=lambda: dict(TEMPERATURES))
    """Temperature by category; 0, or a category that is not named, means greedy."""
    temperature: float | None = Field(default=None, ge=0)
    """One temperature for every category; None: by category."""
    top_k: int = Field(default=50, ge=0)
    """Sample among so many of the most probable tokens; 0: among all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the most probable tokens that hold this share of the probability."""
    until: tuple[str, ...] = ()
    """Texts that end an answer, beside the model's own end tokens."""
    seed: int | None = None
    """Seed of all sampling; None: lm-eval's ``--seed`` for torch."""

    @classmethod
    def parse(cls, generation: Mapping[str, Any] | None) -> ChatSettings:
        """Read a task's ``generation_kwargs`` with what ``--gen_kwargs`` put over them.

        Accepted besides the fields: ``max_new_tokens`` and ``max_tokens`` for ``max_gen_toks``,
        ``do_sample=False`` for ``greedy`` (``do_sample=True`` changes nothing), and one text
        for ``until``. Of several names for the length the one that is not the task's own wins.

        Raises:
            TaskError: a setting is unknown or out of range.
        """
        given = dict(generation or {})
        for alias, name in _ALIASES.items():
            if alias in given:
                given[name] = given.pop(alias)
        if given.pop("do_sample", None) is False:
            given["greedy"] = True
        if isinstance(given.get("until"), str):
            given["until"] = [given["until"]]
        unknown = sorted(set(given) - set(cls.model_fields))
        if unknown:
            raise TaskError(
                f"gen_kwargs {unknown[0]!r} is unknown to mt_bench, expected one of "
                f"{', '.join(sorted(cls.model_fields))}{suggestion(unknown[0], cls.model_fields)}"
            )
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise TaskError(
                f"gen_kwargs {place}={first['input']!r} cannot be used: {first['msg']}"
            ) from error

    def temperature_of(self, category: str) -> float:
        """Return the temperature for a category; 0.0 means greedy."""
        if self.greedy:
            return 0.0
        if self.temperature is not None:
            return self.temperature
        return self.temperatures.get(category, 0.0)
