"""`patch` on tiny random transformers models, against transformers' own attention.

The oracle of a sparse patch is the same model under eager or sdpa attention with the selected keys
written out as a 4-D mask.
"""

import copy
from functools import lru_cache

import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from sparse_attn import selectors
from sparse_attn.hf import Patch, masks, patch
from sparse_attn.hf.forward import attention_forward

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = {"sliding_window": 5}
ALTERNATING = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
}

# class prefix, config beyond SIZES, kinds of calls it makes
CAUSAL = {
    "llama": ("Llama", {}, {"dense"}),
    "llama_mqa": ("Llama", {"num_key_value_heads": 1}, {"dense"}),
    "qwen2": ("Qwen2", {}, {"dense"}),
    "mistral": ("Mistral", WINDOW, {"window"}),
    "gemma2": ("Gemma2", {**ALTERNATING, "attn_logit_softcapping": 2.0}, {"window", "dense"}),
    "gemma3": ("Gemma3", ALTERNATING, {"window", "dense"}),
    "gpt_oss": ("GptOss", {**ALTERNATING, **MOE}, {"window", "dense"}),
    "phimoe": ("Phimoe", {**WINDOW, **MOE}, {"window"}),  # its layers do not pass the window on
    "gpt2": ("GPT2", GPT2, {"dense"}),
}


@lru_cache
def causal_model(name):
    prefix, more, _ = CAUSAL[name]
    sizes = (
        {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None} if more is GPT2 else SIZES
    )
    return build(
        prefix + ("Text" if prefix == "Gemma3" else ""), prefix, "ForCausalLM", sizes | more
    )


def build(config_prefix, model_prefix, head, options):
    head = "LMHeadModel" if model_prefix == "GPT2" else head
    config = getattr(transformers, config_prefix + "Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, model_prefix + head)(config).eval()
    with torch.no_grad():  # the default initialisation makes attention all but uniform
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def new_model(name="llama", **more):
    prefix, options, _ = CAUSAL[name]
    return build(prefix, prefix, "ForCausalLM", {**SIZES, **options, **more})


def tokens(batch=2, length=19):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(ids, left=(), right=()):
    mask = torch.ones_like(ids)
    for row, count in enumerate(left):
        mask[row, :count] = 0
    for row, count in enumerate(right):
        mask[row, mask.shape[1] - count :] = 0
    return mask


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def window_mask(seqlen, sink, window):
    """The dense causal mask [S, S] of `SinkWindow`, from its definition."""
    i, j = torch.arange(seqlen)[:, None], torch.arange(seqlen)
    return (j <= i) & ((i - j < window) | (j < sink))


SPARSE = selectors.SinkWindow(sink=2, window=4)


def oracle_mask(mask, sink=2, window=4):
    """SPARSE as a bool mask [B, 1, S, S]: each sequence has its own sinks, padding rows see all."""
    batch, seqlen = mask.shape
    dense = torch.zeros(batch, 1, seqlen, seqlen, dtype=torch.bool)
    for row in range(batch):
        valid = mask[row].nonzero().flatten()
        dense[row, 0, valid[:, None], valid] = window_mask(len(valid), sink, window)
        dense[row, 0, mask[row] == 0] = True
    return dense


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def assert_close(actual, expected, where=None):
    if where is not None:
        actual, expected = actual[where.bool()], expected[where.bool()]
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def generate(model, ids, mask, **how):
    with torch.no_grad():
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
            **how,
        )


def assert_same_generation(model, ids, mask, selector=None, **how):
    expected = generate(model, ids, mask, **how)
    with patch(model, selector or selectors.Dense()) as patched:
        actual = generate(model, ids, mask, **how)
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        assert_close(ours, theirs)
    return patched


# --------------------------------------------------------------------------- dense: nothing changes


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


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(
    "left,right", [((), ()), ((3, 0), ()), ((), (0, 6)), ((2, 0, 18), (0, 7, 0))]
)
def test_dense_logits_of_padded_batches(name, left, right):
    model, ids = causal_model(name), tokens(batch=max(1, len(left), len(right)))
    mask = padding(ids, left, right)
    expected = logits(model, ids, attention_mask=mask)
    with patch(model, selectors.Dense()):
        actual = logits(model, ids, attention_mask=mask)
    assert actual.isfinite().all()
    assert_close(actual, expected, where=mask)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss", "mistral", "gpt2"])
