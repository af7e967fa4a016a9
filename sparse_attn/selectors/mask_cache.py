"""Selections that are reused while decoding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..layout import BlockLayout
from .base import Selector
from .hip import HiP
from .static import _at_least

_SAMPLES = 16


@dataclass
class MaskCache(Selector):
    """`HiP` that chooses anew only at every `refresh`-th decoding step; in between the window alone
    follows the new tokens (HiP, arXiv 2406.09827, section 3).

    The window moves while the selection stays: keys that leave the window must have been searched
    before, so HiP's `margin` has to be at least ``refresh - 1``.

    One object serves one attention layer, as it holds a selection. A selection is reused for a
    call with one query row, and only for the sequences that it was made for: their keys are
    compared at some positions. Any other call chooses anew, as does compiled code.

    Args:
        selector: a `HiP`.
        refresh: number of decoding steps that share a selection, at least 1. Default 8.

    Example:
        >>> hip = HiP(k=512, window=256, margin=7)
        >>> caches = {layer: MaskCache(hip, refresh=8) for layer in range(3, 30)}
        >>> # patch(model, caches): layers 0, 1 and 2 stay dense
    """

    selector: HiP
    refresh: int = 8
    _kept: BlockLayout | None = field(default=None, init=False, repr=False, compare=False)
    _keys: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _at_least("refresh", self.refresh, 1)
        if self.selector.margin < self.refresh - 1:
            raise ValueError(
                f"refresh={self.refresh} needs a margin of at least {self.refresh - 1}, got "
                f"{self.selector.margin}"
            )

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        if q.shape[2] != 1 or not is_causal or torch.compiler.is_compiling():
            return self.selector(q, k, is_causal=is_causal, scale=scale)
        if self._continues(q, k):
            return replace(self._kept, seqlens=(1, k.shape[2]))
        self._kept = self.selector(q, k, is_causal=is_causal, scale=scale)
        self._keys = _samples(k, k.shape[2])
        return self._kept

    def _continues(self, q: Tensor, k: Tensor) -> bool:
        if self._kept is None or self._kept.kv_num_blocks is None:  # no call, or no keys, so far
            return False
        if self._kept.kv_num_blocks.shape[:2] != q.shape[:2]:
            return False
        seqlen = self._kept.seqlen_kv
        if not 0 < k.shape[2] - seqlen < self.refresh:
            return False
        now = _samples(k, seqlen)
        same_kind = now.dtype == self._keys.dtype and now.device == self._keys.device
        return same_kind and torch.equal(now, self._keys)


def _samples(k: Tensor, seqlen: int) -> Tensor:
    """Some of the first `seqlen` keys."""
    return k[:, :, : seqlen : max(1, seqlen // _SAMPLES)].clone()
