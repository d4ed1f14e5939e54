"""Models whose attention does not pass through transformers' interface, a small file each."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from act_harness.attention.families.bloom import Bloom
from act_harness.attention.families.codegen import CodeGen
from act_harness.attention.families.falcon import Falcon
from act_harness.attention.families.gpt_neo import GPTNeo
from act_harness.attention.families.gptj import GPTJ
from act_harness.attention.families.mpt import MPT
from act_harness.attention.families.xglm import XGLM

if TYPE_CHECKING:
    from torch import nn

    from act_harness.attention.families.family import Family

__all__ = ["FAMILIES", "family_of"]

_ALL: tuple[Family, ...] = (Bloom(), CodeGen(), Falcon(), GPTJ(), GPTNeo(), MPT(), XGLM())

FAMILIES = {family.attention: family for family in _ALL}
"""By the name of the attention class."""


def family_of(module: nn.Module) -> Family | None:
    """Return what serves this attention module; None where the interface does, or nothing.

    Releases of transformers bring families over to the interface (5.24 did GPT-J and CodeGen).
    """
    kind = type(module)
    ours = kind.__module__.startswith("transformers.models.")
    family = FAMILIES.get(kind.__name__) if ours else None
    return None if family is None or _asks_the_interface(kind) else family


def _asks_the_interface(kind: type[nn.Module]) -> bool:
    """Whether the code of an attention class looks its function up by the configuration's name."""
    forward: Any = inspect.unwrap(kind.forward)
    return "ALL_ATTENTION_FUNCTIONS" in forward.__globals__
