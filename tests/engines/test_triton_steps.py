"""Decode steps of the CUDA engine: which path takes them, and that every path gives the same.

Interpreted on the CPU where there is no GPU, as in ``test_triton``.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import engine_cases as ec
import pytest
import torch
from transformers import DynamicCache
from triton_cases import DEVICE, FUSED, ON_DEVICE, SMALL, check_steps, one_step

from act_harness.attention import binding as attaching
from act_harness.attention import calibrated, select_cache
from act_harness.attention.cache import cache_argument
from act_harness.calibration import Calibration, HeadStrength
from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import AttentionCall, Stock
from act_harness.engines.reference import ReferenceEngine
from act_harness.engines.triton import decode_kernels as step
from act_harness.engines.triton.decode import Family
from act_harness.engines.triton.engine import TritonEngine
from act_harness.errors import UnsupportedCallError


def tiny(seed, **settings):
    settings = {"batch": 1, "tokens": 34, "prompts": (30,), "sinks": (0, 5, 11), **settings}
    return ec.make_case(seed, **settings).to(DEVICE)


def only_family(kernels):
    (family,) = kernels.steps.families.values()
    own_lse, plain = family.constants[6:8]
    return family, own_lse, plain


@pytest.mark.parametrize(("strength", "groups"), [(6.0, 2), (13.0, 2), (60.0, 2), (13.0, 4)])
def test_rows_that_see_everything(strength, groups):
    """By difference, summed anew, left alone; the log-sum-exp is the stock kernel's."""
    case = tiny(20, strength=strength, groups=groups, batch=2, prompts=(30, 30), dtype=FUSED)
    plan = ec.plan_of(Calibration(protect="none"), (0, 1, 3))
    kernels = check_steps(TritonEngine(SMALL), case, plan, bare=True)
    assert "strided" not in kernels.calls
    family, own_lse, plain = only_family(kernels)
    assert family.base is not None
    assert (own_lse, plain) == (False, True)
    assert bool(family.runners) == ON_DEVICE


@pytest.mark.parametrize("strength", [6.0, 13.0])
@pytest.mark.parametrize("settings", [{"softcap": 20.0}, {"size": 24}, {"window": 20}])
def test_rows_without_a_log_sum_exp(strength, settings):
    """Soft caps, masks, and a head size that is no power of two."""
    case = tiny(21, strength=strength, **settings)
    plan = ec.plan_of(Calibration(protect="none", alpha=2.0), (0, 1, 2, 3))
    kernels = check_steps(TritonEngine(SMALL), case, plan)
    assert "strided" not in kernels.calls
    family, own_lse, plain = only_family(kernels)
    assert family.base is None
    assert (own_lse, plain) == (True, False)


def test_everything_seen_but_no_fused_kernel():
    """Plain rows whose log-sum-exp nobody gives."""
    case = tiny(22, batch=2, prompts=(30, 30))

    def stock(cut, geometry):
        return Stock(ec.stock_of(cut, geometry).run, "eager")

    plan = ec.plan_of(Calibration(), (0, 3))
    kernels = check_steps(TritonEngine(SMALL), case, plan, bare=True, stock=stock)
    assert "strided" not in kernels.calls
    assert only_family(kernels)[1:] == (True, True)


def test_left_pads_take_the_path_that_looks_at_them():
    case = tiny(23, batch=2, lengths=(34, 20), prompts=(30, 16), side="left")
    kernels = check_steps(TritonEngine(SMALL), case, ec.plan_of(Calibration(), (0, 2)))
    assert "strided" not in kernels.calls
    assert only_family(kernels)[1:] == (True, False)


def test_right_pads_before_the_new_row():
    """No mask, yet pads in between: what is seen comes from which tokens are real."""
    case = tiny(24, batch=2, prompts=(30, 24))
    gaps = case.real.clone()
    gaps[1, 24:30] = False
    case = replace(case, real=gaps)
    kernels = check_steps(TritonEngine(SMALL), case, ec.plan_of(Calibration(), (0, 2)))
    assert only_family(kernels)[1:] == (True, False)


