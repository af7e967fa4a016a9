"""Padding under `patch`: with `Dense()` every row is what the model computed, padding too."""

from contextlib import contextmanager

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from sparse_attn import patch, selectors
from sparse_attn.hf import masks

from .hf_models import (
    SIZES,
    SPARSE,
    assert_close,
    assert_same_generation,
    build,
    causal_model,
    logits,
    new_model,
    oracle_mask,
    padding,
    positions_of,
    tokens,
)

# Rows of attention masks: no padding, left, right, holes, newest tokens hidden, nothing to see.
PADDED = torch.tensor(
    [
        [1] * 19,
        [0] * 6 + [1] * 13,
        [1] * 13 + [0] * 6,
        [1] * 4 + [0] * 3 + [1] * 12,
        [1] * 9 + [0] * 3 + [1] * 3 + [0] + [1] * 3,
        [1] * 18 + [0],
        [0] * 3 + [1] * 4 + [0] + [1] * 9 + [0] * 2,
        [0, 1] * 9 + [0],
        [0] * 19,
    ]
)
MODELS = [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gpt2", "eager")]
MODELS += [("mistral", "sdpa"), ("mistral", "eager"), ("gemma3", "sdpa"), ("gemma3", "eager")]
MODELS += [("gemma2", "eager"), ("gpt_oss", "eager"), ("phimoe", "sdpa")]
CACHES = {
    "growing": lambda config: transformers.DynamicCache(config=config),
    "growing_all_kept": lambda config: transformers.DynamicCache(),
    "static": lambda config: transformers.StaticCache(config=config, max_cache_len=24),
}
EVERYTHING = selectors.SlidingWindow(window=1000)


@contextmanager
def before(model, implementation):
    """The model as it ran before the patch: with sdpa or eager attention."""
    former = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(former)


def in_chunks(model, ids, mask, cache, ends, missing=0):
    """Logits of all rows, chunk by chunk; the mask of each lacks the newest `missing` tokens."""
    parts, start = [], 0
    for stop in ends:
        seen = mask[:, : stop - (missing if start else 0)]
        inputs = {"attention_mask": seen, "past_key_values": cache}
        parts.append(logits(model, ids[:, start:stop], **inputs))
        start = stop
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name,implementation", MODELS)
def test_all_rows_are_what_the_model_computed(name, implementation):
    model, ids = causal_model(name), tokens(batch=len(PADDED))
    with before(model, implementation):
        expected = logits(model, ids, attention_mask=PADDED, use_cache=False)
        for selector in (selectors.Dense(), EVERYTHING):
            with patch(model, selector):
                actual = logits(model, ids, attention_mask=PADDED, use_cache=False)
            assert_close(actual, expected)


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name,implementation", MODELS)
def test_all_rows_of_chunks_are_what_the_model_computed(name, implementation, cache, missing):
    model, ids = causal_model(name), tokens(batch=len(PADDED))
    steps = {"ends": (9, 10, 16, 17, 19), "missing": missing}
    with before(model, implementation):
        expected = in_chunks(model, ids, PADDED, CACHES[cache](model.config), **steps)
        for selector in (selectors.Dense(), EVERYTHING):
            with patch(model, selector):
                actual = in_chunks(model, ids, PADDED, CACHES[cache](model.config), **steps)
            assert_close(actual, expected)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_all_rows_of_any_mask_and_chunks(data):
    model = causal_model(data.draw(st.sampled_from(["llama", "mistral", "gpt_oss"])))
    length = data.draw(st.integers(1, 12))
    row = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    mask = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)))
    cuts = data.draw(st.sets(st.integers(1, length))) | {length}
    steps = {"ends": sorted(cuts), "missing": data.draw(st.integers(0, 1))}
    cache = CACHES[data.draw(st.sampled_from(sorted(CACHES)))]
    ids = tokens(batch=len(mask), length=length)
    implementation = "eager" if model.config.model_type == "gpt_oss" else "sdpa"
    with before(model, implementation):
        expected = in_chunks(model, ids, mask, cache(model.config), **steps)
        with patch(model, selectors.Dense()):
            assert_close(in_chunks(model, ids, mask, cache(model.config), **steps), expected)


def test_llama4_chunks_with_hidden_tokens():
    options = {"attention_chunk_size": 6, "no_rope_layers": [1, 0], "num_experts_per_tok": 1}
    options |= {"layer_types": ["chunked_attention", "full_attention"], "intermediate_size_mlp": 32}
    model = build("Llama4Text", "Llama4", "ForCausalLM", SIZES | options | {"num_local_experts": 2})
    ids = tokens(batch=len(PADDED))
    expected = logits(model, ids, attention_mask=PADDED, use_cache=False)
    with patch(model, selectors.Dense()):
        assert_close(logits(model, ids, attention_mask=PADDED, use_cache=False), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_that_see_nothing(dtype, implementation):
    model, ids = new_model().to(dtype), tokens(batch=len(PADDED))
    with before(model, implementation):
        expected = logits(model, ids, attention_mask=PADDED).float()
        with patch(model, selectors.Dense()):
            actual = logits(model, ids, attention_mask=PADDED).float()
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, atol=0.1, rtol=0.1)


