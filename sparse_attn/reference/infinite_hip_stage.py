"""A stage of InfiniteHiP: the chunks of keys that survive it, for each query block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..contract.dtypes import compute_dtype

Lists = tuple[Tensor, Tensor]  # counts [B, H or 1, Mq] and indices [B, H or 1, Mq, width], int32


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
