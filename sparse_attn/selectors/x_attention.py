"""Blocks by the sums of their antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import BlockLayout
from .base import Selector, block_rows, chunk_starts, seqlens
from .checks import int_fields, share_fields
from .choose import covering_blocks, join_lists
from .probes import products, softmax_scale

_CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True)
class XAttention(Selector):
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

    def __post_init__(self) -> None:
        share_fields(self, "mass")
        int_fields(self, stride=1, block_size=1)
        if self.block_size % self.stride:
            raise ValueError(
                f"stride must divide block_size, got {self.stride} and {self.block_size}"
            )

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        base = BlockLayout.sink_window(seqlens(q, k), device=q.device)
        if k.shape[2] == 0 or q.shape[2] == 0:
            return base
        queries = _groups(q, self.stride).flip(3).flatten(3)
        keys = _groups(k, self.stride).flatten(3)
        per_block = self.block_size // self.stride
        pairs = q.shape[0] * q.shape[1] * per_block * keys.shape[2]  # of groups, a query block
        blocks = max(1, _CHUNK_ELEMENTS // pairs)
        lists = []
        for start in chunk_starts(-(-q.shape[2] // self.block_size), blocks):
            first, last = block_rows(seqlens(q, k), self.block_size, start, blocks, q.device)
            seen = k.shape[2]
            if is_causal:
                stop = min((start + blocks) * self.block_size, q.shape[2])
                seen = max(1, stop + k.shape[2] - q.shape[2])
            rows = slice(start * per_block, (start + blocks) * per_block)
            scores = products(queries[:, :, rows], keys[:, :, : -(-seen // self.stride)])
            scores = scores.float() * (softmax_scale(q, scale) / self.stride)
            if is_causal:
                num_rows, num_keys = scores.shape[2:]
                ahead = self._ahead(seqlens(q, k), rows.start, num_rows, num_keys, q.device)
                scores = scores.masked_fill_(ahead, -torch.inf)
            mass = _sum_tiles(scores.softmax(-1).nan_to_num_(0.0), per_block)
            first_key = torch.arange(mass.shape[3], device=q.device) * self.block_size
            own = (first_key <= last) & (first_key + self.block_size > first)
            if is_causal:
                mass = mass.masked_fill_(first_key > last, -torch.inf)
            lists.append(covering_blocks(mass, self.mass, own | (first_key == 0)))
        counts, indices = join_lists(lists)
        block_size = (self.block_size, self.block_size)
        return replace(base, block_size=block_size, kv_num_blocks=counts, kv_indices=indices)

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
