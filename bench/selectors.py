"""The tables of docs/selectors.md: how fast selectors are on a real prompt, and what they lose.

``python -m bench.selectors`` measures everything, ``python -m bench.selectors --only WORD ...`` the
rows whose names hold all the words. Each row is kept in ``bench/results/selectors.json``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import torch
from torch.nn import functional as F

from sparse_attn import quality, sparse_attention
from sparse_attn.selectors import (
    AnchorAttention,
    BlockTopK,
    Dense,
    FlexPrefill,
    HiP,
    InfiniteHiP,
    KeyBuffer,
    PrefillDecode,
    Quest,
    SinkWindow,
    SpargeAttn,
    VerticalSlash,
    XAttention,
)

from .lib import smollm2
from .lib.sections import Page, Section

KEPT = Path(__file__).parent / "results" / "selectors.json"
PAGE = Path(__file__).parents[1] / "docs" / "selectors.md"
ROUNDS, STEPS = 3, 17

SUBJECTS = {
    "Dense()": Dense(),
    "SinkWindow(64, 1024)": SinkWindow(sink=64, window=1024),
    "BlockTopK(64, 16)": BlockTopK(top_k=64, block_size=16),
    "HiP(k=512)": HiP(k=512),
    "InfiniteHiP()": InfiniteHiP(),
    "VerticalSlash(500, 700)": VerticalSlash(vertical=500, slash=700),
    "VerticalSlash(1000, 1000)": VerticalSlash(vertical=1000, slash=1000),
    "XAttention()": XAttention(),
    "XAttention(stride=16)": XAttention(stride=16),
    "XAttention(mass=0.95)": XAttention(mass=0.95),
    "FlexPrefill()": FlexPrefill(),
    "FlexPrefill(mass=0.95)": FlexPrefill(mass=0.95),
    "SpargeAttn()": SpargeAttn(),
    "SpargeAttn(top=0.25)": SpargeAttn(top=0.25),
    "AnchorAttention(theta=6)": AnchorAttention(theta=6.0),
    "AnchorAttention()": AnchorAttention(),
}


@torch.inference_mode()
def speed(selector) -> tuple[float, float]:
    """How many times faster attention with the selector is than torch's SDPA, choosing included, on
    three layers, and the share of choosing; medians of interleaved rounds.
    """
    ratios, shares = [], []
    for q, k, v in smollm2.queries_keys_values().values():
        for _ in range(ROUNDS + 1):  # the first warms up
            begin = perf_counter()
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            middle = perf_counter()
            layout = selector(q, k)
            chosen = perf_counter()
            sparse_attention(q, k, v, layout)
            end = perf_counter()
            ratios.append((middle - begin) / (end - middle))
            shares.append((chosen - middle) / (end - middle))
        del ratios[-ROUNDS - 1], shares[-ROUNDS - 1]
    return median(ratios), median(shares)


def losses(selector) -> list[float]:
    """Density and recall over all rows, the recall that 5 % of the rows lie below, the gap to the
    best blocks, and the error of the output: means over the heads of three layers.
    """
    found = [quality.measure(*qkv, selector) for qkv in smollm2.queries_keys_values().values()]
    names = ("density", "recall", "recall_p5", "oracle_gap", "error")
    return [mean(getattr(x, name).mean().item() for x in found) for name in names]


def row(selector) -> list[str]:
    """All cells of a selector."""
    ratio, share = speed(selector)
    density, *others = losses(selector)
    cells = [f"{ratio:.1f}x", f"{share:.0%}", f"{density:.1%}", *(f"{x:.3f}" for x in others)]
    return cells + smollm2.retrieval(selector)


def decode_speed(make, keys: int) -> list[str]:
    """Milliseconds of a decoding step with torch's SDPA and with a selector, 32 query heads of 128
    on 8 KV heads, over steps that each add a key, and the ratio of the two. SDPA's keys and values
    are there already; the selector's are appended in its time.
    """
    q, k, v = (
        torch.randn(1, heads, keys + STEPS, 128, dtype=torch.bfloat16) for heads in (32, 8, 8)
    )
    selector, times = make(), {"sdpa": [], "ours": []}
    grown = [KeyBuffer(x[:, :, : keys - 1], capacity=x.shape[2]) for x in (k, v)]
    for n in range(keys, keys + STEPS):
        step = q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n]
        begin = perf_counter()
        F.scaled_dot_product_attention(*step, enable_gqa=True)
        middle = perf_counter()
        for buffer, x in zip(grown, (k, v), strict=True):
            buffer.append(x[:, :, n - 1 : n])
        sparse_attention(step[0], grown[0].keys, grown[1].keys, selector)
        times["sdpa"].append(middle - begin)
        times["ours"].append(perf_counter() - middle)
    sdpa, ours = (1e3 * mean(x[1:]) for x in times.values())  # the first step looks at all keys
    return [f"{sdpa:.1f}", f"{ours:.2f}", f"{sdpa / ours:.1f}x"]


def decode_row(make) -> list[str]:
    """Recall, the 5 % below, and error of the last rows, density, and passkeys found if a prompt is
    dense and its answer written with the selector.
    """
    rows = range(smollm2.TOKENS - 256, smollm2.TOKENS)
    kept = smollm2.queries_keys_values().values()
    found = [quality.measure(*qkv, make(), rows=rows) for qkv in kept]
    names = ("density", "recall", "recall_p5", "oracle_gap", "error")
    density, *others = (mean(getattr(x, name).mean().item() for x in found) for name in names)
    passkeys = smollm2.retrieval(PrefillDecode(Dense(), make()))[-1]
    return [f"{density:.1%}", *(f"{x:.3f}" for x in others), passkeys]


HEADER = (
    "selector",
    "vs SDPA",
    "choosing",
    "density",
    "recall",
    "5 % below",
    "to the best",
    "error",
    "perplexity",
    "loss on second copy",
    "passkeys found (depth)",
)

DECODERS = {
    "Quest(budget=256)": functools.partial(Quest, budget=256),
    "Quest(budget=512)": functools.partial(Quest, budget=512),
    "Quest(budget=1024)": functools.partial(Quest, budget=1024),
    "Quest(budget=1024, shared=True)": functools.partial(Quest, budget=1024, shared=True),
}
DECODE_HEADER = (
    "selector",
    "density",
    "recall",
    "5 % below",
    "to the best",
    "error",
    "passkeys found (depth)",
)


def sections() -> dict[str, Section]:
    """The tables of the page."""
    speeds = {
        f"{name}, {keys} keys": functools.partial(decode_speed, make, keys)
        for keys in (32768, 131072)
        for name, make in list(DECODERS.items())[2:]
    }
    return {
        "prompts": Section(
            HEADER, {name: functools.partial(row, selector) for name, selector in SUBJECTS.items()}
        ),
        "decoding": Section(
            DECODE_HEADER, {name: functools.partial(decode_row, x) for name, x in DECODERS.items()}
        ),
        "steps": Section(("case", "SDPA ms", "ms", "vs SDPA"), speeds),
    }


if __name__ == "__main__":
    Page(PAGE, KEPT, sections()).run(__doc__)
