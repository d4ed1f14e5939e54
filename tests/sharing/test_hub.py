"""Artifacts on the hub: huggingface_hub's own client, and a server that speaks its language."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from hub_server import TOKEN, running_hub
from huggingface_hub import ModelCard, constants

import act_harness
from act_harness.artifact import Artifact, ModelFacts, load_artifact, resolve_artifact
from act_harness.calibration import Calibration
from act_harness.cli.app import main
from act_harness.errors import ArtifactError, InfrastructureError, InputError
from act_harness.sharing.card import CardFacts, model_card
from act_harness.sharing.push import picture_of
from act_harness.support.hub import HubFile, parse

FACTS = ModelFacts(
    id="someone/tiny", architecture="LlamaForCausalLM", num_hidden_layers=3, num_attention_heads=4,
    weights_sha256="a" * 64, tokenizer_sha256="b" * 64, dtype="float32",
)  # fmt: skip


@pytest.fixture
def mine():
    return Artifact(
        name="mine", model=FACTS, calibration=Calibration(), heads={0: (2, 1), 2: (0,)},
        provenance={"seed": 1},
    )  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of its own with a cache of its own, which may be written with the stored token."""
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("act_harness.sharing.push.picture_of", lambda _: b"picture")  # slow
        yield server


def test_what_is_pushed_is_loaded_everywhere_by_its_name(hub, mine):
    commit = mine.push_to_hub("me/heads", license="apache-2.0")
    assert set(hub.files("me/heads")) == {".gitattributes", "heads.json", "README.md", "heads.png"}
    assert hub.files("me/heads")["heads.json"].decode() == mine.text()
    assert hub.repositories["me/heads"].messages == [
        "by hand",
        "Upload head set mine",
    ]  # one commit
    again = load_artifact("hub:me/heads")
    assert again.provenance == {"seed": 1, "hub": f"hub:me/heads@{commit.oid}/heads.json"}
    assert (again.sha256(), again.heads) == (mine.sha256(), mine.heads)
    assert Artifact.from_pretrained("me/heads", revision=commit.oid) == again
    assert resolve_artifact("hub:me/heads", FACTS) == again
    with pytest.raises(ArtifactError, match="num_hidden_layers 3, this model has 4"):
        resolve_artifact("hub:me/heads", FACTS.model_copy(update={"num_hidden_layers": 4}))


def test_a_pinned_revision_stays_what_it_was(hub, mine):
    first = mine.push_to_hub("me/heads", license="mit", path_in_repo="sub/folder/a.json").oid
    other = mine.model_copy(update={"heads": {1: (3,)}})
    second = other.push_to_hub("me/heads", path_in_repo="sub/folder/a.json").oid
    reference = f"hub:me/heads@{first}/sub/folder/a.json"
    assert load_artifact(reference).heads == mine.heads
    assert load_artifact("hub:me/heads/sub/folder/a.json").heads == {1: (3,)}
    asked = len(hub.asked)
    assert load_artifact(reference).provenance["hub"] == reference
    assert len(hub.asked) == asked  # a commit in the cache is asked of nobody
    with_folder = Artifact.from_pretrained("me/heads", subfolder="sub/folder", filename="a.json")
    assert with_folder.provenance["hub"] == f"hub:me/heads@{second}/sub/folder/a.json"


def test_a_branch_is_made_and_read(hub, mine):
    mine.push_to_hub("me/heads", license="mit")
    other = mine.model_copy(update={"heads": {1: (3,)}})
    oid = other.push_to_hub("me/heads", revision="try/one").oid
    assert load_artifact("hub:me/heads").heads == mine.heads
    branch = load_artifact("hub:me/heads@try%2Fone/heads.json")
    assert branch.heads == {1: (3,)}
    assert oid in branch.provenance["hub"]
    assert load_artifact("hub:me/heads/heads.json@try/one") == branch


