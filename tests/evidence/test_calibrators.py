from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from act_harness.errors import InputError, ResultError
from act_harness.evidence import calibrators as cal
from act_harness.evidence import scaling
from act_harness.evidence.choices import label_prior_corrected, padded
from act_harness.evidence.compare import compare
from act_harness.evidence.results import run_from_memory
from act_harness.evidence.samples import ChoiceScores

SCORES = hnp.arrays(
    np.float64,
    st.tuples(st.integers(4, 12), st.integers(2, 4)),
    elements=st.floats(-20, 0).map(lambda value: round(value, 3)),
)


def choices_of(scores, labels, choices=("a", "b")):
    """Classification: the same choices everywhere."""
    return ChoiceScores(
        np.asarray(scores, dtype=float), np.asarray(labels), True, (choices,) * len(labels)
    )


def relative(scores):
    """What ranks choices: scores less their mean over a document's choices."""
    return scores - scores.mean(axis=-1, keepdims=True)


def fitted(scores, labels, **changes):
    scores = np.asarray(scores, dtype=float)
    given = {"lengths": np.ones_like(scores), "same_choices": True, **changes}
    return scaling.fit_scaling(scores, labels, **given)


# -- without labels --------------------------------------------------------------------------------


def test_content_free_divides_by_the_mean_probability():
    prior = np.log([[0.8, 0.2], [0.6, 0.4]])  # mean 0.7 and 0.3
    scores = np.log([[0.6, 0.4], [0.9, 0.1]])
    found = np.exp(cal.content_free(scores, prior))
    assert found == pytest.approx(np.array([[0.6 / 0.7, 0.4 / 0.3], [0.9 / 0.7, 0.1 / 0.3]]))
    assert found.argmax(axis=1).tolist() == [1, 0]


def test_content_free_normalises_over_the_choices():
    # Both choices twenty nats less likely behind the second input: the same prior.
    prior = np.log([[0.8, 0.2], [0.6, 0.4]])
    moved = prior - [[0.0], [20.0]]
    scores = np.zeros((1, 2))
    assert cal.content_free(scores, moved) == pytest.approx(cal.content_free(scores, prior))


@given(SCORES)
def test_content_free_of_equal_choices_ranks_as_raw(scores):
    found = cal.content_free(scores, np.full((3, scores.shape[1]), -2.5))
    assert relative(found) == pytest.approx(relative(scores), abs=1e-9)


def test_domain_pmi_by_hand_and_with_fewer_choices():
    scores = np.array([[-3.0, -2.0, -9.0], [-1.0, -5.0, -np.inf]])
    premise = np.array([[-6.0, -2.5, -3.0], [-1.5, -9.0, -np.inf]])
    found = cal.domain_pmi(scores, premise)
    assert found.tolist() == [[3.0, 0.5, -6.0], [0.5, 4.0, -np.inf]]
    with pytest.raises(ResultError, match="score behind the premise"):
        cal.domain_pmi(premise, np.array([[-1.0, -1.0, -1.0], [-1.0, -np.inf, -np.inf]]))


def test_pride_finds_the_prior_that_was_put_in():
    prior = np.array([0.6, 0.3, 0.1])
    options = np.array([[0.2, 0.5, 0.3], [0.7, 0.2, 0.1]])  # what the model knows of each option
    asked = [
        [np.log(prior * np.roll(known, turn)) for turn in range(3)] for known in options
    ]  # rotation by `turn`: letter i shows option i - turn
    found = cal.option_prior(np.array(asked))
    assert np.exp(found) == pytest.approx(prior)
    scores = np.log(prior * options)
    assert relative(cal.pride(scores, found)) == pytest.approx(relative(np.log(options)))


def test_pride_averages_documents_as_probabilities():
    asked = np.log([[[0.8, 0.2]] * 2, [[0.4, 0.6]] * 2])
    assert np.exp(cal.option_prior(asked)) == pytest.approx([0.6, 0.4])


@given(SCORES, st.lists(st.floats(-5, 5), min_size=4, max_size=4))
def test_the_batch_prior_takes_out_any_number_per_choice(scores, moved):
    other = scores + np.array(moved[: scores.shape[1]])
    assert label_prior_corrected(other) == pytest.approx(label_prior_corrected(scores), abs=1e-9)


# -- with labels -----------------------------------------------------------------------------------


