"""Rules from scores to block lists."""

from __future__ import annotations

import torch
from torch import Tensor


def top_blocks(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` blocks of highest score in each row; a score of -inf is never chosen.

    Args:
        scores: float ``[..., Mq, Mkv]``.
        top_k: blocks to keep, at least 1; rows with fewer finite scores keep those they have.

    Returns:
        tuple[Tensor, Tensor]: int32 ``(kv_num_blocks [..., Mq], kv_indices [..., Mq, min(top_k,
        Mkv)])``, ascending in each row. Among equal scores at the boundary the choice is
        `torch.topk`'s.
    """
    width = min(top_k, scores.shape[-1])
    values, picked = scores.topk(width, dim=-1, sorted=False)
    chosen = values > -torch.inf
    ordered = torch.where(chosen, picked, scores.shape[-1]).sort(dim=-1).values
    counts = chosen.sum(-1, dtype=torch.int32)
    return counts, ordered.int()
