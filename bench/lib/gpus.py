"""What datasheets say of GPUs: the one place for peaks and limits."""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Gpu:
    """A GPU's peaks, and what one of its multiprocessors (compute units) holds.

    Args:
        name: what `gpu` is asked for.
        arch: what Triton compiles for: ``sm_80``, ..., or ``gfx942``.
        flops: floating-point operations a second by dtype, dense, float32 accumulation; "fp32" is
            without tensor cores (true float32).
        bandwidth: bytes a second of the memory.
        shared_per_sm, shared_per_block: bytes of shared memory.
        registers_per_sm: 32-bit registers.
        warp_size: threads that share an instruction.
        max_warps: warps that a multiprocessor holds at most.
        max_registers: registers that a thread has at most.
        source: where the figures are from.
    """

    name: str
    arch: str
    flops: dict[str, float]
    bandwidth: float
    shared_per_sm: int
    shared_per_block: int
    source: str
    registers_per_sm: int = 64 * KIB
    warp_size: int = 32
    max_warps: int = 64
    max_registers: int = 255


def _flops(half: float, single: float) -> dict[str, float]:
    return {"bf16": half, "fp16": half, "fp32": single}


GPUS = [
    Gpu(
        "A100",
        "sm_80",
        _flops(312e12, 19.5e12),
        bandwidth=2.039e12,
        shared_per_sm=164 * KIB,
        shared_per_block=163 * KIB,
        source="NVIDIA A100 80GB SXM datasheet; CUDA programming guide, compute capability 8.0",
    ),
    Gpu(
        "H100",
        "sm_90",
        _flops(989.4e12, 66.9e12),
        bandwidth=3.35e12,
        shared_per_sm=228 * KIB,
        shared_per_block=227 * KIB,
        source="NVIDIA H100 SXM5 datasheet and whitepaper; compute capability 9.0",
    ),
    Gpu(
        "B200",
        "sm_100",
        _flops(2250e12, 75e12),
        bandwidth=7.7e12,
        shared_per_sm=228 * KIB,
        shared_per_block=227 * KIB,
        source="NVIDIA HGX B200 datasheet, an eighth of the board, without sparsity; compute "
        "capability 10.0",
    ),
    Gpu(
        "MI300X",
        "gfx942",
        _flops(1307.4e12, 163.4e12),
        bandwidth=5.3e12,
        shared_per_sm=64 * KIB,
        shared_per_block=64 * KIB,
        registers_per_sm=128 * KIB,
        warp_size=64,
        max_warps=32,
        max_registers=512,
        source="AMD Instinct MI300X datasheet; CDNA 3 ISA",
    ),
]


def gpu(name: str) -> Gpu:
    """The GPU of a name ("H100") or architecture ("sm_90").

    Raises:
        ValueError: if there is none.
    """
    for known in GPUS:
        if name in (known.name, known.arch):
            return known
    names = ", ".join(f"{known.name} ({known.arch})" for known in GPUS)
    raise ValueError(f"gpu must be one of {names}, got {name!r}")
