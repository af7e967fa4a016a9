"""Attention against torch's dense SDPA, FlexAttention and flash-attn, case by case.

Run it with `make bench`, on a GPU with `make bench DEVICE=cuda`, or with `python -m bench.kernels
--quick` for a smoke test. Times are medians of interleaved rounds in one run. A case whose result
is wrong ends the program instead of being reported.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from sparse_attn import explain

from .lib import cases, devices, report
from .lib.cases import Case
from .lib.devices import Device
from .lib.problem import Problem, WrongResult, check
from .lib.timing import paired_ratio, paired_times

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SECONDS = 1.5  # for the rounds of one case, if the fewest rounds take no longer


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
    """The cases of the quick run, for the page."""
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
            report.replace_section(PAGE, device.stem, summary(results, conditions, device))
        except ValueError as error:
            print(f"not in {PAGE.name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
