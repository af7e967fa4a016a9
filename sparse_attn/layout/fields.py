"""The fields of a layout, their checks, and the sizes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..checks import as_int, as_pair
from .lists import IndexLists

_TENSORS = ("sink", "window", "kv_num_blocks", "kv_indices", "num_columns", "column_indices")


@dataclass(frozen=True, eq=False)
class Fields:
    """The fields of a `BlockLayout`, whose meaning its docstring tells, and what follows from their
    shapes.
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

    # --- lists

    @property
    def blocks(self) -> IndexLists | None:
        """``(kv_num_blocks, kv_indices)``, or None."""
        if self.kv_num_blocks is None or self.kv_indices is None:
            return None
        return IndexLists(self.kv_num_blocks, self.kv_indices)

    @property
    def columns(self) -> IndexLists | None:
        """``(num_columns, column_indices)``, or None."""
        if self.num_columns is None or self.column_indices is None:
            return None
        return IndexLists(self.num_columns, self.column_indices)

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
        sizes += [x.counts.shape[1] for x in (self.blocks, self.columns) if x is not None]
        return max(sizes)

    @property
    def batch(self) -> int:
        """The largest batch size of its tensors (1 if every batch element shares everything)."""
        lists = (self.blocks, self.columns)
        return max([1] + [x.counts.shape[0] for x in lists if x is not None])

    @property
    def device(self) -> torch.device:
        """The device of every tensor in the layout."""
        return self.sink.device

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        return {name: x for name in _TENSORS if (x := getattr(self, name)) is not None}

    def __repr__(self) -> str:
        parts = [f"seqlens={tuple(self.seqlens)}, block_size={tuple(self.block_size)}"]
        parts += [f"{name}={list(x.shape)}" for name, x in self.tensors().items()]
        return f"BlockLayout({', '.join(parts)})"


Layout = TypeVar("Layout", bound=Fields)  # in functions that give back what they are given


def with_lists(blocks: IndexLists | None, columns: IndexLists | None) -> dict[str, Tensor | None]:
    """The four fields of two kinds of lists."""
    kv_num_blocks, kv_indices = blocks or (None, None)
    num_columns, column_indices = columns or (None, None)
    return {
        "kv_num_blocks": kv_num_blocks,
        "kv_indices": kv_indices,
        "num_columns": num_columns,
        "column_indices": column_indices,
    }


def common_heads(layout: Fields, num_heads: int | None) -> int:
    """`num_heads`, or the layout's own; every head size must divide it."""
    num_heads = layout.num_heads if num_heads is None else as_int("num_heads", num_heads, 1)
    for name, value in layout.tensors().items():
        size = value.shape[0 if value.dim() == 1 else 1]
        if num_heads % size:
            raise ValueError(
                f"the head size of {name} is {size}, which does not divide {num_heads} heads"
            )
    return num_heads
