"""The one Python class behind the YAML files of this folder: where a task's rows come from.

lm-evaluation-harness reads a dataset with ``datasets.load_dataset(dataset_path, dataset_name)``.
This class does the same, except that it looks in the data directory first
(``ACT_HARNESS_DATA_DIR``, see :mod:`act_harness.fetch`) and that a dataset which cannot be had
ends in one line that names both ways out. Prompts, choices and metrics stay in the YAML files;
nothing here touches them.
"""

from __future__ import annotations

from typing import Any

from act_harness.fetch import load_rows
from lm_eval.api.task import ConfigurableTask

__all__ = ["HubTask"]


class HubTask(ConfigurableTask):
    """An ordinary YAML task whose rows may come from the data directory."""

    def __init__(self, config: dict[str, Any]) -> None:
        # lm-eval leaves the key that named this class in the settings; its task settings refuse it.
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: object) -> None:
        """Read the rows: from the task's own function, the data directory, or the hub."""
        if callable(self.config.custom_dataset):
            self.dataset = self.config.custom_dataset()
        else:
            self.dataset = load_rows(
                self.config.dataset_path,
                self.config.dataset_name,
                task=self.config.task,
                **(dataset_kwargs or {}),
            )
