"""InfiniteHiP: pruning of key chunks in stages, finer from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import backends, ops, triton
from ..layout import BlockLayout
from ..reference import compute_dtype
from .base import Selector, seqlens
from .checks import bool_fields, count_fields, int_fields, ints_fields

Lists = tuple[Tensor, Tensor]  # counts [B, H or 1, Mq] and indices [B, H or 1, Mq, width], int32


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
        for stage in range(1, len(self.chunk)):
            kept = self.prune(stage, kept, q, k, is_causal=is_causal, scale=scale)
        return self.layout(kept, q, k)

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
        return backends.op_for("auto", q, k, "infinite_hip_stage")(
            q,
            k,
            *(kept or (None, None)),
            self.chunk[max(0, stage - 1)],
            size,
            self.keep[stage] // size,
            self.stride_q[stage],
            self.block_q,
            self.sink,
            self.window - self.margin,
            max(0, self.window - self.chunk[0]),
            self.shared,
            is_causal,
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


def infinite_hip_stage(
    q: Tensor,
    k: Tensor,
    counts: Tensor | None,
    indices: Tensor | None,
    parent: int,
    chunk: int,
    slots: int,
    stride_q: int,
    block_q: int,
    sink: int,
    window: int,
    behind: int,
    shared: bool,
    is_causal: bool,
    score: Callable[..., Tensor] | None = None,
) -> Lists:
    """The op ``sparse_attn::infinite_hip_stage`` in torch, a few query blocks after the others.

    Candidates are the parts of `chunk` keys of the listed chunks of `parent` keys, or all that
    begin before the last `window` keys. An index out of range is no candidate. Those that begin
    less than `behind` keys before a query block's first row are not searched, nor are the last
    `behind` keys.
    """
    batch, heads, seqlen_q, _ = q.shape
    seqlen_kv = k.shape[2]
    _check_stage(q, k, counts, indices, parent, chunk, slots, stride_q, block_q, shared)
    if counts is None or indices is None:
        first = torch.arange(-(-max(0, seqlen_kv - sink - window) // chunk), device=q.device)
        first = first.int().expand(1, 1, 1, -1)
    groups, row_blocks = 1 if shared else heads, -(-seqlen_q // block_q)
    width = min(slots, -(-seqlen_kv // chunk))
    out_counts = q.new_zeros((batch, groups, row_blocks), dtype=torch.int32)
    out = q.new_zeros((batch, groups, row_blocks, width), dtype=torch.int32)
    if out.numel() == 0:
        return out_counts, out
    queries = _means(q, block_q, stride_q)
    num_candidates = first.shape[-1] if indices is None else indices.shape[-1] * (parent // chunk)
    at_once = max(1, _SCORES // max(1, batch * heads * num_candidates)) if score else 1
    for start in range(0, row_blocks, at_once):
        rows = slice(start, min(start + at_once, row_blocks))
        if counts is None or indices is None:
            chunks = first
        else:
            chunks = _parts(counts[:, :, rows], indices[:, :, rows], parent, chunk, seqlen_kv)
        starts = torch.arange(rows.start, rows.stop, device=q.device) * block_q
        limits = starts + (seqlen_kv - seqlen_q - behind) if is_causal else seqlen_kv + 0 * starts
        left = torch.where(chunks < 0, seqlen_kv, sink + chunks * chunk)
        left = left.expand(batch, groups, len(starts), -1)
        find = score or _scores
        scores = find(queries[:, :, rows], k, left, chunk, seqlen_kv - behind, limits.clamp(min=0))
        if shared:
            scores = scores.amax(1, keepdim=True)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :width]
        found = scores.gather(-1, best) > -torch.inf
        chosen = chunks.expand(scores.shape).gather(-1, best)
        chosen = torch.where(found, chosen, seqlen_kv).sort(-1).values
        out_counts[:, :, rows] = found.sum(-1, dtype=torch.int32)
        out[:, :, rows, : chosen.shape[-1]] = torch.where(chosen < seqlen_kv, chosen, 0)
    return out_counts, out


_SCORES = 2**23


def _check_stage(q, k, counts, indices, parent, chunk, slots, stride_q, block_q, shared) -> None:
    numbers = {"parent": parent, "chunk": chunk, "slots": slots}
    for name, value in (numbers | {"stride_q": stride_q, "block_q": block_q}).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}")
    if parent % chunk:
        raise ValueError(f"parent: {parent} is no multiple of chunk = {chunk}")
    if (counts is None) != (indices is None):
        raise ValueError("counts and indices must be given together")
    if counts is None:
        return
    rows = (q.shape[0], 1 if shared else q.shape[1], -(-q.shape[2] // block_q))
    if counts.shape != rows or indices.shape[:-1] != rows or indices.dim() != 4:
        raise ValueError(
            f"counts must have shape {list(rows)} and indices one dimension more, got "
            f"{list(counts.shape)} and {list(indices.shape)}"
        )
    for name, x in (("counts", counts), ("indices", indices)):
        if x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(f"{name} must be int32 on {q.device}, got {x.dtype} on {x.device}")


def _parts(counts: Tensor, indices: Tensor, parent: int, chunk: int, seqlen_kv: int) -> Tensor:
    """The parts of the listed chunks, -1 behind them and for an index out of range."""
    live = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    live = live & (indices >= 0) & (indices < -(-seqlen_kv // parent))
    parts = torch.arange(parent // chunk, dtype=torch.int32, device=counts.device)
    parts = (torch.where(live, indices, 0) * (parent // chunk))[..., None] + parts
    return torch.where(live[..., None], parts, -1).flatten(-2)


def _means(q: Tensor, block_q: int, stride_q: int) -> Tensor:
    """``[B, H, Mq, R, D]``: the means of `stride_q` consecutive rows of each query block; a short
    block repeats its last one.
    """
    seqlen, dtype = q.shape[2], compute_dtype(q.dtype)
    starts = torch.arange(0, seqlen, block_q, device=q.device)
    stops = (starts + block_q).clamp(max=seqlen)
    last = (stops - starts - 1) // stride_q * stride_q
    offsets = torch.arange(0, min(block_q, seqlen), stride_q, device=q.device)
    first = starts[:, None] + torch.minimum(offsets, last[:, None])
    counts = (stops[:, None] - first).clamp(max=stride_q)
    total = q.new_zeros((*q.shape[:2], *first.shape, q.shape[3]), dtype=dtype)
    for i in range(min(stride_q, block_q, seqlen)):
        rows = q[:, :, (first + i).clamp(max=seqlen - 1)].to(dtype)
        total += torch.where((i < counts)[..., None], rows, 0)
    return (total / counts[..., None]).to(q.dtype)


def _scores(
    queries: Tensor, k: Tensor, left: Tensor, size: int, end: int, limits: Tensor
) -> Tensor:
    """The greatest product that the binary search in each chunk meets, ``[B, H, rows, chunks]``;
    -inf where nothing is searched: in chunks that begin after the limit of their query block or at
    `end`.

    Args:
        queries: ``[B, H, rows, R, D]``.
        k: ``[B, Hkv, Skv, D]``.
        left: first keys of the chunks, ``[B, H or 1, rows, chunks]``.
        size: keys of a chunk.
        end: number of searched keys.
        limits: ``[rows]``.
    """
    batch, heads = queries.shape[:2]
    dtype = compute_dtype(queries.dtype)
    queries, limits = queries.to(dtype), limits[:, None]
    b = torch.arange(batch, device=k.device)[:, None, None, None]
    kv_head = torch.arange(heads, device=k.device)[:, None, None] // (heads // k.shape[1])
    left = left.expand(batch, heads, -1, -1)
    right = (left + size).clamp(max=end)
    scores = torch.full(left.shape, -torch.inf, dtype=dtype, device=k.device)

    def products(at: Tensor) -> Tensor:
        keys = k[b, kv_head, at.clamp(max=k.shape[2] - 1)].to(dtype)
        return (queries @ keys.mT).amax(3).nan_to_num(-torch.inf)

    for _ in range(size.bit_length()):
        searched = (left < right) & (left <= limits)
        centre = (left + right) // 2
        lower, upper = products((left + centre) // 2), products((centre + right) // 2)
        winner = torch.maximum(lower, upper).clamp(min=torch.finfo(dtype).min)
        scores = torch.where(searched, torch.maximum(scores, winner), scores)
        go_left = lower > upper
        right = torch.where(searched & go_left, centre, right)
        left = torch.where(searched & ~go_left, centre, left)
    return scores


def _on_triton(q: Tensor, k: Tensor, *rest: Any) -> Lists:
    if found := triton.reasons(q, k):
        raise ValueError(f"sparse_attn on Triton: {'; '.join(found)}")
    stage: Callable[..., Lists] = infinite_hip_stage
    return stage(q, k, *rest, score=triton.infinite_hip_scores)


def _on_gpu(q: Tensor, k: Tensor, *rest: Any) -> Lists:
    stage = infinite_hip_stage if triton.reasons(q, k) else _on_triton
    return stage(q, k, *rest)


def _fake(q, k, counts, indices, parent, chunk, slots, stride_q, block_q, *rest):
    shared = rest[3]
    rows = (q.shape[0], 1 if shared else q.shape[1], -(-q.shape[2] // block_q))
    width = torch.sym_min(slots, -(-k.shape[2] // chunk))
    return q.new_empty(rows, dtype=torch.int32), q.new_empty((*rows, width), dtype=torch.int32)


for _name, _impl in (
    ("infinite_hip_stage", infinite_hip_stage),
    ("infinite_hip_stage_reference", infinite_hip_stage),
    ("infinite_hip_stage_triton", _on_triton),
):
    ops.library.define(
        f"{_name}(Tensor q, Tensor k, Tensor? counts, Tensor? indices, int parent, int chunk, "
        "int slots, int stride_q, int block_q, int sink, int window, int behind, bool shared, "
        "bool is_causal) -> (Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    ops.library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_attn::{_name}", _fake, lib=ops.library)
ops.library.impl("infinite_hip_stage", _on_gpu, "CUDA")
