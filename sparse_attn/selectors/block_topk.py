"""Top-k blocks by pooled scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layout import BlockLayout
from .base import Selector, block_rows, chunk_starts, pool_mean, seqlens
from .checks import count_fields, int_fields
from .choose import join_lists, top_blocks
from .probes import products

_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class BlockTopK(Selector):
    """For each query block and head, the `top_k` key blocks whose mean key best matches its mean
    query.

    With ``Q = mean of q over the rows of query block m`` and ``K = mean of k over key block n`` (a
    short last block counts its rows only) the score is ``Q @ K``. Candidates are the blocks that
    hold a key up to the block's last row (all blocks if not causal), less those which the sink or
    the window already shows to every row. The block-sparse pattern of MInference (arXiv
    2407.02490), with a sink and a window, per head.

    The rows of one query block share its selection, so a row's blocks may depend on later rows of
    its own block, never on rows after it.

    Args:
        top_k: number of key blocks for each query block, at least 1. Default 16.
        block_size: rows of a query block and keys of a key block. Default 64.
        sink: number of leading keys every row sees. Default 64.
        window: number of trailing keys every row sees, itself included, at least 1. Default 256.

    Raises:
        ValueError: if an argument is no number of its kind or out of range.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> layout = BlockTopK(top_k=2, block_size=32, sink=4, window=32)(q, k)
    """

    top_k: int = 16
    block_size: int = 64
    sink: int = 64
    window: int = 256

    def __post_init__(self) -> None:
        count_fields(self, top_k=1, sink=0, window=1)
        int_fields(self, block_size=1)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        base = BlockLayout.sink_window(
            seqlens(q, k), sink=self.sink, window=self.window, device=q.device
        )
        if k.shape[2] == 0 or q.shape[2] == 0:
            return base
        queries, keys = pool_mean(q, self.block_size), pool_mean(k, self.block_size)
        rows = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * keys.shape[2]))
        lists = []
        for start in chunk_starts(queries.shape[2], rows):
            scores = products(queries[:, :, start : start + rows], keys)
            hidden = ~self._candidates(q, k, start, scores.shape[2], is_causal)
            lists.append(top_blocks(scores.masked_fill(hidden, -torch.inf), self.top_k))
        counts, indices = join_lists(lists)
        block_size = (self.block_size, self.block_size)
        return replace(base, block_size=block_size, kv_num_blocks=counts, kv_indices=indices)

    def _candidates(self, q: Tensor, k: Tensor, start: int, rows: int, is_causal: bool) -> Tensor:
        """Which key blocks the query blocks ``start .. start + rows`` may choose: bool ``[rows,
        Mkv]``.
        """
        seqlen_kv, size = k.shape[2], self.block_size
        first_row, last_row = block_rows(seqlens(q, k), size, start, rows, q.device)
        first_key = torch.arange(0, seqlen_kv, size, device=q.device)
        last_key = (first_key + size - 1).clamp(max=seqlen_kv - 1)
        in_window = last_row - first_key < self.window
        if not is_causal:
            in_window = in_window & (last_key - first_row < self.window)
        shown = (last_key < self.sink) | in_window
        return ~shown & (first_key <= last_row) if is_causal else ~shown
