"""Forwards that scoring is made of: packing or padding, the output head on wanted rows only.

Where the model allows it, contexts and their answers are packed into one row of tokens
(:mod:`act_harness.attention.packing`). Elsewhere a prefill's cache is extended, in batches padded
on the right without a mask (causality hides the pads, so the stock kernel stays on its fast path),
or on the left for models with a sliding window, since a window counts positions and a gap between
prompt and answer would shift it. Logits exist for a limited number of scored rows at a time.

What a forward finds out stays on the device until it is asked for (:class:`RowScores`,
:class:`BatchResult`), so that the host can prepare the next forward meanwhile.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from act_harness.attention import Attachment, select_cache, stock_model
from act_harness.attention.cache import cache_argument, cache_of
from act_harness.attention.capabilities import capabilities_of
from act_harness.attention.packing import Packing, Rows, positions_of
from act_harness.attention.packing_trial import packed_forward, packs_segments
from act_harness.attention.parallel import HeadGroup
from act_harness.attention.placement import input_device
from act_harness.engines.segments import Capacity, lay_out, upload
from act_harness.errors import InternalError, UnsupportedModelError
from act_harness.scoring.graphs import PackedForwards
from act_harness.scoring.head import bare_head, rows_only
from act_harness.scoring.logits import Logits, RowScores, fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from act_harness.attention.counters import PromptRecord

__all__ = [
    "BatchResult",
    "Forwards",
    "Prefilled",
    "Work",
    "pad_tokens",
]


@dataclass
class Work:
    """What scoring had to compute, for benchmarks."""

    forwards: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    scored_rows: int = 0
    packed: int = 0
    """Contexts that were computed in packed rows."""


@dataclass(frozen=True)
class BatchResult:
    """What calibration did to a forward's contexts, on its way from the device."""

    attachment: Attachment | None = None
    totals: Tensor | None = None
    prompts: tuple[int, ...] = ()
    known: tuple[PromptRecord, ...] = ()

    def records(self) -> Sequence[PromptRecord]:
        """Return a record for each context, after :meth:`Forwards.mark`; none for a baseline."""
        if self.attachment is None or self.totals is None:
            return self.known
        return self.attachment.records_of(self.totals, self.prompts)


@dataclass(frozen=True)
class Prefilled:
    """A batch of contexts that answers can extend."""

    logits: Logits  # of the rows asked for
    cache: Cache | None
    real: Tensor  # (B, T) bool
    lengths: Tensor  # (B,) real tokens
    told: BatchResult


