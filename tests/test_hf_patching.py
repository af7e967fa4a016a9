"""Putting `patch` on and taking it off: nesting, copies, other processes."""

import copy
import gc
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM

from sparse_attn import patch, selectors, unpatch
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


class ByLayer:
    """A selector of another class of the user's: a window that grows with the layer."""

    def __init__(self, window=1):
        self.window = window

    def for_layer(self, layer):
        return ByLayer(3 + 40 * layer)

    def __call__(self, q, k, *, is_causal, scale):
        return selectors.SlidingWindow(self.window)(q, k)


def test_layers_ask_a_selector_for_their_own():
    model, ids = new_model(), tokens()
    with patch(model, {layer: selectors.SlidingWindow(3 + 40 * layer) for layer in range(2)}):
        expected = logits(model, ids)
    with patch(model, ByLayer()) as patched:
        assert torch.equal(logits(model, ids), expected)
    assert patched.stats == {"sparse": 2}


class AllKeys:
    is_dense = True

    def __call__(self, q, k, *, is_causal, scale):
        return selectors.Dense()(q, k)


def test_a_selector_that_says_it_is_dense_is_served_as_dense():
    model, ids = new_model(), tokens()
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    mask = mask.expand(len(ids), 1, -1, -1)
    expected = logits(model, ids, attention_mask=mask)
    with patch(model, AllKeys()) as patched:
        assert_close(logits(model, ids, attention_mask=mask), expected)
        assert_close(logits(model, ids), expected)
    assert "sparse" not in patched.stats


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


def copies_of(model, folder):
    """Copies of a model, by the ways there are."""
    torch.save(model, folder / "model.pt")
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.load": torch.load(folder / "model.pt", weights_only=False),
    }


def test_copies_of_a_patched_model_are_patched_too(tmp_path):
    model, ids = new_model(), tokens()
    dense = logits(model, ids)
    with patch(model, SPARSE, exclude_layers=[0]) as patched:
        expected = logits(model, ids)
        copies = copies_of(model, tmp_path)
    for copied in copies.values():
        assert torch.equal(logits(copied, ids), expected)
        assert copied.config._attn_implementation == "sparse_attn"
    assert dict(patched.stats) == {"sparse": 1, "dense": 1}
    assert_close(logits(model, ids), dense)


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_copies_can_be_patched_and_freed(before, tmp_path):
    model, ids = new_model(), tokens()
    model.set_attn_implementation(before)
    dense = logits(model, ids)
    patched = patch(model, SPARSE)
    for copied in copies_of(model, tmp_path).values():
        with patch(copied, selectors.Dense()) as again:  # replaces the patch that was copied
            assert_close(logits(copied, ids), dense)
        assert dict(again.stats) == {"dense": 2}
        assert copied.config._attn_implementation == before
        assert torch.equal(logits(copied, ids), dense)
    for copied in copies_of(model, tmp_path).values():
        unpatch(copied)
        assert copied.config._attn_implementation == before
        assert torch.equal(logits(copied, ids), dense)
    assert patched.active and not torch.allclose(logits(model, ids), dense, atol=1e-3)


def test_a_patch_copied_with_its_model_still_removes_itself():
    model, ids = new_model(), tokens()
    dense = logits(model, ids)
    copied, handle = copy.deepcopy((model, patch(model, SPARSE)))
    assert handle.active
    with patch(copied, selectors.Dense()):  # nests: the copied handle could remove its own
        assert_close(logits(copied, ids), dense)
    assert not torch.allclose(logits(copied, ids), dense, atol=1e-3)
    assert handle.stats["sparse"] == 2
    handle.remove()
    assert torch.equal(logits(copied, ids), dense)
    assert model.config._attn_implementation == "sparse_attn"


def test_a_patched_model_runs_in_another_process(tmp_path):
    model, ids = new_model(), tokens()
    with patch(model, SPARSE):
        torch.save((model, ids), tmp_path / "model.pt")
        expected = logits(model, ids)
    code = f"""
import torch
model, ids = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert_close(torch.load(tmp_path / "logits.pt"), expected)


def test_a_model_made_from_the_config_of_a_patched_one():
    model, ids = new_model(), tokens()
    patched = patch(model, SPARSE)
    other = type(model)(copy.deepcopy(model.config))
    with pytest.raises(ValueError, match=r"copied from one.*set_attn_implementation\('sdpa'\)"):
        logits(other, ids)
    with patch(other, selectors.Dense()):
        logits(other, ids)
    assert other.config._attn_implementation == "sdpa"
    assert patched.active
    patched.remove()


def test_unpatch_takes_off_every_patch():
    model, ids = new_model(), tokens()
    dense = logits(model, ids)
    outer, inner = patch(model, SPARSE), patch(model, SPARSE)
    unpatch(model)
    assert not outer.active and not inner.active
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, ids), dense)
    unpatch(model)
    inner.remove()
    with outer:  # can be entered again
        assert model.config._attn_implementation == "sparse_attn"
    assert model.config._attn_implementation == "sdpa"


def test_a_config_outlives_its_patched_model():
    model, ids = new_model(), tokens()
    config = model.config
    patch(model, SPARSE)
    del model
    gc.collect()
    other = LlamaForCausalLM(config)
    with patch(other, SPARSE):
        logits(other, ids)
    assert config._attn_implementation == "sdpa"


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
