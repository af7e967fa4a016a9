"""The smoke tests of `patch` that `make test-versions` runs under the oldest and newest packages.

They name no detail of one release of transformers: logits and tokens against the model's own.
"""

import copy

import pytest
import torch
import transformers

from sparse_attn import patch, selectors, unpatch

from .hf_models import (
    SPARSE,
    assert_close,
    assert_same_generation,
    build,
    causal_model,
    generate,
    logits,
    new_model,
    oracle_mask,
    packed_positions,
    padding,
    positions_of,
    tokens,
)

MODELS = ["llama", "gemma3", "gpt_oss", "gpt2"]


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
@pytest.mark.parametrize("name", MODELS)
def test_dense_is_the_model_itself(name, how):
    model, ids = causal_model(name), tokens()
    mask = padding(ids, left=(6, 0), right=(0, 3))
    expected = logits(model, ids, attention_mask=mask)
    with patch(model, selectors.Dense()):
        assert_close(logits(model, ids, attention_mask=mask), expected)
    assert_same_generation(model, ids, padding(ids, left=(6, 0)), **how)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_selector_sees_its_keys_and_no_others(name):
    model, ids = causal_model(name), tokens()
    mask = padding(ids, left=(5, 0))
    positions = positions_of(mask)
    expected = logits(model, ids, attention_mask=oracle_mask(mask), position_ids=positions)
    with patch(model, SPARSE):
        actual = logits(model, ids, attention_mask=mask, position_ids=positions)
        growing = generate(model, ids, mask)
        static = generate(model, ids, mask, cache_implementation="static")
    assert_close(actual, expected, where=mask)
    assert torch.equal(growing.sequences, static.sequences)
    for one, other in zip(growing.logits, static.logits, strict=True):
        assert_close(one, other)


def test_packed_sequences():
    model, ids = causal_model("llama"), tokens(batch=1)
    ends = torch.tensor([0, 4, 13, 19], dtype=torch.int32)
    with patch(model, SPARSE):
        alone = [logits(model, part, use_cache=False) for part in ids.split([4, 9, 6], dim=1)]
        for more in ({"use_cache": False}, {"cu_seq_lens_q": ends}):
            packed = logits(model, ids, position_ids=packed_positions(4, 9, 6), **more)
            assert_close(packed, torch.cat(alone, dim=1))


def test_training():
    model, ids = new_model().train(), tokens()

    def gradient():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    expected = gradient()
    with patch(model, selectors.SlidingWindow(window=1000)) as patched:
        torch.testing.assert_close(gradient(), expected, atol=1e-5, rtol=1e-3)
    assert patched.stats["sparse"] == 2


def test_copies_and_removal():
    model, ids = new_model(), tokens()
    expected = logits(model, ids)
    with patch(model, SPARSE):
        copied = copy.deepcopy(model)
        assert_close(logits(copied, ids), logits(model, ids))
    unpatch(copied)
    for one in (model, copied):
        assert one.config._attn_implementation == "sdpa"
        assert torch.equal(logits(one, ids), expected)


def test_models_that_cannot_be_served_are_refused():
    options = {"vocab_size": 61, "d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1}
    model = transformers.T5EncoderModel(transformers.T5Config(**options, num_heads=4))
    with pytest.raises(ValueError, match="T5EncoderModel"):
        patch(model, selectors.Dense())


def test_encoders_stay_dense():
    options = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32}
    options |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    model, ids = build("Bert", "Bert", "Model", options), tokens()
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        with pytest.warns(UserWarning, match="BertModel"), patch(model, SPARSE):
            assert_close(model(ids).last_hidden_state, expected)
