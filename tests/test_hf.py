"""`patch` on tiny random models, against transformers' own attention.

The oracle of a sparse patch is the same model under eager or sdpa attention with the selected keys
written out as a 4-D mask.
"""

import pytest
import torch
import transformers

from sparse_attn import patch, selectors

from .hf_models import (
    BART,
    CAUSAL,
    SIZES,
    SPARSE,
    additive,
    assert_close,
    assert_same_generation,
    build,
    causal_model,
    generate,
    logits,
    new_model,
    oracle_mask,
    padding,
    positions_of,
    tokens,
    window_mask,
)


@pytest.mark.parametrize("how", ["dynamic", "static", "beams"])
@pytest.mark.parametrize("name", CAUSAL)
def test_dense_generates_the_same(name, how):
    options = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "beams": {"num_beams": 2},
    }[how]
    ids = tokens()
    patched = assert_same_generation(causal_model(name), ids, padding(ids, left=(6, 0)), **options)
    assert set(patched.stats) == CAUSAL[name][2]


@pytest.mark.parametrize("rows", [1, 19])
def test_small_dense_calls_are_torchs(monkeypatch, rows):
    model, ids = causal_model("llama"), tokens()[:, :rows]
    model.set_attn_implementation("sdpa")
    with patch(model, selectors.Dense()):
        by_kernels = logits(model, ids)
    monkeypatch.undo()
    expected = logits(model, ids)
    with patch(model, selectors.Dense()):
        assert torch.equal(logits(model, ids), expected)
    with patch(model, selectors.Dense(), backend="cpu"):
        assert torch.equal(logits(model, ids), by_kernels)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt_oss"])
@pytest.mark.parametrize("sliding_cache", [True, False])
def test_chunked_prefill(name, sliding_cache):
    model, ids = causal_model(name), tokens()
    mask = padding(ids, left=(4, 0))
    positions = positions_of(mask)
    expected = logits(model, ids, attention_mask=mask, position_ids=positions)
    cache = transformers.DynamicCache(config=model.config if sliding_cache else None)
    parts = []
    with patch(model, selectors.Dense()):
        for start, stop in ((0, 7), (7, 8), (8, 17), (17, 19)):
            step = {"position_ids": positions[:, start:stop], "past_key_values": cache}
            parts.append(logits(model, ids[:, start:stop], attention_mask=mask[:, :stop], **step))
    assert_close(torch.cat(parts, dim=1), expected, where=mask)


def test_llama4_chunks_are_the_models_own():
    options = {"attention_chunk_size": 6, "no_rope_layers": [1, 0], "num_experts_per_tok": 1}
    options |= {"layer_types": ["chunked_attention", "full_attention"], "intermediate_size_mlp": 32}
    model = build("Llama4Text", "Llama4", "ForCausalLM", SIZES | options | {"num_local_experts": 2})
    ids = tokens()
    everything = selectors.SlidingWindow(window=1000)
    for mask in (padding(ids), padding(ids, left=(4, 0))):
        patched = assert_same_generation(model, ids, mask, everything)
        assert patched.stats["window"] == patched.stats["sparse"] > 0


