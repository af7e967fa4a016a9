"""Sparse long-context attention: one op, one mask type, many ways to choose the mask."""

from typing import TYPE_CHECKING

from . import landmark, names, quality, retrieval, selectors
from .api import explain, sparse_attention, sparse_attention_varlen
from .hf import patch, unpatch
from .landmark import landmark_attention
from .layout import BlockLayout
from .ops.backends import Explanation
from .sdpa import scaled_dot_product_attention
from .state import merge_states

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "Explanation",
    "explain",
    "landmark",
    "landmark_attention",
    "merge_states",
    "patch",
    "quality",
    "retrieval",
    "scaled_dot_product_attention",
    "selectors",
    "sparse_attention",
    "sparse_attention_varlen",
    "unpatch",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if not TYPE_CHECKING:  # to type checkers every name would exist
    __getattr__ = names.missing(
        __name__, __all__, lambda: {x: f"sparse_attn.selectors.{x}" for x in selectors.__all__}
    )
