"""Everything that is read: what is refused, with one line, and that nothing else ever comes out."""

import gzip
import json
import math
import re
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import act_harness
from act_harness.artifact import load_artifact, shipped_artifacts
from act_harness.errors import (
    ActHarnessError,
    ArtifactError,
    InfrastructureError,
    RecipeError,
    ResultError,
)
from act_harness.evidence.results import load_run
from act_harness.mtbench.judge.answers import find_arms
from act_harness.mtbench.judge.client import (
    _content,
    _GiveUpError,
    _TryAgainError,
    parse_reply,
    rating_of,
)
from act_harness.mtbench.judge.ledger import Judgments
from act_harness.mtbench.judge.prompts import load_prompts, load_references
from act_harness.mtbench.judge.settings import load_judge_settings
from act_harness.publication.evaluation import find_evaluation
from act_harness.regress.baseline import load_baseline
from act_harness.regress.suite import load_suite, shipped_suites
from act_harness.reports.sources import find_sources
from act_harness.search.recipe import load_recipe
from act_harness.support import atomic, reading
from act_harness.support.model_arguments import check_place, loading
from act_harness.support.paths import recipes_path

PACKAGE = Path(act_harness.__file__).parent
DIGITS = "1" * 5000

# -- one door --------------------------------------------------------------------------------------


def test_nothing_else_in_the_package_parses_json_or_yaml():
    # The stub's value is a path that this package's own build wrote as JSON; see paths.
    allowed = {"reading.py", "paths.py"}
    own = re.compile(
        r"json\.loads?\(|JSONDecoder|yaml\.\w*load\w*\(|model_validate_json|parse_raw|literal_eval"
    )
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in allowed
        for line in path.read_text(encoding="utf-8").splitlines()
        if own.search(line)
    ]
    assert found == []


def test_every_shipped_file_is_still_read():
    assert len(shipped_artifacts()) >= 2
    for path in shipped_artifacts().values():
        assert load_artifact(path).head_count() > 0
    for path in recipes_path().rglob("*.yaml"):
        assert load_recipe(path).tasks
    for name, path in shipped_suites().items():
        suite, folder = load_suite(name)
        assert folder == path.parent
        if (folder / "baseline.json").exists():
            assert load_baseline(folder, suite=suite.name).measurement.tasks


# -- JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"heads": 1, "a": {"b": 1, "b": 2}}', "the key 'b' stands there twice"),
        ("[" * 200 + "]" * 200, "nested more than 100 levels"),
        ("[" * 100_000, "nested more than 100 levels"),
        ('{"a":' * 100_000, "nested more than 100 levels"),
        ('"' + '\\"' * 100_000, "not JSON"),
        (DIGITS, "wider than 64 bits"),
        ("-18446744073709551616", "wider than 64 bits"),
        ("1e999", "too large"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        (r'"\ud800"', "half a surrogate pair"),
        (r'{"\udfff": 1}', "half a surrogate pair"),
        ('{\n"a": 1,\n}', r"line \d"),
        ("", "not JSON"),
    ],
)
def test_json_that_is_refused(text, said):
    with pytest.raises(ResultError, match=said) as caught:
        reading.parse_json(text, source="it", advice="mend it")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; mend it")
    assert len(str(caught.value)) < 200


def test_json_that_is_taken():
    assert reading.parse_json('{"a": [1, 2.5, "\\ud83d\\ude00", null]}', source="it") == {
        "a": [1, 2.5, "\U0001f600", None]
    }
    # Brackets within texts are no nesting; 64 bits are taken to the last one.
    assert reading.parse_json(json.dumps("[" * 500), source="it") == "[" * 500
    assert reading.parse_json("18446744073709551615", source="it") == 2**64 - 1
    assert reading.parse_json("[" * 100 + "]" * 100, source="it")