def test_the_stock_of_the_cache_serves_offline(hub, mine, monkeypatch):
    mine.push_to_hub("me/heads", license="mit")
    load_artifact("hub:me/heads")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_artifact("hub:me/heads").heads == mine.heads
    with pytest.raises(InfrastructureError, match="HF_HUB_OFFLINE is set"):
        load_artifact("hub:me/other")
    with pytest.raises(InfrastructureError, match="HF_HUB_OFFLINE is set"):
        mine.push_to_hub("me/heads", license="mit")


def test_a_card_of_somebody_keeps_all_but_our_section(hub, mine):
    theirs = "---\nlicense: mit\nlanguage: en\ntags:\n- mine\n---\n\n# Own title\n\nOwn words.\n"
    hub.add("me/heads", {"README.md": theirs.encode()})
    mine.push_to_hub("me/heads")
    other = mine.model_copy(update={"name": "second"})
    other.push_to_hub("me/heads", path_in_repo="b.json", base_model="some/other")
    changed = mine.model_copy(update={"name": "renamed"})
    changed.push_to_hub("me/heads")
    card = ModelCard(hub.files("me/heads")["README.md"].decode())
    assert card.text.strip().startswith(
        "# Own title\n\nOwn words.\n\n<!-- begin act-harness heads.json -->"
    )
    assert "`mine`" not in card.text
    assert [card.text.count(name) for name in ("`renamed`", "`second`")] == [1, 1]
    assert card.data.license == "mit"
    assert card.data.language == "en"
    assert card.data.base_model == ["someone/tiny", "some/other"]
    assert card.data.library_name == "act-harness"
    assert card.data.tags[:2] == ["mine", "act-harness"]


REFUSED = [
    ("hub:me/nothing", ArtifactError, "no repository 'me/nothing', or it is private"),
    ("hub:me/heads@gone/heads.json", ArtifactError, "no revision 'gone'"),
    ("hub:me/heads/other.json", ArtifactError, "no such file; it holds heads.json, text.json$"),
    ("hub:me/heads/text.json", ArtifactError, "is not JSON .*expected a file written by"),
    ("hub:me/heads/README.md", ArtifactError, "is not JSON"),
    (
        "hub:me/heads/large.bin",
        ArtifactError,
        "holds 100000000000 bytes, expected at most 67108864",
    ),
    ("hub:me/heads/down.json", InfrastructureError, "the hub cannot be reached .*500"),
    ("hub:me/secret", ArtifactError, "or it is private; check the name, or run `hf auth login`"),
]


@pytest.mark.parametrize(("reference", "kind", "words"), REFUSED)
def test_what_cannot_be_had_is_one_line(hub, mine, monkeypatch, reference, kind, words):
    files = {"heads.json": mine.text().encode(), "text.json": b"no", "large.bin": b"{}",
             "README.md": b"# x"}  # fmt: skip
    hub.add("me/heads", files)
    hub.add("me/secret", {"heads.json": mine.text().encode()}, private=True)
    hub.sizes["large.bin"] = 100_000_000_000
    hub.failing["down.json"] = (500, "oh no")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(kind, match=words) as caught:
        load_artifact(reference)
    assert "\n" not in str(caught.value)
    assert not any("GET" in line and "large" in line for line in hub.asked)


PUSHES = [
    ({"token": False}, InputError, "run `hf auth login`"),
    ({"license": None}, InputError, "no licence was named"),
    ({"license": "free beer"}, InputError, '"license" must be one of'),
    ({"token": "hf_reads"}, InputError, r"refuses this \(401.*token that may do it on me/new"),
    ({"path_in_repo": "../a.json"}, InputError, "expected FOLDER/NAME.json"),
    ({"path_in_repo": "README.md"}, InputError, "expected FOLDER/NAME.json"),
    ({"base_model": "tiny"}, InputError, "'tiny' is no repository's name"),
    ({"repo_id": "me"}, InputError, "expected OWNER/REPO"),
    ({"repo_id": "me/public", "private": True}, InputError, "exists and is public"),
    ({"repo_id": "me/broken"}, InputError, "has metadata that cannot be read"),
    ({"repo_id": "me/public", "revision": "refs/pr/9"}, InputError, "no revision 'refs/pr/9'"),
]


