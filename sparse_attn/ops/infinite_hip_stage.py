"""The op of `selectors.InfiniteHiP`: one stage of pruning, for each query block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract.request import Request
from ..reference import infinite_hip_stage as reference
from ..reference.infinite_hip_stage import Lists
from ..triton import entry as triton
from ..triton.support import reasons
from .backends import op_for
from .register import register


def infinite_hip_stage(
    q: Tensor,
    k: Tensor,
    kept: Lists | None,
    *,
    parent: int,
    chunk: int,
    slots: int,
    stride_q: int,
    block_q: int,
    sink: int,
    window: int,
    behind: int,
    shared: bool,
    is_causal: bool,
) -> Lists:
    """The op on the backend that serves q and k.

    Args:
        q: ``[B, H, Sq, D]``, its last stride 1.
        k: ``[B, Hkv, Skv, D]``, its last stride 1.
        kept: the lists of the stage before, or None for the first one.
        parent: keys of a chunk of the stage before.
        chunk: keys of a chunk.
        slots: chunks that a list has at most.
        stride_q, block_q, sink, window, shared, is_causal: as in `selectors.InfiniteHiP`.
        behind: a chunk must begin so many keys before a query block's first row.

    Returns:
        tuple[Tensor, Tensor]: int32 ``(counts [B, H or 1, Mq], indices [B, H or 1, Mq, width])``,
        ascending; ``width = min(slots, chunks)``.
    """
    numbers = (parent, chunk, slots, stride_q, block_q, sink, window, behind)
    op = op_for("auto", Request("infinite_hip_stage", q, k))
    return op(q, k, *(kept or (None, None)), *numbers, shared, is_causal)


def _request(q: Tensor, k: Tensor, *rest: Any) -> Request:
    return Request("infinite_hip_stage", q, k)


def _on_triton(q: Tensor, k: Tensor, *rest: Any) -> Lists:
    """The reference's steps with Triton's scores."""
    if found := reasons(_request(q, k)):
        raise ValueError(f"sparse_attn on Triton: {'; '.join(found)}")
    return reference.infinite_hip_stage(q, k, *rest, score=triton.infinite_hip_scores)


def _fake(
    q: Tensor, k: Tensor, counts: Tensor | None, indices: Tensor | None, parent: int, chunk: int,
    slots: int, stride_q: int, block_q: int, sink: int, window: int, behind: int, shared: bool,
    is_causal: bool,
) -> Lists:  # fmt: skip
    rows = (q.shape[0], 1 if shared else q.shape[1], -(-q.shape[2] // block_q))
    width = torch.sym_min(slots, -(-k.shape[2] // chunk))
    return q.new_empty(rows, dtype=torch.int32), q.new_empty((*rows, width), dtype=torch.int32)


register(
    "infinite_hip_stage",
    "(Tensor q, Tensor k, Tensor? counts, Tensor? indices, int parent, int chunk, int slots, "
    "int stride_q, int block_q, int sink, int window, int behind, bool shared, bool is_causal) "
    "-> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.infinite_hip_stage,
    triton=_on_triton,
    request=_request,
)