def test_bert_stays_dense():
    options = {key: SIZES[key] for key in list(SIZES)[:5]}
    model = build("Bert", "Bert", "Model", options)
    ids = tokens()
    mask = padding(ids, right=(0, 6))
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        with patch(model, selectors.SlidingWindow(window=2)) as patched:
            actual = model(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(actual, expected)
    assert dict(patched.stats) == {"not_causal": 2}


@pytest.mark.parametrize("beams", [1, 2])
def test_bart_is_sparse_in_the_decoder_only(beams):
    model = build("Bart", "Bart", "ForConditionalGeneration", BART)
    ids = tokens()
    everything = selectors.SlidingWindow(window=1000)
    patched = assert_same_generation(
        model, ids, padding(ids, right=(0, 6)), everything, num_beams=beams
    )
    assert set(patched.stats) == {"sparse", "not_causal"}


def test_bart_decoder_under_a_selector():
    model, ids = build("Bart", "Bart", "ForConditionalGeneration", BART), tokens()
    inputs = {"attention_mask": padding(ids, right=(0, 6)), "decoder_input_ids": ids}
    oracle = additive(oracle_mask(padding(ids)))
    expected = logits(model, ids, **inputs, decoder_attention_mask=oracle)
    with patch(model, SPARSE):
        assert_close(logits(model, ids, **inputs), expected)


def test_a_decoder_told_to_be_causal_by_its_mask_alone():
    options = {key: value for key, value in BART.items() if not key.startswith("forced")}
    model = build("BigBirdPegasus", "BigBirdPegasus", "ForCausalLM", options)
    ids = tokens()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with patch(model, selectors.Dense()) as patched:
            assert_close(model(input_ids=ids).logits, expected)
    assert patched.stats["dense"] == 2


def test_a_model_that_reads_additive_masks_itself():
    options = {**BART, "num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 4}
    model = build("NllbMoe", "NllbMoe", "ForConditionalGeneration", options)
    ids = tokens()
    mask = padding(ids, left=(5, 0))
    inputs = {"attention_mask": mask, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    expected = logits(model, ids, **inputs)
    with patch(model, selectors.Dense()):
        assert_close(logits(model, ids, **inputs), expected, where=mask)
    options["decoder_sparse_step"] = 1
    model = build("NllbMoe", "NllbMoe", "ForConditionalGeneration", options)
    with patch(model, selectors.Dense()), pytest.raises(ValueError, match="computes with the"):
        model(ids, **inputs)


def test_torch_compile():
    model, ids = new_model(), tokens()
    for selector, oracle in (
        (selectors.Dense(), window_mask(19, 0, 19)),
        (selectors.SinkWindow(sink=2, window=4), window_mask(19, 2, 4)),
    ):
        expected = logits(model, ids, attention_mask=oracle[None, None].expand(2, 1, -1, -1))
        with patch(model, selector):
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert_close(logits(compiled, ids, use_cache=True), expected)
        torch._dynamo.reset()


def test_compiled_models_keep_padding_and_windows():
    model, ids = new_model("mistral"), tokens()
    mask = padding(ids, left=(4, 0))
    expected = logits(model, ids, attention_mask=mask, use_cache=False)
    with patch(model, selectors.Dense()):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        actual = logits(compiled, ids, attention_mask=mask, use_cache=False)
    torch._dynamo.reset()
    assert_close(actual, expected, where=mask)


@pytest.mark.parametrize("name", ["llama", "llama_mqa", "qwen2", "gpt2"])
@pytest.mark.parametrize("left,right", [((0, 0), ()), ((5, 0), ()), ((), (0, 6))])
def test_sparse_prefill_and_decode(name, left, right):
    model, ids = causal_model(name), tokens()
    mask = padding(ids, left, right)
    positions = positions_of(mask)
    expected = logits(model, ids, attention_mask=oracle_mask(mask), position_ids=positions)
    assert not torch.allclose(expected, logits(model, ids, position_ids=positions), atol=1e-2)
    with patch(model, SPARSE) as patched:
        whole = logits(model, ids, attention_mask=mask, position_ids=positions)
        cache, steps = transformers.DynamicCache(config=model.config), []
        for start, stop in ((0, 9), *((i, i + 1) for i in range(9, 19))):
            step = {"position_ids": positions[:, start:stop], "past_key_values": cache}
            steps.append(logits(model, ids[:, start:stop], attention_mask=mask[:, :stop], **step))
    assert set(patched.stats) == {"sparse"}
    assert_close(whole, expected, where=mask)
    assert_close(torch.cat(steps, dim=1), expected, where=mask)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gemma3"])
def test_sparse_replaces_full_layers_and_keeps_windows(name):
    model, ids = causal_model(name), tokens()
    mask = padding(ids, left=(4, 0))
    own = oracle_mask(mask, sink=0, window=5)
    oracle = {
        "full_attention": additive(oracle_mask(mask)),
        "sliding_attention": additive(own),
    }
    positions = positions_of(mask)
    expected = logits(model, ids, attention_mask=oracle, position_ids=positions)
    with patch(model, SPARSE) as patched:
        actual = logits(model, ids, attention_mask=mask, position_ids=positions)
    assert dict(patched.stats) == {"window": 1, "sparse": 1}
    assert_close(actual, expected, where=mask)


def test_sparse_static_cache_and_beams():
    model, ids = causal_model("llama"), tokens()
    mask = padding(ids, left=(5, 0))
    with patch(model, SPARSE):
        expected = generate(model, ids, mask)
        static = generate(model, ids, mask, cache_implementation="static")
        beams = generate(model, ids, mask, num_beams=2, length_penalty=1.0, output_scores=True)
    assert torch.equal(static.sequences, expected.sequences)
    for ours, theirs in zip(static.logits, expected.logits, strict=True):
        assert_close(ours, theirs)
    full = padding(beams.sequences, left=(5, 0))
    inputs = {"attention_mask": oracle_mask(full), "position_ids": positions_of(full)}
    likelihood = logits(model, beams.sequences, **inputs).log_softmax(-1)
    picked = beams.sequences[:, ids.shape[1] :, None]
    likelihood = likelihood[:, ids.shape[1] - 1 : -1].gather(2, picked).mean(dim=(1, 2))
    assert_close(beams.sequences_scores, likelihood)


def test_layers_can_be_excluded_or_chosen_by_a_dict():
    model, ids = causal_model("llama"), tokens()
    with patch(model, SPARSE, exclude_layers=[1]) as patched:
        excluded = logits(model, ids)
        assert dict(patched.stats) == {"sparse": 1, "dense": 1}
    with patch(model, {0: SPARSE}):
        chosen = logits(model, ids)
    with patch(model, SPARSE, exclude_layers=range(2)):
        none_left = logits(model, ids)
    assert torch.equal(excluded, chosen)
    assert_close(none_left, logits(model, ids))
    assert not torch.allclose(chosen, none_left, atol=1e-3)


def gradients(model, ids, mask, attention_mask):
    """Of the loss on tokens that `mask` keeps, except those predicted from padding."""
    model.zero_grad()
    inputs = {"attention_mask": attention_mask, "position_ids": positions_of(mask)}
    labels = ids.masked_fill(mask * mask.roll(1, dims=1) == 0, -100)
    model(input_ids=ids, labels=labels, use_cache=False, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_dense_gradients(name):
    model, ids = causal_model(name), tokens()
    mask = padding(ids, left=(4, 0))
    expected = gradients(model, ids, mask, mask)
    with patch(model, selectors.Dense()):
        assert_same_gradients(gradients(model, ids, mask, mask), expected)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_sparse_gradients_with_checkpointing(reentrant):
    model, ids = new_model(), tokens()
    mask = padding(ids, left=(5, 0))
    expected = gradients(model, ids, mask, oracle_mask(mask))
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with patch(model, SPARSE) as patched:
        assert_same_gradients(gradients(model, ids, mask, mask), expected)
    assert patched.stats["sparse"] == (2 if reentrant is None else 4)


def test_dropout_is_served_for_dense_only():
    model, ids = new_model(attention_dropout=0.5).train(), tokens()
    mask = padding(ids, left=(5, 0))
    with patch(model, selectors.Dense()):
        torch.manual_seed(0)
        first = logits(model, ids, attention_mask=mask)
        assert not torch.allclose(first, logits(model, ids, attention_mask=mask), atol=1e-3)
    with patch(model, SPARSE), pytest.raises(ValueError, match=r"dropout 0\.5.*layer 0"):
        model(ids)