@pytest.mark.parametrize(("given", "kind", "words"), PUSHES)
def test_what_cannot_be_pushed_writes_nothing(hub, mine, monkeypatch, given, kind, words):
    hub.add("me/public", {})
    hub.add("me/broken", {"README.md": b"---\n- a\n---\n# x\n"})
    if given.get("token") is False:
        monkeypatch.delenv("HF_TOKEN")
    given = {"repo_id": "me/new", "license": "mit"} | given
    with pytest.raises(kind, match=words) as caught:
        mine.push_to_hub(**given)
    assert "\n" not in str(caught.value)
    assert hub.files("me/public") == {}
    assert len(hub.files("me/broken")) == 1
    assert "me/new" not in hub.repositories or list(hub.files("me/new")) == [".gitattributes"]


def test_a_server_out_of_order_leaves_nothing_and_a_repeat_goes_on(hub, mine):
    hub.failing["/commit/"] = (500, "oh no")
    with pytest.raises(InfrastructureError, match=r"answers 500 \(oh no\); try again later"):
        mine.push_to_hub("me/heads", license="mit")
    assert list(hub.files("me/heads")) == [".gitattributes"]
    hub.failing.clear()
    mine.push_to_hub("me/heads", license="mit")
    assert load_artifact("hub:me/heads").heads == mine.heads


def test_a_branch_that_moved_meanwhile_is_not_written(hub, mine):
    hub.add("me/heads", {"README.md": b"# one\n"})
    hub.before_commit = lambda: hub.add("me/heads", {"README.md": b"# two\n"})
    with pytest.raises(InfrastructureError, match=r"changed meanwhile .*repeat the command"):
        mine.push_to_hub("me/heads", license="mit")
    assert hub.files("me/heads") == {"README.md": b"# two\n"}


def test_a_hub_that_is_not_there_is_said_once(hub, mine, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    said = r"the hub cannot be reached \(.+\); check the network and HF_ENDPOINT"
    for ask in (
        lambda: load_artifact("hub:me/heads"),
        lambda: mine.push_to_hub("me/heads", license="mit"),
    ):
        with pytest.raises(InfrastructureError, match=said) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_folder_stands_for_a_repository(mine, tmp_path):
    mine.save(tmp_path / "sub" / "heads.json")
    assert Artifact.from_pretrained(tmp_path, subfolder="sub") == mine
    with pytest.raises(ArtifactError, match="neither a file nor"):
        Artifact.from_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="no path in a repository"):
        Artifact.from_pretrained("me/heads", filename="../heads.json")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hub:me/heads", ("me/heads", "heads.json", None)),
        ("hub:me/heads@v1", ("me/heads", "heads.json", "v1")),
        ("hub:me/heads@v1/sub/a.json", ("me/heads", "sub/a.json", "v1")),
        ("hub:me/heads@refs/pr/3/a.json", ("me/heads", "a.json", "refs/pr/3")),
        ("hub:me/heads@a%2Fb/a.json", ("me/heads", "a.json", "a/b")),
        ("hub:me/heads/a.json", ("me/heads", "a.json", None)),
        ("hub:me/heads/sub/folder/a.json@v1.2", ("me/heads", "sub/folder/a.json", "v1.2")),
        ("hub:me/heads/a.json@refs/pr/3", ("me/heads", "a.json", "refs/pr/3")),
    ],
)
def test_a_file_of_the_hub_is_named_by_repository_revision_and_path(text, found):
    assert parse(text) == HubFile(*found)
    assert parse(str(parse(text))) == HubFile(*found)


@pytest.mark.parametrize(
    "text",
    ["hub:", "hub:me", "hub:me/", "hub:/heads", "hub:me//a.json", "hub:me/heads@",
     "hub:me/heads@/a", "hub:me/heads@v1/a.json@v2", "hub:me/heads/../a.json",
     "hub:me/heads/a\n.json", "hub:m e/heads", "hub:me/heads/..\\a.json", "hub:../heads",
     "hub:me/heads/a.json@", "hub:me@v1/heads"],
)  # fmt: skip
def test_what_names_no_file_of_the_hub(text):
    with pytest.raises(ArtifactError, match=r"expected|no path") as caught:
        load_artifact(text)
    assert "\n" not in str(caught.value)


