"""The ops as torch sees them. Importing this package defines them and loads the C++ kernels."""

from __future__ import annotations

import logging

from .. import extension
from . import attention, hip_select, infinite_hip_stage, top_blocks

__all__ = ["attention", "hip_select", "infinite_hip_stage", "top_blocks"]

if extension.kernels is None:
    logging.getLogger("sparse_attn").warning(
        "the C++ extension is not available: %s. Until then CPU tensors use the reference backend, "
        "which is right but slow.",
        extension.error,
    )
