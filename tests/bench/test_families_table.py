"""The table of architectures says what is so, also of models that fail."""

from __future__ import annotations

import json

import pytest
import torch
from installed import REPOSITORY
from typer.testing import CliRunner

from act_harness.bench import families, family_table
from act_harness.bench.families import architectures, build_tiny, try_family
from act_harness.bench.family_table import FamilyTable, compare, make_table, read_table, write_table
from act_harness.cli.app import app
from act_harness.errors import ResultError, UnsupportedModelError


@pytest.mark.parametrize(
    ("kind", "route", "search"),
    [
        ("llama", "packed", "yes"),
        ("gpt_neo", "over the cache", "yes"),
        ("mpt", None, "yes"),
        ("gpt_oss", "packed", "yes"),  # with learned sinks
        ("mimo_v2_flash", "packed", "yes"),
    ],
)
def test_an_architecture_that_works(kind, route, search):
    row = try_family(kind)
    assert row.result == "works"
    assert route in (None, row.route)
    assert row.search.startswith(search)
    assert row.generation == "yes"


@pytest.mark.parametrize("kind", ["modernbert-decoder", "roc_bert"])
def test_architectures_with_parts_in_other_places_work(kind):
    """A head called decoder, and a cache for an encoder that is not there."""
    assert try_family(kind).result == "works"


@pytest.mark.parametrize("kind", ["deepseek_v32", "jetmoe"])
def test_layers_that_want_more_than_their_input_are_searched(kind):
    """DeepSeek's choose columns by an index, JetMoE's give a bias behind their maps."""
    assert try_family(kind).search == "yes"


def test_what_only_one_way_of_searching_opens_is_said(monkeypatch):
    def refused(self, base):
        raise UnsupportedModelError("not this one")

    monkeypatch.setattr(families.StrengthenedModel, "_open", refused)
    assert try_family("llama").search == "yes; by gradient no: not this one"


def test_architectures_that_do_not_work_say_why():
    assert try_family("mamba").result.startswith("refused: MambaForCausalLM has no")
    assert try_family("ctrl").architecture == "CTRLLMHeadModel"


def test_wrong_logits_and_crashes_are_told_apart(monkeypatch):
    """Rows that differ when padded are wrong, what raises crashes; neither ends the table."""
    original = families._calibrated_logits

    def shifted(model, attachment, rows, prompts):
        found = original(model, attachment, rows, prompts)
        return [one + attachment.active * (len(rows) - 1) for one in found]

    monkeypatch.setattr(families, "_calibrated_logits", shifted)
    assert try_family("llama").result.startswith("wrong: a sequence scores otherwise in a padded")

    def broken(model, attachment, rows, prompts):
        if attachment.active:
            raise KeyError("no such layer")
        return original(model, attachment, rows, prompts)

    monkeypatch.setattr(families, "_calibrated_logits", broken)
    told = make_table(["llama", "gpt2"]).markdown()
    assert "2 crashes" in told
    assert "crashes: KeyError: 'no such layer'" in told

    def ours_too(*_):
        raise KeyError("no such layer")

    monkeypatch.setattr(families, "_calibrated_logits", ours_too)
    assert try_family("llama").result == "stock: KeyError: 'no such layer'"


def test_tiny_models_are_tiny_and_the_same_each_time():
    one, two = build_tiny("qwen3"), build_tiny("qwen3")
    assert sum(parameter.numel() for parameter in one.parameters()) < 100_000
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert {"llama", "gptj", "bloom", "gpt2"} <= set(architectures())


ROW = {
    "architecture": "LlamaForCausalLM", "route": "packed", "engines": "reference, torch",
    "search": "yes", "generation": "yes", "result": "works",
}  # fmt: skip
REFUSED = dict.fromkeys(ROW, "-") | {"architecture": "OneForCausalLM", "result": "refused: no"}


