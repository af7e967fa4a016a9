"""Sparse attention for transformers models, through the library's own attention interface."""

from .patching import Patch, patch, unpatch

__all__ = ["Patch", "patch", "unpatch"]