def test_masks_with_holes():
    """Any mask will do for one row."""
    case = tiny(25)
    plan = ec.plan_of(Calibration(), (0, 3))
    kernels = TritonEngine(SMALL)
    state = ec.run(kernels, case.until(30), plan).state
    mask = torch.ones(1, 1, 1, 31, dtype=torch.bool, device=DEVICE)
    mask[..., 3:20:4] = False
    mask[..., 11] = False
    cut = case.until(31)
    geometry = Geometry(cut.real, torch.zeros_like(cut.real), 30, 0, 31, mask)
    assert geometry.intervals is None
    given = {"geometry": geometry, "plan": plan, "stock": ec.stock_of(cut, geometry)}
    call = cut.call(30).each(torch.Tensor.contiguous)
    found = kernels(call, state=state, **given)
    exact = ReferenceEngine()(call, state=state, **given)
    assert "fallback" not in kernels.calls
    assert ec.row_errors(found.output, exact.output, cut.real[:, 30:]).max() < 2e-5


def test_a_cache_that_dropped_columns():
    case = tiny(26, window=12, sinks=(0, 9, 25))
    plan = ec.plan_of(Calibration(alpha=1.5), (0, 1, 2, 3))
    kernels = TritonEngine(SMALL)
    state = ec.run(kernels, case.until(30), plan).state
    cut = case.until(31)
    whole = cut.geometry(30)
    held = Geometry(whole.real, whole.prompt, 30, 19, 12, whole.mask[..., 19:])
    query = case.query[:, :, 30:31].contiguous()
    key, value = (x[:, :, 19:].contiguous() for x in (cut.key, cut.value))
    call = AttentionCall(query, key, value, case.scale)
    stock = ec.stock_of(cut, whole)
    found = kernels(call, geometry=held, plan=plan, state=state, stock=stock)
    exact = ec.run(ReferenceEngine(), cut, plan, first_row=30, state=state)
    assert state.sinks[..., 19:].any()
    assert kernels.calls["step"] == 1
    assert ec.row_errors(found.output, exact.output, cut.real[:, 30:]).max() < 2e-5


def test_a_strength_for_each_head_and_another_plan_for_the_same_state():
    case = tiny(27)
    strengths = (HeadStrength(beta=0.0), HeadStrength(mass="reweight", gamma=3.0))
    plan = ec.plan_of(Calibration(), (0, 2), strengths)
    kernels = check_steps(TritonEngine(SMALL), case, plan)
    state = ec.run(kernels, case.until(30), plan).state
    first = one_step(kernels, case, plan, state, 30)
    other = ec.plan_of(Calibration(), (0, 2), strengths[::-1])
    second = one_step(kernels, case, other, first.state, 30)
    exact = one_step(ReferenceEngine(), case, other, state, 30)
    assert ec.row_errors(second.output, exact.output, case.real[:, 30:31]).max() < 2e-5
    assert not torch.allclose(first.output, second.output, atol=1e-3)


def _strided(tensor):
    return tensor.repeat_interleave(2, dim=2)[:, :, ::2]


def _last_axis_strided(tensor):
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def _misaligned(tensor):
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)


def _with_gradient(tensor):
    return tensor.requires_grad_()


@pytest.mark.parametrize("change", [_strided, _last_axis_strided, _misaligned, _with_gradient])
def test_tensors_that_the_dense_kernel_does_not_take(change):
    case = tiny(28, dtype=FUSED)
    with torch.no_grad():
        kernels = check_steps(
            TritonEngine(SMALL), case, ec.plan_of(Calibration(), (0, 3)), bare=True, change=change
        )
    assert kernels.calls["strided"] == kernels.calls["step"]


