from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tracked_rows import comparison, row

from act_harness.evidence import stats
from act_harness.tracking import values as tracked

RESULTS = {
    "results": {
        "org/task": {"alias": "x", "sample_len": 20, "acc,none": 0.5, "acc_stderr,none": 0.1,
                     "f1,none": "N/A"},
        "gsm": {"exact_match,strict": 0.25, "exact_match,flexible": math.nan, "sample_len": 4},
    },
    "groups": {"all": {"acc,none": 0.4, "sample_count": {"acc,none": 24}}},
    "n-shot": {"org/task": 5},
}  # fmt: skip


def test_scores_of_tasks_and_groups_with_filters_and_missing_numbers():
    assert tracked.result_scalars(RESULTS) == {
        "org/task/acc": 0.5, "org/task/acc_stderr": 0.1, "org/task/f1": None,
        "org/task/documents": 20, "gsm/exact_match,strict": 0.25,
        "gsm/exact_match,flexible": None, "gsm/documents": 4, "all/acc": 0.4,
    }  # fmt: skip
    table = tracked.results_table(RESULTS)
    assert table.rows[0] == ["org/task", "acc", "none", 0.5, 0.1, 20, 5]
    assert table.rows[1] == ["org/task", "f1", "none", None, None, 20, 5]
    assert [one[0] for one in table.rows] == ["org/task", "org/task", "gsm", "gsm", "all"]


def test_paired_differences():
    found = comparison(row("t"), row("g", filter="strict"), row("no", result=None))
    scalars = tracked.comparison_scalars(found)
    assert scalars["t/acc_difference"] == 0.25
    assert scalars["t/acc_low"] < 0.25 < scalars["t/acc_high"]
    assert scalars["t/acc_p"] == 0.5
    assert scalars["g/acc,strict_verdict"] == "inconclusive"
    assert not any(key.startswith("no/") for key in scalars)
    table = tracked.comparison_table(found)
    by_column = dict(zip(table.columns, table.rows[0], strict=True))
    assert (by_column["gained"], by_column["lost"], by_column["documents"]) == (2, 1, 4)
    assert table.rows[2][-1] == "not tested"
    assert {len(one) for one in table.rows} == {len(table.columns)}


def test_one_document_has_no_interval():
    result = stats.paired_difference([0], [1])
    scalars = tracked.comparison_scalars(comparison(row("t", result=result)))
    assert scalars["t/acc_low"] is None


def test_counters_nested_and_missing():
    counters = {"share": np.float32(0.5), "by_layer": {"3": 2, "4": math.inf}, "note": "x"}
    assert tracked.counter_scalars(counters | {"gone": None}) == {
        "counters/share": 0.5, "counters/by_layer/3": 2.0, "counters/gone": None,
    }  # fmt: skip


def test_heads_with_common_and_own_strengths():
    artifact = {
        "heads": {"10": [3], "2": [5, 1]},
        "calibration": {"mass": "damp", "beta": 0.4},
        "strengths": {"2": {"5": {"mass": "reweight", "gamma": 2.0}}},
    }
    assert tracked.heads_table(artifact).rows == [
        [2, 1, "damp", 0.4], [2, 5, "reweight", 2.0], [10, 3, "damp", 0.4],
    ]  # fmt: skip


def test_run_config_is_json():
    artifact = {"name": "a", "heads": {"1": [2]}, "calibration": {"beta": np.float64(0.4)}}
    more = {"artifact_sha256": "f", "engine": "torch", "provenance": {"torch": "2"}}
    config = tracked.run_config(arm="act", model="m", artifact=artifact, tasks=("x",), **more)
    assert json.loads(json.dumps(config)) == config
    assert config["artifact"]["heads"] == {"1": [2]}
    assert config["artifact_name"] == "a"
    assert config["calibration"] == {"beta": 0.4}
    assert config["tasks"] == ["x"]
    assert tracked.run_config(arm="baseline", model="m")["artifact"] is None


def test_the_searchs_long_tables_are_no_configuration():
    search = {"recipe": {"rule": "top"}, "table": [1] * 99, "screen": {}, "rule": {}, "notes": []}
    kept = tracked.artifact_content({"name": "a", "search": search})
    assert kept == {"name": "a", "search": {"recipe": {"rule": "top"}, "notes": []}}
    assert tracked.artifact_content({"name": "a", "search": None})["search"] is None


