"""The tables of docs/hip.md: how fast HiP is, and what it finds.

``python -m bench.hip`` measures everything, ``python -m bench.hip --only WORD ...`` the rows whose
section and name hold all the words. Each row is kept in ``bench/results/hip.json`` as soon as it is
measured, and the tables are made from there.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.nn import functional as F

from sparse_attn import quality, selectors, sparse_attention
from sparse_attn.selectors import BlockTopK, HiP, InfiniteHiP, KeyBuffer, MaskCache, SinkWindow

from .lib import smollm2, texts
from .lib.measure import Subject, attending, measure
from .lib.sections import Cells, Page, Row, Section
from .lib.timing import paired_ratio, paired_times

KEPT = Path(__file__).parent / "results" / "hip.json"
PAGE = Path(__file__).parents[1] / "docs" / "hip.md"
LONG_DEPTHS, LONG_SCORED = (0.25, 0.5), 4096  # of 32768 tokens

HIP = HiP(k=512)
FEWER_ROWS = HiP(k=512, stride_q=8)
FEWER_KEYS = HiP(k=512, stride_q=8, stride_k=4)
SPEED = (HIP, FEWER_ROWS, FEWER_KEYS, InfiniteHiP())


def normal(heads: int, seqlen: int) -> torch.Tensor:
    return torch.randn(1, heads, seqlen, 128, dtype=torch.bfloat16)


# --- speed


def prefill(seqlen: int, heads: int) -> list[str]:
    """Attention of one layer with torch's SDPA and with selectors: its milliseconds, how many times
    faster it is, and the share of the selection.
    """
    q, k, v = (normal(heads, seqlen) for _ in range(3))
    shares: dict[HiP | InfiniteHiP, list[float]] = {hip: [] for hip in SPEED}

    def ours(hip) -> None:
        begin = perf_counter()
        layout = hip(q, k)
        chosen = perf_counter()
        sparse_attention(q, k, v, layout)
        shares[hip].append((chosen - begin) / (perf_counter() - begin))

    calls = {hip: functools.partial(ours, hip) for hip in SPEED}
    calls["SDPA"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    times = paired_times(calls, 2.0, min_rounds=1 if seqlen > 2**16 else 5)
    cells = [f"{1e3 * median(times['SDPA']):.4g}"]
    for hip in SPEED:
        ratio = paired_ratio(times["SDPA"], times[hip])
        milliseconds, share = 1e3 * median(times[hip]), 100 * median(shares[hip][1:])
        cells.append(f"{milliseconds:.4g} ms, {ratio:.1f}x, {share:.0f} %")
    return cells


def selection(hip: HiP, seqlen: int) -> list[str]:
    """Milliseconds of choosing for one head, microseconds for each of its query blocks, and the
    bytes of what is chosen.
    """
    q, k = normal(1, seqlen), normal(1, seqlen)
    times = paired_times({"select": lambda: hip(q, k)}, 0.5)["select"]
    size = sum(x.numel() * 4 for x in hip(q, k).tensors().values()) / 2**20
    per_block = 1e6 * median(times) * hip.block_q / seqlen
    return [f"{1e3 * median(times):.4g}", f"{per_block:.0f}", f"{size:.2g} MiB"]


def decoding(hip: HiP, seqlen: int, refresh: int) -> list[str]:
    """A decoding step of 32 heads on 8 KV heads, mean over the steps that share a selection."""
    q, k, v = normal(32, 1), normal(8, seqlen), normal(8, seqlen)
    selector = MaskCache(hip, refresh=refresh)
    keys, values = KeyBuffer(k), KeyBuffer(v)

    def ours():
        for buffer in (keys, values):
            buffer.crop(seqlen - refresh)
        for n in range(seqlen - refresh, seqlen):
            keys.append(k[:, :, n : n + 1])
            values.append(v[:, :, n : n + 1])
            sparse_attention(q, keys.keys, values.keys, selector)

    calls = {"SDPA": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), "ours": ours}
    times = paired_times(calls, 2.0)
    ours_times = [x / refresh for x in times["ours"]]
    return [
        f"{1e3 * median(times['SDPA']):.4g}",
        f"{1e3 * median(ours_times):.4g}",
        f"{paired_ratio(times['SDPA'], ours_times):.1f}",
    ]


# --- quality


@torch.inference_mode()
def decode_milliseconds(model, ids: torch.Tensor, cache, selector, steps: int = 32) -> float:
    """Of a step, with selections of HiP that last for 8."""
    if isinstance(selector, HiP):
        selector = MaskCache(replace(selector, margin=7), refresh=8)
    with attending(model, Subject("", selector)):
        begin = perf_counter()
        for step in range(steps):
            model(ids[:, step : step + 1], past_key_values=cache)
        return 1e3 * (perf_counter() - begin) / steps


def model_times(selector) -> list[str]:
    """Seconds of SmolLM2's prefill, and milliseconds of a step that decodes; the best of two."""
    tokenizer, model = smollm2.load("smollm2")
    subject = Subject("", selector)
    ids = texts.reading(tokenizer, smollm2.TOKENS).ids
    prefill, decode = [], []
    for _ in range(2):
        with torch.inference_mode(), attending(model, subject):
            begin = perf_counter()
            cache = model.model(ids, use_cache=True).past_key_values
            prefill.append(perf_counter() - begin)
        decode.append(decode_milliseconds(model, ids, cache, selector))
    return [f"{min(prefill):.1f}", f"{min(decode):.1f}"]


