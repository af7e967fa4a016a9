"""Models under `patch` whose attention classes ask no interface: Bloom, MPT and Falcon, with ALiBi
as they compute it.
"""

import copy
import io

import pytest
import torch
import transformers

from sparse_attn import patch, selectors, unpatch
from sparse_attn.hf.key_mask import KeyMask

from .hf_models import (
    SPARSE,
    VOCAB,
    assert_close,
    assert_same_generation,
    logits,
    oracle_mask,
    tokens,
)
from .test_hf_padding import PADDED, in_chunks

pytestmark = pytest.mark.filterwarnings("ignore:backend='auto'")
SPECIAL = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "vocab_size": VOCAB}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ONE_KV_HEAD = {"multi_query": True, "parallel_attn": True}
EACH_ITS_OWN = {"multi_query": False, "parallel_attn": False}
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
MODELS = {
    "bloom": ("Bloom", BLOOM),
    "bloom_three_heads": ("Bloom", {**BLOOM, "hidden_size": 24, "n_head": 3}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "mpt_three_heads": (
        "Mpt",
        {
            "d_model": 24,
            "n_layers": 2,
            "n_heads": 3,
            "max_seq_len": 64,
            "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.7},
        },
    ),
    "falcon_alibi": ("Falcon", {**FALCON, **EACH_ITS_OWN, "alibi": True}),
    "falcon_alibi_one_kv_head": ("Falcon", {**FALCON, **ONE_KV_HEAD, "alibi": True}),
    "falcon_rotary": ("Falcon", {**FALCON, **ONE_KV_HEAD, "alibi": False}),
    "falcon_rotary_new": ("Falcon", {**FALCON, **NEW, "alibi": False}),
}
ONE_LAYER = {"bloom": {"n_layer": 1}, "mpt": {"n_layers": 1}}
ONE_LAYER["falcon_alibi"] = {"num_hidden_layers": 1}
EVERYTHING = selectors.SlidingWindow(window=1000)


def own_model(name, **more):
    prefix, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, prefix + "Config")(**options | SPECIAL | more)
    model = getattr(transformers, prefix + "ForCausalLM")(config).eval()
    with torch.no_grad():  # the default initialisation makes attention all but uniform
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(params=MODELS)
def model(request):
    return own_model(request.param)


@pytest.mark.parametrize("selector", [selectors.Dense(), EVERYTHING], ids=["dense", "everything"])
def test_all_rows_are_what_the_model_computed(model, selector):
    ids = tokens(batch=len(PADDED))
    for more in ({}, {"attention_mask": PADDED}):
        expected = logits(model, ids, use_cache=False, **more)
        with patch(model, selector) as patched:
            actual = logits(model, ids, use_cache=False, **more)
        assert sum(patched.stats.values()) == 2
        assert_close(actual, expected)
        assert torch.equal(logits(model, ids, use_cache=False, **more), expected)  # as before


def test_a_mask_cast_to_bool_is_itself_on_the_device_that_is_asked_for():
    mask = torch.zeros(1, 1, 1, 4, dtype=torch.int64).as_subclass(KeyMask)
    assert mask.to(torch.bool) is mask and mask.to(dtype=torch.bool) is mask
    for moved in (mask.to("meta", torch.bool), mask.to(device="meta", dtype=torch.bool)):
        assert moved.device.type == "meta" and moved.dtype == torch.int64


def test_calls_small_enough_for_torch_keep_their_bias(monkeypatch, model):
    monkeypatch.undo()
    ids = tokens()
    expected = logits(model, ids, use_cache=False)
    with patch(model, selectors.Dense()):
        assert_close(logits(model, ids, use_cache=False), expected)


@pytest.mark.parametrize("selector", [selectors.Dense(), EVERYTHING], ids=["dense", "everything"])
def test_all_rows_of_chunks_are_what_the_model_computed(model, selector):
    ids, ends = tokens(batch=len(PADDED)), (9, 10, 16, 17, 19)
    expected = in_chunks(model, ids, PADDED, transformers.DynamicCache(), ends)
    with patch(model, selector):
        actual = in_chunks(model, ids, PADDED, transformers.DynamicCache(), ends)
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_a_static_cache(name):
    model, ids = own_model(name), tokens()

    def run():
        cache = transformers.StaticCache(config=model.config, max_cache_len=24)
        steps = (slice(0, 12), slice(12, 18), slice(18, 19))
        return torch.cat([logits(model, ids[:, x], past_key_values=cache) for x in steps], 1)

    expected = run()
    with patch(model, selectors.Dense()):
        assert_close(run(), expected)


def test_generate(model):
    ids = tokens(batch=2)
    assert_same_generation(model, ids, PADDED[[0, 3]])
    assert_same_generation(model, ids, PADDED[:2], EVERYTHING, num_beams=2)


