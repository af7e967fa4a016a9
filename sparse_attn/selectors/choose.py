"""Rules from scores to block lists."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout.lists import ascending
from ..ops.top_blocks import top_blocks as _top_blocks


def top_blocks(scores: Tensor, top_k: int, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `top_k` blocks of highest score in each row; a score of -inf or NaN is never chosen.

    Args:
        scores: float ``[..., Mq, Mkv]``.
        top_k: blocks to keep, at least 1; rows with fewer finite scores keep those they have.
        forced: bool, broadcastable to `scores`: blocks that are among the `top_k` whatever their
            score. Default none.

    Returns:
        tuple[Tensor, Tensor]: int32 ``(kv_num_blocks [..., Mq], kv_indices [..., Mq, min(top_k,
        Mkv)])``, ascending in each row. Among equal scores at the boundary the C++ kernel (float32
        on a CPU) chooses the earlier ones, elsewhere the choice is `torch.topk`'s.

    Raises:
        ValueError: if `top_k` is less than 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if forced is not None:
        scores = scores.masked_fill(forced, torch.inf)
    return _top_blocks(scores, top_k)


def covering_blocks(
    scores: Tensor, share: float, forced: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The fewest blocks of highest score, in each row, that hold `share` of the row's total.

    Blocks join by descending score, the forced ones first, while those before them hold less than
    ``share * total``; so the block that crosses the line is kept. Of equal scores the earlier one
    joins first.

    Args:
        scores: float ``[..., Mq, Mkv]``, at least 0; -inf or NaN for blocks that are never chosen.
        share: of the sum of a row's scores, in (0, 1].
        forced: bool, broadcastable to `scores`: blocks that are kept in any case, unless they are
            never chosen. Default none.

    Returns:
        tuple[Tensor, Tensor]: int32 ``(kv_num_blocks [..., Mq], kv_indices [..., Mq, width])``,
        ascending in each row, `width` that of the longest.
    """
    allowed = scores > -torch.inf
    mass = scores.where(allowed, 0).double()
    order = scores.where(allowed, -1)
    if forced is not None:
        forced = forced & allowed
        order = order.masked_fill(forced, torch.inf)
    order = order.sort(dim=-1, descending=True, stable=True).indices
    joined = mass.gather(-1, order)
    before = joined.cumsum(-1) - joined
    keep = (before < share * mass.sum(-1, keepdim=True)) & allowed.gather(-1, order)
    if forced is not None:
        keep = keep | forced.expand_as(allowed).gather(-1, order)
    return ascending(order.where(keep, scores.shape[-1]).int(), scores.shape[-1])


def highest(scores: Tensor, count: int | Tensor) -> Tensor:
    """Which are the `count` highest scores of each row, of equal ones the earlier: bool.

    Args:
        scores: ``[..., n]``.
        count: for all rows, or ``[..., 1]`` for each.
    """
    return _leading(scores.argsort(dim=-1, descending=True, stable=True), count)


def highest_within(scores: Tensor, share: float, *, inclusive: bool) -> Tensor:
    """Which are the highest scores of each row that together hold at most `share`: bool.

    Args:
        scores: ``[..., n]``, at least 0.
        share: the most that they sum to.
        inclusive: whether the one that crosses the line is kept too; else at least one is kept.
    """
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    count = (values.cumsum(-1) <= share).sum(-1, keepdim=True)
    return _leading(order, count + 1 if inclusive else count.clamp(min=1))


def _leading(order: Tensor, count: int | Tensor) -> Tensor:
    """Which entries the first `count` of each row of ``order [..., n]`` name: bool."""
    kept = torch.arange(order.shape[-1], device=order.device) < count
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, kept.expand(order.shape))


def listed_blocks(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks where ``keep [..., Mq, Mkv]`` is true: int32 ``(kv_num_blocks [..., Mq],
    kv_indices [..., Mq, width])``, `width` that of the longest. ``listed_blocks(scores >=
    threshold)`` chooses by a threshold.
    """
    num_blocks = keep.shape[-1]
    numbers = torch.arange(num_blocks, dtype=torch.int32, device=keep.device)
    return ascending(numbers.where(keep, num_blocks), num_blocks)


def join_lists(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Lists ``(counts [B, H, m], indices [B, H, m, width])`` of consecutive query blocks as one;
    the shorter ones get zeros behind their counts.
    """
    if len(parts) == 1:
        return parts[0]
    width = max(indices.shape[-1] for _, indices in parts)
    padded = [torch.nn.functional.pad(x, (0, width - x.shape[-1])) for _, x in parts]
    return torch.cat([counts for counts, _ in parts], 2), torch.cat(padded, 2)


def blocks_at_distances(
    distances: Tensor, seqlens: tuple[int, int], block_size: int
) -> tuple[Tensor, Tensor]:
    """For each query block, the key blocks with a key at one of the distances behind one of its
    rows: diagonals of the attention matrix, rounded outwards to whole blocks.

    Args:
        distances: int ``[B, H, n]``, each at least 0: row ``p`` is to see key ``p - distance``.
        seqlens: ``(seqlen_q, seqlen_kv)``.
        block_size: rows of a query block and keys of a key block.

    Returns:
        tuple[Tensor, Tensor]: int32 ``(kv_num_blocks [B, H, Mq], kv_indices [B, H, Mq, width])``,
        ascending; blocks behind the last row of the query block are left out.
    """
    seqlen_q, seqlen_kv = seqlens
    off, num_q_blocks = seqlen_kv - seqlen_q, -(-seqlen_q // block_size)
    # Relative to its number, each query block reads the same blocks: those of rows off, off + 1 ..
    first = (off - distances).div(block_size, rounding_mode="floor")
    last = (off - distances + block_size - 1).div(block_size, rounding_mode="floor")
    shift = num_q_blocks + seqlen_kv // block_size + 1  # makes them positive
    relative = ascending((torch.cat([first, last], -1) + shift).int(), 2 * shift)[1] - shift
    m = torch.arange(num_q_blocks, dtype=torch.int32, device=distances.device)[:, None]
    blocks = relative[:, :, None] + m
    last_block = ((m + 1) * block_size + off).clamp(max=seqlen_kv).sub(1) // block_size
    outside = (blocks < 0).sum(-1, keepdim=True)
    counts = ((blocks >= 0) & (blocks <= last_block)).sum(-1, dtype=torch.int32)
    slots = torch.arange(blocks.shape[-1], device=distances.device) + outside
    return counts, blocks.gather(-1, slots.clamp(max=max(blocks.shape[-1] - 1, 0)))
