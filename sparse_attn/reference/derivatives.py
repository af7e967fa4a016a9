"""Derivatives that the op pair does not compute: forward-mode ones, and those of gradients.

Both go through plain torch operations on the scores of some rows at a time: right, slow, and
differentiable as often as asked for, by every transform of torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract.dtypes import compute_dtype
from ..layout import BlockLayout

_CHUNK_ELEMENTS = 2**22


def _chunks(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    rows = max(1, _CHUNK_ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    starts = range(0, max(1, q.shape[2]), rows)  # one chunk if there are no rows
    return [(start, min(start + rows, q.shape[2])) for start in starts]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of the rows of q, of which `mask` ``[B', H, rows, seqlen_kv]`` says what they
    see.
    """
    dtype, group = compute_dtype(q.dtype), (k.shape[1], q.shape[1] // k.shape[1])
    mask = mask.unflatten(1, group)
    scores = scale * (q.to(dtype).unflatten(1, group) @ k.to(dtype).unsqueeze(2).mT)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sink_logits is None:
        # The softmax of nothing, and its derivatives, would be NaN.
        empty = ~mask.any(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0.0)
        lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    else:
        column = sink_logits.to(dtype).view(1, *group, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
        lse = scores.logsumexp(-1)
    probs = scores.softmax(-1)[..., : k.shape[2]].masked_fill(~mask, 0.0)
    out = probs @ v.to(dtype).unsqueeze(2)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


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
    """The same as `reference.attention.attention`, for any transform of functions."""
    parts = []
    for start, stop in _chunks(q, k):
        mask = layout.visible(start, stop, is_causal=is_causal, num_heads=q.shape[1])
        parts.append(_attend(q[:, :, start:stop], k, v, mask, sink_logits, scale, softcap))
    out, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return out, lse


def of_gradients(
    cotangents: tuple[Tensor, ...],
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
) -> tuple[Tensor | None, ...]:
    """What `reference.attention_backward` passes back.

    Args:
        cotangents: of dq, dk, dv and dsinks.
        dout, dlse, q, k, v, layout, scale, softcap, is_causal, sink_logits: as there.

    Returns:
        tuple[Tensor | None, ...]: gradients of dout, dlse, q, k, v and sink_logits
        (None without them).
    """
    to_dq, *to_others = cotangents[: 3 if sink_logits is None else 4]
    shared = (k, v) if sink_logits is None else (k, v, sink_logits)
    by_row, sums = [], None
    for start, stop in _chunks(q, k):
        mask = layout.visible(start, stop, is_causal=is_causal, num_heads=q.shape[1])

        def attend(rows: Tensor, k: Tensor, v: Tensor, sink_logits=None, mask=mask):
            return _attend(rows, k, v, mask, sink_logits, scale, softcap)

        def gradients(dout: Tensor, dlse: Tensor, *inputs: Tensor, attend=attend):
            return torch.func.vjp(attend, *inputs)[1]((dout, dlse))

        rows = (x[:, :, start:stop] for x in (dout, dlse, q))
        pull = torch.func.vjp(gradients, *rows, *shared)[1]
        ddout, ddlse, dq, *others = pull((to_dq[:, :, start:stop], *to_others))
        by_row.append((ddout, ddlse, dq))
        sums = others if sums is None else [a + b for a, b in zip(sums, others, strict=True)]
    joined = (torch.cat(x, 2) for x in zip(*by_row, strict=True))
    return (*joined, *sums, *[None] * (sink_logits is None))
