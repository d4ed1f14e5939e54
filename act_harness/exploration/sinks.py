"""Statistics of hidden attention sinks over many documents, as the paper's figures have them.

Streamed: a document's maps are looked at layer by layer and forgotten; what is kept are counts
whose size depends on the model alone. Detection is the calibration's (paper, section 3), and beside
it the flags are counted with ``min_rows`` 1, the published rule, and ``auto``, which asks that as
many rows see a column as would give an average column the threshold: a mean over few rows is large
by itself.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from act_harness.attention.probe import attending_layers
from act_harness.engines.reference import find_sinks
from act_harness.errors import CalibrationError, TaskError
from act_harness.exploration.maps import LayerMaps, Observation
from act_harness.support import atomic, places

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from act_harness.calibration import Calibration
    from act_harness.search.documents import Document

    Table = npt.NDArray[np.float64]

__all__ = ["POSITION_BINS", "Flags", "SinkStatistics", "count_sinks"]

POSITION_BINS = 20
"""Parts of a prompt that sinks are counted in, by position / N."""

_TOP_TOKENS = 100
"""Tokens that are written, by their number of flags."""

_VARIANTS: tuple[Literal[1], Literal["auto"]] = (1, "auto")
_LAST = 3


@dataclass
class Flags:
    """Where columns are flagged under one ``min_rows``; L layers of H heads."""

    heads: Table
    """(L, H) flags."""
    with_sinks: Table
    """(L, H) documents in which the head has a sink."""
    positions: Table = field(default_factory=lambda: np.zeros(POSITION_BINS))
    """(bins,) flags by relative position."""
    last: float = 0.0
    """Flags on a prompt's last token."""
    last_three: float = 0.0
    """Flags on its last three."""
    last_fifth: float = 0.0
    """Flags on its last fifth."""

    @property
    def total(self) -> float:
        """All flags."""
        return float(self.heads.sum())

    def add(self, layer: int, heads: Sequence[int], sinks: npt.NDArray[np.bool_]) -> None:
        """Count (h, N) flags of some heads of a layer in one document."""
        length = sinks.shape[1]
        self.heads[layer, heads] += sinks.sum(axis=1)
        self.with_sinks[layer, heads] += sinks.any(axis=1)
        columns = sinks.sum(axis=0).astype(np.float64)
        np.add.at(self.positions, np.arange(length) * POSITION_BINS // length, columns)
        self.last += columns[-1]
        self.last_three += columns[-_LAST:].sum()
        self.last_fifth += columns[length - length // 5 :].sum()

    def summary(self) -> dict[str, float | None]:
        """Return the number of flags and the shares of them at the end of prompts."""
        shares = {
            "on_last_token": self.last,
            "on_last_three_tokens": self.last_three,
            "on_last_fifth": self.last_fifth,
        }
        total = self.total
        return {"flags": total} | {
            key: value / total if total else None for key, value in shares.items()
        }


@dataclass
class _Task:
    """Sums over the documents of one task."""

    documents: int = 0
    tokens: int = 0
    flags: dict[str, float] = field(default_factory=lambda: dict.fromkeys(map(str, _VARIANTS), 0.0))
    with_sinks: float = 0.0
    first_mass: float = 0.0
    sink_mass: float = 0.0


class SinkStatistics:
    """What is kept of all documents so far."""

    def __init__(
        self, calibration: Calibration, attending: Mapping[int, int], vocabulary: int
    ) -> None:
        """Begin with nothing.

        Args:
            calibration: how sinks are detected.
            attending: number of heads of each layer that attends; means are over those alone.
            vocabulary: token ids are below it.

        Raises:
            CalibrationError: the calibration detects nothing.
        """
        if calibration.target != "sinks":
            raise CalibrationError(
                f"target {calibration.target!r} detects no sinks; expected a calibration with "
                "target 'sinks', as preset 'paper'"
            )
        self.calibration, self.attending = calibration, dict(attending)
        self._all_heads = sum(attending.values())
        shape = (max(attending) + 1, max(attending.values()))
        settings = calibration.settings()
        self._variants = [type(calibration)(**settings | {"min_rows": one}) for one in _VARIANTS]
        self.flags = [Flags(np.zeros(shape), np.zeros(shape)) for _ in _VARIANTS]
        self.first_mass, self.sink_mass = np.zeros(shape), np.zeros(shape)
        self.seen_tokens, self.token_flags = np.zeros(vocabulary), np.zeros(vocabulary)
        self.token_ratio = np.zeros(vocabulary)
        self.tasks: dict[str, _Task] = {}
        self._task = _Task()
        self._prompt: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def begin(self, task: str, prompt: Sequence[int]) -> None:
        """Say which document the layers to come belong to."""
        self._task = self.tasks.setdefault(task, _Task())
        self._prompt = np.asarray(prompt, np.int64)
        self._task.documents += 1
        self._task.tokens += len(prompt)
        np.add.at(self.seen_tokens, self._prompt, 1)

    def take(self, found: LayerMaps) -> None:
        """Count some heads of a layer of the document."""
        layer, heads = found.layer, list(found.heads)
        sums, total = found.weights.sum(dim=1), found.weights.shape[-1]
        first = (sums[:, 0] / total).double().cpu().numpy()
        mass = ((sums * found.sinks).sum(dim=1) / total).double().cpu().numpy()
        self.first_mass[layer, heads] += first
        self.sink_mass[layer, heads] += mass
        self._task.first_mass += first.sum()
        self._task.sink_mass += mass.sum()
        for name, flags, settings in zip(_VARIANTS, self.flags, self._variants, strict=True):
            sinks = self._sinks(sums, found, settings)
            flags.add(layer, heads, sinks)
            self._task.flags[str(name)] += sinks.sum()
        own = found.sinks.cpu().numpy()
        self._task.with_sinks += own.any(axis=1).sum()
        ratio = found.means().double().sum(dim=0) / float(self.calibration.threshold(found.most))
        np.add.at(self.token_flags, self._prompt, own.sum(axis=0))
        np.add.at(self.token_ratio, self._prompt, ratio.cpu().numpy())

    @staticmethod
    def _sinks(
        sums: torch.Tensor, found: LayerMaps, calibration: Calibration
    ) -> npt.NDArray[np.bool_]:
        """Return (h, N) flags under other settings of the detection."""
        sinks, _ = find_sinks(
            sums[None],
            found.seen[None, None],
            most=sums.new_tensor([found.most]).view(1, 1, 1),
            first=torch.zeros(1, 1, 1, dtype=torch.long, device=sums.device),
            calibration=calibration,
        )
        flags: npt.NDArray[np.bool_] = sinks[0].cpu().numpy()
        return flags

    @property
    def documents(self) -> int:
        """Documents so far."""
        return sum(task.documents for task in self.tasks.values())

    def summary(self) -> str:
        """Return a line for each task, and one for what ``min_rows`` does, for the terminal."""
        lines = [
            f"{row['task']}: {row['documents']} documents, {row['sinks_per_head']:.2f} sinks a "
            f"head, {row['mass_on_sinks']:.1%} of attention on sinks, "
            f"{row['mass_on_first_token']:.1%} on the first token"
            for row in self.task_rows()
        ]
        for name, flags in zip(_VARIANTS, self.flags, strict=True):
            share = flags.last_three / flags.total if flags.total else 0.0
            lines.append(
                f"min_rows {name}: {flags.total:.0f} flags, {share:.1%} on the last three tokens"
            )
        return "\n".join(lines)

    def head_rows(self) -> list[dict[str, Any]]:
        """Return a row for each head of layers that attend: means over all documents."""
        count = max(1, self.documents)
        return [
            {
                "layer": layer,
                "head": head,
                "sinks": self.flags[0].heads[layer, head] / count,
                "sinks_min_rows_auto": self.flags[1].heads[layer, head] / count,
                "share_of_documents_with_sinks": self.flags[0].with_sinks[layer, head] / count,
                "mass_on_sinks": self.sink_mass[layer, head] / count,
                "mass_on_first_token": self.first_mass[layer, head] / count,
            }
            for layer, heads in self.attending.items()
            for head in range(heads)
        ]

    def position_rows(self) -> list[dict[str, Any]]:
        """Return a row for each part of a prompt."""
        return [
            {
                "from": part / POSITION_BINS,
                "to": (part + 1) / POSITION_BINS,
                "flags": self.flags[0].positions[part],
                "flags_min_rows_auto": self.flags[1].positions[part],
            }
            for part in range(POSITION_BINS)
        ]

    def token_rows(self, tokenizer: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return a row for each of the tokens with most flags, those of the calibration itself."""
        order = np.argsort(-self.token_flags, kind="stable")[:_TOP_TOKENS]
        rows = []
        for token in map(int, order[self.token_flags[order] > 0]):
            text, kind = _text_and_kind(tokenizer, token)
            rows.append(
                {
                    "token": token,
                    "text": text,
                    "kind": kind,
                    "occurrences": self.seen_tokens[token],
                    "flags": self.token_flags[token],
                    "share_of_flags": self.token_flags[token] / self.token_flags.sum(),
                    "mean_attention_by_threshold": self.token_ratio[token]
                    / (self.seen_tokens[token] * self._all_heads),
                }
            )
        return rows

    def kind_rows(self, tokenizer: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        """Return a row for each kind of token (see :func:`kind_of`), over all tokens there were."""
        sums: dict[str, list[float]] = {}
        for token in map(int, self.seen_tokens.nonzero()[0]):
            one = sums.setdefault(_text_and_kind(tokenizer, token)[1], [0.0, 0.0])
            one[0] += self.seen_tokens[token]
            one[1] += self.token_flags[token]
        total = [sum(column) or 1.0 for column in zip(*sums.values(), strict=True)]
        return [
            {
                "kind": kind,
                "occurrences": seen,
                "flags": flags,
                "share_of_occurrences": seen / total[0],
                "share_of_flags": flags / total[1],
            }
            for kind, (seen, flags) in sorted(sums.items(), key=lambda one: -one[1][1])
        ]

    def task_rows(self) -> list[dict[str, Any]]:
        """Return a row for each task: means over documents, masses over heads too."""
        heads = self._all_heads
        return [
            {
                "task": name,
                "documents": task.documents,
                "tokens": task.tokens / task.documents,
                "sinks_per_head": task.flags["1"] / (task.documents * heads),
                "sinks_per_head_min_rows_auto": task.flags["auto"] / (task.documents * heads),
                "share_of_heads_with_sinks": task.with_sinks / (task.documents * heads),
                "mass_on_sinks": task.sink_mass / (task.documents * heads),
                "mass_on_first_token": task.first_mass / (task.documents * heads),
            }
            for name, task in self.tasks.items()
        ]

    def write(
        self,
        folder: Path,
        tokenizer: Any,  # noqa: ANN401 - any transformers tokenizer
        about: Mapping[str, Any],
        *,
        plots: bool = False,
    ) -> list[Path]:
        """Write ``sinks.json`` and a CSV file for each of its tables.

        Args:
            folder: where.
            tokenizer: gives the texts of tokens.
            about: what the run was, for the head of the JSON file.
            plots: whether ``sinks.png`` and ``sinks.svg`` are drawn.

        Raises:
            InfrastructureError: the folder cannot be written to.
            InputError: matplotlib, which draws, is not installed.
        """
        tables = {
            "tasks": self.task_rows(),
            "heads": self.head_rows(),
            "positions": self.position_rows(),
            "tokens": self.token_rows(tokenizer),
            "kinds": self.kind_rows(tokenizer),
        }
        named = {
            f"min_rows_{one}": flags.summary()
            for one, flags in zip(_VARIANTS, self.flags, strict=True)
        }
        content = {
            "schema": "act-harness/sinks/1",
            **about,
            "calibration": self.calibration.settings(),
            "documents": self.documents,
            "flags": named,
            **tables,
        }
        files = [atomic.write_json(folder / "sinks.json", content)]
        files += [
            atomic.write_text(folder / f"{places.file_name(name)}.csv", _csv(rows))
            for name, rows in tables.items()
        ]
        if plots:
            from act_harness.exploration.figures import draw_sinks

            title = f"Attention sinks in {self.documents} documents of {', '.join(self.tasks)}"
            files += [
                draw_sinks(tables, folder / name, title=title)
                for name in ("sinks.png", "sinks.svg")
            ]
        return files


def _text_and_kind(tokenizer: Any, token: int) -> tuple[str, str]:  # noqa: ANN401
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    special = token in getattr(tokenizer, "all_special_ids", ())
    return text, "special" if special else kind_of(text)


def kind_of(text: str) -> str:
    """Return what a token is: newline, space, punctuation, digits, word, or other."""
    bare = text.strip()
    if "\n" in text:
        return "newline"
    if not bare:
        return "space"
    kinds = {unicodedata.category(letter)[0] for letter in bare}
    if kinds <= {"P", "S"}:
        return "punctuation"
    if kinds == {"N"}:
        return "digits"
    return "word" if kinds <= {"L", "M"} else "other"


def count_sinks(
    model: PreTrainedModel,
    documents: Iterable[Document],
    *,
    calibration: Calibration,
    vocabulary: int,
) -> SinkStatistics:
    """Count the sinks of every head in many documents, each looked at once.

    Args:
        model: the stock model, left as it is.
        documents: prompts; their answers are not read.
        calibration: how sinks are detected.
        vocabulary: token ids are below it.

    Raises:
        TaskError: there is no document.
        CalibrationError: the calibration detects nothing.
        UnsupportedModelError: the model cannot be calibrated.
    """
    attending = attending_layers(model)
    found = SinkStatistics(calibration, attending, vocabulary)
    heads = {layer: range(count) for layer, count in attending.items()}
    with Observation(model, heads, calibration=calibration) as observation:
        for document in documents:
            prompt = document.requests[document.right][0]
            found.begin(document.task, prompt)
            observation.run(prompt, found.take)
    if not found.documents:
        raise TaskError("no document fits the model's context; give other tasks or fewer examples")
    return found


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
