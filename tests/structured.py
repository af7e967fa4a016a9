"""Synthetic q, k with the structure of real attention: i.i.d. noise is a degenerate test for a
selector.
"""

from __future__ import annotations

import torch
from torch import Tensor


def structured_qk(
    seqlen: int = 1024, *, heads: int = 4, kv_heads: int = 2, dim: int = 64, needles: int = 3
):
    """q ``[1, heads, seqlen, dim]``, k ``[1, kv_heads, seqlen, dim]`` and the needles' positions.

    A sum of parts: a sink (every query likes the first keys), columns shared by all rows, a rotary
    local band, needles that only the last 64 rows ask for, and noise.
    """
    group = heads // kv_heads
    q = 0.3 * torch.randn(1, heads, seqlen, dim)
    k = 0.3 * torch.randn(1, kv_heads, seqlen, dim)
    likes = torch.nn.functional.normalize(torch.randn(kv_heads, 3, dim), dim=-1)
    columns = torch.randperm(seqlen)[: seqlen // 64]
    k[0, :, :4] += 8 * likes[:, :1]
    k[0, :, columns] += 5 * likes[:, 1:2]
    at = torch.linspace(seqlen // 8, seqlen // 2, needles).long()
    k[0, :, at] += 9 * likes[:, 2:]
    likes = likes.repeat_interleave(group, 0)
    q[0] += 2 * likes[:, :1] + 2 * likes[:, 1:2]
    q[0, :, -64:] += 12 * likes[:, 2:]
    band = _rotary(seqlen, dim)
    return q + 0.7 * band, k + 0.7 * band, at


def _rotary(seqlen: int, dim: int) -> Tensor:
    angles = torch.arange(seqlen)[:, None] * 0.3 ** torch.linspace(0, 3, dim // 2)
    return torch.cat([angles.cos(), angles.sin()], -1) / (dim // 2) ** 0.25
