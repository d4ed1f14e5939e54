"""Engines: the calibration operation behind one signature, chosen by name.

``reference`` is the oracle (float64, every map in memory), ``torch`` the blockwise engine that runs
anywhere, ``triton`` the one for CUDA. ``auto`` takes the fastest engine for the device; where that
one cannot be loaded, a warning says why.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from act_harness.errors import InputError, suggestion

if TYPE_CHECKING:
    from act_harness.engines.operation import Engine

__all__ = ["ENGINES", "select_engine"]

ENGINES = ("auto", "reference", "torch", "triton")

_logger = logging.getLogger(__name__)


def select_engine(name: str = "auto", *, device: str = "cpu") -> Engine:
    """Return the engine of that name; ``auto`` chooses by ``device`` (``cpu``, ``cuda``, ...).

    Raises:
        InputError: there is no engine of that name.
    """
    if name not in ENGINES:
        raise InputError(
            f"engine {name!r} is unknown, expected one of {', '.join(ENGINES)}"
            f"{suggestion(name, ENGINES)}"
        )
    if name == "reference":
        from act_harness.engines.reference import ReferenceEngine

        return ReferenceEngine()
    if name == "triton" or (name == "auto" and device.split(":")[0] == "cuda"):
        if find_spec("triton") is not None:
            from act_harness.engines.triton import TritonEngine

            return TritonEngine()
        if name == "triton":
            raise InputError(
                "engine 'triton' needs the package triton, which is not installed; "
                "pip install triton, or use engine 'torch'"
            )
        _logger.warning("triton is not installed; engine torch is used, which is slower on CUDA")
    from act_harness.engines.torch import TorchEngine

    return TorchEngine()
