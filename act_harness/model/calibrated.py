"""``hf-act``: lm-evaluation-harness's HuggingFace model, with calibrated attention.

A subclass of ``HFLM`` that takes all of its arguments and six of its own (see
:class:`CalibratedHFLM`). Requests are tokenised as ``hf`` does; log-likelihoods go through
:class:`act_harness.scoring.scorer.Scorer`, which tells prompt and continuation apart, and
generation through transformers' ``generate`` with true masks. The baseline arm (``artifact=none``)
uses the same code, so that both arms are scored and timed alike.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from act_harness.artifact import Artifact, resolve_artifact
from act_harness.attention import Attachment, model_facts, stock_model
from act_harness.attention import prepare as prepare_attachment
from act_harness.attention.counters import CalibrationCounters, prompt_key
from act_harness.attention.load import auto_class, has_encoder
from act_harness.attention.parallel import check_even_share
from act_harness.engines import select_engine
from act_harness.errors import InputError, UnsupportedCallError, unknown_name
from act_harness.model.generation import GenerationMixin
from act_harness.model.processes import ProcessesMixin
from act_harness.model.prompts import PromptsMixin
from act_harness.mtbench.chat import ConversationMixin
from act_harness.scoring.memory import fitting_tokens
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
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook

__all__ = ["CalibratedHFLM"]

_CPU_TOKEN_BUDGET = 4096
"""Tokens of a forward for ``batch_size=auto`` on the CPU; more brings no speed there."""


class CalibratedHFLM(ConversationMixin, GenerationMixin, PromptsMixin, ProcessesMixin, HFLM):
    """HuggingFace causal language model with calibrated attention, for lm-eval."""

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
        self.requests = []
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
                fitting = fitting_tokens(self.model, self.device, self.max_length)
                self.token_budget = self.head_group.least(fitting)
        return self.token_budget

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.mixed_precision_dtype is None:
            return nullcontext()
        return torch.autocast(device_type=self.device.type, dtype=self.mixed_precision_dtype)

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - as HFLM
        """Return the logits that HFLM's own methods ask for, of this arm."""
        with self._arm():
            logits: torch.Tensor = super()._model_call(*args, **kwargs)
        return logits

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
        self._count_skipped(prepared.skipped, len(prepared.items))


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
