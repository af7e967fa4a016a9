"""Packed sequences under `patch`: each is as if alone, whoever tells where it starts.

And: every keyword argument of an attention call acts, changes nothing, or is refused by name.
"""

import pytest
import torch
import transformers

from sparse_attn import patch, selectors
from sparse_attn.hf.forward import HARMLESS

from .hf_models import (
    SPARSE,
    assert_close,
    causal_model,
    logits,
    new_model,
    packed_positions,
    tokens,
)

LENGTHS = (4, 9, 6)
ENDS = torch.tensor([0, 4, 13, 19], dtype=torch.int32)
NUMBERS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None].int()
TELLING = {
    "cu_seq_lens": {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 9},
    "cu_seq_lens_q": {"cu_seq_lens_q": ENDS.long()},
    "seq_idx": {"seq_idx": NUMBERS},
    "both": {"cu_seq_lens_q": ENDS, "seq_idx": NUMBERS},
    "each_a_part": {"cu_seq_lens_q": torch.tensor([0, 4, 19]), "seq_idx": (NUMBERS == 2).int()},
}


def alone(model, ids, lengths=LENGTHS):
    parts = ids.split(list(lengths), dim=1)
    return torch.cat([logits(model, part, use_cache=False) for part in parts], dim=1)


@pytest.mark.parametrize("cache", ["no", "dynamic", "static"])
@pytest.mark.parametrize("told", TELLING)
@pytest.mark.parametrize("selector", [selectors.Dense(), SPARSE], ids=["dense", "sparse"])
def test_each_packed_sequence_is_as_if_alone(selector, told, cache):
    model, ids = causal_model("llama"), tokens(batch=1)
    inputs = {"use_cache": cache != "no", "position_ids": packed_positions(*LENGTHS)}
    if cache == "static":
        inputs["past_key_values"] = transformers.StaticCache(config=model.config, max_cache_len=24)
    with patch(model, selector):
        assert_close(logits(model, ids, **inputs, **TELLING[told]), alone(model, ids))


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "mistral"])
def test_packed_sequences_in_windows_and_with_sinks(name):
    model, ids = causal_model(name), tokens(batch=1)
    inputs = {"position_ids": packed_positions(*LENGTHS), "cu_seq_lens_q": ENDS}
    with patch(model, selectors.Dense()):
        assert_close(logits(model, ids, **inputs), alone(model, ids))


def test_each_row_of_a_batch_has_its_own_seq_idx():
    model, ids = causal_model("gpt2"), tokens()
    numbers = torch.stack((NUMBERS[0], torch.zeros(19, dtype=torch.int32)))
    positions = torch.cat((packed_positions(*LENGTHS), torch.arange(19)[None]))
    with patch(model, SPARSE):
        packed = logits(model, ids, position_ids=positions, seq_idx=numbers)
        assert_close(packed[:1], alone(model, ids[:1]))
        assert_close(packed[1:], logits(model, ids[1:]))


def test_packing_and_padding_together():
    model, ids = causal_model("llama"), tokens(batch=1)
    mask = torch.ones_like(ids)
    mask[0, 11:13] = 0  # the end of the second sequence
    positions = packed_positions(*LENGTHS)
    with patch(model, selectors.Dense()):
        inputs = {"attention_mask": mask, "position_ids": positions, "cu_seq_lens_q": ENDS}
        packed = logits(model, ids, **inputs)
        kept = torch.cat([ids[:, :11], ids[:, 13:]], dim=1)
        assert_close(packed[mask.bool()][None], alone(model, kept, (4, 7, 6)))