def test_scores_over_seeds():
    one = {"t/acc": 0.5, "t/acc_stderr": 0.1, "t/documents": 8, "t/x": None, "t/acc_verdict": "a"}
    two = {**one, "t/acc": 1.0, "t/acc_verdict": "b"}
    assert tracked.over_seeds({3: one}) == one
    found = tracked.over_seeds({3: one, 5: two})
    assert (found["seed-3/t/acc"], found["seed-5/t/acc"], found["t/acc"]) == (0.5, 1.0, 0.75)
    assert found["t/acc_spread"] == pytest.approx(math.sqrt(0.125))
    assert found["t/documents"] == 8
    assert found["seed-5/t/acc_verdict"] == "b"
    assert not {"t/acc_stderr", "t/acc_verdict", "t/x", "t/documents_spread"} & set(found)


def test_tables_over_seeds_with_other_columns():
    tables = {1: tracked.Table(["a"], [[1]], 2), 2: tracked.Table(["b", "a"], [[5, 6]], 3)}
    joined = tracked.tables_over_seeds(tables)
    assert joined == (["fewshot_seed", "a", "b"], [[1, 1, None], [2, 6, 5]], 5)
    assert tracked.tables_over_seeds({1: tables[1]}) is tables[1]


def test_rows_are_capped_by_number_and_bytes():
    rows = [[n, "x" * 10] for n in range(9)]
    one = len(json.dumps(rows[0]))
    assert tracked.capped(["n", "t"], rows, max_rows=2) == (["n", "t"], rows[:2], 7)
    assert tracked.capped(["n", "t"], rows, max_rows=9, max_bytes=3 * one).rows == rows[:3]


# -- samples ---------------------------------------------------------------------------------------


def choice(doc_id, target):
    return {
        "doc_id": doc_id, "filter": "none", "target": target, "metrics": ["acc", "f1"],
        "arguments": {"gen_args_0": {"arg_0": "Q", "arg_1": " a"},
                      "gen_args_1": {"arg_0": "Q", "arg_1": " b"}},
        "filtered_resps": [["-2.0", "False"], ["-1.0", "False"]], "acc": 1.0, "f1": [1, 0],
    }  # fmt: skip


def generated(doc_id, answer):
    return {"doc_id": doc_id, "filter": "none", "target": ["x", "y"], "metrics": ["em"],
            "arguments": [("Q", {"until": ["\n"]})], "filtered_resps": [answer],
            "em": None}  # fmt: skip


def as_dicts(table):
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_choices_and_generations_in_one_table():
    table = tracked.samples_table([choice(0, 1), generated(1, "an \ud800 answer")])
    first, second = as_dicts(table)
    assert first["answer"] == " b"
    assert first["scores"] == "[-2.0, -1.0]"
    assert first["metric/acc"] == 1.0
    assert first["metric/f1"] == "[1, 0]"
    assert (first["target"], second["target"]) == ("1", '["x", "y"]')
    assert second["answer"] == "an ? answer"
    assert second["prompt"] == "Q"
    assert second["metric/em"] is None


def test_rows_bytes_and_cells_are_capped():
    rows = [choice(i, 0) for i in range(30)]
    table = tracked.samples_table(rows, max_rows=10)
    assert (len(table.rows), table.left_out) == (10, 20)
    one = len(json.dumps(tracked._sample_row(rows[0])))
    table = tracked.samples_table(rows, max_bytes=3 * one + 5)
    assert (len(table.rows), table.left_out) == (3, 27)
    assert [row[0] for row in table.rows] == [0, 1, 2]
    long = tracked.samples_table([generated(0, "x" * 5000)])
    assert as_dicts(long)[0]["answer"].endswith("(3000 more characters)")
    assert tracked.samples_table([]) == ([], [], 0)


def test_a_row_that_does_not_fit_ends_the_table():
    rows = [generated(0, "x"), generated(1, "y" * 1900), generated(2, "z")]
    table = tracked.samples_table(rows, max_bytes=600)
    assert ([row[0] for row in table.rows], table.left_out) == ([0], 2)


CELLS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
                  st.lists(st.integers(), max_size=2))  # fmt: skip


@given(st.integers(1, 3).flatmap(
    lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), max_size=5)
))  # fmt: skip
def test_columns_become_one_type_each(rows):
    made = tracked.uniform(rows)
    assert [len(row) for row in made] == [len(row) for row in rows]
    for column in zip(*made, strict=True):
        kinds = {bool if isinstance(v, bool) else str if isinstance(v, str) else float
                 for v in column if v is not None}  # fmt: skip
        assert len(kinds) <= 1
    json.dumps(made, allow_nan=False)
