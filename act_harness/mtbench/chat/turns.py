"""The model's method for conversations: all first turns in batches, then all second turns.

A turn is a new prefill over the whole conversation, in the prompt that the model's own chat
template makes of it: calibration sees what the model sees. Prompts are padded on the left with a
mask, and decoded with the cache; greedy and sampled questions share batches (see
:mod:`act_harness.mtbench.chat.sampling`), so an answer depends on its question and not on its
batch, up to the rounding of the arithmetic.

Settings of the model's own ``generation_config`` that would look at pads or draw at random
(penalties, temperature) are switched off: what decides an answer stands in the task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from act_harness.attention.counters import PromptRecord, prompt_key
from act_harness.errors import InfrastructureError, InputError
from act_harness.mtbench.chat.sampling import (
    RowLimits,
    RowSampler,
    StopTexts,
    first_with,
    left_padded,
    row_key,
)
from act_harness.mtbench.chat.settings import ChatSettings
from act_harness.mtbench.chat.store import Answer, AnswerStore, answers_folder
from act_harness.support.provenance import sha256_json, versions

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from act_harness.attention.parallel import HeadGroup

__all__ = ["Conversation", "ConversationMixin"]

_logger = logging.getLogger(__name__)


@contextmanager
def _closing(stores: Mapping[str, AnswerStore]) -> Iterator[None]:
    """Close the stores that were opened meanwhile, so that the next run may write there."""
    try:
        yield
    finally:
        for store in stores.values():
            store.close()


class Conversation(list[str]):
    """The answers of one conversation, with what is known about them beside their text.

    A list of strings, because lm-eval's tracker turns anything else into one string.
    """

    def __init__(self, answers: Iterable[Answer] = ()) -> None:
        """Take the texts of the turns, in their order."""
        kept = list(answers)
        super().__init__(answer.text for answer in kept)
        self.answers = kept


@dataclass
class _Talk:
    """One conversation under way."""

    question: str
    category: str
    turns: list[str]
    system: str | None
    settings: ChatSettings
    answers: list[Answer] = field(default_factory=list)

    @classmethod
    def of(cls, request: Instance) -> _Talk:
        given = request.args[1]
        return cls(
            question=given["question"],
            category=given["category"],
            turns=list(given["turns"]),
            system=given["system"],
            settings=ChatSettings.parse(given["generation"]),
        )

    def messages(self) -> list[dict[str, str]]:
        """Return the conversation up to the turn that is to be answered next."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for user, answer in zip(self.turns, self.answers, strict=False):
            found.append({"role": "user", "content": user})
            found.append({"role": "assistant", "content": answer.text})
        found.append({"role": "user", "content": self.turns[len(self.answers)]})
        return found


@dataclass(frozen=True)
class _Prompt:
    """One turn to be answered."""

    talk: _Talk
    tokens: tuple[int, ...]
    sha256: str
    limit: int
    """Most new tokens: the setting, or what is left of the model's context."""
    seed: int

    @property
    def turn(self) -> int:
        return len(self.talk.answers) + 1

    def answer(
        self, text: str, tokens: int, finish: str, calibration: dict[str, Any] | None = None
    ) -> Answer:
        return Answer(
            question=self.talk.question,
            turn=self.turn,
            prompt_sha256=self.sha256,
            prompt_tokens=len(self.tokens),
            text=text,
            tokens=tokens,
            finish=finish,
            calibration=calibration,
        )