# -- the card --------------------------------------------------------------------------------------


def _judged(columns, **more):
    search = {"judgement": {"columns": columns, "documents": {"a": 30, "b": 12}, "verdict": "so"}}
    return {"search": {**search, **more}}


def _column(low, high, drawn=(0.5, 0.52), beaten=False):
    return {
        "untouched": 0.5, "selected": 0.52, "difference": 0.02, "interval": [low, high],
        "random_sets": {"scores": list(drawn), "beaten": beaten},
    }  # fmt: skip


def test_the_card_says_the_weak_reading_first_with_its_controls(mine):
    columns = {
        "raw": _column(0.01, 0.03, beaten=True), "corrected": _column(-0.01, 0.05),
        "raw_other_tasks": _column(-0.3, -0.2, drawn=()), "odd": _column(None, None),
    }  # fmt: skip
    card = model_card(
        mine.model_copy(update=_judged(columns)), CardFacts(HubFile("me/heads"), "mit")
    )
    rows = [line for line in card.splitlines() if line.startswith("| ") and "%" not in line]
    rows.remove("| --- | --- | --- | --- | --- | --- | --- |")
    assert rows == [
        "| odd | 50.0 | 52.0 | +2.0 | unknown | not shown | +0.0 to +2.0, 2 sets; the heads are "
        "not above all |",
        "| raw other tasks | 50.0 | 52.0 | +2.0 | -30.0 to -20.0 | worse | none of this size |",
        "| corrected | 50.0 | 52.0 | +2.0 | -1.0 to +5.0 | not shown | +0.0 to +2.0, 2 sets; the "
        "heads are not above all |",
        "| raw | 50.0 | 52.0 | +2.0 | +1.0 to +3.0 | better | +0.0 to +2.0, 2 sets; the heads "
        "are above all |",
    ]
    assert "on 42 documents of a split of the search" in card
    assert "`hub:me/heads/heads.json`" not in card
    assert '"hub:me/heads/heads.json"' in card


@pytest.mark.parametrize(("source", "shared"), [("hash of test", True), ("train", False)])
def test_a_card_says_where_an_evaluation_meets_the_search(mine, source, shared):
    """The card promised of every search that its documents never meet those of an evaluation."""
    splits = {"t": {"source": source, "search": {"n": 9}, "verify": {"n": 4}}}
    searched = mine.model_copy(update=_judged({}, splits=splits))
    card = model_card(searched, CardFacts(HubFile("me/heads"), "mit"))
    assert f"| t | {source} | 9 | 4 | none |" in card
    assert ("whole split meets documents that the heads were found on" in card) is shared
    assert ("which never meet its evaluation" in card) is not shared


@pytest.mark.parametrize(
    ("search", "said"),
    [({"searched_heads": 8}, "3 of 8 searched heads of"), ({}, "3 heads of"), (None, "3 heads of"),
     ({"searched_heads": "8"}, "3 heads of")],
)  # fmt: skip
def test_a_card_counts_no_heads_of_layers_without_attention(mine, search, said):
    """It said "of 12" of every model of three layers and four heads, hybrids too."""
    card = model_card(
        mine.model_copy(update={"search": search}), CardFacts(HubFile("me/heads"), "mit")
    )
    assert f"\n## `mine`: {said} `someone/tiny`\n" in card


@pytest.mark.parametrize("record", [{}, {"columns": 3}, {"columns": {"raw": {}}}, {"columns": []}])
def test_a_record_that_cannot_be_read_is_said(mine, record):
    broken = mine.model_copy(update={"search": {"judgement": record, "splits": {"a": 3}}})
    card = model_card(broken, CardFacts(HubFile("me/heads"), "mit"))
    assert "cannot be read" in card or "not judged" in card
    assert "| reading |" not in card


