"""Attention against torch's dense SDPA, FlexAttention and flash-attn, case by case.

Run it with `make bench`, on a GPU with `make bench DEVICE=cuda`, or with `python -m bench.kernels
--quick` for a smoke test. Times are medians of interleaved rounds in one run. A case whose result
is wrong ends the program instead of being reported.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from sparse_attn import BlockLayout, explain, sparse_attention

from .lib import cases, devices, report
from .lib.cases import Case
from .lib.devices import Device
from .lib.oracle import assert_accurate, dense_attention, rounding_noise
from .lib.timing import paired_ratio, paired_times

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
SECONDS = 1.5  # for the rounds of one case, if the fewest rounds take no longer
CHECKED_ELEMENTS = 2**27  # of scores, when gradients are checked


class WrongResult(Exception):
    """The output of a case is not accurate."""


@dataclass(frozen=True)
class Result:
    """One row of the report: medians in milliseconds, and medians of paired ratios to ours, by
    library; what ours and torch do in a second (operations, or bytes read for decoding).
    """

    case: Case
    density: float
    ms: dict[str, float]
    ratios: dict[str, float]
    error: float
    rate: float
    peak: float


# --- what is called


class Problem:
    """The tensors of a case, and the calls to compare: ours, SDPA's, and those of others."""

    def __init__(self, case: Case, device: Device | None = None) -> None:
        self.case, self.device = case, device or devices.cpu()
        self.q, self.k, self.v = case.qkv(self.device.name)
        self.layout = case.pattern.layout(case).to(self.device.name)
        self.density = self.layout.density()
        self.leaves = [x.requires_grad_(case.part == "backward") for x in (self.q, self.k, self.v)]
        self.dout = torch.randn_like(self.q) if case.part == "backward" else None

    def calls(self, with_flex: bool) -> dict[str, Callable[[], object]]:
        """What is timed, by library; those that cannot run the case are left out."""
        found = {"ours": self.ours(), "SDPA": self.sdpa()}
        if with_flex and self.case.flex and (call := self.flex()):
            found["Flex"] = call
        if "flash-attn" in self.device.others and (call := self.flash()):
            found["flash-attn"] = call
        return found

    def ours(self) -> Callable[[], object]:
        return self._part(lambda: sparse_attention(self.q, self.k, self.v, self.layout))

    def sdpa(self) -> Callable[[], object]:
        options = {"is_causal": self.case.seqlen_q > 1, "enable_gqa": self.grouped}
        allowed = self.device.sdpa_backends if self.case.dtype != "fp32" else ()

        def attend() -> Tensor:
            with sdpa_kernel(list(allowed)) if allowed else nullcontext():
                return F.scaled_dot_product_attention(self.q, self.k, self.v, **options)

        return self._part(attend)

    def flex(self) -> Callable[[], object] | None:
        """FlexAttention; None, with a word about it, if torch does not compile it for the case."""
        mask = self.layout.to_block_mask(num_heads=self.case.num_heads)
        attend, options = compiled_flex(), {"block_mask": mask, "enable_gqa": self.grouped}
        if self.device.name != "cpu" and min(mask.BLOCK_SIZE) < 128:  # its tiles must fit
            rows, keys = (min(x, 64) for x in mask.BLOCK_SIZE)
            tiles = {"BLOCK_M": rows, "BLOCK_N": keys, "BLOCK_M1": rows, "BLOCK_N1": keys}
            options["kernel_options"] = tiles | {"BLOCK_M2": rows, "BLOCK_N2": keys}
        try:
            call = self._part(lambda: attend(self.q, self.k, self.v, **options))
            call()
        except RuntimeError as error:
            print(f"{self.case.name}: no FlexAttention: {error}", file=sys.stderr)
            return None
        return call

    def flash(self) -> Callable[[], object] | None:
        """flash-attn, dense; None if it is not installed or does not take the dtype."""
        attend = devices.flash_attention()
        if attend is None or self.case.dtype == "fp32":
            return None

        def call() -> Tensor:
            out = attend(*(x.transpose(1, 2) for x in self.leaves), causal=True)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return self._part(call)

    @property
    def grouped(self) -> bool:
        return self.case.num_heads != self.case.kv_heads

    def _part(self, attend: Callable[[], Tensor]) -> Callable[[], object]:
        """`attend` itself, or its backward pass alone."""
        if self.case.part == "forward":
            return attend
        out = attend()
        return lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)


