"""From 8 thousand tokens to a million: time for each kept key, memory, threads, layouts.

Run it with `make bench`, or `python -m bench.scale --longest 131072` for less. One head, bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from sparse_attn import BlockLayout, sparse_attention

from .lib import devices, report
from .lib.cases import B64, Case, Dense, square
from .lib.memory import peak_growth
from .lib.problem import Problem, WrongResult, check, forward_results, worst_error
from .lib.timing import OtherLoad, paired_ratio, paired_times

LENGTHS = [8192, 32768, 131072, 1048576]
RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
HEAD_DIM = 64
WINDOW, SINK, BLOCK, PICKED, COLUMNS = 1024, 64, 64, 64, 4096

THREAD_CASES = [
    square(seqlen, pattern, num_heads=2, kv_heads=2)
    for seqlen in (8192, 32768)
    for pattern in (Dense(), B64[0.25])
]


# --- layouts, none of which needs more memory than it keeps


def window_and_blocks(seqlen: int) -> BlockLayout:
    """A window, and up to 64 random blocks for each query block."""
    blocks = -(-seqlen // BLOCK)
    generator = torch.Generator().manual_seed(0)
    picked = torch.rand(1, 1, blocks, PICKED, generator=generator)
    picked = (picked * torch.arange(1, blocks + 1)[:, None]).int()
    listed = BlockLayout.from_topk(picked, block_size=(BLOCK, BLOCK), seqlens=(seqlen, seqlen))
    return listed | BlockLayout.sink_window((seqlen, seqlen), window=WINDOW)


def sink_and_window(seqlen: int) -> BlockLayout:
    """The keys of StreamingLLM."""
    return BlockLayout.sink_window((seqlen, seqlen), sink=SINK, window=WINDOW + COLUMNS)


def window_and_columns(seqlen: int) -> BlockLayout:
    """A window, and single keys that all rows share."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randperm(seqlen, generator=generator)[:COLUMNS].sort().values.int()
    window = BlockLayout.sink_window((seqlen, seqlen), window=WINDOW)
    return BlockLayout(
        window.seqlens,
        window.sink,
        window.window,
        num_columns=torch.full((1, 1, 1), len(columns), dtype=torch.int32),
        column_indices=columns[None, None, None],
        column_group=window.num_q_blocks,
    )


LAYOUTS = {
    "window 1024 + 64 random blocks": window_and_blocks,
    "sink 64 + window 5120": sink_and_window,
    "window 1024 + 4096 columns": window_and_columns,
}


# --- lengths


@dataclass(frozen=True)
class Length:
    """One layout at one length. Growth is by how many bytes the process grew at most."""

    layout: str
    seqlen: int
    kept_bytes: int
    build_seconds: float
    build_growth: int
    tensor_bytes: int
    forward_growth: int
    forward_seconds: float
    pairs: int
    slowdown: float  # time for each kept pair, over that at the shortest length

    @property
    def memory_ratio(self) -> float:
        """The most that q, k, v and the call took, over the bytes of q, k, v and out."""
        return 3 / 4 + self.forward_growth / self.tensor_bytes


def measure_lengths(name: str, lengths: list[int]) -> list[Length]:
    """Build a layout at each length, check some rows, and time the forward passes in turns."""
    calls, found = {}, []
    for seqlen in lengths:
        begin = perf_counter()
        layout, build_growth = peak_growth(lambda n=seqlen: LAYOUTS[name](n))
        build_seconds = perf_counter() - begin
        qkv = tuple(torch.randn(1, 1, seqlen, HEAD_DIM).bfloat16() for _ in "qkv")
        calls[seqlen] = functools.partial(sparse_attention, *qkv, layout, return_lse=True)
        (out, lse), forward_growth = peak_growth(calls[seqlen])
        worst_error(f"{name}, {seqlen} tokens", forward_results(*qkv, layout, out, lse))
        kept_bytes = sum(x.numel() * x.itemsize for x in layout.tensors().values())
        tensor_bytes = 4 * qkv[0].numel() * qkv[0].itemsize
        memory = (kept_bytes, build_seconds, build_growth, tensor_bytes, forward_growth)
        found.append((*memory, round(layout.density() * seqlen * (seqlen + 1) / 2)))
    times = paired_times(calls, seconds=0, min_rounds=ROUNDS)
    per_pair = [[t / x[-1] for t in times[n]] for n, x in zip(lengths, found, strict=True)]
    return [
        Length(name, n, *x[:-1], median(times[n]), x[-1], paired_ratio(own, per_pair[0]))
        for n, x, own in zip(lengths, found, per_pair, strict=True)
    ]


