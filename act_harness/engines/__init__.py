"""Engines: the calibration operation behind one signature, chosen by name.

``reference`` is the oracle (float64, every map in memory), ``torch`` the blockwise engine that runs
anywhere. ``auto`` takes the fastest engine for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_harness.errors import InputError, suggestion

if TYPE_CHECKING:
    from act_harness.engines.operation import Engine

__all__ = ["ENGINES", "select_engine"]

ENGINES = ("auto", "reference", "torch")


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
    from act_harness.engines.torch import TorchEngine

    return TorchEngine()
