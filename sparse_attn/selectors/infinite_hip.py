"""InfiniteHiP: pruning of key chunks in stages, finer from one to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..layout import BlockLayout
from ..reference import compute_dtype
from .base import Selector, pool_mean, seqlens
from .static import _at_least


@dataclass(frozen=True)
class InfiniteHiP(Selector):
    """For each query block `keep[-1]` keys that survive several stages of pruning, a sink and a
    window (InfiniteHiP, arXiv 2502.08910, without its change of rotary positions).

    Stage ``i`` cuts what is left of the keys into chunks of ``chunk[i]``, finds in each chunk a
    representative key by binary search, and keeps the ``keep[i] // chunk[i]`` chunks whose search
    has met the greatest product with a query. The queries of a query block are means of
    ``stride_q[i]`` consecutive rows. A step of the search halves the interval ``[L, R)`` at ``C =
    (L + R) // 2`` and goes on in the half whose middle key, ``(L + C) // 2`` or ``(C + R) // 2``,
    has the greater product with any query; of equal ones in the right half. Of chunks with equal
    scores the earlier one is kept.

    Chunks that begin in the window of the block's first row, but for ``chunk[0]`` keys, are not
    searched. The keys that represent a chunk may lie up to ``chunk[0]`` after the row, so a
    selection, but not attention, looks ahead of its block unless ``window >= 2 * chunk[0]``.

    The first stage compares every query block with every chunk: quadratic, with a small factor.
    There is no compiled kernel: choosing takes longer than with `HiP` at lengths that a CPU serves.

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

    def __post_init__(self) -> None:
        for name, low in (("block_q", 1), ("sink", 0), ("window", 1)):
            _at_least(name, getattr(self, name), low)
        for name in ("chunk", "keep", "stride_q"):
            values = getattr(self, name)
            if len(values) != len(self.chunk) or not values:
                raise ValueError(f"{name} must have one entry for each stage, got {values!r}")
            for value in values:
                _at_least(f"every entry of {name}", value, 1)
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

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        window = max(self.window, self.chunk[0])
        base = BlockLayout.sink_window(
            seqlens(q, k), sink=self.sink, window=window, device=q.device
        )
        if k.shape[2] == 0 or q.shape[2] == 0:
            return base
        if scale is not None and scale < 0:
            q = -q
        counts, indices = torch.ops.sparse_attn.infinite_hip_select(
            q,
            k,
            list(self.chunk),
            list(self.keep),
            list(self.stride_q),
            self.block_q,
            self.sink,
            self.window,
            self.shared,
            is_causal,
        )
        block_size = (self.block_q, self.chunk[-1])
        return replace(base, block_size=block_size, kv_num_blocks=counts, kv_indices=indices)


def infinite_hip_select(
    q: Tensor,
    k: Tensor,
    chunk: list[int],
    keep: list[int],
    stride_q: list[int],
    block_q: int,
    sink: int,
    window: int,
    shared: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``sparse_attn::infinite_hip_select``, one query block after the other.

    Returns:
        tuple[Tensor, Tensor]: int32 ``(kv_num_blocks [B, H or 1, Mq], kv_indices [B, H or 1, Mq,
        width])`` in blocks of the last chunk, ascending; behind the counts, zeros.
    """
    batch, heads, seqlen_q, _ = q.shape
    seqlen_kv = k.shape[2]
    end = seqlen_kv - max(0, window - chunk[0])  # of the searched keys
    num_chunks = max(0, -(-(seqlen_kv - sink - window) // chunk[0]))
    rows = (batch, 1 if shared else heads, -(-seqlen_q // block_q))
    counts = torch.zeros(rows, dtype=torch.int32, device=q.device)
    width = min(keep[-1], -(-seqlen_kv // chunk[-1]) * chunk[-1]) // chunk[-1]
    indices = torch.zeros((*rows, width), dtype=torch.int32, device=q.device)
    if num_chunks == 0:
        return counts, indices
    for m, start in enumerate(range(0, seqlen_q, block_q)):
        block = q[:, :, start : start + block_q].to(compute_dtype(q.dtype))
        limit = end
        if is_causal:
            limit = max(0, start + seqlen_kv - seqlen_q - max(0, window - chunk[0]))
        left = sink + chunk[0] * torch.arange(num_chunks, device=q.device)
        left = left.expand(*rows[:2], -1)
        for i, size in enumerate(chunk):
            if i > 0:
                left = left[..., None] + torch.arange(0, chunk[i - 1], size, device=q.device)
                left = left.flatten(-2)
            queries = pool_mean(block, stride_q[i])
            scores = _score_chunks(queries, k, left, size, end, limit)
            if shared:
                scores = scores.amax(1, keepdim=True)
            count = min(keep[i] // size, left.shape[-1])
            best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
            best = best.sort(-1).values
            left, scores = left.gather(-1, best), scores.gather(-1, best)
            left = left.masked_fill(scores == -torch.inf, seqlen_kv)  # never searched
            left = left.sort(-1).values
        counts[:, :, m] = (left < seqlen_kv).sum(-1, dtype=torch.int32)
        found = torch.where(left < seqlen_kv, left // chunk[-1], 0)[..., :width]
        indices[:, :, m, : found.shape[-1]] = found.int()
    return counts, indices


def _score_chunks(
    queries: Tensor, k: Tensor, left: Tensor, size: int, end: int, limit: int
) -> Tensor:
    """The greatest product that the binary search in each chunk meets: ``[B, H, chunks]``, -inf in
    chunks that begin after `limit` or behind the searched keys.
    """
    batch, heads = queries.shape[:2]
    b = torch.arange(batch, device=k.device)[:, None, None]
    kv_head = torch.arange(heads, device=k.device)[:, None] // (heads // k.shape[1])
    left = left.expand(batch, heads, -1)
    right = (left + size).clamp(max=end)
    scores = torch.full(left.shape, -torch.inf, dtype=queries.dtype, device=k.device)

    def products(at: Tensor) -> Tensor:
        keys = k[b, kv_head, at.clamp(max=k.shape[2] - 1)].to(queries.dtype)
        return (queries @ keys.mT).amax(2).nan_to_num(-torch.inf)

    for _ in range(size.bit_length()):
        searched = (left < right) & (left <= limit)
        centre = (left + right) // 2
        lower, upper = products((left + centre) // 2), products((centre + right) // 2)
        winner = torch.maximum(lower, upper).clamp(min=torch.finfo(lower.dtype).min)
        scores = torch.where(searched, torch.maximum(scores, winner), scores)
        go_left = lower > upper
        right = torch.where(searched & go_left, centre, right)
        left = torch.where(searched & ~go_left, centre, left)
    return scores


def _fake(q, k, chunk, keep, stride_q, block_q, sink, window, shared, is_causal):
    rows = (q.shape[0], 1 if shared else q.shape[1], -(-q.shape[2] // block_q))
    width = torch.sym_min(keep[-1] // chunk[-1], -(-k.shape[2] // chunk[-1]))
    return q.new_empty(rows, dtype=torch.int32), q.new_empty((*rows, width), dtype=torch.int32)


ops.library.define(
    "infinite_hip_select(Tensor q, Tensor k, int[] chunk, int[] keep, int[] stride_q, int block_q, "
    "int sink, int window, bool shared, bool is_causal) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
ops.library.impl("infinite_hip_select", infinite_hip_select, "CompositeExplicitAutograd")
torch.library.register_fake("sparse_attn::infinite_hip_select", _fake, lib=ops.library)
