"""A search by gradient: what it minimises, how it continues, what it writes, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gradient_runs import DRAWN, recipe, search
from tiny_search import tiny

from act_harness.artifact import load_artifact
from act_harness.errors import RecipeError
from act_harness.search import by_gradient, tuning
from act_harness.search.compute import training
from act_harness.search.compute.gradient import StrengthenedModel
from act_harness.search.compute.objective import objective_loss
from act_harness.search.compute.read_rows import tokens_of
from act_harness.search.compute.training import Training
from act_harness.search.documents import Document
from act_harness.search.recipe import load_recipe, make_recipe
from act_harness.search.run import stable_content
from act_harness.search.tuning import looked_at
from act_harness.support.atomic import canonical_json
from act_harness.support.processes import Processes


def test_objectives_by_hand():
    scores = torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    right = torch.tensor([0, 0])
    # plain differences right - wrong are 1 and -1; the means are 2 and 2, so nothing changes
    plain = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2
    assert float(objective_loss(scores, right, objective="margin", fixed=True)) == pytest.approx(
        plain
    )
    shifted = scores + torch.tensor([5.0, 0.0])  # a label prior: gone under 'corrected'
    for fixed, wanted in ((True, plain), (False, None)):
        found = objective_loss(shifted, right, objective="corrected", fixed=fixed)
        other = (math.log1p(math.exp(-6)) + math.log1p(math.exp(-4))) / 2
        assert float(found) == pytest.approx(other if wanted is None else wanted)
    hot = objective_loss(
        scores, right, objective="margin", fixed=True, log_temperature=torch.tensor(2.0).log()
    )
    assert float(hot) == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2)
    share = 1 / (1 + math.exp(-1))
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    found = objective_loss(shifted, right * 0 - 1, objective="entropy", fixed=True)
    assert float(found) == pytest.approx(entropy)


def test_a_missing_choice_is_no_choice_and_no_trap_for_gradients():
    scores = torch.tensor([[1.0, 0.0, -math.inf], [0.0, 0.0, 0.0]], requires_grad=True)
    log_temperature = torch.zeros((), requires_grad=True)
    for objective, wanted in (
        ("margin", (math.log1p(math.exp(-1)) + math.log(3)) / 2),
        ("entropy", (0.582203 + math.log(3)) / 2),
    ):
        loss = objective_loss(
            scores, torch.tensor([0, 1]), objective=objective, fixed=False,
            log_temperature=log_temperature,
        )  # fmt: skip
        assert float(loss.detach()) == pytest.approx(wanted, abs=1e-5)
        (slope,) = torch.autograd.grad(loss, scores)
        assert torch.isfinite(slope).all()
        assert slope[0, 2] == 0


def trained(tokens, *, objective="corrected", signs="both", **settings):
    given = recipe(gradient={"signs": signs, **settings}, objective=objective)
    with StrengthenedModel(tiny().double(), given.tuned_calibration()) as opened:
        made = Training(
            opened,
            {one.task: one.search for one in DRAWN},
            given.gradient,
            objective=objective,
            seed=3,
            tokens=tokens,
            processes=Processes(),
            grid={0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 2: (1, 3)},
        )
        state = made.start(0)
        losses = [made.epoch(state, n, restart=0, penalty=1e-3) for n in range(4)]
    return state, losses


def test_training_lowers_the_loss_whatever_the_size_of_a_forward():
    whole, losses = trained(4096)
    single, same = trained(1)
    assert losses[-1] < losses[0] - 0.01
    np.testing.assert_allclose(losses, same, rtol=1e-4)
    torch.testing.assert_close(whole.theta, single.theta, atol=1e-3, rtol=1e-3)
    assert (whole.theta[0, 2, [0, 2]] == 0).all()  # heads outside the grid
    assert (whole.theta[0, :2].abs() > 0.01).float().mean() > 0.8


def test_signs_hold_after_every_step():
    for signs, fits in (("damp", lambda t: t <= 0), ("amplify", lambda t: t >= 0)):
        theta = trained(4096, signs=signs)[0].theta.detach()
        assert fits(theta).all()
        assert (theta != 0).any()


def test_entropy_learns_no_temperature():
    """It could be made as small as one likes by that alone."""
    state, losses = trained(4096, objective="entropy", batch=8)
    assert (state.log_temperature == 0).all()
    assert losses[-1] < losses[0]
    assert (trained(4096)[0].log_temperature != 0).all()


def test_tasks_count_alike_and_the_penalty_is_added(monkeypatch):
    slopes = []
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: slopes.append(
            self.param_groups[0]["params"][0].grad.clone()
        )
    )  # fmt: skip
    given = recipe(gradient={"batch": 8, "restarts": 2}, objective="margin")
    with StrengthenedModel(tiny().double(), given.tuned_calibration()) as opened:
        grid = dict.fromkeys(range(3), (0, 1, 2, 3))
        for tasks, penalty in ((DRAWN[:1], 0.0), (DRAWN[1:], 0.0), (DRAWN, 0.0), (DRAWN, 0.5)):
            made = Training(
                opened, {one.task: one.search for one in tasks}, given.gradient,
                objective="margin", seed=3, tokens=4096, processes=Processes(), grid=grid,
            )  # fmt: skip
            state = made.start(1)
            made._step(state, {one.task: list(range(8)) for one in tasks}, penalty)
    first, second, both, with_penalty = slopes
    torch.testing.assert_close(both, (first + second) / 2)
    torch.testing.assert_close(with_penalty - both, 0.5 * state.theta.sign())


def test_the_artifact_says_what_was_tuned_and_is_worth(tmp_path):
    result = search(tmp_path, recipe(objective="entropy"))  # which no text can keep from falling
    artifact = load_artifact(tmp_path / "out.json")
    found = artifact.search
    assert artifact.head_count() == len(result.selection.places) > 0
    assert artifact.calibration.mass == "reweight"
    theta = {(row[0], row[1]): row[2] for row in found["table"]["heads"]["rows"]}
    for layer, heads in artifact.heads.items():
        for head in heads:
            own = artifact.strengths[layer][head]
            assert math.log(own.gamma) == pytest.approx(theta[layer, head], abs=1e-5)
    kept = {(layer, head) for layer, heads in artifact.heads.items() for head in heads}
    least = min(abs(theta[place]) for place in kept)
    assert all(abs(theta[place]) <= least for place in set(theta) - kept)
    assert len(found["training"]) == 4
    assert found["rule"]["name"] == "gradient"
    # 4 epochs of a forward and a backward (2), one forward for the baseline
    assert found["forward_equivalents"]["search"] == 13
    assert found["forward_equivalents"]["verify"] == 4 + len(found["rule"]["tried"])
    assert found["judgement"]["documents"] == {"a": 8, "b": 8}
    assert len(found["judgement"]["columns"]["raw"]["random_sets"]["scores"]) == 2
    assert found["judgement"]["verdict"] in result.summary()


@pytest.mark.slow
def test_kernels_add_up_columns_where_the_recipe_names_them(tmp_path):
    """By Triton's interpreter."""
    pytest.importorskip("triton")
    from act_harness.engines.triton import TritonEngine

    calls = []
    sums = TritonEngine.column_sums

    def counted(self, *args, **kwargs):
        calls.append(1)
        return sums(self, *args, **kwargs)

    few = [dataclasses.replace(one, search=one.search[:2], judge=()) for one in DRAWN]
    few = [dataclasses.replace(one, verify=one.verify[:2]) for one in few]
    given = {"objective": "entropy", "gradient": {"epochs": 1, "batch": 2}, "chunk_tokens": 4096}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TritonEngine, "column_sums", counted)
        search(tmp_path / "auto", recipe(**given), few)
        assert not calls
        found = search(tmp_path / "named", recipe(engine="triton", **given), few).artifact
        assert calls
    assert found.heads == load_artifact(tmp_path / "auto" / "out.json").heads != {}


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_killed_search_goes_on_to_the_same_artifact(tmp_path, monkeypatch, epochs):
    given = recipe(objective="entropy")
    whole = search(tmp_path / "whole", given).artifact
    assert whole.heads
    epoch, done = Training.epoch, []

    def dying(self, *args, **kwargs):
        if len(done) == epochs:
            raise KeyboardInterrupt
        done.append(1)
        return epoch(self, *args, **kwargs)

    monkeypatch.setattr(training.Training, "epoch", dying)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "killed", given)
    monkeypatch.setattr(training.Training, "epoch", epoch)
    again = search(tmp_path / "killed", given)
    assert again.artifact.search["run"]["units_from_ledger"] > epochs
    assert canonical_json(stable_content(again.artifact)) == canonical_json(stable_content(whole))


