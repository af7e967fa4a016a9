"""How good a selection is on given q, k and v."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import as_bool, check_selector
from .contract.validation import check_layout, check_qkv, check_scalars, refuse_mask
from .layout import BlockLayout
from .layout.lists import spread_heads
from .typing import SelectorLike

__all__ = ["Quality", "measure"]

_CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class Quality:
    """What attention loses by a selection, for each batch element and head: float64 ``[B, H]``.

    Args:
        density: visible (query, key) pairs over all (causal) pairs of the rows looked at.
        recall: softmax mass, of attention to all keys, on the keys that a row sees; mean over rows.
        recall_p5: the same, of which 5 % of the rows have less.
        recall_min: the same of the worst row.
        oracle_gap: by how much recall would be greater if the lists of each query block held, for
            the same number of keys, the key blocks of greatest mass for the block that sink and
            window do not show; it tells a bad choice from blocks that are too coarse.
        error: ``norm(out - dense) / norm(dense)`` over all rows.

    Rows that see no key in attention to all keys are left out.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 256, 64).unbind(0)
        >>> found = measure(q, k, v, BlockLayout.dense((256, 256)))
        >>> found.density.unique().item()
        1.0
    """

    density: Tensor
    recall: Tensor
    recall_p5: Tensor
    recall_min: Tensor
    oracle_gap: Tensor
    error: Tensor


@torch.no_grad()
def measure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockLayout | SelectorLike,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    rows: range | None = None,
) -> Quality:
    """Compares attention over a selection with attention to all keys, in float32.

    Equivalent, for one head, to ``P = softmax(scale * q @ k.T)``, ``recall = (P * mask).sum(-1)``
    and ``out = (P * mask / recall) @ v``, but no array of S x S is made.

    Args:
        q: ``[B, H, Sq, D]``, any floating dtype.
        k: ``[B, Hkv, Skv, D]``.
        v: ``[B, Hkv, Skv, Dv]``.
        selection: a layout, or a selector that makes one of q and k.
        is_causal: as in `sparse_attention`. Default True.
        scale: as in `sparse_attention`. Default ``1 / sqrt(D)``.
        rows: a range of query rows to look at, in whole: the time is that of dense attention for
            them. Default all.

    Returns:
        Quality: one number for each batch element and head.

    Raises:
        ValueError: if the layout does not fit q and k, or `rows` is empty or no range of rows.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 256, 64).unbind(0)
        >>> from sparse_attn import quality
        >>> result = quality.measure(q, k, v, SinkWindow(sink=4, window=64))
        >>> result.recall.shape, bool((result.recall > result.density).all())
        (torch.Size([1, 4]), True)
    """
    check_qkv(q, k, v)
    scale, _ = check_scalars(q, scale, 0.0)
    is_causal = as_bool("is_causal", is_causal)
    layout = selection
    if not isinstance(selection, BlockLayout):
        refuse_mask("selection", selection)
        check_selector("selection", selection)
        layout = selection(q, k, is_causal=is_causal, scale=scale)
    check_layout(layout, q, k)
    layout.validate()
    rows = _checked_rows(rows, q, k, is_causal)
    chunk = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    block_q = layout.block_size[0]
    chunk = max(1, chunk // block_q) * block_q
    stops = [*range((rows.start // chunk + 1) * chunk, rows.stop, chunk), rows.stop]
    parts, keys, values = [], k.float(), v.float()
    for start, stop in zip([rows.start, *stops], stops, strict=False):
        parts.append(_measure_rows(q, keys, values, layout, range(start, stop), is_causal, scale))
    seen, pairs, recall, best, lost, norm = zip(*parts, strict=True)
    recall = torch.cat(recall, -1)
    lowest = recall.sort(-1).values
    return Quality(
        density=sum(seen) / sum(pairs),
        recall=recall.mean(-1),
        recall_p5=lowest[..., (lowest.shape[-1] - 1) // 20],
        recall_min=lowest[..., 0],
        oracle_gap=sum(best) / recall.shape[-1] - recall.mean(-1),
        error=(sum(lost) / sum(norm)).sqrt(),
    )


def _checked_rows(rows: range | None, q: Tensor, k: Tensor, is_causal: bool) -> range:
    """The rows to look at that see a key in attention to all keys."""
    rows = range(q.shape[2]) if rows is None else rows
    if not isinstance(rows, range):
        raise TypeError(f"rows must be a range, got {type(rows).__name__}")
    first = max(0, q.shape[2] - k.shape[2]) if is_causal else 0
    valid = range(max(first, rows.start), rows.stop)
    if rows.step != 1 or rows.stop > q.shape[2] or rows.start < 0 or not valid or not k.shape[2]:
        raise ValueError(
            f"rows must be a range of the {q.shape[2]} query rows with one that sees a key, got "
            f"{rows}"
        )
    return valid


def _measure_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    rows: range,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """For some rows, float64 ``[B, H]``: visible pairs, all pairs, recall of each row ``[B, H,
    rows]``, the sum of the best recalls, squared norms of the output's change and of the output; k
    and v are float32.
    """
    heads = q.shape[1]
    scores = _by_group(q[:, :, rows.start : rows.stop].float(), k.mT) * scale
    position = torch.arange(rows.start, rows.stop, device=q.device) + k.shape[2] - q.shape[2]
    every = torch.arange(k.shape[2], device=q.device) <= position[:, None]
    if not is_causal:
        every = torch.ones_like(every)
    mass = scores.masked_fill_(~every, -torch.inf).softmax(-1)
    mask = layout.visible(rows.start, rows.stop, is_causal=is_causal, num_heads=heads)
    kept = mass * mask
    recall = kept.sum(-1)
    dense = _by_group(mass, v)
    out = _by_group(kept, v) / recall.clamp(min=torch.finfo(recall.dtype).tiny)[..., None]
    none = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
    return (
        none + mask.sum((-2, -1)),
        none + every.sum(),
        recall.double(),
        _best_recall(mass, layout, rows, is_causal),
        (out - dense).double().square().sum((-2, -1)),
        dense.double().square().sum((-2, -1)),
    )


def _by_group(x: Tensor, y: Tensor) -> Tensor:
    """``x [B, H, M, N] @ y [B, Hkv, N, P]``, each of y for a group of heads."""
    grouped = x.reshape(x.shape[0], y.shape[1], -1, x.shape[3]) @ y
    return grouped.view(*x.shape[:3], y.shape[3])


def _best_recall(mass: Tensor, layout: BlockLayout, rows: range, is_causal: bool) -> Tensor:
    """The sum over rows of the softmax mass that sink, window and the best lists would show."""
    heads, (block_q, block_kv) = mass.shape[1], layout.block_size
    base = replace(
        layout, kv_num_blocks=None, kv_indices=None, num_columns=None, column_indices=None
    )
    near = base.visible(rows.start, rows.stop, is_causal=is_causal, num_heads=heads)
    far = torch.nn.functional.pad(mass * ~near, (0, -mass.shape[-1] % block_kv))
    far = far.unflatten(-1, (-1, block_kv)).sum(-1)
    q_blocks = torch.arange(rows.start, rows.stop, device=mass.device) // block_q
    first = int(q_blocks[0])
    by_block = far.new_zeros(*far.shape[:2], int(q_blocks[-1]) + 1 - first, far.shape[3])
    by_block.index_add_(2, q_blocks - first, far)
    blocks = torch.arange(first, first + by_block.shape[2], device=mass.device)
    budget = torch.zeros(1, 1, 1, dtype=torch.int64, device=mass.device)
    if layout.kv_num_blocks is not None:
        budget = budget + spread_heads(layout.kv_num_blocks[:, :, blocks], 1, heads) * block_kv
    if layout.num_columns is not None:
        groups = blocks // layout.column_group
        budget = budget + spread_heads(layout.num_columns[:, :, groups], 1, heads)
    taken = torch.arange(by_block.shape[3], device=mass.device) < (budget // block_kv)[..., None]
    best = (by_block.sort(-1, descending=True).values * taken).double().sum((-2, -1))
    return best + (mass * near).double().sum((-2, -1))
