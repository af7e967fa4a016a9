"""Lists of key blocks or of columns, one for each query block (or group of them)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class IndexLists(NamedTuple):
    """``indices [B', H', rows, width]`` of which the first ``counts [B', H', rows]`` of each row
    count, both int32; ascending, without duplicates.
    """

    counts: Tensor
    indices: Tensor

    def listed(self) -> Tensor:
        """Which entries lie before their count: bool, of the shape of `indices`."""
        return listed(*self)

    def filled(self, nothing: int) -> Tensor:
        """The indices, `nothing` behind each count."""
        return torch.where(self.listed(), self.indices, nothing)

    def expanded(self, num_heads: int) -> IndexLists:
        """The same lists, spelled out for `num_heads` heads."""
        return IndexLists(*(spread_heads(x, 1, num_heads) for x in self))

    def of_rows(self, rows: slice | Tensor) -> IndexLists:
        """The lists of some rows."""
        return IndexLists(self.counts[:, :, rows], self.indices[:, :, rows])

    def repeated(self, times: int, num_rows: int) -> IndexLists:
        """Each list `times` times, of which the first `num_rows` are kept."""
        return IndexLists(*(x.repeat_interleave(times, 2)[:, :, :num_rows] for x in self))

    def table(self, size: int) -> Tensor:
        """The lists as a bool table ``[B', H', rows, size]``."""
        found = torch.zeros(
            *self.counts.shape, size + 1, dtype=torch.bool, device=self.counts.device
        )
        return found.scatter_(-1, self.filled(size).long(), True)[..., :size]


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Which entries of ``indices [..., width]`` lie before their count."""
    return torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]


def spread_heads(x: Tensor, dim: int, num_heads: int) -> Tensor:
    """Repeat each entry of the head dimension so that it has `num_heads`."""
    times = num_heads // x.shape[dim]
    return x if times == 1 else x.repeat_interleave(times, dim)


def compact(rows: Tensor, cols: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Sorted (row, column) pairs as int32 lists ``(counts [num_rows], indices [num_rows,
    width])``.
    """
    counts = torch.bincount(rows, minlength=num_rows)
    width = int(counts.max()) if num_rows else 0
    first = counts.cumsum(0) - counts
    slots = torch.arange(len(rows), device=rows.device) - first[rows]
    indices = torch.zeros(num_rows, width, dtype=torch.int32, device=rows.device)
    indices[rows, slots] = cols.int()
    return counts.int(), indices


def ascending(entries: Tensor, nothing: int) -> tuple[Tensor, Tensor]:
    """Each row of int32 ``entries [..., n]`` as an ascending list without duplicates.

    Args:
        entries: in any order, at most `nothing`.
        nothing: the value that stands for no entry.

    Returns:
        tuple[Tensor, Tensor]: int32 ``(counts [...], indices [..., width])``.
    """
    entries = entries.sort(-1).values
    repeated = entries[..., 1:] == entries[..., :-1]
    entries[..., 1:].masked_fill_(repeated, nothing)
    counts = (entries < nothing).sum(-1, dtype=torch.int32)
    width = int(counts.max()) if counts.numel() else 0
    return counts, entries.sort(-1).values[..., :width].contiguous()
