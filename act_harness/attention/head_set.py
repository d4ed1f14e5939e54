"""A head set made by hand: from a list of heads to an artifact, for experiments of one's own.

The search (:mod:`act_harness.search`) is the way to heads that help; this is for heads that come
from a paper, a plot or a hypothesis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from act_harness.artifact import Artifact
from act_harness.attention import model_facts
from act_harness.calibration import Calibration, preset, validation_line
from act_harness.errors import ArtifactError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from act_harness.calibration import HeadStrength

__all__ = ["head_set"]


def head_set(
    model: PreTrainedModel,
    heads: Mapping[int, Iterable[int]] | Iterable[tuple[int, int]],
    *,
    calibration: Calibration | Mapping[str, Any] | str = "paper",
    name: str = "by-hand",
    tokenizer: PreTrainedTokenizerBase | None = None,
    strengths: Mapping[int, Mapping[int, HeadStrength | Mapping[str, Any]]] | None = None,
) -> Artifact:
    """Make an artifact of heads that were chosen by hand.

    Args:
        model: The model they are heads of, loaded.
        heads: Heads by layer, ``{layer: [head, ...]}``, or pairs ``[(layer, head), ...]``; both
            counted from 0.
        calibration: What is done in them: a preset's name, settings, or a ``Calibration``.
        name: The artifact's name: of the arm in results.
        tokenizer: Recorded, so that the artifact is refused where text is cut otherwise.
        strengths: Mass maps of single heads, ``{layer: {head: {"beta": 0.2}}}``.

    Returns:
        The artifact; ``save(path)`` writes the file that ``artifact=`` takes.

    Raises:
        ArtifactError: A head is not the model's, is named twice, or is no pair of whole numbers.
        CalibrationError: A setting of the calibration is unknown or out of range.
    """
    chosen: dict[int, list[int]] = {}
    try:
        if isinstance(heads, Mapping):
            chosen = {layer: list(some) for layer, some in heads.items()}
        else:
            for layer, head in heads:
                chosen.setdefault(layer, []).append(head)
    except (TypeError, ValueError):
        raise ArtifactError(
            f"heads are {type(heads).__name__}; expected {{layer: [head, ...]}} or pairs of "
            "(layer, head)"
        ) from None
    if isinstance(calibration, str):
        calibration = preset(calibration)
    elif isinstance(calibration, Mapping):
        calibration = Calibration(**calibration)
    try:
        return Artifact(
            name=name,
            model=model_facts(model, tokenizer),
            calibration=calibration,
            heads=chosen,  # validated here
            strengths=strengths,
            provenance={"made": "by hand, act_harness.head_set"},
        )
    except ValidationError as error:
        raise ArtifactError(f"head set {name!r}: {validation_line(error)}") from None
