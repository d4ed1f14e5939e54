"""Calls that would break the calibration are refused in a line; all others keep their contract."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin, StaticCache

from act_harness.attention import calibrated, select_cache
from act_harness.attention.cache import Forward, cache_argument, cache_of, seen_tokens
from act_harness.engines.reference import ReferenceEngine
from act_harness.errors import UnsupportedCallError, UnsupportedModelError
from act_harness.scoring.scorer import Item, Scorer

PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 33, 60, 12, 7, 29, 54]])


def logits(model, ids=PROMPT, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def refused(message, error=UnsupportedCallError):
    return pytest.raises(error, match=message)


@pytest.fixture
def model(tiny):
    return tiny()


@pytest.fixture
def artifact(model, make_artifact):
    return make_artifact(model)


# -- caches by name ------------------------------------------------------------------------------


def _older(input_ids, past_key_values=None, use_cache=None):
    """As transformers' forwards before 5.24."""


def _newer(input_ids, cache=None, use_cache=None, **more):
    """As they are from 5.24 on."""


def _layer(hidden, layer_past=None):
    """As BLOOM's layers in all releases."""


def _wrapper(*args, **kwargs):
    """As peft's, which hands everything on."""


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (_older, "past_key_values"),
        (_newer, "cache"),
        (_layer, "layer_past"),
        (_wrapper, "past_key_values"),  # which the later releases take too
    ],
)
def test_a_cache_is_given_by_the_name_that_a_forward_has_for_it(forward, name):
    assert cache_argument(forward) == name


def test_a_cache_is_found_in_an_output_by_either_name(model):
    cache = DynamicCache()
    assert cache_of({"logits": 1, "cache": cache}) is cache
    assert cache_of({"logits": 1, "past_key_values": cache}) is cache
    assert cache_of({"logits": 1}) is None
    assert cache_of(model(PROMPT, use_cache=True)).get_seq_length() == PROMPT.shape[1]
    assert cache_of(model(PROMPT, use_cache=False)) is None


@pytest.mark.parametrize("kind", ["llama", "mpt", "bloom"])
def test_nothing_of_ours_says_an_old_name(tiny, make_artifact, kind, caplog):
    model = tiny(kind, dtype=torch.float32)
    items = [Item(tuple(range(3, 24)), answer) for answer in ((40, 50, 30), (41, 49))]
    # as it is asked for over a cache, by the probe, the trials and the scorer
    with warnings.catch_warnings(), caplog.at_level("WARNING", "transformers"):
        warnings.filterwarnings("error", ".*past_key_values.*is deprecated")
        with calibrated(model, make_artifact(model)) as attachment:
            scorer = Scorer(model, attachment)
            scorer.score(items)
            assert scorer.work.forwards > 0
    assert "past_key_values" not in caplog.text


# -- generate ------------------------------------------------------------------------------------

