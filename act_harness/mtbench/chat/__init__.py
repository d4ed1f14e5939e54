"""Conversations of several turns for lm-eval, served by ``hf-act`` beside ``generate_until``.

lm-eval has no request of several turns. Here one request is a whole conversation: the answer to
turn 1 becomes part of turn 2's prompt through the model's own chat template. The baseline arm and
the calibrated arm use the same code. Settings and sampling are in :mod:`.settings` and
:mod:`.sampling`, kept answers in :mod:`.store`, the method of the model in :mod:`.turns`.

Not here: questions (``tasks/mt_bench``) and judging (:mod:`act_harness.mtbench`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_harness import lazy_attributes

__all__ = ["REQUEST_TYPE", "ChatSettings", "Conversation", "ConversationMixin"]

REQUEST_TYPE = "generate_conversations"
"""Request type of the task's instances and name of the model's method that serves them."""

_HOMES = {
    "ChatSettings": "act_harness.mtbench.chat.settings",
    "Conversation": "act_harness.mtbench.chat.turns",
    "ConversationMixin": "act_harness.mtbench.chat.turns",
}

if TYPE_CHECKING:
    from act_harness.mtbench.chat.settings import ChatSettings
    from act_harness.mtbench.chat.turns import Conversation, ConversationMixin

__getattr__ = lazy_attributes(__name__, _HOMES)
