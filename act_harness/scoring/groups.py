"""Requests of a scorer, grouped by the context they share, and what a batch of groups amounts to.

Pure bookkeeping: no torch here. Which route a group takes is decided by
:mod:`act_harness.scoring.scorer`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from act_harness.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "Group",
    "Item",
    "Load",
    "Route",
    "Score",
    "Tokens",
    "group_items",
    "layout_of",
    "request_tokens",
]

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One request: tokens given and tokens to score.

    Raises:
        InputError: the context has no token, so that nothing would say what the answer follows, or
            ``prompt`` is not within it.
    """

    context: Tokens
    """At least one token: what the first token of ``answer`` is conditioned on."""
    answer: Tokens
    prompt: int | None = None
    """How many tokens of the context are prompt; all (None), or 0 for a rolling window."""

    def __post_init__(self) -> None:
        if not self.context:
            raise InputError(
                "a request's context has no token, expected at least one; put the model's prefix "
                "token (BOS or EOS) before the answer, as lm-eval does with an empty context"
            )
        if self.prompt is not None and not 0 <= self.prompt <= len(self.context):
            raise InputError(
                f"prompt={self.prompt} of a request with {len(self.context)} context tokens, "
                f"expected 0 to {len(self.context)}"
            )


class Score(NamedTuple):
    """Log-likelihood in nats, and whether greedy decoding would have given the answer."""

    loglikelihood: float
    is_greedy: bool


class Route(Enum):
    """How the answers of a group are computed; in this order, one route after the other."""

    PACKED = "packed"
    """In one row of tokens with the context, and with other groups."""
    EXTENDED = "extended"
    """Over the cached context, in batches."""
    ALONE = "alone"
    """In the forward of the context, whose rows hold all that is asked for."""


@dataclass
class Group:
    """A context with its distinct answers and the requests that asked for each."""

    context: Tokens
    prompt: int
    answers: dict[Tokens, list[int]] = field(default_factory=dict)
    alone: Tokens = ()
    """The answer to compute in the same forward: the only one of more than one token."""
    extends: bool = False
    """Whether there are several longer answers to compute over the context."""
    route: Route = Route.ALONE

    def settle(self) -> None:
        """Say, once all answers are known, which are read from the context's own forward."""
        longer = [answer for answer in self.answers if len(answer) > 1]
        self.extends = len(longer) > 1
        self.alone = longer[0] if len(longer) == 1 else ()

    def apart(self) -> list[Group]:
        """Return a group for every answer, each with the context for itself."""
        alone = [Group(self.context, self.prompt, {a: n}) for a, n in self.answers.items()]
        for group in alone:
            group.settle()
        return alone

    @property
    def tokens(self) -> Tokens:
        """Input of the group's prefill."""
        return self.context + self.alone[:-1]

    @property
    def longer(self) -> list[Tokens]:
        """The answers to compute over the context."""
        return [answer for answer in self.answers if len(answer) > 1] if self.extends else []

    @property
    def packed_tokens(self) -> int:
        """Tokens of a forward that holds the context and all answers."""
        return len(self.tokens) + sum(len(answer) - 1 for answer in self.longer)

    @property
    def longest(self) -> int:
        """Tokens of the context and its longest answer: what its last row may see."""
        return len(self.context) + max(0, max(map(len, self.answers), default=0) - 1)

    @property
    def rows(self) -> range:
        """Positions of the prefill whose logits are read."""
        last = len(self.context) - 1
        return range(last, last + max(1, len(self.alone)))


class Load(NamedTuple):
    """What a packed forward of some groups, the longest context first, amounts to."""

    contexts: int
    longest: int
    """Tokens of the longest context: attention pads the others to it."""
    real: int
    """Tokens of all contexts."""
    tokens: int
    """Tokens of contexts and answers."""
    answers: int
    longest_answer: int

    @classmethod
    def of(cls, group: Group) -> Load:
        """Return the load of one group."""
        longer, own = group.longer, len(group.tokens)
        return cls(1, own, own, group.packed_tokens, len(longer), max(map(len, longer), default=0))

    def with_group(self, group: Group) -> Load:
        """Return the load of these groups and one more, whose context is no longer."""
        one = Load.of(group)
        return Load(
            self.contexts + 1,
            self.longest,
            self.real + one.real,
            self.tokens + one.tokens,
            self.answers + one.answers,
            max(self.longest_answer, one.longest_answer),
        )

    def fits(self, limit: float) -> bool:
        """Whether it is within ``limit`` tokens, and what attention adds stays in proportion.

        Attention pads contexts to the longest and repeats keys for answers, which costs memory
        (and, by the square, time) in its own layer only: four times the tokens are allowed, and at
        most as many pads as tokens.
        """
        padded = self.contexts * self.longest
        repeated = self.answers * (self.longest + self.longest_answer)
        return (
            self.tokens <= limit
            and padded + repeated <= 4 * limit
            and padded <= 2 * self.real + 1024
        )


def request_tokens(item: Item) -> int:
    """Return how many tokens a forward of the request alone has."""
    return len(item.context) + max(0, len(item.answer) - 1)


def group_items(items: Mapping[int, Item], *, share: bool) -> list[Group]:
    """Group numbered requests by context.

    The windows of a rolling log-likelihood have a token of context or none to share.

    Args:
        items: requests by number.
        share: whether requests of one context are a group; otherwise each is one.
    """
    groups: dict[Any, Group] = {}
    for number, item in items.items():
        prompt = len(item.context) if item.prompt is None else item.prompt
        key: Any = (item.context, prompt) if share and prompt else number
        group = groups.setdefault(key, Group(item.context, prompt))
        group.answers.setdefault(item.answer, []).append(number)
    for group in groups.values():
        group.settle()
    return list(groups.values())


def layout_of(batch: Sequence[Group]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the lengths of a packed batch's contexts, and (context, tokens) of its answers."""
    answers = [(b, len(a) - 1) for b, group in enumerate(batch) for a in group.longer]
    return [len(group.tokens) for group in batch], answers
