"""Models whose attention modules do not ask transformers' attention interface, and are served all
the same: Bloom, Falcon and MPT, whose ALiBi is a bias for each key.

``slope * j`` in place of ``-slope * (p - j)`` adds the same to all scores of a row, so the softmax
is that of ALiBi. On padding these models count otherwise, so what is added is taken from the model.

The `forward` of an attention class is replaced once in the process. Without a patch on the module
it runs what was there before, so that removing a patch, and copies, need nothing more.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from .key_mask import KeyMask, whole
from .names import EAGER_NAME, ROUTERS

_ADAPTED = "_sparse_attn_adapted"  # on a forward that looks for them
Attention = Callable[..., tuple[Tensor, None]]  # `forward.attention_forward`


def adapts(config: Any) -> bool:
    """Whether the attention of models with such a config is replaced here."""
    return getattr(config, "model_type", None) in _ADAPTERS


def refused(module: nn.Module) -> str | None:
    """Why this attention module of an adapted model cannot be served, if so."""
    kind = type(module).__name__
    if kind == "FalconFlashAttention2":
        return "computes through flash attention: load the model with 'sdpa'"
    if kind == "FalconAttention":
        config = module.config
        if config.alibi and config._attn_implementation == "eager":
            return "adds ALiBi twice with 'eager' attention: load the model with 'sdpa'"
    if kind == "BloomAttention" and module.pretraining_tp > 1 and module.slow_but_exact:
        return "sums its output in slices (slow_but_exact), and nothing here does"
    return None


def register(attention: Attention) -> None:
    """Make the attention classes that the process has loaded ask `attention`."""
    for name, adapters in _ADAPTERS.items():
        module = sys.modules.get(f"transformers.models.{name}.modeling_{name}")
        for kind_name, adapter in adapters.items():
            kind = getattr(module, kind_name, None)
            if kind is not None and not hasattr(kind.forward, _ADAPTED):
                kind.forward = _routed(kind.forward, adapter, attention)


def _routed(before: Callable, adapter: Callable, attention: Attention) -> Callable:
    """A `forward` that runs `adapter` where a patch is on the module or a mask is for one."""

    @functools.wraps(before)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        key_mask = isinstance(kwargs.get("attention_mask"), KeyMask)
        if key_mask or getattr(module, ROUTERS, ()):
            return adapter(functools.partial(attention, module), before, module, *args, **kwargs)
        return before(module, *args, **kwargs)

    setattr(forward, _ADAPTED, True)
    return forward


# ------------------------------------------------------------------------ one function for a class


def _bloom(
    attend: Attention,
    _before: Callable,
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    out, _ = attend(
        query,
        key,
        value,
        attention_mask,
        scaling=module.inv_norm_factor,
        dropout=module.attention_dropout.p if module.training else 0.0,
        key_bias=alibi.unflatten(0, (-1, module.num_heads)).squeeze(2),
        eager=True,
        output_attentions=output_attentions,
        **kwargs,
    )
    out = module.dense(out.flatten(2))
    return residual + dropout(out, module.hidden_dropout, module.training), None


def _falcon(
    attend: Attention,
    _before: Callable,
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    fused = module.query_key_value(hidden_states)
    query, key, value = (x.transpose(1, 2) for x in module._split_heads(fused))
    if alibi is None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    attention_mask = whole(attention_mask)
    holds_alibi = attention_mask is not None and attention_mask.is_floating_point()
    bias = None
    if alibi is not None and not holds_alibi:
        bias = alibi.view(len(query), module.num_heads, -1) * module.inv_norm_factor
    out, _ = attend(
        query,
        key,
        value,
        attention_mask,
        scaling=module.inv_norm_factor,
        dropout=module.attention_dropout.p if module.training and alibi is not None else 0.0,
        key_bias=bias,
        # With ALiBi its mask is additive for 'sdpa' too.
        eager=alibi is not None or module.config._attn_implementation == EAGER_NAME,
        output_attentions=output_attentions,
        **kwargs,
    )
    return module.dense(out.flatten(2)), None


def _mpt(
    attend: Attention,
    _before: Callable,
    module: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    heads = mixed.unflatten(2, (3, module.n_heads, module.head_dim))
    query, key, value = heads.transpose(1, 3).unbind(2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool:  # True hides
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
            attention_mask, lowest
        )
    bias = None
    if position_bias is not None:  # [H, 1, max_seq_len], the last one for the last key
        bias = position_bias[:, 0, max(0, position_bias.shape[2] - key.shape[2]) :][None]
    out, _ = attend(
        query,
        key,
        value,
        attention_mask,
        scaling=module.softmax_scale,
        dropout=module.attn_dropout_p if module.training else 0.0,
        key_bias=bias,
        eager=True,
        **kwargs,
    )
    return module.out_proj(out.flatten(2)), None


def _mpt_block(
    _attend: Attention, before: Callable, module: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """An MPT block knows of `output_attentions`, and its attention does not."""
    if kwargs.get("output_attentions"):
        raise ValueError(
            "sparse_attn cannot serve output_attentions=True (MptBlock): no weights are formed"
        )
    return before(module, *args, **kwargs)


_ADAPTERS = {
    "bloom": {"BloomAttention": _bloom},
    "falcon": {"FalconAttention": _falcon},
    "mpt": {"MptAttention": _mpt, "MptBlock": _mpt_block},
}
