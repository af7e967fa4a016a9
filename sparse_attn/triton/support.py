"""What the Triton backend needs and serves; nothing here imports Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

from ..contract.request import Request

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEATURES = frozenset(
    {"blocks", "columns", "softcap", "sink_logits", "key_bias", "alibi_slopes", "packed", "paged"}
)
MAX_HEAD_DIM = 256
MAX_HIP_SLOTS = 2048  # what one program sorts in its registers


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:
        return False


INSTALLED = _is_installed()


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors. The environment decides, when
    the kernels are imported.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def reasons(request: Request) -> list[str]:
    """Why the kernels cannot run a call, one sentence each."""
    q, found = request.q, []
    if not INSTALLED:
        found.append("triton is not installed: pip install 'triton>=3.3'")
    if q.device.type != "cuda" and not (q.device.type == "cpu" and is_interpreting()):
        found.append(
            f"q is on {q.device}; it takes GPU tensors (CPU tensors only in Triton's interpreter, "
            "with TRITON_INTERPRET=1)"
        )
    if q.dtype not in DTYPES:
        found.append(f"the dtype is {q.dtype}; it takes float32, bfloat16 and float16")
    for name, size in request.head_dims():
        if not 1 <= size <= MAX_HEAD_DIM:
            found.append(f"{name} is {size}; it takes 1 to {MAX_HEAD_DIM}")
    return [*found, *request.unserved(FEATURES)]
