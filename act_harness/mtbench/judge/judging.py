"""``act-harness judge``: find the answers, ask the judge, write the scores.

Nothing is sent before everything that could be wrong with the input has been looked at and the
estimate has been printed. A killed run is continued by the same command; nothing is judged twice.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from act_harness.errors import InfrastructureError
from act_harness.mtbench.judge.answers import Arm, find_arms
from act_harness.mtbench.judge.client import Client, Reply
from act_harness.mtbench.judge.ledger import Judgment, JudgmentLedger, Judgments
from act_harness.mtbench.judge.plan import CostEstimate, Request, estimate, plan
from act_harness.mtbench.judge.prompts import load_prompts, load_references
from act_harness.mtbench.judge.scores import ArmScores, Difference, Rating, compare_arms, score_arm
from act_harness.mtbench.judge.settings import JudgeSettings
from act_harness.mtbench.judge.summary import summary_text, write_files
from act_harness.support import places
from act_harness.support.interruption import saved
from act_harness.support.provenance import now

__all__ = ["JudgeOutcome", "judge"]

_SILENT = 8
"""So many judgments in a row, beside those under way, without any connection end the run."""


@dataclass(frozen=True)
class JudgeOutcome:
    """What came of a judge run."""

    estimate: CostEstimate
    arms: tuple[ArmScores, ...]
    """Scores by arm, baselines first; empty after ``dry_run``."""
    differences: tuple[Difference, ...]
    """Every arm against the baseline of its model."""
    failure_rate: float
    """Share of missing judgments."""
    max_failure_rate: float
    calls: int
    """Calls of this run, retries included."""
    files: tuple[Path, ...]
    conversations: tuple[tuple[object, ...], ...] = ()
    """Arm, question, category, turn, question text, answer, score (nan: missing)."""

    @property
    def failed(self) -> bool:
        """Whether too many judgments are missing."""
        return self.failure_rate > self.max_failure_rate

    @property
    def exit_code(self) -> int:
        """0, or the code of "no server, so no score" where too many judgments are missing."""
        return InfrastructureError.exit_code if self.failed else 0

    def summary(self) -> str:
        """Return the scores as text for people."""
        if not self.arms:
            return self.estimate.text()
        return summary_text(self.arms, self.differences, self.max_failure_rate)


def judge(
    settings: JudgeSettings,
    *,
    announce: Callable[[str], None] = print,
    progress: bool = True,
) -> JudgeOutcome:
    """Judge every answer of the runs that ``settings`` names.

    Args:
        settings: what to judge, by whom.
        announce: gets the estimate, before the first call.
        progress: show a progress bar.

    Returns:
        Scores and counts; see :attr:`JudgeOutcome.exit_code` for too many failures.

    Raises:
        ResultError: there are no answers, or the output folder holds something else.
        RecipeError: a prompt, reference or setting cannot be used; nothing was sent.
        InputError: the client library is not installed.
        InfrastructureError: the server refuses every call, or the disk is full.
    """
    arms = find_arms(settings.paths)
    references = None if settings.references is None else load_references(settings.references)
    prompts = load_prompts(settings.judge_prompts)
    requests = plan(arms, settings, prompts=prompts, references=references)
    if not settings.dry_run:
        places.prepare_folder(settings.output_folder)
    judgments = Judgments(settings.output_folder)
    costs = estimate(requests, judgments, settings)
    announce(costs.text())
    if settings.dry_run:
        return JudgeOutcome(costs, (), (), 0.0, settings.max_failure_rate, 0, ())
    calls = 0
    if not all(judgments.rated(request.key) for request in requests):
        settings.api_key()  # one that cannot be sent is refused before anything is written
        with (
            JudgmentLedger.opened(settings.output_folder) as ledger,
            saved(lambda: f"judgments so far are in {ledger.path}"),
        ):
            # Another judge may have ended since the estimate.
            waiting = [request for request in requests if not ledger.rated(request.key)]
            calls = _ask_all(waiting, ledger, settings, progress=progress)
            judgments = ledger
    ratings = _ratings(requests, judgments)
    outcome = _score(arms, ratings, settings, costs, calls)
    files = write_files(
        settings, outcome.arms, outcome.differences, calls=calls, prompts=prompts.source
    )
    return replace(outcome, files=tuple(files))


def _ask_all(
    requests: Sequence[Request], ledger: JudgmentLedger, settings: JudgeSettings, *, progress: bool
) -> int:
    """Ask for all judgments at once, as many at a time as wanted; return the number of calls."""
    stop = threading.Event()
    client = Client(settings, stop=stop)
    pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="judge")
    # A reply is put here by its own thread: an interrupt of this one, at whatever moment, finds
    # all that was paid for.
    answered: deque[tuple[Request, Reply]] = deque()
    calls = silent = 0

    def ask(request: Request) -> None:
        answered.append((request, client.ask(request.messages)))

    try:
        with tqdm(
            total=len(requests), desc="Judging", unit="judgment", disable=not progress
        ) as bar:
            pending = {pool.submit(ask, request) for request in requests}
            while pending or answered:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                while answered:
                    request, reply = answered[0]
                    ledger.add(_judgment(request, reply, settings))
                    answered.popleft()  # only now: it is on the disk
                    calls += reply.calls
                    bar.update()
                    silent = silent + 1 if reply.unreachable else 0
                    if silent >= _SILENT + settings.concurrency:
                        raise _nothing_answers(silent, reply, settings)
                for future in done:
                    future.result()  # raises where the server refuses every call
    except BaseException:
        # Interrupted, refused or out of disk: what is under way is waited for and kept, because
        # it has been paid for.
        stop.set()
        try:
            pool.shutdown(wait=True, cancel_futures=True)
        finally:  # also where a second interrupt ends the wait
            _keep_finished(tuple(answered), ledger, settings)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        client.close()
    return calls


def _nothing_answers(silent: int, reply: Reply, settings: JudgeSettings) -> InfrastructureError:
    where = settings.base_url or "OpenAI"
    return InfrastructureError(
        f"{silent} judgments in a row failed because nothing answers at {where} ({reply.reason}); "
        "start the server or check --base-url, and repeat the command: judgments so far are kept"
    )


def _keep_finished(
    answered: Iterable[tuple[Request, Reply]], ledger: JudgmentLedger, settings: JudgeSettings
) -> None:
    for request, reply in answered:
        if reply.rating is not None and not ledger.rated(request.key):
            ledger.add(_judgment(request, reply, settings))


def _judgment(request: Request, reply: Reply, settings: JudgeSettings) -> Judgment:
    place = request.places[0]
    return Judgment(
        key=request.key,
        question=place.question,
        category=place.category,
        turn=place.turn,
        repeat=place.repeat,
        prompt=request.prompt,
        judge=settings.model,
        rating=reply.rating,
        reason=reply.reason,
        verdict=reply.verdict,
        calls=reply.calls,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        created=now(),
    )


def _ratings(requests: Sequence[Request], judgments: Judgments) -> list[Rating]:
    found: list[Rating] = []
    for request in requests:
        known = judgments.find(request.key)
        for place in request.places:
            if known is None:
                found.append((place, None, "not asked for"))
            else:
                found.append((place, known.rating, known.reason))
    return found


def _score(
    arms: Sequence[Arm],
    ratings: Sequence[Rating],
    settings: JudgeSettings,
    costs: CostEstimate,
    calls: int,
) -> JudgeOutcome:
    scores = tuple(
        score_arm(arm.label, ratings, confidence=settings.confidence, seed=settings.seed)
        for arm in arms
    )
    differences: list[Difference] = []
    for base in arms:
        if base.is_baseline:
            for other in arms:
                if other.model == base.model and not other.is_baseline:
                    differences += compare_arms(
                        base.label,
                        other.label,
                        ratings,
                        confidence=settings.confidence,
                        seed=settings.seed,
                    )
    missing = sum(rating is None for _, rating, _ in ratings)
    return JudgeOutcome(
        estimate=costs,
        arms=scores,
        differences=tuple(differences),
        failure_rate=missing / len(ratings),
        max_failure_rate=settings.max_failure_rate,
        calls=calls,
        files=(),
        conversations=_conversations(arms, ratings),
    )


def _conversations(
    arms: Sequence[Arm], ratings: Sequence[Rating]
) -> tuple[tuple[object, ...], ...]:
    given: dict[tuple[str, str, int], list[float]] = {}
    for place, rating, _ in ratings:
        if rating is not None:
            given.setdefault((place.arm, place.question, place.turn), []).append(rating)
    rows: list[tuple[object, ...]] = []
    for arm in arms:
        for talk in arm.talks:
            asked = talk.question
            for turn, pair in enumerate(zip(asked.turns, talk.answers, strict=True), start=1):
                known = given.get((arm.label, asked.id, turn), [])
                score = sum(known) / len(known) if known else float("nan")
                rows.append((arm.label, asked.id, asked.category, turn, *pair, score))
    return tuple(rows)
