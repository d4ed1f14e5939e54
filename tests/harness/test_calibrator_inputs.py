"""``act-harness eval --calibrators``: what is asked beside the documents, stored and compared."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from importlib.util import find_spec
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from own_tasks import few_tasks
from transformers import AutoModelForCausalLM, AutoTokenizer

from act_harness.artifact import Artifact, load_artifact
from act_harness.calibration import Calibration
from act_harness.errors import InputError
from act_harness.evidence.calibrators import CalibratorInputs, option_prior
from act_harness.evidence.choices import label_prior_corrected
from act_harness.evidence.compare import compare
from act_harness.evidence.results import load_run
from act_harness.evidence.samples import choice_scores
from act_harness.evidence.scaling import fit_scaling
from act_harness.harness import calibrator_inputs as inputs
from act_harness.harness.calibrator_inputs import (
    CONTENT_FREE,
    InputsOfArm,
    Prompts,
    labelled_documents,
    premise_of,
)
from act_harness.harness.eval_settings import EvalSettings
from act_harness.harness.evaluate import run_eval
from act_harness.harness.run_files import write_run
from act_harness.harness.task_lookup import find_tasks
from act_harness.search.command import search_documents
from act_harness.search.prompting import Prompting
from act_harness.search.recipe import Recipe

TASK = "act_demo_sentiment"
PLAIN = Prompts(Prompting(), None)


# -- prompts without a model -----------------------------------------------------------------------


@pytest.mark.parametrize(("contexts", "premise"), [
    (["Question: Why?\nAnswer:", "Question: Who is it?\nAnswer:"], "Answer:"),
    (["A?\nAnswer:<end>\n<assistant>\n", "B?\nAnswer:<end>\n<assistant>\n"],
     "Answer:<end>\n<assistant>\n"),
    (["It rained because", "She sang because"], "because"),
    (["The sun is a", "Cats like the ba"], ""),
    (["abc\nAnswer:", "Answer:"], ""),  # "Answer:" alone begins before its line does
])  # fmt: skip
def test_the_premise_is_the_common_end(contexts, premise):
    assert premise_of(contexts) == premise


def test_texts_are_emptied_but_for_choices():
    doc = {"text": "good", "label": 1, "inner": {"rows": ["x", " A "], "n": 2.5}, "none": None}
    assert inputs._emptied(doc, "N/A", {"A"}) == {
        "text": "N/A", "label": 1, "inner": {"rows": ["N/A", " A "], "n": 2.5}, "none": None,
    }  # fmt: skip


def test_options_are_rotated_wherever_they_stand():
    letters = (" A", " B", " C")
    doc = {
        "q": "?", "choices": {"label": ["A", "B", "C"], "text": ["one", "two", "three"]},
        "A": "x", "B": "y", "C": "z", "numbers": [1, 2, 3],
    }  # fmt: skip
    turned = inputs._turned(doc, letters, 1)
    assert turned["choices"] == {"label": ["A", "B", "C"], "text": ["three", "one", "two"]}
    assert (turned["A"], turned["B"], turned["C"]) == ("z", "x", "y")
    assert turned["numbers"] == [1, 2, 3]
    assert inputs._turned(doc, letters, 0) == doc


# -- a model that is known -------------------------------------------------------------------------


class Letters:
    """A model with a prior over letters, and an opinion about the option that one shows."""

    PRIOR = MappingProxyType({"A": 0.5, "B": 0.3, "C": 0.2})
    KNOWN = MappingProxyType({"red": 0.6, "green": 0.3, "blue": 0.1})

    def __init__(self):
        self.counters, self.requests = SimpleNamespace(asked=0), []
        self.asked = []

    def alone(self):
        return nullcontext()

    def loglikelihood(self, requests):
        found = []
        for request in requests:
            context, letter = request.args
            self.asked.append((context, letter))
            shown = dict(line.split(". ") for line in context.splitlines() if ". " in line)
            known = self.KNOWN.get(shown.get(letter.strip()), 1.0)
            found.append((float(np.log(self.PRIOR[letter.strip()] * known)), False))
        return found


class Colours:
    """As much of a task as is asked for."""

    task_name = "colours"

    def __init__(self, template="{q}\nA. {o[0]}\nB. {o[1]}\nC. {o[2]}\nAnswer:"):
        self.template = template

    def get_config(self, key):
        return {"output_type": "multiple_choice", "num_fewshot": 0}[key]

    def set_fewshot_seed(self, seed):
        assert seed == 1234

    def doc_to_prefix(self, doc):
        return ""

    def fewshot_context(self, doc, **_):
        return self.template.format(q=doc["q"], o=doc["o"])

    def rows(self, count):
        docs = [{"q": f"Which {n}?", "o": ["red", "green", "blue"]} for n in range(count)]
        return [
            {"doc_id": n, "doc": doc, "doc_hash": str(n), "filter": "none",
             "arguments": [(self.fewshot_context(doc), f" {c}") for c in "ABC"]}
            for n, doc in enumerate(docs)
        ]  # fmt: skip


def collected(task, rows, *names):
    lm = Letters()
    before = lm.counters
    found = InputsOfArm(lm, names, PLAIN, {}).collect([task], {task.task_name: rows})
    assert lm.counters is before
    return lm, found


def test_a_models_prior_over_letters_is_found():
    task = Colours()
    lm, found = collected(task, task.rows(30), "batch", "pride")
    rotated = np.array(found["colours"]["rotated"])
    assert rotated.shape == (20, 3, 3)  # five percent would be two documents
    assert len(lm.asked) == 180
    # Rows: what the letters show after 0, 1 and 2 turns.
    flat = np.array([[p * k for p, k in zip((0.5, 0.3, 0.2), turn, strict=True)] for turn in (
        (0.6, 0.3, 0.1), (0.1, 0.6, 0.3), (0.3, 0.1, 0.6))])  # fmt: skip
    assert np.exp(rotated[0]) == pytest.approx(flat)
    assert np.exp(option_prior(rotated)) == pytest.approx([0.5, 0.3, 0.2])


def test_content_free_and_premise_of_letters():
    task = Colours()
    lm, found = collected(task, task.rows(3), "content-free", "domain-pmi")
    contexts = list(dict.fromkeys(context for context, _ in lm.asked))
    assert contexts == [
        *(f"{text}\nA. {text}\nB. {text}\nC. {text}\nAnswer:" for text in CONTENT_FREE),
        # the documents share their options, so these are part of the end
        "A. red\nB. green\nC. blue\nAnswer:",
    ]
    assert np.exp(found["colours"]["content_free"]) == pytest.approx(
        np.tile([0.5, 0.3, 0.2], (3, 1))
    )
    assert found["colours"]["premise"] == pytest.approx(
        {" A": np.log(0.3), " B": np.log(0.09), " C": np.log(0.02)}
    )


def test_what_does_not_apply_is_said(caplog):
    fixed = Colours("{q}\nAnswer:")  # options that no prompt shows
    with caplog.at_level(logging.WARNING):
        _, found = collected(fixed, fixed.rows(4), "pride", "supervised", "domain-pmi")
    assert list(found["colours"]) == ["premise"]
    assert "no pride for colours: its documents have no options behind fixed letters" in caplog.text
    assert "no supervised for colours: the search saw no documents of it" in caplog.text
    caplog.clear()
    rows = fixed.rows(4)
    rows[0]["arguments"] = rows[0]["arguments"][:2]
    with caplog.at_level(logging.WARNING):
        _, found = collected(fixed, rows, "content-free", "pride")
    assert found == {}
    assert "no content-free for colours: its choices differ by document" in caplog.text


# -- a whole evaluation ----------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _few_tasks():
    with few_tasks():
        yield


demo = pytest.mark.skipif(find_spec("vaderSentiment") is None, reason="demo needs vaderSentiment")


@pytest.fixture(scope="module")
def searched(tiny_checkpoint, tmp_path_factory):
    """An artifact that names the documents of its search, without the search."""
    from act_harness.model import CalibratedHFLM

    lm = CalibratedHFLM(str(tiny_checkpoint), artifact="none", dtype="float32", device="cpu")
    recipe = Recipe(tasks=(TASK,), samples=10, verify_samples=6, judge_samples=0)
    (drawn,) = search_documents(recipe, lm)
    splits = {
        split: {"n": len(drawn.of(split)), "sha256": drawn.digest(split)}
        for split in ("search", "verify")
    }
    artifact = Artifact(
        name="searched", model=lm.facts, calibration=Calibration(alpha=1.5, beta=0.0),
        heads={0: (0, 1, 2), 1: (1, 3), 2: (0, 1)},
        search={"recipe": recipe.content(), "splits": {TASK: splits}},
    )  # fmt: skip
    return artifact.save(tmp_path_factory.mktemp("searched") / "searched.json"), drawn, lm


def settings(checkpoint, output, artifact, **more):
    given = {"tasks": (TASK,), "limit": 14, "batch_size": 8, **more}
    return EvalSettings(
        pretrained=str(checkpoint), model_args="dtype=float32", artifact=artifact, device="cpu",
        output=output, **given,
    )  # fmt: skip


@torch.inference_mode()
def stock_scores(checkpoint, pairs):
    """Log-likelihoods of (context, continuation) by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = []
    for context, answer in pairs:
        before = tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]
        whole = tokenizer(context + answer)["input_ids"] if context else [
            *before, *tokenizer(answer, add_special_tokens=False)["input_ids"]
        ]  # fmt: skip
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(len(before), len(whole))
        found.append(sum(float(logits[n - 1, whole[n]]) for n in places))
    return found


