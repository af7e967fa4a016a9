"""What `patch` refuses, and in which words."""

import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import causal_mask_function

from sparse_attn import patch, selectors
from sparse_attn.hf import masks
from sparse_attn.hf.forward import attention_forward

from .hf_models import (
    SPARSE,
    VOCAB,
    additive,
    assert_close,
    causal_model,
    logits,
    new_model,
    tokens,
)


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
