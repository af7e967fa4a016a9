"""How much of the demo fits into the time there is, and what is left of that time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

from tqdm import tqdm


@dataclass(frozen=True)
class Size:
    """How long the texts are, and how many timed rounds there are."""

    tokens: int
    rounds: int


SIZES = (
    *(Size(tokens, rounds) for tokens in (8192, 4096, 2048) for rounds in (3, 2)),
    Size(2048, 1),
)


@dataclass(frozen=True)
class Cost:
    """Seconds of one subject on a text of `tokens` tokens: of attention, which grows with the
    square of the text, and of the rest, which grows with its length.
    """

    tokens: int
    attention: float
    rest: float

    def at(self, tokens: int) -> float:
        """Seconds on a text of another length."""
        ratio = tokens / self.tokens
        return self.rest * ratio + self.attention * ratio**2


def largest(
    costs: Iterable[Cost], untimed: int, seconds: float, sizes: Sequence[Size] = SIZES
) -> tuple[Size, float]:
    """The first of `sizes` that ends within `seconds`, else the last one; and the seconds that it
    is expected to take: each of `costs` once in every round, and in `untimed` rounds more.
    """
    costs = list(costs)
    for size in sizes:
        expected = (untimed + size.rounds) * sum(cost.at(size.tokens) for cost in costs)
        if expected <= seconds:
            break
    return size, expected


class Countdown:
    """A line that says what is done, for how long, and how much time is left at most.

    It moves by itself, so that a long step is no silent one. ``with Countdown(600) as clock`` is
    given the seconds that all may take; `expect` corrects how many are left.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.start = limit, perf_counter()
        self._end = self.start + limit
        self._stop = threading.Event()
        every = 1.0 if sys.stderr.isatty() else 10.0
        self._line = tqdm(bar_format="{desc}", miniters=0, mininterval=0)
        self._thread = threading.Thread(target=self._tick, args=(every,), daemon=True)
        self._what = "starting"

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds until the limit; negative after it."""
        return self.limit - self.elapsed

    def expect(self, seconds: float) -> None:
        """From now on `seconds` are left."""
        self._end = perf_counter() + seconds

    def doing(self, what: str) -> None:
        """Say what is done now."""
        self._what = what
        self._show()

    def write(self, text: str) -> None:
        """Print a line above."""
        self._line.write(text)

    def _show(self) -> None:
        left = max(0.0, self._end - perf_counter())
        passed = tqdm.format_interval(self.elapsed)
        self._line.set_description_str(
            f"{passed} passed, {tqdm.format_interval(left)} left: {self._what}"
        )

    def _tick(self, every: float) -> None:
        while not self._stop.wait(every):
            self._show()

    def __enter__(self) -> Countdown:
        self._show()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._line.close()
