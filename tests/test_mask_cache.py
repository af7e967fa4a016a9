"""Selections of HiP that are kept for some steps of decoding."""

import pytest
import torch

from sparse_attn import patch
from sparse_attn.selectors import HiP, MaskCache

from .structured import structured_qk


def decode(cache, q, k, start, steps):
    """The layouts of `steps` decoding steps, the first one with `start` keys."""
    return [cache(q[:, :, n - 1 : n], k[:, :, :n]) for n in range(start, start + steps)]


def test_mask_cache_chooses_anew_every_few_steps():
    q, k, _ = structured_qk(400)
    hip = HiP(k=32, block_k=2, sink=4, window=32, margin=3)
    cache = MaskCache(hip, refresh=4)
    cache(q[:, :, :300], k[:, :, :300])
    for step, layout in enumerate(decode(cache, q, k, 301, 10)):
        n = 301 + step
        made = n - step % 4
        fresh = hip(q[:, :, made - 1 : made], k[:, :, :made])
        assert layout.seqlens == (1, n)
        assert torch.equal(layout.validate().kv_indices, fresh.kv_indices)


def test_mask_cache_with_refresh_1_is_no_cache():
    q, k, _ = structured_qk(200)
    hip = HiP(k=16, block_k=2, sink=4, window=16)
    for n, layout in enumerate(decode(MaskCache(hip, refresh=1), q, k, 190, 8), 190):
        assert torch.equal(layout.kv_indices, hip(q[:, :, n - 1 : n], k[:, :, :n]).kv_indices)


def test_no_key_falls_between_a_cached_mask_and_the_window():
    q, k, _ = structured_qk(300)
    cache = MaskCache(HiP(k=300, block_k=1, sink=0, window=16, margin=7), refresh=8)
    for layout in decode(cache, q, k, 200, 20):
        assert layout.density() == 1


def test_mask_cache_knows_its_sequence():
    q, k, _ = structured_qk(200)
    other_q, other_k, _ = structured_qk(200)
    hip = HiP(k=16, block_k=2, sink=4, window=16, margin=7)
    cache = MaskCache(hip, refresh=8)
    decode(cache, q, k, 150, 1)
    layout = decode(cache, other_q, other_k, 151, 1)[0]
    expected = hip(other_q[:, :, 150:151], other_k[:, :, :151])
    assert torch.equal(layout.kv_indices, expected.kv_indices)
    decode(cache, q, k, 150, 1)
    for n in (150, 158, 149):  # no step forward, too many, or backward
        layout = decode(cache, q, k, n, 1)[0]
        expected = hip(q[:, :, n - 1 : n], k[:, :, :n])
        assert torch.equal(layout.kv_indices, expected.kv_indices)


def test_mask_caches_in_a_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(num_hidden_layers=3, num_key_value_heads=2, vocab_size=99, **sizes)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 99, (2, 120))
    hip = HiP(k=400, block_k=2, sink=4, window=16, margin=7)
    caches = dict.fromkeys((1, 2), MaskCache(hip, refresh=8))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    with patch(model, caches) as patched:
        sparse = model.generate(ids, **options)
    assert patched.stats == {"dense": 20, "sparse": 40}
    assert torch.equal(sparse, model.generate(ids, **options))


def test_mask_cache_refuses_a_margin_that_is_too_small():
    with pytest.raises(ValueError, match="refresh=8 needs a margin of at least 7, got 6"):
        MaskCache(HiP(margin=6))
    with pytest.raises(ValueError, match="refresh must be an int of at least 1"):
        MaskCache(HiP(margin=6), refresh=0)
