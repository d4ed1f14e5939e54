"""The accuracy benchmark on real maps: what it records is what the model attends with."""

from __future__ import annotations

import json

import pytest
import torch

from act_harness.bench import accuracy
from act_harness.bench.attention import stock
from act_harness.bench.scoring import Requests, write_requests
from act_harness.errors import InputError

TOKENS = tuple(range(3, 40))


def test_recorded_inputs_are_the_models(tiny):
    model = tiny()
    seen = []

    def keep(module, args, output):
        seen.append(args[0])

    hook = model.model.layers[1].self_attn.o_proj.register_forward_hook(keep)
    found = accuracy.real_inputs(model, TOKENS, [1])
    model(torch.tensor([TOKENS]))
    hook.remove()
    assert list(found) == [1]
    attended = stock(found[1]).flatten(2)
    assert torch.allclose(attended, seen[-1], atol=1e-5)
    assert not [h for h in dir(model.model.layers[1].self_attn) if "act_harness" in h]


def test_a_report_of_real_maps(tiny_checkpoint, tmp_path):
    requests = tmp_path / "requests.json"
    write_requests([Requests("a", [(TOKENS[:5], (1,)), (TOKENS, (2,))])], requests)
    given = ["--device", "cpu", "--dtypes", "float32", "--tokens", "31", "--out", str(tmp_path)]
    more = ["--model", str(tiny_checkpoint), "--layers", "0,1"]
    with pytest.raises(InputError, match="--requests"):
        accuracy.main([*given, *more])
    path = accuracy.main([*given, *more, "--requests", str(requests)])
    planted, real = json.loads(path.with_suffix(".json").read_text())["tables"]
    assert planted["rows"]
    heads = torch.tensor([row[real["columns"].index("rows")] for row in real["rows"]])
    assert heads.sum() % len(TOKENS) == 0  # every row of every head of both layers, in some bin
    assert {row[0] for row in real["rows"]} == {0, 1}
