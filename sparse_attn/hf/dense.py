"""Dense attention of a call through torch, under a mask that is written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import masks

if TYPE_CHECKING:
    from .forward import Call


def explicit(call: Call, mask: Tensor | None, window: int, is_causal: bool) -> Tensor:
    """Dense attention ``[B, Sq, H, Dv]`` through torch; the mask is written out if need be."""
    seqlen_q, seqlen_kv = call.query.shape[2], call.key.shape[2]
    flag_says_it = seqlen_q == 1 or (seqlen_q == seqlen_kv and not beyond_torch(call))
    if masks.is_key_mask(mask) or (mask is None and is_causal and (window or not flag_says_it)):
        mask = masks.to_dense(mask, seqlen_q, seqlen_kv, window, call.query.device)
        return fill_blind(call, _through_torch(call, mask, is_causal), mask.any(-1)[:, 0])
    return _through_torch(call, mask, is_causal)


def beyond_torch(call: Call) -> bool:
    """Whether the scores need what torch's SDPA lacks."""
    return bool(call.softcap) or call.sink_logits is not None or call.key_bias is not None


def _through_torch(call: Call, mask: Tensor | None, is_causal: bool) -> Tensor:
    if beyond_torch(call):
        return _eager(call, mask)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        call.module,
        call.query,
        call.key,
        call.value,
        mask,
        dropout=call.dropout,
        scaling=call.scale,
        is_causal=is_causal,
    )[0]


def _eager(call: Call, mask: Tensor | None) -> Tensor:
    """The same with softcap, sink_logits and key_bias; it forms the scores."""
    query, key, value = call.query, call.key, call.value
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = (query @ key.transpose(2, 3)).float() * scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.key_bias is not None:
        scores = scores + call.key_bias.float()[:, :, None]
    lowest = torch.finfo(scores.dtype).min
    hides = mask is not None and mask.dtype == torch.bool
    if hides:
        scores = scores.masked_fill(~mask, lowest)
    elif mask is not None:
        scores = (scores + mask).clamp(min=lowest)
    if call.sink_logits is not None:
        sink_logits = call.sink_logits.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink_logits), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    if hides:
        weights = weights * mask.any(-1, keepdim=True)  # rows that see nothing are zero
    weights = torch.nn.functional.dropout(weights.to(value.dtype), call.dropout)
    return (weights @ value).transpose(1, 2).contiguous()


def fill_blind(call: Call, out: Tensor, seen: Tensor) -> Tensor:
    """`out` with what eager attention gives for rows that see no key, where `seen` is False."""
    if not call.eager or call.sink_logits is not None:
        return out
    groups = call.query.shape[1] // call.key.shape[1]
    mean = call.value.mean(2).repeat_interleave(groups, dim=1)
    return torch.where(seen[..., None, None], out, mean[:, None])


def window_mask(
    segment: masks.Segment, first: int, window: int, device: torch.device
) -> Tensor | None:
    """The bool mask ``[1, 1, Sq, Skv]`` of queries behind their keys; None if they see all."""
    if not window:
        return None
    queries, keys = (
        torch.arange(x.start, x.stop, device=device) if isinstance(x, slice) else x
        for x in (segment.queries, segment.keys)
    )
    return (keys > queries[:, None] + (first - window))[None, None]