def test_a_stock_output_that_is_not_contiguous():
    case = tiny(29)

    def stock(cut, geometry):
        output = ec.stock_of(cut, geometry)()
        return Stock(lambda: output.transpose(2, 3).contiguous().transpose(2, 3), "eager")

    kernels = check_steps(TritonEngine(SMALL), case, ec.plan_of(Calibration(), (0, 3)), stock=stock)
    assert kernels.calls["strided"] == kernels.calls["step"]


def test_compiled_kernels_are_kept_for_what_is_alike(monkeypatch):
    """The stand-in returns a compiled kernel, as a launch on a device does."""
    launches = []
    kernel = step.step_dense

    class Compiled:
        def __getitem__(self, grid):
            def run(*arguments):
                launches.append("kept")
                kernel[grid](*arguments)

            return run

    class Launched:
        def __getitem__(self, grid):
            def run(*arguments):
                launches.append("looked up")
                kernel[grid](*arguments)
                return Compiled()

            return run

    def warm(self, base, constants, *, warm):
        keep(self, base, constants, warm=True)

    keep = Family.__init__
    monkeypatch.setattr(Family, "__init__", warm)
    monkeypatch.setattr(step, "step_dense", Launched())
    kernels = TritonEngine(SMALL)
    case = tiny(30, dtype=FUSED)
    check_steps(kernels, case, ec.plan_of(Calibration(), (0, 3)), bare=True)
    assert launches == ["looked up", "kept", "kept", "kept"]
    kernels.calls.clear()
    check_steps(kernels, case, ec.plan_of(Calibration(), (0, 1, 3)), bare=True)  # another grid
    assert launches[4:] == ["looked up", "kept", "kept", "kept"]
    kernels.calls.clear()
    check_steps(
        kernels, tiny(31, size=32, dtype=FUSED), ec.plan_of(Calibration(), (0, 3)), bare=True
    )
    assert launches[8:] == ["looked up", "kept", "kept", "kept"]
    assert len(kernels.steps.families) == 2


def test_integers_are_not_specialised_on():
    """A kept kernel serves any length: no integer of it may be baked in."""
    if not hasattr(step.step_dense, "params"):
        signature = ("columns", "first_column", "sink_total", "slots")
        assert step.step_dense.kwargs["do_not_specialize"] == list(signature)
        return
    names = [p.name for p in step.step_dense.params if not p.is_constexpr]
    integers = [n for n in names if not n.endswith("_ptr")]
    assert integers == [p.name for p in step.step_dense.params if p.do_not_specialize]


# -- in a model ----------------------------------------------------------------------------------


HEADS = {0: (0,), 1: (1, 2), 2: (3,)}


