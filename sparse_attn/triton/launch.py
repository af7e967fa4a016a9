"""One call as the kernels take it: tensors and numbers by the names of the kernels' arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import torch
from torch import Tensor

from ..layout import BlockLayout

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; `checks` says whether its assertions are compiled."""

    kernel: Callable
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    checks: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """How to compile the kernel.

        Differences of scaled scores are those of rounded scores: with the product left unrounded in
        one of them, the largest score would differ from itself.
        """
        more = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        if self.checks:
            more |= {"debug": True, "sanitize_overflow": False}
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": not self.arguments.get("PRESCALED", False),
            **more,
        }

    def __call__(self) -> None:
        if min(self.grid) == 0:
            return
        self.kernel[self.grid](**self.arguments, **self.options)


@dataclass(frozen=True)
class Call:
    """Layout and scalars of a call, and what follows from them for the kernels."""

    layout: BlockLayout
    num_heads: int
    num_kv_heads: int
    batch: int
    sink_logits: Tensor | None
    scale: float
    softcap: float
    is_causal: bool
    key_bias: Tensor | None = None
    alibi_slopes: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Query heads for each KV head."""
        return self.num_heads // self.num_kv_heads

    @cached_property
    def pack(self) -> int:
        """Consecutive query heads that share a KV head, key_bias and everything in the layout."""
        sizes = [x.shape[0 if x.dim() == 1 else 1] for x in self.layout.tensors().values()]
        if self.key_bias is not None:
            sizes.append(self.key_bias.shape[1])
        return gcd(self.group_size, *(self.num_heads // size for size in sizes))

    @property
    def num_packs(self) -> int:
        """Packs of heads in the whole batch."""
        return self.batch * self.num_heads // self.pack

    @cached_property
    def block_kv(self) -> int:
        """Keys of a listed block, 1 without lists of blocks."""
        if self.layout.kv_num_blocks is None:
            return 1
        return min(self.layout.block_size[1], max(self.layout.seqlen_kv, 1))

    @cached_property
    def listed_rows(self) -> tuple[int, int] | None:
        """Rows that share their lists, and row blocks of that size for each list of columns; None
        without lists.
        """
        layout = self.layout
        rows, group = layout.block_size[0], layout.column_group
        if layout.kv_num_blocks is None:
            if layout.num_columns is None:
                return None
            rows, group = rows * group, 1
        return min(rows, max(layout.seqlen_q, 1)), group

    @property
    def is_irregular(self) -> bool:
        """Whether keys are gathered one by one, see `configs.forward`."""
        has_columns = self.layout.num_columns is not None
        has_blocks = self.layout.kv_num_blocks is not None
        return has_columns or (has_blocks and self.block_kv % 64 != 0)

    @property
    def is_wide(self) -> bool:
        """Whether all listed keys lie in blocks of multiples of 128."""
        has_blocks = self.layout.kv_num_blocks is not None
        return has_blocks and not self.is_irregular and self.block_kv % 128 == 0

    def is_skewed(self, is_packed: bool = False) -> bool:
        """Whether the last rows need not be those with the most keys, nor the first keys those with
        the most rows: then the programs are put in order.
        """
        seqlen_q, seqlen_kv = self.layout.seqlens
        has_lists = self.listed_rows is not None or is_packed
        return has_lists and not (self.is_causal and 2 * seqlen_q >= seqlen_kv)

    @property
    def slots(self) -> int:
        """Rows of the largest row block that lists permit, times the packed heads."""
        rows = self.listed_rows[0] if self.listed_rows else self.layout.seqlen_q
        return rows * self.pack

    def row_tiles(self, block_m: int) -> tuple[int, int]:
        """The rows of a row block (those of the lists, else as many as a tile holds), and its
        tiles.
        """
        rows = max(1, min(block_m // self.pack, self.layout.seqlen_q))
        if self.listed_rows:
            rows = self.listed_rows[0]
        return rows, -(-rows * self.pack // block_m)

    @property
    def kind(self) -> tuple:
        """What decides on the fastest configuration: features, and lengths up to a power of 2."""
        layout = self.layout
        widths = (x.shape[-1] for x in (layout.kv_indices, layout.column_indices) if x is not None)
        sizes = (self.slots, self.batch * self.num_kv_heads, *layout.seqlens, *widths)
        features = (self.block_kv, self.is_irregular, self.softcap > 0, self.is_causal)
        features += (self.key_bias is None, self.alibi_slopes is None)
        heads = (self.pack, self.group_size)
        return *features, *heads, *(x.bit_length() for x in sizes)

    @property
    def has_biases(self) -> bool:
        """Whether anything is added to scores."""
        return self.key_bias is not None or self.alibi_slopes is not None

    @property
    def is_plain(self) -> bool:
        """Whether scores are products times the scale, without a softcap or biases."""
        return self.softcap == 0 and not self.has_biases

    def scores(self) -> dict[str, Any]:
        """The arguments of `scores`, within float32, and how heads find their rows of key_bias."""
        usual = self.is_plain and 2.0**-100 < self.scale < 2.0**100
        batch, heads, _ = (None,) * 3 if self.key_bias is None else self.key_bias.shape
        softcap = min(self.softcap, _LARGEST)
        return {
            "scale": min(max(self.scale, -_LARGEST), _LARGEST),
            "unit": self.scale if usual else 1.0,
            "softcap": softcap,
            "inverse_softcap": min(1 / softcap, _LARGEST) if softcap > 0 else 0.0,
            "PRESCALED": not usual,
            "SOFTCAP": softcap > 0,
            "IS_CAUSAL": self.is_causal,
            "bias_ptr": self.key_bias,
            "bias_run": heads and self.num_heads // heads,
            "bias_batch": heads and (heads if batch > 1 else 0),
            "slopes_ptr": self.alibi_slopes,
        }

    def lists(self) -> dict[str, Any]:
        """The layout's tensors and how rows and heads find their entries."""
        layout = self.layout

        def of(name: str, counts: Tensor | None, indices: Tensor | None) -> dict[str, Any]:
            if counts is None:
                names = ("counts_ptr", "indices_ptr")
                sizes = ("run", "batch", "rows", "width")
                return {f"{name}_{x}": None for x in names} | {f"{name}_{x}": 0 for x in sizes}
            batch, heads, rows = counts.shape
            return {
                f"{name}_counts_ptr": counts.contiguous(),
                f"{name}_indices_ptr": indices.contiguous(),
                f"{name}_run": self.num_heads // heads,
                f"{name}_batch": heads if batch > 1 else 0,
                f"{name}_rows": rows,
                f"{name}_width": indices.shape[-1],
            }

        blocks = of("block", layout.kv_num_blocks, layout.kv_indices)
        return {
            "sink_ptr": layout.sink.contiguous(),
            "window_ptr": layout.window.contiguous(),
            "sink_run": self.num_heads // layout.sink.shape[0],
            "window_run": self.num_heads // layout.window.shape[0],
            **blocks,
            **of("column", layout.num_columns, layout.column_indices),
            "num_kv_blocks": layout.num_kv_blocks,
            "blocks_per_group": self.listed_rows[1] if self.listed_rows else 1,
            "BLOCK_KV": self.block_kv,
            "SEARCH_STEPS": blocks["block_width"].bit_length(),
        }


def strides(name: str, x: Tensor, dims: str) -> dict[str, int]:
    """The strides of a tensor, ``stride_<name><dim>``; the last one is 1."""
    return {f"stride_{name}{d}": s for d, s in zip(dims, x.stride(), strict=False)}


def input_precision(dtype: torch.dtype, may_split: bool = False) -> str:
    """How float32 is multiplied: exactly, or in three products of TF32 where that is permitted."""
    return "tf32x3" if dtype == torch.float32 and may_split else "ieee"