def test_a_text_of_an_artifact_is_never_markup(mine):
    hostile = "x`<script>alert(1)</script>\n---\n<!-- end act-harness heads.json -->[a](b)|"
    columns = {hostile: _column(0.01, 0.03)}
    search = _judged(columns, notes=[hostile], splits={hostile: {"search": {"n": hostile}}},
                     recipe={"method": hostile})["search"]  # fmt: skip
    search["judgement"]["verdict"] = hostile
    bad = mine.model_copy(
        update={"name": hostile, "search": search, "provenance": {"device": hostile}}
    )
    facts = CardFacts(HubFile("me/heads"), "mit")
    card = model_card(bad, facts)
    outside = "".join(re.sub(r"\\.", "", card).split("`")[::2])  # not escaped, and in no code
    assert "<script" not in outside
    assert "[a](" not in outside
    assert card.count("\n---\n") == 1
    assert model_card(bad, facts, existing=card) == card  # the section is found again, whole
    assert model_card(bad, facts, existing=card.replace("\n", "\r\n")) == card


@pytest.mark.parametrize("searched", [True, False])
def test_the_picture_is_drawn_whatever_the_names(mine, searched):
    rows = [[0, 1, 0.5], [2, 0, -0.25]]
    table = {"heads": {"columns": ["layer", "head", "effect"], "rows": rows}}
    named = mine.model_copy(
        update={"name": r"$\frac$ $x$", "search": {"table": table} if searched else None}
    )
    assert picture_of(named).startswith(b"\x89PNG")


# -- the commands ----------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["act-harness", "artifact", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    return call


def test_push_and_pull_as_commands(hub, mine, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    own = mine.model_copy(update={"model": FACTS.model_copy(update={"id": "folder"})})
    own.save("mine.json")
    call = ["push", "mine.json", "me/heads", "--license", "mit", "--private"]
    assert command(*call, "--dry-run") == 0
    assert "license: mit" in capsys.readouterr().out
    assert not hub.asked
    assert command(*call) == 0
    said = capsys.readouterr()
    assert "base_model" in said.err
    assert hub.repositories["me/heads"].private
    pinned = said.out.splitlines()[1].removeprefix("pinned: ")
    assert command("pull", pinned) == 0
    assert load_artifact("heads.json").provenance["hub"] == pinned
    assert command("pull", pinned) == 0  # the same again is no loss
    assert command("pull", "hub:me/heads", "--output", "mine.json") == 2
    assert "holds something else; --force replaces it" in capsys.readouterr().err
    assert load_artifact("mine.json") == own
    assert command("pull", "hub:me/heads", "--output", "mine.json", "--force") == 0
    assert command("pull", "hub:me/gone", "--output", "new/gone.json") == 2
    assert not (tmp_path / "new" / "gone.json").exists()


def test_results_name_the_commit(hub, tiny_checkpoint):
    from act_harness.model import CalibratedHFLM

    lm = CalibratedHFLM(str(tiny_checkpoint), artifact="none", dtype="float32", device="cpu")
    heads = act_harness.head_set(lm.model, {0: [1]}, name="there", tokenizer=lm.tokenizer)
    oid = hub.add("me/heads", {"heads.json": heads.text().encode()})
    lm.use_artifact("hub:me/heads")
    assert lm.get_model_info()["act_harness"]["artifact_hub"] == f"hub:me/heads@{oid}/heads.json"


@pytest.mark.slow
def test_the_clients_own_variables_decide(hub, mine, tmp_path):
    """HF_ENDPOINT, HF_TOKEN and HF_HUB_CACHE as in a shell; nothing here is patched."""
    file = mine.save(tmp_path / "mine.json")
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_CACHE": str(tmp_path / "other"),
           "HF_HUB_OFFLINE": "0"}  # fmt: skip
    for call in (["push", str(file), "me/heads", "--license", "mit"], ["show", "hub:me/heads"]):
        done = subprocess.run(
            [sys.executable, "-m", "act_harness", "artifact", *call],
            env={**os.environ, **own}, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert json.loads(hub.files("me/heads")["heads.json"])["name"] == "mine"
    assert hub.files("me/heads")["heads.png"].startswith(b"\x89PNG")
    assert "3, by layer" in done.stdout
