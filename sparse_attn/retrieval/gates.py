"""Retrieval heads by trained gates, as DuoAttention publishes them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ..checks import as_number
from .heads import check_heads, greatest, shared_by_groups


def load_gates(path: str | Path) -> Tensor:
    """The gates of a ``full_attention_heads.tsv`` of DuoAttention (arXiv 2410.10819): a line for
    each layer, a number for each KV head.

    Args:
        path: the file.

    Returns:
        Tensor: float64 ``[layers, kv_heads]``, in [0, 1].

    Raises:
        ValueError: if the lines differ in length, or hold no numbers.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w") as file:
        ...     print("0.9 0.1", "0.2 0.8", sep=chr(10), file=file, flush=True)
        ...     gates = load_gates(file.name)
        >>> gates.shape
        torch.Size([2, 2])
    """
    rows = [line.split() for line in Path(path).read_text().splitlines() if line.strip()]
    if not rows or len({len(row) for row in rows}) > 1:
        raise ValueError(f"path: {path} must have as many numbers in each line")
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64).clamp(0, 1)


def full_heads(gates: Tensor, *, sparsity: float, num_heads: int) -> Tensor:
    """The heads whose gate is at least the `sparsity` quantile of all gates.

    Args:
        gates: ``[layers, kv_heads]``.
        sparsity: share of the KV heads that are not kept whole: none at 0, all at 1. The paper uses
            0.5 with grouped heads, 0.75 without. Of equal gates the earlier is kept.
        num_heads: number of query heads of a layer.

    Returns:
        Tensor: bool ``[layers, num_heads]``.

    Raises:
        ValueError: if sparsity is out of range, or kv_heads does not divide `num_heads`.

    Example:
        >>> full_heads(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), sparsity=0.5, num_heads=2)
        tensor([[ True, False],
                [False,  True]])
    """
    check_heads("gates", gates)
    sparsity = as_number("sparsity", sparsity, 0, 1)
    count = gates.numel() - math.ceil((gates.numel() - 1) * sparsity) if sparsity < 1 else 0
    return shared_by_groups(greatest(gates, count), num_heads)
