"""Tile sizes, warps and pipeline stages: the one table for launchers and compile checks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """`block_m` rows by `block_n` keys, and how the compiler maps them to the hardware."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


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


def max_registers(dtype: torch.dtype, num_warps: int, target: Target) -> int | None:
    """The registers of a thread that float32 kernels of at least 8 warps are compiled for on
    NVIDIA's GPUs: all that there are. Unless told, the assembler spills some outside the loop so
    that more warps would fit; with fewer warps it is better not told.
    """
    if dtype != torch.float32 or num_warps < 8 or target == INTERPRETER or target.warp_size == 64:
        return None
    return min(255, 65536 // (32 * num_warps))


def _candidates(choose: Callable[..., list[Config]]) -> Callable[..., tuple[Config, ...]]:
    """What `choose` lists for a device, pruned for a call of `keys` keys and row blocks of `slots`
    rows (times packed heads).

    Row blocks of at most 16 rows take the lowest tiles, others no tiles of 16 if there are others,
    and at most 64 for at most 64 rows; no tile has more than four times the keys of the call.

    On warps of 64 threads (AMD) there are at most 4 of them, which then have all 512 registers, and
    one stage: there tiles are fetched ahead into registers.
    """

    @functools.wraps(choose)
    def chosen(
        dtype: torch.dtype, *features: Any, target: Target, slots: int, keys: int
    ) -> tuple[Config, ...]:
        found = choose(dtype, *features, target)
        lowest = min(x.block_m for x in found)
        if slots <= 16:
            found = [x for x in found if x.block_m == lowest]
        else:
            found = [x for x in found if 16 < x.block_m <= max(64, slots)] or found
        found = [x for x in found if x.block_n <= 4 * keys] or found[:1]
        if target.warp_size == 64:
            found = [replace(x, num_warps=min(x.num_warps, 4), num_stages=1) for x in found]
        limits = (max_registers(dtype, x.num_warps, target) for x in found)
        found = [replace(x, max_registers=y) for x, y in zip(found, limits, strict=True)]
        return tuple(dict.fromkeys(found))

    return chosen


@_candidates
def forward(
    dtype: torch.dtype, head_dim: int, irregular: bool, wide: bool, has_biases: bool, target: Target
) -> list[Config]:
    """The forward kernel's configurations; the first one is taken where none may be timed.

    Args:
        head_dim: the larger of both padded head dimensions.
        irregular: whether keys are gathered one by one: from columns, or from blocks of other sizes
            than multiples of 64.
        wide: whether all listed blocks are multiples of 128.
        has_biases: whether biases are added to scores, which takes registers.
    """
    if target == INTERPRETER:
        return [Config(64, 64, 4, 1), Config(16, 64, 4, 1)]
    if dtype == torch.float32 and irregular:
        return [Config(16, 16, 8 if head_dim <= 128 else 16, 1)]
    if dtype == torch.float32:
        if head_dim <= 64:
            return [Config(32, 32, 8, 2), Config(16, 32, 4, 2)]
        return [Config(32, 16, 8, 2) if head_dim <= 128 else Config(16, 16, 4, 2)]
    block_n = 32 if irregular else 64
    if head_dim <= 64:
        num_warps = 8 if target.capability[0] == 10 and not irregular else 4
        high = [Config(128, block_n, num_warps, 3), Config(64, block_n, 4, 3)]
        return [*high, Config(16, block_n, 4, 2)]
    if head_dim <= 128:
        stages = 3 if target.has_large_memory else 2
        short = has_biases and target.capability[0] == 10
        low = Config(64, block_n if target.has_large_memory and not short else 32, 4, stages)
        high = [Config(128, block_n, 8, stages), low]
        if has_biases and target.capability[0] == 8:
            high = [low]
        if target.capability == (9, 0):  # as measured on an H100
            if irregular:
                high.reverse()
            else:
                high.insert(1, Config(128, 128, 8, 2) if wide else Config(128, 64, 8, 2))
        return [*high, Config(16, block_n, 4, stages)]
    return [Config(64, 32, 8, 2), Config(16, 32, 4 if irregular else 8, 2)]


@_candidates
def backward_rows(
    dtype: torch.dtype, head_dim: int, irregular: bool, has_softcap: bool, target: Target
) -> list[Config]:
    """The configurations of the kernel that computes dq."""
    if target == INTERPRETER:
        return [Config(64, 64, 4, 1), Config(16, 64, 4, 1)]
    if dtype == torch.float32 and irregular:
        return [Config(16, 32 if head_dim == 128 else 16, 8, 1)]
    if dtype == torch.float32:
        if head_dim <= 64:
            return [Config(32, 32, 4, 2)]
        return [Config(16, 16, 4, 2)]
    if head_dim <= 128:
        on_blackwell = target.capability[0] == 10
        num_warps = 4 if head_dim <= 64 and not on_blackwell else 8
        if irregular:
            return [Config(64, 32, num_warps, 2)]
        found = [Config(64, 64, num_warps, 2), Config(64, 32, 4, 2)]
        if target.capability == (9, 0):  # as measured on an H100
            found = [Config(64, 64, 4, 3), Config(128, 64, 4, 3)]
            if head_dim > 64:
                found = [Config(128, 64, 8, 3), Config(64, 64, 4, 2)]
        return found[1:] if has_softcap and on_blackwell and head_dim > 64 else found
    return [Config(32, 32, 8, 2)]


@_candidates
def backward_keys(
    dtype: torch.dtype, head_dim: int, short_of_registers: bool, target: Target
) -> list[Config]:
    """The configurations of the kernel that computes dk and dv; block_n is at most 64, the bits of
    an entry of the transposed lists. A softcap and irregular lists take registers of their own.
    """
    if target == INTERPRETER:
        return [Config(64, 64, 4, 1), Config(16, 64, 4, 1)]
    if dtype == torch.float32:
        if head_dim <= 64:
            few = short_of_registers and target.capability[0] < 10
            return [Config(16, 32, 4 if few else 8, 2)]
        wide, major = head_dim > 128, target.capability[0]
        spills = (wide and major == 8) or (short_of_registers and not wide and major >= 10)
        return [Config(16, 16, 4, 1 if spills else 2)]
    if head_dim <= 64:
        found = [Config(64, 64, 4, 2), Config(32, 64, 4, 2)]
        return found[1:] if short_of_registers or target.capability[0] == 8 else found
    if head_dim <= 128:
        found = [Config(64, 64, 8, 2), Config(32, 64, 8, 2)]
        if target.capability == (9, 0):  # as measured on an H100
            return [Config(32, 64, 4, 3), Config(32, 64, 4, 2)]
        return (
            found if not short_of_registers and target.warp_size == 32 else [Config(32, 64, 8, 2)]
        )
    return [Config(32, 32, 8, 2)]


MAX_SPLITS, WARPS_MERGING = 64, 8
ROWS_PREPROCESSED = 32
ROWS_SUMMED = 16
HEAVY_KEYS = 128  # of each KV head, which every row may see: those of sinks


def num_splits(programs: int, tiles: int, target: Target) -> int:
    """Into how many parts to split each of a few programs so that they keep the device busy, with
    at least two tiles of their walk in a part.
    """
    if programs >= target.num_cores:
        return 1
    return max(1, min(-(-2 * target.num_cores // max(programs, 1)), tiles // 2, MAX_SPLITS))


def rows_merged(target: Target) -> int:
    """The rows whose splits a program merges."""
    return 16 if target == INTERPRETER else 1


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
        widest = 64 if target.capability[0] == 8 else 128  # of what 4 warps hold without spills
        config = Config(16, 32, 8 if head_dim > widest else 4, 1)
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
        if 64 < head_dim <= 128 and target.capability[0] < 10:  # others spill there
            config = Config(16, 32, 4, 1) if target.has_large_memory else Config(64, 16, 8, 1)
    elif target.has_large_memory:
        config = Config(block_m, 64, 4, 1)
    else:
        config = Config(block_m, 64 if head_dim <= 128 else 32, 4 if head_dim <= 64 else 8, 1)
    return _for_warps(config, target)


def chunk(dtype: torch.dtype, head_dim: int) -> int:
    """Dimensions multiplied at a time where float32 leaves no registers for all."""
    return min(padded(head_dim), 32 if dtype == torch.float32 else 256)


def columns_at_a_time(size: int) -> int:
    """Columns of a result that `exact` finds at a time, of so many in all."""
    return min(size, 32)