ADAPTIVE = selectors.BlockTopK(top_k=1, block_size=4, sink=1, window=2)
SELECTORS = {
    "sink_window": SPARSE,
    "top_k": ADAPTIVE,
    "per_head": selectors.PerHead({(0, 3): selectors.Dense()}, default=ADAPTIVE),
}


@pytest.mark.parametrize("name", ["llama", "llama_mqa", "gpt2"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_under_a_selector_a_hidden_query_stands_behind_the_keys_it_sees(name, selector):
    """Its logits are those of the same token in a decoding step whose own key is hidden."""
    model, ids = causal_model(name), tokens(batch=1)
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    positions = torch.arange(19)[None]
    cache = transformers.DynamicCache(config=model.config)
    with patch(model, SELECTORS[selector]) as patched:
        whole = logits(model, ids, attention_mask=mask, position_ids=positions)
        logits(model, ids[:, :12], past_key_values=cache)
        last = logits(
            model,
            ids[:, 18:],
            past_key_values=cache,
            position_ids=positions[:, 18:],
            attention_mask=torch.tensor([[1] * 12 + [0]]),
        )
        visible = logits(model, ids[:, :12])
    assert set(patched.stats) == {"sparse"}
    assert_close(whole[:, :12], visible)
    assert_close(whole[:, 18:], last)


@pytest.mark.parametrize("selector", SELECTORS)
def test_caches_agree_on_hidden_tokens_under_a_selector(selector):
    model, ids = causal_model("llama"), tokens(batch=len(PADDED))
    steps = {"ends": (9, 10, 16, 17, 19), "missing": 1}
    with patch(model, SELECTORS[selector]):
        growing, static = (
            in_chunks(model, ids, PADDED, CACHES[name](model.config), **steps)
            for name in ("growing", "static")
        )
    assert growing.isfinite().all()
    assert_close(growing, static)


def test_gradients_flow_through_hidden_rows():
    model, ids = new_model(), tokens(batch=len(PADDED))

    def gradient():
        model.zero_grad()
        model(ids, attention_mask=PADDED, use_cache=False).logits.square().mean().backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    expected = gradient()
    for selector in (selectors.Dense(), EVERYTHING):
        with patch(model, selector):
            torch.testing.assert_close(gradient(), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss", "mistral", "gpt2"])
def test_masks_with_holes(name):
    model, ids = causal_model(name), tokens(batch=3)
    mask = padding(ids, left=(3, 0, 0))
    mask[0, 8:11] = mask[2, 5] = 0
    expected = logits(model, ids, attention_mask=mask)
    with patch(model, selectors.Dense()):
        assert_close(logits(model, ids, attention_mask=mask), expected, where=mask)
    assert_same_generation(model, ids, mask)


def test_sparse_with_holes_closes_them():
    model, ids = causal_model("llama"), tokens()
    mask = padding(ids)
    mask[0, 6:9] = 0
    positions = positions_of(mask)
    expected = logits(model, ids, attention_mask=oracle_mask(mask), position_ids=positions)
    with patch(model, SPARSE):
        actual = logits(model, ids, attention_mask=mask, position_ids=positions)
    assert_close(actual, expected, where=mask)
    assert actual.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_selector_that_reads_q_and_k_sees_no_padding(side):
    model, ids = causal_model("llama"), tokens()
    mask = padding(ids, **{side: (0, 6)})
    top_k = selectors.BlockTopK(top_k=1, block_size=4, sink=1, window=2)
    with patch(model, top_k) as patched:
        together = logits(model, ids, attention_mask=mask, position_ids=positions_of(mask))
        alone = [logits(model, row[seen][None]) for row, seen in zip(ids, mask.bool(), strict=True)]
    assert set(patched.stats) == {"sparse"}
    for row, seen, expected in zip(together, mask.bool(), alone, strict=True):
        assert_close(row[seen], expected[0])
    assert not torch.allclose(alone[0], logits(model, ids[:1]), atol=1e-3)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(
    "q_offset,kv_offset,q_length,kv_length",
    [
        (0, 0, 7, 7),
        (0, 0, 7, 12),
        (5, 0, 3, 8),
        (5, 2, 3, 9),
        (6, 0, 1, 7),
        (6, 0, 1, 12),
    ],
)
def test_key_masks_say_what_sdpa_masks_say(window, q_offset, kv_offset, q_length, kv_length):
    mask = padding(torch.ones(3, q_offset + q_length), left=(0, 2, 0)).bool()
    mask[2, 4] = False
    given = {
        "batch_size": 3,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": sliding_window_causal_mask_function(window)
        if window
        else causal_mask_function,
        "attention_mask": mask,
    }
    encoded = masks.mask_function(**given)
    assert masks.is_key_mask(encoded) and encoded.shape == (3, 1, 1, kv_length)
    expected = sdpa_mask(**given, allow_is_causal_skip=False)
    actual = masks.to_dense(encoded, q_length, kv_length, window, torch.device("cpu"))
    assert torch.equal(actual, expected)
    assert masks.read(encoded, 3, q_length, kv_length).window == window
