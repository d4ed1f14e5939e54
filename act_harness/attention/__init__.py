"""Adapter between transformers and the engines: calibrated attention on a loaded model.

::

    with act_harness.calibrated(model, "path/to/artifact.json"):
        model.generate(**tokenizer("...", return_tensors="pt"))

``interface`` registers attention and mask under one name; ``attachment`` and ``binding`` bind head
sets to the attention modules of one model, ``lifecycle`` switches them on and off; ``cached`` reads
off the cache what a call really is; ``probe`` checks that the model does what is assumed; ``facts``
identifies a model; ``calls`` and ``generation`` refuse what would break the calibration.

``families`` serves models whose attention does not pass through that interface (GPT-J, GPT-Neo,
CodeGen, XGLM, Falcon, BLOOM, MPT), ``routes`` leads either kind here.

Not supported, each refused with one line: other models outside the interface, caches that are
reordered, cropped, or filled by somebody else.
"""

from __future__ import annotations

from act_harness.attention.attachment import Attachment, stock_model
from act_harness.attention.cache import select_cache
from act_harness.attention.facts import model_facts, tokenizer_fingerprint, weights_fingerprint
from act_harness.attention.lifecycle import attach, calibrated, detach, prepare

__all__ = [
    "Attachment",
    "attach",
    "calibrated",
    "detach",
    "model_facts",
    "prepare",
    "select_cache",
    "stock_model",
    "tokenizer_fingerprint",
    "weights_fingerprint",
]
