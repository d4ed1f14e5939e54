"""A model whose heads are split over processes (``tp_plan``) gives what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import parallel_child
import pytest
import torch
from installed import REPOSITORY
from transformers import AutoModelForCausalLM, LlamaConfig

from act_harness.artifact import Artifact
from act_harness.attention import attach, model_facts, weights_fingerprint
from act_harness.attention.parallel import (
    HeadGroup,
    HeldHeads,
    check_even_share,
    check_shared,
    refuse_parts,
)
from act_harness.calibration import Calibration, HeadStrength, LayerPlan
from act_harness.engines.geometry import Geometry
from act_harness.engines.targets import drawn_columns
from act_harness.errors import InfrastructureError, InputError, UnsupportedModelError

TESTS = REPOSITORY / "tests"


# -- heads and their numbers -------------------------------------------------------------------


def test_a_part_of_a_plan_has_its_heads_and_their_strengths():
    strengths = tuple(HeadStrength(mass="damp", beta=number / 10) for number in (1, 2, 3))
    plan = LayerPlan(Calibration(), (1, 4, 6), strengths, layer=5)
    assert plan.part(0, 4) == LayerPlan(Calibration(), (1,), strengths[:1], 5, 0)
    assert plan.part(4, 4) == LayerPlan(Calibration(), (0, 2), strengths[1:], 5, 4)
    assert plan.part(4, 4).part(2, 2) == LayerPlan(Calibration(), (0,), strengths[2:], 5, 6)
    assert plan.part(2, 2).heads == ()


def test_columns_are_drawn_by_a_heads_number_in_the_whole_model():
    calibration = Calibration(alpha=2.0, target="random")
    plan = LayerPlan.uniform(calibration, (1, 4, 6))
    real = torch.ones(2, 9, dtype=torch.bool)
    geometry = Geometry(
        real=real, prompt=real, first_row=0, first_column=0, columns=9,
        ids=torch.arange(18).view(2, 9),
    )  # fmt: skip
    whole = drawn_columns(geometry, plan, torch.full((2, 3), 3))
    part = drawn_columns(geometry, plan.part(4, 4), torch.full((2, 2), 3))
    assert torch.equal(part, whole[:, 1:])
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_one_process_holds_all_heads():
    group = HeadGroup.of(SimpleNamespace(tp_size=None))
    assert group.held({3: 4, 7: 8}, LlamaConfig()) == {3: HeldHeads(0, 4, 4), 7: HeldHeads(0, 8, 8)}
    assert group.least(3) == 3
    assert group.as_first("a") == "a"


@pytest.mark.parametrize(("rank", "first"), [(0, 0), (1, 4)])
def test_heads_are_numbered_over_the_processes(monkeypatch, rank, first):
    group = HeadGroup(rank, 2)
    monkeypatch.setattr(HeadGroup, "_all", lambda _, own: [own, own])
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=8)
    assert group.held({0: 4}, config) == {0: HeldHeads(first, 4, 8)}
    assert group.held({1: 8}, config) == {1: HeldHeads(0, 8, 8, counted=rank == 0)}
    with pytest.raises(UnsupportedModelError, match="layer 1 has 8 heads, of which 2 processes"):
        group.held({1: 3}, config)


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "keys", "size", "instead"),
    [
        (9, 3, 2, "; start 3 processes, or load it without tp_plan"),
        (12, 6, 4, "; start 2 or 3 or 6 processes, or"),
        (4, 1, 2, "; load it without tp_plan"),
    ],
)
def test_heads_are_not_cut_apart(heads, keys, size, instead):
    config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=keys, hidden_size=heads * 8)
    with pytest.raises(
        UnsupportedModelError, match=f"{size} processes cannot share evenly{instead}"
    ):
        check_even_share(config, size, "It")
    check_even_share(config, keys, "It")


def test_numbers_of_processes_are_checked_before_weights_are_read(tiny_checkpoint, monkeypatch):
    from act_harness.model import CalibratedHFLM

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UnsupportedModelError, match="4 query and 2 key heads in a layer, which 3"):
        CalibratedHFLM(str(tiny_checkpoint), artifact="none", tp_plan="auto", device="cpu")


def test_one_process_does_without_a_plan(tiny_checkpoint, monkeypatch):
    from act_harness.model import CalibratedHFLM

    monkeypatch.delenv("RANK", raising=False)
    with pytest.warns(UserWarning, match="tp_plan does nothing in one process; start several"):
        lm = CalibratedHFLM(str(tiny_checkpoint), artifact="none", tp_plan="auto", device="cpu")
    assert lm.leads
    assert not lm.head_group.is_split


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tp_plan": "autp"}, "tp_plan=autp is unknown, expected auto.*did you mean 'auto'"),
        ({"tp_plan": "auto", "parallelize": True}, "tp_plan and parallelize cannot be used"),
        ({"tp_plan": "auto", "peft": "folder"}, "tp_plan and peft cannot be used"),
    ],
)
def test_plans_that_cannot_be_used_are_refused(tiny_checkpoint, given, said):
    from act_harness.model import CalibratedHFLM

    with pytest.raises(InputError, match=said):
        CalibratedHFLM(str(tiny_checkpoint), artifact="none", device="cpu", **given)


class _Mesh:
    def __init__(self, *sizes):
        self.ndim, self._sizes = len(sizes), sizes

    def size(self):
        return int(torch.tensor(self._sizes).prod())

    def __getitem__(self, name):
        return _Mesh(self._sizes[-1])

    def get_local_rank(self):
        return 0

    def get_group(self):
        return None


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (None, "says that 2 processes hold its heads and not which"),
        (_Mesh(1, 2, 2), "spread over 4 processes in several ways, 2 of which share its heads"),
    ],
)
def test_processes_that_cannot_be_told_apart_are_refused(tiny, make_artifact, mesh, said):
    model = tiny()
    artifact = make_artifact(model)
    model._tp_size, model._device_mesh = 2, mesh
    with pytest.raises(UnsupportedModelError, match=said):
        attach(model, artifact)
    with pytest.raises(UnsupportedModelError, match=r"over 2 processes, .* and a search needs all"):
        refuse_parts(model, "a search")


def test_a_head_that_is_joined_and_whole_is_refused(tiny):
    """LFM2's plan in transformers 5.23, whose logits are off by 0.9 on two processes."""
    model = tiny(tie_word_embeddings=True)
    model._tp_size, model._device_mesh = 2, _Mesh(2)
    assert check_shared(model) == HeadGroup(0, 2)
    model.lm_head._is_hooked = True
    with pytest.raises(UnsupportedModelError, match="tied to the embeddings, is whole in each"):
        check_shared(model)


