"""What can be done with layouts: union, slices, refinement, transposition, density."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from .checks import INT32_MAX, as_bool, as_int, as_pair
from .layout import BlockLayout


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Which entries of ``indices [..., width]`` lie before their count."""
    return torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]


def violations(layout: BlockLayout) -> Iterator[tuple[str, Tensor, str]]:
    """What values must not be: for each rule the tensor's name, a mask of its values that break it,
    and why.
    """
    for name, low in (("sink", 0), ("window", -1)):
        yield name, getattr(layout, name) < low, f"is less than {low}"
    for counts_name, indices_name, limit, unit in (
        ("kv_num_blocks", "kv_indices", layout.num_kv_blocks, "key blocks"),
        ("num_columns", "column_indices", layout.seqlen_kv, "keys"),
    ):
        counts, indices = getattr(layout, counts_name), getattr(layout, indices_name)
        if counts is None:
            continue
        width = indices.shape[-1]
        bad = (counts < 0) | (counts > width)
        yield counts_name, bad, f"is not in [0, {width}], the width of {indices_name}"
        inside = listed(counts, indices)
        bad = inside & ((indices < 0) | (indices >= limit))
        yield indices_name, bad, f"is out of range: the layout has {limit} {unit}"
        repeated = torch.zeros_like(inside)
        repeated[..., 1:] = indices[..., 1:] <= indices[..., :-1]
        why = "does not ascend: lists must be sorted, without duplicates"
        yield indices_name, repeated & inside, why


def validate(layout: BlockLayout) -> None:
    """No violations.

    Raises:
        ValueError: naming the tensor, the place and the value.
    """
    for name, bad, why in violations(layout):
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            raise ValueError(f"{name}{at} = {getattr(layout, name)[tuple(at)].item()} {why}")


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


def common_heads(layout: BlockLayout, num_heads: int | None) -> int:
    """`num_heads`, or the layout's own; every head size must divide it."""
    num_heads = layout.num_heads if num_heads is None else as_int("num_heads", num_heads, 1)
    for name, value in layout.tensors().items():
        size = value.shape[0 if value.dim() == 1 else 1]
        if num_heads % size:
            raise ValueError(
                f"the head size of {name} is {size}, which does not divide {num_heads} heads"
            )
    return num_heads


def spread_heads(x: Tensor, dim: int, num_heads: int) -> Tensor:
    """Repeat each entry of the head dimension so that it has `num_heads`."""
    times = num_heads // x.shape[dim]
    return x if times == 1 else x.repeat_interleave(times, dim)


def expand_heads(layout: BlockLayout, num_heads: int) -> BlockLayout:
    num_heads = common_heads(layout, as_int("num_heads", num_heads, 1))
    return replace(
        layout,
        **{
            name: spread_heads(x, 0 if x.dim() == 1 else 1, num_heads)
            for name, x in layout.tensors().items()
        },
    )


def take(layout: BlockLayout, batch: int | slice, heads: int | slice) -> BlockLayout:
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


