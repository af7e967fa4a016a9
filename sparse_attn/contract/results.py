"""The tensors that the attention ops return: out, and lse ``[B, H, Sq]`` in the dtype of sums."""

from __future__ import annotations

from torch import Tensor

from .dtypes import compute_dtype


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """``[B, H, Sq, Dv]`` in q's dtype; laid out in memory as ``[B, Sq, H, Dv]`` if q is."""
    batch, heads, rows = q.shape[:3]
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
    return q.new_empty(batch, heads, rows, v.shape[-1])


def empty_lse(q: Tensor) -> Tensor:
    """``[B, H, Sq]``, the natural log of each row's softmax denominator."""
    return q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))
