"""Speed measurements: stock attention, the engines, and what a naive version would cost.

``attention``, ``prefill`` and ``decode`` measure the operation and whole models; what they share
with the other benchmarks (machine, timing, tables, plots) is in ``common``. Nothing here decides
about quality: those figures come from evaluations.
"""

from __future__ import annotations
