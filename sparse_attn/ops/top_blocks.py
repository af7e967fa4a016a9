"""The op that keeps the blocks of highest score in each row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import top_blocks as reference
from .register import register


def top_blocks(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The op where it is compiled (float32), else the reference.

    Args:
        scores: float ``[..., Mq, Mkv]``; -inf and NaN are never chosen, and take no place of
            the `top_k`.
        top_k: blocks to keep, at least 1.

    Returns:
        tuple[Tensor, Tensor]: int32 ``(kv_num_blocks [..., Mq], kv_indices [..., Mq, min(top_k,
        Mkv)])``, ascending in each row.
    """
    if scores.dtype == torch.float32:
        return torch.ops.sparse_attn.top_blocks.default(scores.contiguous(), top_k)
    return reference.top_blocks(scores, top_k)


def _fake(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = scores.shape[:-1]
    return (
        scores.new_empty(shape, dtype=torch.int32),
        scores.new_empty((*shape, min(top_k, scores.shape[-1])), dtype=torch.int32),
    )


register(
    "top_blocks",
    "(Tensor scores, int top_k) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.top_blocks,
)
