"""Selectors that look at lengths only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..layout.lists import ascending
from .base import Selector, block_rows, seqlens
from .checks import count_fields, int_fields, refuse_not_causal

_FEW_BLOCKS = 64  # lists of dense rows are short, as their blocks are large


@dataclass(frozen=True)
class Dense(Selector):
    """Every key: ordinary attention.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> layout = Dense()(q, k)
    """

    is_dense: ClassVar[bool] = True

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        return BlockLayout.dense(seqlens(q, k), device=q.device)


@dataclass(frozen=True)
class SlidingWindow(Selector):
    """The last `window` keys, itself included (Longformer, arXiv 2004.05150; Mistral, arXiv
    2310.06825).

    Args:
        window: number of keys, at least 1; not causal: keys closer than `window` on both sides.
            Default 1024.

    Raises:
        ValueError: if an argument is no number of its kind or out of range.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> layout = SlidingWindow(window=64)(q, k)
    """

    window: int = 1024

    def __post_init__(self) -> None:
        count_fields(self, window=1)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        return BlockLayout.sink_window(seqlens(q, k), window=self.window, device=q.device)


@dataclass(frozen=True)
class SinkWindow(Selector):
    """The first `sink` keys and the last `window` keys (StreamingLLM, arXiv 2309.17453; "A-shape").

    Keys keep the positions that the model gave them; StreamingLLM re-numbers them in its cache.

    Args:
        sink: number of leading keys, at least 0. Default 64.
        window: number of trailing keys, itself included, at least 1. Default 1024.

    Raises:
        ValueError: if an argument is no number of its kind or out of range.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> layout = SinkWindow(sink=4, window=64)(q, k)
    """

    sink: int = 64
    window: int = 1024

    def __post_init__(self) -> None:
        count_fields(self, sink=0, window=1)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        return BlockLayout.sink_window(
            seqlens(q, k), sink=self.sink, window=self.window, device=q.device
        )


@dataclass(frozen=True)
class TriShape(Selector):
    """The first `sink` keys and the last `window` keys, and all keys for a call's last `last` rows
    (MInference, arXiv 2407.02490): the question at the end of a prompt reads everything.

    Decoding is dense, as its rows are the last ones.

    Args:
        sink: number of leading keys, at least 0. Default 128.
        window: number of trailing keys, itself included, at least 1. Default 3968.
        last: number of rows that see all keys, rounded up so that they begin at a multiple of 64.
            Default 100.

    Raises:
        ValueError: if an argument is no number of its kind or out of range.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> layout = TriShape(sink=4, window=32, last=10)(q, k)
    """

    sink: int = 128
    window: int = 3968
    last: int = 100

    def __post_init__(self) -> None:
        count_fields(self, sink=0, window=1, last=1)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        base = BlockLayout.sink_window(
            seqlens(q, k), sink=self.sink, window=self.window, device=q.device
        )
        block_q, block_kv = 64, 64 * max(1, -(-k.shape[2] // (64 * _FEW_BLOCKS)))
        width = -(-k.shape[2] // block_kv)
        stops = (torch.arange(-(-q.shape[2] // block_q), device=q.device) + 1) * block_q
        counts = (stops > q.shape[2] - self.last).int() * width
        indices = torch.arange(width, dtype=torch.int32, device=q.device)
        return replace(
            base,
            block_size=(block_q, block_kv),
            kv_num_blocks=counts[None, None],
            kv_indices=indices.repeat(1, 1, len(counts), 1),
        )


@dataclass(frozen=True)
class LocalStride(Selector):
    """The last `local` blocks and every `stride`-th block, other ones for each KV head
    (S2-Attention, arXiv 2407.17678; Phi-3-small), for models trained so.

    A row in block ``i`` sees the keys of block ``j <= i`` iff ``i - j < local`` or ``(j + h *
    max(1, stride // num_kv_heads) + offset) % stride == 0``, where ``h`` is its KV head.

    Args:
        local: number of trailing blocks, its own included, at least 1. Default 32.
        stride: distance of the other blocks, at least 1. Default 8.
        offset: added to the block's number. Default 0.
        block_size: tokens of a block. Default 64.

    Raises:
        ValueError: if an argument is no number of its kind or out of range; when called with
            ``is_causal=False``.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> layout = LocalStride(local=2, stride=4, block_size=16)(q, k)
    """

    local: int = 32
    stride: int = 8
    offset: int = 0
    block_size: int = 64

    def __post_init__(self) -> None:
        count_fields(self, local=1)
        int_fields(self, stride=1, offset=0, block_size=1)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        refuse_not_causal(self, is_causal)
        base = BlockLayout.sink_window(seqlens(q, k), device=q.device)
        if k.shape[2] == 0 or q.shape[2] == 0:
            return base
        size, kv_heads = self.block_size, k.shape[1]
        # Rows of one query block stand in one key block.
        block_q = size if (k.shape[2] - q.shape[2]) % size == 0 else 1
        first, _ = block_rows(seqlens(q, k), block_q, 0, q.shape[2], q.device)
        own = first.div(size, rounding_mode="floor")
        num_blocks = -(-k.shape[2] // size)
        near = own - torch.arange(min(self.local, num_blocks), device=q.device)
        heads = torch.arange(kv_heads, device=q.device)[:, None, None]
        begin = -(heads * max(1, self.stride // kv_heads) + self.offset) % self.stride
        strided = begin + torch.arange(0, num_blocks, self.stride, device=q.device)
        blocks = torch.cat([x.expand(kv_heads, len(own), -1) for x in (near, strided)], -1)
        blocks = blocks.where((blocks >= 0) & (blocks <= own), num_blocks)
        counts, indices = ascending(blocks.int()[None], num_blocks)
        return replace(base, block_size=(block_q, size), kv_num_blocks=counts, kv_indices=indices)