def test_the_output_of_a_model_is_taken_as_it_is():
    text = f'[NaN, -Infinity, {DIGITS}, 36893488147419103232, "\\ud800", 12]'
    value = reading.parse_json(text, source="it", lenient=True)
    assert math.isnan(value[0])
    assert value[1:] == [-math.inf, math.inf, 2.0**65, "\ud800", 12]
    with pytest.raises(ResultError, match="twice"):
        reading.parse_json('{"a": 1, "a": 1}', source="it", lenient=True)


# -- YAML ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands there twice"),
        ("- {x: 1, x: 1}", "the key 'x' stands there twice"),
        ("1: a\n1: b", "the key '1' stands there twice"),
        ("[" * 5000, "nested more than 100 levels"),
        ("- " * 300 + "a", "nested more than 100 levels"),
        ("&a [*a]", "part of itself"),
        ("a: &a {b: *a}", "part of itself"),
        ("a: &a [1]\nb: [" + "*a, " * 101 + "]", "more than 100 uses"),
        (f"a: {DIGITS}", "wider than 64 bits"),
        ("a: 0x_", "no whole number"),
        ("a: .nan", "no finite number"),
        ("a: 1e999", "not YAML|no finite"),
        ("a: !!python/object:os.system x", "tag"),
        ("a: !!int ''", "tag"),
        ("a: !!timestamp x", "tag"),
        ("? [1, 2]\n: 3", "a key is neither a text nor a number"),
        ("a: 'x", "not YAML"),
        ("a: *b", "undefined alias"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("a: \x00", "not YAML"),
        ("<<: 3", "not YAML"),
    ],
)
def test_yaml_that_is_refused(text, said):
    if text == "a: 1e999":
        # Without a point and a sign it is a text to YAML 1.1, which is nobody's number.
        assert reading.parse_yaml(text, source="it") == {"a": "1e999"}
        text = "a: 1.0e+999"
    with pytest.raises(RecipeError, match=said) as caught:
        reading.parse_yaml(text, source="it", error=RecipeError, advice="mend it")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; mend it")


def test_yaml_that_is_taken():
    text = """
    base: &base {a: 1, b: [x, 2.5]}
    more: {<<: *base, a: 2}
    day: 2024-01-02
    odd: 2024-99-99
    yes_or_no: true
    none:
    """
    assert reading.parse_yaml(text, source="it") == {
        "base": {"a": 1, "b": ["x", 2.5]},
        "more": {"a": 2, "b": ["x", 2.5]},
        "day": "2024-01-02",
        "odd": "2024-99-99",
        "yes_or_no": True,
        "none": None,
    }
    assert reading.parse_yaml("", source="it") is None


# -- files -----------------------------------------------------------------------------------------


def test_what_is_no_readable_file(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{\n"a": "\xe9"}')
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"[1]")[:-4])
    (tmp_path / "not.json.gz").write_bytes(b"[1]")
    for name, said in (
        ("missing.json", "no such file"),
        ("x" * 5000, "File name too long"),
        ("a\0b", "null"),
        (".", "Is a directory"),
        ("latin.json/x", "Not a directory"),
        ("latin.json", "not UTF-8 .line 2"),
        ("cut.json.gz", "cannot read"),
        ("not.json.gz", "cannot read"),
    ):
        with pytest.raises(ArtifactError, match=said) as caught:
            reading.read_json(tmp_path / name, error=ArtifactError)
        assert "\n" not in str(caught.value)
        assert not reading.is_file(tmp_path / name) or (tmp_path / name).exists()
    assert not reading.is_folder("x" * 5000)


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a" * 100)
    with pytest.raises(ResultError, match="more than 99 bytes"):
        reading.read_text(path, most_bytes=99)
    assert reading.read_text(path, most_bytes=100) == "a" * 100


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="needs a file that fails to be read"
)
def test_a_disk_that_fails_is_not_the_users_fault():
    with pytest.raises(InfrastructureError, match="check the disk"):
        reading.read_text("/proc/self/mem")


