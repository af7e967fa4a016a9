"""Wall-clock times that can be compared: paired, interleaved, medians."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 200


def paired_times(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = perf_counter,
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, list[float]]:
    """Seconds of each call in each round; entry `i` of every list is of round `i`.

    Every round runs all calls, in an order drawn anew. A first round warms up and is not kept; then
    there are as many as fit in `seconds`, between `min_rounds` and `MAX_ROUNDS`.
    """
    times = {name: [] for name in calls}
    names, shuffle = list(calls), random.Random(0).shuffle

    def run_round() -> float:
        shuffle(names)
        start = clock()
        for name in names:
            begin = clock()
            calls[name]()
            times[name].append(clock() - begin)
        return clock() - start

    run_round()
    length = run_round()
    rounds = int(seconds / length) if length > 0 else MAX_ROUNDS
    for _ in range(min(max(rounds, min_rounds), MAX_ROUNDS) - 1):
        run_round()
    return {name: values[1:] for name, values in times.items()}


def paired_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of `numerator / denominator`."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def best_time(call: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        begin = perf_counter()
        call()
        times.append(perf_counter() - begin)
    return min(times)


@functools.cache
def _matrices(dtype: torch.dtype, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, size, size).to(dtype))


def matmul_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations a second of `torch.mm` on all threads, now; the better of ``a @ b``
    and ``a @ b.T``.
    """
    a, b = _matrices(dtype, size)
    return 2 * size**3 / min(best_time(lambda x=x: torch.mm(a, x)) for x in (b, b.mT))


@functools.cache
def _large_array(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes * 2**20 // 4)


def read_rate(megabytes: int = 512) -> float:
    """Bytes a second that a sum over a large array reads on all threads, now."""
    x = _large_array(megabytes)
    return x.numel() * 4 / best_time(x.sum)


class OtherLoad:
    """How much of the processors' time other programs took since this was made (Linux)."""

    def __init__(self) -> None:
        self.start = self._now()

    def share(self) -> float:
        """0 if the machine was ours alone; from 0.05 on timings are in doubt. NaN if not known."""
        busy, own, wall = (now - then for now, then in zip(self._now(), self.start, strict=True))
        return max(0.0, busy - own) / (wall * os.cpu_count()) if wall > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: of all processors at work, of this program and its children, of the clock."""
        own = sum(os.times()[:4])
        try:
            user, nice, system, _, _, irq, softirq, *_ = map(
                int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
            )
        except OSError:
            return float("nan"), own, perf_counter()
        ticks = user + nice + system + irq + softirq
        return ticks / os.sysconf("SC_CLK_TCK"), own, perf_counter()
