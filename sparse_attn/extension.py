"""The compiled kernels, or why they are not there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

RECORD = Path(__file__).with_name("_build.json")  # written by setup.py


def load() -> tuple[ModuleType | None, str | None]:
    """The module with the C++ kernels, or None and the reason."""
    try:
        return importlib.import_module("sparse_attn._C"), None
    except ModuleNotFoundError as error:
        return None, _why_missing() if error.name == "sparse_attn._C" else str(error)
    except ImportError as error:  # what the loader says: another torch, another platform
        return None, f"{error}{_built_against()}"


def _record() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def _why_missing() -> str:
    record = _record()
    if "reason" in record:
        return record["reason"]
    if record:
        return f"its file is gone from {RECORD.parent}{_built_against()}; install sparse_attn again"
    return f"{RECORD.parent} was never built; `pip install -e .` in the folder above it does that"


def _built_against() -> str:
    record = _record()
    if "torch" not in record:
        return ""
    return (
        f" (built against torch {record['torch']} by {record['compiler']}; "
        f"this is torch {torch.__version__})"
    )


kernels, error = load()
