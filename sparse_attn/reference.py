"""The executable specification of the op pair, in pure torch: any device, any float dtype, float64
exact.

Both functions walk over chunks of query rows, so that memory stays O(seqlen_kv) times a bounded
number of rows. Scores are computed in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import BlockLayout

_CHUNK_ELEMENTS = 2**24


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """``[B, H, Sq, Dv]`` in q's dtype; laid out in memory as ``[B, Sq, H, Dv]`` if q is."""
    batch, heads, rows = q.shape[:3]
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
    return q.new_empty(batch, heads, rows, v.shape[-1])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, lse and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(q: Tensor, k: Tensor):
    rows = max(1, _CHUNK_ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return ((start, min(start + rows, q.shape[2])) for start in range(0, q.shape[2], rows))


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """``[B, H, ...]`` as ``[B, Hkv, group, ...]``."""
    return x.unflatten(1, (num_kv_heads, -1))


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    scores = scale * (q @ k.mT)
    return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores


def _per_row(sinks: Tensor, scores: Tensor) -> Tensor:
    """Sink logits ``[H]`` as a column beside ``scores [B, Hkv, group, rows, keys]``."""
    return _grouped(sinks.to(scores.dtype)[None], scores.shape[1])[..., None, None]


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension, the sink logit in its denominator, and the log of that."""
    column = scores.new_full((1,) * scores.dim(), -torch.inf)
    column = column if sinks is None else _per_row(sinks, scores)
    column = column.expand(*scores.shape[:-1], 1)
    peak = torch.cat([scores, column], -1).amax(-1, keepdim=True)
    peak = torch.where(peak == -torch.inf, 0, peak)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True) + torch.exp(column - peak)
    empty = total == 0
    lse = torch.where(empty, -torch.inf, peak + torch.log(total))
    return weights / torch.where(empty, 1, total), lse.squeeze(-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """``out = softmax(scores over the visible keys and the sink logit) @ v`` and ``lse``, its log
    denominator.

    Shapes as in `sparse_attn::attention`; the layout's values must have been validated.
    """
    dtype = compute_dtype(q.dtype)
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    out = empty_out(q, v)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    keys, values = k.to(dtype).unsqueeze(2), v.to(dtype).unsqueeze(2)
    for start, stop in _chunks(q, k):
        queries = _grouped(q[:, :, start:stop].to(dtype), num_kv_heads)
        mask = layout.visible(start, stop, is_causal=is_causal, num_heads=num_heads)
        scores = _scores(queries, keys, scale, softcap)
        scores = scores.masked_fill(~_grouped(mask, num_kv_heads), -torch.inf)
        probs, norm = _softmax(scores, sinks)
        out[:, :, start:stop] = (probs @ values).flatten(1, 2).to(q.dtype)
        lse[:, :, start:stop] = norm.flatten(1, 2)
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks (an empty tensor without sinks).

    With the probabilities ``p`` of the forward pass and ``delta = rowsum(p * dp) - dlse``::

        dv = p.T @ dout
        dp = dout @ v.T
        ds = p * (dp - delta)                    # times 1 - (scores / softcap)**2 with a softcap
        dq = scale * ds @ k
        dk = scale * ds.T @ q
        dsinks = -sum(exp(sinks - lse) * delta)

    The probabilities are computed anew from whole rows, more exactly than from out and lse.
    """
    dtype = compute_dtype(q.dtype)
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
    dsinks = torch.zeros(0 if sinks is None else num_heads, dtype=dtype, device=q.device)
    keys, values = k.to(dtype).unsqueeze(2), v.to(dtype).unsqueeze(2)
    for start, stop in _chunks(q, k):
        queries, grads, dnorm = (
            _grouped(x[:, :, start:stop].to(dtype), num_kv_heads) for x in (q, dout, dlse)
        )
        mask = layout.visible(start, stop, is_causal=is_causal, num_heads=num_heads)
        capped = _scores(queries, keys, scale, softcap)
        scores = capped.masked_fill(~_grouped(mask, num_kv_heads), -torch.inf)
        probs, norm = _softmax(scores, sinks)
        dprobs = grads @ values.mT
        delta = (probs * dprobs).sum(-1) - dnorm
        dscores = probs * (dprobs - delta[..., None])
        if softcap > 0:
            dscores = dscores * (1 - (capped / softcap).square())
        dv += torch.einsum("bhgqk,bhgqd->bhkd", probs, grads)
        dq[:, :, start:stop] = (scale * (dscores @ keys)).flatten(1, 2).to(q.dtype)
        dk += scale * torch.einsum("bhgqk,bhgqd->bhkd", dscores, queries)
        if sinks is not None:
            weight = torch.exp(_per_row(sinks, scores).squeeze(-1) - norm)
            dsinks -= (weight * delta).flatten(1, 2).sum((0, 2))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks if sinks is None else dsinks.to(sinks.dtype)
