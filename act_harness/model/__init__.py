"""``hf-act``, the model that lm-eval opens by the name ``act_harness.model:CalibratedHFLM``."""

from act_harness.model.calibrated import CalibratedHFLM

__all__ = ["CalibratedHFLM"]
