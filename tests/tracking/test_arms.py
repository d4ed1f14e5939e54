"""Arms on one loaded model object: each is what it says, whatever ran before it."""

from __future__ import annotations

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tracked_tasks import write_tasks
from transformers import AutoModelForCausalLM, AutoTokenizer

from act_harness.artifact import Artifact
from act_harness.attention import attach, model_facts
from act_harness.calibration import Calibration
from act_harness.model import CalibratedHFLM
from act_harness.scoring.scorer import Item, Scorer

ARMS = ("hf", "none", "first", "second")


@pytest.fixture(scope="module")
def load(tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)

    def load():
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
        return {"pretrained": model, "tokenizer": tokenizer}

    return load


@pytest.fixture(scope="module")
def artifacts(load):
    facts = model_facts(**{"model": load()["pretrained"], "tokenizer": load()["tokenizer"]})
    calibration = Calibration(alpha=1.5, decode="running")
    return {
        name: Artifact(name=name, model=facts, calibration=calibration, heads=heads)
        for name, heads in (("first", {0: (0, 2), 1: (1, 3)}), ("second", {2: (0, 1, 2, 3)}))
    }


@pytest.fixture(scope="module")
def evaluate(artifacts, tmp_path_factory):
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    tasks = TaskManager(include_path=str(folder), include_defaults=False)

    def evaluate(arm, given):
        more = {} if arm == "hf" else {"artifact": artifacts.get(arm, "none")}
        results = lm_eval.simple_evaluate(
            model="hf" if arm == "hf" else "hf-act",
            model_args={**given, **more},
            tasks=["org/choice", "talk"],
            task_manager=tasks,
            limit=2,
            batch_size=3,
            bootstrap_iters=0,
        )
        told = results["config"].get("act_harness")
        if told is not None:
            assert told["arm"] == ("baseline" if arm == "none" else arm)
            assert told["heads"] == {"none": 0, "first": 4, "second": 4}[arm]
        samples = results["samples"]
        return (
            [float(resp[0][0]) for row in samples["org/choice"] for resp in row["resps"]],
            [row["resps"][0][0] for row in samples["talk"]],
        )

    return evaluate


@pytest.mark.slow
def test_every_arm_on_one_object_gives_what_a_fresh_object_gives(load, evaluate):
    fresh = {arm: evaluate(arm, load()) for arm in ARMS}
    assert fresh["none"][0] == pytest.approx(fresh["hf"][0], abs=1e-4)
    assert fresh["none"][1] == fresh["hf"][1]
    for one, other in (("none", "first"), ("first", "second"), ("none", "second")):
        difference = max(abs(a - b) for a, b in zip(fresh[one][0], fresh[other][0], strict=True))
        assert difference > 1e-3
    given = load()
    model = given["pretrained"]
    kernel = model.config._attn_implementation
    for arm in ("none", "first", "second", "none", "hf", "first"):
        scores, texts = evaluate(arm, given)
        assert scores == pytest.approx(fresh[arm][0], abs=1e-5), arm
        assert texts == fresh[arm][1], arm
        assert model.config._attn_implementation == kernel
        assert "generate" not in model.__dict__
        assert not any("act_harness" in name for m in model.modules() for name in m.__dict__)


def likelihoods(pairs):
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=n)
        for n, pair in enumerate(pairs)
    ]


PAIRS = [("The cat sat on the", " mat"), ("The cat sat on the", " moon"), ("Then it", " ran")]


def answers(lm):
    """What each kind of request gives."""
    texts = likelihoods([("the cat sat on the mat and there it was",)])
    ask = [
        Instance("generate_until", {}, ("There was", {"until": ["zzz"], "max_gen_toks": 6}), n)
        for n in range(2)
    ]
    ids = torch.tensor([lm.tok_encode("Then it ran there")])
    return {
        "loglikelihood": [a for a, _ in lm.loglikelihood(likelihoods(PAIRS), disable_tqdm=True)],
        "rolling": lm.loglikelihood_rolling(texts, disable_tqdm=True),
        "generate": lm.generate_until(ask, disable_tqdm=True),
        "call": lm._model_call(ids)[0, -1].tolist(),
        "no mask": lm._model_generate(ids, ids.shape[1] + 4, ["zzz"]).tolist(),
    }


def same(found, want):
    for kind, value in want.items():
        if kind in ("generate", "no mask"):
            assert found[kind] == value, kind
        else:
            assert found[kind] == pytest.approx(value, abs=1e-4), kind


@pytest.mark.slow
def test_objects_on_one_model_answer_in_turns(load, artifacts):
    """All request types, and under a calibration that the user has in force himself."""
    makers = {
        "hf": lambda given: HFLM(**given, batch_size=2),
        "none": lambda given: CalibratedHFLM(**given, artifact="none", batch_size=2),
        "first": lambda given: CalibratedHFLM(**given, artifact=artifacts["first"], batch_size=2),
        "second": lambda given: CalibratedHFLM(**given, artifact=artifacts["second"], batch_size=2),
    }
    want = {arm: answers(make(load())) for arm, make in makers.items()}
    same(want["none"], want["hf"])
    assert want["first"]["call"] != pytest.approx(want["none"]["call"], abs=1e-4)
    given = load()
    model = given["pretrained"]
    objects = {arm: make(given) for arm, make in makers.items()}
    for arm in ("second", "first", "none", "hf", "first", "second"):
        same(answers(objects[arm]), want[arm])
    own = attach(model, artifacts["first"])
    ids = torch.tensor([objects["hf"].tok_encode("Then it ran there")])
    with torch.no_grad():
        before = model(ids).logits
        for arm in ("none", "second", "first"):
            same(answers(objects[arm]), want[arm])
            assert torch.equal(model(ids).logits, before)
    own.detach()
    same(answers(objects["hf"]), want["hf"])


def test_a_scorer_scores_the_arm_that_it_was_given(load, artifacts):
    """Also where something else is attached, or its attachment was taken off in between."""
    model = load()["pretrained"]
    items = [Item((5, 9, 3, 17, 40, 8), (7, 2)), Item((5, 9, 3, 17, 40, 8), (11,))]
    stock = Scorer(model).score(items)
    one = attach(model, artifacts["first"])
    first = Scorer(model, one).score(items)
    assert first[0].loglikelihood != pytest.approx(stock[0].loglikelihood, abs=1e-4)
    assert Scorer(model).score(items) == stock
    one.detach()
    assert Scorer(model, one).score(items) == first
    assert Scorer(model).score(items) == stock
