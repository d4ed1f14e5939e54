"""Effects of single heads, as a search left them in its artifact."""

from __future__ import annotations

import numpy as np
import pytest

from act_harness.artifact import Artifact, ModelFacts
from act_harness.calibration import Calibration
from act_harness.evidence.head_effects import head_effects

FACTS = ModelFacts(
    id="m", architecture="LlamaForCausalLM", num_hidden_layers=2, num_attention_heads=2
)
COLUMNS = ["layer", "head", "strength", "effect"]


def searched(search):
    return Artifact(
        name="a", model=FACTS, calibration=Calibration(), heads={0: (1,)}, search=search
    )


def test_a_head_has_its_best_effect_of_several_mass_maps():
    """The page took the largest in size and the plot the best: two pictures of one search."""
    rows = [[0, 1, 0, -0.5], [0, 1, 1, 0.2], [1, 0, 0, -0.1]]
    found = head_effects(searched({"table": {"heads": {"columns": COLUMNS, "rows": rows}}}))
    np.testing.assert_array_equal(found, [[np.nan, 0.2], [-0.1, np.nan]])


@pytest.mark.parametrize(
    "heads",
    [None, 3, {"columns": ["layer", "head", "theta"], "rows": []}, {"columns": COLUMNS},
     {"columns": COLUMNS, "rows": [[7, 0, 0, 0.1]]},
     {"columns": COLUMNS, "rows": [[0, 0, 0, "x"]]}],
)  # fmt: skip
def test_what_cannot_be_read_is_no_effect(heads):
    assert head_effects(searched({"table": {"heads": heads}})) is None
    assert head_effects(searched(None)) is None
