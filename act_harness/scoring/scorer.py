"""Log-likelihoods with every context computed once.

A multiple-choice question asks for the log-likelihood of several answers after one context. Here
requests are grouped by context and each distinct context is computed once. Answers of one token are
read from its last row; longer ones stand in the same forward, packed behind the contexts without
pads, or, where a model cannot be packed or a context has too many answers for one forward, extend
its cache in batches. Because calibration never looks at a continuation this is exact, not an
approximation (semantics, "Phases"): the plain path, one forward for each request, gives the same
numbers and is kept as ``share=False`` for tests and benchmarks. Log-softmax is taken in float32
whatever the model's dtype, and only of scored rows. A batch is started before the results of the
one before it are read, so that a device need not wait for the host.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from act_harness.attention.capabilities import capabilities_of
from act_harness.errors import InfrastructureError, InputError, InternalError
from act_harness.scoring.forwards import Forwards, Prefilled, Work
from act_harness.scoring.groups import (
    Group,
    Item,
    Load,
    Route,
    Score,
    Tokens,
    group_items,
    layout_of,
    request_tokens,
)
from act_harness.scoring.memory import answers_per_sequence, packed_tokens_per_token
from act_harness.scoring.tally import Given, Started
from act_harness.scoring.trials import extends, packs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

    from act_harness.attention import Attachment
    from act_harness.attention.counters import PromptRecord

__all__ = ["Item", "Score", "Scorer", "Work"]

_logger = logging.getLogger(__name__)

_ENOUGH_TOKENS = {"cpu": 128}
"""Tokens of a forward beyond which more of them cost in proportion; 2048 on other devices."""


_ROUTES = list(Route)


class Scorer:
    """Scores requests on one model, calibrated or not."""

    def __init__(
        self,
        model: PreTrainedModel,
        attachment: Attachment | None = None,
        *,
        batch_size: int | None = None,
        token_budget: int | None = None,
        pad_token: int = 0,
        softmax_dtype: torch.dtype | None = None,
        share: bool = True,
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Store the settings.

        Args:
            model: a causal language model.
            attachment: calibrated attention on ``model``, or None.
            batch_size: most contexts in a forward; None for no limit. Their answers join them as
                far as that takes no more memory than stock scoring at this batch size
                (:func:`act_harness.scoring.memory.packed_tokens_per_token`, and
                :func:`act_harness.scoring.memory.answers_per_sequence` over a cache).
            token_budget: most tokens in a forward; None for no limit. What attention pads and
                repeats inside a layer is bounded with it. Halved, with a retry, when memory runs
                out.
            pad_token: any valid token id.
            softmax_dtype: dtype of log-softmax; float32 when None.
            share: compute each context once; False is the plain path.
            forward_context: entered around every forward (autocast).

        Raises:
            InputError: ``batch_size`` or ``token_budget`` is below 1.
        """
        for name, most in (("batch_size", batch_size), ("token_budget", token_budget)):
            if most is not None and most < 1:
                raise InputError(f"{name}={most}, expected a number above 0, or None for no limit")
        self.forwards = Forwards(
            model,
            attachment,
            pad_token=pad_token,
            softmax_dtype=softmax_dtype,
            forward_context=forward_context,
        )
        self.batch_size = batch_size
        self._answers = (
            math.inf if batch_size is None else int(batch_size * answers_per_sequence(model))
        )
        self.token_budget = token_budget
        self.share = share
        self._most: float = math.inf
        """Most tokens of a packed forward that ``batch_size`` allows, for the requests at hand."""

    @property
    def work(self) -> Work:
        """What has been computed so far."""
        return self.forwards.work

    def score(
        self,
        items: Sequence[Item],
        *,
        progress: Callable[[int], object] | None = None,
        on_prompt: Callable[[Tokens, PromptRecord], object] | None = None,
    ) -> list[Score]:
        """Return the scores of ``items`` in their order.

        Args:
            items: contexts of at least one token; an empty answer scores 0.0 (probability 1).
            progress: called with the number of requests answered by each batch.
            on_prompt: called with prompt tokens and what calibration did to them.

        Raises:
            InfrastructureError: a single context does not fit in memory.
        """
        with self.forwards.arm():
            return self._score(items, progress, on_prompt)

    def _score(
        self,
        items: Sequence[Item],
        progress: Callable[[int], object] | None,
        on_prompt: Callable[[Tokens, PromptRecord], object] | None,
    ) -> list[Score]:
        results: list[Score | None] = [None] * len(items)
        if self.batch_size is not None and items:
            longest = max(len(item.context) + len(item.answer) for item in items)
            self._most = packed_tokens_per_token(self.forwards.model) * self.batch_size * longest
        limit = capabilities_of(self.forwards.model).rope_limit.value
        numbered = dict(enumerate(items))
        long = [n for n, item in numbered.items() if limit and request_tokens(item) > limit]
        apart = [{number: numbered.pop(number)} for number in long]
        groups = self._routed(group_items(numbered, share=self.share))
        given = Given(results, progress, on_prompt)
        for one in apart:
            alone = self._routed(group_items(one, share=self.share))
            self.forwards.forget_long_sequences()
            self._run(alone, given)
        if limit is not None:
            self.forwards.forget_long_sequences()
        groups.sort(key=lambda one: (_ROUTES.index(one.route), -len(one.tokens), one.tokens))
        packed = [group for group in groups if group.route is Route.PACKED]
        self.forwards.expect(map(layout_of, self._batches(packed)))
        before: Started | None = None
        for batch in self._batches(groups):
            started = self._started(batch)
            if before is not None:
                self._finish(before, given)
            before = started
            if started is None:
                self._run_halves(batch, given)
        if before is not None:
            self._finish(before, given)
        self._score_again(given)
        self.forwards.forget_graphs()
        found = [score for score in results if score is not None]
        if len(found) != len(items):
            raise InternalError("a request was not scored")
        return found

    # -- routes and batches ------------------------------------------------------------------

    def _routed(self, groups: Iterable[Group]) -> list[Group]:
        """Decide how groups are computed, within the limit of now.

        A group whose answers cannot be computed over one context comes apart.
        """
        routed = []
        for group in groups:
            if self._packs(group) and (not group.extends or Load.of(group).fits(self._limit)):
                group.route = Route.PACKED
            elif not group.extends:
                group.route = Route.ALONE
            elif self._extendable:
                group.route = Route.EXTENDED
            else:
                routed += self._routed(group.apart())
                continue
            routed.append(group)
        return routed

    def _packs(self, group: Group) -> bool:
        """Whether a group may be packed: nothing says there what a window would hide."""
        return self._packable and (self._window is None or group.longest <= self._window)

    @cached_property
    def _packable(self) -> bool:
        return self.share and packs(self.forwards).value

    @cached_property
    def _window(self) -> int | None:
        return capabilities_of(self.forwards.model).window.value

    @cached_property
    def _extendable(self) -> bool:
        side = extends(self.forwards).value
        self.forwards.pads_left = side == "left"
        return side is not None

    @property
    def _limit(self) -> float:
        """Most tokens of a packed forward."""
        return self._most if self.token_budget is None else min(self._most, self.token_budget)

    def _fits(self, sequences: int, longest: int, *, most: float = math.inf) -> bool:
        if sequences > most:
            return False
        return self.token_budget is None or sequences * longest <= self.token_budget

    def _batches(self, groups: Iterable[Group]) -> Iterator[list[Group]]:
        """Yield batches of neighbours in length on one route.

        Memory may run out between two of them: the routes of those that wait are decided again.
        """
        waiting, limit = deque(groups), self._limit
        while waiting:
            if self._limit < limit:
                waiting, limit = deque(self._routed(waiting)), self._limit
            batch = [waiting.popleft()]
            route, load = batch[0].route, Load.of(batch[0])
            while waiting and waiting[0].route is route:
                load = load.with_group(waiting[0])
                if self.batch_size is not None and load.contexts > self.batch_size:
                    break
                if route is Route.PACKED and not load.fits(self._limit):
                    break
                if route is not Route.PACKED and not self._fits(load.contexts, load.longest):
                    break
                batch.append(waiting.popleft())
            yield batch

    def _pads_little(self, sequences: int, longest: int, next_length: int) -> bool:
        """Whether a shorter answer should join: its pads cost, a small forward costs too."""
        enough = _ENOUGH_TOKENS.get(self.forwards.device.type, 2048)
        return sequences * longest < enough or next_length > 0.8 * longest

    def _shrink(self, used: int) -> None:
        """Halve the budget after a forward of ``used`` tokens ran out of memory."""
        self.token_budget = max(1, used // 2)
        self.forwards.forget_graphs()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _run(self, batch: list[Group], given: Given) -> None:
        """Score one batch; on running out of memory, its halves."""
        started = self._started(batch)
        if started is None:
            self._run_halves(batch, given)
        else:
            self._finish(started, given)

    def _started(self, batch: list[Group]) -> Started | None:
        """Start a batch; None when memory ran out."""
        try:
            return self._start(batch)
        except torch.OutOfMemoryError:
            return None  # the caller goes on outside this block, whose frames hold tensors

    def _run_halves(self, batch: list[Group], given: Given) -> None:
        """Score the halves of a batch that memory was too small for, with a smaller budget.

        Raises:
            InfrastructureError: a single context does not fit.
        """
        packed = batch[0].route is Route.PACKED
        if len(batch) == 1 and not (packed and batch[0].extends):
            raise InfrastructureError(
                f"out of memory for one context of {len(batch[0].tokens)} tokens; "
                "use a smaller dtype, a smaller max_length, or a larger device"
            )
        padded = len(batch) * len(batch[0].tokens)
        self._shrink(sum(group.packed_tokens for group in batch) if packed else padded)
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            for some in self._batches(self._routed(part)):
                self._run(some, given)

    def _finish(self, started: Started, given: Given) -> None:
        """Read what a batch found out, once it is done."""
        started.wait()
        tally = started.tally
        for owners, found in started.reads:
            tally.add(owners, *found.lists())
        batch = started.batch
        sound = [
            given.take(group, {a: tally.score(b, a) for a in group.answers}, together=len(batch))
            for b, group in enumerate(batch)
        ]
        if given.on_prompt is not None:
            records = started.told.records()
            for group, told, record in zip(batch, sound, records, strict=False):
                if group.prompt and told:
                    given.on_prompt(group.context[: group.prompt], record)
        if given.progress is not None:
            answered = (asked for group in batch for asked in group.answers.values())
            given.progress(sum(map(len, answered)))

    def _score_again(self, given: Given) -> None:
        """Compute groups with a score that is not finite once more, each request by itself.

        A mask hides a column by a weight of zero, and zero times NaN is NaN: one poisoned token
        spoils whatever shares its row of queries or its pads, and can undo a detection without
        being seen. What is not finite by itself stays so.
        """
        unsure = given.unsure
        given = replace(given, progress=None, unsure=[])
        if unsure:
            _logger.warning(
                "scores of %d contexts are not finite; their requests are computed one by one",
                len(unsure),
            )
        for group in unsure:
            firsts = dict.fromkeys(answer[:1] for answer in group.answers if answer)
            numbers = {first: [number] for number, first in enumerate(firsts)}
            alone = Given([None] * len(firsts), None, given.on_prompt)
            self._run(self._routed([Group(group.context, group.prompt, numbers)]), alone)
            found = dict(zip(firsts, alone.results, strict=True))
            for answer, asked in group.answers.items():
                score = found.get(answer[:1])
                if score is None:  # an empty answer, certain whatever the numbers are
                    continue
                if len(answer) == 1 or math.isnan(score.loglikelihood):
                    given.take(group, {answer: score}, together=1)
                else:
                    one = Group(group.context, group.prompt, {answer: asked}).apart()
                    self._run(self._routed(one), given)

    # -- computing ---------------------------------------------------------------------------

    def _start(self, batch: list[Group]) -> Started:
        route = batch[0].route
        longer = [(b, answer) for b, group in enumerate(batch) for answer in group.longer]
        contexts = [group.tokens for group in batch]
        wanted = [group.rows for group in batch]
        prompts = [group.prompt for group in batch]
        prefilled = None
        if route is Route.PACKED:
            answers = [(b, answer[:-1]) for b, answer in longer]
            logits, told = self.forwards.pack(contexts, wanted, prompts=prompts, answers=answers)
        else:
            prefilled = self.forwards.prefill(
                contexts, wanted, prompts=prompts, use_cache=route is Route.EXTENDED
            )
            logits, told = prefilled.logits, prefilled.told
        started = Started(batch, told)
        rows, tokens, owners = started.tally.expect(batch)
        if route is Route.PACKED:  # the answers' own rows follow those of the contexts
            first = sum(len(group.rows) for group in batch)
            more = [(pair, token) for pair in longer for token in pair[1][1:]]
            rows += range(first, first + len(more))
            owners += [pair for pair, _ in more]
            tokens += [token for _, token in more]
        started.reads.append((owners, self.forwards.read(logits, rows, tokens)))
        if prefilled is not None:
            self._extend(prefilled, longer, started)
        started.wait = self.forwards.mark()
        return started

    def _extend(
        self, prefilled: Prefilled, longer: list[tuple[int, Tokens]], started: Started
    ) -> None:
        """Add the tokens after the first of each answer in ``longer`` (context, answer)."""
        waiting = deque(sorted(longer, key=lambda pair: -len(pair[1])))
        while waiting:
            chunk = [waiting.popleft()]
            longest = prefilled.real.shape[1] + len(chunk[0][1])
            while (
                waiting
                and self._fits(len(chunk) + 1, longest, most=self._answers)
                and self._pads_little(len(chunk), len(chunk[0][1]), len(waiting[0][1]))
            ):
                chunk.append(waiting.popleft())
            try:
                logits = self.forwards.extend(
                    prefilled, [b for b, _ in chunk], [answer[:-1] for _, answer in chunk]
                )
            except torch.OutOfMemoryError:
                if len(chunk) == 1:
                    raise
                logits = None
            if logits is None:
                self._shrink(len(chunk) * longest)
                waiting.extendleft(reversed(chunk))
                continue
            tokens = [token for _, answer in chunk for token in answer[1:]]
            owners = [pair for pair in chunk for _ in pair[1][1:]]
            started.reads.append((owners, self.forwards.read(logits, range(len(tokens)), tokens)))