def test_scaling_of_a_symmetric_case_solves_its_equation():
    # Scores +-1, three of four right: by symmetry one w for both choices and no b. With
    # z = 2 (1 + w) the loss is 3/4 log(1 + e^-z) + 1/4 log(1 + e^z) + 2 penalty w^2.
    scores = np.array([[1, -1], [1, -1], [1, -1], [1, -1], [-1, 1], [-1, 1], [-1, 1], [-1, 1]])
    labels = [0, 0, 0, 1, 1, 1, 1, 0]
    found = fitted(scores, labels, penalties=(0.1,))

    def slope(w):
        return 2 * (1 / (1 + np.exp(-2 * (1 + w))) - 0.75) + 4 * 0.1 * w

    root = scipy.optimize.brentq(slope, -1, 1)
    assert found.weights == pytest.approx([root, root, 0, 0], abs=1e-7)
    scaled = found.apply(np.array([[2.0, 0.0]]), np.ones((1, 2)))
    assert scaled == pytest.approx(np.array([[2 * (1 + root), 0.0]]), abs=1e-6)


def test_scaling_is_a_minimum_of_what_it_is_said_to_minimise():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(40, 3)) * [1, 4, 2] - [0, 3, 9]
    labels = rng.integers(3, size=40)
    found = fitted(scores, labels, penalties=(0.03,))

    def objective(weights):
        x = scores - scores.mean(axis=0)
        scaled = x * (1 + weights[:3]) + weights[3:]
        right = scaled[np.arange(40), labels]
        loss = np.log(np.exp(scaled).sum(axis=1)) - right
        return loss.mean() + 0.03 * (weights**2).sum()

    other = scipy.optimize.minimize(objective, np.zeros(6), method="Powell", tol=1e-12)
    assert found.weights == pytest.approx(other.x, abs=1e-4)
    assert objective(found.weights) <= other.fun + 1e-12


@settings(deadline=None, max_examples=25)
@given(SCORES, st.integers(0, 1000))
def test_a_huge_penalty_leaves_the_batch_prior(scores, seed):
    labels = np.random.default_rng(seed).integers(scores.shape[1], size=len(scores))
    found = fitted(scores, labels, penalties=(1e9,))
    scaled = found.apply(scores, np.ones_like(scores))
    assert scaled == pytest.approx(label_prior_corrected(scores), abs=1e-5)


