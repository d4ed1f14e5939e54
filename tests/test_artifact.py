"""Head-set artifacts: strict loading, verification, saving, lookup by name."""

from __future__ import annotations

import json
import warnings

import pytest

from act_harness.artifact import (
    Artifact,
    ModelFacts,
    load_artifact,
    resolve_artifact,
    shipped_artifacts,
)
from act_harness.calibration import Calibration, HeadStrength
from act_harness.errors import ArtifactError, InfrastructureError

FACTS = ModelFacts(
    id="someone/tiny", architecture="LlamaForCausalLM", num_hidden_layers=3, num_attention_heads=4,
    weights_sha256="a" * 64, tokenizer_sha256="b" * 64, dtype="float32", adds_bos=False,
)  # fmt: skip


@pytest.fixture
def artifact():
    return Artifact(
        name="mine", model=FACTS, calibration=Calibration(), heads={0: (2, 1), 2: (0,)},
        strengths={2: {0: HeadStrength(mass="reweight", gamma=2.0)}},
        search={"task": "sst2"}, provenance={"seed": 1},
    )  # fmt: skip


BOTH = {"target": "both", "mass": "reweight", "gamma": 2.0, "gamma_initial": 0.5}


@pytest.mark.parametrize(
    "settings",
    [
        BOTH,
        {"target": "random", "draw": "anew", "seed": 3},
        {"target": "last", "count": 2},
        {"target": "span", "markers": ("Review:", "\n")},
        {"mass": "raise", "psi": 0.25},
        {"target": "head", "mass": "gate", "factor": 0.5},
    ],
)
def test_the_second_schema_is_written_where_the_first_does_not_do(artifact, tmp_path, settings):
    own = artifact.model_copy(update={"calibration": Calibration(**settings), "strengths": None})
    path = own.save(tmp_path / "mine.json")
    again = load_artifact(path)
    assert again.schema_ == json.loads(path.read_text())["schema"] == "act-harness/heads/2"
    assert again.calibration == own.calibration
    assert (
        again.document() == json.loads(path.read_text()) == json.loads(json.dumps(own.document()))
    )
    assert again.sha256() == own.sha256() != artifact.sha256()
    plans = again.plans()
    assert {plan.layer for plan in plans.values()} == set(plans) != {0}
    claimed = {**json.loads(path.read_text()), "schema": "act-harness/heads/1"}
    with pytest.raises(ArtifactError, match="is not of schema 'act-harness/heads/1'"):
        load_artifact(claimed)


def test_a_file_of_the_second_schema_that_needs_only_the_first_is_written_as_the_first(artifact):
    given = {**artifact.document(), "schema": "act-harness/heads/2"}
    again = load_artifact(given)
    assert again == artifact
    assert again.document()["schema"] == "act-harness/heads/1"
    # what decides scores is hashed without the schema: hashes of before stay
    assert again.sha256() == artifact.sha256()


def test_strengths_fit_the_target(artifact):
    given = artifact.document()
    given |= {"schema": "act-harness/heads/2", "calibration": BOTH}
    with pytest.raises(ArtifactError, match="layer 2: target 'both' takes gamma_initial beside"):
        load_artifact(given)
    given["strengths"]["2"]["0"]["gamma_initial"] = 3.0
    assert load_artifact(given).plans()[2].strengths[0].gamma_initial == 3.0


