"""What is added to the scores of visible keys: a bias for each key, and ALiBi's distances."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..layout.lists import spread_heads


def score_bias(
    layout: BlockLayout,
    start: int,
    stop: int,
    dtype: torch.dtype,
    num_heads: int,
    key_bias: Tensor | None,
    alibi_slopes: Tensor | None,
) -> Tensor | None:
    """``key_bias[b, h, j] - alibi_slopes[h] * |p - j|`` for the rows ``[start, stop)``, which stand
    at ``p = i + seqlen_kv - seqlen_q``: ``[B', H, rows or 1, Skv]``, or None without either.
    """
    bias = None
    if key_bias is not None:
        bias = spread_heads(key_bias.to(dtype), 1, num_heads)[:, :, None]
    if alibi_slopes is not None:
        distances = alibi_slopes.to(dtype)[:, None, None] * -_distances(layout, start, stop, dtype)
        bias = distances[None] if bias is None else bias + distances
    return bias


def bias_gradients(
    dscores: Tensor,
    layout: BlockLayout,
    start: int,
    key_bias: Tensor | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of key_bias and alibi_slopes from those of some rows' scores ``[B, H, rows,
    Skv]``.
    """
    dkey_bias = dslopes = None
    if key_bias is not None:
        by_key = dscores.sum(2)
        by_key = by_key.unflatten(1, (key_bias.shape[1], -1)).sum(2)
        dkey_bias = by_key.sum(0, keepdim=True) if len(key_bias) == 1 else by_key
    if alibi_slopes is not None:
        distances = _distances(layout, start, start + dscores.shape[2], dscores.dtype)
        dslopes = -(dscores * distances).sum((0, 2, 3))
    return dkey_bias, dslopes


def _distances(layout: BlockLayout, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    rows = torch.arange(start, stop, device=layout.device) + layout.seqlen_kv - layout.seqlen_q
    keys = torch.arange(layout.seqlen_kv, device=layout.device)
    return (rows[:, None] - keys).abs().to(dtype)
