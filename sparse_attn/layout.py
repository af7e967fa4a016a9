"""`BlockLayout`: which keys each query row may attend to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import INT32_MAX, as_count, as_int, as_pair

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_INT_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_TENSORS = ("sink", "window", "kv_num_blocks", "kv_indices", "num_columns", "column_indices")


@dataclass(frozen=True, eq=False)
class BlockLayout:
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

    seqlens: tuple[int, int]
    sink: Tensor
    window: Tensor
    block_size: tuple[int, int] = (64, 64)
    kv_num_blocks: Tensor | None = None
    kv_indices: Tensor | None = None
    num_columns: Tensor | None = None
    column_indices: Tensor | None = None
    column_group: int = 1

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_field("sink", self.sink, (None,))
        self._check_field("window", self.window, (None,))
        if self.kv_num_blocks is not None or self.kv_indices is not None:
            self._check_lists("kv_num_blocks", "kv_indices", self.num_q_blocks)
        if self.num_columns is not None or self.column_indices is not None:
            self._check_lists("num_columns", "column_indices", self.num_column_groups)

    def _check_sizes(self) -> None:
        """The sizes are Python's ints; numpy's, and lists of two, become so."""
        seqlens = as_pair("seqlens", self.seqlens, 0)
        block_size = as_pair("block_size", self.block_size, 1)
        group = as_int("column_group", self.column_group, 1)
        if seqlens is not self.seqlens or block_size is not self.block_size:
            object.__setattr__(self, "seqlens", seqlens)
            object.__setattr__(self, "block_size", block_size)
        if group is not self.column_group:
            object.__setattr__(self, "column_group", group)

    def _check_field(self, name: str, value: Tensor, shape: tuple[int | None, ...]) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {value.dtype}")
        if value.device != self.sink.device:
            raise ValueError(f"{name} is on {value.device}, but sink is on {self.sink.device}")
        sizes = value.shape
        wrong = len(sizes) != len(shape)
        if len(shape) > 1:
            for want, got in zip(shape, sizes, strict=False):
                wrong = wrong or (want is not None and want != got)
        if wrong:
            shown = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} must have shape [{shown}], got {list(sizes)}")
        if 0 in sizes[: 1 if len(shape) == 1 else 2]:
            raise ValueError(f"{name} has a batch or head size of 0: {list(sizes)}")

    def _check_lists(self, counts_name: str, indices_name: str, rows: int) -> None:
        counts, indices = getattr(self, counts_name), getattr(self, indices_name)
        if counts is None or indices is None:
            raise ValueError(f"{counts_name} and {indices_name} must be given together")
        self._check_field(counts_name, counts, (None, None, rows))
        self._check_field(indices_name, indices, (*counts.shape, None))

    # --- sizes

    @property
    def seqlen_q(self) -> int:
        """Number of query rows."""
        return self.seqlens[0]

    @property
    def seqlen_kv(self) -> int:
        """Number of keys."""
        return self.seqlens[1]

    @property
    def num_q_blocks(self) -> int:
        """``Mq = ceil(seqlen_q / block_q)``."""
        return -(-self.seqlens[0] // self.block_size[0])

    @property
    def num_kv_blocks(self) -> int:
        """``Mkv = ceil(seqlen_kv / block_kv)``."""
        return -(-self.seqlens[1] // self.block_size[1])

    @property
    def num_column_groups(self) -> int:
        """``Mg = ceil(Mq / column_group)``."""
        return -(-self.num_q_blocks // self.column_group)

    @property
    def num_heads(self) -> int:
        """The largest head size of its tensors (1 if every head shares everything)."""
        sizes = [self.sink.shape[0], self.window.shape[0]]
        sizes += [x.shape[1] for x in (self.kv_num_blocks, self.num_columns) if x is not None]
        return max(sizes)

    @property
    def batch(self) -> int:
        """The largest batch size of its tensors (1 if every batch element shares everything)."""
        return max(
            [1] + [x.shape[0] for x in (self.kv_num_blocks, self.num_columns) if x is not None]
        )

    @property
    def device(self) -> torch.device:
        """The device of every tensor in the layout."""
        return self.sink.device

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        return {name: x for name in _TENSORS if (x := getattr(self, name)) is not None}

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

    def __repr__(self) -> str:
        parts = [f"seqlens={tuple(self.seqlens)}, block_size={tuple(self.block_size)}"]
        parts += [f"{name}={list(x.shape)}" for name, x in self.tensors().items()]
        return f"BlockLayout({', '.join(parts)})"

    # --- builders

    @staticmethod
    def dense(seqlens: tuple[int, int], *, device: torch.device | str = "cpu") -> BlockLayout:
        """Every key, or every key up to the row's position when attention is causal.

        Args:
            seqlens: ``(seqlen_q, seqlen_kv)``.
            device: where to put the tensors. Default the CPU.

        Returns:
            BlockLayout: a window without limit; it holds two numbers.

        Example:
            >>> BlockLayout.dense((8192, 8192)).density()
            1.0
        """
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

        Raises:
            ValueError: if a number is no int or too small, or a tensor has another dtype or shape.

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
        from .layout_formats import from_dense

        return from_dense(block_mask, block_size=block_size, seqlens=seqlens)

    @staticmethod
    def from_topk(
        indices: Tensor, *, block_size: tuple[int, int], seqlens: tuple[int, int]
    ) -> BlockLayout:
        """The listed blocks, in any order; a block that is listed twice counts once.

        Args:
            indices: int32 or int64 ``[B|1, H', Mq, k]``, the key blocks of each query block; -1
                stands for none.
            block_size: ``(block_q, block_kv)``.
            seqlens: ``(seqlen_q, seqlen_kv)``.

        Returns:
            BlockLayout: blocks only.

        Raises:
            TypeError, ValueError: if `indices` has another type or shape, or names a block that
                does not exist.

        Example:
            >>> picked = torch.tensor([[[[0, -1], [1, 0]]]])
            >>> layout = BlockLayout.from_topk(picked, block_size=(16, 16), seqlens=(32, 32))
            >>> layout.kv_num_blocks, layout.kv_indices[0, 0, 1]
            (tensor([[[1, 2]]], dtype=torch.int32), tensor([0, 1], dtype=torch.int32))
        """
        from .layout_formats import from_topk

        return from_topk(indices, block_size=block_size, seqlens=seqlens)

    @staticmethod
    def from_csr(
        csr: Tensor, *, block_size: tuple[int, int], seqlens: tuple[int, int]
    ) -> BlockLayout:
        """The blocks that a sparse matrix of torch stores, the same for all heads.

        Args:
            csr: a sparse CSR tensor ``[Mq, Mkv]``, or a BSR tensor ``[seqlen_q, seqlen_kv]`` of
                blocks of `block_size`; values do not matter.
            block_size: ``(block_q, block_kv)``.
            seqlens: ``(seqlen_q, seqlen_kv)``.

        Returns:
            BlockLayout: blocks only.

        Raises:
            TypeError, ValueError: if `csr` is no such tensor, or its shape does not match.

        Example:
            >>> csr = torch.eye(4).to_sparse_csr()
            >>> layout = BlockLayout.from_csr(csr, block_size=(16, 16), seqlens=(64, 64))
            >>> layout.kv_indices.flatten()
            tensor([0, 1, 2, 3], dtype=torch.int32)
        """
        from .layout_formats import from_csr

        return from_csr(csr, block_size=block_size, seqlens=seqlens)

    @staticmethod
    def from_block_mask(block_mask: BlockMask, *, drop_mask_mod: bool = False) -> BlockLayout:
        """The full and partial blocks of FlexAttention's `BlockMask`.

        A `mask_mod` is a program, which a layout cannot hold: unless it lets everything through it
        is refused.

        Args:
            block_mask: from ``torch.nn.attention.flex_attention.create_block_mask``.
            drop_mask_mod: whether to leave the program out; right if it says only what `is_causal`,
                a sink or a window say too. Default False.

        Returns:
            BlockLayout: blocks only.

        Raises:
            TypeError: if `block_mask` is no `BlockMask`.
            ValueError: if it has partial blocks and a program, and `drop_mask_mod` is False.

        Example:
            >>> block_mask = BlockLayout.dense((256, 256)).to_block_mask(is_causal=False)
            >>> BlockLayout.from_block_mask(block_mask).density(is_causal=False)
            1.0
        """
        from .layout_formats import from_block_mask

        return from_block_mask(block_mask, drop_mask_mod=drop_mask_mod)

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
        from .layout_formats import visible

        return visible(self, start, stop, is_causal=is_causal, num_heads=num_heads)

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
        from .layout_formats import to_topk

        return to_topk(self)

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
        from .layout_formats import to_csr

        return to_csr(self, batch, head)

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
        from .layout_formats import to_block_mask

        return to_block_mask(self, is_causal=is_causal, num_heads=num_heads)

    # --- algebra

    def __or__(self, other: BlockLayout) -> BlockLayout:
        """The union: a key seen through either side is seen, once."""
        if not isinstance(other, BlockLayout):
            return NotImplemented
        from .layout_algebra import union

        return union(self, other)

    def __getitem__(self, index: Any) -> BlockLayout:
        """``layout[batch]`` or ``layout[batch, heads]``, each an int or a slice; broadcast sizes of
        1 stay.
        """
        from .layout_algebra import take

        batch, heads = index if isinstance(index, tuple) else (index, slice(None))
        return take(self, batch, heads)

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
        from .layout_algebra import expand_heads

        return expand_heads(self, num_heads)

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
        from .layout_algebra import refine

        return refine(self, block_size)

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor]:
        """``(q_num_blocks, q_indices)``: for each key block the query blocks that list it,
        ascending; for backward.
        """
        from .layout_algebra import transpose

        return transpose(self)

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
        from .layout_algebra import density

        return density(self, is_causal=is_causal)

    def validate(self) -> BlockLayout:
        """Check every value: ranges of sinks and windows, counts, ranges, order and duplicates of
        the lists.

        Returns:
            BlockLayout: itself, so that it can be chained.

        Raises:
            ValueError: naming the tensor, the place and the value.
        """
        from .layout_algebra import validate

        validate(self)
        return self