@demo
def test_every_column_follows_from_the_models_scores(tiny_checkpoint, searched, tmp_path):
    artifact, drawn, _ = searched
    outcome = run_eval(settings(tiny_checkpoint, tmp_path, artifact, calibrators=("all",)))
    base, act = (load_run(outcome.folders[arm]) for arm in ("baseline", "act"))
    stored = CalibratorInputs.model_validate(base.data["calibrators"][TASK])
    assert stored.rotated is None  # a task without option letters
    contexts = [
        "Decide whether the writer's own view is 'negative' or 'positive'.\n\n"
        f"Sentence: {text}\nSentiment:" for text in CONTENT_FREE
    ]  # fmt: skip
    labels = (" negative", " positive")
    wanted = stock_scores(tiny_checkpoint, [(c, label) for c in contexts for label in labels])
    assert np.ravel(stored.content_free) == pytest.approx(wanted, abs=1e-4)
    wanted = stock_scores(tiny_checkpoint, [("Sentiment:", label) for label in labels])
    assert [stored.premise[label] for label in labels] == pytest.approx(wanted, abs=1e-4)
    seen = [*drawn.search, *drawn.verify]
    assert stored.labelled.labels == tuple(one.right for one in seen)
    assert stored.labelled.lengths == ((8, 8),) * 16

    rows = {row.metric: row for row in compare(base, act).rows}
    for run, arm in ((base, "score_a"), (act, "score_b")):
        own = CalibratorInputs.model_validate(run.data["calibrators"][TASK])
        choices = choice_scores(run.samples(TASK))
        raw = choices.scores
        prior = np.exp(own.content_free) / np.exp(own.content_free).sum(axis=1, keepdims=True)
        premise = [own.premise[label] for label in labels]
        lab = own.labelled
        scaling = fit_scaling(
            np.array(lab.scores), lab.labels, lengths=np.array(lab.lengths), same_choices=True
        )
        scaled = (raw - np.mean(lab.scores, axis=0)) * (1 + scaling.weights[:2])
        for metric, scores in {
            "acc_corrected": label_prior_corrected(raw),
            "acc_content_free": np.exp(raw) / prior.mean(axis=0),
            "acc_domain_pmi": raw - premise,
            "acc_supervised": scaled + scaling.weights[2:],
        }.items():
            hits = (scores.argmax(axis=1) == choices.labels).mean()
            assert getattr(rows[metric], arm) == pytest.approx(hits), metric
            assert rows[metric].derived
            assert not rows[metric].headline
    assert "acc_pride" not in rows
    inner = {row.metric for row in next(iter(outcome.comparisons.values())).rows}
    assert inner == set(rows)
    report = outcome.report.read_text(encoding="utf-8")
    assert "acc_domain_pmi: each choice's score behind the end of the prompt alone" in report
    # Each arm was asked anew, and neither arm's further prompts are counted among its own.
    other = CalibratorInputs.model_validate(act.data["calibrators"][TASK])
    assert other.content_free != stored.content_free
    assert other.labelled.scores != stored.labelled.scores
    assert outcome.counters["prompts"] == 14


