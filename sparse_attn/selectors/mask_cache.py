"""Selections that are reused while decoding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..layout import BlockLayout
from .base import Selector, same_keys, sample_keys
from .checks import check_at_least
from .hip import HiP
from .infinite_hip import InfiniteHiP, Lists


@dataclass
class MaskCache(Selector):
    """`HiP` or `InfiniteHiP` that chooses anew only at some decoding steps; in between the window
    alone follows the new tokens (HiP, arXiv 2406.09827, section 3; InfiniteHiP, arXiv 2502.08910).

    The stages of `InfiniteHiP` may have intervals of their own: stage ``i`` runs again, and with it
    all later ones, when it is ``refresh[i]`` steps old, on what the stage before it has kept.

    The window moves while the selection stays: keys that leave the window must have been searched
    before, so the selector's `margin` has to be at least ``refresh - 1``, of the first stage.

    One object serves one attention layer, as it holds a selection. A selection is reused for a
    call with one query row, and only for the sequences that it was made for: their keys are
    compared at some positions. Any other call chooses anew, as does compiled code.

    Args:
        selector: a `HiP` or an `InfiniteHiP`.
        refresh: number of decoding steps that share a selection, at least 1; for `InfiniteHiP` also
            a tuple with one for each stage, none greater than the one before it, as ``(16, 8, 4)``
            in the paper. Default 8.

    Example:
        >>> hip = HiP(k=512, window=256, margin=7)
        >>> caches = {layer: MaskCache(hip, refresh=8) for layer in range(3, 30)}
        >>> # patch(model, caches): layers 0, 1 and 2 stay dense
        >>> in_stages = MaskCache(InfiniteHiP(margin=15), refresh=(16, 8, 4))
    """

    selector: HiP | InfiniteHiP
    refresh: int | tuple[int, ...] = 8
    _made: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _kept: list[Lists] = field(default_factory=list, init=False, repr=False, compare=False)
    _layout: BlockLayout | None = field(default=None, init=False, repr=False, compare=False)
    _shape: torch.Size | None = field(default=None, init=False, repr=False, compare=False)
    _keys: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for interval in self._intervals:
            check_at_least("refresh", interval, 1)
        stages = self._num_stages
        if len(self._intervals) != stages:
            raise ValueError(
                f"refresh={self.refresh} must have one entry for each stage of the selector, which "
                f"has {stages}"
            )
        if any(coarse < fine for coarse, fine in pairwise(self._intervals)):
            raise ValueError(f"refresh={self.refresh}: a stage runs whenever one before it does")
        if self.selector.margin < self._intervals[0] - 1:
            raise ValueError(
                f"refresh={self.refresh} needs a margin of at least {self._intervals[0] - 1}, got "
                f"{self.selector.margin}"
            )

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        if q.shape[2] != 1 or not is_causal or torch.compiler.is_compiling():
            return self.selector(q, k, is_causal=is_causal, scale=scale)
        seqlen = k.shape[2]
        first = self._first_due(q, k)
        if first == 0:
            self._shape, self._keys = q.shape, sample_keys(k, seqlen)
        if first < self._num_stages:
            self._run(first, q, k, scale)
            self._made[first:] = [seqlen] * (self._num_stages - first)
        return replace(self._layout, seqlens=(1, seqlen))

    @property
    def _num_stages(self) -> int:
        return len(self.selector.chunk) if isinstance(self.selector, InfiniteHiP) else 1

    @property
    def _intervals(self) -> tuple[int, ...]:
        if isinstance(self.refresh, tuple | list):
            return tuple(self.refresh)
        return (self.refresh,) * self._num_stages

    def _run(self, first: int, q: Tensor, k: Tensor, scale: float | None) -> None:
        """Runs the stages from the first one that is due."""
        if isinstance(self.selector, HiP):
            self._layout = self.selector(q, k, scale=scale)
            return
        del self._kept[first:]
        for stage in range(first, self._num_stages):
            before = self._kept[-1] if stage > 0 else None
            self._kept.append(self.selector.prune(stage, before, q, k, scale=scale))
        self._layout = self.selector.layout(self._kept[-1], q, k)

    def _first_due(self, q: Tensor, k: Tensor) -> int:
        """The first stage that has to run, or the number of stages if none has."""
        if not self._continues(q, k):
            return 0
        ages = (k.shape[2] - made for made in self._made)
        due = (i for i, age in enumerate(ages) if age >= self._intervals[i])
        return next(due, self._num_stages)

    def _continues(self, q: Tensor, k: Tensor) -> bool:
        if self._layout is None or self._layout.kv_num_blocks is None:  # no call so far, or no keys
            return False
        seqlen = self._made[0]
        if self._shape != q.shape:
            return False
        if k.shape[2] <= self._made[-1] or k.shape[2] - seqlen >= self._intervals[0]:
            return False
        return same_keys(sample_keys(k, seqlen), self._keys)