def test_tasks_scored_together_are_so_again_where_one_was_not_kept(tmp_path, monkeypatch):
    """Another batch rounds otherwise, and a continued search is to find the same."""
    given, together = recipe(chunk_tokens=4096), []

    def seen(opened, documents, *args, **kwargs):
        together.append([document.task for document in documents])
        return training.score_rows(opened, documents, *args, **kwargs)

    monkeypatch.setattr(tuning, "score_rows", seen)
    whole = search(tmp_path, given).artifact
    first = together[0]
    assert set(first) == {"a", "b"}
    (part,) = (tmp_path / "ledgers").glob("*/part-*.jsonl")
    lines = part.read_text().splitlines(keepends=True)
    assert json.loads(lines[0])["key"] == ["strengths", "verify", "untouched", "a"]
    part.write_text(lines[0])  # killed between the two tasks
    together.clear()
    again = search(tmp_path, given).artifact
    assert together[0] == first
    assert part.read_text().splitlines(keepends=True)[0] == lines[0]
    assert canonical_json(stable_content(again)) == canonical_json(stable_content(whole))


def test_random_sets_are_controls_where_they_cost_no_more_than_tuning(tmp_path):
    free = {key: value for key, value in recipe().content().items() if value is not None}
    del free["controls"]
    for epochs, count in ((9, 0), (10, 19)):  # 19 x 16 documents, an epoch is 2 x 16
        given = make_recipe({**free, "objective": "entropy", "gradient": {
            **free["gradient"], "epochs": epochs, "batch": 8,
        }})  # fmt: skip
        result = search(tmp_path / str(epochs), given)
        drawn = result.artifact.search["judgement"]["columns"]["raw"]["random_sets"]["scores"]
        assert len(drawn) == count == result.artifact.search["recipe"]["controls"]["random_sets"]
        assert ("held against no random head sets" in result.summary()) == (count == 0)


