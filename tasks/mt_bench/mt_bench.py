"""MT-Bench's questions as requests of two turns, and what can be measured without a judge.

lm-eval has no request of several turns: this class gives every question one request of the type
``generate_conversations``, which ``hf-act`` serves (``act_harness.mtbench.chat``), and refuses
every other model in one line. The judge's scores come from ``act-harness judge``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from act_harness.errors import TaskError, UnsupportedCallError
from act_harness.harness.data_folder import load_rows
from act_harness.mtbench.chat import REQUEST_TYPE, ChatSettings
from act_harness.mtbench.measures import measure

__all__ = ["MTBench", "mean_of_known", "process_results"]

_NO_TEMPLATE = (
    "mt_bench needs the model's chat template and generation of several turns: run it with "
    "--model hf-act and --apply_chat_template"
)


class MTBench(ConfigurableTask):
    """The 80 questions; one request, of two turns, for each."""

    def __init__(self, config: dict[str, Any]) -> None:
        # lm-eval leaves the key that named this class in the settings; its task settings refuse it.
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self._system: str | None = None

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: object) -> None:
        """Read the questions from the data directory, if one is set, else as lm-eval would.

        Raises:
            InfrastructureError: The dataset cannot be had.
        """
        self.dataset = load_rows(
            self.config.dataset_path,
            self.config.dataset_name,
            task=self.config.task,
            splits=[self.config.test_split],
            **(dataset_kwargs or {}),
        )

    request_type = REQUEST_TYPE

    def build_all_requests(self, **settings: Any) -> None:  # noqa: ANN401 - as lm-eval's
        """Check that the run can work at all, before anything is generated.

        Raises:
            TaskError: No chat template, or a generation setting that cannot be used.
            UnsupportedCallError: The model is not ``hf-act``.
        """
        LM.generate_conversations = _refuse  # what a model without the method says
        template = settings.get("chat_template")
        if template is None:
            raise TaskError(_NO_TEMPLATE)
        model = getattr(template, "__self__", None)
        if isinstance(model, LM) and type(model).generate_conversations is _refuse:
            _refuse(model)
        ChatSettings.parse(self.config.generation_kwargs)
        self._system = settings.get("system_instruction")
        # A cached request would keep the generation settings of the run that cached it.
        super().build_all_requests(**{**settings, "cache_requests": False})

    def fewshot_context(
        self,
        doc: dict[str, Any],
        num_fewshot: int = 0,
        **settings: Any,  # noqa: ANN401
    ) -> str:
        """Return turn 1's prompt; the model builds turn 2's itself, from turn 1's answer.

        Raises:
            TaskError: There is no chat template to build it with.
        """
        template: Callable[[list[dict[str, str]]], str] | None = settings.get("chat_template")
        if template is None:
            raise TaskError(_NO_TEMPLATE)
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return template([*system, {"role": "user", "content": doc["prompt"][0]}])

    def construct_requests(self, doc: dict[str, Any], ctx: str, **settings: Any) -> Instance:  # noqa: ANN401
        """Return the one request of a question."""
        conversation = {
            "question": str(doc["prompt_id"]),
            "category": doc["category"],
            "turns": list(doc["prompt"]),
            "system": self._system,
            "generation": dict(self.config.generation_kwargs),
        }
        return Instance(
            request_type=REQUEST_TYPE,
            doc=doc,
            arguments=(ctx, conversation),
            idx=0,
            # lm-eval's own tools build single requests without it
            metadata=settings.get("metadata", (None, None, None)),
        )

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Measure the two answers; nothing with ``--predict_only``."""
        if "bypass" in self._metric_fn_list:
            return {"bypass": None}
        return process_results(doc, results)


def process_results(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Return the measures of one question's answers."""
    return measure(results[0])


def mean_of_known(values: Sequence[float]) -> float:
    """Return the mean of the values that are numbers; nan if none is."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _refuse(model: object, requests: object = None, disable_tqdm: bool = False) -> NoReturn:
    raise UnsupportedCallError(
        f"mt_bench generates conversations of two turns, which {type(model).__name__} cannot: run "
        "it with --model hf-act (artifact=none is the plain model)"
    )
