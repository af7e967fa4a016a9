"""Forward attention on this CPU against torch's dense scaled_dot_product_attention.

Prints a markdown table. Times are medians of interleaved pairs taken in one run; a layout whose
result is wrong ends the program instead of being reported.

    python bench/forward.py --seqlen 8192 --head-dim 64 128 --density 1 0.5 0.25 0.1
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
import torch.nn.functional as F

import sparse_attn  # noqa: F401 - defines the ops

BLOCK = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def kept_blocks(num_heads: int, num_blocks: int, density: float) -> torch.Tensor:
    """Bool [num_heads, num_blocks, num_blocks]: about `density` of the causal ones, at random, but
    always the diagonal and block 0.
    """
    generator = torch.Generator().manual_seed(0)
    causal = torch.ones(num_blocks, num_blocks).tril() > 0
    forced = torch.eye(num_blocks) > 0
    forced[:, 0] = True
    rest = (density * causal.sum() - forced.sum()) / (causal & ~forced).sum()
    random = torch.rand(num_heads, num_blocks, num_blocks, generator=generator) < rest
    return (random | forced) & causal


def block_lists(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and compact ascending indices of the kept blocks, with a batch dimension of 1."""
    counts = kept.sum(-1, dtype=torch.int32)
    order = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return counts[None], order[..., : int(counts.max())].to(torch.int32)[None].contiguous()


def sparse_call(q, k, v, lists):
    """The op on `lists` of 64x64 blocks, or on everything causal if None."""
    nothing = torch.zeros(1, dtype=torch.int32)
    window = nothing if lists else nothing - 1
    parts = (nothing, window, *(lists or (None, None)), None, None, None, BLOCK, BLOCK, 1)
    scale = q.shape[-1] ** -0.5
    return lambda: torch.ops.sparse_attn.attention(q, k, v, *parts, scale, 0.0, True)


def error_on_some_rows(out, lse, q, k, v, kept) -> tuple[float, float]:
    """Greatest error of out and lse on a few rows of every head against float64."""
    seqlen = q.shape[2]
    rows = torch.tensor([0, 1, BLOCK, seqlen // 3, seqlen - BLOCK - 1, seqlen - 1])
    s = q[:, :, rows].double() @ k.double().mT * q.shape[-1] ** -0.5
    seen = torch.arange(seqlen) <= rows[:, None]
    if kept is not None:
        seen = seen & kept[:, rows // BLOCK].repeat_interleave(BLOCK, -1)
    s = s.masked_fill(~seen, -math.inf)
    expected = s.softmax(-1) @ v.double()
    out_error = (out[:, :, rows].double() - expected).abs().max()
    return float(out_error), float((lse[:, :, rows].double() - s.logsumexp(-1)).abs().max())


def paired_medians(first, second, repeats: int) -> tuple[float, float, float]:
    """Median milliseconds of both calls, and the median of first / second over the pairs."""
    times = ([], [])
    for i in range(repeats + 1):
        for f, record in ((first, times[0]), (second, times[1]))[:: 1 if i % 2 else -1]:
            begin = time.perf_counter()
            f()
            record.append((time.perf_counter() - begin) * 1e3)
    first_times, second_times = times[0][1:], times[1][1:]
    ratios = [a / b for a, b in zip(first_times, second_times, strict=True)]
    return tuple(map(statistics.median, (first_times, second_times, ratios)))


def measure(seqlen, head_dim, dtype_name, density, args) -> str:
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, args.heads, seqlen, head_dim).to(dtype) for _ in range(3))
    kept, name = None, "window -1"
    if density is not None:
        kept, name = kept_blocks(args.heads, seqlen // BLOCK, density), f"{BLOCK}x{BLOCK} blocks"
    ours = sparse_call(q, k, v, None if kept is None else block_lists(kept))
    out_error, lse_error = error_on_some_rows(*ours(), q, k, v, kept)
    allowed = 2e-5 if dtype == torch.float32 else 3e-2
    if not (out_error <= allowed and lse_error <= 1e-4):
        raise SystemExit(f"wrong result: {name}, {dtype_name}: {out_error=} {lse_error=}")
    sdpa_ms, ours_ms, ratio = paired_medians(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), ours, args.repeats
    )
    causal = seqlen // BLOCK * (seqlen // BLOCK + 1) // 2
    real = 1.0 if kept is None else float(kept.sum()) / (args.heads * causal)
    return (
        f"| {seqlen} | {head_dim} | {dtype_name} | {name} | {real:.3f} | {sdpa_ms:.1f} "
        f"| {ours_ms:.1f} | {ratio:.2f} | {ratio * real:.2f} | {out_error:.1e} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seqlen", type=int, nargs="+", default=[8192])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"])
    parser.add_argument("--density", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--isa", help="limit our kernels to this instruction set")
    args = parser.parse_args()
    if args.isa:
        from sparse_attn import _C

        _C.set_cpu_isa(args.isa)
    torch.exp(torch.randn(1 << 20))  # warm up the thread pool
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.heads} heads\n")
    columns = "S | head_dim | dtype | layout | density | SDPA ms | ours ms | ratio | ratio*density"
    print(f"| {columns} | max error |\n|{' --- |' * 10}")
    for dtype in args.dtype:
        for seqlen in args.seqlen:
            for head_dim in args.head_dim:
                for density in (None, *args.density):
                    print(measure(seqlen, head_dim, dtype, density, args), flush=True)


if __name__ == "__main__":
    main()
