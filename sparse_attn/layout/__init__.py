"""`BlockLayout`: which keys each query row may attend to."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import INT32_MAX, as_count
from . import algebra, formats, mask, rules
from . import density as densities
from .fields import Fields

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_INT_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


class BlockLayout(Fields):
    """The set of keys that each query row attends to, in O(kept) memory.

    Row ``i`` of head ``h`` of batch element ``b`` stands at ``p = i + seqlen_kv - seqlen_q`` (the
    last query sees the last key). It sees key ``j`` iff ``0 <= j < seqlen_kv``, ``j <= p`` when
    attention is causal, and any of these holds (a key seen through several counts once)::

        j < sink[h]
        window[h] == -1 or p - j < window[h]              # not causal: abs(p - j) < window[h]
        j // block_kv in kv_indices[b, h, m, :kv_num_blocks[b, h, m]]      # m = i // block_q
        j in column_indices[b, h, g, :num_columns[b, h, g]]                # g = m // column_group

    Every tensor is int32. Its batch size is `batch` or 1; its head size is any divisor of the
    number of query heads ``H`` (head ``h`` reads entry ``h // (H // size)``), so 1 is shared by all
    heads and the number of KV heads is shared by a GQA group. Lists are strictly ascending; what
    lies behind the count is ignored.

    Args:
        seqlens: ``(seqlen_q, seqlen_kv)``.
        sink: ``[H']``, number of leading keys every row sees; 0 for none.
        window: ``[H']``, number of trailing keys a row sees, itself included; 0 for none, -1 for no
            limit.
        block_size: ``(block_q, block_kv)``, any positive sizes. Default ``(64, 64)``.
        kv_num_blocks: ``[B', H', Mq]``, or None; ``Mq = ceil(seqlen_q / block_q)``.
        kv_indices: ``[B', H', Mq, width]``, or None; entries in ``[0, ceil(seqlen_kv /
            block_kv))``.
        num_columns: ``[B', H', Mg]``, or None; ``Mg = ceil(Mq / column_group)``.
        column_indices: ``[B', H', Mg, width]``, or None; entries in ``[0, seqlen_kv)``.
        column_group: number of consecutive query blocks that share one list of columns. Default 1.

    Raises:
        TypeError, ValueError: if a field has the wrong type, dtype, shape or device. Values are
            checked by `validate` and by every backend.

    Example:
        >>> layout = BlockLayout.sink_window(seqlens=(6, 6), sink=1, window=2)
        >>> layout.to_dense()[0, 0].int()
        tensor([[1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [1, 1, 1, 0, 0, 0],
                [1, 0, 1, 1, 0, 0],
                [1, 0, 0, 1, 1, 0],
                [1, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        device = torch.device(device)
        moved: dict[str, Any] = {name: x.to(device) for name, x in self.tensors().items()}
        return replace(self, **moved)

    # --- builders

    @staticmethod
    def dense(seqlens: tuple[int, int], *, device: torch.device | str = "cpu") -> BlockLayout:
        """Every key (every key up to the row's position when causal); holds two numbers."""
        return BlockLayout.sink_window(seqlens, window=-1, device=device)

    @staticmethod
    def sink_window(
        seqlens: tuple[int, int],
        *,
        sink: int | Tensor = 0,
        window: int | Tensor = 0,
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """The first `sink` keys and the last `window` keys, token-exact, per head if given as
        ``[H]`` tensors.

        Args:
            seqlens: ``(seqlen_q, seqlen_kv)``.
            sink: number of leading keys, an int or an int tensor ``[H']``. Default 0.
            window: number of trailing keys, itself included, an int or an int tensor ``[H']``; -1
                is no limit, and so is, of both, more than ``2**31 - 1``. Default 0.
            device: where to put the tensors. Default the CPU.

        Returns:
            BlockLayout: without blocks or columns.

        Example:
            >>> layout = BlockLayout.sink_window((8192, 8192), sink=4, window=1024)
            >>> round(layout.density(), 3)
            0.235
        """

        def per_head(name: str, value: int | Tensor, low: int) -> Tensor:
            if not isinstance(value, Tensor) or value.dim() == 0:
                value = as_count(name, value, low)
                return torch.full((1,), value, dtype=torch.int32, device=device)
            if value.dtype not in _INT_DTYPES:
                raise ValueError(f"{name} must be an int tensor, got {value.dtype}")
            if value.dtype == torch.int64:
                value = value.clamp(-INT32_MAX, INT32_MAX)
            return value.to(device=device, dtype=torch.int32)

        return BlockLayout(seqlens, per_head("sink", sink, 0), per_head("window", window, -1))

    @staticmethod
    def from_dense(
        block_mask: Tensor, *, block_size: tuple[int, int], seqlens: tuple[int, int]
    ) -> BlockLayout:
        """The blocks that are True in a mask of blocks; ``block_size=(1, 1)`` takes a mask of
        tokens.

        Args:
            block_mask: bool ``[B|1, H', Mq, Mkv]``.
            block_size: ``(block_q, block_kv)``.
            seqlens: ``(seqlen_q, seqlen_kv)``.

        Returns:
            BlockLayout: blocks only.

        Raises:
            ValueError: if `block_mask` is not bool or its shape does not match.

        Example:
            >>> mask = torch.eye(4, dtype=torch.bool)[None, None]
            >>> layout = BlockLayout.from_dense(mask, block_size=(16, 16), seqlens=(64, 64))
            >>> layout.kv_indices.flatten()
            tensor([0, 1, 2, 3], dtype=torch.int32)
        """
        return BlockLayout(**formats.from_dense(block_mask, block_size=block_size, seqlens=seqlens))

    @staticmethod
    def from_topk(
        indices: Tensor, *, block_size: tuple[int, int], seqlens: tuple[int, int]
    ) -> BlockLayout:
        """The blocks listed in ``[B|1, H', Mq, k]`` integer indices; -1 pads; any order, duplicates
        count once.
        """
        return BlockLayout(**formats.from_topk(indices, block_size=block_size, seqlens=seqlens))

    @staticmethod
    def from_csr(
        csr: Tensor, *, block_size: tuple[int, int], seqlens: tuple[int, int]
    ) -> BlockLayout:
        """The blocks stored in a torch sparse CSR tensor ``[Mq, Mkv]``, or in a BSR tensor of
        tokens; one for all heads.
        """
        return BlockLayout(**formats.from_csr(csr, block_size=block_size, seqlens=seqlens))

    @staticmethod
    def from_block_mask(block_mask: BlockMask, *, drop_mask_mod: bool = False) -> BlockLayout:
        """The full and partial blocks of FlexAttention's `BlockMask`.

        A `mask_mod` is a program, which a layout cannot hold: unless it lets everything through it
        is refused. Pass ``drop_mask_mod=True`` when it says only what `is_causal`, a sink or a
        window say too.
        """
        return BlockLayout(**formats.from_block_mask(block_mask, drop_mask_mod=drop_mask_mod))

    # --- converters

    def visible(
        self, start: int, stop: int, *, is_causal: bool = True, num_heads: int | None = None
    ) -> Tensor:
        """The token mask of rows ``[start, stop)``: bool ``[B', H, stop - start, seqlen_kv]``."""
        return mask.visible(self, start, stop, is_causal=is_causal, num_heads=num_heads)

    def to_dense(self, *, is_causal: bool = True, num_heads: int | None = None) -> Tensor:
        """The full token mask, bool ``[B', H, seqlen_q, seqlen_kv]``: O(S^2) memory, for tests and
        plots.
        """
        return self.visible(0, self.seqlen_q, is_causal=is_causal, num_heads=num_heads)

    def to_topk(self) -> Tensor:
        """The block lists as int32 ``[B', H', Mq, width]`` padded with -1."""
        return formats.to_topk(self)

    def to_csr(self, batch: int = 0, head: int = 0) -> Tensor:
        """The block lists of one head as a torch sparse CSR tensor of ones, float32 ``[Mq,
        Mkv]``.
        """
        return formats.to_csr(self, batch, head)

    def to_block_mask(self, *, is_causal: bool = True, num_heads: int | None = None) -> BlockMask:
        """FlexAttention's `BlockMask` with the same visibility (full-width indices: ``Mq * Mkv``
        memory).
        """
        return formats.to_block_mask(self, is_causal=is_causal, num_heads=num_heads)

    # --- algebra

    def __or__(self, other: BlockLayout) -> BlockLayout:
        """The union: a key seen through either side is seen, once."""
        if not isinstance(other, BlockLayout):
            return NotImplemented
        return algebra.union(self, other)

    def __getitem__(self, index: Any) -> BlockLayout:
        """``layout[batch]`` or ``layout[batch, heads]``, each an int or a slice; broadcast sizes of
        1 stay.
        """
        batch, heads = index if isinstance(index, tuple) else (index, slice(None))
        return algebra.take(self, batch, heads)

    def expand_heads(self, num_heads: int) -> BlockLayout:
        """The same layout with every tensor spelled out for `num_heads` query heads."""
        return algebra.expand_heads(self, num_heads)

    def refine(self, block_size: tuple[int, int]) -> BlockLayout:
        """The same layout in smaller blocks; `block_size` must divide the present one."""
        return algebra.refine(self, block_size)

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor]:
        """``(q_num_blocks, q_indices)``: for each key block the query blocks that list it,
        ascending; for backward.
        """
        return algebra.transpose(self)

    # --- measures

    def density(self, *, is_causal: bool = True) -> float:
        """Visible (query, key) pairs divided by all pairs (all causal pairs), averaged over batch
        and heads.

        Counted by interval arithmetic in O(rows * width), never on an S x S array.

        Args:
            is_causal: whether the pairs behind the diagonal are excluded from both counts. Default
                True.

        Returns:
            float: in [0, 1]; 0.0 if there are no pairs.
        """
        return densities.density(self, is_causal=is_causal)

    def validate(self) -> BlockLayout:
        """Check every value: ranges of sinks and windows, counts, ranges, order and duplicates of
        the lists.

        Returns:
            BlockLayout: itself, so that it can be chained.

        Raises:
            ValueError: naming the tensor, the place and the value.
        """
        rules.validate(self)
        return self
