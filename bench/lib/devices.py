"""Where benchmarks run: whose tensors, how a call is timed, what is compared."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import float32

import sparse_attn
from sparse_attn import extension

from . import report
from .timing import CudaEvents, OtherLoad, Stopwatch, matmul_rate, read_rate, wall_time


@dataclass(frozen=True)
class Device:
    """A device, and how its results are written.

    Args:
        name: torch's name for it.
        title: heading of its page.
        stem: name of its files.
        stopwatch: seconds of a call.
        conditions: what to say of the machine once all is measured.
        others: libraries to compare with, besides SDPA.
        notes: what of the page's notes holds for this device only.
        sdpa_backends: what torch's SDPA may run on (of ``torch.nn.attention.SDPBackend``); None
            leaves it the choice.
        matrix, megabytes: how large the matrices and the array are that measure the peak.
    """

    name: str
    title: str
    stem: str
    stopwatch: Stopwatch
    conditions: Callable[[], str]
    others: tuple[str, ...]
    notes: str
    sdpa_backends: tuple = ()
    matrix: int = 2048
    megabytes: int = 512

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second of a large product in the dtype, or in float32 if
        that is faster: torch has no fast product of 16 bits on some processors.
        """
        rates = (matmul_rate(x, self.matrix, self.name, self.stopwatch) for x in {dtype, float32})
        return max(rates)

    def read_rate(self) -> float:
        """Bytes a second of a sum over a large array."""
        return read_rate(self.megabytes, self.name, self.stopwatch)


CPU_NOTES = """\
SDPA is torch's dense `scaled_dot_product_attention`, Flex is compiled FlexAttention with the same
mask ("-": not asked, or backward, which it lacks on CPUs)."""

CUDA_NOTES = """\
SDPA is torch's dense `scaled_dot_product_attention` in its FlashAttention backend (float32: the one
that it chooses), Flex is compiled FlexAttention with the same mask, flash-attn is the package of
that name, dense ("-": not asked, or not installed). Times are between CUDA events around a call,
which is queued before the GPU starts on it; before each call 256 MiB are overwritten, so that the
caches hold nothing of it."""


def cpu_isa() -> str:
    """What names the results of this machine: the instruction set that its kernels use."""
    kernels = extension.kernels
    return kernels.cpu_isa().replace("_", "-") if kernels else "reference"


def cpu() -> Device:
    """This machine's processors."""
    load = OtherLoad()
    return Device(
        name="cpu",
        title="Kernels on the CPU",
        stem=f"cpu-{cpu_isa()}",
        stopwatch=wall_time,
        conditions=lambda: report.conditions(load.share()),
        others=("Flex",),
        notes=CPU_NOTES,
    )


def cuda() -> Device:
    """The GPU that torch uses, if there is one.

    Raises:
        SystemExit: if there is none.
    """
    if not torch.cuda.is_available():
        raise SystemExit(
            f"DEVICE=cuda needs a GPU, and torch {torch.__version__} finds none: "
            "torch.cuda.is_available() is False."
        )
    from torch.nn.attention import SDPBackend

    name = torch.cuda.get_device_name()
    return Device(
        name="cuda",
        title=f"Kernels on {name}",
        stem=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        stopwatch=CudaEvents(),
        conditions=cuda_conditions,
        others=("Flex", "flash-attn"),
        notes=CUDA_NOTES,
        sdpa_backends=(SDPBackend.FLASH_ATTENTION,),
        matrix=8192,
        megabytes=2048,
    )


def cuda_conditions() -> str:
    """The GPU and the versions that timings depend on."""
    found = torch.cuda.get_device_properties()
    arch = f"capability {found.major}.{found.minor}, {found.multi_processor_count} multiprocessors"
    versions = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda or torch.version.hip}"]
    for package in ("triton", "flash-attn"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    own = f"sparse_attn {sparse_attn.__version__}"
    return f"{found.name} ({arch}), {', '.join([*versions, own])}."


def flash_attention() -> Callable | None:
    """flash-attn's function of q, k, v as ``[batch, seqlen, heads, head_dim]``, of version 3 if it
    is installed, else of 2; None without both.
    """
    for module in ("flash_attn_interface", "flash_attn"):
        try:
            return importlib.import_module(module).flash_attn_func
        except ImportError:
            continue
    return None