class Forwards:
    """Runs one model, calibrated or not, on batches of token sequences."""

    def __init__(
        self,
        model: PreTrainedModel,
        attachment: Attachment | None = None,
        *,
        pad_token: int = 0,
        softmax_dtype: torch.dtype | None = None,
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Store the settings; see :class:`act_harness.scoring.scorer.Scorer`."""
        self.model = model
        self.attachment = attachment if attachment is not None and attachment.active else None
        self.pad_token = pad_token
        self.softmax_dtype = softmax_dtype or torch.float32
        self.forward_context = forward_context
        self.work = Work()
        self.device = input_device(model)
        self._together = HeadGroup.of(model).out_of_memory_together
        self.pads_left = capabilities_of(model).window.value is not None
        """On which side :meth:`prefill` pads; what extends a cache may need other pads."""

    def arm(self) -> AbstractContextManager[None]:
        """Have this object's arm in force on the model inside the block, and nothing else."""
        return stock_model(self.model) if self.attachment is None else self.attachment.engaged()

    @contextmanager
    def stock(self) -> Iterator[None]:
        """Run the stock model inside the block, as these forwards do: trials are of that."""
        with stock_model(self.model), torch.no_grad(), self.forward_context():
            yield

    def forget_long_sequences(self) -> None:
        """Run one token, upon which dynamic rotary frequencies fall back to the original ones."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with self.stock():
            self.model(input_ids=ids, use_cache=False)

    def prefill(
        self,
        sequences: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        *,
        prompts: Sequence[int],
        use_cache: bool,
    ) -> Prefilled:
        """Run whole sequences from an empty cache.

        Args:
            sequences: token ids, of any lengths of at least one.
            rows: for each sequence, the positions whose logits are wanted, in order.
            prompts: how many tokens of each sequence are prompt.
            use_cache: whether answers are to extend it.
        """
        _check_rows(sequences, rows)
        ids, real = self._pad(sequences, left=self.pads_left)
        lengths = real.sum(dim=1)
        shift = (ids.shape[1] - lengths).tolist() if self.pads_left else [0] * len(sequences)
        places = [(b, shift[b] + row) for b, wanted in enumerate(rows) for row in wanted]
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": use_cache}
        if self.pads_left:
            arguments["attention_mask"] = real.long()
            arguments["position_ids"] = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        given: AbstractContextManager[Any] = nullcontext()
        watching: AbstractContextManager[list[list[PromptRecord]]] = nullcontext([])
        if self.attachment is not None:
            given = self.attachment.prompts(prompts, tokens=lengths)
            watching = self.attachment.watch()
        bare = self._bare_head
        with given, watching as records:
            logits, cache = self._run(arguments, places, bare=bare)
        self.work.tokens += sum(len(tokens) for tokens in sequences)
        known = tuple(records[0]) if records else ()
        return Prefilled(logits, cache, real, lengths, BatchResult(known=known))

    def extend(
        self, prefilled: Prefilled, owners: Sequence[int], answers: Sequence[Sequence[int]]
    ) -> Logits:
        """Run ``answers`` over the cached contexts ``owners``; return the logits of their tokens.

        The rows are those of the first answer's tokens, then of the second's, and so on.
        """
        if prefilled.cache is None:
            raise InternalError("answers cannot extend a prefill without a cache")
        index = torch.tensor(owners, device=self.device)
        ids, mask = self._pad(answers, left=False)
        step = torch.arange(ids.shape[1], device=self.device)
        places = [(n, row) for n, tokens in enumerate(answers) for row in range(len(tokens))]
        arguments = {
            "input_ids": ids,
            "attention_mask": torch.cat([prefilled.real[index], mask], dim=1).long(),
            "position_ids": prefilled.lengths[index, None] + step,
            cache_argument(self.model.forward): select_cache(prefilled.cache, index),
            "use_cache": True,
        }
        self.work.tokens += len(places)
        return self._run(arguments, places, bare=self._bare_head)[0]

    def pack(
        self,
        contexts: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        *,
        prompts: Sequence[int],
        answers: Sequence[tuple[int, Sequence[int]]],
    ) -> tuple[Logits, BatchResult]:
        """Run contexts and answers over them in one row of tokens, without pads.

        Args:
            contexts: token ids.
            rows: for each context, the positions whose logits are wanted, in order.
            prompts: how many tokens of each context are prompt.
            answers: (context, token ids), those of one context together; all their logits are
                wanted.

        Returns:
            Logits of the contexts' rows and then of the answers', and what calibration did.
        """
        _check_rows(contexts, rows)
        self.work.packed += len(contexts)
        lengths = tuple(map(len, contexts))
        sizes = [(owner, len(answer)) for owner, answer in answers]
        tokens = [*chain.from_iterable(contexts), *chain.from_iterable(a for _, a in answers)]
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        wanted = [begin + row for begin, own in zip(starts, rows, strict=False) for row in own]
        wanted += range(starts[-1], len(tokens))
        capacity = self.capacity(lengths, sizes)
        if capacity is not None:
            return self._pack_segments(tokens, lengths, sizes, capacity, prompts, wanted)
        packing = Packing(
            lengths, tuple(prompts), tuple(self._rows_of(answers, lengths)),
            ids=torch.tensor(tokens),
        )  # fmt: skip
        places = [(0, row) for row in wanted]
        arguments = {
            "input_ids": torch.tensor([tokens], device=self.device),
            "position_ids": packing.position_ids.to(self.device),
            "use_cache": False,
        }
        watching: AbstractContextManager[list[list[PromptRecord]]] = nullcontext([])
        if self.attachment is not None:
            watching = self.attachment.watch()
        bare = self._bare_head  # may run the model: before the packing is in force
        with packed_forward(self.model, packing), watching as records:
            logits, _ = self._run(arguments, places, bare=bare)
        self.work.tokens += len(tokens)
        return logits, BatchResult(known=tuple(records[0]) if records else ())

    # -- packed forwards over segments -------------------------------------------------------

    def capacity(
        self, lengths: Sequence[int], answers: Sequence[tuple[int, int]]
    ) -> Capacity | None:
        """Return the capacity of a packed forward over segments; None over padded batches.

        Args:
            lengths: tokens of each context.
            answers: (context, tokens) of each answer.
        """
        if not self._packs_segments or not self._takes(Capacity.of(lengths, answers)):
            return None
        return self._packed.capacity(lengths, answers)

    def _takes(self, capacity: Capacity) -> bool:
        return self.attachment is None or self.attachment.takes_segments(capacity)

    def expect(self, layouts: Iterable[tuple[Sequence[int], Sequence[tuple[int, int]]]]) -> None:
        """Say which packed forwards are to come, in order, so that similar ones share a graph.

        Args:
            layouts: what :meth:`capacity` takes, of each.
        """
        if self._packs_segments:
            least = (Capacity.of(*one) for one in layouts)
            self._packed.plan([one for one in least if self._takes(one)])

    def forget_graphs(self) -> None:
        """Free the memory of captured graphs."""
        if "_packed" in self.__dict__:
            self._packed.forget()

    @cached_property
    def _packed(self) -> PackedForwards:
        return PackedForwards(self.model, self.attachment)

    @cached_property
    def _packs_segments(self) -> bool:
        """Whether packed forwards may be over segments in all layers, with the head apart."""
        if not isinstance(self.forward_context(), nullcontext):
            return False
        with self.stock():
            return packs_segments(self.model).value and self._bare_head

    def _pack_segments(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        answers: Sequence[tuple[int, int]],
        capacity: Capacity,
        prompts: Sequence[int],
        wanted: Sequence[int],
    ) -> tuple[Logits, BatchResult]:
        """Run a packed forward in ``capacity``; see :meth:`pack`."""
        count = len(tokens)
        numbers = np.zeros(2 * capacity.tokens + capacity.numbers, dtype=np.int64)
        numbers[:count] = tokens
        numbers[capacity.tokens : capacity.tokens + count] = positions_of(lengths, answers)
        numbers[2 * capacity.tokens :] = lay_out(lengths, prompts, answers, capacity)
        with torch.no_grad(), self._together():
            found = self._packed.run(numbers, capacity, prompts)
            picked = found.hidden[upload(np.asarray(wanted), self.device)]
            told = BatchResult()
            if self.attachment is not None and found.totals is not None:
                told = BatchResult(self.attachment, fetch(found.totals, copy=True), tuple(prompts))
        self.work.forwards += 1
        self.work.padded_tokens += capacity.tokens
        self.work.scored_rows += len(wanted)
        self.work.tokens += count
        head = self.model.get_output_embeddings()
        return Logits(picked, head, self.model.config.get_text_config().vocab_size), told

    @property
    def _joins_answers(self) -> bool:
        """Whether a context's answers share one row of queries.

        On the CPU that saves copies of the context's keys. The GPU's engine wants rows that see an
        interval of columns, and running sums are those of one answer.
        """
        artifact = None if self.attachment is None else self.attachment.artifact
        running = artifact is not None and artifact.calibration.decode == "running"
        return self.device.type == "cpu" and not running

    def _rows_of(
        self, answers: Sequence[tuple[int, Sequence[int]]], lengths: Sequence[int]
    ) -> Iterator[Rows]:
        """Lay the answers out in rows of queries; ``lengths`` are those of the contexts."""
        if not self._joins_answers:
            yield from (Rows(owner, (len(answer),)) for owner, answer in answers)
            return
        rows: list[tuple[int, list[int]]] = []
        for owner, answer in answers:
            # a row no longer than its context: what is masked of its own columns stays small
            most = max(64, lengths[owner])
            if rows and rows[-1][0] == owner and sum(rows[-1][1]) + len(answer) <= most:
                rows[-1][1].append(len(answer))
            else:
                rows.append((owner, [len(answer)]))
        yield from (Rows(owner, tuple(own)) for owner, own in rows)

    def read(self, logits: Logits, rows: Sequence[int], tokens: Sequence[int]) -> RowScores:
        """Start to read log-probability and greediness of ``tokens[i]`` in row ``rows[i]``."""
        with torch.no_grad(), self._together(), self.forward_context():
            return logits.read(rows, tokens, dtype=self.softmax_dtype)

    def mark(self) -> Callable[[], None]:
        """Return what waits until all that was started so far is done."""
        head = next(self.model.get_output_embeddings().parameters()).device
        events = []
        for device in {self.device, head}:
            if device.type == "cuda":
                events.append(torch.cuda.Event())
                events[-1].record(torch.cuda.current_stream(device))

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait

    def _run(
        self, arguments: dict[str, Any], places: list[tuple[int, int]], *, bare: bool
    ) -> tuple[Logits, Cache | None]:
        """Run the model; return the logits of ``places`` (sequence, position), and the cache."""
        self.work.forwards += 1
        self.work.padded_tokens += arguments["input_ids"].numel()
        self.work.scored_rows += len(places)
        with (
            torch.no_grad(),
            self._together(),
            self.forward_context(),
            rows_only(self.model, places, keep=bare) as picked,
        ):
            output = self.model(**arguments)
        if not picked:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not call its output head as a module (a model "
                "that torch.compile runs from a graph does not); score it uncompiled"
            )
        cache = cache_of(output)
        if bare:
            head = self.model.get_output_embeddings()
            return Logits(picked[0], head, output.logits.shape[-1]), cache
        return Logits(output.logits[0]), cache

    @cached_property
    def _bare_head(self) -> bool:
        """Whether logits are the output head's result and nothing more."""
        with self.stock():
            return bare_head(self.model).value

    def _pad(self, sequences: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        """Return :func:`pad_tokens` of the sequences, on the model's device."""
        ids, real = pad_tokens(sequences, self.pad_token, left=left)
        return ids.to(self.device), real.to(self.device)


def _check_rows(sequences: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> None:
    """Refuse rows outside their sequences: a negative one would be read from another sequence.

    Raises:
        InternalError: a row is not within its sequence.
    """
    for tokens, wanted in zip(sequences, rows, strict=True):
        if not tokens or (wanted and not 0 <= min(wanted) <= max(wanted) < len(tokens)):
            raise InternalError(f"rows {wanted} are asked for of a sequence of {len(tokens)}")


def pad_tokens(
    sequences: Sequence[Sequence[int]], pad_token: int, *, left: bool
) -> tuple[Tensor, Tensor]:
    """Return (B, T) token ids and (B, T) bool: real tokens."""
    longest = max(len(tokens) for tokens in sequences)
    ids, real = [], []
    for tokens in sequences:
        missing = longest - len(tokens)
        pads, yes, no = [pad_token] * missing, [True] * len(tokens), [False] * missing
        ids.append([*pads, *tokens] if left else [*tokens, *pads])
        real.append(no + yes if left else yes + no)
    return torch.tensor(ids), torch.tensor(real)
