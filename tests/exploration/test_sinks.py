"""Statistics of sinks against counts made from each document's maps."""

import math

import numpy as np
import pytest
from tiny_hybrids import KINDS, hybrid
from tiny_models import make_tiny

import act_harness
from act_harness import Calibration
from act_harness.errors import CalibrationError, TaskError
from act_harness.exploration.sinks import POSITION_BINS, count_sinks, kind_of
from act_harness.search.documents import Document

SETTINGS = Calibration(alpha=1.5)


def document(task, prompt):
    return Document(task, "0" * 8, ((tuple(prompt), (3,)), (tuple(prompt), (4,))), 0)


class Words:
    """Stands for a tokenizer: a token's text is its number."""

    all_special_ids = (11,)

    def decode(self, tokens, **settings):
        return str(tokens[0])


def flags_of(model, prompt, layer, head, least):
    """Return flags worked out from a head's map: above threshold, not the first, enough rows."""

    def tokens(text):
        return {"input_ids": list(prompt)}

    before, _, sinks = act_harness.maps(model, tokens, "", layer, head, calibration=SETTINGS)
    length = len(prompt)
    seen = np.arange(length, 0, -1)
    means = before.numpy().sum(axis=0) / seen
    found = (means > SETTINGS.alpha / length) & (np.arange(length) > 0) & (seen >= least)
    if least == 1:
        np.testing.assert_array_equal(found, sinks.numpy())
    return found, means, before.numpy()


