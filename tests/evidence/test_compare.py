from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import scipy.stats

from act_harness.errors import ResultError
from act_harness.evidence import comparison, pairing, results, stats
from act_harness.evidence.compare import compare

DATE = "2024-05-01T12-00-00.000001"


def sample(doc_id, acc, **more):
    return {
        "doc_id": doc_id, "doc": {"text": f"t{doc_id}"}, "target": "0", "arguments": {},
        "resps": [], "filtered_resps": ["x"], "filter": "none", "metrics": ["acc"],
        "doc_hash": f"doc{doc_id}", "prompt_hash": f"prompt{doc_id}", "target_hash": "t",
        "acc": acc, **more,
    }  # fmt: skip


def write(folder, tasks, *, groups=None, by_size=False, scores=None, config=None, better=None):
    """A result folder in lm-eval's layout; scores are the means unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    reported = {}
    for task, rows in tasks.items():
        metrics = dict.fromkeys(m for row in rows for m in row["metrics"])
        reported[task] = {"alias": task, "sample_len": len(rows)}
        for metric in metrics:
            numbers = [row[metric] for row in rows if isinstance(row.get(metric), (int, float))]
            reported[task][f"{metric},none"] = float(np.mean(numbers)) if numbers else "N/A"
            reported[task][f"{metric}_stderr,none"] = "N/A"
        reported[task] |= (scores or {}).get(task, {})
    tops = {}
    for group, leaves in (groups or {}).items():
        sizes = [len(tasks[leaf]) for leaf in leaves]
        values = [reported[leaf]["acc,none"] for leaf in leaves]
        mean = float(np.average(values, weights=sizes if by_size else None))
        tops[group] = {"alias": group, "acc,none": mean} | (scores or {}).get(group, {})
    data = {
        "results": reported | tops, "groups": tops, "group_subtasks": groups or {},
        "configs": {task: {} for task in tasks}, "config": config or {},
        "higher_is_better": {t: better or {"acc": True} for t in [*tasks, *tops]},
    }  # fmt: skip
    (folder / f"results_{DATE}.json").write_text(json.dumps(data))
    for task, rows in tasks.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"samples_{task}_{DATE}.jsonl").write_text(text)
    return folder


def arms(tmp_path, flips, **more):
    """Two folders; ``flips``: task to (documents, gained, lost). Gained documents come first."""
    tasks = ({}, {})
    for task, (documents, gained, lost) in flips.items():
        for arm in (0, 1):
            tasks[arm][task] = [
                sample(i, float(arm if i < gained else 1 - arm if i < gained + lost else i % 2))
                for i in range(documents)
            ]
    return write(tmp_path / "m__baseline", tasks[0], **more), write(
        tmp_path / "m__act", tasks[1], **more
    )


def by_name(comparison):
    return {(row.name, row.metric): row for row in comparison.rows}


# -- the numbers -----------------------------------------------------------------------------------


def test_known_flips_give_the_numbers_worked_out_by_hand_and_by_scipy(tmp_path):
    found = compare(*arms(tmp_path, {"one": (500, 25, 40), "two": (100, 9, 1)}))
    one, two = found.rows
    assert (one.result.flips.gained, one.result.flips.lost) == (25, 40)
    assert one.result.difference == pytest.approx(-15 / 500)
    p_one = scipy.stats.binomtest(25, 65).pvalue
    p_two = 2 * (1 + 10) / 2**10  # 0 or 1 of 10, both tails
    assert one.result.p_value == pytest.approx(p_one)
    assert two.result.p_value == pytest.approx(p_two)
    assert [one.p_adjusted, two.p_adjusted] == pytest.approx(
        scipy.stats.false_discovery_control([p_one, p_two]).tolist()
    )
    # Bonett and Price: a gained and a lost answer more, among two documents more.
    up, down = 10 / 102, 2 / 102
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 102)
    assert two.result.interval == pytest.approx((up - down - half, up - down + half), rel=1e-6)
    # Both are one of two tests: what each detects is said at half the level. Seven answers that
    # all go one way have p = 2 / 2**7 <= 0.025, six have not.
    assert two.result.minimum_detectable == pytest.approx(
        (scipy.stats.t.isf(0.0125, 99) + scipy.stats.t.ppf(0.8, 99)) * two.result.stderr
    )
    assert two.result.minimum_detectable > 7 / 100
    assert two.result.stderr == pytest.approx(math.sqrt((0.1 - 0.08**2) / 99))


@pytest.mark.parametrize(("gained", "lost", "said", "code"), [
    (0, 15, "regressed", 1), (25, 40, "inconclusive", 0), (15, 0, "improved", 0),
    (0, 0, "inconclusive", 0),
])  # fmt: skip
def test_verdict_and_exit_code_on_500_documents(tmp_path, gained, lost, said, code):
    found = compare(*arms(tmp_path, {"t": (500, gained, lost)}))
    assert found.rows[0].verdict == said
    assert found.exit_code == code


def test_what_is_detectable_grows_with_the_number_of_tasks(tmp_path):
    alone = compare(*arms(tmp_path / "a", {"t0": (50, 6, 0)})).rows[0].result
    many = {f"t{i}": (50, 0, 0) for i in range(1, 9)}
    of_nine = compare(*arms(tmp_path / "b", {"t0": (50, 6, 0)} | many)).rows
    assert of_nine[0].result.minimum_detectable > 1.3 * alone.minimum_detectable
    assert of_nine[1].result.minimum_detectable == pytest.approx(9 / 50)  # 2 / 2**9 <= 0.05 / 9
    strict = compare(*arms(tmp_path / "c", {"t0": (50, 6, 0)}), confidence=0.99).rows[0].result
    assert strict.minimum_detectable == pytest.approx(
        (scipy.stats.t.isf(0.005, 49) + scipy.stats.t.ppf(0.8, 49)) * strict.stderr
    )


def test_many_tasks_raise_the_bar(tmp_path):
    # p = 0.031 alone; beside nine tasks without a change it is no finding any more.
    alone = compare(*arms(tmp_path / "a", {"t0": (50, 6, 0)}))
    assert alone.rows[0].verdict == "improved"
    many = {f"t{i}": (50, 0, 0) for i in range(1, 10)}
    assert {row.verdict for row in compare(*arms(tmp_path / "b", {"t0": (50, 6, 0)} | many)).rows} \
        == {"inconclusive"}  # fmt: skip


def test_the_same_model_at_another_batch_size_is_inconclusive(tmp_path):
    rng = np.random.default_rng(0)
    folders = []
    for arm in (0, 1):
        rows = []
        for i in range(200):
            scores = np.random.default_rng(i).normal(-3, 1, 2) + 1e-5 * rng.random(2) + 2e-5 * arm
            hit = float(scores.argmax() == 0)
            rows.append(choice_sample(i, scores, acc=hit))
        config = {"batch_size": 1 + 7 * arm}
        folders.append(write(tmp_path / str(arm), {"t": rows}, config=config))
    found = compare(*folders)
    assert {row.metric for row in found.rows} == {"acc", "acc_corrected", "margin"}
    assert {row.verdict for row in found.rows} == {"inconclusive"}
    assert "batch_size: 1 in A, 8 in B" in found.notes


def test_a_paired_effect_that_an_unpaired_test_misses_is_found(tmp_path):
    found = compare(*arms(tmp_path, {"t": (1000, 20, 2)})).rows[0]
    a, b = (
        [one.values["acc"] for one in results.load_run(tmp_path / arm).samples("t")]
        for arm in ("m__baseline", "m__act")
    )
    assert scipy.stats.ttest_ind(a, b).pvalue > 0.3
    assert found.verdict == "improved"


def test_lower_is_better(tmp_path):
    better = {"acc": False}
    found = compare(*arms(tmp_path, {"t": (500, 15, 0)}, better=better))
    assert found.rows[0].verdict == "regressed"
    assert found.exit_code == 1
    assert "lower is better" in found.to_markdown()


def test_a_run_against_itself(tmp_path):
    folder, _ = arms(tmp_path, {"t": (20, 3, 1)})
    found = compare(folder, folder)
    assert found.rows[0].result.difference == 0
    assert found.exit_code == 0


# -- joining ---------------------------------------------------------------------------------------


def changed(tmp_path, change):
    rows = [sample(i, 1.0) for i in range(10)]
    other = [dict(row) for row in rows]
    change(other)
    return write(tmp_path / "a", {"t": rows}), write(tmp_path / "b", {"t": other})


def test_the_order_in_the_file_does_not_matter(tmp_path):
    assert compare(*changed(tmp_path, lambda rows: rows.reverse())).rows[0].result.documents == 10


@pytest.mark.parametrize(("change", "message"), [
    (lambda rows: rows[7].update(prompt_hash="other"),
     r"document 7 of A has another prompt in B \(prompt_hash prompt7 and other\)"),
    (lambda rows: rows[3].update(doc_hash="other"), r"document 3 of A is not in B \(doc_hash doc3"),
    (lambda rows: rows[2].update(target_hash="u"), "document 2 of A has another right answer in B"),
    (lambda rows: rows.pop(), "document 9 of A is not in B .*10 samples in A, 9 in B"),
    (lambda rows: rows.append(sample(10, 1.0)), "document 10 of B is not in A"),
    (lambda rows: rows.append(dict(rows[0])), "document 0 of B occurs more often there than in A"),
    (lambda rows: [row.update(filter="strict") for row in rows], "has filter 'none', B has none"),
])  # fmt: skip
def test_a_mismatch_names_the_first_difference(tmp_path, change, message):
    with pytest.raises(ResultError, match=message) as error:
        compare(*changed(tmp_path, change))
    assert "task t" in str(error.value)
    assert "\n" not in str(error.value)


def test_documents_that_occur_twice_are_paired_in_order():
    def make(doc_id, acc):
        return results.Sample(doc_id, "d", "p", "t", "none", {"acc": acc}, {})

    pairs = pairing.join("t", [make(0, 0.0), make(5, 1.0)], [make(0, 0.25), make(5, 0.75)])
    assert [(a.values["acc"], b.values["acc"]) for a, b in pairs["none"]] == [(0, 0.25), (1, 0.75)]


def test_filters_are_compared_apart(tmp_path):
    def rows(strict, loose):
        return [
            sample(i, acc, filter=name)
            for name, values in (("strict", strict), ("loose", loose))
            for i, acc in enumerate(values)
        ]

    a = write(tmp_path / "a", {"t": rows([0.0, 1, 0], [0.0, 1, 1])})
    b = write(tmp_path / "b", {"t": rows([1.0, 1, 0], [0.0, 1, 0])})
    for folder, strict, loose in ((a, 1 / 3, 2 / 3), (b, 2 / 3, 1 / 3)):
        path = folder / f"results_{DATE}.json"
        data = json.loads(path.read_text())
        data["results"]["t"] = {"acc,strict": strict, "acc,loose": loose}
        path.write_text(json.dumps(data))
    first, second = compare(a, b).rows
    assert (first.filter, first.result.difference) == ("strict", pytest.approx(1 / 3))
    assert (second.filter, second.result.difference) == ("loose", pytest.approx(-1 / 3))
    assert (first.headline, second.headline) == (True, False)


# -- metrics ---------------------------------------------------------------------------------------


def choice_sample(doc_id, scores, *, acc, target=0, **more):
    return sample(
        doc_id, acc, target=str(target),
        arguments={f"gen_args_{i}": {"arg_0": "Q", "arg_1": f" {'ABCD'[i]}"}
                   for i in range(len(scores))},
        filtered_resps=[[str(float(one)), "False"] for one in scores], **more,
    )  # fmt: skip


def test_label_prior_correction_and_margin_stand_beside_the_accuracy(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    folders, expected = [], []
    for arm, bias in ((0, 0.0), (1, 4.0)):
        scores = np.random.default_rng(1).normal(0, 1, (300, 2))
        scores[np.arange(300), labels] += 1
        scores[:, 1] += bias
        expected.append(stats.corrected_accuracy(scores, labels))
        rows = [choice_sample(i, scores[i], acc=expected[-1].raw_hits[i], target=int(labels[i]))
                for i in range(300)]  # fmt: skip
        folders.append(write(tmp_path / str(arm), {"t": rows}))
    rows = by_name(compare(*folders))
    assert rows["t", "acc"].verdict == "regressed"
    assert rows["t", "acc"].headline
    corrected = rows["t", "acc_corrected"]
    assert (corrected.score_a, corrected.score_b) == (expected[0].corrected, expected[1].corrected)
    assert corrected.result.difference == pytest.approx(0)  # the bias was all that changed
    assert corrected.derived
    assert not corrected.headline


@pytest.mark.parametrize("texts", [("no", "yes"), ("False", "True"), ("True", "False")])
@pytest.mark.parametrize("as_text", [True, False])
def test_labels_that_are_true_or_false(tmp_path, texts, as_text):
    """lm-eval takes them as 1 and 0; all that is computed from scores was missing."""
    rows = []
    for i in range(12):
        label = i % 2
        wanted = texts[label] if as_text else bool(label)
        row = choice_sample(i, (-1.0, -1.5), acc=float(label == 0), target=wanted)
        for one, text in zip(row["arguments"].values(), texts, strict=True):
            one["arg_1"] = f" {text}"
        rows.append(row)
    found = by_name(compare(*(write(tmp_path / name, {"t": rows}) for name in "ab")))
    assert found["t", "margin"].score_a == pytest.approx(0.0)
    assert found["t", "acc_corrected"].score_a == 0.5
    rows[0]["acc"] = 0.0  # then no reading agrees with what was logged
    found = by_name(compare(*(write(tmp_path / name, {"t": rows}) for name in "cd")))
    assert "cannot be told" in found["t", "margin"].note


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"target": -1}, "1 documents have no single right answer among their choices"),
        ({"target": 7}, "1 documents have no single right answer among their choices"),
        ({"scores": (-1.0, -math.inf)}, "1 documents have a choice that was not scored"),
        ({"scores": (-1.0,)}, "1 documents have fewer than two choices"),
    ],
)
def test_what_cannot_be_derived_says_why(tmp_path, broken, why):
    """One unlabelled row among thousands took all corrected figures away, without a word."""
    given = [{"scores": (-1.0, -2.0), "target": i % 2} for i in range(12)]
    given[3] |= broken
    rows = [
        choice_sample(i, one["scores"], acc=float(one["target"] == 0), target=one["target"])
        for i, one in enumerate(given)
    ]
    folders = [write(tmp_path / name, {"t": rows}) for name in "ab"]
    found = compare(*folders)
    assert by_name(found)["t", "acc"].result.difference == 0
    margin = by_name(found)["t", "margin"]
    assert margin.result is None
    assert margin.note.startswith(why)
    assert why in found.to_markdown()
    assert "acc_corrected" not in {row.metric for row in found.rows}


def skipped_sample(doc_id: int, target: int) -> dict:
    """A document too long for the model: -inf for both choices, so that the first one wins."""
    row = choice_sample(doc_id, (-math.inf, -math.inf), acc=float(target == 0), target=target)
    for one in row["arguments"].values():
        one["arg_2"] = {"overlength": "skipped"}
    return row


@pytest.mark.parametrize("where", ["ab", "a", "b"])
def test_documents_that_were_not_scored_are_no_part_of_a_difference(tmp_path, where):
    """12 of 12 documents were skipped, and both arms had an accuracy of 50 %."""
    folders = []
    for arm, best in (("a", 0), ("b", 1)):
        scores = (-1.0, -2.0) if best == 0 else (-2.0, -1.0)
        rows = [choice_sample(i, scores, acc=float(i % 2 == best), target=i % 2) for i in range(9)]
        more = [choice_sample(i, scores, acc=float(best == 0), target=0) for i in range(9, 13)]
        if arm in where:
            more = [skipped_sample(i, 0) for i in range(9, 13)]
        folders.append(write(tmp_path / arm, {"t": [*rows, *more]}))
    rows = by_name(compare(*folders))
    acc = rows["t", "acc"]
    assert (acc.score_a, acc.score_b) == (pytest.approx(5 / 9), pytest.approx(4 / 9))
    assert acc.note == "4 documents with an answer too long to be scored left out"
    assert rows["t", "margin"].score_a == pytest.approx(1 / 9)
    assert rows["t", "acc_corrected"].result.documents == 9


def test_a_group_says_of_how_many_tasks_documents_were_left_out(tmp_path):
    rows = [choice_sample(i, (-1.0, -2.0), acc=float(i % 2 == 0), target=i % 2) for i in range(8)]
    tasks = {"whole": rows, "short": [*rows[:6], skipped_sample(6, 0), skipped_sample(7, 1)]}
    folders = [write(tmp_path / name, tasks, groups={"g": list(tasks)}) for name in "ab"]
    row = by_name(compare(*folders))["g", "acc"]
    assert row.note == "documents left out in 1 of its tasks, see there"
    assert row.result.documents == 14


def test_a_task_of_which_nothing_was_scored_has_no_verdict(tmp_path):
    rows = [skipped_sample(i, i % 2) for i in range(12)]
    found = compare(*(write(tmp_path / name, {"t": rows}) for name in "ab"))
    acc = by_name(found)["t", "acc"]
    assert acc.result is None
    assert acc.note == "none of its documents was scored whole; not tested"
    assert "no verdict, nothing could be tested" in found.summary()


def test_weighted_perplexity_and_bits_agree_with_the_reported_score(tmp_path):
    folders = []
    for arm in (0, 1):
        rows = []
        for i in range(40):
            words, loss = 10 + i, (3.0 - 0.1 * arm) * (10 + i) + i % 3
            metrics = {"word_perplexity": [-loss, words], "bits_per_byte": [-loss, 5 * words]}
            rows.append(sample(i, 1.0) | metrics | {"metrics": [*metrics]})
        loss, words = (sum(r["word_perplexity"][k] for r in rows) for k in (0, 1))
        scores = {"word_perplexity,none": math.exp(-loss / words),
                  "bits_per_byte,none": -loss / (5 * words) / math.log(2)}  # fmt: skip
        better = {"word_perplexity": False, "bits_per_byte": False}
        given = {"scores": {"t": scores}, "better": better}
        folders.append(write(tmp_path / str(arm), {"t": rows}, **given))
    rows = by_name(compare(*folders))
    for metric in ("word_perplexity", "bits_per_byte"):
        row = rows["t", metric]
        run = results.load_run(folders[1])
        assert row.result.score_b == pytest.approx(run.score("t", metric, "none"))
        assert row.verdict == "improved"


def test_an_aggregation_that_is_no_mean_is_shown_and_not_tested(tmp_path):
    def folder(name, f1):
        rows = [sample(i, i % 2 + 0.0) | {"f1": [i % 2, 1], "odd": 1.0, "metrics":
                ["f1", "odd", "acc"]} for i in range(10)]  # fmt: skip
        return write(tmp_path / name, {"t": rows}, scores={"t": {"f1,none": f1, "odd,none": 0.3}})

    found = compare(folder("a", 0.5), folder("b", 0.6))
    rows = by_name(found)
    for metric in ("f1", "odd"):
        assert rows["t", metric].result is None
        assert "not tested" in rows["t", metric].note
    assert rows["t", "f1"].score_b == 0.6
    assert rows["t", "acc"].headline  # the first metric that could be tested
    assert "+0.1000" in found.to_markdown()


def test_documents_without_a_number_are_left_out_and_counted(tmp_path):
    rows = [sample(i, float(i % 2)) for i in range(10)]
    other = [dict(row) for row in rows]
    other[0]["acc"] = None
    rows[1]["acc"] = math.nan
    a, b = write(tmp_path / "a", {"t": rows}), write(tmp_path / "b", {"t": other})
    for folder, score in ((a, 4 / 9), (b, 5 / 9)):
        path = folder / f"results_{DATE}.json"
        data = json.loads(path.read_text())
        data["results"]["t"]["acc,none"] = score
        path.write_text(json.dumps(data))
    row = compare(a, b).rows[0]
    assert row.result.documents == 8
    assert "2 documents without a number" in row.note


# -- clusters and groups ---------------------------------------------------------------------------


def test_documents_that_share_a_passage_are_resampled_together(tmp_path):
    def folder(name, arm):
        rows = [sample(i, float(arm and i < 30), doc={"passage": f"p{i // 10}", "n": f"{i % 7}"})
                for i in range(60)]  # fmt: skip
        return write(tmp_path / name, {"boolq": rows})

    a, b = folder("a", 0), folder("b", 1)
    row = compare(a, b).rows[0]
    assert row.result.clusters == 6
    assert row.clustered_by == "passage"
    assert row.verdict == "inconclusive"  # three passages of six: 2 of 8 sign patterns
    assert "60 (6 passages)" in compare(a, b).to_markdown()
    blind = compare(a, b, clusters={"boolq": None}).rows[0]
    assert blind.result.clusters is None
    assert blind.verdict == "improved"
    assert compare(a, b, clusters={"boolq": "n"}).rows[0].result.clusters == 7
    with pytest.raises(ResultError, match="document 0 has no field 'title'"):
        compare(a, b, clusters={"boolq": "title"})


@pytest.mark.parametrize("by_size", [False, True])
def test_a_group_weighs_its_tasks_as_lm_eval_did(tmp_path, by_size):
    flips = {"small": (20, 8, 0), "large": (200, 0, 0)}
    folders = arms(tmp_path, flips, groups={"both": ["small", "large"]}, by_size=by_size)
    row = by_name(compare(*folders))["both", "acc"]
    assert row.kind == "group"
    assert row.result.difference == pytest.approx(8 / 220 if by_size else 0.4 / 2)
    reported = results.load_run(folders[1]).score("both", "acc", "none")
    assert row.result.score_b == pytest.approx(reported)
    assert row.verdict == "improved"


def test_groups_that_cannot_be_tested_say_why(tmp_path):
    flips = {"x": (20, 8, 0), "y": (30, 0, 0)}
    more = {"groups": {"g": ["x", "y"]}}
    odd = arms(tmp_path / "1", flips, scores={"g": {"acc,none": 0.123}}, **more)
    assert "no mean of its tasks" in by_name(compare(*odd))["g", "acc"].note
    lost = arms(tmp_path / "2", flips, **more)
    (lost[1] / f"samples_y_{DATE}.jsonl").unlink()
    rows = by_name(compare(*lost))
    assert "task y could not be tested" in rows["g", "acc"].note
    assert "not in the samples" in rows["y", "acc"].note
    assert rows["x", "acc"].verdict == "improved"


@pytest.mark.parametrize("by_size", [False, True])
def test_a_group_of_subjects_is_clustered_by_subject(tmp_path, by_size):
    sizes = {"mmlu_law": 30, "mmlu_art": 10, "mmlu_math": 20}

    def folder(name, arm):
        tasks = {
            task: [sample(i, float(arm and (task != "mmlu_math")), doc={"subject": task})
                   for i in range(n)]
            for task, n in sizes.items()
        }  # fmt: skip
        return write(tmp_path / name, tasks, groups={"mmlu": list(sizes)}, by_size=by_size)

    row = by_name(compare(folder("a", 0), folder("b", 1)))["mmlu", "acc"]
    assert row.clustered_by == "subject"
    assert row.result.clusters == 3
    assert row.result.difference == pytest.approx(40 / 60 if by_size else 2 / 3)
    assert row.result.p_value == 0.5  # two subjects changed: 2 of 4 sign patterns
    assert row.result.flips.gained == 40


# -- what is compared ------------------------------------------------------------------------------


def test_tasks_of_one_run_only_are_noted_and_no_common_task_is_an_error(tmp_path):
    a, _ = arms(tmp_path / "1", {"x": (10, 1, 0), "y": (10, 1, 0)})
    _, b = arms(tmp_path / "2", {"x": (10, 1, 0), "z": (10, 1, 0)})
    found = compare(a, b)
    assert [row.name for row in found.rows] == ["x"]
    assert found.notes == ("only in A: y", "only in B: z")
    _, c = arms(tmp_path / "3", {"z": (10, 1, 0)})
    with pytest.raises(ResultError, match=r"no task in common .only in A: x, y; only in B: z"):
        compare(a, c)


def test_tasks_can_be_chosen_and_a_misspelt_one_gets_a_suggestion(tmp_path):
    folders = arms(tmp_path, {"sst2": (10, 1, 0), "cb": (10, 1, 0)}, groups={"g": ["sst2", "cb"]})
    assert [row.name for row in compare(*folders, tasks=["cb"]).rows] == ["cb"]
    assert [row.name for row in compare(*folders, tasks=["g"]).rows] == ["g"]
    with pytest.raises(ResultError, match=r"'sst'.*did you mean 'sst2'\?"):
        compare(*folders, tasks=["sst"])


def test_runs_without_samples_say_what_to_do(tmp_path):
    folders = arms(tmp_path, {"t": (10, 1, 0)})
    for folder in folders:
        (folder / f"samples_t_{DATE}.jsonl").unlink()
    with pytest.raises(ResultError, match=r"no samples to pair .*--log_samples"):
        compare(*folders)


def test_samples_files_alone_can_be_compared(tmp_path):
    a, b = arms(tmp_path, {"t": (500, 15, 0)})
    found = compare(a / f"samples_t_{DATE}.jsonl", b / f"samples_t_{DATE}.jsonl")
    assert found.rows[0].verdict == "improved"
    assert found.rows[0].score_a == pytest.approx(0.486)


@pytest.mark.parametrize("by_size", [False, True])
def test_what_lm_eval_itself_writes(tmp_path, monkeypatch, by_size):
    """Two seeds of lm-eval's dummy model, through its evaluator and its own writer."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    from lm_eval.loggers.evaluation_tracker import EvaluationTracker
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache", raising=False)
    for name, documents in (("x", 30), ("y", 12)):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(
            json.dumps({"q": f"{name} {i}", "answer": i % 3}) + "\n" for i in range(documents)
        ))  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(
            f"task: zz_{name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}?'\n"
            "doc_to_target: answer\ndoc_to_choice: ['1', '2', '0']\n"
            "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
        )
    (tmp_path / "group.yaml").write_text(
        "group: zz_both\ntask: [zz_x, zz_y]\n"
        f"aggregate_metric_list: [{{metric: acc, weight_by_size: {str(by_size).lower()}}}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    for arm in (0, 1):
        tracker = EvaluationTracker(output_path=str(tmp_path / "out" / str(arm)))
        found = evaluator.simple_evaluate(
            model="dummy", tasks=["zz_both"], task_manager=manager, bootstrap_iters=0,
            random_seed=arm, log_samples=True, evaluation_tracker=tracker, verbosity="ERROR",
        )  # fmt: skip
        samples = found.pop("samples")
        tracker.save_results_aggregated(results=found, samples=samples)
        for task, rows in samples.items():
            tracker.save_results_samples(task_name=task, samples=rows)
    rows = by_name(compare(tmp_path / "out" / "0", tmp_path / "out" / "1"))
    assert [key for key, row in rows.items() if row.headline] == [
        ("zz_x", "acc"), ("zz_y", "acc"), ("zz_both", "acc"),
    ]  # fmt: skip
    for arm, name in enumerate("ab"):
        run = results.load_run(tmp_path / "out" / str(arm))
        for (task, metric), row in rows.items():
            if not row.derived:
                ours = getattr(row.result, f"score_{name}")
                assert ours == pytest.approx(run.score(task, metric, "none"))
    assert rows["zz_both", "acc"].result.documents == 42
    assert rows["zz_both", "acc"].result.flips.gained > 0
    assert rows["zz_x", "margin"].result is not None


# -- how it is shown -------------------------------------------------------------------------------


def test_json_markdown_and_terminal_say_the_same(tmp_path):
    folders = arms(tmp_path, {"a|b": (500, 0, 15), "one": (1, 0, 0)}, groups={"g": ["a|b", "one"]})
    found = compare(*folders)
    body = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert body["schema"] == "act-harness/comparison/1"
    assert body["exit_code"] == 1
    assert body["a"]["label"] == "m__baseline"
    row = body["rows"][0]
    assert row["result"]["flips"] == {"gained": 0, "lost": 15, "p_value": pytest.approx(2**-14)}
    assert set(row["result"]["interval"]) == {"low", "high"}
    assert body["rows"][1]["result"]["stderr"] is None  # one document: nothing is known
    markdown = found.to_markdown()
    assert "| a\\|b | acc | 500 |" in markdown
    assert "**regressed**" in markdown
    assert "| unknown |" in markdown
    plain = found.to_terminal(width=200)
    assert "regressed" in plain
    assert "\x1b[" not in plain
    assert "\x1b[" in found.to_terminal(width=200, colour=True)
    for text in (markdown, plain):
        assert "+0 / -15" in text
        assert found.summary() in text
    assert found.summary() == (
        "3 tasks and groups by acc: 0 improved, 1 regressed, 2 inconclusive; "
        "2 metrics not tested (one acc, g acc)."
    )


def wide_comparison(tmp_path):
    """Long names, further metrics, passages, a group and a score below -10: all that is wide."""
    rng = np.random.default_rng(0)
    tasks = ({}, {})
    for task in ("act_boolq_with_a_long_name", "act_sst2"):
        for arm in (0, 1):
            rows = []
            for i in range(40):
                first = -30.0 + 12 * (i % 2) + arm * (8 + rng.normal(0, 0.5))
                row = choice_sample(i, (first, -20.0), acc=float(first > -20.0))
                rows.append(row | {"doc": {"text": f"t{i}", "passage": f"p{i // 2}"}})
            tasks[arm][task] = rows
    groups = {"act_classification_of_everything": list(tasks[0])}
    return compare(
        write(tmp_path / "m__baseline", tasks[0], groups=groups),
        write(tmp_path / "m__act", tasks[1], groups=groups),
    )


@pytest.mark.parametrize("width", [60, 80, 120, None])
def test_nothing_is_cut_at_any_width(tmp_path, width, monkeypatch):
    """At 80 columns the metric column was gone, and numbers ended in an ellipsis."""
    monkeypatch.delenv("COLUMNS", raising=False)
    found = wide_comparison(tmp_path)
    text = found.to_terminal(width=width)
    assert "…" not in text
    body = text.split("\n\n", 1)[1]
    for row in found.rows:
        cells = [cell for cell in comparison._cells(row) if cell]
        assert len(cells) >= 9
        for cell in cells:
            assert re.search(rf"(?<![\w.+-]){re.escape(cell)}(?![\w.])", body), (cell, text)
    if width is not None:
        assert max(len(line) for line in body.splitlines()) <= width
        per_row = [line for line in body.splitlines() if re.match(r"  (acc|margin)", line)]
        assert len(per_row) == len(found.rows)
        for line, row in zip(per_row, found.rows, strict=True):
            assert line.split(":")[0].strip() == comparison._metric(row)
            assert row.verdict in line  # beside the metric, whatever the width
    else:  # no terminal: one line a row
        assert sum("act_sst2 " in line for line in body.splitlines()) == 3


def test_a_terminal_says_what_its_columns_mean(tmp_path):
    text = compare(*arms(tmp_path, {"t": (50, 6, 0)})).to_terminal(width=80)
    lines = text.splitlines()
    assert [line[:3] for line in lines if line.startswith(("A: ", "B: "))] == ["A: ", "B: "]
    told = " ".join(text.split())
    for word in ("gained/lost: documents right", "detectable: the smallest", "*: computed"):
        assert word in told


def test_a_table_that_fits_is_a_table(tmp_path, monkeypatch):
    found = compare(*arms(tmp_path, {"t": (50, 6, 0)}))
    (line,) = [x for x in found.to_terminal(width=160).splitlines() if x.startswith("t ")]
    assert line.split()[:5] == ["t", "acc", "50", "0.4400", "0.5600"]
    monkeypatch.setenv("COLUMNS", "80")
    assert "t\n  acc:" in found.to_terminal()


def test_further_metrics_do_not_contradict_the_summary(tmp_path):
    """Rows said "improved" above "0 improved": those were margins, which decide nothing."""
    found = wide_comparison(tmp_path)
    further = [row for row in found.rows if not row.headline]
    assert {row.verdict for row in further if row.metric == "margin"} == {"improved"}
    said = comparison._cells(next(row for row in further if row.metric == "margin"))[-1]
    assert said == "(improved)"
    assert found.summary().startswith("3 tasks and groups by acc: ")
    assert "Further metrics, in brackets, which do not decide: 3 improved" in found.summary()
    for text in (found.to_markdown(), found.to_terminal(width=80)):
        table = text.split("3 tasks")[0]
        count = len(re.findall(r"(?<!\()improved", table))
        assert count == sum(row.verdict == "improved" for row in found.rows if row.headline)


def test_headlines_alone(tmp_path):
    rows = [choice_sample(i, (0.0, -1.0), acc=1.0) for i in range(5)]
    folder = write(tmp_path, {"t": rows})
    found = compare(folder, folder)
    assert "margin" in found.to_markdown().split("B - A on")[0]
    assert "margin" not in found.to_markdown(headline_only=True).split("B - A on")[0]


def test_equal_input_gives_equal_output(tmp_path):
    folders = arms(tmp_path, {"x": (30, 3, 1), "y": (30, 2, 4)}, groups={"g": ["x", "y"]})
    assert compare(*folders).to_json() == compare(*folders).to_json()
