"""The one Python class behind the YAML files of this folder: where a task's rows come from.

lm-evaluation-harness reads a dataset with ``datasets.load_dataset(dataset_path, dataset_name)``.
This class does the same, except that it looks in the data directory first
(``ACT_HARNESS_DATA_DIR``, see :mod:`act_harness.harness.data_folder`) and that a dataset which
cannot be had ends in one line that names both ways out. Prompts, choices and metrics stay in the
YAML files; nothing here touches them.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.task import ConfigurableTask

from act_harness.harness.data_folder import load_rows

__all__ = ["HubTask"]


class HubTask(ConfigurableTask):
    """An ordinary YAML task whose rows may come from the data directory."""

    def __init__(self, config: dict[str, Any]) -> None:
        # lm-eval leaves the key that named this class in the settings; its task settings refuse it.
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: object) -> None:
        """Read the rows: from the task's own function, the data directory, or the hub.

        Raises:
            InfrastructureError: The dataset, or one of the splits that the task names, cannot be
                had.
        """
        settings = self.config
        if callable(settings.custom_dataset):
            self.dataset = settings.custom_dataset()
            return
        splits = (
            settings.training_split,
            settings.validation_split,
            settings.test_split,
            settings.fewshot_split,
        )
        self.dataset = load_rows(
            settings.dataset_path,
            settings.dataset_name,
            task=settings.task,
            splits=[split for split in splits if split],
            **(dataset_kwargs or {}),
        )
