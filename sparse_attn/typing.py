"""The types of arguments, for annotations."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from .layout import BlockLayout

__all__ = ["Backend", "SelectorLike"]

Backend = Literal["auto", "cpu", "triton", "reference"]


class SelectorLike(Protocol):
    """What `sparse_attention` and `patch` take for a selector: a `selectors.Selector`, or any
    function of this signature. Two attributes that a `Selector` has are asked for where there are
    such: `is_dense`, and `for_layer`, which `patch` calls for each layer.

    Example:
        >>> def window(q, k, *, is_causal, scale):
        ...     return BlockLayout.sink_window((q.shape[2], k.shape[2]), sink=4, window=64)
        >>> selector: SelectorLike = window
    """

    def __call__(self, q: Tensor, k: Tensor, /, *, is_causal: bool, scale: float) -> BlockLayout:
        """The layout for ``q [B, H, Sq, D]`` and ``k [B, Hkv, Skv, D]``."""
        ...