def with_literal_mask(model, mask):
    """The model with a mask of its own in place of the causal one."""
    name = type(model).__module__
    module = __import__(name, fromlist=["create_causal_mask"])
    before = module.create_causal_mask
    lowest = torch.finfo(torch.float32).min
    sdpa = model.config.model_type == "falcon"

    def literal(**_):
        return mask if sdpa else torch.zeros(mask.shape).masked_fill(~mask, lowest)

    def run(ids, **inputs):
        module.create_causal_mask = literal
        try:
            return model(input_ids=ids, **inputs).logits
        finally:
            module.create_causal_mask = before

    return run


def test_a_selector_is_the_literal_mask(model):
    ids, mask = tokens(batch=len(PADDED)), PADDED
    literal = with_literal_mask(model, oracle_mask(mask))
    with torch.no_grad():
        expected = literal(ids, attention_mask=mask, use_cache=False)
        dense = model(ids, attention_mask=mask, use_cache=False).logits
    with patch(model, SPARSE) as patched:
        actual = logits(model, ids, attention_mask=mask, use_cache=False)
    assert patched.stats == {"sparse": 2}
    assert_close(actual, expected, where=mask)
    assert (actual - dense)[mask.bool()].abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gradients(model, checkpointing):
    ids, mask = tokens(), PADDED[[0, 3]]
    literal = with_literal_mask(model, oracle_mask(mask))
    model.train()
    for part in model.modules():  # attention is to be random in nothing
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0

    def gradients(run):
        model.zero_grad()
        out = run(ids, attention_mask=mask, use_cache=False)
        (out * mask[..., None]).square().mean().backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    def plain(ids, **inputs):
        return model(input_ids=ids, **inputs).logits

    expected = [gradients(plain), gradients(literal)]
    if checkpointing:
        model.gradient_checkpointing_enable()
    for selector, own in zip((selectors.Dense(), SPARSE), expected, strict=True):
        with patch(model, selector):
            found = gradients(plain)
        for ours, theirs in zip(found, own, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi"])
def test_attention_dropout_is_refused_with_a_selector_alone(name):
    model = own_model(name, attention_dropout=0.5).train()
    with patch(model, SPARSE), pytest.raises(ValueError, match=r"attention dropout 0\.5"):
        model(tokens())
    with patch(model, selectors.Dense()):
        torch.manual_seed(0)
        first = model(tokens()).logits
        torch.manual_seed(1)
        assert not torch.equal(model(tokens()).logits, first)


def test_copies_and_pickles_are_patched_and_can_be_unpatched(model):
    ids = tokens()
    plain = logits(model, ids)
    file = io.BytesIO()
    with patch(model, SPARSE):
        expected = logits(model, ids)
        copied = copy.deepcopy(model)
        torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(model, ids), plain)
    for other in (copied, torch.load(file, weights_only=False)):
        assert torch.equal(logits(other, ids), expected)
        unpatch(other)
        assert torch.equal(logits(other, ids), plain)


def test_weights_are_refused(model):
    with patch(model, SPARSE), pytest.raises(ValueError, match="output_attentions"):
        model(tokens(), output_attentions=True)


def test_a_layer_of_the_dict_and_excluded_layers(model):
    ids = tokens()
    with patch(model, {1: SPARSE}) as patched:
        logits(model, ids)
    assert patched.stats == {"dense": 1, "sparse": 1}
    with patch(model, SPARSE, exclude_layers=[0, 1]) as patched:
        assert_close(logits(model, ids), logits(own_model_like(model), ids))
    assert patched.stats == {"dense": 2}


def own_model_like(model):
    other = copy.deepcopy(model)
    unpatch(other)
    return other


def test_a_model_with_the_config_of_a_patched_one_is_refused():
    model = own_model("bloom")
    with patch(model, SPARSE):
        other = transformers.BloomForCausalLM(model.config).eval()
        with pytest.raises(ValueError, match="a layer outside the patched model"):
            other(tokens())


def test_falcon_that_adds_alibi_twice_is_refused():
    model = own_model("falcon_alibi", attn_implementation="eager")
    with pytest.raises(ValueError, match=r"FalconForCausalLM.*adds ALiBi twice with 'eager'"):
        patch(model, selectors.Dense())
    rotary = own_model("falcon_rotary", attn_implementation="eager")
    ids = tokens(batch=len(PADDED))
    expected = logits(rotary, ids, attention_mask=PADDED)
    with patch(rotary, selectors.Dense()):
        assert_close(logits(rotary, ids, attention_mask=PADDED), expected)


def test_bloom_that_sums_in_slices_is_refused():
    model = own_model("bloom", pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(ValueError, match="slow_but_exact"):
        patch(model, selectors.Dense())


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon_alibi"])
def test_compiled_code_with_dense(name):
    model = own_model(name, **ONE_LAYER[name])
    ids = tokens()
    expected = logits(model, ids, use_cache=False)
    with patch(model, selectors.Dense()):
        compiled = torch.compile(model, backend="eager")
        assert_close(logits(compiled, ids, use_cache=False), expected)
