"""Blocks by their means, where the means stand for what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import pool_mean
from .checks import int_fields, number_field, share_fields
from .choose import highest, highest_within, listed_blocks
from .probes import products
from .scored import BlockScores, QueryBlocks


@dataclass(frozen=True)
class SpargeAttn(BlockScores):
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
        super().__post_init__()
        share_fields(self, "top", *(() if self.mass is None else ("mass",)))
        number_field(self, "similarity", -1, 1)
        int_fields(self, block_q=1, block_k=1)

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.block_q, self.block_k

    def prepare(self, q: Tensor, k: Tensor, *, is_causal: bool, scale: float) -> Any:
        queries, keys = super().prepare(q, k, is_causal=is_causal, scale=scale)
        blind_rows = ~self._coherent(q, self.block_q)[..., None]
        blind_keys = ~self._coherent(k, self.block_k)
        blind_keys = blind_keys.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
        return queries, keys, blind_rows, blind_keys, scale

    def scores(self, prepared: Any, blocks: QueryBlocks) -> Tensor:
        queries, keys, _, blind_keys, scale = prepared
        scores = products(queries[:, :, blocks.numbers], keys) * scale
        return scores.masked_fill(blind_keys, -torch.inf)

    def forced(self, prepared: Any, blocks: QueryBlocks) -> Tensor:
        _, _, blind_rows, blind_keys, _ = prepared
        return blind_keys | blocks.own() | blind_rows[:, :, blocks.numbers]

    def choose(self, scores: Tensor, forced: Tensor | None) -> tuple[Tensor, Tensor]:
        mass = scores.softmax(-1).nan_to_num_(0.0)
        if self.mass is None:
            keep = highest(mass, max(1, int(self.top * mass.shape[-1])))
        else:
            keep = highest_within(mass, self.mass, inclusive=False)
        keep = keep & (scores > -torch.inf)
        return listed_blocks(keep if forced is None else keep | forced)

    def _coherent(self, x: Tensor, size: int) -> Tensor:
        """Which blocks of ``x [B, H, S, D]`` are coherent: bool ``[B, H, blocks]``. The mean cosine
        of all pairs is the squared norm of the mean of unit vectors.
        """
        return pool_mean(normalize(x.float(), dim=-1), size).square().sum(-1) > self.similarity
