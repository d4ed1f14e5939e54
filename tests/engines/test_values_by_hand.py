"""Small cases worked by hand: each is a reading that other tests would not have told apart."""

from __future__ import annotations

from pathlib import Path

import engine_cases as ec
import pytest
import torch

from act_harness import artifact as artifacts
from act_harness.artifact import Artifact, ModelFacts, resolve_artifact
from act_harness.calibration import Calibration, HeadStrength
from act_harness.engines.operation import Stock
from act_harness.engines.reference import calibrate_weights, row_factors
from act_harness.engines.torch import TorchEngine
from act_harness.errors import ArtifactError

# -- calibrate_weights -----------------------------------------------------------------------------

# Four columns, causal. Column means over the rows that see them: first map 1: (0.5 + 0.5 + 0.4) / 3
# = 0.467, column 2: (0.2 + 0.1) / 2 = 0.15; second map 1: 0.1, column 2: (0.7 + 0.6) / 2 = 0.65.
FIRST = [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.3, 0.5, 0.2, 0], [0.4, 0.4, 0.1, 0.1]]
SECOND = [[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.2, 0.1, 0.7, 0], [0.2, 0.1, 0.6, 0.1]]
HALF = Calibration(rule="absolute", tau=0.4, beta=0.5)  # damps what gets more than 0.4, by half


def damped(row, sink):
    """A row by hand: the sink keeps half, the rest shares what it lost in proportion."""
    rest = sum(row) - row[sink]
    outside = (1 - 0.5 * row[sink]) / rest
    return [0.5 * w if t == sink else w * outside for t, w in enumerate(row)]


def test_each_map_of_a_batch_has_its_own_sinks():
    """Batch 2, two heads, in both orders: nothing of one item or head reaches another."""
    want = {
        "first": [FIRST[0], *(damped(row, 1) for row in FIRST[1:])],
        "second": [*SECOND[:2], *(damped(row, 2) for row in SECOND[2:])],
    }
    given = {"first": FIRST, "second": SECOND}
    names = [["first", "second"], ["second", "first"]]
    maps = torch.tensor([[given[name] for name in item] for item in names], dtype=torch.float64)
    changed = calibrate_weights(maps, calibration=HALF)
    expected = torch.tensor([[want[name] for name in item] for item in names]).double()
    torch.testing.assert_close(changed, expected, rtol=1e-7, atol=1e-7)


def test_pads_of_one_item_are_no_rows_of_another():
    """The second item is three rows of FIRST behind a pad: N, first token and means are its own."""
    visible = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    visible[1, :, :, 0] = False
    padded = torch.zeros(4, 4)
    padded[1:, 1:] = torch.tensor(FIRST)[:3, :3]
    maps = torch.stack([torch.tensor(SECOND), padded]).double()[:, None]
    # relative, alpha 1: the threshold is 1/4 and 1/3; at 1/4 column 2 of the padded item (0.2) and
    # at 1/3 column 1 of SECOND (0.1) would be none either way, but 0.5 is above both.
    calibration = Calibration(alpha=1.0, beta=0.5)
    changed = calibrate_weights(maps, calibration=calibration, visible=visible)
    alone = calibrate_weights(
        torch.tensor(FIRST)[None, None, :3, :3].double(), calibration=calibration
    )
    torch.testing.assert_close(changed[1, 0, 1:, 1:], alone[0, 0])
    by_hand = torch.tensor([damped(row[:3], 1) for row in FIRST[1:3]]).double()
    torch.testing.assert_close(alone[0, 0, 1:], by_hand, rtol=1e-6, atol=1e-7)
    assert torch.equal(changed[1, 0, 0], maps[1, 0, 0])  # the pad's row
    own = calibrate_weights(maps[:1], calibration=calibration)
    torch.testing.assert_close(changed[0], own[0])


def test_strengths_belong_to_heads_not_to_items():
    maps = torch.tensor([[FIRST, FIRST], [SECOND, SECOND]]).double()
    pair = (HeadStrength(beta=0.5), HeadStrength(beta=0.0))
    changed = calibrate_weights(maps, calibration=HALF, strengths=pair)
    assert changed[0, :, 1, 1].tolist() == pytest.approx([0.25, 0.0])
    assert changed[1, :, 2, 2].tolist() == pytest.approx([0.35, 0.0])


# -- reweight where nearly nothing is off the sinks ------------------------------------------------


@pytest.mark.parametrize("gamma", [0.25, 4.0])
def test_reweight_changes_rows_that_damp_leaves_alone(gamma):
    """u = 1e-8: damping would divide by it, reweighting divides by u + gamma m, which is large."""
    calibration = Calibration(
        rule="absolute", tau=0.5, protect="none", mass="reweight", gamma=gamma
    )
    weights = torch.tensor([[1.0, 0, 0], [1 - 1e-8, 1e-8, 0], [1 - 1e-8, 4e-9, 6e-9]]).double()
    changed = calibrate_weights(weights[None, None], calibration=calibration)[0, 0]
    assert changed[0].tolist() == [1, 0, 0]
    # m' = gamma m / (u + gamma m): the other columns become 1e-8 / gamma of the row, nearly.
    whole = 1e-8 + gamma * (1 - 1e-8)
    assert changed[1].tolist() == pytest.approx([gamma * (1 - 1e-8) / whole, 1e-8 / whole, 0])
    assert changed[2, 1:].tolist() == pytest.approx([4e-9 / whole, 6e-9 / whole], rel=1e-9)
    mass = torch.tensor(1 - 1e-8, dtype=torch.float64).view(1, 1, 1, 1)
    both = (HeadStrength(beta=0.4), HeadStrength(mass="reweight", gamma=gamma))
    factors = row_factors(mass.expand(1, 2, 1, 1), 1 - mass.expand(1, 2, 1, 1), both)
    assert factors.alone.flatten().tolist() == [True, False]
    assert factors.outside.flatten().tolist() == pytest.approx([1, 1 / whole])


