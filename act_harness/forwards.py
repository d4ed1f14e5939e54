"""Forwards that scoring is made of: padding, the output head on wanted rows only, row scores.

Batches are padded on the right without a mask (causality hides the pads, so the stock kernel stays
on its fast path); models with a sliding window are padded on the left, since a window counts
positions and a gap between prompt and answer would shift it.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from act_harness.attention import Attachment, select_cache
from act_harness.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from act_harness.counters import PromptRecord

__all__ = ["Forwards", "Prefilled", "RowScores", "Work", "answers_per_sequence", "pad_tokens"]

_PIECE_BYTES = 1 << 28
"""Rows of logits become log-probabilities in pieces of at most this many bytes."""


@dataclass
class Work:
    """What scoring had to compute, for benchmarks."""

    forwards: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    scored_rows: int = 0


class RowScores(NamedTuple):
    """Scores of single tokens; lists of equal length."""

    logprobs: list[float]
    greedy: list[bool]


@dataclass(frozen=True)
class Prefilled:
    """A batch of contexts that answers can extend."""

    logits: Tensor  # (rows asked for, vocabulary)
    cache: Cache | None
    real: Tensor  # (B, T) bool
    lengths: Tensor  # (B,) real tokens
    records: list[PromptRecord]  # what calibration did, empty for a baseline


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
        """Store the settings; see :class:`act_harness.scoring.Scorer`."""
        self.model = model
        self.attachment = attachment if attachment is not None and attachment.active else None
        self.pad_token = pad_token
        self.softmax_dtype = softmax_dtype or torch.float32
        self.forward_context = forward_context
        self.work = Work()
        self.device = model.get_input_embeddings().weight.device
        self.pads_left = _has_window(model)

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
        ids, real = self._pad(sequences, left=self.pads_left)
        lengths = real.sum(dim=1)
        shift = (ids.shape[1] - lengths).tolist() if self.pads_left else [0] * len(sequences)
        places = [(b, shift[b] + row) for b, wanted in enumerate(rows) for row in wanted]
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": use_cache}
        if self.pads_left:
            arguments["attention_mask"] = real.long()
            arguments["position_ids"] = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        known: AbstractContextManager[Any] = nullcontext()
        watching: AbstractContextManager[list[list[PromptRecord]]] = nullcontext([])
        if self.attachment is not None:
            known = self.attachment.prompts(prompts, tokens=lengths)
            watching = self.attachment.watch()
        with known, watching as records:
            logits, cache = self._run(arguments, places)
        self.work.tokens += sum(len(tokens) for tokens in sequences)
        return Prefilled(logits, cache, real, lengths, records[0] if records else [])

    def extend(
        self, prefilled: Prefilled, owners: Sequence[int], answers: Sequence[Sequence[int]]
    ) -> Tensor:
        """Run ``answers`` over the cached contexts ``owners``; return (tokens, vocabulary) logits.

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
            "past_key_values": select_cache(prefilled.cache, index),
            "use_cache": True,
        }
        self.work.tokens += len(places)
        return self._run(arguments, places)[0]

    def read(self, logits: Tensor, rows: Sequence[int], tokens: Sequence[int]) -> RowScores:
        """Return log-probability and greediness of ``tokens[i]`` in row ``rows[i]`` of logits."""
        if not rows:
            return RowScores([], [])
        size = torch.tensor([], dtype=self.softmax_dtype).element_size()
        piece = max(1, _PIECE_BYTES // (logits.shape[1] * size))
        row = torch.tensor(rows, device=logits.device)
        token = torch.tensor(tokens, device=logits.device)
        chosen = torch.empty(len(row), dtype=self.softmax_dtype, device=logits.device)
        for start in range(0, len(logits), piece):
            # the function that lm-eval's hf calls: on the CPU its float32 sum over a large
            # vocabulary is off by about 1e-5 a token, and both arms should be off alike
            part = torch.log_softmax(logits[start : start + piece], dim=1, dtype=self.softmax_dtype)
            here = (row >= start) & (row < start + piece)
            chosen[here] = part[row[here] - start, token[here]]
        greedy = logits.argmax(dim=1)[row] == token
        return RowScores(chosen.tolist(), greedy.tolist())

    def _run(
        self, arguments: dict[str, Any], places: list[tuple[int, int]]
    ) -> tuple[Tensor, Cache | None]:
        """Run the model; return the logits of ``places`` (sequence, position), and the cache."""
        self.work.forwards += 1
        self.work.padded_tokens += arguments["input_ids"].numel()
        self.work.scored_rows += len(places)
        with torch.no_grad(), self.forward_context(), _rows_only(self.model, places) as picked:
            output = self.model(**arguments)
        if not picked:
            raise InternalError("the model does not call its output head as a module")
        return output.logits[0], output.get("past_key_values")

    def _pad(self, sequences: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        """Return :func:`pad_tokens` of the sequences, on the model's device."""
        ids, real = pad_tokens(sequences, self.pad_token, left=left)
        return ids.to(self.device), real.to(self.device)


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


def answers_per_sequence(model: PreTrainedModel) -> float:
    """How many repeated caches cost what stock scoring pays in logits for one sequence.

    lm-eval's ``hf`` holds logits and log-probabilities of every position, ``2 x vocabulary``
    values a token; a cache repeated for an answer holds ``2 x layers x key heads x head size``. So
    many answers for each sequence of a batch stay within stock's peak memory. At least 1.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    cached = 2 * config.num_hidden_layers * keys * size
    return max(1.0, float(2 * config.vocab_size / cached))


def _has_window(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    return (
        getattr(config, "sliding_window", None) is not None
        or getattr(config, "attention_chunk_size", None) is not None
    )


@contextmanager
def _rows_only(model: PreTrainedModel, places: list[tuple[int, int]]) -> Iterator[list[bool]]:
    """Let the output head see only the hidden states of ``places``, as (1, rows, hidden).

    What a model does to logits after its head (soft caps, scales) is elementwise, so it is kept;
    ``logits_to_keep`` of transformers could only keep the same positions of all sequences.
    """
    picked: list[bool] = []

    def select(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        index = torch.tensor(places, device=hidden.device)
        picked.append(True)
        return (hidden[index[:, 0], index[:, 1]][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield picked
    finally:
        hook.remove()