def compiled_flex() -> Callable:
    """FlexAttention as one compiled kernel; the first call takes some seconds. Kernels of earlier
    cases are forgotten: after too many torch would no longer compile.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
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
    layout = problem.layout.expand_heads(case.num_heads)[:, heads]
    q, k, v = (x.detach()[:, -n:] for x, n in zip(problem.leaves, (group, 1, 1), strict=True))
    dout = problem.dout[:, heads]

    def dense(dtype: torch.dtype, rows: slice, mask: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (q[:, :, rows], k, v)]
        out, _ = dense_attention(*leaves, mask)
        return torch.autograd.grad(out, leaves, dout[:, :, rows].to(dtype))

    parts = []
    step = max(1, CHECKED_ELEMENTS // (group * case.seqlen_kv))
    for start in range(0, case.seqlen_q, step):
        rows = slice(start, min(start + step, case.seqlen_q))
        mask = layout.visible(rows.start, rows.stop, num_heads=group)
        some = (q[:, :, rows], k, v, mask, dout[:, :, rows])
        noise = rounding_noise(*some, some[-1].new_zeros(some[-1].shape[:3]))
        parts.append(
            [*(dense(x, rows, mask) for x in (torch.float64, q.dtype)), list(noise.values())]
        )

    dq, dk, dv = problem.ours()()
    ours = (dq[:, heads], dk[:, -1:], dv[:, -1:])
    summed = [_join(x) for x in zip(*parts, strict=True)]
    return {
        name: (x, *more) for name, x, *more in zip(("dq", "dk", "dv"), ours, *summed, strict=True)
    }


def _join(parts: tuple[tuple[Tensor, ...], ...]) -> tuple[Tensor, ...]:
    """(dq, dk, dv) of all rows from those of some rows each."""
    dq, dk, dv = zip(*parts, strict=True)
    return torch.cat(dq, 2), sum(x.double() for x in dk), sum(x.double() for x in dv)


def sampled_rows(seqlen: int) -> Tensor:
    """The first and last rows, those around the end of a block, and some in the middle."""
    wanted = [0, 1, 15, 16, 63, 64, seqlen // 3, seqlen // 2, seqlen - 65, seqlen - 2, seqlen - 1]
    return torch.tensor(sorted({row for row in wanted if 0 <= row < seqlen}))


# --- how fast it is


def measure(
    case: Case, with_flex: bool = True, seconds: float = SECONDS, device: Device | None = None
) -> Result:
    """Check a case, then time it.

    Raises:
        WrongResult: if the result is not accurate.
    """
    problem = Problem(case, device)
    error = check(problem)
    times = paired_times(problem.calls(with_flex), seconds, stopwatch=problem.device.stopwatch)
    amount, peak = work(problem)
    return Result(
        case=case,
        density=problem.density,
        ms={name: 1e3 * median(found) for name, found in times.items()},
        ratios={name: paired_ratio(found, times["ours"]) for name, found in times.items()},
        error=error,
        rate=amount / median(times["ours"]),
        peak=peak,
    )


def work(problem: Problem) -> tuple[float, float]:
    """The arithmetic operations of the case, or for decoding the bytes of the keys and values that
    are seen; and how many torch does in a second.
    """
    case, dtype, device = problem.case, problem.q.dtype, problem.device
    if case.kind == "decode":
        seen = problem.density * case.kv_heads * case.seqlen_kv  # all heads of a group see the same
        return seen * 2 * case.head_dim * dtype.itemsize, device.read_rate()
    pairs = problem.density * case.num_heads * case.seqlen_q * (case.seqlen_q + 1) / 2
    products = 2 if case.part == "forward" else 5
    return products * 2 * case.head_dim * pairs, device.matmul_rate(dtype)


# --- what is written

NOTES = """\
Batch 1, causal, standard normal q, k, v; heads are query/KV heads. {} Times are medians of
interleaved rounds in one run, and "vs" is the median of their time over ours in the same round:
above 1 we are faster. Density is the share of causal (query, key) pairs that are seen; "vs SDPA *
density" is 1 where time falls as fast as the work, from SDPA's dense time. The error is the
greatest against float64 on sampled rows (backward: of the gradients of one head). "Of peak" is the
rate of arithmetic over that of a large `torch.mm` in the same dtype (or float32, if faster) at the
same time, which itself need not reach the machine's peak; for decode the rate of reading keys and
values over that of summing a large array."""


def header(others: tuple[str, ...]) -> tuple[str, ...]:
    """The columns of the table."""
    before = ("case", "dtype", "S", "head_dim", "heads", "layout", "density", "SDPA ms", "ours ms")
    ratios = ("vs SDPA", "vs SDPA * density", *(f"vs {name}" for name in others))
    return (*before, *ratios, "max error", "of peak")


def cells(result: Result, others: tuple[str, ...]) -> list[str]:
    """One row of the table, in the order of `header`."""
    case, ratios = result.case, result.ratios
    return [
        case.kind,
        case.dtype,
        str(case.seqlen_kv),
        str(case.head_dim),
        f"{case.num_heads}/{case.kv_heads}",
        str(case.pattern),
        f"{result.density:.3f}",
        f"{result.ms['SDPA']:.4g}",
        f"{result.ms['ours']:.4g}",
        f"{ratios['SDPA']:.2f}",
        f"{ratios['SDPA'] * result.density:.2f}",
        *(f"{ratios[name]:.2f}" if name in ratios else "-" for name in others),
        f"{result.error:.1e}",
        f"{100 * result.rate / result.peak:.0f} %",
    ]


def table(results: list[Result], others: tuple[str, ...]) -> str:
    return report.markdown_table([cells(r, others) for r in results], header(others))


def write(results: list[Result], out: Path, conditions: str, device: Device) -> None:
    """The page and the CSV file of a device in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    others = device.others
    notes = textwrap.fill(" ".join(NOTES.format(device.notes).split()), 100)
    page = [f"# {device.title}", table(results, others), notes, f"Machine: {conditions}"]
    (out / f"{device.stem}.md").write_text("\n\n".join(page) + "\n")
    rows = []
    for r in results:
        times = [f"{r.ms[name]:.4g}" if name in r.ms else "" for name in others]
        rows.append([*cells(r, others), *times, f"{r.rate:.4g}", f"{r.peak:.4g}"])
    columns = (*header(others), *(f"{name} ms" for name in others), "rate", "peak")
    report.write_rows(out / f"{device.stem}.csv", columns, rows)


