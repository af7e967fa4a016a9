"""Selections that are reused while decoding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..layout import BlockLayout
from .base import Refreshable, Selector, for_layer
from .checks import check_at_least
from .lineage import Memory

_STAGED = ("margin", "num_stages", "prune", "layout")  # of a `Refreshable`


@dataclass
class _Selection:
    """What the stages have chosen, each with ``made[stage]`` keys, in calls alike in `kind`."""

    kind: tuple[Any, ...]
    made: list[int] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)  # what each stage has returned
    layout: BlockLayout | None = None


@dataclass(frozen=True)
class MaskCache(Selector):
    """A selector that chooses anew only at some decoding steps; in between the window alone follows
    the new tokens (HiP, arXiv 2406.09827, section 3; InfiniteHiP, arXiv 2502.08910).

    A decoding step is a causal call with one query row. It is a step after the call before it if k
    is proven to hold the keys of that call and one more, and q is of the same shape and kind. Then
    and only then a selection is used again; any other call chooses anew::

        n = keys of the step that chose, and steps have followed each other since
        selector(q, k) if k.shape[2] - n >= refresh else that step's lists, for k.shape[2] keys

    So a selection ends with a rollback, an edit, another order of the batch, a call with several
    rows, or a gap. What proves keys to be the same is told in the docs of selectors: growing them
    in a `KeyBuffer`, or in transformers' caches in a patched model. ``torch.cat`` alone does not.

    The stages of `InfiniteHiP` may have intervals of their own: stage ``i`` runs again, and with it
    all later ones, when it is ``refresh[i]`` steps old, on what the stage before it has kept.

    The window moves while the selection stays: keys that leave the window must have been searched
    before, so the selector's `margin` has to be at least ``refresh - 1``, of the first stage.

    One object is of use to one attention layer, as it holds a selection: give each layer its own,
    as `patch` does. Compiled code chooses anew in each call.

    Args:
        selector: a `HiP`, an `InfiniteHiP`, or another selector with `margin`, `num_stages`,
            `prune` and `layout`, see `selectors.base.Refreshable`.
        refresh: number of decoding steps that share a selection, at least 1; or a tuple with one
            for each stage of the selector, none greater than the one before it, as ``(16, 8, 4)``
            in the paper. Default 8.

    Raises:
        TypeError: if `selector` does not choose in stages.
        ValueError: if `refresh` is not as above, or greater than the selector's ``margin + 1``.

    Example:
        >>> hip = HiP(k=512, window=256, margin=7)
        >>> caches = dict.fromkeys(range(3, 30), MaskCache(hip, refresh=8))
        >>> # patch(model, caches): layers 0, 1 and 2 stay dense
        >>> in_stages = MaskCache(InfiniteHiP(margin=15), refresh=(16, 8, 4))
    """

    selector: Refreshable
    refresh: int | tuple[int, ...] = 8
    _memory: Memory = field(default_factory=Memory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.selector, type) or not all(hasattr(self.selector, x) for x in _STAGED):
            raise TypeError(
                "selector must be a HiP or an InfiniteHiP, or have as they do what MaskCache needs "
                f"to refresh a selection ({', '.join(_STAGED)}), got {self.selector!r}"
            )
        for interval in self._intervals:
            check_at_least("refresh", interval, 1)
        stages = self.selector.num_stages
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
        if torch.compiler.is_compiling():
            return self.selector(q, k, is_causal=is_causal, scale=scale)
        if q.shape[2] != 1 or not is_causal:
            self._memory.forget()
            return self.selector(q, k, is_causal=is_causal, scale=scale)
        kind = (q.shape, q.dtype, q.device, scale)
        now = self._continued(kind, k) or _Selection(kind)
        self._memory.forget()  # in case a stage fails midway
        ages = (k.shape[2] - made for made in now.made)
        due = (i for i, age in enumerate(ages) if age >= self._intervals[i])
        first = next(due, len(now.made))
        if first < self.selector.num_stages:
            self._run(first, now, q, k, scale)
        self._memory.keep(k, now)
        # The lists are the caller's to change, the kept ones are not.
        lists = {name: x.clone() for name, x in now.layout.tensors().items()}
        return replace(now.layout, seqlens=(1, k.shape[2]), **lists)

    def for_layer(self, layer: int | None) -> MaskCache:
        return replace(self, selector=for_layer(self.selector, layer))

    @property
    def _intervals(self) -> tuple[int, ...]:
        if isinstance(self.refresh, tuple | list):
            return tuple(self.refresh)
        return (self.refresh,) * self.selector.num_stages

    def _continued(self, kind: tuple[Any, ...], k: Tensor) -> _Selection | None:
        """What is kept, if this call is a step after the one before it."""
        kept, length = self._memory.value, self._memory.length
        if length == 0 or kept.kind != kind or k.shape[2] != length + 1:
            return None
        return kept if self._memory.known(k) == length else None

    def _run(self, first: int, now: _Selection, q: Tensor, k: Tensor, scale: float | None) -> None:
        """Runs the stages from the first one that is due."""
        now.made[first:] = [k.shape[2]] * (self.selector.num_stages - first)
        del now.kept[first:]
        for stage in range(first, self.selector.num_stages):
            before = now.kept[-1] if stage > 0 else None
            now.kept.append(self.selector.prune(stage, before, q, k, scale=scale))
        now.layout = self.selector.layout(now.kept[-1], q, k)