REFUSED = [
    ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
    ({"num_beams": 3}, "num_beams=3"),
    ({"use_cache": False}, "use_cache=False"),
    ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
    ({"dola_layers": "high"}, "DoLa"),
    ({"cache_implementation": "static"}, "cache_implementation='static'.*leave it out"),
    ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
    ({"cache_implementation": "paged"}, "continuous batching"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_setting_is_refused_wherever_it_stands(model, artifact, settings, message):
    given = GenerationConfig(max_new_tokens=2, pad_token_id=0)
    plain = copy.deepcopy(given)
    given.update(**settings)
    with calibrated(model, artifact):
        with refused(message) as caught:
            model.generate(PROMPT, given)  # transformers' own second parameter
        assert "\n" not in str(caught.value)
        with refused(message):
            model.generate(PROMPT, generation_config=given)
        with refused(message):
            GenerationMixin.generate(model, PROMPT, given)
        with refused(message):
            type(model).generate(model, PROMPT, max_new_tokens=2, **settings)
        with refused(message):
            model.generate(PROMPT, plain, **settings)
        model.generation_config.update(**settings)
        with refused(message):
            model.generate(PROMPT, max_new_tokens=2)
        with refused(message):  # a field that the given configuration leaves open is the model's
            model.generate(PROMPT, plain)


def test_decoding_loops_from_elsewhere_are_refused(model, artifact, tiny):
    def mine(model, input_ids, **more):
        return input_ids

    with calibrated(model, artifact):
        with refused("custom_generate"):
            model.generate(PROMPT, custom_generate=mine, max_new_tokens=2)
        with refused("custom_generate"):
            model.generate(PROMPT, None, None, None, None, None, None, None, None, None, mine)
        with refused("assistant_model"):
            model.generate(PROMPT, None, None, None, None, None, tiny(seed=1))
        with refused("continuous batching"):
            model.generate_batch([PROMPT[0].tolist()])
        with refused("continuous batching"):
            model.init_continuous_batching()
        with refused("static cache"):
            cache = StaticCache(config=model.config, max_cache_len=40)
            model.generate(PROMPT, past_key_values=cache, max_new_tokens=2, pad_token_id=0)
        with refused("static cache"):  # the name from transformers 5.24 on
            model.generate(PROMPT, cache=cache, max_new_tokens=2, pad_token_id=0)
        with pytest.raises(TypeError):
            model.generate(PROMPT, None, generation_config=None)
    assert torch.equal(model.generate(PROMPT, custom_generate=mine, max_new_tokens=2), PROMPT)


@pytest.mark.parametrize("decode", ["frozen", "running"])
def test_several_returned_sequences_are_each_their_own(model, make_artifact, decode):
    settings = {"max_new_tokens": 5, "pad_token_id": 0, "return_dict_in_generate": True}
    settings |= {"output_scores": True, "temperature": 1.0, "top_k": 0, "do_sample": True}
    with calibrated(model, make_artifact(model, decode=decode)):
        torch.manual_seed(3)
        found = model.generate(PROMPT, num_return_sequences=3, **settings)
        assert len({tuple(row) for row in found.sequences.tolist()}) > 1
        for row, sequence in enumerate(found.sequences):
            with torch.no_grad():
                out = model(PROMPT, use_cache=True)
                for step, token in enumerate(sequence[12:-1]):
                    torch.testing.assert_close(
                        found.scores[step][row].double(), out.logits[0, -1], atol=1e-5, rtol=0
                    )
                    out = model(token[None, None], past_key_values=out.past_key_values)


def test_a_cache_that_was_reordered_is_refused_by_the_forward_itself(model, make_artifact):
    """No guard sees a loop that somebody writes; a beam search by hand reorders the cache."""
    both = torch.cat([PROMPT, PROMPT.flip(1)])
    with calibrated(model, make_artifact(model, decode="running")), torch.no_grad():
        cache = model(both, use_cache=True).past_key_values
        kept = copy.deepcopy(cache)
        want = logits(model, both[:, :1], past_key_values=select_cache(cache, torch.tensor([1, 0])))
        cache.reorder_cache(torch.tensor([1, 0]))
        with refused("reordered.*select_cache"):
            logits(model, both[:, :1], past_key_values=cache)
        direct = logits(model, both.flip(0)[:, :1], past_key_values=kept)
    torch.testing.assert_close(want.flip(0), direct, rtol=0, atol=1e-9)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_a_copied_cache_goes_on_as_the_original(model, make_artifact, duplicate):
    with calibrated(model, make_artifact(model, decode="running")), torch.no_grad():
        cache = model(PROMPT, use_cache=True).past_key_values
        twin = duplicate(cache)
        want = logits(model, PROMPT[:, :3], past_key_values=cache)
        assert torch.equal(logits(model, PROMPT[:, :3], past_key_values=twin), want)
        twin.reorder_cache(torch.tensor([0]))
        with refused("reordered"):
            logits(model, PROMPT[:, :1], past_key_values=twin)


# -- forwards ------------------------------------------------------------------------------------


def test_several_prompts_in_one_row_are_refused(model, artifact):
    """Padding-free batches: taken for one prompt, the second part would be off by whole logits."""
    parts = [PROMPT, PROMPT.flip(1)[:, :7]]
    row = torch.cat(parts, dim=1)
    positions = torch.cat([torch.arange(12), torch.arange(7)])[None]
    apart = torch.cat([logits(model, part) for part in parts], dim=1)
    flat = logits(model, row, position_ids=positions, use_cache=False)
    torch.testing.assert_close(flat, apart, rtol=0, atol=1e-9)  # what stock makes of it
    with calibrated(model, artifact):
        for cached in (False, True):
            with refused("position_ids do not count up") as caught:
                logits(model, row, position_ids=positions, use_cache=cached)
            assert "\n" not in str(caught.value)
        bounds = torch.tensor([0, 12, 19], dtype=torch.int32)
        with refused("cu_seq_lens_q"):
            logits(model, row, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
        with refused("max_length_q"):
            logits(model, row, max_length_q=12)
        want = torch.cat([logits(model, part) for part in parts], dim=1)
        assert float((want - apart).abs().max()) > 1e-3
        padded = torch.cat([PROMPT, torch.cat([torch.zeros(1, 5).long(), parts[1]], 1)])
        mask = torch.ones_like(padded)
        mask[1, :5] = 0
        where = (mask.cumsum(1) - 1).clamp(min=0)  # what is given to pads does not matter
        batch = logits(model, padded, attention_mask=mask, position_ids=where)
    torch.testing.assert_close(batch[0], want[0, :12], rtol=0, atol=1e-9)
    torch.testing.assert_close(batch[1, 5:], want[0, 12:], rtol=0, atol=1e-9)


def forward(rows=3):
    return Forward(1, rows, None, None)


def test_masks_hide_columns_and_do_nothing_else():
    key = torch.zeros(1, 2, 3, 4)
    hidden = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)[None, None]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for low in (float("-inf"), torch.finfo(dtype).min, torch.finfo(dtype).min / 2, -1e4):
            mask = torch.zeros(1, 1, 3, 3, dtype=dtype).masked_fill(hidden, low)
            assert torch.equal(forward().geometry(key, mask, 0, None).mask, ~hidden)
    for bias in (-0.5, 3.0, -100.0, float("nan"), float("inf")):
        mask = torch.zeros(1, 1, 3, 3).masked_fill(hidden, bias)
        with refused("bias to its attention scores", UnsupportedModelError) as caught:
            forward().geometry(key, mask, 0, None)
        assert "\n" not in str(caught.value)
    for dtype in (torch.bool, torch.float32):
        with refused("mask of its own", UnsupportedModelError):
            forward().geometry(key, torch.ones(1, 4, 3, 3, dtype=dtype), 0, None)


@pytest.mark.parametrize("heads", [None, {1: (0, 2)}])
def test_a_learned_bias_in_the_mask_is_refused(tiny, make_artifact, heads):
    """Doge adds a bias that it computes from the values to every head's mask."""
    model = tiny("doge", dtype=torch.float32, keep_window_size=4)
    stock = logits(model)
    with refused("mask", UnsupportedModelError), calibrated(model, make_artifact(model, heads)):
        pass
    assert torch.equal(logits(model), stock)


# -- attention maps and other outputs ------------------------------------------------------------


def outputs(model, **more):
    with torch.no_grad():
        return model(PROMPT, output_attentions=True, output_hidden_states=True, **more)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("heads", [{1: (0, 2)}, {0: (0, 1, 2, 3), 2: (3,)}])
def test_attention_maps_are_those_that_made_the_output(tiny, make_artifact, kind, heads):
    more = {
        "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    }.get(kind, {})
    model = tiny(kind, attn_implementation="eager", **more)
    stock = outputs(model)
    assert len(stock.attentions) == 3
    with calibrated(model, make_artifact(model, heads)) as attachment:
        found = outputs(model)
        plain = logits(model)
    assert attachment.calls.calls["torch"] == 2 * len(heads)
    assert torch.equal(found.logits, plain)
    assert len(found.attentions) == len(stock.attentions)
    assert len(found.hidden_states) == len(stock.hidden_states)
    for one, other in zip(found.hidden_states, stock.hidden_states, strict=True):
        assert one.shape == other.shape
    for layer, (ours, theirs) in enumerate(zip(found.attentions, stock.attentions, strict=True)):
        assert (
            (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) == ((1, 4, 12, 12), ours.dtype)
        )
        torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours.sum(-1)))
        assert (ours >= 0).all()
        assert torch.equal(ours.triu(1), torch.zeros_like(ours))
        if layer == min(heads):  # the layers before it saw the stock model
            same = [torch.allclose(ours[:, n], theirs[:, n], rtol=0, atol=1e-12) for n in range(4)]
            assert all(same[head] for head in range(4) if head not in heads[layer])
            assert not all(same)
        if layer < min(heads):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("decode", ["frozen", "running", "off"])
def test_maps_times_values_are_what_the_engine_computed(tiny, make_artifact, decode):
    """Over a prefill and the steps after it; projected, they are what the layer gives."""
    model = tiny(attn_implementation="eager", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    seen = {}

    def note(module, args, kwargs, output):
        seen["output"], seen["maps"] = output

    handle = attention.register_forward_hook(note, with_kwargs=True)
    with calibrated(model, make_artifact(model, decode=decode)), torch.no_grad():
        cache = DynamicCache()
        for ids in (PROMPT, PROMPT[:, :1], PROMPT[:, 3:6]):
            out = model(ids, past_key_values=cache, output_attentions=True)
            (maps,) = out.attentions
            assert maps.shape == (1, 4, ids.shape[1], cache.get_seq_length())
            values = cache.layers[0].values.repeat_interleave(2, dim=1)
            mixed = (maps @ values).transpose(1, 2).flatten(2)
            torch.testing.assert_close(attention.o_proj(mixed), seen["output"], rtol=0, atol=1e-6)
    handle.remove()


def test_generate_returns_the_maps_of_every_step(tiny, make_artifact):
    model = tiny(attn_implementation="eager")
    settings = {"max_new_tokens": 3, "pad_token_id": 0, "do_sample": False}
    more = {"output_attentions": True, "output_hidden_states": True, "output_logits": True}
    with calibrated(model, make_artifact(model, {1: (0,)})):
        plain = model.generate(PROMPT, **settings)
        found = model.generate(PROMPT, **settings, **more, return_dict_in_generate=True)
    assert torch.equal(found.sequences, plain)
    assert [len(step) for step in found.attentions] == [3, 3, 3]
    for step, maps in enumerate(found.attentions):
        rows = 12 if step == 0 else 1
        assert all(one.shape == (1, 4, rows, 12 + step) for one in maps)
    assert [len(step) for step in found.hidden_states] == [4, 4, 4]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_outputs_have_the_form_that_stock_has(tiny, make_artifact, kernel):
    """The same fields, lengths and shapes, as an object and as a tuple."""

    def form(value):
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.dtype
        if isinstance(value, tuple | list):
            return [form(item) for item in value]
        return type(value)

    model = tiny(attn_implementation=kernel)
    for more in ({}, {"use_cache": False}, {"return_dict": False}, {"output_attentions": False}):
        settings = {"output_attentions": True, "output_hidden_states": True, **more}
        with torch.no_grad():
            stock = model(PROMPT, **settings)
            with calibrated(model, make_artifact(model, {0: (1,), 2: (0, 3)})):
                found = model(PROMPT, **settings)
        if more.get("return_dict") is False:
            assert isinstance(found, tuple)
            assert form(found) == form(stock)
        else:
            assert form(found.to_tuple()) == form(stock.to_tuple())
            assert found.keys() == stock.keys()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_configuration_may_ask_for_maps(tiny, make_artifact, kind):
    more = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128} if kind == "gpt2" else {}
    model = tiny(kind, attn_implementation="eager", **more)
    with calibrated(model, make_artifact(model, {0: (1,), 2: (2, 3)})), torch.no_grad():
        want = model(PROMPT, output_attentions=True).attentions
        model.config._output_attentions = True
        found = model(PROMPT).attentions
        assert not model(PROMPT, output_attentions=False).attentions
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


def test_maps_over_a_static_cache_have_its_length(tiny, make_artifact):
    model = tiny(attn_implementation="eager")
    with torch.no_grad():
        stock = model(
            PROMPT,
            past_key_values=StaticCache(config=model.config, max_cache_len=20),
            output_attentions=True,
        ).attentions
        with calibrated(model, make_artifact(model, {0: (1,)})):
            want = model(PROMPT, output_attentions=True).attentions
            cache = StaticCache(config=model.config, max_cache_len=20)
            found = model(PROMPT, past_key_values=cache, output_attentions=True).attentions
    for one, other, short in zip(found, stock, want, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one[..., :12], short, rtol=0, atol=1e-6)
        assert not one[..., 12:].any()


# -- training, tracing ---------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("decode", ["frozen", "running"])
def test_gradients_flow_through_the_torch_engine(tiny, make_artifact, kernel, decode):
    """They are those of the reference, and of finite differences (norms are in float32)."""
    model = tiny(attn_implementation=kernel)
    weight = model.model.layers[0].self_attn.v_proj.weight
    artifact = make_artifact(model, {0: (0, 2), 1: (1, 2, 3)}, decode=decode)

    def loss():
        out = model(PROMPT, use_cache=False).logits.log_softmax(-1)
        return out[0, torch.arange(11), PROMPT[0, 1:]].sum()

    found = []
    for engine in ("torch", ReferenceEngine()):
        with calibrated(model, artifact, engine=engine):
            model.zero_grad()
            loss().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-6, atol=1e-9)
    with calibrated(model, artifact), torch.no_grad():
        direction = torch.randn_like(weight)
        ends = []
        for step in (1e-4, -2e-4):
            weight += step * direction
            ends.append(float(loss()))
    slope = (ends[0] - ends[1]) / 2e-4
    name = "model.layers.0.self_attn.v_proj.weight"
    assert slope == pytest.approx(float((found[0][name] * direction).sum()), rel=5e-3)


