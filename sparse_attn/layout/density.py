"""The share of all (query, key) pairs that a layout sees, counted without the pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import as_bool
from .fields import Fields
from .lists import listed, spread_heads


def density(layout: Fields, *, is_causal: bool) -> float:
    num_heads, is_causal = layout.num_heads, as_bool("is_causal", is_causal)
    kept, total = _count_static(layout, is_causal, num_heads)
    widths = [x.shape[-1] for x in (layout.kv_indices, layout.column_indices) if x is not None]
    if widths:
        blocks = max(1, 2**22 // (layout.batch * num_heads * max(*widths, 1)))
        for start in range(0, layout.num_q_blocks, blocks):
            stop = min(start + blocks, layout.num_q_blocks)
            kept += _count_listed(layout, start, stop, is_causal, num_heads)
    return kept / total if total else 0.0


def _count_static(layout: Fields, is_causal: bool, num_heads: int) -> tuple[int, int]:
    """(pairs seen through sink or window, all pairs), summed over batch and heads."""
    position = torch.arange(layout.seqlen_q, device=layout.device)
    position += layout.seqlen_kv - layout.seqlen_q
    every = torch.full_like(position, layout.seqlen_kv)
    limit = (position + 1).clamp(0, layout.seqlen_kv) if is_causal else every
    sink = torch.minimum(spread_heads(layout.sink, 0, num_heads)[:, None], limit)
    window = spread_heads(layout.window, 0, num_heads)[:, None].long()
    low = torch.where(window == -1, 0, position + 1 - window)
    high = torch.where(window == -1, every, position + window.clamp(min=1))
    high = torch.minimum(high, limit)
    seen = sink + (high - torch.maximum(low, sink)).clamp(min=0) * (window != 0)
    return layout.batch * int(seen.sum()), layout.batch * num_heads * int(limit.sum())


def _count_listed(layout: Fields, start: int, stop: int, is_causal: bool, heads: int) -> int:
    """Pairs seen through lists only, in query blocks ``[start, stop)``, over batch and heads."""
    block_q, block_kv = layout.block_size
    blocks = torch.arange(start, stop, device=layout.device)
    off = layout.seqlen_kv - layout.seqlen_q
    first = (blocks * block_q + off)[:, None]
    last = ((blocks + 1) * block_q).clamp(max=layout.seqlen_q)[:, None] - 1 + off
    sink = spread_heads(layout.sink, 0, heads)[:, None, None].long()
    window = spread_heads(layout.window, 0, heads)[:, None, None].long()

    def count(begin: Tensor, end: Tensor, keep: Tensor) -> int:
        begin, end = torch.maximum(begin, sink), end.clamp(max=layout.seqlen_kv)
        pairs = _pairs_behind(begin, end, first, last, window)
        if not is_causal:
            # Mirrored at 0, keys ahead of a row are keys behind it; at least one key ahead.
            ahead = torch.where(window == -1, -1, window.clamp(min=1))
            pairs = pairs + _pairs_behind(1 - end, 1 - begin, -last, -first, ahead)
        return int((pairs * keep).sum()) * (layout.batch // len(keep))

    total = 0
    if layout.kv_num_blocks is not None:
        counts = spread_heads(layout.kv_num_blocks[:, :, start:stop], 1, heads)
        indices = spread_heads(layout.kv_indices[:, :, start:stop], 1, heads)
        begin = indices.long() * block_kv
        total += count(begin, begin + block_kv, listed(counts, indices))
    if layout.num_columns is not None:
        groups = blocks // layout.column_group
        counts = spread_heads(layout.num_columns[:, :, groups], 1, heads)
        columns = spread_heads(layout.column_indices[:, :, groups], 1, heads)
        keep = listed(counts, columns)
        if layout.kv_num_blocks is not None:
            keep = keep & ~_in_blocks(layout, columns, blocks, heads)
        total += count(columns.long(), columns.long() + 1, keep)
    return total


def _pairs_behind(begin: Tensor, end: Tensor, first: Tensor, last: Tensor, gap: Tensor) -> Tensor:
    """Pairs of rows p in ``[first, last]`` and keys j in ``[begin, end)`` with ``p - j >= gap``.

    Row p has ``clamp(p - gap + 1 - begin, 0, end - begin)`` of them; a gap of -1 means no pair.
    """
    length = (end - begin).clamp(min=0)

    def up_to(row: Tensor) -> Tensor:
        steps = (row - gap + 1 - begin).clamp(min=0)
        rising = torch.minimum(steps, length)
        return rising * (rising + 1) // 2 + (steps - rising) * length

    return torch.where(gap == -1, 0, up_to(last) - up_to(first - 1))


def _in_blocks(layout: Fields, columns: Tensor, q_blocks: Tensor, num_heads: int) -> Tensor:
    """Whether each of ``columns [B', H, rows, width]`` lies in a listed block of its row."""
    counts = spread_heads(layout.kv_num_blocks, 1, num_heads)[:, :, q_blocks]
    indices = spread_heads(layout.kv_indices, 1, num_heads)[:, :, q_blocks]
    if indices.shape[-1] == 0:
        return torch.zeros_like(columns, dtype=torch.bool)
    ascending = torch.where(listed(counts, indices), indices, layout.num_kv_blocks)
    batch = max(len(columns), len(ascending))
    ascending = ascending.expand(batch, -1, -1, -1).contiguous()
    blocks = (columns // layout.block_size[1]).expand(batch, -1, -1, -1).contiguous()
    slots = torch.searchsorted(ascending, blocks).clamp(max=indices.shape[-1] - 1)
    return ascending.gather(-1, slots) == blocks
