"""The life of an attachment: nested, copied, lost, and gone without a trace."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

import act_harness
from act_harness.attention import attach, calibrated, prepare
from act_harness.attention.interface import BINDING
from act_harness.bench.families import build_tiny
from act_harness.errors import UnsupportedCallError, UnsupportedModelError

PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 33, 60, 12, 7, 29, 54]])
FIRST, SECOND = {0: (0, 1)}, {1: (2,), 2: (3,)}


def logits(model, ids=PROMPT, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def generated(model, ids=PROMPT, **more):
    return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **more)


def traces(model):
    """Everything about a model object that attaching could leave changed."""
    return {
        "attributes": set(model.__dict__),
        "of modules": {n: frozenset(m.__dict__) for n, m in model.named_modules()},
        "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()),
        "always": sum(len(m._forward_hooks_always_called) for m in model.modules()),
        "kernel": model.config._attn_implementation,
        "generate": model.generate,
    }


@pytest.fixture
def arms(tiny, make_artifact):
    """A model, two artifacts, and the logits of each arm on objects of their own."""
    model = tiny()
    artifacts = [None, make_artifact(model, heads=FIRST), make_artifact(model, heads=SECOND)]
    alone = []
    for artifact in artifacts:
        fresh = tiny()
        with calibrated(fresh, artifact):
            alone.append(logits(fresh))
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[1], alone[2])
    return model, artifacts, alone


@pytest.mark.parametrize("inner", [0, 1, 2])
@pytest.mark.parametrize("outer", [0, 1, 2])
def test_the_inner_block_is_in_force_alone(arms, outer, inner):
    model, artifacts, alone = arms
    before = traces(model)
    with calibrated(model, artifacts[outer]):
        assert torch.equal(logits(model), alone[outer])
        with calibrated(model, artifacts[inner]):
            assert torch.equal(logits(model), alone[inner])
        assert torch.equal(logits(model), alone[outer])
    assert torch.equal(logits(model), alone[0])
    assert traces(model) == before


def test_attachments_may_be_detached_in_any_order(arms):
    model, artifacts, alone = arms
    before = traces(model)
    one, two = attach(model, artifacts[1]), attach(model, artifacts[2])
    one.detach()
    assert torch.equal(logits(model), alone[2])
    two.detach()
    assert traces(model) == before
    one, none, two = attach(model, artifacts[1]), attach(model, None), attach(model, artifacts[2])
    two.detach()
    assert torch.equal(logits(model), alone[0])
    none.detach()
    assert torch.equal(logits(model), alone[1])
    one.detach()
    one.detach()
    assert traces(model) == before


def test_a_nested_baseline_may_do_what_calibration_refuses(arms):
    model, artifacts, _ = arms
    with calibrated(model, artifacts[1]):
        with calibrated(model, None):
            generated(model, num_beams=2)
        with pytest.raises(UnsupportedCallError, match="num_beams"):
            generated(model, num_beams=2)


def test_what_was_attached_and_lost_can_be_taken_off(arms):
    model, artifacts, alone = arms
    before = traces(model)
    act_harness.detach(model)  # a stock model: nothing happens
    for artifact in artifacts:
        attach(model, artifact)  # the handle is thrown away
    act_harness.detach(model)
    assert torch.equal(logits(model), alone[0])
    assert traces(model) == before


def test_a_prepared_attachment_is_off_until_it_is_engaged(arms):
    model, artifacts, alone = arms
    before = traces(model)
    one, two = prepare(model, artifacts[1]), prepare(model, artifacts[2])
    assert traces(model) == before
    for _ in range(2):
        with two.engaged(), two.engaged():
            assert torch.equal(logits(model), alone[2])
        with one.engaged():
            assert torch.equal(logits(model), alone[1])
            with one.suspended():
                assert torch.equal(logits(model), alone[0])
                with two.engaged():
                    assert torch.equal(logits(model), alone[2])
                assert torch.equal(logits(model), alone[0])
            assert torch.equal(logits(model), alone[1])
        assert torch.equal(logits(model), alone[0])
    assert traces(model) == before


def test_a_failed_attachment_leaves_what_was_in_force(arms, make_artifact):
    model, artifacts, alone = arms
    with calibrated(model, artifacts[1]):
        wrong = make_artifact(model, heads={0: (0,)})
        with pytest.raises(RuntimeError, match="mine"), calibrated(model, wrong):
            raise RuntimeError("mine")
        assert torch.equal(logits(model), alone[1])
    assert torch.equal(logits(model), alone[0])


def test_the_users_own_choice_of_a_kernel_outlives_the_block(arms):
    model, artifacts, _ = arms
    with calibrated(model, artifacts[1]):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    with calibrated(model, artifacts[1]) as attachment:
        logits(model)
        assert attachment.calls.calls == {"torch": 1}


def test_a_generate_of_the_object_itself_comes_back(arms):
    model, artifacts, _ = arms

    def own(*args, **kwargs):
        return "mine"

    model.generate = own  # what transformers does for checkpoints with code of their own
    with calibrated(model, artifacts[1]):
        assert model.generate(PROMPT) == "mine"
        with pytest.raises(UnsupportedCallError, match="num_beams"):
            model.generate(PROMPT, num_beams=2)
    assert model.__dict__["generate"] is own


def other_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - its own


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_copy_is_calibrated_with_its_own_weights(arms, tiny, make_artifact, duplicate):
    model, artifacts, alone = arms
    with calibrated(model, artifacts[1]):
        want = generated(model)
        twin = duplicate(model)
        assert torch.equal(logits(twin), alone[1])
        assert torch.equal(generated(twin), want)
        other_weights(twin)
        assert torch.equal(logits(model), alone[1])
        with pytest.raises(UnsupportedCallError, match="num_beams=2"):
            generated(twin, num_beams=2)
        with torch.no_grad():
            cache = model(PROMPT, use_cache=True).past_key_values
        with pytest.raises(UnsupportedCallError, match="not computed under this calibration"):
            logits(twin, PROMPT[:, :1], past_key_values=cache)
    fresh = other_weights(tiny())  # the same weights, calibrated on an object of its own
    with calibrated(fresh, make_artifact(fresh, heads=FIRST)):
        assert torch.equal(logits(twin), logits(fresh))
        assert torch.equal(generated(twin), generated(fresh))
    act_harness.detach(twin)
    assert torch.equal(logits(twin), logits(fresh))
    assert torch.equal(generated(twin), generated(fresh))
    assert twin.config._attn_implementation == "sdpa"
    assert not any(BINDING in module.__dict__ for module in twin.modules())


@pytest.mark.slow
def test_a_pickle_is_calibrated_in_another_process(arms, tmp_path):
    model, artifacts, alone = arms
    path = tmp_path / "model.pickle"
    with calibrated(model, artifacts[1]):
        path.write_bytes(pickle.dumps((model, PROMPT, alone[1])))
    program = (
        "import pickle, sys, torch\n"
        "model, prompt, want = pickle.loads(open(sys.argv[1], 'rb').read())\n"
        "torch.testing.assert_close(model(input_ids=prompt).logits, want, rtol=0, atol=1e-9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)


def test_a_copy_of_a_model_between_blocks_is_stock(arms):
    model, artifacts, alone = arms
    attachment = prepare(model, artifacts[1])
    twin = copy.deepcopy(model)
    with attachment.engaged():
        assert torch.equal(logits(twin), alone[0])
    assert traces(twin).keys() == traces(model).keys()


def test_a_checkpoint_saved_inside_a_block_knows_nothing_of_it(arms, tmp_path):
    model, artifacts, alone = arms
    with calibrated(model, artifacts[1]):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(logits(again), alone[0])
    assert "act_harness" not in (tmp_path / "config.json").read_text()


# -- threads -------------------------------------------------------------------------------------


def in_a_thread(run):
    """What a function returns or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run)