def test_masks_with_holes(name):
    model, ids = causal_model(name), tokens(batch=3)
    mask = padding(ids, left=(3, 0, 0))
    mask[0, 8:11] = mask[2, 5] = 0
    expected = logits(model, ids, attention_mask=mask)
    with patch(model, selectors.Dense()):
        assert_close(logits(model, ids, attention_mask=mask), expected, where=mask)
    assert_same_generation(model, ids, mask)


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


def packed_positions(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_packed_sequences(name):
    model, ids = causal_model(name), tokens(batch=1)
    positions = packed_positions(4, 9, 6)
    inputs = {"position_ids": positions, "use_cache": False}
    expected = logits(model, ids, **inputs)
    assert not torch.allclose(expected, logits(model, ids, use_cache=False), atol=1e-3)
    starts = torch.tensor([0, 4, 13, 19], dtype=torch.int32)
    with patch(model, selectors.Dense()):
        assert_close(logits(model, ids, **inputs), expected)
        assert_close(logits(model, ids, **inputs, cu_seq_lens_q=starts), expected)


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


# ------------------------------------------------------------- sparse: the selected keys, no others


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


def test_sparse_packed_sequences():
    model, ids = causal_model("llama"), tokens(batch=1)
    with patch(model, SPARSE):
        packed = logits(model, ids, position_ids=packed_positions(4, 9, 6), use_cache=False)
        alone = [logits(model, part, use_cache=False) for part in ids.split([4, 9, 6], dim=1)]
    assert_close(packed, torch.cat(alone, dim=1))


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


# ----------------------------------------------------------------------------------------- training


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


# ------------------------------------------------------------------------------- putting it on, off


def test_remove_restores_and_is_idempotent():
    model, ids = new_model(), tokens()
    model.set_attn_implementation("eager")
    before = logits(model, ids)
    patched = patch(model, SPARSE)
    assert isinstance(patched, Patch) and patched.active
    assert model.config._attn_implementation == "sparse_attn_eager"
    assert "SinkWindow" in repr(patched)
    patched.remove()
    patched.remove()
    assert not patched.active and "removed" in repr(patched)
    assert model.config._attn_implementation == "eager"
    assert not any("sparse_attn" in key for module in model.modules() for key in vars(module))
    assert torch.equal(logits(model, ids), before)


def test_a_patch_is_taken_off_by_an_exception():
    model = new_model()
    with pytest.raises(ZeroDivisionError), patch(model, SPARSE):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("first_off", [0, 1])
def test_nested_patches(first_off):
    model, ids = new_model(), tokens()
    outer, inner = patch(model, SPARSE), patch(model, selectors.Dense())
    logits(model, ids)
    assert dict(inner.stats) == {"dense": 2} and not outer.stats
    (outer, inner)[first_off].remove()
    assert model.config._attn_implementation == "sparse_attn"
    logits(model, ids)
    assert (outer if first_off else inner).stats.total() == (2 if first_off else 4)
    (outer, inner)[1 - first_off].remove()
    assert model.config._attn_implementation == "sdpa"


def test_a_patch_can_be_entered_again():
    model, ids = new_model(), tokens()
    patched = patch(model, SPARSE)
    with patched:
        with patched:
            logits(model, ids)
        assert patched.active
    assert not patched.active
    with patched:
        logits(model, ids)
    assert patched.stats["sparse"] == 4
    assert model.config._attn_implementation == "sdpa"


def test_two_models_do_not_share_a_selector():
    one, two, ids = new_model(), new_model(), tokens()
    with patch(one, SPARSE) as first, patch(two, selectors.Dense()) as second:
        sparse, dense = logits(one, ids), logits(two, ids)
    assert dict(first.stats) == {"sparse": 2} and dict(second.stats) == {"dense": 2}
    assert_close(dense, logits(one, ids))
    assert not torch.allclose(sparse, dense, atol=1e-3)


def test_models_that_share_a_config_are_refused():
    one, ids = new_model(), tokens()
    two = type(one)(one.config)
    with patch(one, SPARSE):
        with pytest.raises(ValueError, match="shared with another model"):
            patch(two, selectors.Dense())
        with pytest.raises(ValueError, match="outside the patched model"):
            logits(two, ids)
    assert logits(two, ids).shape == (2, 19, VOCAB)


def test_a_copy_of_a_patched_model_is_patched_too():
    model, ids = new_model(), tokens()
    with patch(model, SPARSE) as patched:
        expected = logits(model, ids)
        copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, ids), expected)
    assert patched.stats["sparse"] == 2


