"""Rows of logits and the scores read off them, in pieces that fit into memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from act_harness.engines.segments import upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt


__all__ = ["Logits", "RowScores", "fetch"]


_PIECE_BYTES = 1 << 26
"""Logits and log-probabilities exist in pieces of at most this many bytes each."""


@dataclass(frozen=True)
class RowScores:
    """Scores of single tokens, on their way from the device."""

    logprobs: Tensor  # (n,)
    greedy: Tensor  # (n,) bool
    order: npt.NDArray[np.int64]  # (n,): which token was asked for at the place of each

    def lists(self) -> tuple[list[float], list[bool]]:
        """Return log-probabilities and greediness as asked for, after :meth:`Forwards.mark`."""
        place = np.argsort(self.order)
        return self.logprobs.numpy()[place].tolist(), self.greedy.numpy()[place].tolist()


@dataclass
class Logits:
    """Rows of logits, computed piece by piece from hidden states where the model allows it."""

    rows: Tensor  # (n, vocabulary) logits, or (n, hidden) where there is a head to apply
    head: Callable[[Tensor], Tensor] | None = None
    vocabulary: int = 0

    def all(self) -> Tensor:
        """Return all rows at once, (n, vocabulary) float32 on the CPU; for a few rows."""
        with torch.no_grad():
            rows = self.rows if self.head is None else self.head(self.rows[None])[0]
        return rows.float().cpu()

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, logits) of pieces whose log-softmax in ``dtype`` is small."""
        width = self.vocabulary or self.rows.shape[1]
        size = max(1, _PIECE_BYTES // (width * torch.tensor([], dtype=dtype).element_size()))
        for start in range(0, len(self.rows), size):
            part = self.rows[start : start + size]
            yield start, part if self.head is None else self.head(part[None])[0]

    def read(self, rows: Sequence[int], tokens: Sequence[int], *, dtype: torch.dtype) -> RowScores:
        """Start to read log-probability and greediness of ``tokens[i]`` in row ``rows[i]``.

        Args:
            rows: row of each token.
            tokens: token ids.
            dtype: of log-softmax.
        """
        asked = np.asarray(rows, dtype=np.int64)
        order = np.argsort(asked, kind="stable")
        asked, count = asked[order], len(asked)
        both = np.concatenate([asked, np.asarray(tokens, dtype=np.int64)[order]])
        row, token = upload(both, self.rows.device).view(2, count)
        chosen = torch.empty(count, dtype=dtype, device=row.device)
        greedy = torch.empty(count, dtype=torch.bool, device=row.device)
        for start, part in self.pieces(dtype) if count else ():
            # the function that lm-eval's hf calls: on the CPU its float32 sum over a large
            # vocabulary is off by about 1e-5 a token, and both arms should be off alike
            logprobs = torch.log_softmax(part, dim=1, dtype=dtype).to(row.device)
            here = slice(*np.searchsorted(asked, [start, start + len(part)]).tolist())
            place = row[here] - start
            chosen[here] = logprobs[place, token[here]]
            greedy[here] = part.argmax(dim=1).to(row.device)[place] == token[here]
        return RowScores(fetch(chosen), fetch(greedy), order)


def fetch(values: Tensor, *, copy: bool = False) -> Tensor:
    """Start to copy to the CPU; CUDA alone says when such a copy is done."""
    return values.to("cpu", non_blocking=values.is_cuda, copy=copy)
