"""HiP: a tree search for the key blocks of each query block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import backends, ops, triton
from ..layout import BlockLayout
from ..reference import compute_dtype
from .base import Selector, seqlens
from .checks import bool_fields, count_fields, int_fields

FIRST_NODES = 8  # of the search, for each block that is kept


@dataclass(frozen=True)
class HiP(Selector):
    """For each query block and head, `k` keys found by a tree search, a sink and a window (HiP 1.1,
    arXiv 2406.09827).

    The searched keys of query block ``m`` are those between the sink and the window of its last
    row, in blocks of `block_k` keys; blocks that lie in either as a whole are left out. Let ``N``
    be their number and ``M = ceil(k / block_k)``. A node of the search is a run of ``size`` blocks,
    from a multiple of ``size`` on; the last one may be shorter. The search starts with the smallest
    power of two for which there are at most ``8 M`` nodes, keeps the ``M`` best, goes on with their
    halves, and so on until nodes are blocks. Two blocks judge a node, its first one and the one at
    its centre, ``min(first + size // 2, N - 1)``::

        origin[r] = max(q[r] @ key[j] for j in the sink and behind the searched keys)
        score = max(q[r] @ key[j] - origin[r] for r in sampled rows of the query block
                                              for j in sampled keys of these blocks)

    The origins make the rows of a block equals: a key counts by what it adds to those that the row
    sees anyway. The keys behind the searched ones end at the block's last row; where there are none
    (``is_causal=False``, or ``margin == window``) the origins are 0.

    Of equal scores the earlier node is kept. If ``N <= M`` all blocks are kept: with ``k >=
    seqlen_kv`` attention is dense. Searching takes ``O(S log S)`` time and ``O(S)`` memory.

    The rows of one query block share its selection, so a row's keys may depend on later rows of its
    own block, never on rows after it; `strict` takes that away too. The first layers of a model
    stand to lose most: the paper keeps 3 of them dense (``patch(..., exclude_layers=range(3))``).

    Args:
        k: number of keys searched for, for each query block, at least 1. Default 512.
        block_q: rows of a query block. Default 64.
        block_k: keys of a key block. Default 16.
        stride_q: the rows ``stride_q - 1, 2 * stride_q - 1, ...`` of a query block are sampled,
            and its last row. Default 4.
        stride_k: the keys ``stride_k // 2, stride_k // 2 + stride_k, ...`` of a key block are
            sampled, so 1 takes all and `block_k` the central one. Default 1.
        representatives: 2, or 1 to judge a node by the block at its centre alone, as the paper
            does: a block that was seen at a centre is then lost to its node, of which it begins the
            second half. Default 2.
        sink: number of leading keys every row sees. Default 16.
        window: number of trailing keys every row sees, itself included, at least 1. Default 256.
        margin: the last keys that the window shows are searched too, so many of them, at most
            `window`. They may then be found before they leave the window, while a selection is
            reused for later rows, see `MaskCache`. Default 0.
        strict: whether the first row of a query block alone is sampled, so that a selection
            depends on no token after that row. Needs ``window - margin >= block_q``: the
            window shows the keys that the later rows of the block would have searched. Default
            False.

    Raises:
        ValueError: if an argument is no number of its kind or out of range: `stride_q` at most
            `block_q`, `stride_k` at most `block_k`, `margin` at most `window`, and with `strict`
            at most ``window - block_q``.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> layout = HiP(k=32, block_q=32, sink=4, window=32)(q, k)
    """

    k: int = 512
    block_q: int = 64
    block_k: int = 16
    stride_q: int = 4
    stride_k: int = 1
    representatives: int = 2
    sink: int = 16
    window: int = 256
    margin: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        count_fields(self, k=1, sink=0, window=1, margin=0)
        int_fields(self, block_q=1, block_k=1, stride_q=1, stride_k=1, representatives=1)
        bool_fields(self, "strict")
        if self.stride_q > self.block_q:
            raise ValueError(f"stride_q is {self.stride_q}, more than block_q = {self.block_q}")
        if self.stride_k > self.block_k:
            raise ValueError(f"stride_k is {self.stride_k}, more than block_k = {self.block_k}")
        if self.representatives not in (1, 2):
            raise ValueError(f"representatives must be 1 or 2, got {self.representatives!r}")
        if self.margin > self.window:
            raise ValueError(f"margin is {self.margin}, more than window = {self.window}")
        if self.strict and self.window - self.margin < self.block_q:
            raise ValueError(
                f"strict needs window - margin >= block_q, got {self.window} - {self.margin} and "
                f"{self.block_q}"
            )

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        base = BlockLayout.sink_window(
            seqlens(q, k), sink=self.sink, window=self.window, device=q.device
        )
        if k.shape[2] == 0 or q.shape[2] == 0:
            return base
        if scale is not None and scale < 0:
            q = -q
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        counts, indices = backends.op_for("auto", q, k, "hip_select")(
            q,
            k,
            -(-self.k // self.block_k),
            self.block_q,
            self.block_k,
            self.stride_q,
            self.stride_k,
            self.representatives,
            self.sink,
            self.window - self.margin,
            self.strict,
            is_causal,
        )
        block_size = (self.block_q, self.block_k)
        return replace(base, block_size=block_size, kv_num_blocks=counts, kv_indices=indices)


def hip_select(
    q: Tensor,
    k: Tensor,
    slots: int,
    block_q: int,
    block_k: int,
    stride_q: int,
    stride_k: int,
    representatives: int,
    sink: int,
    window: int,
    strict: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``sparse_attn::hip_select`` in torch, one query block after the other.

    Returns:
        tuple[Tensor, Tensor]: int32 ``(kv_num_blocks [B, H, Mq], kv_indices [B, H, Mq, width])``,
        ascending, width as in `_width`; behind the counts, zeros.
    """
    batch, heads, seqlen_q, _ = q.shape
    num_kv_heads, seqlen_kv = k.shape[1:3]
    dtype = compute_dtype(q.dtype)
    b = torch.arange(batch, device=q.device)[:, None, None]
    kv_head = (torch.arange(heads, device=q.device) // (heads // num_kv_heads))[:, None]
    keys_of_block = torch.arange(stride_k // 2, block_k, stride_k, device=q.device)
    first_block = sink // block_k
    width = _width(slots, block_k, seqlen_kv)
    counts = torch.zeros(-(-seqlen_q // block_q), dtype=torch.int32, device=q.device)
    indices = q.new_zeros((batch, heads, len(counts), width), dtype=torch.int32)
    for m, start in enumerate(range(0, seqlen_q, block_q)):
        stop = min(start + block_q, seqlen_q)
        rows = [start] if strict else [*range(start + stride_q - 1, stop, stride_q), stop - 1]
        end = last_end = seqlen_kv  # of the searched keys, and of those that the last row sees
        if is_causal:
            last_end = min(start + block_q + seqlen_kv - seqlen_q, seqlen_kv)
            end = last_end - window
        num_blocks = max(0, -(-end // block_k) - first_block)
        count = min(slots, num_blocks)
        counts[m] = count
        if count == 0:
            continue
        if num_blocks <= slots:
            indices[:, :, m, :count] = torch.arange(first_block, first_block + count)
            continue
        queries = q[:, :, rows].to(dtype)
        origin = queries.new_zeros(())
        if end < last_end and len(rows) > 1:
            near = torch.cat([k[:, :, : min(sink, end)], k[:, :, end:last_end]], 2).to(dtype)
            near = near.repeat_interleave(heads // num_kv_heads, 1)
            origin = (queries @ near.mT).amax(-1, keepdim=True)
            origin = origin.where(origin.isfinite(), 0)
        size = 1
        while -(-num_blocks // size) > FIRST_NODES * slots:
            size *= 2
        first = torch.arange(0, num_blocks, size, device=q.device).expand(batch, heads, -1)
        while True:
            judges = [(first + size // 2).clamp(max=num_blocks - 1), first][:representatives]
            block = first_block + torch.stack(judges, -1)
            at = (block[..., None] * block_k + keys_of_block).clamp(max=end - 1)
            keys = k[b, kv_head, at.flatten(-3)].to(dtype)
            scores = (queries @ keys.mT - origin).amax(2).unflatten(-1, at.shape[-3:])
            scores = scores.amax(-1).nan_to_num(-torch.inf).amax(-1)
            scores = scores.clamp(min=torch.finfo(dtype).min)
            scores = scores.masked_fill(first >= num_blocks, -torch.inf)
            best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
            first = first.gather(-1, best.sort(-1).values)
            if size == 1:
                break
            size //= 2
            first = torch.stack([first, first + size], -1).flatten(-2)
        indices[:, :, m, :count] = first_block + first
    return counts.expand(batch, heads, -1).contiguous(), indices


def _width(slots: int, block_k: int, seqlen_kv: int) -> int:
    """Entries of each list: no more than there are key blocks."""
    return min(slots, -(-seqlen_kv // block_k))


def _fake_hip_select(q, k, slots, block_q, block_k, *rest) -> tuple[Tensor, Tensor]:
    rows = (*q.shape[:2], -(-q.shape[2] // block_q))
    width = torch.sym_min(slots, -(-k.shape[2] // block_k))
    return q.new_empty(rows, dtype=torch.int32), q.new_empty((*rows, width), dtype=torch.int32)


def _on_triton(q: Tensor, k: Tensor, slots: int, *rest: Any) -> tuple[Tensor, Tensor]:
    """The Triton kernel, which holds a limited number of nodes; the reference takes any."""
    select = hip_select if slots > triton.MAX_HIP_SLOTS else triton.hip_select
    return select(q, k, slots, *rest)


def _on_gpu(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    select = hip_select if triton.reasons(q, k) else _on_triton
    return select(q, k, *rest)


for _name, _impl in (
    ("hip_select", hip_select),
    ("hip_select_reference", hip_select),
    ("hip_select_triton", _on_triton),
):
    ops.library.define(
        f"{_name}(Tensor q, Tensor k, int slots, int block_q, int block_k, int stride_q, "
        "int stride_k, int representatives, int sink, int window, bool strict, bool is_causal) "
        "-> (Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    ops.library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_attn::{_name}", _fake_hip_select, lib=ops.library)
ops.library.impl("hip_select", _on_gpu, "CUDA")