class ConversationMixin:
    """Gives ``CalibratedHFLM`` the request type ``generate_conversations``.

    To be inherited before ``HFLM``. It takes one argument from the model's: ``answers``, the folder
    of kept answers (not given: the user's cache; ``none``: nothing is kept).
    """

    if TYPE_CHECKING:
        _overlong_prompt: Callable[[list[int], int], None]
        _share_counters: Callable[[int], None]
        _whole_batches: Callable[[], Any]
        _autocast: Callable[[], Any]
        _arm: Callable[[], Any]
        apply_chat_template: Callable[..., str]
        _prompt_tokens: Callable[[str], list[int]]
        facts: Any
        counters: Any
        attachment: Any
        artifact: Any
        model: Any
        tokenizer: Any
        device: torch.device
        engine: str
        overlength: str
        batch_size: int | str
        max_length: int
        rank: int
        head_group: HeadGroup
        think_end_token: str | int | None

        @property
        def leads(self) -> bool:
            """Whether this process says what a run comes to."""
            ...

    def __init__(
        self,
        pretrained: Any,  # noqa: ANN401 - as HFLM: a name, a path or a loaded model
        *args: Any,  # noqa: ANN401 - all arguments of HFLM
        answers: str | Path | None = "",
        **kwargs: Any,  # noqa: ANN401 - all arguments of HFLM
    ) -> None:
        """Take ``answers`` and pass everything else on."""
        super().__init__(pretrained, *args, **kwargs)  # type: ignore[call-arg] # HFLM's
        self.answers = answers_folder(answers)

    def generate_conversations(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[Conversation]:
        """Answer all turns of each request; one list of strings for each, in their order.

        Args:
            requests: instances whose second argument holds ``question`` (id), ``category``,
                ``turns``, ``system`` and ``generation`` (see :class:`ChatSettings`).
            disable_tqdm: show no progress bar.

        Raises:
            TaskError: a generation setting is unknown or out of range.
            InputError: ``overlength=error`` and a prompt does not fit.
            InfrastructureError: a single prompt does not fit in memory, or the disk is full.
        """
        talks = [_Talk.of(request) for request in requests]
        stores: dict[str, AnswerStore] = {}
        with (
            _closing(stores),
            self._whole_batches(),
            tqdm(
                total=sum(len(talk.turns) for talk in talks),
                desc="Running conversations",
                unit="turn",
                disable=disable_tqdm or not self.leads,
            ) as bar,
        ):
            while waiting := [talk for talk in talks if len(talk.answers) < len(talk.turns)]:
                self._answer_turn(waiting, stores, bar)
        self._share_counters(len(requests))
        return [Conversation(talk.answers) for talk in talks]

    # -- one turn of all conversations ---------------------------------------------------------

    def _answer_turn(self, talks: list[_Talk], stores: dict[str, AnswerStore], bar: Any) -> None:  # noqa: ANN401
        missing: list[tuple[_Prompt, AnswerStore]] = []
        prompts = [self._prompt(talk) for talk in talks]
        places = [self._store(p.talk.settings, p.seed, stores) for p in prompts]
        kept = [
            store.find(prompt.talk.question, prompt.turn, prompt.sha256)
            for prompt, store in zip(prompts, places, strict=True)
        ]
        kept = self.head_group.as_first(kept)  # what one process generates, all of its group do
        for talk, prompt, store, known in zip(talks, prompts, places, kept, strict=True):
            if known is None and prompt.limit < 1:
                known = prompt.answer("", 0, "skipped")
            if known is None:
                missing.append((prompt, store))
                continue
            if known.calibration is not None:
                self.counters.record(prompt.tokens, PromptRecord(**known.calibration))
            talk.answers.append(known)
            bar.update()
        if len(missing) < len(talks):
            _logger.info("%d of %d answers were kept before", len(talks) - len(missing), len(talks))
        # Settings are the same for a whole task; two tasks may differ. The longest come first.
        groups: dict[ChatSettings | str, list[tuple[_Prompt, AnswerStore]]] = {}
        for pair in sorted(missing, key=lambda pair: -len(pair[0].tokens)):
            groups.setdefault(pair[0].talk.settings.model_dump_json(), []).append(pair)
        size = int(self.batch_size)
        for group in groups.values():
            for first in range(0, len(group), size):
                self._answer_batch(group[first : first + size], bar)

    def _prompt(self, talk: _Talk) -> _Prompt:
        """Build the prompt of a conversation's next turn; its limit is 0 if it does not fit."""
        tokens = self._prompt_tokens(self.apply_chat_template(talk.messages()))
        wanted = talk.settings.max_gen_toks
        room = self.max_length - len(tokens)
        if room < 1 and self.overlength == "skip":
            self.counters.skipped.add(prompt_key(tokens))
        elif room < 1:
            keep = max(1, self.max_length - wanted, self.max_length // 2)
            self._overlong_prompt(tokens, keep)  # raises with overlength=error
            tokens = tokens[-keep:]
            room = self.max_length - keep
        seed = talk.settings.seed
        return _Prompt(
            talk=talk,
            tokens=tuple(tokens),
            sha256=prompt_key(tokens),
            limit=min(wanted, room),
            seed=int(torch.initial_seed()) if seed is None else seed,
        )

    def _store(
        self, settings: ChatSettings, seed: int, stores: dict[str, AnswerStore]
    ) -> AnswerStore:
        artifact = self.artifact
        decisive = {
            "generation": {**settings.model_dump(mode="json"), "seed": seed},
            "artifact": None if artifact is None else artifact.sha256(),
            "engine": self.engine if artifact is not None else None,
            "model": self.facts.model_dump(mode="json"),
            "max_length": self.max_length,
            "overlength": self.overlength,
            "think_end_token": self.think_end_token,
            "versions": versions(),
        }
        name = sha256_json(decisive)
        if name not in stores:
            stores[name] = AnswerStore(
                self.answers if self.head_group.rank == 0 else None,
                arm="baseline" if artifact is None else artifact.name,
                settings=decisive,
                rank=self.rank,
            )
        return stores[name]

    # -- one batch -----------------------------------------------------------------------------

    def _answer_batch(self, batch: Sequence[tuple[_Prompt, AnswerStore]], bar: Any) -> None:  # noqa: ANN401
        """Answer one batch; on running out of memory, its halves."""
        try:
            answers = self._generate([prompt for prompt, _ in batch])
        except torch.OutOfMemoryError:
            answers = None
        if answers is None:  # outside the except block, so that its frames free their tensors
            if len(batch) == 1:
                raise InfrastructureError(
                    f"out of memory for one prompt of {len(batch[0][0].tokens)} tokens; use a "
                    "smaller dtype, fewer max_gen_toks, or a larger device"
                )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            half = len(batch) // 2
            self._answer_batch(batch[:half], bar)
            self._answer_batch(batch[half:], bar)
            return
        batch[0][1].add(answers)  # one group has one store
        for (prompt, _), answer in zip(batch, answers, strict=True):
            prompt.talk.answers.append(answer)
        bar.update(len(batch))

    def _generate(self, prompts: Sequence[_Prompt]) -> list[Answer]:
        settings = prompts[0].talk.settings
        ids, mask = left_padded([p.tokens for p in prompts], self.tokenizer.pad_token_id or 0)
        start = ids.shape[1]
        sampler = RowSampler(
            [row_key(p.seed, p.talk.question, p.turn) for p in prompts],
            [settings.temperature_of(p.talk.category) for p in prompts],
            start=start,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        stopping: list[Any] = [RowLimits([p.limit for p in prompts], start=start)]
        if settings.until:
            stopping.append(StopTexts(self.tokenizer, settings.until, start=start))
        records, output = self._watched(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=max(p.limit for p in prompts),
            logits_processor=[sampler],
            stopping_criteria=stopping,
        )
        answers = []
        for row, prompt in enumerate(prompts):
            kept = None
            if records:
                self.counters.record(prompt.tokens, records[row])
                kept = asdict(records[row])
            answers.append(self._answer(prompt, output[row, start:].tolist(), kept))
        return answers

    def _watched(self, **inputs: Any) -> tuple[list[PromptRecord], torch.Tensor]:  # noqa: ANN401
        """Generate greedily, whatever the model's own configuration says, and count the prefill."""
        fixed = {
            "do_sample": False,
            "num_beams": 1,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "use_cache": True,
            "eos_token_id": self._end_tokens(),
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        attachment = self.attachment
        together = self.head_group.out_of_memory_together
        with torch.no_grad(), together(), self._autocast(), self._arm():
            if attachment is None or not attachment.active:
                return [], self.model.generate(**inputs, **fixed)
            with attachment.watch() as records:
                output = self.model.generate(**inputs, **fixed)
        return records[0], output

    def _end_tokens(self) -> list[int]:
        own = getattr(self.model.generation_config, "eos_token_id", None)
        found = own if isinstance(own, list) else [own]
        ends = {self.tokenizer.eos_token_id, *found} - {None}
        if not ends:
            raise InputError(
                "the model names no end token, so no answer could end; set eos_token in its "
                "tokenizer_config.json"
            )
        return sorted(ends)

    def _answer(
        self, prompt: _Prompt, tokens: list[int], calibration: dict[str, Any] | None
    ) -> Answer:
        """Cut a generated row to its answer: up to the end token, the limit or a stop text."""
        ends = set(self._end_tokens())
        tokens = tokens[: prompt.limit]
        own = next((n for n, token in enumerate(tokens) if token in ends), None)
        finish = "length" if prompt.limit == prompt.talk.settings.max_gen_toks else "context"
        if own is not None:
            tokens, finish = tokens[:own], "stop"
        texts = prompt.talk.settings.until
        stopped = first_with(texts, tokens, self._decoded) if texts else None
        if stopped is not None:  # what follows are pads, while the rest of the batch went on
            tokens, finish = tokens[:stopped], "stop"
        count = len(tokens)
        if isinstance(self.think_end_token, int) and self.think_end_token in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(self.think_end_token) :]
        text = self._decoded(tokens)
        if isinstance(self.think_end_token, str):
            text = text.split(self.think_end_token)[-1]
        for stop in texts:
            text = text.partition(stop)[0]
        return prompt.answer(text.strip(), count, finish, calibration)

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
