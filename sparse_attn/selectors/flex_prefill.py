"""Lines, diagonals or blocks, as many as each head needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import BlockLayout
from .base import Selector, block_rows, pool_mean, refuse_not_causal, seqlens
from .probes import last_rows_mass, products, softmax_scale
from .static import _at_least, _share


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
        ValueError: when called with ``is_causal=False``.

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
        _share("mass", self.mass)
        if not self.tau >= 0:
            raise ValueError(f"tau must be at least 0, got {self.tau!r}")
        _at_least("block_size", self.block_size, 1)
        _at_least("min_budget", self.min_budget, self.block_size)
        if self.max_budget is not None:
            _at_least("max_budget", self.max_budget, self.min_budget)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        refuse_not_causal(self, is_causal)
        lengths, size = seqlens(q, k), self.block_size
        if q.shape[2] <= max(2 * size, self.min_budget) or k.shape[2] == 0:
            return BlockLayout.dense(lengths, device=q.device)
        vertical, slash = (x / size for x in last_rows_mass(q, k, size, scale))
        rows = q[:, :, -size:].mean(2, keepdim=True, dtype=torch.float32)
        queries = torch.cat([pool_mean(q, size), rows], 2)
        pooled = products(queries, pool_mean(k, size)) * softmax_scale(q, scale)
        first, last = block_rows(lengths, size, 0, pooled.shape[2], q.device)
        future = torch.arange(pooled.shape[3], device=q.device) * size > last
        pooled[:, :, :-1].masked_fill_(future, -torch.inf)
        pooled = pooled.softmax(-1).nan_to_num_(0.0)
        keep = future.new_empty((*pooled.shape[:2], *future.shape))
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                estimate, by_block = pooled[b, h, -1], _sum_runs(vertical[b, h], size)
                aware = _distance(estimate, by_block) < self.tau
                budgets = [
                    self.min_budget // size if aware else self._budget(x[b, h])
                    for x in (vertical, slash)
                ]
                by_distance = _sum_runs(slash[b, h], size)
                keep[b, h] = self._lines(by_block, by_distance, budgets, first, last)
                if aware:
                    keep[b, h] |= _best_pairs(pooled[b, h, :-1], self.mass)
        return BlockLayout.from_dense(keep & ~future, block_size=(size, size), seqlens=lengths)

    def _budget(self, mass: Tensor) -> int:
        """How many blocks the fewest keys (or distances) that hold the share amount to."""
        covered = mass.sort(descending=True).values.cumsum(0) <= self.mass
        blocks = (int(covered.sum()) + 1) // self.block_size + 1
        blocks = max(blocks, self.min_budget // self.block_size)
        most = self.max_budget
        return blocks if most is None else min(blocks, most // self.block_size)

    def _lines(
        self, vertical: Tensor, slash: Tensor, budgets: list[int], first: Tensor, last: Tensor
    ) -> Tensor:
        """Which key blocks lie on the best vertical lines or diagonals: bool ``[Mq, Mkv]``.

        Args:
            vertical: the score of each key block, ``[Mkv]``.
            slash: the score of each distance in blocks, ``[Mkv]``.
            budgets: how many to keep of both.
            first: positions of the query blocks' first rows, ``[Mq, 1]``.
            last: those of their last rows. A query block that does not begin with a key block has
                two diagonals at each distance.
        """
        best = torch.zeros(2, len(vertical), dtype=torch.bool, device=vertical.device)
        for chosen, scores, count in zip(best, (vertical, slash), budgets, strict=True):
            scores = scores.clone()
            scores[0] = torch.inf
            chosen[scores.topk(min(count, len(scores))).indices] = True
        keep, distances = best
        blocks = torch.arange(len(keep), device=keep.device)
        for rows in (first, last):
            distance = rows.div(self.block_size, rounding_mode="floor") - blocks
            keep = keep | (distances[distance.clamp(0, len(distances) - 1)] & (distance >= 0))
        return keep


def _sum_runs(x: Tensor, size: int) -> Tensor:
    """Sums of ``x [n]`` over runs of `size`; the last one may be shorter."""
    return torch.nn.functional.pad(x, (0, -len(x) % size)).unflatten(0, (-1, size)).sum(1)


def _distance(p: Tensor, q: Tensor) -> float:
    """Square root of the Jensen-Shannon divergence, in nats, of two distributions."""
    middle = (p + q) / 2
    twice = sum(x.xlogy(x).sum() - x.xlogy(middle).sum() for x in (p, q))
    return max(0.0, float(twice) / 2) ** 0.5


def _best_pairs(mass: Tensor, share: float) -> Tensor:
    """The fewest entries of ``mass [Mq, Mkv]`` that hold a share of it, and one more: bool."""
    values, order = mass.flatten().sort(descending=True)
    count = int((values.cumsum(0) <= share * len(mass)).sum()) + 1
    keep = torch.zeros(mass.numel(), dtype=torch.bool, device=mass.device)
    keep[order[:count]] = True
    return keep.view(mass.shape)
