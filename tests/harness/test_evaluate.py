"""``act-harness eval``: two arms, one model, files in lm-eval's layout, paired figures."""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_heads import save_heads

from act_harness.artifact import Artifact
from act_harness.calibration import Calibration
from act_harness.cli import app as cli
from act_harness.errors import (
    ArtifactError,
    InfrastructureError,
    InputError,
    TaskError,
    UnsupportedModelError,
)
from act_harness.evidence.results import load_run
from act_harness.harness import evaluate, run_files
from act_harness.harness.eval_settings import EvalSettings
from act_harness.harness.evaluate import _new_folders, run_eval
from act_harness.harness.run_files import write_run
from act_harness.support import reading

if find_spec("vaderSentiment") is None:  # importing it would hide the lexicon of other tests
    pytest.skip("the demo tasks need vaderSentiment", allow_module_level=True)
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def artifact_file(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "tiny-heads.json"
    return save_heads(tiny_checkpoint, path, name="tiny heads/1", alpha=1.5, beta=0.0)


def settings(checkpoint: Path, output: Path, artifact, **more) -> EvalSettings:
    more = {"tasks": ("act_demo_sentiment",), "limit": 12, "batch_size": "8", **more}
    return EvalSettings(
        pretrained=str(checkpoint), model_args="dtype=float32", artifact=str(artifact),
        device="cpu", output=output, **more,
    )  # fmt: skip


@pytest.mark.slow
def test_both_arms_are_written_and_compared(tiny_checkpoint, artifact_file, tmp_path, capsys):
    outcome = run_eval(settings(tiny_checkpoint, tmp_path, artifact_file))
    bars = capsys.readouterr().err
    assert "Running log-likelihoods (baseline)" in bars
    assert "Running log-likelihoods (tiny heads/1)" in bars
    base, act = (load_run(outcome.folders[arm]) for arm in ("baseline", "act"))
    assert "__baseline__" in outcome.folders["baseline"].name
    assert "__act-tiny-heads-1__" in outcome.folders["act"].name
    infos = [run.data["config"]["act_harness"] for run in (base, act)]
    assert infos[0]["artifact"] is None
    assert infos[0]["engine_calls"] == {}
    assert infos[1]["artifact"] == "tiny heads/1"
    assert infos[1]["engine_calls"]["torch"] > 0
    assert infos[1]["counters"]["prompts"] == 12
    (comparison,) = outcome.comparisons.values()
    rows = {row.metric: row for row in comparison.rows}
    for arm, run in (("score_a", base), ("score_b", act)):
        reported = run.data["results"]["act_demo_sentiment"]["acc,none"]
        assert getattr(rows["acc"], arm) == pytest.approx(reported)
    assert rows["acc"].result.documents == 12
    assert rows["acc_corrected"].result is not None
    assert rows["acc"].result.flips is not None
    one, two = (run.samples("act_demo_sentiment") for run in (base, act))
    assert [s.prompt_hash for s in one] == [s.prompt_hash for s in two]
    assert any(a.scores != b.scores for a, b in zip(one, two, strict=True))
    assert "act_demo_sentiment" in outcome.summary()
    report = outcome.report.read_text()
    assert "acc_corrected" in report
    assert "of (head, prompt) pairs with a sink" in report
    assert (outcome.report.parent / "forest.png").stat().st_size > 1000
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_answers_that_are_no_numbers_get_no_verdict(
    tiny_checkpoint, artifact_file, tmp_path, monkeypatch
):
    """NaN weights made acc 0.5 and exit code 0."""
    load = evaluate.load_model

    def broken(given):
        lm, artifact = load(given)
        with torch.no_grad():
            lm.model.get_input_embeddings().weight[lm.tok_encode("e")] = math.nan
        return lm, artifact

    monkeypatch.setattr(evaluate, "load_model", broken)
    given = settings(tiny_checkpoint, tmp_path, artifact_file)
    with pytest.warns(UserWarning, match="24 of 24 log-likelihoods are not finite"):
        outcome = run_eval(given)
    assert outcome.exit_code == 3
    assert "no verdict: 48 answers are not finite" in outcome.summary()
    (comparison,) = outcome.comparisons.values()
    assert all(row.result is None for row in comparison.rows)
    assert comparison.exit_code == 3
    assert comparison.summary().endswith("not tested: 48 non-finite answers.")
    said = " ".join(outcome.summary().split())  # whatever the width of the terminal
    assert "not tested: 24 answers of A and 24 of B are not finite" in said
    run_ = load_run(outcome.folders["act"])
    assert run_.data["config"]["act_harness"]["counters"]["answers_not_finite"] == 24
    folders = [str(outcome.folders[arm]) for arm in ("baseline", "act")]
    with pytest.raises(SystemExit) as left:
        cli.app(["compare", *folders], prog_name="act-harness")
    assert left.value.code == 3


@pytest.mark.slow
def test_compare_gives_evals_own_figures(tiny_checkpoint, artifact_file, tmp_path, monkeypatch):
    """One seed for both: they gave other p-values and intervals for the same folders."""
    from act_harness.cli import app as cli

    given = settings(tiny_checkpoint, tmp_path, artifact_file, seed=7, limit=16)
    outcome = run_eval(given)
    stored = json.loads((outcome.report.parent / "comparison.json").read_text())
    folders = [str(outcome.folders[arm]) for arm in ("baseline", "act")]
    line = ["act-harness", "compare", *folders, "--output", str(tmp_path / "again")]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit):
        cli.main()
    again = json.loads((tmp_path / "again" / "comparison.json").read_text())
    assert any(row["result"]["test"] == "sign-flip" for row in stored["rows"])
    assert again["rows"] == stored["rows"]
    assert again["settings"] == stored["settings"]