def test_counts_are_those_of_the_maps():
    model = make_tiny()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(5, 20, size=size).tolist() for size in (24, 31, 17)]
    documents = [document("a", prompts[0]), document("a", prompts[1]), document("b", prompts[2])]
    found = count_sinks(model, documents, calibration=SETTINGS, vocabulary=97)

    heads = {1: np.zeros((3, 4)), "auto": np.zeros((3, 4))}
    positions, tokens, ratio = np.zeros(POSITION_BINS), np.zeros(97), np.zeros(97)
    last_three = first_mass = 0.0
    for prompt in prompts:
        length = len(prompt)
        for layer, head in np.ndindex(3, 4):
            for name in heads:
                least = 1 if name == 1 else math.ceil(length / SETTINGS.alpha)
                flags, means, before = flags_of(model, prompt, layer, head, least)
                heads[name][layer, head] += flags.sum()
                if name == "auto":
                    continue
                last_three += flags[-3:].sum()
                first_mass += before[:, 0].mean()
                for place, token in enumerate(prompt):
                    positions[place * POSITION_BINS // length] += flags[place]
                    tokens[token] += flags[place]
                    ratio[token] += means[place] / (SETTINGS.alpha / length)
    assert heads[1].sum() > heads["auto"].sum() > 0
    np.testing.assert_array_equal(found.flags[0].heads, heads[1])
    np.testing.assert_array_equal(found.flags[1].heads, heads["auto"])
    np.testing.assert_array_equal(found.flags[0].positions, positions)
    np.testing.assert_array_equal(found.token_flags, tokens)
    np.testing.assert_allclose(found.token_ratio, ratio, atol=1e-4)
    assert found.flags[0].summary()["on_last_three_tokens"] == last_three / heads[1].sum()
    assert found.flags[1].summary()["on_last_three_tokens"] == 0.0
    rows = {row["task"]: row for row in found.task_rows()}
    assert (rows["a"]["documents"], rows["b"]["documents"]) == (2, 1)
    assert rows["a"]["tokens"] == (24 + 31) / 2
    weights = np.array([2, 1])
    masses = np.array([rows["a"]["mass_on_first_token"], rows["b"]["mass_on_first_token"]])
    assert (weights * masses).sum() == pytest.approx(first_mass / 12, abs=1e-5)
    kinds = {row["kind"]: row for row in found.kind_rows(Words())}
    every = [token for prompt in prompts for token in prompt]
    assert set(kinds) == {"digits", "special"}  # of the numbers that stand for texts
    assert kinds["special"]["occurrences"] == every.count(11)
    assert kinds["special"]["flags"] == tokens[11]
    assert kinds["digits"]["share_of_flags"] == pytest.approx(1 - tokens[11] / tokens.sum())
    listed = found.token_rows(Words())
    assert [row["flags"] for row in listed] == sorted(tokens[tokens > 0], reverse=True)
    assert {row["kind"] for row in listed if row["token"] == 11} <= {"special"}


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1", "jamba", "lfm2"])
def test_layers_that_do_not_attend_are_in_no_mean(kind):
    """Means of a hybrid are over the heads that it has; a recurrent layer has no row of zeros."""
    model, attending = hybrid(kind), KINDS[kind][1]
    prompt = np.random.default_rng(0).integers(5, 97, size=21).tolist()
    found = count_sinks(model, [document("a", prompt)], calibration=SETTINGS, vocabulary=97)

    def tokens(text):
        return {"input_ids": prompt}

    flags, first = [], []
    for layer in attending:
        for head in range(4):
            maps = act_harness.maps(model, tokens, "", layer, head, calibration=SETTINGS)
            flags.append(int(maps.sinks.sum()))
            first.append(float(maps.before[:, 0].mean()))
    rows = found.head_rows()
    assert [(r["layer"], r["head"]) for r in rows] == [(n, h) for n in attending for h in range(4)]
    assert [row["sinks"] for row in rows] == flags
    (task,) = found.task_rows()
    assert task["sinks_per_head"] == pytest.approx(np.mean(flags))
    assert task["mass_on_first_token"] == pytest.approx(np.mean(first), abs=1e-5)
    for row in found.token_rows(Words()):
        mean = found.token_ratio[row["token"]] / (prompt.count(row["token"]) * len(flags))
        assert row["mean_attention_by_threshold"] == pytest.approx(mean)


def test_equal_counts_give_equal_pictures(tmp_path):
    from act_harness.exploration.figures import draw_sinks

    model = make_tiny()
    found = count_sinks(model, [document("a", range(5, 25))], calibration=SETTINGS, vocabulary=97)
    tables = {
        "positions": found.position_rows(),
        "heads": found.head_rows(),
        "tokens": found.token_rows(Words()),
    }
    for kind in ("png", "svg"):
        files = [tmp_path / f"{n}.{kind}" for n in (1, 2)]
        for file in files:
            draw_sinks(tables, file, title="costs $5 and $6")
        assert files[0].read_bytes() == files[1].read_bytes()
    assert "costs" in files[0].read_text()


def test_what_is_kept_does_not_grow_with_the_documents():
    model = make_tiny()

    def size(count):
        prompts = np.random.default_rng(1).integers(5, 97, size=(count, 12)).tolist()
        documents = (document("a", prompt) for prompt in prompts)
        found = count_sinks(model, documents, calibration=SETTINGS, vocabulary=97)
        tables = [found.first_mass, found.sink_mass, found.token_flags, found.token_ratio]
        for flags in found.flags:
            tables += [flags.heads, flags.with_sinks, flags.positions]
        return sum(table.nbytes for table in tables), len(found.tasks)

    assert size(2) == size(9)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("\n", "newline"), (".\n", "newline"), ("  ", "space"), (".", "punctuation"),
     (" <|", "punctuation"), ("12", "digits"), (" the", "word"), ("été", "word"), ("a1", "other"),
     ("✓", "punctuation"), ("", "space")],
)  # fmt: skip
def test_kinds_of_tokens(text, kind):
    assert kind_of(text) == kind


def test_what_has_no_sinks_is_refused():
    model = make_tiny()
    with pytest.raises(CalibrationError, match="target 'initial' detects no sinks"):
        count_sinks(model, [], calibration=Calibration(target="initial"), vocabulary=97)
    with pytest.raises(TaskError, match="no document"):
        count_sinks(model, [], calibration=SETTINGS, vocabulary=97)
