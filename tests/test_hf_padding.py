"""Padding under `patch`."""

import pytest
import torch
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from sparse_attn import patch, selectors
from sparse_attn.hf import masks

from .hf_models import (
    CAUSAL,
    SPARSE,
    assert_close,
    assert_same_generation,
    causal_model,
    logits,
    oracle_mask,
    padding,
    positions_of,
    tokens,
)


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