def long_text(selector) -> list[str]:
    """What Gemma 3 does with 32768 tokens: the perplexity of the last ones, passkeys, and times."""
    tokenizer, model = smollm2.load("gemma3")
    subject = Subject("", selector)
    for depth in LONG_DEPTHS:
        prompt = texts.passkey(tokenizer, 32768, depth)
        if not subject.losses:
            prompt = replace(prompt, scored_from=prompt.ids.shape[1] - LONG_SCORED)
        cache = measure(model, subject, prompt, timed=True, densities=False)
    return [
        f"{math.exp(next(iter(subject.losses.values()))):.2f}",
        smollm2.found(subject, LONG_DEPTHS),
        f"{min(subject.prefill):.0f}",
        f"{decode_milliseconds(model, prompt.ids, cache, selector):.0f}",
    ]


def recall(hip: HiP, layer: int, head: int) -> list[str]:
    """Softmax mass that a head's rows see, mean over the second half of them: through sink and
    window, with the blocks that HiP finds, and with as many blocks of the greatest mass.
    """
    q, k, _ = smollm2.queries_keys_values()[layer]
    q, k = q[:, head : head + 1], k[:, head // (q.shape[1] // k.shape[1])][:, None]
    window, found = (
        quality.measure(q, k, k, selector, rows=range(smollm2.TOKENS // 2, smollm2.TOKENS))
        for selector in (SinkWindow(hip.sink, hip.window), hip)
    )
    shown = (window.recall, found.recall, found.recall + found.oracle_gap)
    return [f"{x.item():.3f}" for x in shown]


# --- the tables


def named(hip) -> str:
    """The settings that differ from HiP's own."""
    if isinstance(hip, InfiniteHiP):
        return "InfiniteHiP()"
    default, values = HiP(), vars(hip)
    changed = [f"{x}={values[x]}" for x in values if values[x] != getattr(default, x) or x == "k"]
    return f"HiP({', '.join(changed)})"


def _decoding_rows() -> dict[str, Row]:
    rows = {}
    for seqlen in (8192, 32768, 131072):
        for refresh in (1, 8):
            hip = HiP(k=512, margin=refresh - 1)
            rows[f"{seqlen} refresh {refresh}"] = functools.partial(decoding, hip, seqlen, refresh)
    return rows


SUBJECTS = {
    "Dense()": selectors.Dense(),
    "SinkWindow(64, 1024)": SinkWindow(sink=64, window=1024),
    "BlockTopK(64, 16)": BlockTopK(top_k=64, block_size=16),
    **{named(hip): hip for hip in (HiP(k=256), HIP, HiP(k=1024))},
}


def _quality_rows() -> dict[str, Row]:
    others = {named(hip): hip for hip in (HiP(k=512, stride_q=2), FEWER_ROWS, FEWER_KEYS)}
    rows = {
        name: functools.partial(smollm2.retrieval, s) for name, s in (SUBJECTS | others).items()
    }
    for hip in (HiP(k=256), HIP):
        rows[f"{named(hip)}, 3 layers dense"] = functools.partial(smollm2.retrieval, hip, 3)
    return rows


def sections() -> dict[str, Section]:
    """The tables of the page."""
    sizes = {4096: 2, 8192: 2, 32768: 2, 131072: 1}
    times = {"torch's SDPA": None} | SUBJECTS
    heads = [(layer, head) for layer in smollm2.LAYERS for head in range(9)]
    return {
        "prefill": Section(
            ("tokens", "SDPA ms", *(f"`{named(hip)}`" for hip in SPEED)),
            {str(n): functools.partial(prefill, n, count) for n, count in sizes.items()},
        ),
        "selection": Section(
            ("tokens", "ms", "us a query block", "lists"),
            {str(2**n): functools.partial(selection, HIP, 2**n) for n in range(12, 19)},
            exponents,
        ),
        "decode": Section(("keys", "SDPA ms", "HiP ms", "vs SDPA"), _decoding_rows()),
        "quality": Section(
            ("selector", "perplexity", "loss on second copy", "passkeys found (depth)"),
            _quality_rows(),
        ),
        "times": Section(
            ("selector", "prefill s", "decode ms a token"),
            {name: functools.partial(model_times, s) for name, s in times.items()},
        ),
        "gemma": Section(
            ("selector", "perplexity", "passkeys found (depth)", "prefill s", "decode ms a token"),
            {name: functools.partial(long_text, s) for name, s in SUBJECTS.items()},
        ),
        "recall": Section(
            ("layer and head", "sink and window", "with HiP's blocks", "with the best"),
            {f"layer {n} head {h}": functools.partial(recall, HIP, n, h) for n, h in heads},
        ),
    }


def exponents(kept: Cells) -> str:
    """The slope of log time over log length, in whole and over the longer half."""
    points = sorted((int(name), float(cells[0])) for name, cells in kept.items())
    if len(points) < 2:
        return ""

    def slope(first: int) -> str:
        (start, begin), (stop, end) = points[first], points[-1]
        power = math.log(end / begin) / math.log(stop / start)
        return f"{power:.2f} from {start} to {stop} tokens"

    return f"Measured exponents: {slope(0)}, {slope(len(points) // 2)}."


if __name__ == "__main__":
    Page(PAGE, KEPT, sections()).run(__doc__)
