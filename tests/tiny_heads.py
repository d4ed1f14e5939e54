"""A head set of the tiny checkpoint (``tiny_checkpoint`` in conftest), as a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from act_harness.artifact import Artifact
from act_harness.calibration import Calibration

HEADS = {0: (0, 1, 2), 1: (1, 3), 2: (0, 1)}


def save_heads(
    checkpoint: Path,
    path: Path,
    *,
    name: str,
    heads: Mapping[int, tuple[int, ...]] = HEADS,
    **calibration: Any,
) -> Path:
    """Save a head set with the facts of the checkpoint that it is for.

    Args:
        checkpoint: folder of the model.
        path: the artifact's file.
        name: of the artifact.
        heads: by layer.
        calibration: settings.
    """
    from act_harness.model import CalibratedHFLM

    lm = CalibratedHFLM(str(checkpoint), artifact="none", dtype="float32", device="cpu")
    artifact = Artifact(
        name=name, model=lm.facts, calibration=Calibration(**calibration), heads=dict(heads)
    )
    return artifact.save(path)
