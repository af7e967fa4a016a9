"""`BlockLayout`: which keys each query row may attend to."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import algebra, formats, mask, rules
from . import density as densities
from .builders import Builders

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class BlockLayout(Builders):
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
        kv_num_blocks: ``[B', H', Mq]``; ``Mq = ceil(seqlen_q / block_q)``. Default None: no blocks.
        kv_indices: ``[B', H', Mq, width]``; entries in ``[0, ceil(seqlen_kv / block_kv))``. Default
            None.
        num_columns: ``[B', H', Mg]``; ``Mg = ceil(Mq / column_group)``. Default None: no columns.
        column_indices: ``[B', H', Mg, width]``; entries in ``[0, seqlen_kv)``. Default None.
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
        """The same layout on another device.

        Args:
            device: where the tensors go.

        Returns:
            BlockLayout: with all tensors on `device`.

        Example:
            >>> BlockLayout.dense((8, 8)).to("meta").device
            device(type='meta')
        """
        device = torch.device(device)
        moved: dict[str, Any] = {name: x.to(device) for name, x in self.tensors().items()}
        return replace(self, **moved)

    # --- converters

    def visible(
        self, start: int, stop: int, *, is_causal: bool = True, num_heads: int | None = None
    ) -> Tensor:
        """Which keys some rows see.

        Args:
            start: the first row.
            stop: the row behind the last one.
            is_causal: whether rows see no key behind their position. Default True.
            num_heads: number of query heads ``H``. Default None: `num_heads` of the layout.

        Returns:
            Tensor: bool ``[B', H, stop - start, seqlen_kv]``.

        Raises:
            ValueError: if the rows do not exist, or the layout's heads do not divide
                `num_heads`.

        Example:
            >>> BlockLayout.sink_window((6, 6), sink=1, window=2).visible(4, 6)[0, 0].int()
            tensor([[1, 0, 0, 1, 1, 0],
                    [1, 0, 0, 0, 1, 1]], dtype=torch.int32)
        """
        return mask.visible(self, start, stop, is_causal=is_causal, num_heads=num_heads)

    def to_dense(self, *, is_causal: bool = True, num_heads: int | None = None) -> Tensor:
        """The mask of all tokens, for tests and plots: it takes ``O(S^2)`` memory.

        Args:
            is_causal: whether rows see no key behind their position. Default True.
            num_heads: number of query heads ``H``. Default None: `num_heads` of the layout.

        Returns:
            Tensor: bool ``[B', H, seqlen_q, seqlen_kv]``.

        Example:
            >>> BlockLayout.dense((3, 3)).to_dense()[0, 0].int()
            tensor([[1, 0, 0],
                    [1, 1, 0],
                    [1, 1, 1]], dtype=torch.int32)
        """
        return self.visible(0, self.seqlen_q, is_causal=is_causal, num_heads=num_heads)

    def to_topk(self) -> Tensor:
        """The block lists as int32 ``[B', H', Mq, width]``, padded with -1.

        Raises:
            ValueError: if the layout has no block lists.
        """
        return formats.to_topk(self)

    def to_csr(self, batch: int = 0, head: int = 0) -> Tensor:
        """The block lists of one head as a sparse matrix of ones.

        Args:
            batch: which batch element. Default 0.
            head: which head. Default 0.

        Returns:
            Tensor: sparse CSR, float32 ``[Mq, Mkv]``.

        Raises:
            ValueError, IndexError: if the layout has no block lists, or no such head.

        Example:
            >>> mask = torch.eye(2, dtype=torch.bool)[None, None]
            >>> layout = BlockLayout.from_dense(mask, block_size=(16, 16), seqlens=(32, 32))
            >>> layout.to_csr().to_dense()
            tensor([[1., 0.],
                    [0., 1.]])
        """
        return formats.to_csr(self, batch, head)

    def to_block_mask(self, *, is_causal: bool = True, num_heads: int | None = None) -> BlockMask:
        """FlexAttention's `BlockMask` of the same keys.

        Its lists are as wide as all key blocks, so it takes memory for ``Mq * Mkv`` entries.

        Args:
            is_causal: whether rows see no key behind their position. Default True.
            num_heads: number of query heads ``H``. Default None: `num_heads` of the layout.

        Returns:
            BlockMask: for ``flex_attention(q, k, v, block_mask=...)``.

        Raises:
            ValueError: if the layout's heads do not divide `num_heads`.

        Example:
            >>> block_mask = BlockLayout.dense((256, 256)).to_block_mask(num_heads=2)
            >>> block_mask.shape
            (1, 2, 256, 256)
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
        """The same layout with an entry of its own for each query head in every tensor.

        Args:
            num_heads: number of query heads ``H``.

        Returns:
            BlockLayout: whose tensors all have a head size of `num_heads`.

        Raises:
            ValueError: if the layout's heads do not divide `num_heads`.

        Example:
            >>> BlockLayout.sink_window((8, 8), window=4).expand_heads(3).window
            tensor([4, 4, 4], dtype=torch.int32)
        """
        return algebra.expand_heads(self, num_heads)

    def refine(self, block_size: tuple[int, int]) -> BlockLayout:
        """The same layout in smaller blocks.

        Args:
            block_size: ``(block_q, block_kv)``, divisors of the present sizes.

        Returns:
            BlockLayout: that sees the same keys.

        Raises:
            ValueError: if a size does not divide the present one.

        Example:
            >>> mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
            >>> layout = BlockLayout.from_dense(mask, block_size=(32, 32), seqlens=(32, 32))
            >>> layout.refine((16, 16)).kv_indices[0, 0]
            tensor([[0, 1],
                    [0, 1]], dtype=torch.int32)
        """
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

        Example:
            >>> BlockLayout.sink_window((4, 4), window=2).density()
            0.7
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