def test_a_byte_order_mark_is_left_out_and_gz_unpacked(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[2]"))
    assert reading.read_json(tmp_path / "a.json") == [1]
    assert reading.read_json(tmp_path / "a.json.gz") == [2]


def test_lines_that_people_write_need_no_newline_at_the_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert list(reading.read_lines(path, half_line="keep")) == [{"a": 1}, {"a": 2}]
    path.write_text("[1]\n" + "[" * 2000 + "\n")
    with pytest.raises(ResultError, match="line 2: nested more than 100"):
        list(reading.read_lines(path))


# -- artifacts are what they say -------------------------------------------------------------------


MODEL = {
    "id": "m",
    "architecture": "LlamaForCausalLM",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def document(**changes):
    return {
        "schema": "act-harness/heads/1",
        "name": "n",
        "model": MODEL,
        "calibration": {},
        "heads": {"0": [1, 2]},
        **changes,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(document())[:-1] + ', "heads": {"1": [3]}}', "'heads' stands there twice"),
        (json.dumps(document()).replace('{"0"', '{"0": [0], "0"'), "'0' stands there twice"),
        (json.dumps(document(heads={"00": [1]})), "'00'"),
        (json.dumps(document(heads={" 0": [1]})), "' 0'"),
        (json.dumps(document(heads={"+1": [1]})), "'\\+1'"),
        (json.dumps(document(heads={"1_0": [1]})), "'1_0'"),
        (json.dumps(document(heads={"1.0": [1]})), "'1.0'"),
        (json.dumps(document(heads={"\u0661": [1]})), "expected the number"),
        (json.dumps(document(heads={"0": [True]})), "heads.0.0: .*integer"),
        (json.dumps(document(heads={"0": [1.0]})), "heads.0.0: .*integer"),
        (json.dumps(document(heads={"0": ["1"]})), "heads.0.0: .*integer"),
        (json.dumps(document(calibration={"beta": True})), "beta"),
        (json.dumps(document(calibration={"beta": "0.4"})), "beta"),
        (json.dumps(document(calibration={"min_rows": True})), "min_rows"),
        (json.dumps(document(strengths={"0": {"1": {"beta": True}}})), "beta"),
        (json.dumps(document(strengths={"0": {"01": {"beta": 0.1}}})), "'01'"),
        (json.dumps(document(model={**MODEL, "num_hidden_layers": "3"})), "num_hidden_layers"),
        (json.dumps(document(model={**MODEL, "num_hidden_layers": True})), "num_hidden_layers"),
        (json.dumps({k: v for k, v in document().items() if k != "schema"}), "no 'schema'"),
        (json.dumps(document(schema="act-harness/heads/3")), "schema"),
        (json.dumps(document(calibration={"alpha": math.inf})), "Infinity"),
        (json.dumps(document(name="\ud800")), "surrogate"),
        ("[" * 3000, "nested"),
    ],
)  # fmt: skip
def test_an_artifact_is_taken_at_its_word_or_refused(tmp_path, text, said):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=said) as caught:
        load_artifact(path)
    assert "\n" not in str(caught.value)


def test_an_artifact_in_its_strict_form_is_read(tmp_path):
    path = tmp_path / "a.json"
    given = document(calibration={"beta": 0}, strengths={"0": {"1": {"beta": 1}}})
    path.write_text(json.dumps(given))
    artifact = load_artifact(path)
    assert artifact.heads == {0: (1, 2)}
    assert artifact.calibration.beta == 0.0
    assert artifact.strengths is not None
    assert artifact.strengths[0][1].beta == 1.0


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "../" * 2000])
def test_a_name_that_no_file_can_have(name):
    with pytest.raises(ArtifactError):
        load_artifact(name)
    with pytest.raises(RecipeError):
        load_recipe(name)
    with pytest.raises(RecipeError):
        load_suite(name)
    with pytest.raises(ResultError):
        load_run(name)
    with pytest.raises(ResultError):
        find_arms([Path(name)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: [a]\ntasks: [b]", "twice"),
        ("tasks: [a]\nsamples: true", "samples"),
        ("tasks: [a]\nsamples: '7'", "samples"),
        ("tasks: [a]\nsamples: 7.0", "samples"),
        ("tasks: [a]\nkeep: true", "keep"),
        ("tasks: [a]\ncalibration: {beta: true}", "beta"),
        ("tasks: [a]\ncalibration: {1: true}", "'1' is unknown"),
        ("tasks: [1]", "tasks"),
        ("1: 2", "unknown key"),
    ],
)
def test_a_recipe_is_taken_at_its_word_or_refused(tmp_path, text, said):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)
    (tmp_path / "judge.yaml").write_text("model: m\nconcurrency: true")
    with pytest.raises(RecipeError, match="concurrency"):
        load_judge_settings(tmp_path / "judge.yaml", paths=["x"])


