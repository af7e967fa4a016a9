"""Rules from scores to block lists."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import library


def top_blocks(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` blocks of highest score in each row; a score of -inf or NaN is never chosen.

    Args:
        scores: float ``[..., Mq, Mkv]``.
        top_k: blocks to keep, at least 1; rows with fewer finite scores keep those they have.

    Returns:
        tuple[Tensor, Tensor]: int32 ``(kv_num_blocks [..., Mq], kv_indices [..., Mq, min(top_k,
        Mkv)])``, ascending in each row. Among equal scores at the boundary the C++ kernel (float32
        on a CPU) chooses the earlier ones, elsewhere the choice is `torch.topk`'s.

    Raises:
        ValueError: if `top_k` is less than 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if scores.dtype == torch.float32:
        return torch.ops.sparse_attn.top_blocks.default(scores.contiguous(), top_k)
    return _top_blocks(scores, top_k)


def _top_blocks(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    width = min(top_k, scores.shape[-1])
    values, picked = scores.topk(width, dim=-1, sorted=False)
    chosen = values > -torch.inf
    ordered = torch.where(chosen, picked, scores.shape[-1]).sort(dim=-1).values
    counts = chosen.sum(-1, dtype=torch.int32)
    return counts, ordered.int()


def _fake_top_blocks(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = scores.shape[:-1]
    return (
        scores.new_empty(shape, dtype=torch.int32),
        scores.new_empty((*shape, min(top_k, scores.shape[-1])), dtype=torch.int32),
    )


library.define(
    "top_blocks(Tensor scores, int top_k) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("top_blocks", _top_blocks, "CompositeExplicitAutograd")
torch.library.register_fake("sparse_attn::top_blocks", _fake_top_blocks, lib=library)
