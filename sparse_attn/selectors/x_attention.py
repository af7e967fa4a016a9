"""Blocks by the sums of their antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import int_fields, share_fields
from .choose import covering_blocks
from .probes import products
from .scored import BlockScores, QueryBlocks


@dataclass(frozen=True)
class XAttention(BlockScores):
    """For each query block and head, the fewest key blocks that hold a share of its estimated
    attention (XAttention, arXiv 2503.16428), for prefill.

    Rows and keys are taken in groups of `stride`. A group of rows and a group of keys score the
    products on their antidiagonal, which every row and every key takes part in::

        A[r, c] = softmax over c of  scale / stride * sum over t of
                  q[r * stride + stride - 1 - t] @ k[c * stride + t]

    over the groups of keys that end no later than the group of rows (over all if not causal). The
    score of a key block is the sum of ``A`` over the query block and it. Kept are the first block,
    those that hold the query block's own positions, and the best others, until they hold `mass` of
    the sum; the one that crosses it is kept too.

    Args:
        mass: share of the estimated attention, in (0, 1]. Default 0.9.
        stride: rows and keys of a group, a divisor of `block_size`. 16 costs half. Default 8.
        block_size: rows of a query block and keys of a key block. Default 128.

    Raises:
        ValueError: if an argument is no number of its kind or out of range, or if `stride`
            does not divide `block_size`.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 512, 64).unbind(0)
        >>> layout = XAttention(mass=0.8, block_size=64)(q, k)
    """

    mass: float = 0.9
    stride: int = 8
    block_size: int = 128
    chunk_elements: ClassVar[int] = 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        share_fields(self, "mass")
        int_fields(self, stride=1)
        if self.block_size % self.stride:
            raise ValueError(
                f"stride must divide block_size, got {self.stride} and {self.block_size}"
            )

    def prepare(self, q: Tensor, k: Tensor, *, is_causal: bool, scale: float) -> Any:
        queries = _groups(q, self.stride).flip(3).flatten(3)
        return queries, _groups(k, self.stride).flatten(3), scale / self.stride

    def scores(self, prepared: Any, blocks: QueryBlocks) -> Tensor:
        queries, keys, scale = prepared
        (seqlen_q, seqlen_kv), per_block = blocks.seqlens, self.block_size // self.stride
        rows = slice(blocks.numbers.start * per_block, blocks.numbers.stop * per_block)
        seen = seqlen_kv
        if blocks.is_causal:
            stop = min(blocks.numbers.stop * self.block_size, seqlen_q)
            seen = max(1, stop + seqlen_kv - seqlen_q)
        scores = products(queries[:, :, rows], keys[:, :, : -(-seen // self.stride)])
        scores = scores.float() * scale
        if blocks.is_causal:
            num_rows, num_keys = scores.shape[2:]
            ahead = self._ahead(blocks.seqlens, rows.start, num_rows, num_keys, scores.device)
            scores = scores.masked_fill_(ahead, -torch.inf)
        return _sum_tiles(scores.softmax(-1).nan_to_num_(0.0), per_block)

    def forced(self, prepared: Any, blocks: QueryBlocks) -> Tensor:
        return blocks.own() | (blocks.first_key == 0)

    def choose(self, scores: Tensor, forced: Tensor | None) -> tuple[Tensor, Tensor]:
        return covering_blocks(scores, self.mass, forced)

    def elements(self, seqlen_kv: int) -> int:
        return self.block_size // self.stride * -(-seqlen_kv // self.stride)

    def _ahead(
        self, seqlens: tuple[int, int], start: int, rows: int, keys: int, device: torch.device
    ) -> Tensor:
        """Which groups of keys end after the groups of rows ``start, start + 1 ..``: bool ``[rows,
        keys]``.
        """
        seqlen_q, seqlen_kv = seqlens
        off = seqlen_kv - seqlen_q
        row_end = (torch.arange(start, start + rows, device=device) + 1) * self.stride + off
        key_end = (torch.arange(keys, device=device) + 1) * self.stride
        return key_end.clamp(max=seqlen_kv) > row_end.clamp(max=seqlen_kv)[:, None]


def _groups(x: Tensor, stride: int) -> Tensor:
    """Consecutive rows together: ``[B, H, S, D]`` to ``[B, H, ceil(S / stride), stride, D]``, with
    zeros for rows that do not exist.
    """
    return pad(x, (0, 0, 0, -x.shape[2] % stride)).unflatten(2, (-1, stride))


def _sum_tiles(x: Tensor, size: int) -> Tensor:
    """Sums of ``x [..., M, N]`` over tiles of `size` x `size`; those at the ends may be smaller."""
    rows, columns = (min(size, n) for n in x.shape[-2:])
    x = pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows))
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).sum((-3, -1))