def test_saving_and_loading_gives_the_same_artifact(artifact, tmp_path):
    path = artifact.save(tmp_path / "mine.json")
    again = load_artifact(path)
    assert again == artifact
    assert again.save(tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert json.loads(path.read_text())["schema"] == "act-harness/heads/1"
    plans = again.plans()
    assert plans[0].heads == (1, 2)
    assert [s.strength for s in plans[0].strengths] == [0.4, 0.4]
    assert plans[2].strengths == (HeadStrength(mass="reweight", gamma=2.0),)
    assert again.head_count() == 3


def test_the_hash_is_of_what_decides_scores(artifact):
    renamed = artifact.model_copy(update={"name": "other", "provenance": {}})
    assert renamed.sha256() == artifact.sha256()
    for change in (
        {"heads": {0: (2,), 2: (0,)}},
        {"calibration": Calibration(beta=0.41)},
        {"strengths": None},
    ):
        assert artifact.model_copy(update=change).sha256() != artifact.sha256()


def broken(artifact, tmp_path, change):
    content = artifact.document()
    change(content)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(hedas={}), "unknown key 'hedas'; did you mean 'heads'"),
        (lambda c: c["model"].update(size=1), "model.size: unknown key"),
        (lambda c: c["calibration"].update(bta=1), "'bta' is unknown; did you mean 'beta'"),
        (lambda c: c["calibration"].update(beta=1.5), "beta is 1.5, expected a number in"),
        (lambda c: c["calibration"].update(alpha=0), "alpha is 0.0, expected a finite number"),
        (lambda c: c["heads"].update({"0": [4]}), "head 4 of layer 0 is out of range"),
        (lambda c: c["heads"].update({"3": [0]}), "layer 3 is out of range, the model has 0..2"),
        (lambda c: c["heads"].update({"0": [1, 1]}), "names a head twice"),
        (lambda c: c["heads"].update({"x": [1]}), "heads"),
        (lambda c: c.update(schema="act-harness/heads/9"), "schema"),
        (lambda c: c["strengths"].update({"1": {"0": {"beta": 0.1}}}), "heads do not"),
        (lambda c: c.pop("heads"), "heads"),
    ],
)
def test_a_malformed_artifact_is_one_line(artifact, tmp_path, change, message):
    path = broken(artifact, tmp_path, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_artifact(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_not_an_artifact(tmp_path):
    path = tmp_path / "x.json"
    for text, message in (
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"a": 1}', "unknown key"),
    ):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=message):
            load_artifact(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="not UTF-8"):
        load_artifact(path)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ArtifactError, match="did you mean"):
        load_artifact("llama-2-7b-chat/releas-classification")
    with pytest.raises(ArtifactError, match="artifact=none is the baseline"):
        load_artifact("qqqqqqqq")
    with pytest.raises(ArtifactError, match="expected hub:OWNER/REPO"):
        load_artifact("hub:what")
    with pytest.raises(InfrastructureError, match="HF_HUB_OFFLINE is set"):
        load_artifact("hub:someone/heads/mine.json")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"architecture": "MistralForCausalLM"}, "architecture LlamaForCausalLM, this model has"),
        ({"num_hidden_layers": 4}, "num_hidden_layers 3, this model has 4"),
        ({"num_attention_heads": 8}, "num_attention_heads 4, this model has 8"),
        ({"tokenizer_sha256": "c" * 64}, "another tokenizer"),
    ],
)
def test_an_artifact_of_another_model_is_refused(artifact, facts, message):
    with pytest.raises(ArtifactError, match=message):
        artifact.verify(FACTS.model_copy(update=facts))


@pytest.mark.parametrize(
    "facts", [{"weights_sha256": "d" * 64}, {"dtype": "bfloat16"}, {"adds_bos": True}]
)
def test_another_revision_is_a_warning_that_names_both(artifact, facts):
    ((key, value),) = facts.items()
    with pytest.warns(UserWarning, match=key) as caught:
        artifact.verify(FACTS.model_copy(update=facts))
    text = str(caught[0].message)
    assert str(value)[:12] in text
    assert str(getattr(FACTS, key))[:12] in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        artifact.verify(FACTS)


def test_a_list_without_hashes_is_taken_with_one_warning(artifact):
    bare = ModelFacts(**{**FACTS.model_dump(), "weights_sha256": None, "tokenizer_sha256": None})
    with pytest.warns(UserWarning, match="records no weights hash") as caught:
        artifact.model_copy(update={"model": bare}).verify(FACTS)
    assert len(caught) == 1


def test_references_resolve(artifact, tmp_path):
    path = artifact.save(tmp_path / "mine.json")
    assert resolve_artifact(None, FACTS) is None
    assert resolve_artifact("None", FACTS) is None
    assert resolve_artifact(str(path), FACTS) == artifact
    assert resolve_artifact(artifact, FACTS) is artifact
    with pytest.raises(ArtifactError, match="no shipped artifact fits"):
        resolve_artifact("", FACTS)