class Kernels(ReferenceEngine):
    """An engine whose results come out of a kernel, without a gradient."""

    name = "kernels"
    differentiable = False


def test_an_engine_without_gradients_says_so_when_they_are_asked_for(model, artifact):
    with calibrated(model, artifact, engine=Kernels()):
        out = model(PROMPT).logits  # a forward outside no_grad() asks for none yet
        with refused("engine='torch'") as caught:
            out.sum().backward()
    assert "\n" not in str(caught.value)


def test_gradient_checkpointing_and_dropout_are_refused(tiny, make_artifact):
    model = tiny(attention_dropout=0.25)
    with calibrated(model, make_artifact(model, {1: (0,)})):
        calm = logits(model)
        model.train()
        with refused(r"dropout 0.25.*model.eval\(\)"):
            logits(model)
        model.config.attention_dropout = 0.0
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        assert torch.equal(logits(model), calm)
        model.gradient_checkpointing_enable()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with refused("gradient_checkpointing_disable"):
                logits(model)
        model.eval()
        assert torch.equal(logits(model), calm)


def test_traced_models_are_refused_by_name(model, artifact):
    with calibrated(model, artifact), pytest.raises(Exception, match="cannot be traced"):
        torch.export.export(model, (), {"input_ids": PROMPT, "use_cache": False}, strict=False)
    whole = torch.compile(model, fullgraph=True, backend="eager")
    with calibrated(model, artifact), pytest.raises(Exception, match="cannot be traced"):
        logits(whole, use_cache=False)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.slow
def test_a_compiled_model_is_calibrated_where_its_graph_may_break(tiny, make_artifact):
    model = tiny(num_hidden_layers=1)
    artifact = make_artifact(model)
    parts = torch.compile(model, backend="eager")
    with calibrated(parts, artifact) as attachment:  # inside a wrapper it is the model it wraps
        want = logits(model)
        calls = attachment.calls.calls["torch"]
        found = logits(parts)
        assert attachment.calls.calls["torch"] == calls + 1
    torch.testing.assert_close(found, want, rtol=0, atol=1e-9)
    torch._dynamo.reset()


def test_a_layer_that_a_cache_leaves_out_shares_an_earlier_ones_keys():
    """Gemma 3n's last layers before transformers 5.21: they had a cache of minus one token."""
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.ones(1, 2, 7, 4), torch.ones(1, 2, 7, 4), layer)
    assert [seen_tokens(cache, layer, 1) for layer in (0, 1, 2, 5)] == [6, 6, 6, 6]
    assert seen_tokens(DynamicCache(), 3, 0) == 0