def test_another_thread_waits_for_its_arm(arms):
    model, artifacts, alone = arms
    first, second = (prepare(model, artifact) for artifact in artifacts[1:])

    def run():
        with second.engaged():
            return logits(model)

    with ThreadPoolExecutor(1) as pool:
        with first.engaged():
            other = pool.submit(run)
            assert not wait([other], timeout=0.2).done
            assert torch.equal(logits(model), alone[1])
        assert torch.equal(other.result(timeout=60), alone[2])
    assert torch.equal(logits(model), alone[0])


def test_two_forwards_at_once_are_refused(arms):
    """Each would take the other's mask; the one under way is not harmed."""
    model, artifacts, alone = arms
    found = []

    def interfere(*_):
        hook.remove()
        found.append(in_a_thread(lambda: logits(model, PROMPT[:, 3:])))

    with calibrated(model, artifacts[1]):
        hook = model.model.layers[1].register_forward_pre_hook(interfere)
        assert torch.equal(logits(model), alone[1])
        with pytest.raises(UnsupportedCallError, match="another thread's forward"):
            found[0].result()
        assert torch.equal(in_a_thread(lambda: logits(model)).result(), alone[1])


def test_an_interrupted_forward_is_forgotten(arms):
    model, artifacts, alone = arms

    def interrupt(*_):
        raise KeyboardInterrupt

    with calibrated(model, artifacts[1]):
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(model)
        hook.remove()
        assert torch.equal(logits(model), alone[1])
        assert torch.equal(in_a_thread(lambda: logits(model)).result(), alone[1])


@pytest.mark.parametrize("name", ["attach", "calibrated"])
def test_both_doors_take_what_prepare_takes(tiny, make_artifact, name):
    """As ``help`` shows it; what fits no parameter is refused at the call, positions as well."""
    door = getattr(act_harness, name)
    own, carried = inspect.signature(door), inspect.signature(prepare)
    assert own.parameters == carried.parameters
    assert list(own.parameters) == ["model", "artifact", "tokenizer", "engine", "facts"]
    assert (
        own.return_annotation
        == {"attach": "Attachment", "calibrated": "Iterator[Attachment]"}[name]
    )
    assert door.__name__ == name
    model = tiny()
    artifact = make_artifact(model, FIRST)
    for given, settings in (((), {}), ((artifact, None), {}), ((artifact,), {"engin": "torch"})):
        with pytest.raises(TypeError, match="argument"):
            door(model, *given, **settings)
    assert BINDING not in vars(model.model.layers[0].self_attn)


def test_a_model_that_returns_no_cache_is_refused_in_a_line(make_artifact):
    model = build_tiny("recurrent_gemma")
    with pytest.raises(UnsupportedModelError, match="RecurrentGemmaForCausalLM returns no cache"):
        attach(model, make_artifact(model, {2: (0,)}))