@pytest.mark.slow
def test_a_baseline_alone(tiny_checkpoint, tmp_path):
    outcome = run_eval(settings(tiny_checkpoint, tmp_path, "none"))
    assert list(outcome.folders) == ["baseline"]
    assert outcome.comparisons == {}
    assert "act_demo_sentiment" in outcome.summary()


@pytest.mark.slow
def test_several_fewshot_seeds_are_averaged(tiny_checkpoint, artifact_file, tmp_path):
    outcome = run_eval(
        settings(tiny_checkpoint, tmp_path, artifact_file, num_fewshot=2, fewshot_seeds=(0, 42, 84))
    )
    assert list(outcome.comparisons) == [0, 42, 84]
    rows = [
        next(row for row in comparison.rows if row.metric == "acc")
        for comparison in outcome.comparisons.values()
    ]
    (average,) = (a for a in outcome.averages if a.metric == "acc")
    assert (
        f"\nCalibration: {run_files.counters_line(outcome.counters)}\n"
        in outcome.report.read_text()
    )
    assert average.baseline == pytest.approx(sum(row.score_a for row in rows) / 3)
    assert average.act == pytest.approx(sum(row.score_b for row in rows) / 3)
    prompts = {
        load_run(outcome.folders["act"] / f"seed-{seed}")
        .samples("act_demo_sentiment")[0]
        .prompt_hash
        for seed in (0, 42, 84)
    }
    assert len(prompts) == 3, "every seed draws its own examples"
    assert "sd over 3 seeds" in outcome.summary()


def not_to_be_loaded(_):
    pytest.fail("the model is loaded")


@pytest.mark.slow
def test_bad_input_is_found_before_the_model_is_loaded(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", not_to_be_loaded)
    for change, error, message in (
        ({"tasks": ("act_demo_sentimnt",)}, TaskError, "did you mean 'act_demo_sentiment'"),
        ({"tasks": ()}, TaskError, "no task was named"),
        ({"artifact": "nowhere.json"}, ArtifactError, "neither a file nor a shipped"),
    ):
        given = {"artifact": "none", **change}
        with pytest.raises(error, match=message):
            run_eval(settings(tiny_checkpoint, tmp_path, given.pop("artifact"), **given))
    with pytest.raises(InfrastructureError, match="no model at /nonexistent"):
        run_eval(settings(Path("/nonexistent"), tmp_path, "none"))
    with pytest.raises(InputError, match="no model was named"):
        run_eval(EvalSettings(tasks=("act_demo_sentiment",), output=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_one_document_is_written_and_nothing_is_claimed(tiny_checkpoint, artifact_file, tmp_path):
    outcome = run_eval(settings(tiny_checkpoint, tmp_path, artifact_file, limit=1))
    assert outcome.exit_code == 0
    assert "no verdict, nothing could be tested" in outcome.summary()
    assert all(load_run(folder).data["results"] for folder in outcome.folders.values())
    assert "nothing could be tested" in outcome.report.read_text()


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path):
    artifact = SimpleNamespace(name="n" * 5000)
    stamp = "2026-01-01T00-00-00"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: _new_folders(tmp_path, "m", artifact, stamp), range(8)))
    assert len({place for folders in made for place in folders.values()}) == 24
    for folders in made:
        ends = {place.name.partition(stamp)[2] for place in folders.values()}
        assert len(ends) == 1, "the folders of one run are told by their names"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["file", "below a file", "too long"])
