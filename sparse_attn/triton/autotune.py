"""Which of a few configurations a kernel runs in: on a GPU the one that was fastest the first time,
everywhere else the first.

The first call of a kind (`Choice.kind`) on a GPU times the candidates, and the winner stays for the
process: a call gives the same bits however often it is repeated, but another process may sum in
another order. The first candidate is taken, and nothing timed, with SPARSE_ATTN_AUTOTUNE=0 in the
environment, under `torch.use_deterministic_algorithms`, while a CUDA graph is captured (a winner
that is known already is used there), and in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock

import torch

from .configs import Config
from .launch import Launch
from .support import is_interpreting

WARMUP_MS, TIMED_MS = 10, 40

winners: dict[Hashable, Config] = {}
_timing = Lock()  # gradients are computed in a thread of their own


@dataclass(frozen=True)
class Choice:
    """Launches that depend on a configuration.

    Args:
        kind: what decides on the fastest configuration.
        candidates: the configurations.
        build: the launches in a configuration. They overwrite what they write: they may run often.
    """

    kind: Hashable
    candidates: tuple[Config, ...]
    build: Callable[[Config], list[Launch]]

    def __call__(self) -> None:
        for launch in self.build(chosen(self)):
            launch()


def chosen(choice: Choice) -> Config:
    """The configuration to run in."""
    first, *others = choice.candidates
    if not others or not is_enabled():
        return first
    if choice.kind not in winners and not torch.cuda.is_current_stream_capturing():
        with _timing:
            if choice.kind not in winners:
                winners[choice.kind] = min(
                    choice.candidates, key=lambda config: milliseconds(choice.build(config))
                )
    return winners.get(choice.kind, first)


def is_enabled() -> bool:
    """Whether winners are wanted: see above."""
    return (
        torch.cuda.is_available()
        and not is_interpreting()
        and os.environ.get("SPARSE_ATTN_AUTOTUNE", "1") != "0"
        and not torch.are_deterministic_algorithms_enabled()
    )


def milliseconds(launches: list[Launch]) -> float:
    """How long launches take on the GPU, the median of many; inf if it cannot run them."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def run() -> None:
        for launch in launches:
            launch()

    try:
        return do_bench(run, warmup=WARMUP_MS, rep=TIMED_MS, return_mode="median")
    except OutOfResources:
        return float("inf")
