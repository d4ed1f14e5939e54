"""Where the marked pieces of a prompt are in its tokens: the columns of target ``span``.

PASTA (arXiv 2311.02262), SpotLight (arXiv 2505.12025) and InstABoost (arXiv 2506.13734) steer
attention towards pieces of the prompt that the user names. Here a calibration names them by two
markers that a task's template holds anyway, such as ``Review:`` and a line break; the markers stay
in the prompt. A forward knows token ids alone, so the text is what the tokenizer makes of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

__all__ = ["FindSpan", "SpanFinder", "every_other"]

FindSpan: TypeAlias = Callable[[Sequence[int]], list[bool]]
"""Says of each token of one sequence, without pads, whether it is in the span."""


def every_other(ids: Sequence[int]) -> list[bool]:
    """Take every other token for the span: of a probe's tokens, which are no text."""
    return [place % 2 == 1 for place in range(len(ids))]


class SpanFinder:
    """Finds the tokens between two markers."""

    def __init__(self, tokenizer: Any, markers: tuple[str, str]) -> None:  # noqa: ANN401
        """Store both; ``tokenizer`` is any of transformers'."""
        self.tokenizer, self.markers = tokenizer, markers
        self._warned = False

    def __call__(self, ids: Sequence[int]) -> list[bool]:
        """Say of each token whether it holds text that stands between the markers.

        Every pair of markers counts; an opening one without a closing one behind it does not. A
        token that holds text of the piece and of a marker counts.

        Args:
            ids: (n,) tokens of one sequence, without pads.

        Warns:
            UserWarning: there are no markers; said once.
        """
        found = [False] * len(ids)
        pieces = self._pieces(self._text(ids))
        if not pieces and not self._warned:
            self._warned = True
            warnings.warn(
                f"a prompt holds nothing between the markers {self.markers[0]!r} and "
                f"{self.markers[1]!r}; target 'span' changes nothing there",
                stacklevel=2,
            )
        for start, stop in pieces:
            first, last = self._token_at(ids, start), self._token_at(ids, stop - 1)
            found[first : last + 1] = [True] * (last + 1 - first)
        return found

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _pieces(self, text: str) -> list[tuple[int, int]]:
        """Return where the pieces that are not empty begin and end."""
        opening, closing = self.markers
        pieces, place = [], text.find(opening)
        while place >= 0:
            start = place + len(opening)
            stop = text.find(closing, start)
            if stop < 0:
                break
            if stop > start:
                pieces.append((start, stop))
            place = text.find(opening, stop + len(closing))
        return pieces

    def _token_at(self, ids: Sequence[int], place: int) -> int:
        """Return the token that holds a character: the first whose text so far reaches past it."""
        low, high = 0, len(ids) - 1
        while low < high:
            middle = (low + high) // 2
            if len(self._text(ids[: middle + 1])) > place:
                high = middle
            else:
                low = middle + 1
        return low
