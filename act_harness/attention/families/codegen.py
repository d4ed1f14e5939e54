"""CodeGen: GPT-J's attention with one projection for queries, keys and values."""

from __future__ import annotations

from act_harness.attention.families.gptj import GPTJ

__all__ = ["CodeGen"]


class CodeGen(GPTJ):
    """See :class:`act_harness.attention.families.family.Family`; ``_attn`` has GPT-J's form."""

    attention = "CodeGenAttention"
