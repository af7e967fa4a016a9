"""Layouts made of numbers, or of other notations of the same mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..checks import INT32_MAX, as_count
from . import formats
from .fields import Fields

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_INT_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
Layout = TypeVar("Layout", bound="Builders")


class Builders(Fields):
    """The ways to make a `BlockLayout`."""

    @classmethod
    def dense(
        cls: type[Layout], seqlens: tuple[int, int], *, device: torch.device | str = "cpu"
    ) -> Layout:
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
        return cls.sink_window(seqlens, window=-1, device=device)

    @classmethod
    def sink_window(
        cls: type[Layout],
        seqlens: tuple[int, int],
        *,
        sink: int | Tensor = 0,
        window: int | Tensor = 0,
        device: torch.device | str = "cpu",
    ) -> Layout:
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

        return cls(seqlens, per_head("sink", sink, 0), per_head("window", window, -1))

    @classmethod
    def from_dense(
        cls: type[Layout],
        block_mask: Tensor,
        *,
        block_size: tuple[int, int],
        seqlens: tuple[int, int],
    ) -> Layout:
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
        return cls(**formats.from_dense(block_mask, block_size=block_size, seqlens=seqlens))

    @classmethod
    def from_topk(
        cls: type[Layout], indices: Tensor, *, block_size: tuple[int, int], seqlens: tuple[int, int]
    ) -> Layout:
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
        return cls(**formats.from_topk(indices, block_size=block_size, seqlens=seqlens))

    @classmethod
    def from_csr(
        cls: type[Layout], csr: Tensor, *, block_size: tuple[int, int], seqlens: tuple[int, int]
    ) -> Layout:
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
        return cls(**formats.from_csr(csr, block_size=block_size, seqlens=seqlens))

    @classmethod
    def from_block_mask(
        cls: type[Layout], block_mask: BlockMask, *, drop_mask_mod: bool = False
    ) -> Layout:
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
        return cls(**formats.from_block_mask(block_mask, drop_mask_mod=drop_mask_mod))
