"""From texts to tokens, as lm-eval's ``hf`` makes them but for its faults."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from act_harness.attention.counters import CalibrationCounters, prompt_key
from act_harness.errors import InputError
from act_harness.scoring.forwards import pad_tokens
from act_harness.support.sequences import common_start

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval.api.instance import Instance

__all__ = ["PromptsMixin"]


class PromptsMixin(HFLM):
    """Encodes requests, prompts and conversations; counts what it had to change."""

    counters: CalibrationCounters
    overlength: str

    def _encode_request(
        self, context: str, continuation: str, contexts: dict[str, list[int]]
    ) -> tuple[list[int], list[int]]:
        """Return context and continuation tokens, as ``TemplateLM.loglikelihood`` finds them.

        Two cases differ. A context that has no tokens without its trailing space (white space, and
        no BOS) is part of what follows, as if the context were empty: lm-eval's ``hf`` fails on
        it. And where a token spans the boundary and leaves nothing to score, the split is moved
        before that token and counted (lm-eval's ``hf`` fails half-way through the run).
        """
        stripped = context.rstrip()
        if context and stripped not in contexts:
            contexts[stripped] = self.tok_encode(stripped)
        before = contexts[stripped] if context else []
        if not before:
            return self._encode_text(context + continuation)
        whole = self.tok_encode(context + continuation)
        if len(whole) > len(before):
            return before, whole[len(before) :]
        shared = common_start((before, whole))
        self.counters.empty_continuation.add(prompt_key([*before, -1, *whole]))
        return (whole[:shared] or [self.prefix_token_id]), whole[shared:]

    def _encode_text(self, text: str) -> tuple[list[int], list[int]]:
        """Return the prefix token, and the tokens of a text that follows nothing."""
        tokens = self.tok_encode(text, add_special_tokens=False)
        if tokens[:1] == [self.prefix_token_id]:
            tokens = tokens[1:]
        if not tokens:
            self.counters.empty_continuation.add(prompt_key([self.prefix_token_id, -1]))
        return [self.prefix_token_id], tokens

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:  # noqa: ANN401 - HFLM's
        """Encode as HFLM does; half a surrogate pair, which no tokenizer takes, is U+FFFD."""
        try:
            string.encode("utf-8")
        except UnicodeEncodeError:
            string = string.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        tokens: list[int] = super().tok_encode(string, *args, **kwargs)
        return tokens

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode each string by itself (HFLM looks for a BOS in the first of a batch only)."""
        rows = [self._prompt_tokens(string) for string in strings]
        if left_truncate_len:
            for number, row in enumerate(rows):
                if len(row) > left_truncate_len:
                    self._overlong_prompt(row, left_truncate_len)
                    rows[number] = row[-left_truncate_len:]
        ids, real = pad_tokens(rows, self.tokenizer.pad_token_id or 0, left=padding_side == "left")
        return ids, real.long()

    def _prompt_tokens(self, text: str) -> list[int]:
        """Return the tokens of a prompt; the prefix token where there are none, as in scoring."""
        return self.tok_encode(text) or [self.prefix_token_id]

    def _overlong_prompt(self, row: list[int], allowed: int) -> None:
        if self.overlength == "error":
            raise InputError(
                f"a prompt has {len(row)} tokens, {allowed} fit beside the tokens to generate; "
                "use overlength=truncate or a larger max_length"
            )
        self.counters.truncated.add(prompt_key(row))

    def _skip_prompt(self, request: Instance) -> list[int] | None:
        """Return the prompt of a request to generate that is left out, and mark its sample."""
        if any(isinstance(one, dict) and "overlength" in one for one in request.args[2:]):
            request.arguments = request.args[:2]  # an earlier model marked it
        if self.overlength != "skip":
            return None
        row = self._prompt_tokens(request.args[0])
        wanted = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
        surplus = len(row) - (self.max_length - wanted)
        if not 0 < surplus < len(row):  # with no room for any prompt, HFLM says so
            return None
        mark = {"overlength": "skipped", "surplus_tokens": surplus}
        request.arguments = (*request.args[:2], mark)
        return row

    def _count_skipped(self, skipped: Sequence[Sequence[int]], requests: int) -> None:
        """Count the prompts that were left out, and warn of the first ones."""
        if skipped and not self.counters.skipped:
            warnings.warn(
                f"{len(skipped)} of {requests} requests are longer than the model's "
                f"{self.max_length} tokens and were not scored; lm-eval's metrics count their "
                "documents all the same",
                stacklevel=3,
            )
        self.counters.skipped |= {prompt_key(tokens) for tokens in skipped}

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Apply the chat template; where it refuses a system message, keep the message's text.

        HFLM would drop it, and the task's instruction with it. It becomes the beginning of the
        first user turn, with a blank line after it.
        """
        if chat_history and chat_history[0]["role"] == "system" and self._refuses_system():
            chat_history = _system_into_user(chat_history)
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        return text

    def _refuses_system(self) -> bool:
        from jinja2.exceptions import TemplateError

        turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        try:
            self.tokenizer.apply_chat_template(turns, tokenize=False, **self.chat_template_args)
        except TemplateError:
            return True
        return False


def _system_into_user(chat_history: list[dict[str, str]]) -> list[dict[str, str]]:
    system, rest = chat_history[0]["content"].strip(), [dict(turn) for turn in chat_history[1:]]
    for turn in rest:
        if turn["role"] == "user":
            turn["content"] = f"{system}\n\n{turn['content']}"
            return rest
    return [{"role": "user", "content": system}, *rest]
