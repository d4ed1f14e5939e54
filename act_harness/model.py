"""``hf-act``: lm-evaluation-harness's HuggingFace model, with calibrated attention.

A subclass of ``HFLM`` that takes all of its arguments and six of its own (see
:class:`CalibratedHFLM`). Requests are tokenised as ``hf`` does; log-likelihoods go through
:class:`act_harness.scoring.scorer.Scorer`, which tells prompt and continuation apart, and
generation through transformers' ``generate`` with true masks. The baseline arm (``artifact=none``)
uses the same code, so that both arms are scored and timed alike.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import sys
import warnings
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from act_harness.artifact import Artifact, resolve_artifact
from act_harness.attention import Attachment, model_facts, stock_model
from act_harness.attention import prepare as prepare_attachment
from act_harness.attention.counters import CalibrationCounters, prompt_key
from act_harness.attention.facts import base_model
from act_harness.attention.generation import refuse_unsupported_generation
from act_harness.attention.load import auto_class, has_encoder
from act_harness.attention.parallel import check_even_share, check_shared
from act_harness.attention.placement import input_device
from act_harness.engines import select_engine
from act_harness.errors import InputError, UnsupportedCallError, unknown_name
from act_harness.mtbench.chat import ConversationMixin
from act_harness.scoring.forwards import pad_tokens
from act_harness.scoring.scorer import Item, Score, Scorer
from act_harness.scoring.truncation import OVERLENGTH, Prepared, prepare
from act_harness.support.launcher import launched
from act_harness.support.model_arguments import (
    LEAST_LENGTH,
    check_arguments,
    check_vocabulary,
    loading,
    usable_device,
    usable_parallelize,
    usable_tp_plan,
)
from act_harness.support.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook

__all__ = ["CalibratedHFLM"]

_logger = logging.getLogger("lm_eval.models.act_harness")  # lm-eval shows its own loggers only

_CPU_TOKEN_BUDGET = 4096
"""Tokens of a forward for ``batch_size=auto`` on the CPU; more brings no speed there."""


class CalibratedHFLM(ConversationMixin, HFLM):
    """HuggingFace causal language model with calibrated attention, for lm-eval."""

    batch_size_per_gpu: int | str

    def __init__(
        self,
        pretrained: Any = None,  # noqa: ANN401 - as HFLM: a name, a path or a loaded model
        artifact: str | Path | Artifact | None = "",
        engine: str = "auto",
        overlength: str = "truncate",
        scoring: str = "shared",
        **kwargs: Any,  # noqa: ANN401 - all arguments of HFLM
    ) -> None:
        """Load the model and try the artifact on it.

        Attention is calibrated only while a request is computed, and the baseline's requests are
        computed without calibration, whatever else is attached to a model that was given loaded.

        Args:
            pretrained: as for ``hf``.
            artifact: path, name of a shipped artifact, ``hub:OWNER/REPO``, or ``none`` for the
                baseline. Not given: the one shipped artifact that fits the model.
            engine: ``auto``, ``triton`` (CUDA), ``torch`` or ``reference``.
            overlength: what becomes of requests longer than the model's context: ``truncate``
                from the left as lm-eval does, ``error`` before anything runs, or ``skip``
                (log-likelihood -inf). All are counted in the results, and marked in the samples
                by a third argument (``arg_2``) of the request.
            scoring: ``shared`` (each context once) or ``plain`` (one forward per request).
            **kwargs: all arguments of lm-eval's ``hf``.

        Raises:
            InputError: an argument is unknown or out of range, or the artifact does not fit.
            InfrastructureError: the model, its device or memory is missing.
            UnsupportedModelError: the model cannot be calibrated.
        """
        _check_choice("overlength", overlength, OVERLENGTH)
        _check_choice("scoring", scoring, ("shared", "plain"))
        select_engine(engine)  # a misspelt name fails before the model is loaded
        if kwargs.get("backend") == "seq2seq":
            raise InputError("hf-act takes causal models only; use --model hf for seq2seq")
        if isinstance(pretrained, (str, os.PathLike)):
            pretrained = os.path.expanduser(pretrained)  # noqa: PTH111 - a hub id is no path
        check_arguments(pretrained, kwargs)
        kwargs["device"] = usable_device(kwargs.get("device"))
        if kwargs.get("parallelize"):
            kwargs["parallelize"] = usable_parallelize(kwargs)
        kwargs["tp_plan"] = usable_tp_plan(kwargs)
        self._splits_heads = kwargs["tp_plan"] is not None
        shares = isinstance(pretrained, str) and not self._splits_heads
        processes = Processes.join() if shares else Processes()
        with loading(pretrained, known=_ARGUMENTS), warnings.catch_warnings():
            # how lm-eval hands the plan on is not the user's to change
            warnings.filterwarnings("ignore", "Passing `tp_plan`", FutureWarning)
            super().__init__(pretrained, **kwargs)
        if self.backend != "causal":
            raise InputError(
                f"hf-act takes causal models only, {type(self.model).__name__} is {self.backend}"
            )
        if self.max_length < LEAST_LENGTH:
            raise InputError(
                f"the model takes sequences of {self.max_length} tokens by its own settings, "
                f"expected {LEAST_LENGTH} or more; give max_length=N"
            )
        _refuse_virtual_tokens(self.model)
        check_vocabulary(self.model, self.tokenizer)
        self.overlength = overlength
        self.scoring = scoring
        self.engine = engine
        self.facts = model_facts(self.model, self.tokenizer, name=self._facts_name())
        self.counters = CalibrationCounters()
        self.requests: list[int] = []
        """Answered by each process since the arm was chosen."""
        self.attachment: Attachment | None = None
        self.token_budget: int | None = None
        self._warned_rolling = False
        self._will_calibrate = False
        self._marks: list[dict[str, Any] | None] = []
        self.share_work(processes)
        self.use_artifact(artifact)

    def _get_backend(
        self,
        config: Any,  # noqa: ANN401 - as HFLM
        backend: Literal["default", "causal", "seq2seq"] = "default",
        trust_remote_code: bool | None = False,
    ) -> None:
        """Choose backend and class as HFLM does, and for models of text and images another class.

        Raises:
            UnsupportedModelError: there is no class that would load it.
        """
        if backend == "causal" or (backend == "default" and not has_encoder(config)):
            known = getattr(self, "AUTO_MODEL_CLASS", None)
            if known is None and "_model" not in self.__dict__:  # nor given loaded
                self.AUTO_MODEL_CLASS = auto_class(config)
            backend = "causal"
        super()._get_backend(config, backend=backend, trust_remote_code=trust_remote_code)

    def _get_config(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as HFLM
        """Read the configuration, and refuse numbers of processes that would cut heads apart."""
        super()._get_config(*args, **kwargs)
        if self._splits_heads:
            config = self._config.get_text_config()
            check_even_share(config, launched().count, f"a {config.model_type} model")

    def _facts_name(self) -> str | None:
        return self.pretrained if isinstance(self.pretrained, str) else None

    # -- several processes ---------------------------------------------------------------------

    def share_work(self, processes: Processes) -> None:
        """Have lm-eval deal out documents to these processes.

        HFLM counts the GPUs of this machine instead, and takes a process's number on it for its
        number among all. Processes that share one model's heads (``tp_plan``) are one to lm-eval:
        all of them compute every request.
        """
        self.head_group = check_shared(self.model)
        self.processes = Processes() if self.head_group.is_split else processes
        self._rank, self._world_size = self.processes.rank, self.processes.count
        if self.head_group.is_split:
            self._device = input_device(base_model(self.model))  # HFLM numbers CPUs too
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:
            self._device = accelerator.device

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let this process ask the model inside the block what the others do not ask."""
        before = self.processes
        self.share_work(Processes(before.rank))
        try:
            yield
        finally:
            self.share_work(before)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what each process gave: lm-eval asks how many requests they have of a task.

        Raises:
            InputError: one of them has none; lm-eval would wait for it for ever.
        """
        found = self.processes.gather(tensor.cpu())
        if tensor.ndim == 0 and not all(map(bool, found)):
            raise InputError(
                f"{self.processes.count} processes were started for a task of fewer documents "
                f"(process {min(n for n, one in enumerate(found) if not one)} has none); start "
                "fewer, or raise --limit"
            )
        return torch.stack(found) if tensor.ndim == 0 else torch.cat(found)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:  # noqa: ANN401 - as HFLM
        """Return in process ``dst`` what each process gave, and None in the others."""
        found = self.processes.gather(obj)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.processes.meet()

    @property
    def leads(self) -> bool:
        """Whether this process writes and says what a run comes to: one of all that run it."""
        return bool(self.rank == 0 and self.head_group.rank == 0)

    # -- arms --------------------------------------------------------------------------------

    def use_artifact(self, artifact: str | Path | Artifact | None) -> None:
        """Switch to another head set (None or ``none``: the baseline) and reset the counters.

        Raises:
            ArtifactError: unknown, malformed, or for another model.
            UnsupportedModelError: the model cannot be calibrated.
        """
        found = resolve_artifact(artifact, self.facts)
        self.attachment = prepare_attachment(
            self.model, found, facts=self.facts, engine=self.engine, tokenizer=self.tokenizer
        )
        self.counters = CalibrationCounters()
        self.requests = []

    def _arm(self) -> AbstractContextManager[None]:
        """Have this arm, and nothing else, in force on the model inside the block."""
        return stock_model(self.model) if self.attachment is None else self.attachment.engaged()

    def try_artifacts(self, artifacts: Iterable[Artifact | None]) -> None:
        """Attach each head set once, then none: what cannot be used is refused before any score.

        From then on :meth:`generate_until` refuses in every arm what one of them refuses.

        Raises:
            ArtifactError: one is for another model.
            UnsupportedModelError: the model cannot be calibrated.
        """
        self._will_calibrate = False
        for artifact in artifacts:
            self.use_artifact(artifact)
            attachment = self.attachment
            self._will_calibrate |= attachment is not None and attachment.active
        self.use_artifact(None)

    @property
    def artifact(self) -> Artifact | None:
        """The head set in use, or None for the baseline."""
        return self.attachment.artifact if self.attachment else None

    # -- log-likelihoods ---------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Tokenise as ``hf`` does (each context once) and score; (log-likelihood, is greedy)."""
        if self.enable_thinking:  # HFLM refuses it with its own message
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]
        contexts: dict[str, list[int]] = {}
        pairs = []
        for request in tqdm(
            requests, desc="Tokenizing inputs", disable=disable_tqdm or not self.leads
        ):
            context, continuation = request.args[:2]
            texts = (context, continuation)
            pairs.append((texts, *self._encode_request(context, continuation, contexts)))
        answers = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
        for request, mark in zip(requests, self._marks, strict=True):
            if mark is not None:  # lm-eval writes a request's arguments into its sample
                request.arguments = (*request.args[:2], mark)
        return answers

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
        shared = 0
        while shared < len(whole) and before[shared] == whole[shared]:
            shared += 1
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

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score (context, continuation) pairs; see :class:`act_harness.scoring.scorer.Scorer`."""
        prepared = prepare(
            [(context, answer) for _, context, answer in requests],
            max_length=self.max_length,
            overlength=self.overlength,
        )
        self._count_lengths(prepared)
        self._marks = prepared.marks
        items = [item for item in prepared.items if item is not None]
        scores = iter(self._score(items, "log-likelihoods", disable=disable_tqdm))
        answers = []
        for (texts, _, _), item in zip(requests, prepared.items, strict=True):
            score = Score(float("-inf"), False) if item is None else next(scores)
            answer = (score.loglikelihood, score.is_greedy)
            answers.append(answer)
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        self._share_counters(len(requests))
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts in windows. Nothing in a window is prompt: only ``running`` calibrates.

        With ``frozen`` and ``off`` there is no prompt whose sinks could be used; one warning says
        so and the numbers are the baseline's.
        """
        self._warn_rolling()
        items, counts = [], []
        for request in requests:
            windows = list(
                utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            )
            counts.append(len(windows))
            for window in map(utils.make_disjoint_window, windows):
                items.append(Item(tuple(window[0]), tuple(window[1]), prompt=0))
        scores = self._score(items, "rolling log-likelihoods", disable=disable_tqdm)
        results, at = [], 0
        for request, count in zip(requests, counts, strict=True):
            total = sum(score.loglikelihood for score in scores[at : at + count])
            at += count
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        self._share_counters(len(requests))
        return results

    def _warn_rolling(self) -> None:
        artifact = self.artifact
        if artifact is None or self._warned_rolling or artifact.calibration.decode == "running":
            return
        self._warned_rolling = True
        warnings.warn(
            f"rolling log-likelihoods have no prompt: with decode={artifact.calibration.decode!r} "
            "nothing is calibrated in them (decode 'running' would, of targets that have it)",
            stacklevel=3,
        )

    def _score(self, items: Sequence[Item], what: str, *, disable: bool) -> list[Score]:
        scorer = self.scorer()
        with (
            self._arm(),
            tqdm(
                total=len(items),
                desc=f"Running {what} ({self.artifact.name if self.artifact else 'baseline'})",
                unit="request",
                disable=disable or not self.leads,
            ) as bar,
        ):
            scores = scorer.score(items, progress=bar.update, on_prompt=self.counters.record)
        if scorer.token_budget is not None:
            self.token_budget = scorer.token_budget  # what fitted in memory
        self._count_not_finite(items, scores)
        return scores

    def _count_not_finite(self, items: Sequence[Item], scores: Sequence[Score]) -> None:
        """Count answers that are no numbers and warn once: metrics take them for wrong or right."""
        before = len(self.counters.not_finite)
        for item, score in zip(items, scores, strict=True):
            if not math.isfinite(score.loglikelihood):
                self.counters.not_finite.add(prompt_key([*item.context, -1, *item.answer]))
        if self.counters.not_finite and not before:
            warnings.warn(
                f"{len(self.counters.not_finite)} of {len(items)} log-likelihoods are not finite; "
                "what metrics make of them is no result (check the weights and the dtype)",
                stacklevel=3,
            )

    def scorer(self) -> Scorer:
        """Return a scorer with this model's settings."""
        plain = self.scoring == "plain"
        automatic = str(self.batch_size).startswith("auto")
        return Scorer(
            self.model,
            self.attachment,
            batch_size=1 if plain else None if automatic else int(self.batch_size),
            token_budget=self._budget() if automatic else None,
            pad_token=self.tokenizer.pad_token_id or 0,
            softmax_dtype=self.softmax_dtype,
            share=not plain,
            forward_context=self._autocast,
        )

    def _budget(self) -> int:
        """Tokens of a forward for ``batch_size=auto``; halved by the scorer when memory is out."""
        if self.token_budget is None:
            self.token_budget = _CPU_TOKEN_BUDGET
            if self.device.type == "cuda":
                fitting = _fitting_tokens(self.model, self.device, self.max_length)
                self.token_budget = self.head_group.least(fitting)
        return self.token_budget

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.mixed_precision_dtype is None:
            return nullcontext()
        return torch.autocast(device_type=self.device.type, dtype=self.mixed_precision_dtype)

    # -- generation --------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate as HFLM does, calibrated; batches are formed in a size that memory allows.

        Raises:
            UnsupportedCallError: a request's settings cannot be calibrated; nothing was generated.
        """
        if self._will_calibrate or (self.attachment is not None and self.attachment.active):
            for request in requests:
                self.check_generation(request.args[1])
        with self._whole_batches():
            answers: list[str] = super().generate_until(
                requests, disable_tqdm=disable_tqdm or not self.leads
            )
        self._share_counters(len(requests))
        return answers

    def check_generation(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings of generation under which no arm could be calibrated.

        Args:
            settings: a task's ``generation_kwargs`` with what a user put over them.

        Raises:
            UnsupportedCallError: they reorder, chunk or do without the cache.
        """
        refuse_unsupported_generation(self.model, dict(settings))

    @contextmanager
    def _whole_batches(self) -> Iterator[None]:
        """Give HFLM's generation a number where the user said ``auto``.

        HFLM's own probe measures one forward of the longest context, not a growing cache.
        """
        before = self.batch_size_per_gpu
        if str(before).startswith("auto"):
            self.batch_size_per_gpu = max(1, min(64, self._budget() // 512))
        try:
            yield
        finally:
            self.batch_size_per_gpu = before

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

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - as HFLM
        """Return the logits that HFLM's own methods ask for, of this arm."""
        with self._arm():
            logits: torch.Tensor = super()._model_call(*args, **kwargs)
        return logits

    def _model_generate(
        self,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        **generation_kwargs: Any,  # noqa: ANN401 - as HFLM
    ) -> torch.Tensor:
        """Generate a batch, and count what calibration did to its prompts."""
        attachment = self.attachment
        if attachment is None or not attachment.active:
            with self._arm():
                stock: torch.Tensor = super()._model_generate(
                    context, max_length, stop, **generation_kwargs
                )
            return stock
        if generation_kwargs.pop("use_cache", True) is False:
            raise UnsupportedCallError(
                "use_cache=False would make every step a new prefill with other sinks; "
                "generate with the cache while attention is calibrated"
            )
        mask = generation_kwargs.pop("attention_mask", None)
        if mask is None:  # what generate() takes then, so that both arms see the same tokens
            mask = self._inferred_mask(context)
        with self._arm(), attachment.watch() as records:
            output: torch.Tensor = super()._model_generate(
                context, max_length, stop, attention_mask=mask, **generation_kwargs
            )
        for row, real, record in zip(context, mask.bool(), records[0], strict=False):
            self.counters.record(tuple(row[real].tolist()), record)
        return output

    def _inferred_mask(self, context: torch.Tensor) -> torch.Tensor:
        """Return (B, T) ones, or zeros at pads where these are no end tokens."""
        pad, end = self.tokenizer.pad_token_id, self.model.generation_config.eos_token_id
        if pad is None or pad in (end if isinstance(end, list) else [end]):
            return torch.ones_like(context)
        mask: torch.Tensor = (context != pad).long()
        return mask

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

    # -- results -----------------------------------------------------------------------------

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuse lm-eval's ``--use_cache``: its key holds the request alone, not the arm.

        Raises:
            UnsupportedCallError: a cache was asked for.
        """
        if cache_hook.dbdict is not None:
            raise UnsupportedCallError(
                "--use_cache keys answers by request alone, so one arm would be given the other's; "
                "run hf-act without it"
            )
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """Add artifact, calibration, engine and counters to what lm-eval stores."""
        info: dict[str, Any] = super().get_model_info()
        artifact, attachment = self.artifact, self.attachment
        info["act_harness"] = {
            "arm": "baseline" if artifact is None else artifact.name,
            "artifact": None if artifact is None else artifact.name,
            "artifact_sha256": None if artifact is None else artifact.sha256(),
            "artifact_hub": None if artifact is None else artifact.provenance.get("hub"),
            "calibration": None if artifact is None else artifact.calibration.settings(),
            "heads": 0 if artifact is None else artifact.head_count(),
            "engine": attachment.engine.name if attachment and attachment.active else None,
            "engine_calls": dict(attachment.calls.calls) if attachment else {},
            "scoring": self.scoring,
            "overlength": self.overlength,
            "model": self.facts.model_dump(),
            "counters": self.counters.summary(),
            "requests_by_process": list(self.requests),
        }
        if "wandb" in sys.modules:  # lm_eval --wandb_args has a run open; this is its last call
            from act_harness.tracking.arms import log_to_open_run

            log_to_open_run(info["act_harness"], artifact)
        return info

    def _count_lengths(self, prepared: Prepared) -> None:
        self.counters.truncated |= {prompt_key(tokens) for tokens in prepared.truncated}
        self.counters.skipped |= {prompt_key(tokens) for tokens in prepared.skipped}

    def _share_counters(self, requests: int) -> None:
        """Join the counters of all processes (the results are written by the first alone)."""
        gathered = self.processes.gather((self.counters, requests))
        for other, _ in gathered:
            self.counters.merge(other)
        taken = [count for _, count in gathered]
        if self.world_size > 1 and self.leads:
            _logger.info("%d processes took %s requests", len(taken), ", ".join(map(str, taken)))
        before = self.requests or [0] * len(taken)
        self.requests = [sum(both) for both in zip(before, taken, strict=True)]


_ARGUMENTS = sorted(
    {*inspect.signature(HFLM).parameters, *inspect.signature(CalibratedHFLM).parameters}
    - {"args", "kwargs"}
)
"""Names of all arguments, for suggestions."""


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(unknown_name(f"{name}={value!r}", value, known))


def _refuse_virtual_tokens(model: Any) -> None:  # noqa: ANN401 - a PreTrainedModel or PeftModel
    """Refuse peft adapters that put virtual tokens before a prompt: they shift every position."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and getattr(adapter, "is_prompt_learning", False):
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        raise InputError(
            f"the peft adapter is of type {kind}, whose virtual tokens hf-act does not score; "
            "use one that changes weights (LoRA and others), or --model hf"
        )


def _system_into_user(chat_history: list[dict[str, str]]) -> list[dict[str, str]]:
    system, rest = chat_history[0]["content"].strip(), [dict(turn) for turn in chat_history[1:]]
    for turn in rest:
        if turn["role"] == "user":
            turn["content"] = f"{system}\n\n{turn['content']}"
            return rest
    return [{"role": "user", "content": system}, *rest]


def _fitting_tokens(model: Any, device: torch.device, longest: int) -> int:  # noqa: ANN401
    """Estimate how many tokens of a forward fit on a GPU, from the peak of a small one."""
    rows, columns = 4, min(longest, 512)
    ids = torch.zeros(rows, columns, dtype=torch.long, device=device)
    with torch.no_grad():
        for _ in range(2):  # the first pass pays for handles and workspaces
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
            each = (torch.cuda.max_memory_allocated(device) - before) / ids.numel()
    free = torch.cuda.mem_get_info(device)[0]
    return int(min(max(0.5 * free / max(each, 1.0), longest), 1 << 18))
