"""The frame of selectors that score blocks: a method is its scores and the rule that chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layout import BlockLayout
from .base import Selector, block_rows, chunk_starts, pool_mean, seqlens
from .checks import count_fields, int_fields
from .choose import join_lists
from .probes import products, softmax_scale


class QueryBlocks:
    """Some consecutive query blocks of a call, and where they stand among all its key blocks.

    Attributes:
        numbers: their numbers, a slice.
        first: position of the first row of each block, int64 ``[count, 1]``.
        last: position of the last row of each block, int64 ``[count, 1]``.
        first_key: the first key of each key block, int64 ``[Mkv]``.
        seqlens: ``(seqlen_q, seqlen_kv)`` of the call.
        is_causal: whether the call is causal.
    """

    def __init__(
        self,
        seqlens: tuple[int, int],
        block_sizes: tuple[int, int],
        numbers: slice,
        is_causal: bool,
        device: torch.device,
    ) -> None:
        self.seqlens, self.is_causal, self.numbers = seqlens, is_causal, numbers
        self._block_kv = block_sizes[1]
        count = numbers.stop - numbers.start
        self.first, self.last = block_rows(seqlens, block_sizes[0], numbers.start, count, device)
        self.first_key = torch.arange(0, seqlens[1], self._block_kv, device=device)

    def __len__(self) -> int:
        return self.first.shape[0]

    def own(self) -> Tensor:
        """Which key blocks hold a position of the query block: bool ``[count, Mkv]``."""
        return (self.first_key <= self.last) & (self.first_key + self._block_kv > self.first)

    def hidden(self, sink: int, window: int) -> Tensor | None:
        """Which key blocks are no candidates: those after the query block's last row if the call is
        causal, and those that the sink or the window shows to every row. Bool ``[count, Mkv]``, or
        None if all are candidates.
        """
        hidden = self.first_key > self.last if self.is_causal else None
        if sink == window == 0:
            return hidden
        last_key = (self.first_key + self._block_kv - 1).clamp(max=self.seqlens[1] - 1)
        in_window = self.last - self.first_key < window
        if not self.is_causal:
            in_window = in_window & (last_key - self.first < window)
        shown = (last_key < sink) | in_window
        return shown if hidden is None else shown | hidden


class BlockScores(Selector):
    """Scores key blocks for each query block and head, and chooses by the scores.

    A subclass is a frozen dataclass with a field `block_size` (or a property `block_sizes`) that
    defines `choose`, and `scores` unless products of mean rows are meant. A call does the rest, for
    as many query blocks at a time as `chunk_elements` allows::

        prepared = prepare(q, k)                           # once
        for blocks in chunks of query blocks:
            chosen = choose(scores(prepared, blocks), forced(prepared, blocks))

    Blocks that no row of the query block may see, or that the sink or the window shows to every
    row, have a score of -inf whatever `scores` says: they are never chosen.

    Attributes:
        block_size: rows of a query block and keys of a key block.
        sink: number of leading keys that every row sees. Default 0.
        window: number of trailing keys that every row sees, itself included. Default 0.
        margin: the last keys that the window shows are candidates too, so many of them, at most
            `window`: with a field of this name a selector serves in a `MaskCache`. Default 0.
        chunk_elements: most elements that the scores of one chunk have. Default ``2**22``.

    Raises:
        ValueError: if `block_size`, `sink`, `window` or `margin` is not an int in its range.

    Example:
        >>> from dataclasses import dataclass
        >>> from sparse_attn.selectors.choose import top_blocks
        >>> @dataclass(frozen=True)
        ... class Nearest(BlockScores):
        ...     top_k: int = 4
        ...     block_size: int = 32
        ...     def choose(self, scores, forced):
        ...         return top_blocks(scores, self.top_k, forced)
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> Nearest()(q, k).kv_num_blocks[0, 0].tolist()
        [1, 2, 3, 4, 4, 4, 4, 4]
    """

    block_size: int
    sink: int = 0
    window: int = 0
    margin: int = 0
    chunk_elements: ClassVar[int] = 2**22

    def __post_init__(self) -> None:
        """Checks the fields above; one of a subclass calls this and checks the rest."""
        if hasattr(self, "block_size"):
            int_fields(self, block_size=1)
        count_fields(self, sink=0, window=0, margin=0)
        if self.margin > self.window:
            raise ValueError(f"margin is {self.margin}, more than window = {self.window}")

    @property
    def block_sizes(self) -> tuple[int, int]:
        """Rows of a query block and keys of a key block."""
        return self.block_size, self.block_size

    def prepare(self, q: Tensor, k: Tensor, *, is_causal: bool, scale: float) -> Any:
        """What `scores` and `forced` need of q and k, computed once in a call.

        Args:
            q: ``[B, H, Sq, D]``.
            k: ``[B, Hkv, Skv, D]``.
            is_causal: as in a call.
            scale: as in a call; never None.

        Returns:
            Any: by default the means of query blocks and of key blocks, float32 ``([B, H, Mq, D],
            [B, Hkv, Mkv, D])``.
        """
        block_q, block_kv = self.block_sizes
        return pool_mean(q, block_q), pool_mean(k, block_kv)

    def scores(self, prepared: Any, blocks: QueryBlocks) -> Tensor:
        """The scores of all key blocks, by default the products of means.

        Args:
            prepared: what `prepare` has returned.
            blocks: the query blocks to score for.

        Returns:
            Tensor: float ``[B, H, len(blocks), Mkv]``; Hkv in place of H if the heads of a group
            share their blocks. Key blocks at the end that are never chosen may be left out.
        """
        queries, keys = prepared
        return products(queries[:, :, blocks.numbers], keys)

    def forced(self, prepared: Any, blocks: QueryBlocks) -> Tensor | None:
        """Which key blocks are to be chosen whatever their score, as far as they are candidates:
        bool, broadcastable to the scores; by default None, for none.
        """
        return None

    def choose(self, scores: Tensor, forced: Tensor | None) -> tuple[Tensor, Tensor]:
        """The chosen blocks, see the rules in `selectors.choose`.

        Args:
            scores: float ``[B, H, m, n]``, -inf for blocks that must not be chosen.
            forced: bool, broadcastable to `scores`: blocks to choose in any case, or None.

        Returns:
            tuple[Tensor, Tensor]: int32 ``(kv_num_blocks [B, H, m], kv_indices [B, H, m, width])``,
            ascending in each row.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define choose")

    def elements(self, seqlen_kv: int) -> int:
        """How many elements the scores of one query block and head take, intermediate ones too: by
        default the number of key blocks.
        """
        return -(-seqlen_kv // self.block_sizes[1])

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        return self.layout(self.prune(0, None, q, k, is_causal=is_causal, scale=scale), q, k)

    @property
    def num_stages(self) -> int:
        return 1

    def prune(
        self,
        stage: int,
        kept: None,
        q: Tensor,
        k: Tensor,
        *,
        is_causal: bool = True,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """The chosen blocks of all query blocks, or None if there are no rows or no keys. See
        `Refreshable`.
        """
        if k.shape[2] == 0 or q.shape[2] == 0:
            return None
        prepared = self.prepare(q, k, is_causal=is_causal, scale=softmax_scale(q, scale))
        at_once = max(
            1, self.chunk_elements // (q.shape[0] * q.shape[1] * self.elements(k.shape[2]))
        )
        lists = []
        for start in chunk_starts(-(-q.shape[2] // self.block_sizes[0]), at_once):
            numbers = slice(start, start + at_once)
            blocks = QueryBlocks(seqlens(q, k), self.block_sizes, numbers, is_causal, q.device)
            lists.append(self._chosen(prepared, blocks))
        return join_lists(lists)

    def layout(self, kept: tuple[Tensor, Tensor] | None, q: Tensor, k: Tensor) -> BlockLayout:
        """The layout of the chosen blocks."""
        base = BlockLayout.sink_window(
            seqlens(q, k), sink=self.sink, window=self.window, device=q.device
        )
        if kept is None:
            return base
        counts, indices = kept
        return replace(base, block_size=self.block_sizes, kv_num_blocks=counts, kv_indices=indices)

    def _chosen(self, prepared: Any, blocks: QueryBlocks) -> tuple[Tensor, Tensor]:
        scores, forced = self.scores(prepared, blocks), self.forced(prepared, blocks)
        hidden, width = blocks.hidden(self.sink, self.window - self.margin), scores.shape[-1]
        if width < len(blocks.first_key):
            forced = None if forced is None else forced[..., :width]
            hidden = None if hidden is None else hidden[:, :width]
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
            forced = None if forced is None else forced > hidden  # forced and not hidden
        return self.choose(scores, forced)
