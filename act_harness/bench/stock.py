"""Which stock path a scoring benchmark measures against: lm-eval's own, or the one that stands in.

lm-eval's ``hf`` can be imported wherever its wheel lies, without data sets. Where it does not, or
without a tokenizer to give it, :class:`StockPath` stands in, and the
report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from act_harness.attention.load import load_plain_tokenizer
from act_harness.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "LM_EVAL",
    "STAND_IN",
    "Pair",
    "Scores",
    "StockChoice",
    "StockPath",
    "choose_stock",
    "lm_eval_stock",
]

Pair = tuple[tuple[int, ...], tuple[int, ...]]
Scores = Callable[[Sequence[Pair]], list[tuple[float, bool]]]

LM_EVAL = "lm-eval's own HFLM._loglikelihood_tokens"
STAND_IN = "StockPath, a stand-in for lm-eval's hf"


class StockChoice(NamedTuple):
    """A stock path and what it is."""

    scores: Callable[[int], Scores]
    """From a batch size to a function of requests."""
    words: str


class StockPath:
    """lm-eval's scoring of causal models, for machines without lm-eval.

    Requests sorted by length, one forward per distinct context + answer[:-1], right pads, and the
    log-softmax of the whole vocabulary at every position; a test holds it to lm-eval's own.
    """

    def __init__(
        self, model: PreTrainedModel, batch_size: int, *, softmax_dtype: torch.dtype | None = None
    ) -> None:
        self.model, self.batch_size, self.softmax_dtype = model, batch_size, softmax_dtype
        self.tokens = 0
        self.forwards = 0

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) in the order of ``pairs``."""
        groups: dict[tuple[int, ...], list[int]] = {}
        order = sorted(
            range(len(pairs)), key=lambda n: (-len(sum(pairs[n], ())), sum(pairs[n], ()))
        )
        for n in order:
            context, answer = pairs[n]
            groups.setdefault(context + answer[:-1], []).append(n)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        waiting = list(groups.items())
        for start in range(0, len(waiting), self.batch_size):
            chunk = waiting[start : start + self.batch_size]
            for (tokens, members), logprobs in zip(chunk, self._forward(chunk), strict=True):
                for n in members:
                    answer = pairs[n][1]
                    rows = logprobs[len(tokens) - len(answer) : len(tokens)]
                    target = torch.tensor(answer, device=rows.device)
                    chosen = rows.gather(1, target[:, None]).sum()
                    results[n] = (float(chosen), bool((rows.argmax(-1) == target).all()))
        return results

    def _forward(self, chunk: list[tuple[tuple[int, ...], list[int]]]) -> Tensor:
        longest = max(len(tokens) for tokens, _ in chunk)
        ids = [[*tokens, *[0] * (longest - len(tokens))] for tokens, _ in chunk]
        self.tokens += sum(len(tokens) for tokens, _ in chunk)
        self.forwards += 1
        with torch.no_grad():
            logits = self.model(torch.tensor(ids, device=self.model.device)).logits
            return torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)


def lm_eval_stock(model: PreTrainedModel, tokenizer: Any, batch_size: int) -> Scores:  # noqa: ANN401
    """Return lm-eval's own scoring of a model that is loaded already.

    Args:
        model: The model.
        tokenizer: Any tokenizer; requests are token ids, but lm-eval asks for one.
        batch_size: Sequences of a forward.
    """
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")

    def scores(pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        requests = [(("", ""), list(context), list(answer)) for context, answer in pairs]
        found: list[tuple[float, bool]] = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        return found

    return scores


def choose_stock(kind: str, model: PreTrainedModel, *, tokenizer: str | None) -> StockChoice:
    """Return the stock path of a command line.

    Args:
        kind: ``hf``, ``stand-in``, or ``auto``: ``hf`` where that is possible.
        model: The model.
        tokenizer: Folder of a tokenizer.

    Raises:
        InputError: Another ``kind``, or ``hf`` where lm-eval or a tokenizer is missing.
    """
    if kind not in ("auto", "hf", "stand-in"):
        raise InputError(f"--stock is {kind!r}, expected auto, hf or stand-in")
    possible = tokenizer is not None and find_spec("lm_eval") is not None
    if kind == "hf" and not possible:
        raise InputError("--stock hf needs lm-eval installed, and a tokenizer; give --tokenizer")
    if kind == "stand-in" or not possible or tokenizer is None:
        return StockChoice(lambda size: StockPath(model, size).score, STAND_IN)
    loaded = load_plain_tokenizer(tokenizer)
    return StockChoice(lambda size: lm_eval_stock(model, loaded, size), LM_EVAL)
