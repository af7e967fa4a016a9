"""Peak memory of a call, as the operating system counts it (Linux)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def peak_growth(call: Callable[[], object]) -> tuple[object, int]:
    """What `call` returns, and by how many bytes the process grew at most while it ran.

    It runs in a thread of its own: buffers that a thread keeps for its next call count too.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(int).result()
        _return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
        before = _status("VmRSS")
        result = thread.submit(call).result()
        return result, _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    value = next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(value) * 1024


def _return_freed_memory() -> None:
    """Give back what earlier calls freed: it would be used again unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