LENGTH_HEADER = (
    "layout",
    "tokens",
    "kept lists MB",
    "build s",
    "build peak MB",
    "forward s",
    "ns per pair",
    "vs shortest",
    "forward peak MB",
    "peak / (q k v out)",
)


def length_cells(x: Length) -> list[str]:
    """One row of the table of lengths."""
    return [
        x.layout,
        str(x.seqlen),
        f"{x.kept_bytes / 2**20:.1f}",
        f"{x.build_seconds:.2f}",
        f"{x.build_growth / 2**20:.0f}",
        f"{x.forward_seconds:.4g}",
        f"{1e9 * x.forward_seconds / x.pairs:.4f}",
        f"{x.slowdown:.2f}",
        f"{x.forward_growth / 2**20:.0f}",
        f"{x.memory_ratio:.2f}",
    ]


# --- threads

THREAD_HEADER = ("tokens", "layout", "density", "1 thread ms", "2 threads ms", "speed-up")


def thread_cells(case: Case) -> list[str]:
    """One row of the table of threads: the same call on one and on two threads, in turns."""
    problem = Problem(case)
    check(problem)
    call, all_threads = problem.ours(), torch.get_num_threads()

    def on(threads: int) -> None:
        torch.set_num_threads(threads)
        call()

    try:
        times = paired_times({n: functools.partial(on, n) for n in (1, 2)}, seconds=2)
    finally:
        torch.set_num_threads(all_threads)
    return [
        str(case.seqlen_q),
        str(case.pattern),
        f"{problem.density:.2f}",
        *(f"{1e3 * median(times[n]):.4g}" for n in (1, 2)),
        f"{paired_ratio(times[1], times[2]):.2f}",
    ]


# --- what is written

NOTES = """\
Batch 1, one head (threads: two), head_dim 64, bfloat16, causal. Every forward pass was checked
against float64 on sampled rows. Peaks are what the process grew by at most during the call, out
included; "peak / (q k v out)" adds q, k and v and divides by the bytes of these four. The time for
each kept (query, key) pair is that of the whole call, "vs shortest" the median of its paired ratios
to the shortest length."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="tokens")
    parser.add_argument("--out", type=Path, help="folder for the results; default bench/results")
    args = parser.parse_args()
    lengths = [n for n in LENGTHS if n <= args.longest]
    if not lengths:
        parser.error(f"--longest must be at least {LENGTHS[0]}, got {args.longest}")
    torch.exp(torch.ones(2**20))  # the first threaded call of a process may be less accurate

    load, length_rows, thread_rows = OtherLoad(), [], []
    try:
        for name in LAYOUTS:
            print(name, file=sys.stderr, flush=True)
            length_rows += [length_cells(x) for x in measure_lengths(name, lengths)]
        for case in THREAD_CASES:
            print(f"threads: {case.name}", file=sys.stderr, flush=True)
            thread_rows.append(thread_cells(case))
    except WrongResult as error:
        raise SystemExit(f"wrong result, nothing is reported: {error}") from None
    tables = [
        report.markdown_table(length_rows, LENGTH_HEADER),
        report.markdown_table(thread_rows, THREAD_HEADER),
    ]
    conditions = report.conditions(load.share())
    print("\n\n".join([*tables, conditions]))
    if args.out or args.longest >= LENGTHS[-1]:
        out = args.out or RESULTS
        out.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(["# Scale", *tables, NOTES, f"Machine: {conditions}"])
        stem = f"scale-{devices.cpu_isa()}"
        (out / f"{stem}.md").write_text(f"{text}\n")
        report.write_rows(out / f"{stem}.csv", LENGTH_HEADER, length_rows)
        report.write_rows(out / f"{stem}-threads.csv", THREAD_HEADER, thread_rows)


if __name__ == "__main__":
    main()
