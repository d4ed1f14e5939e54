"""The commands, called as a user calls them, on a tiny model and tasks of their own."""

import csv
import json
import re

import pytest
from own_tasks import caller, few_tasks, write_own_tasks

from act_harness import head_set
from act_harness.exploration.command import ExploreSettings, explore_from_settings
from act_harness.search.documents import digest_of


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_own_tasks(tmp_path_factory.mktemp("own"), "own_task", "own_second")


@pytest.fixture(autouse=True)
def quick():
    with few_tasks():
        yield


@pytest.fixture(scope="module")
def heads(tiny_checkpoint, tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    made = head_set(model, {0: [1], 2: [3]}, tokenizer=tokenizer, calibration={"alpha": 2.0})
    return made.save(tmp_path_factory.mktemp("heads") / "heads.json")


def data_of(page):
    """Return the data of a page, as its script reads them."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, flags=re.DOTALL)[1])


def test_explore_writes_the_page_of_a_text(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    page = tmp_path / "new" / "page.html"
    done = caller(monkeypatch, capsys)(
        "explore", "--pretrained", str(tiny_checkpoint), "--device", "cpu",
        "--text", "the <b>other</b> thing", "--heads", "2.1", "--output", str(page),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert f"written: {page}" in done.out
    assert "alone changes it by" in done.out
    data = data_of(page)
    assert "".join(data["tokens"]) == "the <b>other</b> thing"
    assert "2.1" in data["maps"]
    assert data["artifact"] is None


def test_explore_takes_the_document_that_an_evaluation_numbers(
    own, heads, tiny_checkpoint, tmp_path
):
    found = {}
    for doc in (0, 3):
        settings = ExploreSettings(
            pretrained=str(tiny_checkpoint),
            device="cpu",
            task="own_task",
            doc=doc,
            artifact=str(heads),
            include_path=(own,),
            output=tmp_path / f"{doc}.html",
        )
        found[doc] = explore_from_settings(settings)
    assert "".join(found[0].tokens) == "Q: What is a lamp made of?\nA:"
    assert "".join(found[3].tokens) == "Q: What is a kettle made of?\nA:"
    assert found[3].labels == (" wood", " seven")
    assert (found[0].right, found[3].right) == (0, 1)
    assert found[3].after is not None
    assert data_of(tmp_path / "3.html")["title"] == "own_task, document 3"


def test_sinks_writes_json_and_tables(own, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    done = caller(monkeypatch, capsys)(
        "sinks", "--pretrained", str(tiny_checkpoint), "--device", "cpu",
        "--include-path", str(own), "--tasks", "own_task,own_second", "--limit", "3",
        "--plots", "--output", str(tmp_path / "sinks"),
    )  # fmt: skip
    assert done.code == 0, done.err
    content = json.loads((tmp_path / "sinks" / "sinks.json").read_text())
    assert content["documents"] == 6
    assert content["model"]["id"] == "tiny-llama"  # no folder of this machine
    assert [row["task"] for row in content["tasks"]] == ["own_task", "own_second"]
    for name in ("tasks", "heads", "positions", "tokens", "kinds"):
        with (tmp_path / "sinks" / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(content[name])
    flags = content["flags"]
    assert sum(row["flags"] for row in content["positions"]) == flags["min_rows_1"]["flags"]
    assert sum(row["flags"] for row in content["tokens"]) == flags["min_rows_1"]["flags"]
    per_head = sum(row["sinks"] for row in content["heads"])
    assert per_head * 6 == pytest.approx(flags["min_rows_1"]["flags"])
    assert "own_task: 3 documents" in done.out
    assert (tmp_path / "sinks" / "sinks.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "sinks" / "sinks.svg").read_text()
    assert drawn.count("<svg") == 1
    assert "Creator" not in drawn


def test_artifact_show_writes_the_page_of_the_heads(heads, tmp_path, monkeypatch, capsys):
    page = tmp_path / "heads.html"
    done = caller(monkeypatch, capsys)("artifact", "show", str(heads), "--html", str(page))
    assert done.code == 0, done.err
    data = data_of(page)
    assert (data["layers"], data["heads"]) == (3, 4)
    assert "effects" not in data


def test_the_page_of_a_head_set_never_replaces_it(heads, monkeypatch, capsys):
    before = heads.read_bytes()
    done = caller(monkeypatch, capsys)("artifact", "show", str(heads), "--html", str(heads))
    assert done.code == 2
    assert "is what this command reads; name another file" in done.err
    assert heads.read_bytes() == before


def test_the_page_of_a_shipped_artifact_has_the_effects_of_its_search(
    tmp_path, monkeypatch, capsys
):
    import base64

    import numpy as np

    from act_harness import load_artifact

    page = tmp_path / "heads.html"
    name = "smollm2-135m-instruct/classification"
    done = caller(monkeypatch, capsys)("artifact", "show", name, "--html", str(page))
    assert done.code == 0, done.err
    table = load_artifact(name).search["table"]["heads"]
    effect = table["columns"].index("effect")
    stored = np.frombuffer(base64.b64decode(data_of(page)["effects"]), "<f4").reshape(30, 9)
    for row in table["rows"]:
        assert stored[row[0], row[1]] == pytest.approx(row[effect], abs=1e-6)


def test_documents_of_an_evaluation_are_those_of_lm_eval(own, tiny_checkpoint):
    from act_harness.exploration.command import SinksSettings, load_model, task_documents
    from act_harness.harness.task_lookup import find_tasks

    settings = SinksSettings(pretrained=str(tiny_checkpoint), device="cpu", tasks=("own_task",))
    lm = load_model(settings.arguments())
    selection = find_tasks(("own_task",), include_path=(own,))
    found = list(task_documents(selection, lm, settings, count=100))
    assert len(found) == 8
    later = list(task_documents(selection, lm, settings, first=5, count=2))
    assert digest_of(found[5:7]) == digest_of(later)


def test_artifact_list_says_where_sets_come_from_and_what_they_are_worth(monkeypatch, capsys):
    done = caller(monkeypatch, capsys)("artifact", "list")
    lines = {line.split()[0]: line for line in done.out.splitlines()}
    assert "not judged here" in lines["llama-2-7b-chat/release-classification"]
    searched = lines["smollm2-135m-instruct/classification"]
    assert "searched" in searched
    assert "raw +10.0, +8.0 to +12.0" in searched
