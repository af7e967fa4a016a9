"""Lines, diagonals or blocks, as many as each head needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import BlockLayout
from .base import Selector, block_rows, pool_mean, seqlens
from .checks import count_fields, int_fields, number_field, refuse_not_causal, share_fields
from .choose import highest, highest_within
from .probes import last_rows_mass, products, softmax_scale


@dataclass(frozen=True)
class FlexPrefill(Selector):
    """For each head as many vertical lines and diagonals of blocks, or blocks, as hold a share of
    its attention (FlexPrefill, arXiv 2502.20766), for prefill.

    With ``P`` the causal softmax of the last `block_size` rows, ``vertical[j]`` is the sum of its
    column ``j`` and ``slash[d]`` that of its diagonal at distance ``d``, over the number of rows.
    If it takes ``n`` keys (or distances) to hold more than `mass` of ``vertical`` (or ``slash``),
    ``n // block_size + 1`` key blocks (or distances of blocks) are kept, no fewer than
    ``min_budget // block_size`` and no more than ``max_budget // block_size``: those of greatest
    sum, the first block and the own one in any case.

    A head asks for blocks of its own instead if the pooled estimate ``softmax(scale * mean(last
    rows) @ mean(key block))`` tells as much as ``vertical``: the square root of the Jensen-Shannon
    divergence of the two, by block, is below `tau`. Such a head keeps `min_budget` of both, and the
    best (query block, key block) pairs of the pooled causal softmax, over all query blocks
    together, that hold `mass` of it.

    Every row's keys are those that the *last* rows look for, so a selection depends on later
    tokens: right for a prompt, wrong for training and for perplexities. Up to ``max(2 * block_size,
    min_budget)`` rows are dense, as in the paper; so is decoding.

    Args:
        mass: share of the attention that is kept, in (0, 1]. Default 0.9.
        tau: greatest distance at which a head counts as query-aware, at least 0. Default 0.1.
        block_size: rows of a query block and keys of a key block. Default 128.
        min_budget: least number of keys, at least `block_size`. Default 1024.
        max_budget: greatest number of keys, or None for no limit. Default None.

    Raises:
        ValueError: if an argument is no number of its kind or out of range; when called with
            ``is_causal=False``.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 512, 64).unbind(0)
        >>> layout = FlexPrefill(block_size=32, min_budget=64)(q, k)
    """

    mass: float = 0.9
    tau: float = 0.1
    block_size: int = 128
    min_budget: int = 1024
    max_budget: int | None = None

    def __post_init__(self) -> None:
        share_fields(self, "mass")
        number_field(self, "tau", 0)
        int_fields(self, block_size=1)
        count_fields(self, min_budget=self.block_size)
        if self.max_budget is not None:
            count_fields(self, max_budget=self.min_budget)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        refuse_not_causal(self, is_causal)
        lengths, size = seqlens(q, k), self.block_size
        if q.shape[2] <= max(2 * size, self.min_budget) or k.shape[2] == 0:
            return BlockLayout.dense(lengths, device=q.device)
        vertical, slash = (x / size for x in last_rows_mass(q, k, size, scale))
        by_block, by_distance = (_sum_runs(x, size) for x in (vertical, slash))
        rows = q[:, :, -size:].mean(2, keepdim=True, dtype=torch.float32)
        queries = torch.cat([pool_mean(q, size), rows], 2)
        pooled = products(queries, pool_mean(k, size)) * softmax_scale(q, scale)
        first, last = block_rows(lengths, size, 0, pooled.shape[2], q.device)
        blocks = torch.arange(pooled.shape[3], device=q.device)
        future = blocks * size > last
        pooled[:, :, :-1].masked_fill_(future, -torch.inf)
        pooled = pooled.softmax(-1).nan_to_num_(0.0)
        aware = _distance(pooled[:, :, -1], by_block) < self.tau
        keys, distances = (
            _highest_and_first(scores, self._budget(mass, aware))
            for scores, mass in ((by_block, vertical), (by_distance, slash))
        )
        keep = keys[:, :, None].expand(-1, -1, len(first), -1)
        for position in (first, last):  # of a query block that straddles two key blocks
            distance = position.div(size, rounding_mode="floor") - blocks
            known = distances[:, :, distance.clamp(0, distances.shape[2] - 1)]
            keep = keep | (known & (distance >= 0))
        pairs = pooled[:, :, :-1][aware]  # [heads, Mq, Mkv], whose rows sum to 1
        best = highest_within(pairs.flatten(1), self.mass * pairs.shape[1], inclusive=True)
        keep[aware] |= best.view(pairs.shape)
        return BlockLayout.from_dense(keep & ~future, block_size=(size, size), seqlens=lengths)

    def _budget(self, mass: Tensor, aware: Tensor) -> Tensor:
        """How many blocks the fewest keys (or distances) that hold the share amount to: ``[B, H,
        1]``; the least for heads that are query-aware.
        """
        least = self.min_budget // self.block_size
        covered = mass.sort(descending=True).values.cumsum(-1) <= self.mass
        blocks = ((covered.sum(-1, keepdim=True) + 1) // self.block_size + 1).clamp(min=least)
        if self.max_budget is not None:
            blocks = blocks.clamp(max=self.max_budget // self.block_size)
        return blocks.masked_fill(aware[..., None], least)


def _sum_runs(x: Tensor, size: int) -> Tensor:
    """Sums of ``x [..., n]`` over runs of `size`; the last one may be shorter."""
    return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence, in nats, of distributions ``[..., n]``."""
    middle = (p + q) / 2
    twice = sum((x.xlogy(x) - x.xlogy(middle)).sum(-1) for x in (p, q))
    return (twice / 2).clamp(min=0).sqrt()


def _highest_and_first(scores: Tensor, count: Tensor) -> Tensor:
    """Which are the first of ``scores [B, H, n]`` and the others of highest score, ``count [B, H,
    1]`` in all: bool.
    """
    return highest(scores.index_fill(-1, torch.tensor(0, device=scores.device), torch.inf), count)
