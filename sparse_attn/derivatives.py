"""Derivatives that the op pair does not compute: forward-mode ones, and those of gradients.

Both go through `reference.attend`, plain torch operations on ``[rows, seqlen_kv]`` scores: right,
slow, and differentiable as often as asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .layout import BlockLayout


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
    """The same as `reference.attention`, for any transform of functions."""
    parts = []
    for start, stop in reference.chunks(q, k):
        mask = layout.visible(start, stop, is_causal=is_causal, num_heads=q.shape[1])
        rows = q[:, :, start:stop]
        parts.append(reference.attend(rows, k, v, mask, sinks, scale=scale, softcap=softcap))
    if not parts:
        return reference.attention(
            q, k, v, layout, sinks, scale=scale, softcap=softcap, is_causal=is_causal
        )
    out, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return out.to(q.dtype), lse


def of_gradients(
    cotangents: tuple[Tensor, ...],
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
) -> tuple[Tensor | None, ...]:
    """What `reference.attention_backward` passes back.

    Args:
        cotangents: of dq, dk, dv and dsinks.
        dout, dlse, q, k, v, layout, sinks, scale, softcap, is_causal: as there.

    Returns:
        tuple[Tensor | None, ...]: gradients of dout, dlse, q, k, v and sinks (None without sinks).
    """
    to_dq, *to_others = cotangents[: 3 if sinks is None else 4]
    shared = (k, v) if sinks is None else (k, v, sinks)
    by_row, sums = [], None
    for start, stop in reference.chunks(q, k):
        mask = layout.visible(start, stop, is_causal=is_causal, num_heads=q.shape[1])

        def attend(rows: Tensor, k: Tensor, v: Tensor, sinks=None, mask=mask):
            out, lse = reference.attend(rows, k, v, mask, sinks, scale=scale, softcap=softcap)
            return out.to(rows.dtype), lse

        def gradients(dout: Tensor, dlse: Tensor, *inputs: Tensor, attend=attend):
            return torch.func.vjp(attend, *inputs)[1]((dout, dlse))

        rows = (x[:, :, start:stop] for x in (dout, dlse, q))
        pull = torch.func.vjp(gradients, *rows, *shared)[1]
        ddout, ddlse, dq, *others = pull((to_dq[:, :, start:stop], *to_others))
        by_row.append((ddout, ddlse, dq))
        sums = others if sums is None else [a + b for a, b in zip(sums, others, strict=True)]
    if sums is None:  # no rows
        return (*(torch.zeros_like(x) for x in (dout, dlse, q, *shared)), *[None] * (sinks is None))
    joined = (torch.cat(x, 2) for x in zip(*by_row, strict=True))
    return (*joined, *sums, *[None] * (sinks is None))