def summary(results: list[Result], conditions: str, device: Device) -> str:
    """The cases of the quick run, for the README."""
    quick = [r for r in results if r.case.tier == "quick"]
    return f"{table(quick, device.others)}\n\n{conditions}"


def run(
    chosen: list[Case], with_flex: bool, seconds: float, device: Device
) -> tuple[list[Result], list[str]]:
    """Measure all cases, with progress on stderr; also the names of those that memory does not
    hold.
    """
    results, too_large = [], []
    begin = perf_counter()
    for number, case in enumerate(chosen, 1):
        done = f"[{number}/{len(chosen)}, {perf_counter() - begin:.0f} s] {case.name}"
        try:
            results.append(measure(case, with_flex, seconds, device))
        except torch.OutOfMemoryError:
            too_large.append(case.name)
            print(f"{done}: out of memory", file=sys.stderr, flush=True)
            continue
        ratio = results[-1].ratios["SDPA"]
        print(f"{done}: {ratio:.2f}x SDPA", file=sys.stderr, flush=True)
    return results, too_large


def backend_of(case: Case, device: Device) -> str:
    """The backend that a case runs on."""
    x = torch.empty(1, 1, 1, case.head_dim, dtype=cases.DTYPES[case.dtype], device=device.name)
    return explain(x, x, x).backend or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few cases, no FlexAttention, no files")
    size.add_argument("--full", action="store_true", help="also cases that take long")
    parser.add_argument("--device", choices=list(cases.TABLES), default="cpu")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases named so")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--isa", help="limit our kernels to this instruction set")
    parser.add_argument("--out", type=Path, help="folder for the results; default bench/results")
    args = parser.parse_args()
    tier = "quick" if args.quick else "full" if args.full else "default"
    chosen = cases.chosen(tier, args.only, args.device)
    if not chosen:
        parser.error(f"no case of the {tier} run is named {' '.join(args.only)}")
    device = {"cpu": devices.cpu, "cuda": devices.cuda}[args.device]()
    if args.isa:
        from sparse_attn import _C

        _C.set_cpu_isa(args.isa)
    torch.exp(torch.ones(2**20))  # the first threaded call of a process may be less accurate

    seconds = SECONDS / 4 if args.quick else SECONDS
    try:
        results, too_large = run(chosen, not (args.quick or args.no_flex), seconds, device)
    except WrongResult as error:
        raise SystemExit(f"wrong result, nothing is reported: {error}") from None
    conditions = f"{device.conditions()} Backend: {backend_of(chosen[0], device)}."
    if too_large:
        conditions += f" Left out, as memory does not hold them: {'; '.join(too_large)}."
    print(f"{table(results, device.others)}\n\n{conditions}")
    whole = not (args.quick or args.only or args.no_flex or args.isa)
    if args.out or whole:
        write(results, args.out or RESULTS, conditions, device)
    if whole and args.out is None and device.name == "cpu":
        try:
            report.replace_section(README, device.stem, summary(results, conditions, device))
        except ValueError as error:
            print(f"not in the README: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
