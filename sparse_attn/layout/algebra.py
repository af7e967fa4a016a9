"""What can be done with layouts: union, slices, refinement, transposition."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from ..checks import INT32_MAX, as_int, as_pair
from .fields import Fields, Layout, common_heads, with_lists
from .lists import IndexLists, ascending, compact, spread_heads


def expand_heads(layout: Layout, num_heads: int) -> Layout:
    num_heads = common_heads(layout, as_int("num_heads", num_heads, 1))
    return replace(
        layout,
        **{
            name: spread_heads(x, 0 if x.dim() == 1 else 1, num_heads)
            for name, x in layout.tensors().items()
        },
    )


def take(layout: Layout, batch: int | slice, heads: int | slice) -> Layout:
    def as_slice(index: int | slice, size: int, name: str) -> slice:
        if isinstance(index, slice):
            if not range(*index.indices(size)):
                raise IndexError(f"{name} slice {index} is empty for size {size}")
            return index
        index = as_int(name, index)
        if not -size <= index < size:
            raise IndexError(f"{name} index {index} is out of range for size {size}")
        return slice(index % size, index % size + 1)

    head_sizes = {x.shape[0 if x.dim() == 1 else 1] for x in layout.tensors().values()}
    if len(head_sizes - {1}) > 1:
        layout = expand_heads(layout, layout.num_heads)
    by_batch = as_slice(batch, layout.batch, "batch")
    by_head = as_slice(heads, layout.num_heads, "head")
    taken = {}
    for name, x in layout.tensors().items():
        if x.dim() > 1 and x.shape[0] > 1:
            x = x[by_batch]
        dim = 0 if x.dim() == 1 else 1
        if x.shape[dim] > 1:
            x = x[(slice(None),) * dim + (by_head,)]
        taken[name] = x
    return replace(layout, **taken)


def refine(layout: Layout, block_size: tuple[int, int]) -> Layout:
    old, new = layout.block_size, as_pair("block_size", block_size, 1)
    if old[0] % new[0] or old[1] % new[1]:
        raise ValueError(f"block_size {new} must divide the present block size {old}")
    if old == new:
        return layout
    rows, parts = old[0] // new[0], old[1] // new[1]
    fields = {"block_size": new, "column_group": min(layout.column_group * rows, INT32_MAX)}
    if layout.blocks is not None:
        num_q_blocks = -(-layout.seqlen_q // new[0])
        num_kv_blocks = -(-layout.seqlen_kv // new[1])
        rows, parts = min(rows, max(1, num_q_blocks)), min(parts, max(1, num_kv_blocks))
        number = torch.arange(parts, device=layout.device).int()
        indices = (layout.blocks.indices[..., None] * parts + number).flatten(-2)
        blocks = IndexLists(layout.blocks.counts * parts, indices)
        behind = (blocks.listed() & (indices >= num_kv_blocks)).sum(-1, dtype=torch.int32)
        blocks = blocks._replace(counts=blocks.counts - behind).repeated(rows, num_q_blocks)
        fields |= {"kv_num_blocks": blocks.counts, "kv_indices": blocks.indices}
    return replace(layout, **fields)


def _regroup(layout: Layout, column_group: int) -> Layout:
    """Share column lists among fewer query blocks; `column_group` must divide the present one."""
    if layout.columns is None:
        return replace(layout, column_group=column_group)
    num_groups = -(-layout.num_q_blocks // column_group)
    times = min(layout.column_group // column_group, max(1, num_groups))
    lists = with_lists(layout.blocks, layout.columns.repeated(times, num_groups))
    return replace(layout, column_group=column_group, **lists)


def _has_lists(layout: Fields) -> bool:
    return layout.blocks is not None or layout.columns is not None


def align(layouts: list[Layout]) -> list[Layout]:
    """The same layouts in one common block size and column group."""
    if any(x.seqlens != layouts[0].seqlens for x in layouts):
        raise ValueError(f"layouts have different seqlens: {[x.seqlens for x in layouts]}")
    with_lists = [x for x in layouts if _has_lists(x)] or layouts[:1]
    block_size = tuple(gcd(*(x.block_size[i] for x in with_lists)) for i in (0, 1))
    layouts = [
        refine(x, block_size)
        if _has_lists(x)
        else replace(x, block_size=block_size, column_group=1)
        for x in layouts
    ]
    with_columns = [x.column_group for x in layouts if x.columns is not None]
    group = gcd(*with_columns) if with_columns else 1
    return [_regroup(x, group) for x in layouts]


def union(a: Layout, b: Fields) -> Layout:
    a, b = align([a, b])
    num_heads = max(a.num_heads, b.num_heads)
    common_heads(a, num_heads)
    common_heads(b, num_heads)
    sinks = _match(a.sink, b.sink, 0)
    windows = _match(a.window, b.window, 0)
    longer = torch.maximum(*windows)
    return replace(
        a,
        sink=torch.maximum(*sinks),
        window=torch.where((windows[0] == -1) | (windows[1] == -1), -1, longer),
        **with_lists(
            _merged(a.blocks, b.blocks, a.num_kv_blocks), _merged(a.columns, b.columns, a.seqlen_kv)
        ),
    )


def _match(x: Tensor, y: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    heads = max(x.shape[dim], y.shape[dim])
    return spread_heads(x, dim, heads), spread_heads(y, dim, heads)


def _merged(a: IndexLists | None, b: IndexLists | None, size: int) -> IndexLists | None:
    """What either side lists; every index is less than `size`."""
    if a is None or b is None:
        return a or b
    heads = max(a.counts.shape[1], b.counts.shape[1])
    batch = max(a.counts.shape[0], b.counts.shape[0])
    sides = (x.expanded(heads).filled(size).expand(batch, -1, -1, -1) for x in (a, b))
    return IndexLists(*ascending(torch.cat(list(sides), -1), size))


def assemble_heads(layouts: list[Layout], heads: list[list[int]], num_heads: int) -> Layout:
    """One layout in which ``heads[n]`` follow ``layouts[n]``; `heads` must partition
    ``range(num_heads)``.
    """
    layouts = [expand_heads(x, len(h)) for x, h in zip(align(layouts), heads, strict=True)]
    order = torch.tensor([h for group in heads for h in group]).argsort().to(layouts[0].device)
    if sorted(h for group in heads for h in group) != list(range(num_heads)):
        raise ValueError(f"heads must name each of {num_heads} heads once, got {heads}")
    first = layouts[0]
    return replace(
        first,
        sink=torch.cat([x.sink for x in layouts])[order],
        window=torch.cat([x.window for x in layouts])[order],
        **with_lists(
            _assembled([x.blocks for x in layouts], layouts, order, first.num_q_blocks),
            _assembled([x.columns for x in layouts], layouts, order, first.num_column_groups),
        ),
    )


def _assembled(
    lists: list[IndexLists | None], layouts: list[Layout], order: Tensor, num_rows: int
) -> IndexLists | None:
    """The lists of all layouts side by side, those of head ``order[n]`` in place ``n``; nothing for
    the heads of a layout that has none.
    """
    present = [x for x in lists if x is not None]
    if not present:
        return None
    batch = max(x.counts.shape[0] for x in present)
    width = max(x.indices.shape[-1] for x in present)
    counts, indices = [], []
    for x, layout in zip(lists, layouts, strict=True):
        if x is None:
            none = layout.sink.new_zeros(1, len(layout.sink), num_rows)
            x = IndexLists(none, none[..., None][..., :0])
        counts.append(x.counts.expand(batch, -1, -1))
        padded = torch.nn.functional.pad(x.indices, (0, width - x.indices.shape[-1]))
        indices.append(padded.expand(batch, -1, -1, -1))
    return IndexLists(torch.cat(counts, 1)[:, order], torch.cat(indices, 1)[:, order])


def transpose(layout: Fields) -> tuple[Tensor, Tensor]:
    if layout.blocks is None:
        raise ValueError("the layout has no block lists (kv_num_blocks is None)")
    batch, heads, num_q = layout.blocks.counts.shape
    num_kv = layout.num_kv_blocks
    keep = layout.blocks.listed().flatten(0, 1)
    bh, m, slot = keep.nonzero(as_tuple=True)
    n = layout.blocks.indices.flatten(0, 1)[bh, m, slot]
    pairs = torch.sort((bh * num_kv + n) * num_q + m).values
    stride = max(num_q, 1)
    counts, indices = compact(pairs // stride, pairs % stride, batch * heads * num_kv)
    return counts.view(batch, heads, num_kv), indices.view(batch, heads, num_kv, indices.shape[-1])