def test_verify_is_looked_at_as_often_as_training_pays_for():
    few = [dataclasses.replace(one, search=one.search[:4]) for one in DRAWN]
    given = recipe(gradient={"epochs": 10})
    assert looked_at(given, DRAWN) == list(range(10))
    assert looked_at(given, few) == [1, 3, 5, 7, 9]  # 16 documents, an epoch costs 16 forwards


@pytest.mark.parametrize(
    ("tokens_that_fit", "changes", "size", "again"),
    [
        (100_000, {}, 32768, False),
        (5000, {}, 5000, False),  # a smaller forward before computing again
        (20, {}, 32768, True),  # one task's batch of documents is held whole
        (5000, {"chunk_tokens": 8192}, 8192, True),  # as asked for, and then it does not fit
        (5000, {"chunk_tokens": 4096}, 4096, False),
        (20, {"gradient": {"checkpointing": False}}, None, False),
        (20, {"gradient": {"checkpointing": False, "batch": 5}}, None, False),  # all 8 at once
        (100_000, {"gradient": {"checkpointing": True}}, 32768, True),
    ],
)
def test_a_forward_on_a_gpu_is_what_half_of_its_memory_holds(
    monkeypatch, tokens_that_fit, changes, size, again
):
    kept = 3 * (12 * 32 + 3.5 * 48) * 4  # bytes of a token: three layers of the tiny model
    card = SimpleNamespace(total_memory=2 * kept * tokens_that_fit + 1)
    monkeypatch.setattr(by_gradient, "input_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    most = max(sum(map(tokens_of, one.search)) for one in DRAWN)  # a task's batch is all of it
    given = make_recipe({"tasks": ["a", "b"], "method": "gradient", **changes})
    found, computed_again = by_gradient._sized(given, tiny(), DRAWN, Processes())
    assert (found.chunk_tokens, computed_again) == (most if size is None else size, again)
    assert 20 < most < 4096


def test_processes_take_the_sizes_of_the_smallest_card(monkeypatch):
    """Batches are dealt out by number, so all must cut the same ones."""

    class Two(Processes):
        def gather(self, value):
            return [value, 5000]

    card = SimpleNamespace(total_memory=1 << 40)
    monkeypatch.setattr(by_gradient, "input_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    given = make_recipe({"tasks": ["a", "b"], "method": "gradient"})
    found, computed_again = by_gradient._sized(given, tiny(), DRAWN, Two(0, 2))
    assert (found.chunk_tokens, computed_again) == (5000, False)


def test_few_documents_are_verified_by_few_unless_a_recipe_says_otherwise():
    own = {"name": "x", "tasks": ["a"], "method": "gradient", "samples": 12}
    found = make_recipe(own)
    assert (found.verify_samples, found.judge_documents()) == (48, 100)
    assert make_recipe({**own, "judge_samples": 0}).judge_documents() == 0
    assert make_recipe({**own, "verify_samples": 70}).judge_documents() == 70
    assert make_recipe({**own, "samples": 25}).verify_samples == 100
    assert make_recipe({**own, "method": "exhaustive"}).verify_samples == 100


def test_entropy_needs_no_labels_and_corrected_does(tmp_path):
    def blind(documents):
        return tuple(dataclasses.replace(one, right=-1) for one in documents)

    unlabelled = [
        dataclasses.replace(one, search=blind(one.search), verify=blind(one.verify))
        for one in DRAWN
    ]
    unlabelled[1] = dataclasses.replace(unlabelled[1], judge=blind(unlabelled[1].judge))
    with pytest.raises(RecipeError, match=r"has no label, objective 'corrected' needs one; take"):
        search(tmp_path, recipe(objective="corrected"), unlabelled)
    found = search(tmp_path, recipe(objective="entropy"), unlabelled).artifact
    assert found.heads
    assert "not judged on b: documents without a label" in found.search["notes"]
    assert [*found.search["judgement"]["documents"]] == ["a"]


def test_a_task_with_one_choice_is_refused(tmp_path):
    alone = Document("a", "00000001", (((1, 2, 3), (4,)),), 0)
    single = dataclasses.replace(DRAWN[0], search=(alone, *DRAWN[0].search[1:]))
    with pytest.raises(RecipeError, match="document 00000001 of task 'a' has one choice"):
        search(tmp_path, documents=[single, DRAWN[1]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "gradients"}, r"method: found 'gradients', expected 'exhaustive', 'screened'"),
        ({"objective": "accuracy"}, r"objective: found 'accuracy', expected 'margin', 'corrected'"),
        ({"gradient": {"target": "span"}}, r"gradient.target: found 'span', expected"),
        ({"rule": "top"}, "rule does nothing with method 'gradient'"),
        ({"method": "screened"}, "gradient belongs to method 'gradient', not to 'screened'"),
        ({"gradient": {"penalties": []}}, "penalties are"),
        ({"calibration": {"decode": "running"}}, "takes decode 'frozen' or 'off'"),
        ({"verify_samples": 0}, "verify_samples is 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(changes, words):
    with pytest.raises(RecipeError, match=words) as caught:
        recipe(**changes)
    assert "\n" not in str(caught.value)


def test_a_change_of_the_method_that_is_no_settings_is_refused_in_a_line():
    with pytest.raises(RecipeError, match=r"recipe .*joint-sinks.yaml.*gradient"):
        load_recipe("joint-sinks", gradient="fast")


def test_other_methods_keep_their_ledgers_and_hashes():
    """The new settings are no part of a recipe that does not read them."""
    plain = make_recipe({"name": "x", "tasks": ["a"]})
    assert "gradient" not in plain.content()
    assert "gradient" not in plain.measured()
    mine = recipe().content()
    assert not {"rule", "top", "strengths", "keep"} & set(mine)
    assert make_recipe({key: value for key, value in mine.items() if value is not None})