@settings(deadline=None, max_examples=15)
@given(SCORES, st.integers(0, 1000))
def test_the_order_of_the_choices_does_not_matter(scores, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(scores.shape[1], size=len(scores))
    order = rng.permutation(scores.shape[1])
    lengths = rng.integers(1, 9, size=scores.shape).astype(float)
    for same in (True, False):
        one = fitted(scores, labels, lengths=lengths, same_choices=same, penalties=(0.1,))
        two = fitted(
            scores[:, order], np.argsort(order)[labels], lengths=lengths[:, order],
            same_choices=same, penalties=(0.1,),
        )  # fmt: skip
        assert two.apply(scores[:, order], lengths[:, order]) == pytest.approx(
            one.apply(scores, lengths)[:, order], abs=1e-5
        )


def test_without_choice_identity_each_document_may_be_turned_by_itself():
    rng = np.random.default_rng(5)
    scores, lengths = rng.normal(size=(30, 4)) * 3, rng.integers(2, 40, size=(30, 4)).astype(float)
    labels = rng.integers(4, size=30)
    turned = np.stack([np.roll(row, n) for n, row in enumerate(scores)])
    long = np.stack([np.roll(row, n) for n, row in enumerate(lengths)])
    one = fitted(scores, labels, lengths=lengths, same_choices=False, penalties=(0.01,))
    two = fitted(
        turned, (labels + np.arange(30)) % 4, lengths=long, same_choices=False, penalties=(0.01,)
    )
    assert one.weights == pytest.approx(two.weights, abs=1e-6)


def test_scaling_without_choice_identity_by_hand():
    # Zero weights but for one: the three terms, mean length 10.
    scores, lengths = np.array([[-4.0, -9.0]]), np.array([[5.0, 20.0]])
    for weights, wanted in (
        ((0.5, 0.0, 0.0), [-6.0, -13.5]),
        ((-1.0, 1.0, 0.0), [-8.0, -4.5]),  # length-normalised scores: -0.8 and -0.45 a character
        ((0.0, 0.0, 2.0), [-3.0, -5.0]),
    ):
        one = scaling.Scaling(None, np.array(weights), 10.0, 0.1)
        assert one.apply(scores, lengths).tolist() == [wanted]


def test_scaling_learns_that_length_costs():
    # Every character costs a nat and the right choice gains three: only the length tells it.
    rng = np.random.default_rng(2)
    lengths = rng.integers(5, 60, size=(200, 4)).astype(float)
    labels = rng.integers(4, size=200)
    scores = -lengths + 3 * np.eye(4)[labels]
    found = fitted(scores[:100], labels[:100], lengths=lengths[:100], same_choices=False)
    held = found.apply(scores[100:], lengths[100:]).argmax(axis=1) == labels[100:]
    assert (scores[100:].argmax(axis=1) == labels[100:]).mean() < 0.5
    assert held.mean() > 0.95


def test_scaling_knows_documents_with_fewer_choices():
    scores = padded([(-1.0, -2.0, -3.0), (-4.0, -1.0), (-2.0, -2.5), (-5.0, -4.0, -1.0), (-1, -3)])
    lengths = padded([(3, 4, 5), (6, 2), (2, 2), (9, 8, 7), (4, 4)])
    found = fitted(scores, [0, 1, 1, 2, 0], lengths=lengths, same_choices=False)
    scaled = found.apply(scores, lengths)
    assert np.isfinite(found.weights).all()
    assert (np.isinf(scaled) == np.isinf(scores)).all()
    assert found.length == pytest.approx(56 / 12)
    with pytest.raises(ResultError, match="no choice of its document"):
        fitted(scores, [0, 2, 1, 2, 0], lengths=lengths, same_choices=False)


def test_the_penalty_is_that_of_a_cross_validation():
    rng = np.random.default_rng(1)
    labels = rng.integers(3, size=60)
    scores = rng.normal(size=(60, 3)) * 2 + np.eye(3)[labels] - [0, 4, 1]
    fold = np.zeros(60, dtype=int)
    for label in range(3):  # dealt out like cards, label by label
        rows = np.flatnonzero(labels == label)
        fold[rows] = (np.arange(len(rows)) + (labels < label).sum()) % 4
    losses = {}
    for penalty in scaling.PENALTIES:
        losses[penalty] = 0.0
        for part in range(4):
            held = fold == part
            one = fitted(scores[~held], labels[~held], penalties=(penalty,))
            scaled = one.apply(scores[held], np.ones((held.sum(), 3)))
            right = scaled[np.arange(held.sum()), labels[held]]
            losses[penalty] += (np.log(np.exp(scaled).sum(axis=1)) - right).sum()
    best = min(losses, key=losses.get)
    assert best not in (0.001, 1.0)  # the case is one that decides
    assert fitted(scores, labels).penalty == best


def test_a_plain_fault_is_mended():
    rng = np.random.default_rng(1)
    labels = np.arange(200) % 2
    scores = rng.normal(size=(200, 2)) * 0.1 - 0.5 * np.eye(2)[labels]  # the right one is least
    found = fitted(scores[:100], labels[:100])
    assert found.penalty == 0.001
    hits = found.apply(scores[100:], np.ones((100, 2))).argmax(axis=1) == labels[100:]
    assert hits.mean() > 0.95


def test_scaling_refuses_what_it_cannot_fit():
    with pytest.raises(ResultError, match="4 labelled documents or more"):
        fitted(np.zeros((3, 2)), [0, 1, 0])
    with pytest.raises(ResultError, match="a scaling of 2 choices, for 3"):
        fitted(np.eye(4)[:, :2], [0, 1, 0, 1]).apply(np.zeros((1, 3)), np.ones((1, 3)))


# -- by name ---------------------------------------------------------------------------------------


def test_names():
    assert cal.calibrator_names(()) == ("batch",)
    assert cal.calibrator_names(("supervised", "content-free")) == (
        "batch", "content-free", "supervised",
    )  # fmt: skip
    assert cal.calibrator_names(("all",)) == tuple(cal.CALIBRATORS)
    with pytest.raises(InputError, match=r"'contentfree', which is unknown.*content-free"):
        cal.calibrator_names(("contentfree",))


def test_hits_by_name():
    choices = choices_of(np.log([[0.6, 0.4], [0.9, 0.1]]), [1, 1])
    inputs = cal.CalibratorInputs(
        content_free=(tuple(np.log([0.8, 0.2])), tuple(np.log([0.6, 0.4]))),
        premise={"a": -0.1, "b": -3.0},
        rotated=((tuple(np.log([0.8, 0.2])),) * 2,),
        labelled=cal.LabelledScores(
            scores=((-1.0, -2.0), (-2.0, -1.0)) * 4, labels=(0, 1) * 4, lengths=((1, 1),) * 8,
            same_choices=True,
        ),
    )  # fmt: skip
    found = {
        name: cal.calibrated_hits(one, choices, inputs) for name, one in cal.CALIBRATORS.items()
    }
    assert {name: hits.tolist() for name, hits in found.items()} == {
        "batch": [1.0, 0.0],  # -0.2 and -1.4 less their means: the first document goes to b
        "content-free": [1.0, 0.0],
        "domain-pmi": [1.0, 1.0],
        "pride": [1.0, 0.0],
        "supervised": [0.0, 0.0],  # the labelled documents have no preference
    }


def test_what_does_not_apply_has_no_column():
    many = ChoiceScores(np.array([[-1.0, -2.0]]), np.array([0]), False, (("a", "b"),))
    inputs = cal.CalibratorInputs(content_free=((-1.0, -2.0),), premise={"a": -1.0, "b": -0.5})
    found = {
        name: cal.calibrated_hits(one, many, inputs) is not None
        for name, one in cal.CALIBRATORS.items()
    }
    assert [name for name, there in found.items() if there] == ["domain-pmi"]
    with pytest.raises(ResultError, match="'b' has no score behind the premise"):
        cal.calibrated_hits(
            cal.CALIBRATORS["domain-pmi"], many, cal.CalibratorInputs(premise={"a": -1.0})
        )


# -- two runs --------------------------------------------------------------------------------------


def run_of(label, scores, stored):
    """A run in memory of four documents with the choices a and b."""
    rows = [
        {
            "doc_id": n, "doc_hash": str(n), "prompt_hash": "p", "target_hash": "t", "target": "0",
            "filter": "none", "metrics": ["acc"], "acc": float(one[0] >= one[1]), "doc": {},
            "filtered_resps": [(score, False) for score in one],
            "arguments": [("Q", "a"), ("Q", "b")],
        }
        for n, one in enumerate(scores)
    ]  # fmt: skip
    acc = sum(row["acc"] for row in rows) / len(rows)
    return run_from_memory(
        {"results": {"t": {"acc,none": acc}}, "configs": {"t": {}}, "samples": {"t": rows},
         "calibrators": stored}, label=label,
    )  # fmt: skip


A = [(-1.0, -2.0), (-2.0, -1.0), (-1.0, -3.0), (-4.0, -1.0)]
B = [(-1.0, -2.0), (-2.0, -1.5), (-3.0, -1.0), (-4.0, -1.0)]


def labelled(*labels):
    return {
        "scores": [[-1.0, -2.0], [-3.0, -1.0]] * 2, "labels": labels, "lengths": [[1, 1]] * 4,
        "same_choices": True,
    }  # fmt: skip


def test_compare_shows_what_both_runs_have_stored():
    a = run_of("a", A, {"t": {"premise": {"a": 0.0, "b": 0.0}, "labelled": labelled(0, 1, 0, 1)}})
    b = run_of("b", B, {"t": {"premise": {"a": -3.5, "b": -1.0}, "labelled": labelled(0, 1, 1, 1)}})
    rows = {row.metric: row for row in compare(a, b).rows}
    assert list(rows) == ["acc", "acc_corrected", "acc_domain_pmi", "acc_supervised", "margin"]
    assert (rows["acc_domain_pmi"].score_a, rows["acc_domain_pmi"].score_b) == (0.5, 0.75)
    assert rows["acc_domain_pmi"].higher_is_better
    assert rows["acc_supervised"].result is None
    assert rows["acc_supervised"].note.startswith("fitted on other labelled documents")
    plain = compare(run_of("a", A, {}), b)
    assert [row.metric for row in plain.rows] == ["acc", "acc_corrected", "margin"]


def test_what_is_stored_and_cannot_be_read_is_one_line():
    for stored in ({"t": {"premise": {"a": "x"}}}, {"t": {"unknown": 1}}, {"t": [1]}):
        with pytest.raises(ResultError, match="task t cannot be read") as caught:
            compare(run_of("a", A, {}), run_of("b", B, stored))
        assert "\n" not in str(caught.value)


def test_a_prior_over_documents_needs_two():
    """One document's own scores are its mean: nothing is left, and the first choice would win."""
    batch = cal.CALIBRATORS["batch"]
    assert (
        cal.calibrated_hits(batch, choices_of([[-1.0, -2.0]], [0]), cal.CalibratorInputs()) is None
    )
    two = choices_of([[-1.0, -2.0], [-3.0, -1.0]], [0, 1])
    assert cal.calibrated_hits(batch, two, cal.CalibratorInputs()).tolist() == [1.0, 1.0]
