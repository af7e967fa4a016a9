"""Blocks by their means, where the means stand for what is in them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..layout import BlockLayout
from ..layout.lists import ascending
from .base import Selector, block_rows, chunk_starts, pool_mean, seqlens
from .checks import int_fields, number_field, share_fields
from .choose import join_lists
from .probes import products, softmax_scale

_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class SpargeAttn(Selector):
    """For each query block and head the key blocks of the greatest products of means, and all that
    means say nothing about (SpargeAttn, arXiv 2502.18137).

    It is for any attention with many rows, causal or not. This is the paper's choice of blocks,
    without its 8-bit products.

    A block of rows is *coherent* if the mean cosine of all pairs of its rows (itself with itself
    included) exceeds `similarity`. Over the coherent key blocks, ``P = softmax(scale * mean(q
    block) @ mean(key block))``, causal by blocks. A query block sees the best of them: `top` of all
    key blocks, ``int(top * Mkv)``; or, if `mass` is given, as many as together hold at most `mass`
    of ``P``; in any case one. It sees every key block that is not coherent, and those that hold its
    own positions; a query block that is not coherent sees all.

    Args:
        top: share of the key blocks that are kept, in (0, 1]. Default 0.5, which the authors
            recommend where nothing is tuned.
        mass: share of the pooled attention, in (0, 1], in place of `top`. Default None.
        similarity: least mean cosine of a coherent block, from -1 (all are) to 1. Default -0.1.
        block_q: rows of a query block. Default 128.
        block_k: keys of a key block. Default 64.

    Raises:
        ValueError: if an argument is no number of its kind or out of range.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 512, 64).unbind(0)
        >>> layout = SpargeAttn(top=0.25, block_q=32, block_k=32)(q, k, is_causal=False)
    """

    top: float = 0.5
    mass: float | None = None
    similarity: float = -0.1
    block_q: int = 128
    block_k: int = 64

    def __post_init__(self) -> None:
        share_fields(self, "top", *(() if self.mass is None else ("mass",)))
        number_field(self, "similarity", -1, 1)
        int_fields(self, block_q=1, block_k=1)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        base = BlockLayout.sink_window(seqlens(q, k), device=q.device)
        if k.shape[2] == 0 or q.shape[2] == 0:
            return base
        group = q.shape[1] // k.shape[1]
        mean_q, mean_k = pool_mean(q, self.block_q), pool_mean(k, self.block_k)
        blind_rows = ~self._coherent(q, self.block_q)[..., None]
        blind_keys = ~self._coherent(k, self.block_k).repeat_interleave(group, 1)[:, :, None]
        first_key = torch.arange(mean_k.shape[2], device=q.device) * self.block_k
        blocks = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * len(first_key)))
        lists = []
        for start in chunk_starts(mean_q.shape[2], blocks):
            first, last = block_rows(seqlens(q, k), self.block_q, start, blocks, q.device)
            visible = first_key <= last if is_causal else torch.ones_like(first_key <= last)
            scores = products(mean_q[:, :, start : start + blocks], mean_k)
            scores = scores * softmax_scale(q, scale)
            scores = scores.masked_fill(blind_keys | ~visible, -torch.inf)
            own = (first_key <= last) & (first_key + self.block_k > first)
            keep = self._best(scores) | blind_keys | own
            keep = (keep | blind_rows[:, :, start : start + blocks]) & visible
            numbers = torch.arange(len(first_key), dtype=torch.int32, device=q.device)
            lists.append(ascending(numbers.where(keep, len(first_key)), len(first_key)))
        counts, indices = join_lists(lists)
        block_size = (self.block_q, self.block_k)
        return replace(base, block_size=block_size, kv_num_blocks=counts, kv_indices=indices)

    def _coherent(self, x: Tensor, size: int) -> Tensor:
        """Which blocks of ``x [B, H, S, D]`` are coherent: bool ``[B, H, blocks]``. The mean cosine
        of all pairs is the squared norm of the mean of unit vectors.
        """
        return pool_mean(normalize(x.float(), dim=-1), size).square().sum(-1) > self.similarity

    def _best(self, scores: Tensor) -> Tensor:
        """Which blocks are kept by their scores ``[B, H, m, Mkv]``: bool."""
        values, order = scores.softmax(-1).nan_to_num_(0.0).sort(descending=True, stable=True)
        rank = torch.arange(scores.shape[-1], device=scores.device)
        if self.mass is None:
            count = torch.tensor(int(self.top * scores.shape[-1]), device=scores.device)
        else:
            count = (values.cumsum(-1) <= self.mass).sum(-1, keepdim=True)
        kept = (rank < count.clamp(min=1)).expand(scores.shape)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, kept)
        return kept & (scores > -torch.inf)
