"""What `patch` refuses, and in which words."""

import ast
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import causal_mask_function

from sparse_attn import patch, selectors, unpatch
from sparse_attn.hf import masks
from sparse_attn.hf.forward import HARMLESS, attention_forward
from sparse_attn.hf.versions import OLDEST_TRANSFORMERS

from .hf_models import (
    BART,
    SIZES,
    SPARSE,
    VOCAB,
    additive,
    assert_close,
    build,
    causal_model,
    logits,
    new_model,
    tokens,
)

SERVED = {"attention_mask", "dropout", "scaling", "is_causal", "sliding_window", "softcap", "s_aux"}
SERVED |= {"query", "key", "value", "output_attentions", "cu_seq_lens_q", "cu_seq_lens_k"}
REFUSED_AT_ONCE = {"position_bias", "indices", "block_indices"}


def test_models_with_attention_of_their_own_are_refused():
    config = transformers.XLMConfig(n_words=VOCAB, emb_dim=32, n_layers=1, n_heads=2)
    model = transformers.XLMWithLMHeadModel(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"XLMWithLMHeadModel.*attention interface"):
        patch(model, SPARSE)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    "arguments,error,match",
    [
        (("sparse",), TypeError, "selector must be a selector"),
        ((None,), TypeError, "selector must be a selector"),
        (
            (selectors.SinkWindow,),
            TypeError,
            r"got the class SinkWindow: pass SinkWindow\(\.\.\.\)",
        ),
        (({1: selectors.Dense},), TypeError, r"selector\[1\] must be an object.*Dense\(\.\.\.\)"),
        (({7: SPARSE},), ValueError, "selector: there is no layer 7 in a model of 2 layers"),
        (({"0": SPARSE},), TypeError, "selector must hold layer indices"),
        ((SPARSE, 1), TypeError, r"exclude_layers must hold layer indices, such as \[2\], got 1"),
        ((SPARSE, "01"), TypeError, "exclude_layers must hold layer indices.*got '01'"),
        ((SPARSE, None), TypeError, "exclude_layers must hold layer indices.*got None"),
        ((SPARSE, torch.tensor(1)), TypeError, "exclude_layers must hold layer indices"),
        ((SPARSE, ["0"]), TypeError, "exclude_layers must hold layer indices.*got '0'"),
        ((SPARSE, [1.0]), TypeError, r"exclude_layers must hold layer indices.*got 1\.0"),
        ((SPARSE, [True]), TypeError, "exclude_layers must hold layer indices.*got True"),
        ((SPARSE, [2]), ValueError, "exclude_layers: there is no layer 2"),
        ((SPARSE, np.array([-1])), ValueError, "exclude_layers: there is no layer -1"),
        ((SPARSE, [], "quantum"), ValueError, "backend"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, match):
    model = causal_model("llama")
    more = dict(zip(("exclude_layers", "backend"), arguments[1:], strict=False))
    with pytest.raises(error, match=match):
        patch(model, arguments[0], **more)
    assert model.config._attn_implementation == "sdpa"


def test_what_is_no_transformers_model_is_refused():
    for function in (lambda model: patch(model, SPARSE), unpatch):
        with pytest.raises(TypeError, match="Linear"):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize("layers", [np.array([1]), torch.tensor([1]), range(1, 2), {1}, (1,)])
def test_layer_indices_of_any_kind_of_integer(layers):
    model, ids = causal_model("llama"), tokens()
    with patch(model, {np.int64(0): SPARSE, 1: SPARSE}, exclude_layers=layers) as patched:
        logits(model, ids)
    assert dict(patched.stats) == {"sparse": 1, "dense": 1}


@pytest.mark.parametrize(
    "name", ["position_bias", "indices", "block_indices", "block_table", "something_new"]
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


SMALL = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_attention_heads")}
SMALL |= {"num_hidden_layers": 2, "intermediate_size": 32, "num_key_value_heads": 4}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
LATENT |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
COMPRESSED = LATENT | {"num_hidden_layers": 4, "o_lora_rank": 16, "head_dim": 16}
DEEP = {
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "head_dim": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}
OWN_ATTENTION = {  # class prefix of the config and of the model, options, what the refusal says
    "t5": ("T5", "T5EncoderModel", T5, "T5Attention passes 'position_bias'"),
    "mt5": ("MT5", "MT5ForConditionalGeneration", T5, "MT5Attention passes 'position_bias'"),
    "deepseek": ("DeepseekV32", "DeepseekV32ForCausalLM", SMALL | LATENT, "'indices'"),
    "deepseek_v4": ("DeepseekV4", "DeepseekV4ForCausalLM", SMALL | COMPRESSED, "compressed keys"),
    "minimax": ("MiniMaxM3VLText", "MiniMaxM3VLTextModel", SMALL | DEEP, "'block_indices'"),
    "glm": ("GlmMoeDsa", "GlmMoeDsaForCausalLM", SMALL | LATENT, "'indices'"),
}


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_whose_every_call_would_be_refused_are_refused_at_once(name):
    prefix, kind, options, match = OWN_ATTENTION[name]
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, prefix + "Config")(**options))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"sparse_attn cannot serve {kind}.*{match}"):
        patch(model, selectors.Dense())
    assert model.config._attn_implementation == before


def interface_keywords(source):
    """The keywords of all calls of the attention interface in the source of a model."""
    for start in re.finditer(r"= attention_interface(?=\()", source):
        depth, end = 0, start.end()
        while depth or end == start.end():
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        call = ast.parse("f" + source[start.end() : end]).body[0].value
        yield from (one.arg for one in call.keywords if one.arg)


def test_no_model_gives_an_argument_that_nobody_thought_of():
    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        found |= set(interface_keywords(path.read_text()))
    assert found >= {"dropout", "sliding_window", "position_bias", "indices"}
    new = found - SERVED - HARMLESS - REFUSED_AT_ONCE
    assert new <= {"sinks"}  # of Inkling 2, which also gives a position_bias


@pytest.mark.parametrize("kind", ["Bert", "ViT"])
def test_encoders_are_warned_of(kind):
    config = getattr(transformers, kind + "Config")(
        **{key: SIZES[key] for key in list(SIZES)[1:5]}, image_size=8, patch_size=4
    )
    model = getattr(transformers, kind + "Model")(config)
    with pytest.warns(UserWarning, match=f"{kind}Model says that it is causal") as caught:
        patch(model, SPARSE).remove()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bart", "bert_decoder"])
def test_models_with_causal_attention_are_not_warned_of(name, recwarn):
    if name == "bart":
        model = build("Bart", "Bart", "ForConditionalGeneration", BART)
    elif name == "bert_decoder":
        options = {key: SIZES[key] for key in list(SIZES)[:5]}
        model = build("Bert", "Bert", "LMHeadModel", options | {"is_decoder": True})
    else:
        model = causal_model(name)
    recwarn.clear()
    patch(model, SPARSE).remove()
    assert not [one for one in recwarn if "causal" in str(one.message)]


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.13.2", "5.13.0.dev0"])
def test_an_older_transformers_is_refused_by_its_version(version, monkeypatch):
    model = new_model()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(
        ImportError, match=rf"transformers 5\.\d+ or later, and {version} is installed"
    ):
        patch(model, SPARSE)
    assert model.config._attn_implementation == "sdpa"


def test_the_oldest_transformers_is_the_one_that_is_installed_with_the_package():
    wanted = f'hf = ["transformers>={OLDEST_TRANSFORMERS}"]'
    assert wanted in (Path(__file__).parents[1] / "pyproject.toml").read_text()


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