def test_a_bad_output_is_found_before_the_model_is_loaded(
    tiny_checkpoint, tmp_path, case, monkeypatch
):
    monkeypatch.setattr(evaluate, "load_model", not_to_be_loaded)
    (tmp_path / "file").write_text("kept")
    place = {"file": "file", "below a file": "file/in/it", "too long": "x" * 300}[case]
    with pytest.raises(InfrastructureError, match="choose a") as caught:
        run_eval(settings(tiny_checkpoint, tmp_path / place, "none"))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.slow
def test_a_run_that_fails_leaves_no_empty_folders(tiny_checkpoint, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_arm", fails)
    with pytest.raises(KeyboardInterrupt, match="no arm was complete"):
        run_eval(settings(tiny_checkpoint, tmp_path, "none"))
    assert list(tmp_path.iterdir()) == []


_ODD_TASK = """
task: odd_texts
custom_dataset: !function odd_texts.rows
test_split: test
process_docs: !function odd_texts.read
output_type: multiple_choice
doc_to_text: !function odd_texts.question
doc_to_choice: ["old", "new and shiny"]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
_ODD_ROWS = r"""
import datasets

TEXTS = ["half \ud835 sign", "\udc00", "plain", "\u2028"]

def rows(**_):
    made = [{"number": n, "text": "", "label": n % 2} for n in range(4)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(made)})

def read(docs):  # arrow itself holds no such text; what a task makes of its rows may
    return docs.with_transform(
        lambda rows: {**rows, "text": [TEXTS[number] for number in rows["number"]]}
    )

def question(doc):
    return f"It is {doc['text']}, not"
"""


@pytest.mark.slow
def test_a_document_with_half_a_surrogate_pair_is_kept(tiny_checkpoint, artifact_file, tmp_path):
    (tmp_path / "odd_texts.yaml").write_text(_ODD_TASK)
    (tmp_path / "odd_texts.py").write_text(_ODD_ROWS)
    outcome = run_eval(
        settings(
            tiny_checkpoint, tmp_path / "out", artifact_file,
            tasks=("odd_texts",), include_path=(str(tmp_path),),
        )
    )  # fmt: skip
    (comparison,) = outcome.comparisons.values()
    assert comparison.rows[0].result.documents == 4
    for arm in ("baseline", "act"):
        (path,) = outcome.folders[arm].glob("samples_*.jsonl")
        texts = [row["doc"]["text"] for row in reading.read_lines(path)]
        assert texts == ["half \ud835 sign", "\udc00", "plain", "\u2028"]


def test_half_a_surrogate_pair_loses_nothing(tmp_path):
    texts = ["half \ud835 sign", "line\u2028break", "\U0001d54f"]
    rows = [
        {
            "doc_id": i, "doc": {"q": text}, "arguments": [(text, "b")], "metrics": ["acc"],
            "resps": [[("1.0", "True")]], "filtered_resps": [("1.0", "True")], "target": text,
            "doc_hash": "1", "prompt_hash": "2", "target_hash": "3", "filter": "none", "acc": 1.0,
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip
    long = "t/" + "x" * 400
    given = {"samples": {long: rows}, "results": {long: {"acc,none": 1.0}}, "configs": {long: {}}}
    write_run({**given, "note": texts[0]}, tmp_path, "2026-01-01T00-00-00")
    run = load_run(tmp_path)
    assert run.data["note"] == texts[0]
    assert [sample.target for sample in run.samples(long)] == texts
    assert all(path.read_bytes().decode("utf-8") for path in tmp_path.iterdir())


@pytest.mark.slow
def test_a_model_that_cannot_be_calibrated_is_found_before_it_is_scored(
    tiny, tiny_checkpoint, make_artifact, tmp_path, monkeypatch
):
    """A model outside the interface is refused; its baseline took hours first."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny("openai-gpt", dtype=torch.float32, vocab_size=len(tokenizer), n_embd=32,
                 n_layer=3, n_head=4, n_positions=64)  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    artifact = make_artifact(model).save(tmp_path / "heads.json")
    scored = []
    monkeypatch.setattr(evaluate, "evaluate_arm", lambda *given, **more: scored.append(given))
    with pytest.raises(UnsupportedModelError):
        run_eval(settings(tmp_path / "model", tmp_path / "out", artifact))
    assert scored == []