@demo
def test_examples_stand_before_inputs_without_content(tiny_checkpoint, tmp_path, monkeypatch):
    asked = []
    own = InputsOfArm._ask
    monkeypatch.setattr(
        InputsOfArm, "_ask", lambda self, rows: asked.extend(rows) or own(self, rows)
    )
    run_eval(
        settings(
            tiny_checkpoint, tmp_path, "none", limit=3, num_fewshot=2, calibrators=("content-free",)
        )
    )
    contexts = [row[0][0] for row in asked]
    ends = [f"Sentence: {text}\nSentiment:" for text in CONTENT_FREE]
    starts = {context.removesuffix(end) for context, end in zip(contexts, ends, strict=True)}
    assert len(starts) == 1
    assert starts.pop().count("Sentiment: ") == 2


def test_without_being_asked_nothing_further_is(tmp_path):
    task = Colours()
    lm, found = collected(task, task.rows(4), "batch")
    assert (lm.asked, found) == ([], {})
    write_run({"results": {}, "samples": {}, "calibrators": found}, tmp_path, "DATE")
    assert [path.name for path in tmp_path.iterdir()] == ["results_DATE.json"]


@demo
def test_supervised_needs_the_documents_of_the_search(searched):
    path, drawn, lm = searched
    artifact, selection = load_artifact(path), find_tasks([TASK, "act_demo_word"])
    found = labelled_documents(lm, artifact, selection, [TASK, "act_demo_word"])
    assert found == {TASK: (*drawn.search, *drawn.verify)}
    with pytest.raises(InputError, match="there is none, so leave it out"):
        labelled_documents(lm, None, selection, [TASK])
    with pytest.raises(InputError, match="'searched' names none, so leave it out"):
        labelled_documents(lm, artifact.model_copy(update={"search": None}), selection, [TASK])
    with pytest.raises(InputError, match=f"saw {TASK}, none of --tasks"):
        labelled_documents(lm, artifact, selection, ["act_demo_word"])
    other = copy.deepcopy(artifact.search)
    other["splits"][TASK]["verify"]["sha256"] = "0" * 64
    with pytest.raises(InputError, match=r"the verify documents .* are not those of artifact"):
        labelled_documents(lm, artifact.model_copy(update={"search": other}), selection, [TASK])


def test_predict_only_compares_nothing_to_calibrate():
    with pytest.raises(InputError, match="exclude each other"):
        EvalSettings(tasks=(TASK,), predict_only=True, calibrators=("supervised",))