def refine(layout: BlockLayout, block_size: tuple[int, int]) -> BlockLayout:
    old, new = layout.block_size, as_pair("block_size", block_size, 1)
    if old[0] % new[0] or old[1] % new[1]:
        raise ValueError(f"block_size {new} must divide the present block size {old}")
    if old == new:
        return layout
    rows, parts = old[0] // new[0], old[1] // new[1]
    counts, indices = layout.kv_num_blocks, layout.kv_indices
    fields = {"block_size": new, "column_group": min(layout.column_group * rows, INT32_MAX)}
    if counts is not None:
        num_q_blocks = -(-layout.seqlen_q // new[0])
        num_kv_blocks = -(-layout.seqlen_kv // new[1])
        rows, parts = min(rows, max(1, num_q_blocks)), min(parts, max(1, num_kv_blocks))
        indices = (
            indices[..., None] * parts + torch.arange(parts, device=layout.device).int()
        ).flatten(-2)
        counts = counts * parts
        counts = counts - ((indices >= num_kv_blocks) & listed(counts, indices)).sum(
            -1, dtype=torch.int32
        )
        fields["kv_num_blocks"] = counts.repeat_interleave(rows, 2)[:, :, :num_q_blocks]
        fields["kv_indices"] = indices.repeat_interleave(rows, 2)[:, :, :num_q_blocks]
    return replace(layout, **fields)


def _regroup(layout: BlockLayout, column_group: int) -> BlockLayout:
    """Share column lists among fewer query blocks; `column_group` must divide the present one."""
    if layout.num_columns is None:
        return replace(layout, column_group=column_group)
    num_groups = -(-layout.num_q_blocks // column_group)
    times = min(layout.column_group // column_group, max(1, num_groups))
    return replace(
        layout,
        column_group=column_group,
        num_columns=layout.num_columns.repeat_interleave(times, 2)[:, :, :num_groups],
        column_indices=layout.column_indices.repeat_interleave(times, 2)[:, :, :num_groups],
    )


def _has_lists(layout: BlockLayout) -> bool:
    return layout.kv_num_blocks is not None or layout.num_columns is not None


def align(layouts: list[BlockLayout]) -> list[BlockLayout]:
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
    with_columns = [x.column_group for x in layouts if x.num_columns is not None]
    group = gcd(*with_columns) if with_columns else 1
    return [_regroup(x, group) for x in layouts]


def union(a: BlockLayout, b: BlockLayout) -> BlockLayout:
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
        **_merge_lists(a, b, "kv_num_blocks", "kv_indices", a.num_kv_blocks),
        **_merge_lists(a, b, "num_columns", "column_indices", a.seqlen_kv),
    )


def _match(x: Tensor, y: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    heads = max(x.shape[dim], y.shape[dim])
    return spread_heads(x, dim, heads), spread_heads(y, dim, heads)


def _merge_lists(
    a: BlockLayout, b: BlockLayout, counts_name: str, indices_name: str, size: int
) -> dict:
    sides = [(getattr(x, counts_name), getattr(x, indices_name)) for x in (a, b)]
    sides = [side for side in sides if side[0] is not None]
    if len(sides) < 2:
        counts, indices = sides[0] if sides else (None, None)
        return {counts_name: counts, indices_name: indices}
    (count_a, index_a), (count_b, index_b) = sides
    count_a, count_b = _match(count_a, count_b, 1)
    index_a, index_b = _match(index_a, index_b, 1)
    batch = max(count_a.shape[0], count_b.shape[0])
    entries = [
        torch.where(listed(counts, indices), indices, size).expand(batch, -1, -1, -1)
        for counts, indices in ((count_a, index_a), (count_b, index_b))
    ]
    counts, indices = ascending(torch.cat(entries, -1), size)
    return {counts_name: counts, indices_name: indices}


def assemble_heads(
    layouts: list[BlockLayout], heads: list[list[int]], num_heads: int
) -> BlockLayout:
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
        **_cat_lists(layouts, order, "kv_num_blocks", "kv_indices", first.num_q_blocks),
        **_cat_lists(layouts, order, "num_columns", "column_indices", first.num_column_groups),
    )


def _cat_lists(
    layouts: list[BlockLayout], order: Tensor, counts_name: str, indices_name: str, rows: int
) -> dict:
    present = [getattr(x, indices_name) for x in layouts if getattr(x, indices_name) is not None]
    if not present:
        return {counts_name: None, indices_name: None}
    batch = max(x.shape[0] for x in present)
    width = max(x.shape[-1] for x in present)
    counts, indices = [], []
    for x in layouts:
        count, index = getattr(x, counts_name), getattr(x, indices_name)
        if count is None:
            count = torch.zeros(1, len(x.sink), rows, dtype=torch.int32, device=x.device)
            index = count[..., None][..., :0]
        counts.append(count.expand(batch, -1, -1))
        padded = torch.nn.functional.pad(index, (0, width - index.shape[-1]))
        indices.append(padded.expand(batch, -1, -1, -1))
    return {
        counts_name: torch.cat(counts, 1)[:, order],
        indices_name: torch.cat(indices, 1)[:, order],
    }


def transpose(layout: BlockLayout) -> tuple[Tensor, Tensor]:
    if layout.kv_num_blocks is None:
        raise ValueError("the layout has no block lists (kv_num_blocks is None)")
    batch, heads, num_q = layout.kv_num_blocks.shape
    num_kv = layout.num_kv_blocks
    keep = listed(layout.kv_num_blocks, layout.kv_indices).flatten(0, 1)
    bh, m, slot = keep.nonzero(as_tuple=True)
    n = layout.kv_indices.flatten(0, 1)[bh, m, slot]
    pairs = torch.sort((bh * num_kv + n) * num_q + m).values
    stride = max(num_q, 1)
    counts, indices = compact(pairs // stride, pairs % stride, batch * heads * num_kv)
    return counts.view(batch, heads, num_kv), indices.view(batch, heads, num_kv, indices.shape[-1])


def density(layout: BlockLayout, *, is_causal: bool) -> float:
    num_heads, is_causal = layout.num_heads, as_bool("is_causal", is_causal)
    kept, total = _count_static(layout, is_causal, num_heads)
    widths = [x.shape[-1] for x in (layout.kv_indices, layout.column_indices) if x is not None]
    if widths:
        blocks = max(1, 2**22 // (layout.batch * num_heads * max(*widths, 1)))
        for start in range(0, layout.num_q_blocks, blocks):
            stop = min(start + blocks, layout.num_q_blocks)
            kept += _count_listed(layout, start, stop, is_causal, num_heads)
    return kept / total if total else 0.0


def _count_static(layout: BlockLayout, is_causal: bool, num_heads: int) -> tuple[int, int]:
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


def _count_listed(layout: BlockLayout, start: int, stop: int, is_causal: bool, heads: int) -> int:
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


def _in_blocks(layout: BlockLayout, columns: Tensor, q_blocks: Tensor, num_heads: int) -> Tensor:
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
