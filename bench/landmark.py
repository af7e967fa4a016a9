"""The table of docs/landmark.md: landmark attention beside dense attention and torch's SDPA.

``python -m bench.landmark`` measures everything, ``python -m bench.landmark --only WORD ...`` the
rows whose names hold all the words. Each row is kept in ``bench/results/landmark.json``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_attn import landmark_attention, selectors, sparse_attention

from .lib.sections import Page, Row, Section
from .lib.timing import paired_ratio, paired_times

KEPT = Path(__file__).parent / "results" / "landmark.json"
PAGE = Path(__file__).parents[1] / "docs" / "landmark.md"
HEADS, HEAD_DIM, SECONDS = 8, 64, 6.0


def row(seqlen: int, block_size: int, gradients: bool) -> list[str]:
    """Milliseconds of SDPA, and how many times faster dense and landmark attention are."""
    q, k, v = torch.randn(3, 1, HEADS, seqlen, HEAD_DIM, dtype=torch.bfloat16).unbind(0)
    inputs = [x.requires_grad_(gradients) for x in (q, k, v)]
    dout = torch.randn_like(q)

    def call(attend: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> None:
            out = attend(*inputs)
            if gradients:
                torch.autograd.grad(out, inputs, dout)

        return run

    times = paired_times(
        {
            "sdpa": call(functools.partial(F.scaled_dot_product_attention, is_causal=True)),
            "dense": call(lambda q, k, v: sparse_attention(q, k, v, selectors.Dense())),
            "landmark": call(functools.partial(landmark_attention, block_size=block_size)),
        },
        SECONDS,
        min_rounds=3,
    )
    ratios = [paired_ratio(times["sdpa"], times[x]) for x in ("dense", "landmark")]
    return [f"{1e3 * median(times['sdpa']):.1f}", *(f"{x:.2f}x" for x in ratios)]


def rows() -> dict[str, Row]:
    """The rows of the table, by name."""
    return {
        f"{seqlen} tokens, blocks of {size}{', with gradients' * gradients}": functools.partial(
            row, seqlen, size, gradients
        )
        for gradients in (False, True)
        for seqlen in (2048, 8192)
        for size in (51, 64)
    }


HEADER = ("case", "SDPA ms", "`Dense()`", "landmark attention")

if __name__ == "__main__":
    Page(PAGE, KEPT, {"landmark": Section(HEADER, rows())}).run(__doc__)
