"""Engine for CUDA: stock attention at full speed, and kernels for the selected heads on top.

Nothing of size rows x columns is ever stored, and nothing waits for the device between layers:
the number of sinks stays there. ``kernels`` holds the prefill and extension kernels, ``engine``
decides what is launched. Kernels run on the CPU under ``TRITON_INTERPRET=1`` (tests).
"""

from __future__ import annotations

from act_harness.engines.triton.engine import TritonEngine

__all__ = ["TritonEngine"]
