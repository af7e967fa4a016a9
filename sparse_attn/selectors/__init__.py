"""Selectors: callables that look at q and k and say which keys each head attends to."""

from .base import PerHead, Selector, Union
from .block_topk import BlockTopK
from .hip import HiP
from .infinite_hip import InfiniteHiP
from .mask_cache import MaskCache
from .static import Dense, SinkWindow, SlidingWindow

__all__ = [
    "BlockTopK",
    "Dense",
    "HiP",
    "InfiniteHiP",
    "MaskCache",
    "PerHead",
    "Selector",
    "SinkWindow",
    "SlidingWindow",
    "Union",
]
