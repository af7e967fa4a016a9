"""Sparse attention for transformers models, through the library's own attention interface."""

from .patching import Patch, patch

__all__ = ["Patch", "patch"]
