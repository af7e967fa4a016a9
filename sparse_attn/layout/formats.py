"""Other notations of the same mask: to them from a layout, and from them to the fields of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import as_bool, as_int, as_pair
from .algebra import take
from .fields import Fields, common_heads
from .lists import IndexLists, ascending, compact, spread_heads
from .mask import visible

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def _blocks_only(
    counts: Tensor, indices: Tensor, block_size: tuple[int, int], seqlens: tuple[int, int]
) -> dict[str, Any]:
    """The fields of a layout of blocks alone."""
    none = torch.zeros(1, dtype=torch.int32, device=counts.device)
    blocks = {"kv_num_blocks": counts, "kv_indices": indices, "block_size": block_size}
    return {"seqlens": seqlens, "sink": none, "window": none, **blocks}


def _sizes(block_size, seqlens) -> tuple[tuple[int, int], tuple[int, int]]:
    return as_pair("block_size", block_size, 1), as_pair("seqlens", seqlens, 0)


def _expect_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _expect_blocks(name: str, shape: tuple[int, int], block_size, seqlens) -> None:
    expected = tuple(-(-s // b) for s, b in zip(seqlens, block_size, strict=True))
    if tuple(shape) != expected:
        raise ValueError(
            f"{name} has {tuple(shape)} blocks, but seqlens={seqlens} with "
            f"block_size={block_size} make {expected}"
        )


def from_dense(block_mask: Tensor, *, block_size, seqlens) -> dict[str, Any]:
    block_size, seqlens = _sizes(block_size, seqlens)
    _expect_tensor("block_mask", block_mask)
    if block_mask.dtype != torch.bool or block_mask.dim() != 4:
        raise ValueError(
            "block_mask must be bool [B, H, Mq, Mkv], got "
            f"{block_mask.dtype} {list(block_mask.shape)}"
        )
    _expect_blocks("block_mask", block_mask.shape[2:], block_size, seqlens)
    lead = block_mask.shape[:3]
    rows, cols = block_mask.reshape(-1, block_mask.shape[-1]).nonzero(as_tuple=True)
    counts, indices = compact(rows, cols, lead.numel())
    return _blocks_only(counts.view(lead), indices.view(*lead, -1), block_size, seqlens)


def from_topk(indices: Tensor, *, block_size, seqlens) -> dict[str, Any]:
    block_size, seqlens = _sizes(block_size, seqlens)
    _expect_tensor("indices", indices)
    if indices.dim() != 4 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "indices must be int32 or int64 [B, H, Mq, k], got "
            f"{indices.dtype} {list(indices.shape)}"
        )
    num_kv_blocks = -(-seqlens[1] // block_size[1])
    _expect_blocks("indices", (indices.shape[2], num_kv_blocks), block_size, seqlens)
    if indices.numel() and not (int(indices.min()) >= -1 and int(indices.max()) < num_kv_blocks):
        raise ValueError(
            f"indices must be -1 or in [0, {num_kv_blocks}), got values in "
            f"[{int(indices.min())}, {int(indices.max())}]"
        )
    entries = torch.where(indices < 0, num_kv_blocks, indices).int()
    return _blocks_only(*ascending(entries, num_kv_blocks), block_size, seqlens)


def from_csr(csr: Tensor, *, block_size, seqlens) -> dict[str, Any]:
    block_size, seqlens = _sizes(block_size, seqlens)
    _expect_tensor("csr", csr)
    if csr.layout not in (torch.sparse_csr, torch.sparse_bsr) or csr.dim() != 2:
        raise ValueError(
            f"csr must be a 2-D sparse CSR or BSR tensor, got {csr.layout} {list(csr.shape)}"
        )
    crow, cols = csr.crow_indices().long(), csr.col_indices().long()
    num_kv_blocks = -(-seqlens[1] // block_size[1])
    shape = tuple(csr.shape)
    if csr.layout is torch.sparse_bsr:
        inner = tuple(csr.values().shape[1:])
        if inner != block_size:
            raise ValueError(f"csr stores blocks of {inner}, but block_size={block_size}")
        shape = (len(crow) - 1, shape[1] // inner[1])
    _expect_blocks("csr", shape, block_size, seqlens)
    rows = torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device), crow.diff())
    pairs = torch.unique(rows * num_kv_blocks + cols)
    stride = max(num_kv_blocks, 1)
    counts, indices = compact(pairs // stride, pairs % stride, len(crow) - 1)
    return _blocks_only(counts[None, None], indices[None, None], block_size, seqlens)


def from_block_mask(block_mask: BlockMask, *, drop_mask_mod: bool = False) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import BlockMask, noop_mask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask must be FlexAttention's BlockMask, got {type(block_mask).__name__}"
        )
    drop_mask_mod = as_bool("drop_mask_mod", drop_mask_mod)
    partial = block_mask.kv_num_blocks
    has_program = block_mask.mask_mod not in (None, noop_mask)
    if has_program and not drop_mask_mod and bool((partial > 0).any()):
        raise ValueError(
            "block_mask has partial blocks whose mask_mod a layout cannot hold; state it through "
            "is_causal, sink or window and pass drop_mask_mod=True"
        )
    seqlens = tuple(block_mask.seq_lengths)
    mask = _dense_blocks(partial, block_mask.kv_indices, block_mask, seqlens)
    if block_mask.full_kv_num_blocks is not None:
        mask |= _dense_blocks(
            block_mask.full_kv_num_blocks, block_mask.full_kv_indices, block_mask, seqlens
        )
    return from_dense(mask, block_size=tuple(block_mask.BLOCK_SIZE), seqlens=seqlens)


def _dense_blocks(counts: Tensor, indices: Tensor, block_mask: BlockMask, seqlens) -> Tensor:
    return IndexLists(counts, indices).table(-(-seqlens[1] // block_mask.BLOCK_SIZE[1]))


def to_topk(layout: Fields) -> Tensor:
    _require_blocks(layout)
    return layout.blocks.filled(-1)


def to_csr(layout: Fields, batch: int, head: int) -> Tensor:
    _require_blocks(layout)
    one = take(layout, as_int("batch", batch), as_int("head", head))
    blocks = one.blocks
    crow = torch.nn.functional.pad(blocks.counts[0, 0].cumsum(0), (1, 0))
    cols = blocks.indices[0, 0][blocks.listed()[0, 0]].long()
    values = torch.ones(len(cols), device=cols.device)
    return torch.sparse_csr_tensor(
        crow, cols, values, (layout.num_q_blocks, layout.num_kv_blocks), check_invariants=True
    )


def _require_blocks(layout: Fields) -> None:
    if layout.blocks is None:
        raise ValueError("the layout has no block lists (kv_num_blocks is None)")


def to_block_mask(layout: Fields, *, is_causal: bool, num_heads: int | None) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    num_heads, is_causal = common_heads(layout, num_heads), as_bool("is_causal", is_causal)
    block_q, block_kv = layout.block_size
    seen = [
        _blocks_seen(layout, m, is_causal=is_causal, num_heads=num_heads)
        for m in range(layout.num_q_blocks)
    ]
    touched, full = (torch.stack(tables, dim=2) for tables in zip(*seen, strict=True))
    batch = touched.shape[0]
    sink = spread_heads(layout.sink, 0, num_heads)
    window = spread_heads(layout.window, 0, num_heads)
    off = layout.seqlen_kv - layout.seqlen_q
    blocks = columns = None
    if layout.blocks is not None:
        blocks = layout.blocks.table(layout.num_kv_blocks)
        blocks = spread_heads(blocks, 1, num_heads).expand(batch, -1, -1, -1)
    if layout.columns is not None:
        columns = layout.columns.table(layout.seqlen_kv)
        columns = spread_heads(columns, 1, num_heads).expand(batch, -1, -1, -1)

    def mask_mod(b, h, i, j):
        distance = i + off - j
        b = b if batch > 1 else b * 0
        near = distance if is_causal else distance.abs()
        seen = (j < sink[h]) | (near < window[h]) | (window[h] == -1)
        if blocks is not None:
            seen = seen | blocks[b, h, i // block_q, j // block_kv]
        if columns is not None:
            seen = seen | columns[b, h, i // (block_q * layout.column_group), j]
        return seen & (distance >= 0) if is_causal else seen

    return BlockMask.from_kv_blocks(
        *_full_width(touched & ~full),
        *_full_width(full),
        BLOCK_SIZE=(block_q, block_kv),
        mask_mod=mask_mod,
        seq_lengths=tuple(layout.seqlens),
    )


def _full_width(table: Tensor) -> tuple[Tensor, Tensor]:
    """A bool table as counts and lists of all columns, the True ones first."""
    order = table.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).int()
    return table.sum(-1, dtype=torch.int32), order


def _blocks_seen(
    layout: Fields, m: int, *, is_causal: bool, num_heads: int
) -> tuple[Tensor, Tensor]:
    """The key blocks of which the rows of query block `m` see a key, and those of which every row
    sees every key: bool ``[B', H, Mkv]`` each. A block that the end of q or k cuts short is never
    full.
    """
    block_q, block_kv = layout.block_size
    start, stop = m * block_q, min((m + 1) * block_q, layout.seqlen_q)
    mask = visible(layout, start, stop, is_causal=is_causal, num_heads=num_heads)
    missing = layout.num_kv_blocks * block_kv - layout.seqlen_kv

    def per_block(rows: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(rows, (0, missing))
        return padded.unflatten(-1, (layout.num_kv_blocks, block_kv))

    full = per_block(mask.all(dim=2)).all(dim=-1)
    return per_block(mask.any(dim=2)).any(dim=-1), full & (stop - start == block_q)
