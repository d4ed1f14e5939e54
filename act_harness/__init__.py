"""Calibrated attention (ACT, ICML 2024) for HuggingFace models and lm-evaluation-harness.

The public names below are resolved on first use, so that ``import act_harness`` costs nothing
and in particular imports no torch (the discovery hook in :mod:`act_harness.plugin` relies on it).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from act_harness._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_EXPORTS = {
    "Artifact": "act_harness.artifact",
    "Calibration": "act_harness.calibration",
    "calibrate_weights": "act_harness.engines.reference",
    "calibrated": "act_harness.attention",
    "attach": "act_harness.attention",
    "detach": "act_harness.attention",
    "explore": "act_harness.exploration.explore",
    "head_set": "act_harness.attention.head_set",
    "load_artifact": "act_harness.artifact",
    "maps": "act_harness.exploration.maps",
    "preset": "act_harness.calibration",
}

__all__ = [
    "Artifact",
    "Calibration",
    "__version__",
    "attach",
    "calibrate_weights",
    "calibrated",
    "detach",
    "explore",
    "head_set",
    "load_artifact",
    "maps",
    "preset",
]

if TYPE_CHECKING:
    from act_harness.artifact import Artifact, load_artifact
    from act_harness.attention import attach, calibrated, detach
    from act_harness.attention.head_set import head_set
    from act_harness.calibration import Calibration, preset
    from act_harness.engines.reference import calibrate_weights
    from act_harness.exploration.explore import explore
    from act_harness.exploration.maps import maps


def lazy_attributes(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that imports each name from its home when it is asked for.

    Args:
        module: The module's name.
        homes: Public name to the module that defines it.
    """

    def find(name: str) -> Any:  # noqa: ANN401 - module attributes are of any type
        if name in homes:
            return getattr(importlib.import_module(homes[name]), name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


__getattr__ = lazy_attributes(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted(__all__)
