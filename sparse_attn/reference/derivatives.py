"""Derivatives that the op pair does not compute: forward-mode ones, and those of gradients.

Both go through plain torch operations on the scores of some rows at a time: right, slow, and
differentiable as often as asked for, by every transform of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract.arguments import DIFFERENTIABLE
from ..contract.dtypes import compute_dtype
from ..layout import BlockLayout
from .bias import score_bias

_CHUNK_ELEMENTS = 2**22


def _chunks(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    rows = max(1, _CHUNK_ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    starts = range(0, max(1, q.shape[2]), rows)  # one chunk if there are no rows
    return [(start, min(start + rows, q.shape[2])) for start in starts]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: dict[str, Tensor],
    layout: BlockLayout,
    start: int,
    scale: float,
    softcap: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of the rows of q, the first of which is row `start` of the layout; `given` are
    those of sink_logits, key_bias and alibi_slopes that there are.
    """
    dtype, group, stop = compute_dtype(q.dtype), (k.shape[1], -1), start + q.shape[2]
    mask = layout.visible(start, stop, is_causal=is_causal, num_heads=q.shape[1])
    mask = mask.unflatten(1, group)
    scores = scale * (q.to(dtype).unflatten(1, group) @ k.to(dtype).unsqueeze(2).mT)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    biases = (given.get("key_bias"), given.get("alibi_slopes"))
    bias = score_bias(layout, start, stop, dtype, q.shape[1], *biases)
    if bias is not None:
        scores = scores + bias.unflatten(1, group)
    scores = scores.masked_fill(~mask, -torch.inf)
    if "sink_logits" not in given:
        # The softmax of nothing, and its derivatives, would be NaN.
        empty = ~mask.any(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0.0)
        lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    else:
        column = given["sink_logits"].to(dtype).unflatten(0, group)[None, :, :, None, None]
        scores = torch.cat([scores, column.expand(*scores.shape[:-1], 1)], -1)
        lse = scores.logsumexp(-1)
    probs = scores.softmax(-1)[..., : k.shape[2]].masked_fill(~mask, 0.0)
    out = probs @ v.to(dtype).unsqueeze(2)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def _split(scores: dict[str, Any]) -> tuple[dict[str, Tensor], tuple[float, float, bool]]:
    """The differentiable tensors that are there, by name; and scale, softcap and is_causal."""
    given = {name: scores[name] for name in DIFFERENTIABLE if scores[name] is not None}
    return given, (scores["scale"], scores["softcap"], scores["is_causal"])


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, **scores: Any
) -> tuple[Tensor, Tensor]:
    """The same as `reference.attention.attention`, for any transform of functions."""
    given, numbers = _split(scores)
    parts = [
        _attend(q[:, :, start:stop], k, v, given, layout, start, *numbers)
        for start, stop in _chunks(q, k)
    ]
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
    **scores: Any,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """What `reference.attention.attention_backward` passes back.

    Args:
        cotangents: of its results.
        dout, dlse, q, k, v, layout, scores: as there.

    Returns:
        tuple: gradients of ``(dout, dlse, q, k, v)``, and of `DIFFERENTIABLE` (None for one that is
        not there).
    """
    given, numbers = _split(scores)
    to_dq, to_dk, to_dv, *to_given = cotangents
    of_given = zip(DIFFERENTIABLE, to_given, strict=True)
    to_sums = (to_dk, to_dv, *(x for name, x in of_given if name in given))
    by_row, sums = [], None
    for start, stop in _chunks(q, k):

        def attend(rows: Tensor, k: Tensor, v: Tensor, *some: Tensor, start=start):
            named = dict(zip(given, some, strict=True))
            return _attend(rows, k, v, named, layout, start, *numbers)

        def gradients(dout: Tensor, dlse: Tensor, *inputs: Tensor, attend=attend):
            return torch.func.vjp(attend, *inputs)[1]((dout, dlse))

        rows = (x[:, :, start:stop] for x in (dout, dlse, q))
        pull = torch.func.vjp(gradients, *rows, k, v, *given.values())[1]
        ddout, ddlse, dq, *others = pull((to_dq[:, :, start:stop], *to_sums))
        by_row.append((ddout, ddlse, dq))
        sums = others if sums is None else [a + b for a, b in zip(sums, others, strict=True)]
    joined = (torch.cat(x, 2) for x in zip(*by_row, strict=True))
    dk, dv, *dgiven = sums
    found = dict(zip(given, dgiven, strict=True))
    return (*joined, dk, dv), tuple(found.get(name) for name in DIFFERENTIABLE)
