"""Attention on this CPU against torch's dense SDPA and FlexAttention, case by case.

Run it with `make bench`, or `python -m bench.kernels --quick` for a smoke test. Times are medians
of interleaved rounds in one run. A case whose result is wrong ends the program instead of being
reported.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_attn import BlockLayout, sparse_attention
from tests.oracle import assert_accurate, dense_attention, rounding_noise

from . import cases, report
from .cases import Case
from .timing import OtherLoad, matmul_rate, paired_ratio, paired_times, read_rate

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
SECONDS = 1.5  # for the rounds of one case, if the fewest rounds take no longer


class WrongResult(Exception):
    """The output of a case is not accurate."""


@dataclass(frozen=True)
class Result:
    """One row of the report: medians in milliseconds, medians of paired ratios, and what ours and
    torch do in a second (operations, or bytes read for decoding).
    """

    case: Case
    density: float
    sdpa_ms: float
    ours_ms: float
    ratio: float
    flex_ms: float | None
    flex_ratio: float | None
    error: float
    rate: float
    peak: float


# --- what is called


class Problem:
    """The tensors of a case, and the calls to compare: ours, SDPA's, FlexAttention's."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.q, self.k, self.v = case.qkv()
        self.layout = case.pattern.layout(case)
        self.density = self.layout.density()
        self.leaves = [x.requires_grad_(case.part == "backward") for x in (self.q, self.k, self.v)]
        self.dout = torch.randn_like(self.q) if case.part == "backward" else None

    def ours(self) -> Callable[[], object]:
        return self._part(lambda: sparse_attention(self.q, self.k, self.v, self.layout))

    def sdpa(self) -> Callable[[], object]:
        options = {"is_causal": self.case.seqlen_q > 1, "enable_gqa": self.grouped}
        return self._part(lambda: F.scaled_dot_product_attention(self.q, self.k, self.v, **options))

    def flex(self) -> Callable[[], object]:
        mask = self.layout.to_block_mask(num_heads=self.case.num_heads)
        attend, options = compiled_flex(), {"block_mask": mask, "enable_gqa": self.grouped}
        return lambda: attend(self.q, self.k, self.v, **options)

    @property
    def grouped(self) -> bool:
        return self.case.num_heads != self.case.kv_heads

    def _part(self, attend: Callable[[], Tensor]) -> Callable[[], object]:
        """`attend` itself, or its backward pass alone."""
        if self.case.part == "forward":
            return attend
        out = attend()
        return lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)


@functools.cache
def compiled_flex() -> Callable:
    """FlexAttention as one compiled kernel; the first call of each shape takes some seconds."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# --- whether it is right


def check(problem: Problem) -> float:
    """The greatest error of a case against float64; WrongResult if it is too great."""
    if problem.case.part == "backward":
        return worst_error(problem.case.name, backward_results(problem))
    qkv = (problem.q, problem.k, problem.v)
    out, lse = sparse_attention(*qkv, problem.layout, return_lse=True)
    compared = forward_results(*qkv, problem.layout, out, lse)
    return worst_error(problem.case.name, compared)


def worst_error(case: str, compared: dict[str, tuple[Tensor, Tensor, Tensor]]) -> float:
    """The greatest error of ours in (ours, float64, eager) results.

    Raises:
        WrongResult: if it is more than eager attention in the same dtype justifies.
    """
    worst = 0.0
    for name, (ours, exact, eager, *noise) in compared.items():
        try:
            assert_accurate(ours, exact, eager.to(ours.dtype), name, *noise)
        except AssertionError as error:
            raise WrongResult(f"{case}: {error}") from error
        worst = max(worst, float((ours.double() - exact).abs().max()))
    return worst


def forward_results(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, out: Tensor, lse: Tensor
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Ours, float64 and eager attention for out and lse, on some rows of every head."""
    rows, kv_heads = sampled_rows(q.shape[2]), k.shape[1]
    masks = [layout.visible(r, r + 1, num_heads=q.shape[1]) for r in rows.tolist()]
    exact, eager = [], []
    for queries, keys, values, seen in zip(
        q[:, :, rows].chunk(kv_heads, 1),
        k.split(1, 1),
        v.split(1, 1),
        torch.cat(masks, 2).chunk(kv_heads, 1),
        strict=True,
    ):
        exact.append(dense_attention(*(x.double() for x in (queries, keys, values)), seen))
        eager.append(dense_attention(queries, keys, values, seen))
    ours = (out[:, :, rows], lse[:, :, rows])
    exact, eager = ([torch.cat(x, 1) for x in zip(*pairs, strict=True)] for pairs in (exact, eager))
    return dict(zip(("out", "lse"), zip(ours, exact, eager, strict=True), strict=True))


