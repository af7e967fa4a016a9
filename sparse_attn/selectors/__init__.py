"""Selectors: callables that look at q and k and say which keys each head attends to."""

import sys
from typing import TYPE_CHECKING

from ..names import missing
from .anchor_attention import AnchorAttention
from .base import Selector, Union
from .block_topk import BlockTopK
from .combine import PerHead, PrefillDecode
from .flex_prefill import FlexPrefill
from .hip import HiP
from .infinite_hip import InfiniteHiP
from .key_buffer import KeyBuffer
from .mask_cache import MaskCache
from .quest import Quest
from .sparge_attn import SpargeAttn
from .static import Dense, LocalStride, SinkWindow, SlidingWindow, TriShape
from .vertical_slash import VerticalSlash
from .x_attention import XAttention

__all__ = [
    "AnchorAttention",
    "BlockTopK",
    "Dense",
    "FlexPrefill",
    "HiP",
    "InfiniteHiP",
    "KeyBuffer",
    "LocalStride",
    "MaskCache",
    "PerHead",
    "PrefillDecode",
    "Quest",
    "Selector",
    "SinkWindow",
    "SlidingWindow",
    "SpargeAttn",
    "TriShape",
    "Union",
    "VerticalSlash",
    "XAttention",
]


def __dir__() -> list[str]:
    return __all__


def _others() -> dict[str, str]:
    package = sys.modules["sparse_attn"]  # which imports this module
    return {x: f"sparse_attn.{x}" for x in package.__all__}


if not TYPE_CHECKING:  # to type checkers every name would exist
    __getattr__ = missing(__name__, __all__, _others)
