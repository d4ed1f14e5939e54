"""Documents that several processes share: how many there are, and what becomes of idle ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from act_harness.errors import InputError
from act_harness.harness import eval_checks
from act_harness.harness.eval_settings import EvalSettings
from act_harness.model import CalibratedHFLM

TASKS = [
    SimpleNamespace(task_name="large", eval_docs=range(100)),
    SimpleNamespace(task_name="small", eval_docs=range(3)),
]


class Several:
    """Processes of which nobody but this one is there."""

    def __init__(self, rank, count, others=()):
        self.rank, self.count, self.others = rank, count, others

    def first(self, count):
        return Several(self.rank, count) if self.rank < count else None

    def gather(self, value):
        return [value, *self.others]


def model(rank, count):
    found = SimpleNamespace(processes=Several(rank, count), world_size=count)
    found.share_work = lambda processes: setattr(found, "processes", processes)
    return found


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ({}, [100, 3]),
        ({"limit": 8}, [8, 3]),
        ({"limit": 0.015}, [2, 1]),  # lm-eval rounds a share up
        ({"samples": {"large": [4, 7]}}, [2, 3]),
    ],
)
def test_documents_are_counted_as_lm_eval_takes_them(given, counts):
    settings = EvalSettings(("large", "small"), **given)
    assert [eval_checks._documents(task, settings) for task in TASKS] == counts


def test_no_more_processes_than_documents_take_part():
    settings = EvalSettings(("large", "small"))
    lm = model(0, 5)
    with pytest.warns(UserWarning, match="a task has 3 documents, so 3 of 5 processes run"):
        eval_checks.leave_out_idle(lm, TASKS, settings)
    assert lm.processes.count == 3
    with pytest.raises(SystemExit) as ended:
        eval_checks.leave_out_idle(model(3, 5), TASKS, settings)
    assert ended.value.code == 0
    enough = model(1, 3)
    eval_checks.leave_out_idle(enough, TASKS, settings)
    assert enough.processes.count == 3


def test_a_process_without_documents_is_refused_before_lm_eval_waits_for_it():
    """lm-eval's own command line cannot leave a process out."""
    counts = [torch.tensor(4), torch.tensor(0)]
    lm = SimpleNamespace(processes=Several(0, 3, counts))
    with pytest.raises(InputError, match=r"3 processes .* fewer documents \(process 2 has none\)"):
        CalibratedHFLM.all_gather(lm, torch.tensor(4))
    lm.processes.others = counts[:1]
    assert CalibratedHFLM.all_gather(lm, torch.tensor(8)).tolist() == [8, 4]