def decode(model, tokens, mask, cache):
    """Prefill by all but two tokens, then token by token: the logits of those."""
    rows, start = [], tokens.shape[1] - 2
    with torch.no_grad():
        for stop in range(start, tokens.shape[1] + 1):
            new = tokens[:, :stop] if stop == start else tokens[:, stop - 1 : stop]
            out = model(
                input_ids=new, attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            rows.append(out.logits[:, -1])
    return torch.stack(rows, dim=1), cache


@pytest.fixture
def tokens():
    torch.manual_seed(3)
    return torch.randint(3, 90, (2, 14), device=DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pads"), [("llama", 0), ("llama", 5), ("mistral", 5), ("gemma2", 0)]
)
def test_generation_by_steps(tiny, make_artifact, tokens, kind, pads, monkeypatch):
    """As the reference engine; and only the first layer of a step asks for what all share."""
    model = tiny(kind, dtype=torch.float32).to(DEVICE)
    artifact = make_artifact(model, HEADS)
    mask = torch.ones_like(tokens)
    mask[1, :pads] = 0
    with calibrated(model, artifact, engine="reference"):
        exact, _ = decode(model, tokens, mask, None)
    asked = []
    recall = attaching.recall

    def spy(cache, layer, seen, **given):
        asked.append((layer, seen))
        return recall(cache, layer, seen, **given)

    kernels = TritonEngine(SMALL)
    with calibrated(model, artifact, engine=kernels):
        kernels.calls.clear()
        monkeypatch.setattr(attaching, "recall", spy)
        found, _ = decode(model, tokens, mask, None)
    torch.testing.assert_close(found, exact, atol=2e-4, rtol=2e-4)
    layers = model.config.num_hidden_layers
    assert kernels.calls["step"] == 2 * layers
    assert "fallback" not in kernels.calls
    assert "strided" not in kernels.calls
    if kind == "llama":
        assert asked == [(n, 0) for n in range(layers)] + [(0, 12), (0, 13)]


@pytest.mark.slow
def test_layers_stop_telling_their_cache_once_it_is_known(tiny, make_artifact, tokens):
    model = tiny(dtype=torch.float32).to(DEVICE)
    modules = [layer.self_attn for layer in model.model.layers]
    mask = torch.ones_like(tokens)

    def hooks():
        return sum(len(module._forward_pre_hooks) for module in modules)

    kernels = TritonEngine(SMALL)
    with calibrated(model, make_artifact(model, HEADS), engine=kernels):
        model(input_ids=tokens)  # without a cache to know
        assert hooks() == 3
        first, _ = decode(model, tokens, mask, DynamicCache())
        assert hooks() == 0
        second, _ = decode(model, tokens, mask, None)  # the decoder makes one: layers tell it
        assert hooks() == 0
        model(input_ids=tokens)
        assert hooks() == 3
        third, _ = decode(model, tokens, mask, DynamicCache())
        model(input_ids=tokens, past_key_values=DynamicCache(), use_cache=False)
        assert hooks() == 3
    assert hooks() == 0
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.slow
def test_layers_that_get_another_cache_go_on_telling_it(tiny, make_artifact, tokens):
    model = tiny(dtype=torch.float32).to(DEVICE)
    mask = torch.ones_like(tokens)
    artifact = make_artifact(model, HEADS)
    with calibrated(model, artifact, engine=TritonEngine(SMALL)):
        exact, _ = decode(model, tokens, mask, DynamicCache())
    copies = {}

    def exchange(module, args, kwargs):
        name = cache_argument(module.forward)
        given = kwargs[name]
        kwargs[name] = copies.setdefault(id(given), copy.copy(given))
        return args, kwargs

    module = model.model.layers[1].self_attn
    handle = module.register_forward_pre_hook(exchange, with_kwargs=True)
    with calibrated(model, artifact, engine=TritonEngine(SMALL)):
        copies.clear()
        found, _ = decode(model, tokens, mask, DynamicCache())
        assert len(module._forward_pre_hooks) == 2
    handle.remove()
    assert torch.equal(found, exact)


@pytest.mark.slow
def test_states_are_checked_layer_by_layer(tiny, make_artifact, tokens):
    model = tiny(dtype=torch.float32).to(DEVICE)
    mask = torch.ones_like(tokens)
    new = tokens[:, :1]
    longer = torch.cat([mask, mask[:, :1]], dim=1)
    with calibrated(model, make_artifact(model, HEADS), engine=TritonEngine(SMALL)):
        _, cache = decode(model, tokens, mask, DynamicCache())
        picked = select_cache(cache, torch.tensor([1, 0]))
        expected = model(input_ids=new, attention_mask=longer, past_key_values=cache).logits
        found = model(input_ids=new[[1, 0]], attention_mask=longer, past_key_values=picked).logits
        torch.testing.assert_close(found, expected[[1, 0]], atol=1e-5, rtol=1e-5)
        del picked.__dict__["_act_harness_states"][1]
        longer = torch.cat([longer, mask[:, :1]], dim=1)
        with pytest.raises(UnsupportedCallError, match="not computed under this calibration"):
            model(input_ids=new, attention_mask=longer, past_key_values=picked)