def test_packed_gradients():
    model, ids = new_model(), tokens(batch=1)

    def gradient(**inputs):
        model.zero_grad()
        model(ids, labels=ids, position_ids=packed_positions(*LENGTHS), **inputs).loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    with patch(model, SPARSE):
        expected = gradient(use_cache=False)
        torch.testing.assert_close(gradient(cu_seq_lens_q=ENDS), expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(gradient(), expected, atol=1e-4)


def test_compiled_models_act_on_packing_too():
    model, ids = new_model(), tokens(batch=1)
    inputs = {"position_ids": packed_positions(*LENGTHS), "cu_seq_lens_q": ENDS, "use_cache": True}
    with patch(model, selectors.Dense()):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        actual, expected = logits(compiled, ids, **inputs), alone(model, ids)
    torch._dynamo.reset()
    assert_close(actual, expected)


def test_decoding_one_sequence_with_packing_arguments():
    model, ids = causal_model("llama"), tokens(batch=1)
    ends = {"cu_seq_lens_q": torch.tensor([0, 1]), "cu_seq_lens_k": torch.tensor([0, 19])}
    cache = transformers.DynamicCache(config=model.config)
    with patch(model, SPARSE):
        expected = logits(model, ids)
        logits(model, ids[:, :18], past_key_values=cache)
        assert_close(logits(model, ids[:, 18:], past_key_values=cache, **ends), expected[:, 18:])


@pytest.mark.parametrize(
    "arguments,match",
    [
        ({"cu_seq_lens_q": torch.tensor([0, 4, 20])}, "'cu_seq_lens_q'.*rise from 0 to 19"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 4, 19])}, "'cu_seq_lens_q'.*rise from 0 to 19"),
        ({"cu_seq_lens_q": torch.tensor([[0, 19]])}, "'cu_seq_lens_q'.*1-D"),
        ({"cu_seq_lens_k": ENDS}, "'cu_seq_lens_k'.*beside it"),
        ({"cu_seq_lens_q": ENDS, "cu_seq_lens_k": torch.tensor([0, 19])}, "'cu_seq_lens_k'"),
        ({"seq_idx": NUMBERS[:, 1:]}, r"'seq_idx'.*\[1, 19\]"),
    ],
)
def test_packing_that_does_not_fit_is_refused(arguments, match):
    model = causal_model("llama")
    with patch(model, selectors.Dense()), pytest.raises(ValueError, match=match):
        logits(model, tokens(batch=1), **arguments)


def test_packing_is_refused_where_it_tells_too_little():
    model, ids = causal_model("llama"), tokens(batch=1)
    with patch(model, selectors.Dense()):
        with pytest.raises(ValueError, match=r"'cu_seq_lens_q'.*batch size is 2"):
            logits(model, tokens(), cu_seq_lens_q=ENDS)
        cache = transformers.DynamicCache(config=model.config)
        logits(model, ids[:, :10], past_key_values=cache)
        with pytest.raises(ValueError, match=r"'seq_idx'.*in the cache"):
            logits(model, ids[:, 10:], past_key_values=cache, seq_idx=NUMBERS[:, 10:])
        with pytest.raises(ValueError, match=r"'seq_idx'.*only causal"):
            logits(model, ids, is_causal=False, seq_idx=NUMBERS)


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_harmless_arguments_change_nothing(name):
    model, ids = causal_model("llama"), tokens()
    value = {"logits_to_keep": 0, "position_ids": torch.arange(19)[None]}.get(
        name, torch.ones(2, 19)
    )
    if name in ("return_dict", "use_cache", "output_hidden_states"):
        value = True
    expected = logits(model, ids)
    with patch(model, selectors.Dense()):
        assert torch.allclose(logits(model, ids, **{name: value}), expected, atol=1e-5)


def test_bidirectional_attention_is_served_as_before():
    model, ids = causal_model("llama"), tokens()
    expected = logits(model, ids, is_causal=False)
    assert not torch.allclose(expected, logits(model, ids), atol=1e-3)
    with patch(model, SPARSE) as patched:
        assert_close(logits(model, ids, is_causal=False), expected)
    assert dict(patched.stats) == {"not_causal": 2}


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


def test_sparse_packed_sequences():
    model, ids = causal_model("llama"), tokens(batch=1)
    with patch(model, SPARSE):
        packed = logits(model, ids, position_ids=packed_positions(4, 9, 6), use_cache=False)
        alone = [logits(model, part, use_cache=False) for part in ids.split([4, 9, 6], dim=1)]
    assert_close(packed, torch.cat(alone, dim=1))
