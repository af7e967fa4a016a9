"""The executable specification of the op pair, in pure torch: any device, any float dtype, float64
exact.

Both functions walk over chunks of query rows, so that memory stays O(seqlen_kv) times a bounded
number of rows. Scores are computed in float32 (float64 for float64 inputs).

What a row does not see is not there: it has no weight, not a weight of 0, which times infinity
would be NaN. What a row sees counts as in eager attention, NaN and infinity included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract.dtypes import compute_dtype
from ..contract.results import empty_lse, empty_out
from ..layout import BlockLayout

_CHUNK_ELEMENTS = 2**24


def _chunks(q: Tensor, k: Tensor):
    rows = max(1, _CHUNK_ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return ((start, min(start + rows, q.shape[2])) for start in range(0, q.shape[2], rows))


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """``[B, H, ...]`` as ``[B, Hkv, group, ...]``."""
    return x.unflatten(1, (num_kv_heads, -1))


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Scores, and their derivatives by what the softcap caps (None without one)."""
    scores = scale * (q @ k.mT)
    if softcap == 0:
        return scores, None
    capped = torch.tanh(scores / softcap)
    return softcap * capped, 1 - capped.square()


def _per_row(sink_logits: Tensor, scores: Tensor) -> Tensor:
    """Sink logits ``[H]`` as a column beside ``scores [B, Hkv, group, rows, keys]``."""
    return _grouped(sink_logits.to(scores.dtype)[None], scores.shape[1])[..., None, None]


def _softmax(
    scores: Tensor, mask: Tensor, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the visible ones in the last dimension, the sink logit in its denominator; the
    share of the latter; and the log of the denominator.
    """
    column = scores.new_full((1,) * scores.dim(), -torch.inf)
    column = column if sink_logits is None else _per_row(sink_logits, scores)
    column = column.expand(*scores.shape[:-1], 1)
    logits = torch.cat([scores.masked_fill(~mask, -torch.inf), column], -1)
    probs = torch.softmax(logits, -1)
    is_empty = ~mask.any(-1) & (column.squeeze(-1) == -torch.inf)
    share = torch.where(is_empty, 0, probs[..., -1])
    return torch.where(mask, probs[..., :-1], 0), share, torch.logsumexp(logits, -1)


def _visible_product(weights: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """``weights [..., M, N] @ x [..., N, D]``, summed over the visible pairs in ``mask [..., M,
    N]``; hidden weights are 0. What they are multiplied with matters only if it is not finite.
    """
    if x.isfinite().all():
        return weights @ x
    pairs = zip(weights.unbind(-2), mask.unbind(-2), strict=True)
    rows = [torch.where(seen[..., None], w[..., None] * x, 0).sum(-2) for w, seen in pairs]
    return torch.stack(rows, -2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float,
    softcap: float,
    is_causal: bool,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``out = softmax(scores over the visible keys and the sink logit) @ v`` and ``lse``, its log
    denominator.

    Shapes as in `sparse_attn::attention`; the layout's values must have been validated.
    """
    dtype = compute_dtype(q.dtype)
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    out = empty_out(q, v)
    lse = empty_lse(q)
    keys, values = k.to(dtype).unsqueeze(2), v.to(dtype).unsqueeze(2)
    for start, stop in _chunks(q, k):
        queries = _grouped(q[:, :, start:stop].to(dtype), num_kv_heads)
        mask = layout.visible(start, stop, is_causal=is_causal, num_heads=num_heads)
        mask = _grouped(mask, num_kv_heads)
        scores, _ = _scores(queries, keys, scale, softcap)
        probs, _, norm = _softmax(scores, mask, sink_logits)
        result = _visible_product(probs, values, mask)
        out[:, :, start:stop] = result.flatten(1, 2).to(q.dtype)
        lse[:, :, start:stop] = norm.flatten(1, 2)
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float,
    softcap: float,
    is_causal: bool,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sink_logits (an empty tensor without sink_logits).

    With the probabilities ``p`` of the forward pass and ``delta = rowsum(p * dp) - dlse``::

        dv = p.T @ dout
        dp = dout @ v.T
        ds = p * (dp - delta)                    # times 1 - tanh(scores / softcap)**2 with one
        dq = scale * ds @ k
        dk = scale * ds.T @ q
        dsinks = -sum(exp(sink_logits - lse) * delta)

    The probabilities are computed anew from whole rows, more exactly than from out and lse.
    """
    dtype = compute_dtype(q.dtype)
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
    dsinks = torch.zeros(0 if sink_logits is None else num_heads, dtype=dtype, device=q.device)
    keys, values = k.to(dtype).unsqueeze(2), v.to(dtype).unsqueeze(2)
    for start, stop in _chunks(q, k):
        queries, grads, dnorm = (
            _grouped(x[:, :, start:stop].to(dtype), num_kv_heads) for x in (q, dout, dlse)
        )
        mask = layout.visible(start, stop, is_causal=is_causal, num_heads=num_heads)
        mask = _grouped(mask, num_kv_heads)
        scores, slope = _scores(queries, keys, scale, softcap)
        probs, share, _ = _softmax(scores, mask, sink_logits)
        dprobs = torch.where(mask, grads @ values.mT, 0)
        delta = (probs * dprobs).sum(-1) - dnorm
        dscores = probs * (dprobs - delta[..., None])
        dscores = scale * (dscores if slope is None else dscores * slope)
        dscores = torch.where(mask, dscores, 0)
        dv += _visible_product(probs.mT, grads, mask.mT).sum(2)
        dq[:, :, start:stop] = _visible_product(dscores, keys, mask).flatten(1, 2).to(q.dtype)
        dk += _visible_product(dscores.mT, queries, mask.mT).sum(2)
        if sink_logits is not None:
            dsinks -= (share * delta).flatten(1, 2).sum((0, 2))
    return (
        dq,
        dk.to(k.dtype),
        dv.to(v.dtype),
        dsinks if sink_logits is None else dsinks.to(sink_logits.dtype),
    )
