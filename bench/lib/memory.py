"""Peak memory of a call, as the operating system counts it (Linux with glibc)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD


def peak_growth(call: Callable[[], object]) -> tuple[object, int]:
    """What `call` returns, and by how many bytes the process grew at most while it ran.

    It runs in a thread of its own, and every larger block of memory comes from the operating
    system: neither buffers that a thread keeps nor memory that was freed before can be used unseen.
    Linux counts pages in batches: the figure is exact to some hundred KiB.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 2**16)
    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(int).result()
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present size
            before = _status("VmRSS")
            result = thread.submit(call).result()
            return result, _status("VmHWM") - before
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 2**25)  # where it ends up when large blocks come and go


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    value = next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(value) * 1024