def test_parts_of_weights_are_not_hashed_as_if_they_were_whole(tiny):
    model = tiny()
    model._tp_size = 2
    assert weights_fingerprint(model) is None


def test_a_process_that_runs_out_of_memory_does_not_go_on_alone():
    with (
        pytest.raises(InfrastructureError, match=r"process 1 of 2 .*give a smaller batch_size"),
        HeadGroup(1, 2).out_of_memory_together(),
    ):
        raise torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError), HeadGroup().out_of_memory_together():
        raise torch.OutOfMemoryError("out of memory")


# -- two processes -----------------------------------------------------------------------------


def save_artifacts(checkpoint, folder):
    """Head sets: of both processes' heads, of one process's alone, and drawn by head numbers."""
    facts = model_facts(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    made = {
        "some": (
            {0: (0, 3), 1: (1,), 2: (2, 3)},
            {},
            {0: {3: HeadStrength(mass="damp", beta=0.1)}},
        ),
        "one": ({1: (0,)}, {"decode": "running"}, None),
        "drawn": ({0: (2,), 1: (0, 3)}, {"target": "random"}, None),
    }
    return {
        name: Artifact(
            name=name, model=facts, calibration=Calibration(alpha=1.5, **settings), heads=heads,
            strengths=strengths,
        ).save(folder / f"{name}.json")
        for name, (heads, settings, strengths) in made.items()
    }  # fmt: skip


def assert_close(found, expected, place):
    """Compare nested values: numbers to 1e-4, everything else as it is."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_close(found[key], value, f"{place} {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for one, value in zip(found, expected, strict=True):
            assert_close(one, value, place)
    elif isinstance(expected, str) and isinstance(found, str):
        if expected != found:  # lm-eval writes numbers as text
            assert float(found) == pytest.approx(float(expected), abs=1e-4), place
    else:
        assert found == pytest.approx(expected, abs=1e-4), place


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tiny_checkpoint, tmp_path):
    """Scores, records, words and files; in both arms, packed and over the cache."""
    paths = save_artifacts(tiny_checkpoint, tmp_path)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{TESTS}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(TESTS / "parallel_child.py"), str(tiny_checkpoint), str(tmp_path),
         *map(str, paths.values())],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    (tmp_path / "alone").mkdir()
    alone = json.loads(json.dumps(parallel_child.look(tiny_checkpoint, tmp_path / "alone", paths)))
    for rank, one in enumerate(both):
        own = one["here"]
        assert own["ranks"] == [rank, 2]
        assert (own["least"], own["first"]) == (4, 0)
        assert "a part of the heads, and the search needs all" in own["refused"]
        found = one["found"]
        if rank:  # it computes what the first one does, and writes nothing
            assert found.pop("evaluation") == {"code": 0}
            assert found["talks"].pop("files") == []
            assert not list((tmp_path / "1").rglob("results_*"))
        assert_close(found, _of_others(alone) if rank else alone, "")
    assert alone["some: shared"]["scores"] != pytest.approx(
        alone["baseline: shared"]["scores"], abs=1e-3
    )
    assert alone["some: shared"]["packed"] > 0
    assert alone["gathered"]["records"] == alone["some: shared"]["records"]


def _of_others(alone):
    """Return what a process finds that does not lead."""
    talks = {key: value for key, value in alone["talks"].items() if key != "files"}
    return {**{key: value for key, value in alone.items() if key != "evaluation"}, "talks": talks}
