"""InfiniteHiP: pruning of key chunks in stages, finer from one to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..ops.infinite_hip_stage import infinite_hip_stage
from ..reference.infinite_hip_stage import Lists
from .base import Selector, seqlens
from .checks import bool_fields, count_fields, int_fields, ints_fields


@dataclass(frozen=True)
class InfiniteHiP(Selector):
    """For each query block `keep[-1]` keys that survive several stages of pruning, a sink and a
    window (InfiniteHiP, arXiv 2502.08910, without its change of rotary positions).

    Stage ``i`` cuts what is left of the keys into chunks of ``chunk[i]``, finds in each chunk a
    representative key by binary search, and keeps the ``keep[i] // chunk[i]`` chunks whose search
    has met the greatest product with a query. The queries of a query block are means of
    ``stride_q[i]`` consecutive rows, in q's dtype. A step of the search halves the interval ``[L,
    R)`` at ``C = (L + R) // 2`` and goes on in the half whose middle key, ``(L + C) // 2`` or ``(C
    + R) // 2``, has the greater product with any query; of equal ones in the right half. Of chunks
    with equal scores the earlier one is kept.

    Chunks that begin in the window of the block's first row, but for ``chunk[0]`` keys, are not
    searched. The keys that represent a chunk may lie up to ``chunk[0]`` after the row, so a
    selection, but not attention, looks ahead of its block unless ``window >= 2 * chunk[0]``.

    The first stage compares every query block with every chunk: quadratic, with a small factor.
    `MaskCache` can keep what each stage has found for a number of decoding steps of its own.

    Args:
        chunk: keys of a chunk in each stage; each is a multiple of the next. Default
            ``(256, 32, 8)``.
        keep: number of keys kept after each stage, a multiple of that stage's chunk. Default
            ``(32768, 8192, 2048)``.
        stride_q: rows averaged to one query in each stage. Default ``(4, 4, 1)``.
        block_q: rows of a query block, at most ``chunk[0]``: else keys that leave the window within
            the block would not have been searched. Default 64.
        sink: number of leading keys every row sees, a multiple of the last chunk. Default 256.
        window: number of trailing keys every row sees, itself included; ``chunk[0]`` if that is
            more. Default 1024.
        shared: whether all heads share a selection, by their greatest score, as in the paper, or
            each has its own. Default True.
        margin: the last keys that the window of the last row shows are searched too, so many of
            them, at most `window` and ``chunk[0]``. They may then be found before they leave the
            window, while a selection is reused for later rows, see `MaskCache`. Default 0.

    Raises:
        ValueError: if an argument is no number of its kind or out of range, or if `chunk`,
            `keep` and `stride_q` differ in length or a size is not the multiple that it has to be.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 512, 64).unbind(0)
        >>> sizes = dict(chunk=(32, 8), keep=(128, 64), stride_q=(4, 1))
        >>> layout = InfiniteHiP(**sizes, block_q=32, sink=16, window=64)(q, k)
    """

    chunk: tuple[int, ...] = (256, 32, 8)
    keep: tuple[int, ...] = (32768, 8192, 2048)
    stride_q: tuple[int, ...] = (4, 4, 1)
    block_q: int = 64
    sink: int = 256
    window: int = 1024
    shared: bool = True
    margin: int = 0

    def __post_init__(self) -> None:
        int_fields(self, block_q=1, sink=0)
        count_fields(self, window=1, margin=0)
        bool_fields(self, "shared")
        ints_fields(self, chunk=1, keep=1, stride_q=1)
        for name in ("chunk", "keep", "stride_q"):
            values = getattr(self, name)
            if len(values) != len(self.chunk) or not values:
                raise ValueError(f"{name} must have one entry for each stage, got {values!r}")
        for coarse, fine in zip(self.chunk, self.chunk[1:], strict=False):
            if coarse % fine:
                raise ValueError(f"chunk: {coarse} is no multiple of {fine}")
        for kept, size in zip(self.keep, self.chunk, strict=True):
            if kept % size:
                raise ValueError(f"keep: {kept} is no multiple of its chunk of {size}")
        if self.block_q > self.chunk[0]:
            raise ValueError(f"block_q is {self.block_q}, more than chunk[0] = {self.chunk[0]}")
        if self.sink % self.chunk[-1]:
            raise ValueError(f"sink: {self.sink} is no multiple of the last chunk, {self.chunk}")
        if self.margin > min(self.window, self.chunk[0]):
            raise ValueError(
                f"margin is {self.margin}, more than window = {self.window} or chunk[0] = "
                f"{self.chunk[0]}"
            )

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        kept = self.prune(0, None, q, k, is_causal=is_causal, scale=scale)
        for stage in range(1, self.num_stages):
            kept = self.prune(stage, kept, q, k, is_causal=is_causal, scale=scale)
        return self.layout(kept, q, k)

    @property
    def num_stages(self) -> int:
        return len(self.chunk)

    def prune(
        self,
        stage: int,
        kept: Lists | None,
        q: Tensor,
        k: Tensor,
        *,
        is_causal: bool = True,
        scale: float | None = None,
    ) -> Lists:
        """The chunks that a stage keeps.

        Args:
            stage: its number, from 0.
            kept: the chunks that the stage before it has kept, or None for the first one.
            q: ``[B, H, Sq, D]``.
            k: ``[B, Hkv, Skv, D]``.
            is_causal: as in `sparse_attention`. Default True.
            scale: as in `sparse_attention`; its sign alone counts. Default None.

        Returns:
            tuple[Tensor, Tensor]: int32 ``(counts [B, H or 1, Mq], indices [B, H or 1, Mq,
            width])``, ascending; chunk ``c`` begins at key ``sink + chunk[stage] * c``.

        Example:
            >>> q, k = torch.randn(2, 1, 4, 512, 64).unbind(0)
            >>> selector = InfiniteHiP(chunk=(32,), keep=(64,), stride_q=(1,), block_q=32, sink=0)
            >>> counts, indices = selector.prune(0, None, q, k)
            >>> counts.shape
            torch.Size([1, 1, 16])
        """
        if scale is not None and scale < 0:
            q = -q
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        size = self.chunk[stage]
        return infinite_hip_stage(
            q,
            k,
            kept,
            parent=self.chunk[max(0, stage - 1)],
            chunk=size,
            slots=self.keep[stage] // size,
            stride_q=self.stride_q[stage],
            block_q=self.block_q,
            sink=self.sink,
            window=self.window - self.margin,
            behind=max(0, self.window - self.chunk[0]),
            shared=self.shared,
            is_causal=is_causal,
        )

    def layout(self, kept: Lists, q: Tensor, k: Tensor) -> BlockLayout:
        """The layout of the chunks that the last stage has kept.

        Args:
            kept: from `prune`, for the last stage.
            q: ``[B, H, Sq, D]``, as there.
            k: ``[B, Hkv, Skv, D]``, as there.

        Returns:
            BlockLayout: the chunks as blocks, a sink and a window.

        Example:
            >>> q, k = torch.randn(2, 1, 4, 512, 64).unbind(0)
            >>> selector = InfiniteHiP(chunk=(32,), keep=(64,), stride_q=(1,), block_q=32, sink=0)
            >>> selector.layout(selector.prune(0, None, q, k), q, k).block_size
            (32, 32)
        """
        counts, indices = kept
        first_block = self.sink // self.chunk[-1]
        listed = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
        base = BlockLayout.sink_window(
            seqlens(q, k), sink=self.sink, window=max(self.window, self.chunk[0]), device=q.device
        )
        return replace(
            base,
            block_size=(self.block_q, self.chunk[-1]),
            kv_num_blocks=counts,
            kv_indices=torch.where(listed, indices + first_block, 0),
        )
