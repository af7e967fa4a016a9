"""The blocks of highest score in each row."""

from __future__ import annotations

import torch
from torch import Tensor


def top_blocks(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The op ``sparse_attn::top_blocks``; among equal scores the choice is `torch.topk`'s. To it
    NaN is the highest, so here NaN becomes -inf.
    """
    width = min(top_k, scores.shape[-1])
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    values, picked = scores.topk(width, dim=-1, sorted=False)
    chosen = values > -torch.inf
    ordered = torch.where(chosen, picked, scores.shape[-1]).sort(dim=-1).values
    counts = chosen.sum(-1, dtype=torch.int32)
    return counts, ordered.int()