def test_the_releases_lists_are_shipped():
    shipped = shipped_artifacts()
    counts = {}
    for name, path in shipped.items():
        loaded = load_artifact(path)
        assert loaded == load_artifact(name)
        if loaded.search is None:
            assert "a267af7" in json.dumps(loaded.provenance)
            counts[name] = loaded.head_count()
    assert counts == {
        "llama-2-7b-chat/release-classification": 184,
        "llama-2-7b-chat/release-mt-bench": 25,
        "llama-2-7b-chat/release-multiple-choice": 74,
        "mistral-7b-instruct-v0.2/release-classification": 16,
        "mistral-7b-instruct-v0.2/release-multiple-choice": 104,
    }


def test_searched_artifacts_hold_the_hash_of_their_content():
    from act_harness.search.run import content_sha256

    found = [load_artifact(path) for path in shipped_artifacts().values()]
    searched = [one for one in found if one.search is not None]
    assert len(searched) >= 8
    for one in searched:
        assert content_sha256(one) == one.search["content_sha256"], one.name


def test_the_releases_lists_are_the_published_ones(golden_dir):
    published = json.loads((golden_dir / "release_heads.json").read_text())
    shipped = {
        json.dumps(load_artifact(path).document()["heads"], sort_keys=True)
        for path in shipped_artifacts().values()
        if load_artifact(path).search is None
    }
    assert shipped == {
        json.dumps({k: sorted(v) for k, v in heads.items() if v}, sort_keys=True)
        for key, heads in published.items()
        if key != "note"
    }


def test_a_full_disk_loses_nothing(artifact, tmp_path, monkeypatch):
    path = artifact.save(tmp_path / "mine.json")
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InfrastructureError, match="No space left"):
        artifact.model_copy(update={"name": "other"}).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]


@pytest.mark.parametrize(
    ("search", "said", "stands"),
    [
        (None, "a published list, not judged here", False),
        ({"controls": {"beats_untouched": True}}, "not judged on documents of its own", False),
        ({"judgement": {"verdict": "not judged", "columns": {}}}, "not judged", False),
        (
            {"judgement": {
                "verdict": "beats the untouched model",
                "interval_includes_zero": False,
                "columns": {"raw": {"difference": 0.05, "interval": [0.01, 0.09]}},
            }},
            "beats the untouched model: raw +5.0, +1.0 to +9.0",
            True,
        ),
        (
            {"judgement": {
                "verdict": "not shown to beat the untouched model",
                "interval_includes_zero": True,
                "columns": {"raw": {"difference": -0.016, "interval": [-0.045, 0.013]}},
            }},
            "raw -1.6, -4.5 to +1.3 (an interval includes 0)",
            False,
        ),
        (
            {
                "judgement": {"verdict": "beats", "columns": {}},
                "held_out": {"verdict": "worse than the untouched model", "columns": {}},
            },
            "worse than the untouched model",
            False,
        ),
        (  # of one document: nothing is known of its spread
            {"judgement": {
                "verdict": "not shown",
                "columns": {"raw": {"difference": 0.1, "interval": [None, None]}},
            }},
            "not shown: raw +10.0 (an interval includes 0)",
            False,
        ),
        (  # the figures decide, whatever a flag beside them says
            {"judgement": {
                "verdict": "not shown",
                "interval_includes_zero": False,
                "columns": {"raw": {"difference": 0.1, "interval": [0.0, 0.2]}},
            }},
            "not shown: raw +10.0, +0.0 to +20.0 (an interval includes 0)",
            False,
        ),
        ({"judgement": "good"}, "cannot be read", False),
        ({"held_out": {"verdict": "beats"}}, "cannot be read", False),
        ({"judgement": {"verdict": "beats", "columns": [1]}}, "cannot be read", False),
        ({"judgement": {"verdict": "beats", "columns": {"raw": {"interval": [0, 1]}}}},
         "cannot be read", False),
    ],
)  # fmt: skip
def test_an_artifact_says_what_its_heads_are_worth(artifact, search, said, stands):
    given = artifact.model_copy(update={"search": search})
    line, found = given.judgement()
    assert said in line
    assert found is stands
