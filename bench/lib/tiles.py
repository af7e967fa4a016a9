"""What of a layout a tiled kernel multiplies and reads, counted from its lists.

Nothing here takes memory of the order of seqlen_q x seqlen_kv.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn import BlockLayout

LEAST_ROWS = 64  # of the tensor-core instructions of sm_90 and sm_100


def all_pairs(layout: BlockLayout, is_causal: bool) -> int:
    """(query, key) pairs of one head, those behind the diagonal if causal."""
    seqlen_q, seqlen_kv = layout.seqlens
    if not is_causal:
        return seqlen_q * seqlen_kv
    rows = min(seqlen_q, seqlen_kv)  # rows before key 0 have no pairs
    return rows * (seqlen_kv - rows) + rows * (rows + 1) // 2


def tiles_touched(
    layout: BlockLayout, tile: tuple[int, int], *, pack: int = 1, is_causal: bool = True
) -> tuple[float, int]:
    """Tiles that a kernel multiplies for `pack` heads, on average over heads and batch, and how
    high they are.

    A tile holds the rows of `pack` heads within one query block, as another block has other lists;
    it is no higher than a query block needs, but costs as much as `LEAST_ROWS`. It goes over sink
    and window, over the listed blocks, and over the columns, each gathered into tiles of keys that
    end where the last row does.
    """
    step = _rows_that_share_lists(layout) or max(1, tile[0] // pack)
    step = min(step, max(layout.seqlen_q, 1))
    height = min(tile[0], max(LEAST_ROWS, 1 << (step * pack - 1).bit_length()))
    heads = [layout[b, h] for b in range(layout.batch) for h in range(layout.num_heads)]
    counts = [_tiles_of_head(x, step, height, pack, tile[1], is_causal) for x in heads]
    return sum(counts) / len(counts), height


def _rows_that_share_lists(layout: BlockLayout) -> int | None:
    block_q = layout.block_size[0]
    if layout.kv_num_blocks is not None:
        return block_q
    return block_q * layout.column_group if layout.num_columns is not None else None


def _tiles_of_head(
    layout: BlockLayout, step: int, height: int, pack: int, width: int, is_causal: bool
) -> int:
    seqlen_q, seqlen_kv = layout.seqlens
    block = torch.arange(0, seqlen_q, step)[:, None]
    slot = torch.arange(0, step * pack, height)
    end = (block + step).clamp(max=seqlen_q)
    first = block + slot // pack
    inside = first < end
    last = torch.minimum(block + (slot + height - 1) // pack, end - 1)[inside]
    first = first[inside]
    q_block = first // layout.block_size[0]
    first, last = first + seqlen_kv - seqlen_q, last + seqlen_kv - seqlen_q
    limit = (last + 1).clamp(0, seqlen_kv) if is_causal else torch.full_like(last, seqlen_kv)

    keys = [*_band(layout, first, last, limit, is_causal)]
    if layout.kv_num_blocks is not None:
        keys.append(_listed_before(layout, q_block, limit))
    if layout.num_columns is not None:
        keys.append(_columns_before(layout, q_block // layout.column_group, limit))
    return sum(int(((x + width - 1) // width).sum()) for x in keys)


def _band(
    layout: BlockLayout, first: Tensor, last: Tensor, limit: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Keys of sink and window for rows at positions `first` to `last`; all in the second where the
    two meet.
    """
    sink = limit.clamp(max=int(layout.sink))
    window = int(layout.window)
    if window == 0:
        return sink, torch.zeros_like(sink)
    if window == -1:
        return torch.zeros_like(sink), limit
    begin = (first + 1 - window).clamp(min=0)
    end = limit if is_causal else torch.minimum(limit, last + window)
    meet = begin <= sink
    together = torch.where(meet, torch.maximum(end, sink), end - begin)
    return torch.where(meet, 0, sink), together.clamp(min=0)


def _listed_before(layout: BlockLayout, q_block: Tensor, limit: Tensor) -> Tensor:
    """For each tile of rows, how many keys of its listed blocks lie before `limit`."""
    block_kv, width = layout.block_size[1], layout.kv_indices.shape[-1]
    keys = torch.zeros_like(limit)
    for rows in torch.arange(len(limit)).split(max(1, 2**24 // max(1, width))):
        counts = layout.kv_num_blocks[0, 0, q_block[rows]]
        begin = layout.kv_indices[0, 0, q_block[rows]].long() * block_kv
        kept = torch.arange(width) < counts[:, None]
        keys[rows] = ((limit[rows, None] - begin).clamp(0, block_kv) * kept).sum(-1)
    return keys


def _columns_before(layout: BlockLayout, group: Tensor, limit: Tensor) -> Tensor:
    """For each tile of rows, how many of its group's columns lie before `limit`."""
    columns, counts = layout.column_indices[0, 0].long(), layout.num_columns[0, 0].long()
    groups, width = columns.shape
    stride = layout.seqlen_kv + 1
    columns = torch.where(torch.arange(width) < counts[:, None], columns, layout.seqlen_kv)
    ascending = (columns + torch.arange(groups)[:, None] * stride).flatten()
    return torch.searchsorted(ascending, group * stride + limit) - group * width


def keys_touched(layout: BlockLayout, kv_heads: int, *, is_causal: bool = True) -> float:
    """Keys of a KV head that a row of its group sees, on average over batch and heads."""
    heads = max(layout.num_heads, kv_heads)
    spread = [
        _seen_by_a_head(layout[b, h], is_causal)
        for b in range(layout.batch)
        for h in range(layout.num_heads)
    ]
    seen = torch.stack(spread).view(layout.batch, layout.num_heads, -1)
    seen = seen.repeat_interleave(heads // layout.num_heads, 1)
    return float(seen.unflatten(1, (kv_heads, -1)).any(2).sum(-1).double().mean())


def _seen_by_a_head(layout: BlockLayout, is_causal: bool) -> Tensor:
    """Whether any row sees each key: bool ``[seqlen_kv]``."""
    seqlen_q, seqlen_kv = layout.seqlens
    block_q, block_kv = layout.block_size
    key = torch.arange(seqlen_kv)
    if seqlen_q == 0:
        return key < 0
    sink, window = int(layout.sink), int(layout.window)
    ahead = seqlen_kv if window == -1 else window
    low = 0 if window == -1 else seqlen_kv - seqlen_q + 1 - window
    high = seqlen_kv if is_causal else seqlen_kv - 1 + ahead
    seen = (key < sink) | ((low <= key) & (key < high) & (window != 0))

    def listed(counts: Tensor, indices: Tensor, size: int, rows: int) -> Tensor:
        """Keys in listed runs of `size`, before the last of the `rows` that share a list."""
        counts, indices = counts[0, 0], indices[0, 0].long()
        last = (torch.arange(1, len(counts) + 1) * rows).clamp(max=seqlen_q) - 1
        limit = (last + 1 + seqlen_kv - seqlen_q).clamp(0, seqlen_kv)
        limit = limit if is_causal else torch.full_like(limit, seqlen_kv)
        kept = torch.arange(indices.shape[-1]) < counts[:, None]
        reach = torch.zeros(-(-seqlen_kv // size), dtype=torch.long)
        ends = limit[:, None].expand_as(indices)[kept]
        reach.scatter_reduce_(0, indices[kept], ends, "amax")
        return key < reach[key // size]

    if layout.kv_num_blocks is not None:
        seen |= listed(layout.kv_num_blocks, layout.kv_indices, block_kv, block_q)
    if layout.num_columns is not None:
        rows = block_q * layout.column_group
        seen |= listed(layout.num_columns, layout.column_indices, 1, rows)
    return seen
