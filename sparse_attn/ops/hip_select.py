"""The op of `selectors.HiP`: a tree search for the key blocks of each query block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract.request import Request
from ..reference import hip_select as reference
from ..triton import entry as triton
from ..triton.support import MAX_HIP_SLOTS
from .backends import op_for
from .register import register


def hip_select(
    q: Tensor,
    k: Tensor,
    *,
    slots: int,
    block_q: int,
    block_k: int,
    stride_q: int,
    stride_k: int,
    representatives: int,
    sink: int,
    window: int,
    strict: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """The op on the backend that serves q and k.

    Args:
        q: ``[B, H, Sq, D]``, its last stride 1.
        k: ``[B, Hkv, Skv, D]``, its last stride 1.
        slots: blocks that a list has at most.
        block_q, block_k, stride_q, stride_k, representatives, sink, window, strict, is_causal: as
            in `selectors.HiP`; no key of the last `window` is searched.

    Returns:
        tuple[Tensor, Tensor]: int32 ``(kv_num_blocks [B, H, Mq], kv_indices [B, H, Mq, width])``,
        ascending; ``width = min(slots, Mkv)``.
    """
    numbers = (slots, block_q, block_k, stride_q, stride_k, representatives, sink, window)
    return op_for("auto", Request("hip_select", q, k))(q, k, *numbers, strict, is_causal)


def _on_triton(q: Tensor, k: Tensor, slots: int, *rest: Any) -> tuple[Tensor, Tensor]:
    """The Triton kernel, which holds a limited number of nodes; the reference takes any."""
    select = reference.hip_select if slots > MAX_HIP_SLOTS else triton.hip_select
    return select(q, k, slots, *rest)


def _fake(
    q: Tensor, k: Tensor, slots: int, block_q: int, block_k: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    rows = (*q.shape[:2], -(-q.shape[2] // block_q))
    width = torch.sym_min(slots, -(-k.shape[2] // block_k))
    return q.new_empty(rows, dtype=torch.int32), q.new_empty((*rows, width), dtype=torch.int32)


def _request(q: Tensor, k: Tensor, *rest: Any) -> Request:
    return Request("hip_select", q, k)


register(
    "hip_select",
    "(Tensor q, Tensor k, int slots, int block_q, int block_k, int stride_q, int stride_k, "
    "int representatives, int sink, int window, bool strict, bool is_causal) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.hip_select,
    triton=_on_triton,
    request=_request,
)
