"""Verdicts, judge prompts, references, settings, measures and finding the answers of runs."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from installed import REPOSITORY
from mtbench_runs import doc, graded, write_run

from act_harness.errors import RecipeError, ResultError
from act_harness.mtbench.judge.answers import find_arms
from act_harness.mtbench.judge.client import preference_of, rating_of
from act_harness.mtbench.judge.plan import Place
from act_harness.mtbench.judge.prompts import (
    REFERENCE_CATEGORIES,
    load_prompts,
    load_references,
    missing_references,
    own_prompts,
)
from act_harness.mtbench.judge.scores import compare_arms, score_arm
from act_harness.mtbench.judge.settings import load_judge_settings
from act_harness.mtbench.measures import distinct_n, measure

# -- verdicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "rating"),
    [
        ("Rating: [[5]]", 5.0),
        ("[[ 10 ]]", 10.0),
        ("[[7.5]] and again [[7.5]]", 7.5),
        ("[[1]]", 1.0),
        ("[[0]]", None),
        ("[[10.5]]", None),
        ("[[-3]]", None),
        ("[[3]] ... [[4]]", None),
        ("[7]", None),
        ("[[8/10]]", None),
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_a_rating_is_one_number_from_1_to_10_in_double_brackets(verdict, rating):
    found, reason = rating_of(verdict)
    assert found == rating
    assert bool(reason) is (rating is None)


@settings(deadline=None)
@given(st.text())
def test_no_text_can_break_the_parser(text):
    found, reason = rating_of(text)
    assert (found is None and reason) or 1 <= found <= 10


@settings(deadline=None)
@given(st.integers(1, 10), st.text(alphabet="abc [.:\n"), st.text(alphabet="abc ].:\n"))
def test_the_rating_is_found_anywhere(rating, before, after):
    assert rating_of(f"{before}[[{rating}]]{after}")[0] == rating


@pytest.mark.parametrize(
    ("verdict", "preference"),
    [("[[A]]", "A"), ("so [[B]].", "B"), ("[[C]]", "tie"), ("[[A]] or [[B]]", None), ("A", None)],
)
def test_a_preference_is_one_letter(verdict, preference):
    assert preference_of(verdict) == preference


# -- prompts ---------------------------------------------------------------------------------------

QUESTIONS = ("<question one>", "<question two>")
ANSWERS = ("<answer one>", "<answer two>")
OTHERS = ("<other one>", "<other two>")
REFERENCES = ("<reference one>", "<reference two>")


def filled(prompt):
    answers = [ANSWERS, OTHERS] if prompt.kind == "pairwise" else [ANSWERS]
    messages = prompt.messages(QUESTIONS, answers, REFERENCES)
    assert messages[-1]["role"] == "user"
    return messages[-1]["content"]


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("references", [False, True])
def test_our_own_prompts_show_what_is_judged_and_ask_for_a_rating(turn, references):
    text = filled(own_prompts().of(turn, references))
    assert (QUESTIONS[1] in text, ANSWERS[1] in text) == (turn == 2, turn == 2)
    assert QUESTIONS[0] in text
    assert ANSWERS[0] in text
    assert (REFERENCES[0] in text) is references
    assert (REFERENCES[1] in text) is (references and turn == 2)
    assert "[[4]]" in text  # the example of the format


def test_all_eight_prompts_of_fastchat_are_understood(shared_dir):
    file = shared_dir / "mt_bench" / "judge_prompts.jsonl"
    given = {record["name"]: record for record in map(json.loads, file.read_text().splitlines())}
    prompts = load_prompts(file)
    assert {prompt.name for prompt in prompts.prompts.values()} == set(given)
    assert len(given) == 8
    for (kind, turn, references), prompt in prompts.prompts.items():
        name = given[prompt.name]["name"]
        assert (kind == "pairwise") is name.startswith("pair")
        assert (turn == 2) is name.endswith("multi-turn")
        assert references is ("math" in name)
        # FastChat fills its templates with str.format.
        names = {"question": QUESTIONS[0], "question_1": QUESTIONS[0], "question_2": QUESTIONS[1],
                 "ref_answer_1": REFERENCES[0], "ref_answer_2": REFERENCES[1],
                 "answer": ANSWERS[0], "answer_1": ANSWERS[0], "answer_2": ANSWERS[1],
                 "answer_a": ANSWERS[0], "answer_b": OTHERS[0],
                 "answer_a_1": ANSWERS[0], "answer_a_2": ANSWERS[1],
                 "answer_b_1": OTHERS[0], "answer_b_2": OTHERS[1]}  # fmt: skip
        assert filled(prompt) == given[prompt.name]["prompt_template"].format(**names)
        assert prompt.system == given[prompt.name]["system_prompt"]


def test_an_answer_with_placeholders_and_braces_stays_what_it_is():
    prompt = own_prompts().of(2, True)
    answers = ["{question_2} {answer_2} {} {0}", "{ref_answer_1}"]
    text = prompt.messages(QUESTIONS, [answers], REFERENCES)[-1]["content"]
    assert answers[0] in text
    assert answers[1] in text


def prompt_line(**changes):
    record = {
        "name": "mine", "type": "single", "system_prompt": "",
        "prompt_template": "{question} {answer}", "output_format": "[[rating]]",
    }  # fmt: skip
    return json.dumps({**record, **changes})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no judge prompt"),
        (["not json"], "line 1 is not JSON"),
        (["{}"], "prompt 1 is no judge prompt"),
        ([prompt_line(type="triple")], "type 'triple'"),
        ([prompt_line(output_format="[[rating_a,rating_b]]")], "output_format"),
        ([prompt_line(prompt_template="{question} {awnser}")], "did you mean 'answer'"),
        ([prompt_line(prompt_template="{question}")], "lacks {answer}"),
        ([prompt_line(), prompt_line(name="other")], "'mine' and 'other'"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_refused(tmp_path, lines, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(RecipeError) as caught:
        load_prompts(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_case_without_prompt_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(prompt_line())
    assert load_prompts(file).of(1, False).messages(("q",), [("a",)]) == [
        {"role": "user", "content": "q a"}
    ]
    with pytest.raises(RecipeError, match="turn 2 with reference answers"):
        load_prompts(file).of(2, True)


# -- references ------------------------------------------------------------------------------------


def test_fastchats_references_cover_every_question_that_needs_one(shared_dir, hub_dir, tmp_path):
    references = load_references(shared_dir / "mt_bench" / "reference_answer" / "gpt-4.jsonl")
    assert len(references) == 30
    file = hub_dir / "HuggingFaceH4" / "mt_bench_prompts" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_run(tmp_path, [(row, ["a", "b"]) for row in rows])
    arms = find_arms([tmp_path])
    assert len(arms[0].talks) == 80
    assert missing_references(arms, references) == []
    needy = [row for row in rows if row["category"] in REFERENCE_CATEGORIES]
    assert {str(row["prompt_id"]) for row in needy} == set(references)
    assert ("123", 1) in missing_references(arms, None)  # the dataset itself lacks some


@pytest.mark.parametrize("text", ["nonsense", '{"question_id": 1}', "[1]"])
def test_a_file_of_other_things_is_no_reference(tmp_path, text):
    file = tmp_path / "references.jsonl"
    file.write_text(text)
    with pytest.raises(RecipeError):
        load_references(file)


# -- settings --------------------------------------------------------------------------------------


def test_settings_come_from_a_file_with_options_over_it(tmp_path):
    file = tmp_path / "judge.yaml"
    file.write_text("model: some-judge\nbase_url: http://127.0.0.1:1/v1/\nretries: 5\n")
    found = load_judge_settings(file, paths=(tmp_path,), retries=1, timeout=None)
    assert (found.model, found.retries, found.timeout) == ("some-judge", 1, 120.0)
    assert found.base_url == "http://127.0.0.1:1/v1"
    assert found.output_folder == tmp_path / "mt_bench_judge"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"modell": "x"}, "did you mean 'model'"),
        ({"model": "x"}, "paths"),
        ({"model": "x", "paths": (".",), "rejudge": 0}, "rejudge"),
        ({"model": "x", "paths": (".",), "base_url": "localhost:80"}, "expected an address"),
    ],
)
def test_wrong_settings_are_one_line(wrong, message):
    with pytest.raises(RecipeError) as caught:
        load_judge_settings(None, **wrong)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://me:hunter2@host/v1", "https://host/v1?key=hunter2"])
def test_an_address_with_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(RecipeError) as caught:
        load_judge_settings(None, model="x", paths=(".",), base_url=url)
    assert "hunter2" not in str(caught.value)


# -- the answers of runs ---------------------------------------------------------------------------

DATES = ["2026-01-02T03-04-05.000001", "2026-01-02T03-04-06.5", "2026-02-01T00-00-00.1"]


def test_both_arms_in_one_folder_are_told_apart_and_the_newest_counts(tmp_path):
    rows = [doc(82), doc(81)]
    old, new, act = ([(row, graded(n, n)) for row in rows] for n in (1, 2, 3))
    write_run(tmp_path / "m", old, date=DATES[0])
    write_run(tmp_path / "m", act, date=DATES[1], arm="few", sha="ab" * 32)
    newest = write_run(tmp_path / "m", new, date=DATES[2])
    base, calibrated = find_arms([tmp_path])
    assert (base.label, base.is_baseline, base.path) == ("baseline", True, newest)
    assert (calibrated.label, calibrated.artifact_sha256) == ("few", "ab" * 32)
    assert [talk.question.id for talk in base.talks] == ["81", "82"]
    assert base.talks[0].answers == tuple(graded(2, 2))


def test_several_models_and_equal_names_are_kept_apart(tmp_path):
    rows = [(doc(81), graded(1, 1))]
    write_run(tmp_path / "a", rows, model="one")
    write_run(tmp_path / "b", rows, model="two")
    assert [arm.label for arm in find_arms([tmp_path])] == ["one/baseline", "two/baseline"]
    write_run(tmp_path / "c/x", rows, arm="few", sha="ab" * 32)
    write_run(tmp_path / "c/y", rows, arm="few", sha="cd" * 32)
    assert [arm.label for arm in find_arms([tmp_path / "c"])] == ["few-abababab", "few-cdcdcdcd"]


def test_folders_without_answers_and_files_of_other_tasks_are_refused(tmp_path):
    with pytest.raises(ResultError, match="does not exist"):
        find_arms([tmp_path / "nowhere"])
    (tmp_path / "samples_sst2_2026-01-02T03-04-05.1.jsonl").write_text("{}\n")
    with pytest.raises(ResultError, match="holds no samples of mt_bench"):
        find_arms([tmp_path])
    samples = write_run(tmp_path, [(doc(81), ["only one answer"])])
    with pytest.raises(ResultError, match="line 1 is no conversation"):
        find_arms([samples])
    write_run(tmp_path, [(doc(81), graded(1, 1))])
    results = samples.with_name(samples.name.replace("samples_mt_bench", "results"))
    results.with_suffix(".json").write_text('{"config": {"model": "hf"}}')
    with pytest.raises(ResultError, match="which arm"):
        find_arms([tmp_path])


# -- measures and scores ---------------------------------------------------------------------------


def test_measures_of_texts_alone():
    found = measure(["a b a b", " "])
    assert found["turn_1_distinct_2"] == pytest.approx(2 / 3)
    assert (found["turn_1_empty"], found["turn_2_empty"]) == (0.0, 1.0)
    assert math.isnan(found["turn_2_distinct_2"])
    assert math.isnan(found["turn_1_tokens"])
    assert distinct_n("one two three", 2) == 1.0


def test_arms_are_compared_on_the_answers_that_both_have():
    def rating(arm, question, turn, value):
        return (Place(arm, question, "writing", turn, 0), value, "" if value else "lost")

    ratings = [
        rating("a", "1", 1, 2.0), rating("b", "1", 1, 4.0),
        rating("a", "1", 2, None), rating("b", "1", 2, 10.0),
        rating("a", "2", 1, 5.0), rating("b", "2", 1, 6.0),
        rating("a", "2", 2, 5.0), rating("b", "2", 2, None),
    ]  # fmt: skip
    found = {d.what: d for d in compare_arms("a", "b", ratings, confidence=0.95, seed=1)}
    assert found["overall"].result.difference == pytest.approx((2 + 1) / 2)
    assert found["overall"].result.documents == 2
    assert "turn 2" not in found
    assert found["writing"].p_adjusted is not None
    arm = score_arm("a", ratings, confidence=0.95, seed=1)
    assert arm.overall.mean == pytest.approx(4.0)
    assert arm.missing[2].reasons == {"lost": 1}
    assert arm.missing[2].rate == 0.5


@pytest.mark.slow
def test_nothing_of_this_imports_torch_or_the_client_library():
    import subprocess
    import sys

    code = (
        "import sys; import act_harness.mtbench.judge as m; m.judge; m.JudgeSettings; "
        "bad = {'torch', 'openai', 'tenacity', 'matplotlib', 'wandb'} & set(sys.modules); "
        "sys.exit(repr(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
