"""What selectors look at in q and k, besides pooled rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Without such units torch multiplies bfloat16 at a tenth of the speed of float32.
# Older versions of torch do not tell.
_capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
_CPU_MULTIPLIES_BFLOAT16 = any(_capabilities.get(x) for x in ("avx512_bf16", "amx_bf16", "bf16"))


def softmax_scale(q: Tensor, scale: float | None) -> float:
    """`scale`, or ``1 / sqrt(head_dim)`` if it is None."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def products(q: Tensor, k: Tensor) -> Tensor:
    """``q @ k.T`` of each head, ``[B, H, M, D]`` and ``[B, Hkv, N, D]`` to ``[B, H, M, N]``.

    Keys are not repeated for grouped heads. Results are rounded to bfloat16 if both are, which is
    enough to rank sums, and the processor multiplies bfloat16; float16 becomes float32, as such
    products could exceed its range.
    """
    in_pairs = q.device.type != "cpu" or _CPU_MULTIPLIES_BFLOAT16
    if q.dtype != torch.bfloat16 or k.dtype != q.dtype or not in_pairs:
        q, k = (x if x.dtype == torch.float64 else x.float() for x in (q, k))
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return (grouped @ k.mT).view(*q.shape[:3], k.shape[2])


def last_rows_mass(q: Tensor, k: Tensor, rows: int, scale: float | None) -> tuple[Tensor, Tensor]:
    """What the last `rows` rows attend to, causally, by key and by distance.

    With ``P = softmax(scale * q[-rows:] @ k.T)``, of which row ``i`` stands at position ``p``::

        by_key[j] = sum over i of P[i, j]
        by_distance[d] = sum over i of P[i, p - d]

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, Hkv, Skv, D]``.
        rows: how many rows; all of them if q has fewer.
        scale: as in `sparse_attention`.

    Returns:
        tuple[Tensor, Tensor]: float32 ``(by_key [B, H, Skv], by_distance [B, H, Skv])``.
    """
    seqlen_kv, rows = k.shape[2], min(rows, q.shape[2])
    # The last row and the last key first: row i's own key is then key i, at distance 0.
    queries = q[:, :, q.shape[2] - rows :].flip(2).float() * softmax_scale(q, scale)
    queries = queries.unflatten(1, (k.shape[1], -1))
    ahead = torch.ones(rows, seqlen_kv, dtype=torch.bool, device=q.device).tril(-1)
    by_key, by_distance = q.new_empty((2, *queries.shape[:3], seqlen_kv), dtype=torch.float32)
    for b in range(q.shape[0]):
        for head in range(k.shape[1]):
            scores = queries[b, head] @ k[b, head].flip(0).float().mT
            mass = scores.masked_fill_(ahead, -torch.inf).softmax(-1).nan_to_num_(0.0)
            by_key[b, head] = mass.sum(1).flip(1)
            by_distance[b, head] = _sum_diagonals(mass)
    return by_key.flatten(1, 2), by_distance.flatten(1, 2)


def _sum_diagonals(x: Tensor) -> Tensor:
    """``sum over i of x[..., i, i + d]`` for each ``d``: ``[..., M, N]`` to ``[..., N]``.

    In memory where row ``i`` begins at ``i * (N + M)``, rows of ``N + M + 1`` begin one further on
    from one to the next.
    """
    rows, width = x.shape[-2], sum(x.shape[-2:])
    memory = x.new_zeros(*x.shape[:-2], rows * (width + 1))
    memory[..., : rows * width].unflatten(-1, (rows, width))[..., : x.shape[-1]] = x
    return memory.unflatten(-1, (rows, width + 1))[..., : x.shape[-1]].sum(-2)
