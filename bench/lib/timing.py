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
Call = Callable[[], object]
Stopwatch = Callable[[Call], float]


def wall_time(call: Call, clock: Callable[[], float] = perf_counter) -> float:
    """Seconds that pass until a call returns."""
    begin = clock()
    call()
    return clock() - begin


class CudaEvents:
    """Seconds that a GPU works on a call, its last cache filled with other data before.

    The GPU waits a little before it starts, so that the call is queued by then: what Python does to
    launch it is not measured, unless the call waits for the GPU.
    """

    FLUSHED_BYTES, WAIT_CYCLES = 2**28, 2_000_000

    def __init__(self) -> None:
        self.other_data = torch.empty(self.FLUSHED_BYTES, dtype=torch.int8, device="cuda")
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> float:
        self.other_data.zero_()
        torch.cuda._sleep(self.WAIT_CYCLES)
        self.begin.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3


def paired_times(
    calls: dict[str, Call],
    seconds: float,
    clock: Callable[[], float] = perf_counter,
    min_rounds: int = MIN_ROUNDS,
    stopwatch: Stopwatch | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call in each round; entry `i` of every list is of round `i`.

    Every round runs all calls, in an order drawn anew. A first round warms up and is not kept; then
    there are as many as fit in `seconds` of the `clock`, between `min_rounds` and `MAX_ROUNDS`.
    The `stopwatch` times a call; by default the clock does.
    """
    times = {name: [] for name in calls}
    names, shuffle = list(calls), random.Random(0).shuffle
    stopwatch = stopwatch or functools.partial(wall_time, clock=clock)

    def run_round() -> float:
        shuffle(names)
        start = clock()
        for name in names:
            times[name].append(stopwatch(calls[name]))
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


@functools.cache
def _matrices(dtype: torch.dtype, size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, size, size, device=device).to(dtype))


LONGEST_PRODUCT = 1.0  # seconds


def matmul_rate(
    dtype: torch.dtype, size: int = 2048, device: str = "cpu", stopwatch: Stopwatch = wall_time
) -> float:
    """Floating-point operations a second of `torch.mm` on the whole device, now; the best of some
    ``a @ b`` and ``a @ b.T``. Where torch has no fast product of the dtype, of small matrices.
    """
    times, measured = [0.0], 0
    for n in (min(size, 256), size):
        if measured and max(times) * (n / measured) ** 3 > LONGEST_PRODUCT:
            break
        a, b = _matrices(dtype, n, device)
        calls = [functools.partial(torch.mm, a, x) for x in (b, b.mT)]
        times, measured = [stopwatch(call) for call in 4 * calls][2:], n
    return 2 * measured**3 / min(times)


def fastest_dtype(layer: torch.nn.Linear, tokens: int = 512) -> torch.dtype:
    """bfloat16 where the processors multiply the layer's weights by the rows of `tokens` tokens
    faster in it than in float32, else float32: torch has no fast product of bfloat16 on some.
    """
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = layer.weight.detach().to(dtype)
        rows = weight.new_ones(tokens, layer.in_features)
        call = functools.partial(torch.nn.functional.linear, rows, weight)
        times[dtype] = min([wall_time(call) for _ in range(4)][1:])
    return min(times, key=times.__getitem__)


@functools.cache
def _large_array(megabytes: int, device: str) -> torch.Tensor:
    return torch.ones(megabytes * 2**20 // 4, device=device)


def read_rate(megabytes: int = 512, device: str = "cpu", stopwatch: Stopwatch = wall_time) -> float:
    """Bytes a second that a sum over a large array reads on the whole device, now."""
    x = _large_array(megabytes, device)
    return x.numel() * 4 / min(stopwatch(x.sum) for _ in range(3))


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
