"""What ``act-harness eval`` is asked for, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_harness.errors import InputError
from act_harness.evidence.calibrators import calibrator_names
from act_harness.support.checks import check_batch_size, check_count, check_limit, check_seed

if TYPE_CHECKING:
    from act_harness.artifact import Artifact

__all__ = ["EvalSettings"]


@dataclass(frozen=True)
class EvalSettings:
    """What ``act-harness eval`` was asked for."""

    tasks: tuple[str, ...]
    """Names, patterns, YAML files or folders, see
    :func:`act_harness.harness.task_lookup.find_tasks`."""
    pretrained: str | Path | None = None
    """Hub id or folder; the same as ``pretrained=`` in ``model_args``."""
    model_args: str | Mapping[str, Any] = ""
    """The model's arguments, as lm-eval takes them."""
    artifact: str | Path | Artifact = ""
    """Empty: ``artifact=`` of ``model_args``, or the one shipped artifact that fits."""
    include_path: tuple[str | Path, ...] = ()
    """Folders of further task files."""
    limit: float | None = None
    """Documents of each task: a number, or a share below 1."""
    samples: Mapping[str, Sequence[int]] | None = None
    """Documents to take by task, counted from 0; all of a task that is not named."""
    num_fewshot: int | None = None
    fewshot_seeds: tuple[int, ...] = (1234,)
    batch_size: int | str | None = None
    """None: ``batch_size=`` of ``model_args``, or 1."""
    device: str | None = None
    apply_chat_template: bool | str = False
    """True, or the name of one of the tokenizer's templates."""
    fewshot_as_multiturn: bool | None = None
    """Examples as turns of a conversation; None: yes with a chat template."""
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the tasks' own settings of generation."""
    predict_only: bool = False
    """Store the answers of both arms, compute no metric and compare nothing."""
    write_out: bool = False
    """Print the first prompts of every task."""
    trust_remote_code: bool = False
    confirm_run_unsafe_code: bool = False
    """Run tasks that execute what the model wrote."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Further settings for tasks that take them (RULER: ``max_seq_lengths``)."""
    calibrators: tuple[str, ...] = ("batch",)
    """Calibrations of the scores to have a column, see
    :data:`act_harness.evidence.calibrators.CALIBRATORS`; ``batch`` always has one, ``all`` stands
    for every one. Those that need further prompts ask them in both arms."""
    output: Path = Path("outputs")
    seed: int = 1234
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            InputError: A setting is out of range, or two of them exclude each other.
        """
        if isinstance(self.tasks, str):  # a name would be taken letter by letter
            object.__setattr__(self, "tasks", tuple(self.tasks.split(",")))
        object.__setattr__(self, "output", Path(self.output))
        check_limit(self.limit)
        check_count(self.num_fewshot, "--num-fewshot")
        check_seed(self.seed)
        check_batch_size(self.batch_size)
        if not self.fewshot_seeds:
            raise InputError("--fewshot-seeds names no seed; give at least one number")
        for seed in self.fewshot_seeds:
            check_seed(seed, "--fewshot-seeds")
        if len(set(self.fewshot_seeds)) < len(self.fewshot_seeds):
            raise InputError("--fewshot-seeds names a seed twice; its runs would be the same")
        if self.samples is not None:
            if self.limit is not None:
                raise InputError("--samples and --limit exclude each other; give one of them")
            object.__setattr__(self, "samples", _checked_samples(self.samples))
        object.__setattr__(self, "calibrators", calibrator_names(self.calibrators))
        if self.predict_only and len(self.calibrators) > 1:
            raise InputError("--calibrators and --predict-only exclude each other; give one")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise InputError("--fewshot-as-multiturn needs --apply-chat-template; give both")

    @property
    def multiturn(self) -> bool:
        """Whether few-shot examples are turns, as lm-eval's command line decides it."""
        if self.fewshot_as_multiturn is None:
            return bool(self.apply_chat_template)
        return self.fewshot_as_multiturn


def _checked_samples(samples: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return document numbers in order, each once: lm-eval takes them in the order of the data."""
    checked = {}
    for task, numbers in samples.items():
        if not isinstance(numbers, (list, tuple)) or not numbers:
            raise InputError(
                f"--samples gives no list of documents for {task!r}; expected "
                '{"TASK": [0, 1, 2]}, counted from 0'
            )
        for number in numbers:
            if number is None:
                raise InputError(f"--samples of {task!r} holds null, expected whole numbers")
            check_count(number, f"--samples of {task!r}")
        checked[task] = sorted(set(numbers))
    return checked
