"""The bool mask of some rows of a layout."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import as_bool, as_int
from .fields import Fields, common_heads
from .lists import spread_heads


def visible(
    layout: Fields, start: int, stop: int, *, is_causal: bool, num_heads: int | None
) -> Tensor:
    num_heads, is_causal = common_heads(layout, num_heads), as_bool("is_causal", is_causal)
    stop = as_int("stop", stop, 0, layout.seqlen_q)
    start = as_int("start", start, 0, stop)
    device = layout.device
    rows = torch.arange(start, stop, device=device)
    keys = torch.arange(layout.seqlen_kv, device=device)
    position = rows + (layout.seqlen_kv - layout.seqlen_q)
    distance = position[:, None] - keys
    sink = spread_heads(layout.sink, 0, num_heads)[:, None, None]
    window = spread_heads(layout.window, 0, num_heads)[:, None, None]
    near = (distance if is_causal else distance.abs()) < window
    mask = ((keys < sink) | near | (window == -1))[None]
    q_blocks = rows // layout.block_size[0]
    if layout.blocks is not None and len(rows):
        first, last = int(q_blocks[0]), int(q_blocks[-1]) + 1
        table = layout.blocks.of_rows(slice(first, last)).table(layout.num_kv_blocks)
        picked = table[:, :, q_blocks - first][..., keys // layout.block_size[1]]
        mask = mask | spread_heads(picked, 1, num_heads)
    if layout.columns is not None and len(rows):
        groups = q_blocks // layout.column_group
        first, last = int(groups[0]), int(groups[-1]) + 1
        table = layout.columns.of_rows(slice(first, last)).table(layout.seqlen_kv)
        mask = mask | spread_heads(table[:, :, groups - first], 1, num_heads)
    return mask & (distance >= 0) if is_causal else mask
