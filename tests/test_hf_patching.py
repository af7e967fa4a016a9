"""Putting `patch` on and taking it off: nesting, copies, other processes."""

import copy

import pytest
import torch
import transformers
from torch import nn

from sparse_attn import patch, selectors
from sparse_attn.hf import Patch

from .hf_models import (
    ALTERNATING,
    SIZES,
    SPARSE,
    VOCAB,
    assert_close,
    logits,
    new_model,
    tokens,
)


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