def test_wrapped_models_are_found(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

    model = new_model()
    with patch(Wrapper(model), SPARSE):
        assert model.config._attn_implementation == "sparse_attn"
        model.save_pretrained(tmp_path)
    assert "sparse_attn" not in (tmp_path / "config.json").read_text()


def test_sub_models_get_their_own_implementation_back():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(
        text_config={**SIZES, **ALTERNATING}, vision_config=vision, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    configs = (model.config, model.config.text_config, model.config.vision_config)
    before = [one._attn_implementation for one in configs]
    assert set(before) == {"sdpa", "eager"}
    ids = tokens()
    image = torch.randn(1, 3, 8, 8)
    vision_before = model.get_image_features(image).pooler_output
    with patch(model, SPARSE) as patched:
        logits(model, ids)
        assert dict(patched.stats) == {"window": 1, "sparse": 1}
        assert_close(model.get_image_features(image).pooler_output, vision_before)
        assert patched.stats["not_causal"] == 1
    assert [one._attn_implementation for one in configs] == before


# ----------------------------------------------------------------------------------------- refusals


def test_models_with_attention_of_their_own_are_refused():
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"BloomForCausalLM.*attention interface"):
        patch(model, SPARSE)
    assert model.config._attn_implementation == before


def test_bad_arguments_are_refused():
    model = new_model()
    with pytest.raises(TypeError, match="Linear"):
        patch(nn.Linear(2, 2), SPARSE)
    with pytest.raises(TypeError, match="selector"):
        patch(model, "sparse")
    with pytest.raises(TypeError, match="selector"):
        patch(model, selectors.Dense)
    for layers in ([2], [-1], ["0"]):
        with pytest.raises(ValueError, match="no layer"):
            patch(model, SPARSE, exclude_layers=layers)
    with pytest.raises(ValueError, match="no layer 7"):
        patch(model, {7: SPARSE})
    with pytest.raises(ValueError, match="backend"):
        patch(model, SPARSE, backend="quantum")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "name", ["position_bias", "indices", "block_indices", "cache", "something_new"]
)
def test_arguments_that_nothing_acts_on_are_refused(name):
    model = causal_model("llama")
    with patch(model, selectors.Dense()):
        with pytest.raises(ValueError, match=f"'{name}' .*LlamaAttention, layer 0"):
            model(tokens(), **{name: torch.zeros(1)})
        model(tokens(), **{name: None})


def test_attention_weights_are_refused():
    model = causal_model("llama")
    with patch(model, selectors.Dense()), pytest.raises(ValueError, match="output_attentions"):
        model(tokens(), output_attentions=True)


def test_t5_is_refused_for_its_position_bias():
    options = {"vocab_size": VOCAB, "d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1}
    model = transformers.T5EncoderModel(transformers.T5Config(**options, num_heads=4)).eval()
    with patch(model, selectors.Dense()), pytest.raises(ValueError, match="position_bias"):
        model(tokens())


def test_an_explicit_mask_is_exact_with_dense_and_refused_with_a_selector():
    model, ids = causal_model("llama"), tokens()
    explicit = (torch.rand(2, 1, 19, 19) < 0.5) | torch.eye(19, dtype=torch.bool)
    for mask in (explicit, additive(explicit)):
        expected = logits(model, ids, attention_mask=mask)
        with patch(model, selectors.Dense()) as patched:
            assert_close(logits(model, ids, attention_mask=mask), expected)
        assert dict(patched.stats) == {"explicit_mask": 2}
        with patch(model, SPARSE), pytest.raises(ValueError, match="explicit attention mask"):
            model(ids, attention_mask=mask)
    with patch(model, selectors.Dense()):
        for mask in (explicit.long(), explicit[:, :, :1]):
            with pytest.raises(ValueError, match="attention mask"):
                model(ids, attention_mask=mask)


def call_layer(mask, seqlen_kv, **kwargs):
    model = causal_model("llama")
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, seqlen_kv, 8)
    with patch(model, selectors.Dense()):
        return attention_forward(model.model.layers[0].self_attn, q, k, k, mask, **kwargs)


def test_a_mask_that_the_model_changed_is_refused():
    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5}
    mask = masks.mask_function(**sizes, mask_function=causal_mask_function)
    out, _ = call_layer(mask, 5)
    assert out.shape == (2, 5, 4, 8)
    with pytest.raises(ValueError, match=r"computes with the attention mask itself \(pad\)"):
        nn.functional.pad(mask, (0, 2))
    with pytest.raises(ValueError, match=r"mask of torch\.int64"):
        call_layer(nn.functional.pad(mask.as_subclass(torch.Tensor), (0, 2)), 7)
    with pytest.raises(ValueError, match="there are 7 keys"):
        call_layer(mask, 7)


# ------------------------------------------------------------------------------------ mask function


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