@pytest.mark.slow
def test_real_rows_through_the_real_model(smollm, hub_dir, tmp_path):
    """The stock model's scores on real rows, and other scores with heads calibrated."""
    from transformers import AutoModelForCausalLM

    from act_harness.attention import model_facts

    facts = model_facts(AutoModelForCausalLM.from_pretrained(smollm, dtype="float32"))
    heads = {layer: (layer % 9, (layer + 4) % 9) for layer in range(5, 25)}
    artifact = Artifact(name="forty", model=facts, calibration=Calibration(), heads=heads)
    path = artifact.save(tmp_path / "forty.json")
    outcome = run_eval(
        EvalSettings(
            tasks=("act_sst2", "act_hellaswag"), pretrained=str(smollm), artifact=str(path),
            model_args="dtype=float32", limit=6, batch_size="8", device="cpu",
            output=tmp_path / "out", data_dir=hub_dir,
        )
    )  # fmt: skip
    counters = outcome.counters
    assert counters["prompts"] == 12
    assert counters["share_of_pairs_with_sink"] > 0.2
    base, act = (load_run(outcome.folders[arm]) for arm in ("baseline", "act"))
    for task in ("act_sst2", "act_hellaswag"):
        one, two = base.samples(task), act.samples(task)
        assert max(abs(a.scores[0] - b.scores[0]) for a, b in zip(one, two, strict=True)) > 1e-2
    assert json.loads((outcome.report.parent / "comparison.json").read_text())["rows"]


@pytest.mark.parametrize(("moved", "said"), [(0.0, True), (1e-9, False), (None, False)])
def test_an_arm_in_which_no_head_was_calibrated_is_named(moved, said):
    """Prompts of nine tokens have no sinks under `paper`: +0.0000 is no finding about the heads."""
    counters = {
        "prompts": 3, "share_of_pairs_with_sink": 0.0, "mean_moved_mass": moved,
        "prompts_near_threshold": 0, "prompts_too_short": 3, "prompts_truncated": 0,
    }  # fmt: skip
    line = run_files.counters_line(counters)
    assert ("nothing was calibrated, both arms are the stock model" in line) is said


@pytest.mark.parametrize("prompts", [0, 3])
def test_answers_that_were_not_scored_are_named(prompts):
    """An answer longer than the model counted as a wrong one, and no line said so."""
    counters = {
        "prompts": prompts, "share_of_pairs_with_sink": 0.5, "mean_moved_mass": 0.1,
        "prompts_truncated": 2, "requests_skipped": 12, "requests_with_empty_continuation": 0,
    }  # fmt: skip
    line = run_files.counters_line(counters)
    assert line.endswith("2 prompts truncated, 12 requests skipped")


@pytest.mark.parametrize(
    ("prompts", "moved", "words"),
    [
        (114, -0.0013, "0.0013 of the attention moved onto calibrated columns, net"),
        (114, 0.0604, "0.0604 of the attention moved off calibrated columns, net"),
        (0, None, "nothing was calibrated, both arms are the stock model"),
    ],
)
def test_the_line_of_an_arm_is_read_right(prompts, moved, words):
    """ "-0.0013 of the attention moved" was an amplifying set; "0 prompts, -" an empty one."""
    counters = {
        "prompts": prompts, "share_of_pairs_with_sink": 0.7 if prompts else None,
        "mean_moved_mass": moved, "prompts_near_threshold": 0, "prompts_too_short": 0,
        "prompts_truncated": 0,
    }  # fmt: skip
    line = run_files.counters_line(counters)
    assert words in line
    assert "-0" not in line
