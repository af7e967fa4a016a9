"""What the kernels need to know about a layout's lists, without waiting for the device: in which
order to run tiles, and for each key who lists it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract.packing import Packing
from ..layout import BlockLayout
from ..layout.lists import listed, spread_heads
from .launch import Call, Launch

_NO_LIMIT = 2**30


def _band(call: Call, heads: int) -> tuple[Tensor, Tensor]:
    """Sink and window ``[heads, 1]``, no limit being a large number."""
    sink, window = (spread_heads(x, 0, heads).long()[:, None] for x in _static(call))
    return sink, torch.where(window == -1, _NO_LIMIT, window)


def _static(call: Call) -> tuple[Tensor, Tensor]:
    return call.layout.sink, call.layout.window


def lengths(layout: BlockLayout, packing: Packing | None) -> tuple:
    """Numbers of queries and keys, of each sequence if they are packed."""
    if packing is None:
        return layout.seqlens
    if packing.block_table is None:
        return packing.cu_seqlens_q.diff(), packing.cu_seqlens_kv.diff()
    return packing.cu_seqlens_q.diff(), packing.seqlens_kv


def _heaviest_first(cost: Tensor) -> Tensor:
    """The order of programs by falling cost; programs are counted ``[tiles, packs]``."""
    return cost.flatten().argsort(descending=True, stable=True).int()


def order_of_rows(call: Call, rows_per_block: int, seqlens: tuple) -> Tensor:
    """The order in which `locate` walks the row blocks: those with the most keys come first.

    Args:
        seqlens: numbers of queries and keys, each an int or a tensor ``[batch]``.
    """
    layout = call.layout
    heads = call.num_heads // call.pack
    seqlen_q, seqlen_kv = (torch.as_tensor(x, device=layout.device).view(-1, 1, 1) for x in seqlens)
    blocks = -(-layout.seqlen_q // rows_per_block)
    first = torch.arange(blocks, device=layout.device) * rows_per_block
    last = torch.minimum(first + rows_per_block, seqlen_q) - 1
    empty = last < first
    first, last = first + seqlen_kv - seqlen_q, last + seqlen_kv - seqlen_q
    sink, window = _band(call, heads)
    key_end = torch.minimum(last + 1, seqlen_kv) if call.is_causal else seqlen_kv
    window_end = key_end if call.is_causal else torch.minimum(last + window, seqlen_kv)
    sink = torch.minimum(sink, key_end).clamp(min=0)
    cost = sink + (window_end - torch.maximum(first - window + 1, sink)).clamp(min=0)
    if layout.kv_num_blocks is not None:
        cost = cost + spread_heads(layout.kv_num_blocks, 1, heads) * call.block_kv
    if layout.num_columns is not None:
        columns = spread_heads(layout.num_columns, 1, heads)
        group = torch.arange(blocks, device=layout.device) // call.listed_rows[1]
        cost = cost + columns[:, :, group]
    cost = cost.masked_fill(empty, 0).expand(call.batch, heads, blocks)
    return _heaviest_first(cost.flip(-1).permute(2, 0, 1))


@dataclass(frozen=True)
class Transposed:
    """For each tile of keys who lists any of them, ascending: entries ``offsets[n]`` to ``offsets[n
    + 1]``, where n counts ``[batch, heads, tiles]``.

    Args:
        offsets: int64 ``[batch * heads * tiles + 1]``.
        sources: int32, the row of the lists that each entry stands for.
        bits: int64, bit ``r`` of an entry says that its source lists number ``r`` of the tile; None
            if a tile holds one.
        shape: ``(batch, heads, tiles)``.
    """

    offsets: Tensor
    sources: Tensor
    bits: Tensor | None
    shape: tuple[int, int, int]


@triton.jit(do_not_specialize=("num_lists", "list_rows", "width", "num_targets", "num_tiles"))
def _pairs_kernel(
    counts_ptr, targets_ptr, pairs_ptr, num_lists, list_rows, width, num_targets, num_tiles,
    PER_TILE: tl.constexpr, LISTS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """For each entry of some lists a number by which sorting brings together, for each tile of
    targets, the lists that name any; for what is no entry a number that no other reaches.
    """
    number = tl.program_id(0) * LISTS + tl.arange(0, LISTS)[:, None]
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)[None, :]
    exists = (number < num_lists) & (entry < width)
    count = tl.load(counts_ptr + number, mask=number < num_lists, other=0)
    at = number.to(tl.int64) * width + entry
    target = tl.load(targets_ptr + at, mask=exists, other=0)
    valid = (entry < count) & (target >= 0) & (target < num_targets)
    tile = (number // list_rows).to(tl.int64) * num_tiles + target // PER_TILE
    pair = (tile * list_rows + number % list_rows) * PER_TILE + target % PER_TILE
    nothing = tl.full([], num_lists, tl.int64) * num_tiles * PER_TILE
    tl.store(pairs_ptr + at, tl.where(valid, pair, nothing), mask=exists)


def pairs(counts: Tensor, targets: Tensor, num_targets: int, per_tile: int) -> Launch:
    """The launch that numbers the entries of lists ``[batch, heads, rows]`` and ``targets [batch,
    heads, rows, width]``, in its argument `pairs_ptr`.
    """
    arguments = {
        "counts_ptr": counts.contiguous(),
        "targets_ptr": targets.contiguous(),
        "pairs_ptr": torch.empty(targets.shape, dtype=torch.int64, device=targets.device),
        "num_lists": counts.numel(),
        "list_rows": targets.shape[2],
        "width": targets.shape[3],
        "num_targets": num_targets,
        "num_tiles": -(-num_targets // per_tile),
        "PER_TILE": per_tile,
        "LISTS": 16,
        "ENTRIES": 128,
    }
    grid = (-(-counts.numel() // 16), -(-targets.shape[3] // 128))
    return Launch(_pairs_kernel, grid, arguments, 4, 1)


def transpose(counts: Tensor, targets: Tensor, num_targets: int, per_tile: int) -> Transposed:
    """Who lists what, no more than 64 targets a tile; targets that do not exist are left out."""
    batch, heads, rows, _ = targets.shape
    tiles = -(-num_targets // per_tile)
    launch = pairs(counts, targets, num_targets, per_tile)
    if targets.device.type != "meta":  # without a device kernels are described, not run
        launch()
    keys = launch.arguments["pairs_ptr"]
    keys = keys.flatten().sort().values
    found, bits = keys, None
    if per_tile > 1:
        found = keys // per_tile
        first = torch.ones_like(found, dtype=torch.bool)
        first[1:] = found[1:] != found[:-1]
        slots = first.cumsum(0) - 1
        bits = torch.zeros_like(found).scatter_add_(0, slots, 1 << keys % per_tile)
        found = torch.full_like(found, counts.numel() * tiles).scatter_(0, slots, found)
    begins = torch.arange(batch * heads * tiles + 1, device=targets.device) * rows
    offsets = torch.searchsorted(found, begins)
    return Transposed(offsets, (found % max(rows, 1)).int(), bits, (batch, heads, tiles))


def transposed_blocks(call: Call, blocks_per_tile: int) -> Transposed:
    """For each tile of `blocks_per_tile` key blocks the query blocks that list any of them."""
    layout = call.layout
    return transpose(layout.kv_num_blocks, layout.kv_indices, layout.num_kv_blocks, blocks_per_tile)


def transposed_columns(call: Call, keys_per_tile: int) -> tuple[Tensor, Transposed]:
    """The keys that are a column of any row, and for each tile of them the groups of rows that list
    any.

    Returns:
        tuple[Tensor, Transposed]: keys int32 ``[batch or 1, num_kv_heads or 1, width]``, ascending,
        -1 behind the last one; and who lists them.
    """
    layout, seqlen_kv = call.layout, call.layout.seqlen_kv
    counts, indices = layout.num_columns, layout.column_indices
    heads = counts.shape[1]
    if heads > 1 and heads % call.num_kv_heads:
        heads = call.num_heads
        counts, indices = (spread_heads(x, 1, heads) for x in (counts, indices))
    owners = 1 if heads == 1 else call.num_kv_heads
    columns = torch.where(listed(counts, indices), indices, -1).long()  # which may change meanwhile
    valid = (columns >= 0) & (columns < seqlen_kv)
    columns = torch.where(valid, columns, seqlen_kv)
    by_owner = columns.view(len(columns), owners, -1)
    active = torch.zeros(
        len(columns), owners, seqlen_kv + 1, dtype=torch.bool, device=layout.device
    )
    active.scatter_(-1, by_owner, True)
    active[..., seqlen_kv] = False
    rank = active.cumsum(-1) - 1
    width = min(seqlen_kv, by_owner.shape[-1])
    keys = torch.full((*active.shape[:2], width + 1), -1, dtype=torch.int32, device=layout.device)
    every = torch.arange(seqlen_kv + 1, dtype=torch.int32, device=layout.device)
    keys.scatter_(-1, torch.where(active, rank, width), every.expand(active.shape))
    targets = torch.where(valid, rank.gather(-1, by_owner).view_as(columns), -1).int()
    return keys[..., :width].contiguous(), transpose(counts, targets, width, keys_per_tile)


def order_of_keys(
    call: Call, tile_starts: Tensor, tile_size: int, transposed: Transposed | None
) -> Tensor:
    """The order of the key tiles that begin at `tile_starts`: those that most rows see first."""
    layout, heads = call.layout, call.num_heads
    shift = layout.seqlen_kv - layout.seqlen_q
    low, high = tile_starts - shift, (tile_starts + tile_size).clamp(max=layout.seqlen_kv) - shift
    sink, window = _band(call, heads)
    first = low if call.is_causal else low - window + 1
    last = high - 1 + window
    through_sink = tile_starts < sink
    first = torch.where(through_sink, low if call.is_causal else 0, first).clamp(min=0)
    last = torch.where(through_sink, layout.seqlen_q, last).clamp(max=layout.seqlen_q)
    cost = (last - first).clamp(min=0)[None]
    if transposed is not None:
        batch, list_heads, tiles = transposed.shape
        entries = transposed.offsets.diff().view(batch, list_heads, tiles)
        entries = entries.repeat_interleave(len(tile_starts) // max(tiles, 1), -1)
        cost = cost + spread_heads(entries, 1, heads) * call.listed_rows[0]
    cost = cost.expand(call.batch, heads, -1).unflatten(1, (call.num_kv_heads, -1)).sum(2)
    return _heaviest_first(cost.permute(2, 0, 1))