# -- anything at all: a value or an error of ours --------------------------------------------------

KEYS = st.sampled_from(
    ["schema", "name", "model", "heads", "calibration", "strengths", "search", "id", "0", "00",
     "results", "configs", "groups", "group_subtasks", "samples", "config", "higher_is_better",
     "tasks", "limit", "layers", "artifacts", "acc,none", "choices", "message", "content", "turns",
     "question_id", "doc_id", "doc_hash", "prompt_hash", "metrics", "arguments", "resps", "acc",
     "filtered_resps", "doc", "prompt", "act_harness", "key", "value", "rating", "usage"]
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | KEYS
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=15,
)
SAMPLE = st.fixed_dictionaries(
    {"doc_id": SCALARS | st.integers(0, 3), "doc_hash": SCALARS, "prompt_hash": SCALARS},
    optional={
        "metrics": VALUES | st.just(["acc"]),
        "acc": VALUES,
        "filtered_resps": VALUES,
        "arguments": VALUES,
        "doc": VALUES,
        "target": VALUES,
    },
)
ARTIFACT = st.fixed_dictionaries(
    {
        "schema": st.just("act-harness/heads/1"),
        "name": SCALARS | st.just("n"),
        "model": VALUES | st.just(MODEL),
        "calibration": VALUES | st.just({}),
        "heads": VALUES | st.dictionaries(st.sampled_from(["0", "1", "01"]), VALUES),
    },
    optional={"strengths": VALUES, "search": VALUES, "provenance": VALUES},
)
RESULT = st.fixed_dictionaries(
    {"results": st.dictionaries(KEYS, VALUES, max_size=2)},
    optional={
        "configs": VALUES,
        "groups": VALUES,
        "group_subtasks": VALUES,
        "higher_is_better": VALUES,
        "samples": VALUES,
        "config": VALUES,
    },
)
SETTINGS = st.dictionaries(
    st.sampled_from(["name", "tasks", "model", "limit", "samples", "calibration", "layers", "top"]),
    VALUES,
    max_size=5,
)
TEXTS = (
    st.one_of(VALUES, ARTIFACT, RESULT, SETTINGS, SAMPLE, st.lists(SAMPLE)).map(
        lambda value: json.dumps(value).encode()
    )
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.text(alphabet="[]{}:,-&*!<>|'\"#? \n01.eEnax_", max_size=60).map(str.encode)
    | st.binary(max_size=60)
)
BOUNDED = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def run_and_samples(path):
    run = load_run(path)
    for name in (*run.tasks, *run.groups):
        for metric, kind in run.metrics(name):
            run.score(name, metric, kind)
            run.higher_is_better(name, metric)
        run.leaves(name)
        if run.has_samples(name):
            run.samples(name)


READERS = {
    "artifact": (load_artifact, "a.json"),
    "recipe": (load_recipe, "r.yaml"),
    "suite": (lambda path: load_suite(str(path)), "s.yaml"),
    "baseline": (lambda path: load_baseline(path.parent, suite="s"), "baseline.json"),
    "result": (run_and_samples, "results_2026-01-01T00-00-00.json"),
    "samples": (run_and_samples, "samples_t_2026-01-01T00-00-00.jsonl"),
    "conversations": (lambda path: find_arms([path]), "samples_mt_bench_2026-01-01.jsonl"),
    "judgments": (lambda path: Judgments(path.parent), "judgments.jsonl"),
    "judge settings": (load_judge_settings, "judge.yaml"),
    "references": (load_references, "references.jsonl"),
    "prompts": (load_prompts, "prompts.jsonl"),
    "lines": (lambda path: list(reading.read_lines(path)), "x.jsonl"),
    "yaml": (reading.read_yaml, "x.yaml"),
}


