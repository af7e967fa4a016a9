"""Tile sizes, warps and pipeline stages: the one table for launchers and compile checks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """`block_m` rows by `block_n` keys, and how the compiler maps them to the hardware."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Target:
    """What decides on a configuration: the compute capability, how many programs keep the device
    busy, and the threads of a warp. The interpreter is a small device of capability (0, 0).
    """

    capability: tuple[int, int]
    num_cores: int
    warp_size: int = 32

    @property
    def has_large_memory(self) -> bool:
        """Whether a program has 227 KiB of shared memory, not 99 or 163."""
        return self.capability[0] in (9, 10)

    @staticmethod
    def of(x: Tensor) -> Target:
        if x.device.type != "cuda":
            return INTERPRETER
        properties = torch.cuda.get_device_properties(x.device)
        capability = (properties.major, properties.minor)
        return Target(capability, properties.multi_processor_count, properties.warp_size)


INTERPRETER = Target((0, 0), 8)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


def padded(head_dim: int) -> int:
    """The power of two that a head dimension is padded to inside the kernels."""
    return max(16, next_power_of_2(head_dim))


def _in_wide_warps(choose: Callable[..., Config]) -> Callable[..., Config]:
    """On warps of 64 threads (AMD) at most 4 of them, which then have all 512 registers, and one
    stage: there tiles are fetched ahead into registers.
    """

    @functools.wraps(choose)
    def chosen(*args) -> Config:
        config = choose(*args)
        if args[-1].warp_size < 64:
            return config
        return replace(config, num_warps=min(config.num_warps, 4), num_stages=1)

    return chosen


@_in_wide_warps
def forward(dtype: torch.dtype, head_dim: int, irregular: bool, target: Target) -> Config:
    """The forward kernel's configuration.

    Args:
        head_dim: the larger of both padded head dimensions.
        irregular: whether keys are gathered one by one: from columns, or from blocks of other sizes
            than multiples of 64.
    """
    if target == INTERPRETER:
        return Config(64, 64, 4, 1)
    if dtype == torch.float32 and irregular:
        return Config(16, 16, 4, 1)
    if dtype == torch.float32:
        if head_dim <= 64:
            return Config(32, 32, 4, 2)
        return Config(32 if head_dim <= 128 else 16, 16, 4, 2)
    if head_dim <= 64:
        num_warps = 8 if target.capability[0] == 10 and not irregular else 4
        return Config(128, 32 if irregular else 64, num_warps, 3)
    if head_dim <= 128:
        stages = 3 if target.has_large_memory else 2
        return Config(128, 32 if irregular else 64, 8, stages)
    return Config(64, 32, 8, 2)


@_in_wide_warps
def backward_rows(dtype: torch.dtype, head_dim: int, irregular: bool, target: Target) -> Config:
    """The configuration of the kernel that computes dq."""
    if target == INTERPRETER:
        return Config(64, 64, 4, 1)
    if dtype == torch.float32 and irregular:
        return Config(16, 16, 4, 1)
    if dtype == torch.float32:
        if head_dim <= 64:
            return Config(32, 32, 4, 2)
        return Config(16, 16, 8, 1) if irregular and head_dim > 128 else Config(16, 16, 4, 2)
    if head_dim <= 128:
        few = head_dim <= 64 and target.capability[0] != 10
        return Config(64, 32 if irregular else 64, 4 if few else 8, 2)
    return Config(32, 32, 8, 2)


@_in_wide_warps
def backward_keys(
    dtype: torch.dtype, head_dim: int, short_of_registers: bool, target: Target
) -> Config:
    """The configuration of the kernel that computes dk and dv; block_n is at most 64, the bits of
    an entry of the transposed lists. A softcap and irregular lists take registers of their own.
    """
    if target == INTERPRETER:
        return Config(64, 64, 4, 1)
    if dtype == torch.float32:
        return Config(32, 32, 8, 2) if head_dim <= 64 else Config(16, 16, 4, 2)
    if head_dim <= 64:
        return Config(32 if short_of_registers else 64, 64, 4, 2)
    if head_dim <= 128:
        return Config(32 if short_of_registers or target.capability == (9, 0) else 64, 64, 8, 2)
    return Config(32, 32, 8, 2)


ROWS_MERGED = 16
ROWS_PREPROCESSED = 32


def num_splits(programs: int, key_tiles: int, target: Target) -> int:
    """Into how many parts to split the keys of each row so that a few rows keep the device busy,
    with at least two tiles of keys in a part.
    """
    if programs >= target.num_cores:
        return 1
    return max(1, min(-(-2 * target.num_cores // max(programs, 1)), key_tiles // 2, 64))


def _for_warps(config: Config, target: Target) -> Config:
    """At most 4 warps of 64 threads (AMD), and one stage."""
    if target.warp_size < 64:
        return config
    return replace(config, num_warps=min(config.num_warps, 4), num_stages=1)


def hip(dtype: torch.dtype, head_dim: int, num_rows: int, target: Target) -> Config:
    """The configuration of HiP's search for `num_rows` sampled rows of a query block."""
    block_m = min(max(16, next_power_of_2(num_rows)), 64)
    if target == INTERPRETER:
        config = Config(block_m, 128, 4, 1)
    elif dtype == torch.float32:
        config = Config(16, 16 if target.has_large_memory else 32, 4, 1)
    elif head_dim <= 128:
        config = Config(block_m, 128, 4, 3)
    else:
        config = Config(block_m, 64, 8 if target.capability[0] == 10 else 4, 2)
    return _for_warps(config, target)


def infinite_hip(dtype: torch.dtype, head_dim: int, num_rows: int, target: Target) -> Config:
    """The configuration of InfiniteHiP's searches for `num_rows` queries of a query block."""
    block_m = min(max(16, next_power_of_2(num_rows)), 64)
    if target == INTERPRETER:
        config = Config(block_m, 64, 4, 1)
    elif dtype == torch.float32:
        config = Config(16, 32, 8, 1)
    elif target.has_large_memory:
        config = Config(block_m, 64, 4, 1)
    else:
        config = Config(block_m, 64 if head_dim <= 128 else 32, 4 if head_dim <= 64 else 8, 1)
    return _for_warps(config, target)


def chunk(dtype: torch.dtype, head_dim: int) -> int:
    """Dimensions multiplied at a time where float32 leaves no registers for all."""
    return min(padded(head_dim), 32 if dtype == torch.float32 else 256)
