"""Tiny random transformers models, and what the tests of `patch` do with them."""

from functools import lru_cache

import torch
import transformers

from sparse_attn import patch, selectors

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
SPARSE = selectors.SinkWindow(sink=2, window=4)


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


def packed_positions(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def window_mask(seqlen, sink, window):
    """The dense causal mask [S, S] of `SinkWindow`, from its definition."""
    i, j = torch.arange(seqlen)[:, None], torch.arange(seqlen)
    return (j <= i) & ((i - j < window) | (j < sink))


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
