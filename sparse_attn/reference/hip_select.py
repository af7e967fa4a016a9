"""HiP's tree search for the key blocks of each query block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract.dtypes import compute_dtype

FIRST_NODES = 8  # of the search, for each block that is kept


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
        ascending; behind the counts, zeros.
    """
    batch, heads, seqlen_q, _ = q.shape
    num_kv_heads, seqlen_kv = k.shape[1:3]
    dtype = compute_dtype(q.dtype)
    b = torch.arange(batch, device=q.device)[:, None, None]
    kv_head = (torch.arange(heads, device=q.device) // (heads // num_kv_heads))[:, None]
    keys_of_block = torch.arange(stride_k // 2, block_k, stride_k, device=q.device)
    first_block = sink // block_k
    width = min(slots, -(-seqlen_kv // block_k))  # no more than there are key blocks
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