def backward_results(problem: Problem) -> dict[str, tuple[Tensor, ...]]:
    """dq, dk, dv of ours, of float64 and of eager attention, and what rounding lse can change, for
    the last KV head.
    """
    case = problem.case
    group = case.num_heads // case.kv_heads
    heads = slice(case.num_heads - group, None)
    mask = problem.layout.expand_heads(case.num_heads)[:, heads].to_dense(num_heads=group)

    def dense(dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = (
            x.detach()[:, -n:].to(dtype).requires_grad_()
            for x, n in zip(problem.leaves, (group, 1, 1), strict=True)
        )
        out, _ = dense_attention(q, k, v, mask)
        return torch.autograd.grad(out, (q, k, v), problem.dout[:, heads].to(dtype))

    dq, dk, dv = problem.ours()()
    ours = (dq[:, heads], dk[:, -1:], dv[:, -1:])
    q, k, v = (x[:, -n:] for x, n in zip(problem.leaves, (group, 1, 1), strict=True))
    dout = problem.dout[:, heads]
    noise = rounding_noise(q, k, v, mask, dout, dout.new_zeros(dout.shape[:3]))
    exact, eager = dense(torch.float64), dense(problem.q.dtype)
    return {
        name: (ours[i], exact[i], eager[i], noise[name])
        for i, name in enumerate(("dq", "dk", "dv"))
    }


def sampled_rows(seqlen: int) -> Tensor:
    """The first and last rows, those around the end of a block, and some in the middle."""
    wanted = [0, 1, 15, 16, 63, 64, seqlen // 3, seqlen // 2, seqlen - 65, seqlen - 2, seqlen - 1]
    return torch.tensor(sorted({row for row in wanted if 0 <= row < seqlen}))


# --- how fast it is


def measure(case: Case, with_flex: bool = True, seconds: float = SECONDS) -> Result:
    """Check a case, then time it.

    Raises:
        WrongResult: if the result is not accurate.
    """
    problem = Problem(case)
    error = check(problem)
    with_flex = with_flex and case.flex
    calls = {"ours": problem.ours(), "SDPA": problem.sdpa()}
    if with_flex:
        calls["Flex"] = problem.flex()
    times = paired_times(calls, seconds)
    ours = median(times["ours"])
    amount, peak = work(problem)
    return Result(
        case=case,
        density=problem.density,
        sdpa_ms=1e3 * median(times["SDPA"]),
        ours_ms=1e3 * ours,
        ratio=paired_ratio(times["SDPA"], times["ours"]),
        flex_ms=1e3 * median(times["Flex"]) if with_flex else None,
        flex_ratio=paired_ratio(times["Flex"], times["ours"]) if with_flex else None,
        error=error,
        rate=amount / ours,
        peak=peak,
    )


def work(problem: Problem) -> tuple[float, float]:
    """The arithmetic operations of the case, or for decoding the bytes of the keys and values that
    are seen; and how many torch does in a second.
    """
    case, dtype = problem.case, problem.q.dtype
    if case.kind == "decode":
        seen = problem.density * case.kv_heads * case.seqlen_kv  # all heads of a group see the same
        return seen * 2 * case.head_dim * dtype.itemsize, read_rate()
    pairs = problem.density * case.num_heads * case.seqlen_q * (case.seqlen_q + 1) / 2
    products = 2 if case.part == "forward" else 5
    return products * 2 * case.head_dim * pairs, matmul_rate(dtype)


# --- what is written

HEADER = (
    "case",
    "dtype",
    "S",
    "head_dim",
    "heads",
    "layout",
    "density",
    "SDPA ms",
    "ours ms",
    "vs SDPA",
    "vs SDPA * density",
    "vs Flex",
    "max error",
    "of peak",
)

NOTES = """\
Batch 1, causal, standard normal q, k, v; heads are query/KV heads. SDPA is torch's dense
`scaled_dot_product_attention`, Flex is compiled FlexAttention with the same mask ("-": not asked,
or backward, which it lacks on CPUs). Times are medians of interleaved rounds in one run, and "vs"
is the median of their time over ours in the same round: above 1 we are faster. Density is the share
of causal (query, key) pairs that are seen; "vs SDPA * density" is 1 where time falls as fast as the
work, from SDPA's dense time. The error is the greatest against float64 on sampled rows (backward:
of the gradients of one head). "Of peak" is the rate of arithmetic over that of a large `torch.mm`
in the same dtype at the same time, which itself need not reach the machine's peak; for decode the
rate of reading keys and values over that of summing a large array."""


def cells(result: Result) -> list[str]:
    """One row of the table, in the order of `HEADER`."""
    case = result.case
    return [
        case.kind,
        case.dtype,
        str(case.seqlen_kv),
        str(case.head_dim),
        f"{case.num_heads}/{case.kv_heads}",
        str(case.pattern),
        f"{result.density:.3f}",
        f"{result.sdpa_ms:.4g}",
        f"{result.ours_ms:.4g}",
        f"{result.ratio:.2f}",
        f"{result.ratio * result.density:.2f}",
        "-" if result.flex_ratio is None else f"{result.flex_ratio:.2f}",
        f"{result.error:.1e}",
        f"{100 * result.rate / result.peak:.0f} %",
    ]


def write(results: list[Result], out: Path, conditions: str) -> None:
    """`cpu.md` and `cpu.csv` in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [cells(r) for r in results]
    table = report.markdown_table(rows, HEADER)
    about = f"{NOTES}\n\nMachine: {conditions}"
    (out / "cpu.md").write_text(f"# Kernels on the CPU\n\n{table}\n\n{about}\n")
    more = [
        ["" if r.flex_ms is None else f"{r.flex_ms:.4g}", f"{r.rate:.4g}", f"{r.peak:.4g}"]
        for r in results
    ]
    rows = [row + numbers for row, numbers in zip(rows, more, strict=True)]
    report.write_rows(out / "cpu.csv", (*HEADER, "Flex ms", "rate", "peak"), rows)


def summary(results: list[Result], conditions: str) -> str:
    """The cases of the quick run, for the README."""
    rows = [cells(r) for r in results if r.case.tier == "quick"]
    return f"{report.markdown_table(rows, HEADER)}\n\n{conditions}"


def run(chosen: list[Case], with_flex: bool, seconds: float) -> list[Result]:
    """Measure all cases, with progress on stderr."""
    results = []
    begin = perf_counter()
    for number, case in enumerate(chosen, 1):
        results.append(measure(case, with_flex, seconds))
        done = f"[{number}/{len(chosen)}, {perf_counter() - begin:.0f} s]"
        print(f"{done} {case.name}: {results[-1].ratio:.2f}x SDPA", file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few cases, no FlexAttention, no files")
    size.add_argument("--full", action="store_true", help="also 16384 and 32768 tokens")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases named so")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--isa", help="limit our kernels to this instruction set")
    parser.add_argument("--out", type=Path, help="folder for the results; default bench/results")
    args = parser.parse_args()
    tier = "quick" if args.quick else "full" if args.full else "default"
    chosen = cases.chosen(tier, args.only)
    if not chosen:
        parser.error(f"no case of the {tier} run is named {' '.join(args.only)}")
    if args.isa:
        from sparse_attn import _C

        _C.set_cpu_isa(args.isa)
    torch.exp(torch.ones(2**20))  # the first threaded call of a process may be less accurate

    load = OtherLoad()
    try:
        results = run(
            chosen, not (args.quick or args.no_flex), SECONDS / 4 if args.quick else SECONDS
        )
    except WrongResult as error:
        raise SystemExit(f"wrong result, nothing is reported: {error}") from None
    conditions = report.conditions(load.share())
    print(f"{report.markdown_table([cells(r) for r in results], HEADER)}\n\n{conditions}")
    whole = not (args.quick or args.only or args.no_flex or args.isa)
    if args.out or whole:
        write(results, args.out or RESULTS, conditions)
    if whole and args.out is None:
        report.replace_section(README, "kernels", summary(results, conditions))


if __name__ == "__main__":
    main()