def table(**rows):
    return FamilyTable(transformers="5.23.0", torch="2.13.0", rows=rows)


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ({"result": "crashes: KeyError"}, 1),
        ({"search": "no: its layers"}, 1),
        ({"generation": "as stock's: other tokens"}, 1),
        ({"route": "over the cache"}, 1),
        ({"engines": "reference"}, 1),
        ({"engines": "reference, torch, triton"}, 0),
        ({"architecture": "LlamaModel"}, 0),
        (REFUSED | {"architecture": "LlamaForCausalLM"}, 1),  # the other cells follow from it
    ],
)
def test_a_change_is_named_and_the_worse_are_counted(change, worse):
    found = compare(table(llama=ROW, one=ROW), table(llama=ROW | change, one=ROW))
    column = "result" if "result" in change else next(iter(change))
    assert found.worse == worse
    last = "worse" if worse else ""
    assert f"| llama | {column} | {ROW[column]} | {change[column]} | {last} |" in found.markdown
    assert f"1 changes, {worse} for the worse" in found.markdown
    back = compare(table(llama=ROW | change, one=ROW), table(llama=ROW, one=ROW))
    assert back.worse == (column == "engines" and not worse)  # the third engine is gone


def test_model_types_that_come_and_go():
    found = compare(table(llama=ROW, one=REFUSED), table(two=ROW))
    assert found.worse == 1
    assert "| llama | gone | works | - | worse |" in found.markdown
    assert "| one | gone | refused: no | - |  |" in found.markdown
    assert "| two | new | - | works |  |" in found.markdown


def test_rounding_and_versions_are_no_change():
    before = table(bart=ROW | {"generation": "as stock's: not the argmax of scoring (by 0.67)"})
    after = table(bart=ROW | {"generation": "as stock's: not the argmax of scoring (by 3e-05)"})
    later = after.model_copy(update={"transformers": "5.24.0"})
    assert compare(before, later) == (
        0,
        "transformers 5.23.0, torch 2.13.0 -> transformers 5.24.0, torch 2.13.0: "
        "no architecture changed.\n",
    )


def test_the_stored_table_is_the_one_for_readers():
    """Both files are written by one command; a merge by hand of one of them shows here."""
    stored = read_table(REPOSITORY / "results/families.json")
    assert stored.markdown() == (REPOSITORY / "results/families.md").read_text("utf-8")
    assert stored.rows["llama"]["result"] == "works"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "no table of architectures"),
        ("{}", "no table of architectures"),
        ('{"transformers": "5", "torch": "2", "rows": {"llama": {"result": 1}}}', "rows.llama"),
        ('{"transformers": "5", "torch": "2", "rows": {"llama": {"result": ""}}}', "llama lacks"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, content, told):
    path = tmp_path / "families.json"
    path.write_text(content)
    with pytest.raises(ResultError, match=told):
        read_table(path)
    with pytest.raises(ResultError, match=r"doctor --families --output families\.md"):
        read_table(tmp_path / "none.json")


@pytest.fixture
def told(monkeypatch):
    """Call doctor with one architecture to try, which works; return its exit code and output."""

    def call(*words):
        monkeypatch.setattr(family_table, "architectures", lambda: ["llama"])
        result = CliRunner().invoke(app, ["doctor", "--families", *map(str, words)])
        return result.exit_code, result.stdout

    return call


def test_doctor_holds_the_table_against_an_earlier_one(tmp_path, told):
    code, out = told("--output", tmp_path / "new/families.md")
    assert (code, "# Causal architectures" in out) == (0, True)
    file = tmp_path / "new/families.json"
    assert read_table(file).rows["llama"] == ROW

    code, out = told("--against", file)
    assert (code, "no architecture changed" in out) == (0, True)

    lost = json.loads(file.read_text())
    lost["rows"]["mamba"] = lost["rows"]["llama"]
    file.write_text(json.dumps(lost))
    code, out = told("--against", file, "--output", tmp_path / "newer.md")
    assert (code, "| mamba | gone | works | - | worse |" in out) == (1, True)
    assert "mamba" not in read_table(tmp_path / "newer.json").rows  # it is written even so


def test_a_table_read_back_is_the_one_written(tmp_path):
    made = table(llama=ROW | {"search": "no: `a|b`"}, one=REFUSED)
    write_table(tmp_path / "families.md", made)
    assert read_table(tmp_path / "families.json") == made


@pytest.mark.parametrize("option", ["--output", "--against"])
def test_files_of_a_table_that_is_not_asked_for_are_refused(tmp_path, option):
    result = CliRunner().invoke(app, ["doctor", option, str(tmp_path / "families.md")])
    assert result.exit_code != 0
    assert "--families" in str(result.exception)
    assert option in str(result.exception)
