"""Attention over packed sequences, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..contract.dtypes import compute_dtype
from ..contract.packing import Packing, check_values, key_rows
from ..layout import BlockLayout
from ..layout.fields import with_lists
from ..layout.lists import IndexLists


def sequence_layout(layout: BlockLayout, b: int, seqlens: tuple[int, int]) -> BlockLayout:
    """What a layout for the greatest lengths means for sequence `b`: its first rows, and of their
    lists the blocks and columns that the sequence has.
    """
    rows_q = -(-seqlens[0] // layout.block_size[0])
    groups = -(-rows_q // layout.column_group)
    lists = with_lists(
        _of_sequence(layout.blocks, b, rows_q, -(-seqlens[1] // layout.block_size[1])),
        _of_sequence(layout.columns, b, groups, seqlens[1]),
    )
    return replace(layout, seqlens=seqlens, **lists)


def _of_sequence(lists: IndexLists | None, b: int, num_rows: int, most: int) -> IndexLists | None:
    """The first `num_rows` lists of sequence `b`, and of them the entries below `most`."""
    if lists is None:
        return None
    batch = slice(b, b + 1) if lists.counts.shape[0] > 1 else slice(None)
    lists = IndexLists(*(x[batch, :, :num_rows] for x in lists))
    counts = (lists.listed() & (lists.indices < most)).sum(-1, dtype=torch.int32)
    return IndexLists(counts, lists.indices.contiguous())


def attention(
    attend: Callable[[Tensor, Tensor, Tensor, BlockLayout], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    packing: Packing,
) -> tuple[Tensor, Tensor]:
    """``out [total_q, H, Dv]`` and ``lse [H, total_q]`` of all sequences, by a function for one.

    Args:
        attend: takes q, k, v as ``[1, heads, seqlen, dim]`` and the layout for their lengths.
        q, k, v, layout, packing: as in `sparse_attention_varlen`, the layout's values validated.
    """
    ends = check_values(q, k, packing, layout.seqlens)
    outs = [q.new_empty(0, q.shape[1], v.shape[-1])]
    lses = [q.new_empty(q.shape[1], 0, dtype=compute_dtype(q.dtype))]
    takers = key_rows(k, packing, layout.seqlen_kv)
    for b, take in enumerate(takers):
        rows = slice(ends[b], ends[b + 1])
        if ends[b] == ends[b + 1]:
            continue
        one = [x.transpose(0, 1)[None] for x in (q[rows], take(k), take(v))]
        lengths = (one[0].shape[2], one[1].shape[2])
        out, lse = attend(*one, sequence_layout(layout, b, lengths))
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)