def test_the_bound_of_rows_left_alone():
    """Damp: at u = 1e-6 the row is changed, below it is not."""
    for off, alone in ((1.0e-6, False), (0.999e-6, True)):
        m, u = torch.tensor([1 - off, off], dtype=torch.float64)
        found = row_factors(m.view(1, 1, 1, 1), u.view(1, 1, 1, 1), (HeadStrength(beta=0.5),))
        assert found.alone.item() is alone
        assert found.inside.item() == (1.0 if alone else 0.5)


# -- rows that calibration does not touch ----------------------------------------------------------


@pytest.mark.parametrize("engine", [TorchEngine(), TorchEngine(block_elements=97)])
@pytest.mark.parametrize("kernel", ["", "sdpa"])
def test_untouched_rows_are_the_kernels_own(engine, kernel):
    """What no sink touches comes from the stock kernel to the bit.

    Where the engine does not know the kernel, stock returns marks and not attention: rows that are
    computed anew, however well, are seen. Where it does, it runs the kernel itself.
    """
    case = ec.make_case(3, sinks=(5, 11), strength=3.0)
    geometry = case.geometry()
    marks = torch.randn(2, 48, 4, 16, generator=torch.Generator().manual_seed(1))
    if kernel:
        marks = ec.stock_of(case, geometry)()
    plan = ec.plan_of(Calibration(protect="none"), (0, 2))
    found = engine(
        case.call(),
        geometry=geometry,
        plan=plan,
        state=None,
        stock=Stock(lambda: marks.clone(), kernel=kernel),
    )
    assert found.state is not None
    sinks = found.state.sinks  # (B, selected, T)
    assert bool(sinks.any())
    assert torch.equal(found.output[:, :, [1, 3]], marks[:, :, [1, 3]])
    exact = ec.run(ec.ReferenceEngine(), case, plan).output
    touched = 0
    for item in range(2):
        for slot, head in enumerate((0, 2)):
            places = sinks[item, slot].nonzero().flatten()
            start = int(places[0]) if len(places) else 48
            own, stock = found.output[item, :, head], marks[item, :, head]
            assert torch.equal(own[:start], stock[:start])
            assert not (own[start:] == stock[start:]).all(dim=-1).any()
            torch.testing.assert_close(own[start:], exact[item, start:, head], rtol=1e-3, atol=1e-4)
            touched += 48 - start
    assert 0 < touched < 4 * 48


# -- the automatic choice of a shipped artifact ----------------------------------------------------

FACTS = ModelFacts(
    id="someone/Tiny-1B", architecture="LlamaForCausalLM", num_hidden_layers=3,
    num_attention_heads=4, revision="r1",
)  # fmt: skip


@pytest.fixture
def ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ship artifacts of these models in place of the package's own."""

    def shipping(**models: ModelFacts) -> None:
        found = {}
        for name, facts in models.items():
            made = Artifact(name=name, model=facts, calibration=Calibration(), heads={0: (1,)})
            found[f"model/{name}"] = made.save(tmp_path / f"{name}.json")
        monkeypatch.setattr(artifacts, "shipped_artifacts", lambda: found)

    return shipping


def changed(**more) -> ModelFacts:
    return FACTS.model_copy(update=more)


def test_the_one_shipped_artifact_that_fits_is_taken(ship):
    ship(
        mine=changed(id="other-owner/tiny-1b"),  # the last part of the name counts, in any case
        deeper=changed(num_hidden_layers=4),
        wider=changed(num_attention_heads=8),
        other=changed(architecture="MistralForCausalLM"),
        named=changed(id="someone/Tiny-2B"),
    )
    found = resolve_artifact("", FACTS)
    assert found is not None
    assert found.name == "mine"
    assert resolve_artifact("none", FACTS) is None


def test_weights_decide_where_both_sides_know_them(ship):
    known = changed(weights_sha256="a" * 64)
    ship(
        same=changed(id="renamed/whatever", weights_sha256="a" * 64),
        tuned=changed(weights_sha256="b" * 64),
    )
    found = resolve_artifact("", known)
    assert found is not None
    assert found.name == "same"
    ship(tuned=changed(weights_sha256="b" * 64))
    with pytest.raises(ArtifactError, match="no shipped artifact fits 'someone/Tiny-1B'"):
        resolve_artifact("", known)


def test_several_that_fit_are_named_and_none_is_guessed(ship):
    ship(one=FACTS, two=FACTS, other=changed(num_hidden_layers=9))
    with pytest.raises(
        ArtifactError, match=r"several shipped ones fit 'someone/Tiny-1B' \(model/one, model/two\)"
    ):
        resolve_artifact("", FACTS)
