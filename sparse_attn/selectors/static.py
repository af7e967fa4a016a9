"""Selectors that look at lengths only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..layout import BlockLayout
from .base import Selector, seqlens


def _at_least(name: str, value: int, low: int) -> None:
    if not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an int of at least {low}, got {value!r}")


def _share(name: str, value: float) -> None:
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")


@dataclass(frozen=True)
class Dense(Selector):
    """Every key: ordinary attention.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> layout = Dense()(q, k)
    """

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        return BlockLayout.dense(seqlens(q, k), device=q.device)


@dataclass(frozen=True)
class SlidingWindow(Selector):
    """The last `window` keys, itself included (Longformer, arXiv 2004.05150; Mistral, arXiv
    2310.06825).

    Args:
        window: number of keys, at least 1; not causal: keys closer than `window` on both sides.
            Default 1024.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> layout = SlidingWindow(window=64)(q, k)
    """

    window: int = 1024

    def __post_init__(self) -> None:
        _at_least("window", self.window, 1)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        return BlockLayout.sink_window(seqlens(q, k), window=self.window, device=q.device)


@dataclass(frozen=True)
class SinkWindow(Selector):
    """The first `sink` keys and the last `window` keys (StreamingLLM, arXiv 2309.17453; "A-shape").

    Keys keep the positions that the model gave them; StreamingLLM re-numbers them in its cache.

    Args:
        sink: number of leading keys, at least 0. Default 64.
        window: number of trailing keys, itself included, at least 1. Default 1024.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 256, 64).unbind(0)
        >>> layout = SinkWindow(sink=4, window=64)(q, k)
    """

    sink: int = 64
    window: int = 1024

    def __post_init__(self) -> None:
        _at_least("sink", self.sink, 0)
        _at_least("window", self.window, 1)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        return BlockLayout.sink_window(
            seqlens(q, k), sink=self.sink, window=self.window, device=q.device
        )