@pytest.mark.slow
@BOUNDED
@given(reader=st.sampled_from(sorted(READERS)), data=TEXTS, newline=st.booleans())
def test_every_reader_gives_a_value_or_one_line(tmp_path, reader, data, newline):
    read, name = READERS[reader]
    path = tmp_path / name
    path.write_bytes(data + b"\n" * newline)
    said = ""
    try:
        read(path)
    except ActHarnessError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 2000


@pytest.mark.slow
@BOUNDED
@given(data=TEXTS)
def test_a_judges_reply_is_a_verdict_or_another_try(data):
    try:
        text, _ = _content(parse_reply(data.decode("utf-8", "replace")))
        rating, _ = rating_of(text)
        assert rating is None or 1 <= rating <= 10
    except (_TryAgainError, _GiveUpError):
        pass


@pytest.mark.slow
@BOUNDED
@given(value=VALUES)
def test_what_is_written_is_read_again(tmp_path, value):
    path = tmp_path / "x.json"
    atomic.write_json(path, value)
    again = reading.read_json(path, lenient=True)
    assert json.dumps(again) == json.dumps(value) or has_wide_integer(value)


def has_wide_integer(value):
    found = re.findall(r"\d{18,}", json.dumps(value))
    return any(int(one) >= 2**64 for one in found if len(one) < sys.get_int_max_str_digits())


@pytest.mark.parametrize(
    ("read", "there", "misspelt"),
    [
        (load_artifact, "by-hand.json", "by-hnd.json"),
        (load_recipe, "my_recipe.yaml", "my_recpe.yaml"),
        (load_judge_settings, "judge.yaml", "jugde.yaml"),
        (load_run, "results", "result"),
        (find_evaluation, "results", "result"),
        (lambda path: find_sources([Path(path)]), "results", "result"),
        (load_suite, "nightly.yaml", "nigthly.yaml"),
    ],
    ids=["artifact", "recipe", "settings", "run", "publish", "report", "suite"],
)
def test_a_path_that_is_not_there_names_its_neighbour(tmp_path, monkeypatch, read, there, misspelt):
    """Misspelt files are as common as misspelt names, and had no suggestion."""
    (tmp_path / "mine" / there).mkdir(parents=True)
    if "." in there:
        (tmp_path / "mine" / there).rmdir()
        (tmp_path / "mine" / there).write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ActHarnessError, match=re.escape(f"did you mean 'mine/{there}'?")):
        read(f"mine/{misspelt}")
    monkeypatch.chdir(tmp_path / "mine")
    with pytest.raises(ActHarnessError, match=re.escape(f"did you mean '{there}'?")):
        read(misspelt)


def test_a_models_folder_is_suggested_where_it_holds_one(tmp_path, monkeypatch):
    """`mymodl` may be a hub id, so the hub is asked; a folder of nearly that name is then meant."""
    for name in ("mymodel", "mymodul"):
        (tmp_path / name).mkdir()
    (tmp_path / "mymodel" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    meant = re.escape("did you mean 'mymodel'?")
    with pytest.raises(InfrastructureError, match=meant), loading("mymodl"):
        raise OSError("no connection")
    with pytest.raises(InfrastructureError, match=re.escape(f"{tmp_path / 'mymodel'}'?")):
        check_place(str(tmp_path / "mymodl"))
    with pytest.raises(InfrastructureError) as caught, loading("mymodel"):  # it is there, and bad
        raise OSError("no weights")
    assert "did you mean" not in str(caught.value)
    assert reading.nearest_beside("nowhere/mymodl") == ""
    assert reading.nearest_beside("x\0y") == reading.nearest_beside("") == ""
