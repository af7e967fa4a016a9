"""Compiles the Triton kernels for GPUs that are not here, and says what the compiler made of them.

`python -m bench.triton_table` compiles every kernel in every configuration that the launchers may
choose, for each target, and writes `bench/results/triton.csv` and the table in
`docs/performance.md`. `--stale` compiles those that are not in the file as they are now, `--only
bfloat16` those with a word in their name; both leave the other rows. Of changed sources `--stale`
compiles again what differs in Triton's own code (`ttir`): the compiler makes the same of the same.
`--check` compiles nothing and fails if the file is not whole and current. All fail if a kernel
breaks one of the rules of `problems`.
"""

from __future__ import annotations

import argparse
import ast
import csv
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

from .lib import report
from .lib.assembly import AMDGCN, SASS, count, hot_loop, hot_spills
from .lib.gpus import GPUS, Gpu, gpu
from .lib.ttir import digest, source_and_target

ROOT = Path(__file__).parents[1]
CSV = ROOT / "bench" / "results" / "triton.csv"
PAGE = ROOT / "docs" / "performance.md"
IN_PAGE = r".* bfloat16 \d+ (blocks|pages) \d.*"  # the rows that the page shows
QUICK = tuple(  # how the names begin of which a quick run compiles the first
    f"{kernel}_kernel bfloat16 128 {layout} "
    for kernel, layout in (
        ("forward", "blocks"),
        ("backward_rows", "blocks"),
        ("backward_keys", "blocks"),
        ("forward", "pages"),
    )
)

COLD = "exact.py"  # whose loops run where something is not finite, and nowhere else
RESERVED_SHARED = 1024  # of each block, by CUDA
SPILLED_SHARE = 0.03  # of a loop's instructions: on an H100 the fastest kernels spill a little
SHARED_BLOCKS = 32  # blocks that a multiprocessor holds at most


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes, and what its innermost loop with the most matrix products does.

    `num_warps` counts those that the compiler adds too; `spills` counts accesses to spilled
    registers, `loop_spills` those in the loop (`hot_spills` without products); `shared` is in
    bytes. `products` counts tensor-core instructions in the loop, `instructions` all, `wide_loads`
    global loads of 16 bytes a thread (or by the tensor copy engine). `needs_products`: the source
    has products that tensor cores can do.
    """

    name: str
    arch: str
    num_warps: int
    registers: int
    spills: int
    loop_spills: int
    shared: int
    family: str
    products: int
    instructions: int
    wide_loads: int
    needs_products: bool
    fingerprint: str = ""
    ttir: str = ""
    triton: str = ""

    @property
    def share(self) -> float:
        """Of the loop's instructions, those that multiply matrices."""
        return self.products / self.instructions if self.instructions else 0.0


def problems(found: Compiled) -> list[str]:
    """The rules that a kernel breaks; none if it is as it should be."""
    limit, broken = gpu(found.arch).shared_per_block, []
    if not found.products and found.loop_spills:
        broken.append(f"{found.loop_spills} accesses to spilled registers that are not cold")
    elif found.loop_spills > SPILLED_SHARE * found.instructions:
        broken.append(f"{found.loop_spills} accesses to spilled registers in the loop of products")
    if found.shared > limit:
        broken.append(f"{found.shared} bytes of shared memory, where {limit} are allowed")
    if found.needs_products and not found.products:
        broken.append("no tensor-core instruction in a loop")
    if found.needs_products and not found.wide_loads:
        broken.append("no global load of 16 bytes in the loop of products")
    return broken


def occupancy(found: Compiled) -> float:
    """Warps that registers and shared memory let a multiprocessor hold, of those that it can."""
    target = gpu(found.arch)
    registers = -(-max(found.registers, 1) // 8) * 8 * target.warp_size * found.num_warps
    shared = found.shared + (RESERVED_SHARED if found.arch.startswith("sm") else 0)
    blocks = min(
        target.registers_per_sm // registers,
        target.shared_per_sm // max(shared, 1),
        target.max_warps // found.num_warps,
        SHARED_BLOCKS,
    )
    return blocks * found.num_warps / target.max_warps


# --- reading what the compiler made


def wants_products(ttir: str) -> bool:
    """Whether Triton's code has products that tensor cores do: all but those of exact float32."""
    dots = re.findall(r"tt\.dot [^\n]*", ttir)
    return any(not re.search(r": tensor<[\dx]+xf32>", x) or "tf32" in x for x in dots)


def read(case, compiled, arch: str) -> Compiled:
    """What `triton.compile` made of a case."""
    if arch.startswith("sm"):
        text, usage = _sass(compiled.asm["cubin"])
        language, registers = SASS, int(re.search(r"\bREG:(\d+)", usage)[1])
        num_warps = int(re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])[1]) // 32
    else:
        text, language = compiled.asm["amdgcn"], AMDGCN
        registers = int(re.search(r"\.vgpr_count:?\s+(\d+)", text)[1])
        num_warps = compiled.metadata.num_warps
    loop = hot_loop(text, language, COLD)
    families = Counter(x.split(".")[0] for x in loop if re.match(language.products, x))
    usual, any_loop = count(loop, language.spills), hot_spills(text, language, COLD)
    everything = re.findall(language.instruction, text, re.M)
    return Compiled(
        name=case.name,
        arch=arch,
        num_warps=num_warps,
        registers=registers,
        spills=count(everything, language.spills),
        loop_spills=usual if families else any_loop,
        shared=compiled.metadata.shared,
        family=families.most_common(1)[0][0] if families else "-",
        products=sum(families.values()),
        instructions=len(loop),
        wide_loads=count(loop, language.wide_loads),
        needs_products=wants_products(compiled.asm["ttir"]),
        fingerprint=fingerprint(case),
        ttir=digest(case, arch, COLD),
        triton=version("triton"),
    )


def _sass(cubin: bytes) -> tuple[str, str]:
    """The disassembly of a binary, and what it says of its resources."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (
            [tools / "nvdisasm", "-c", "-g", file.name],
            [tools / "cuobjdump", "--dump-resource-usage", file.name],
        )
        text, usage = (
            subprocess.run(x, capture_output=True, text=True, check=True).stdout for x in commands
        )
    return text, usage


def compile_case(case, arch: str) -> Compiled:
    """One kernel for one target: `case` as `bench.lib.compile_cases` describes it."""
    import triton

    source, target = source_and_target(case, arch)
    return read(case, triton.compile(source, target=target, options=case.options), arch)


def capability(target: Gpu) -> tuple[int, int]:
    """What torch says of the GPU: (9, 0) for sm_90, (9, 4) for gfx942."""
    digits = re.sub(r"\D", "", target.arch)
    major = digits[:-1] if target.arch.startswith("sm") else digits[0]
    return int(major), int(digits[len(major)])


@functools.cache
def sources(function: Callable) -> str:
    """The code of a kernel and of all that it calls, without comments and docstrings."""
    code = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(code):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    found = [ast.unparse(code)]
    for name in sorted(function.__code__.co_names):
        value = function.__globals__.get(name)
        if inspect.isfunction(called := getattr(value, "fn", None)):
            if called.__module__.split(".")[0] == function.__module__.split(".")[0]:
                found.append(sources(called))
        elif type(value).__name__ == "constexpr":
            found.append(f"{name} = {value.value}")
    return "\n".join(found)


def fingerprint(case) -> str:
    """What changes if the compiler is given something else: code, arguments or options."""
    given = (case.signature, case.constexprs, case.aligned, case.options)
    return hashlib.sha256(f"{sources(case.kernel.fn)}{given}".encode()).hexdigest()[:12]


def kernel_cases(arch: str) -> list:
    """The cases of a target."""
    from .lib.compile_cases import compile_cases

    return list(compile_cases(capability(gpu(arch)), gpu(arch).warp_size))


def wanted(arch: str, words: list[str], quick: bool, stale: bool) -> list[int]:
    """The numbers of the cases whose name holds all `words`; of those, if asked for, only the first
    of each of `QUICK`, and only those that are not in the CSV file as they are now.
    """
    cases = kernel_cases(arch)
    found = [n for n, x in enumerate(cases) if all(word in x.name for word in words)]
    if quick:
        starts = ([n for n in found if cases[n].name.startswith(x)] for x in QUICK)
        found = [numbers[0] for numbers in starts if numbers]
    if stale:
        known = {(x.arch, x.name, x.fingerprint) for x in recorded()}
        found = [n for n in found if (arch, cases[n].name, fingerprint(cases[n])) not in known]
    return found


def compile_number(arch: str, number: int, keeps: bool) -> Compiled:
    """The case of that number; if `keeps`, as recorded where Triton's code is the same."""
    case = _cases_of_process(arch)[number]
    if keeps:
        known = {x.ttir: x for x in _recorded_of_process()}.get(digest(case, arch, COLD))
        if known is not None:
            return replace(known, name=case.name, fingerprint=fingerprint(case))
    return compile_case(case, arch)


_cases_of_process = functools.cache(kernel_cases)


def compile_all(numbers: dict[str, list[int]], jobs: int, keeps: bool) -> Iterator[list[Compiled]]:
    """Cases by target, one target after the other, in fresh processes that see neither an
    interpreter nor kernels of earlier runs.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            for arch, some in numbers.items():
                begin = perf_counter()
                found = pool.starmap(compile_number, [(arch, n, keeps) for n in some], chunksize=1)
                took = f"{len(found)} kernels in {perf_counter() - begin:.0f} s"
                print(f"{arch}: {took}", file=sys.stderr, flush=True)
                yield found


# --- what is written

COLUMNS = (*(x.name for x in fields(Compiled)), "share", "occupancy", "problems")


def recorded() -> list[Compiled]:
    """What the CSV file says."""
    convert = {"str": str, "int": int, "bool": "True".__eq__}
    if not CSV.exists():
        return []
    with CSV.open(newline="") as file:
        return [
            Compiled(**{x.name: convert[x.type](row[x.name]) for x in fields(Compiled)})
            for row in csv.DictReader(file)
        ]


_recorded_of_process = functools.cache(recorded)


def cell(found: Compiled) -> str:
    """What the page shows of a kernel on a target."""
    parts = [
        str(found.registers)
        + (f" ({found.spills} spills, {found.loop_spills} in the loop)" if found.spills else ""),
        f"{found.shared / 1024:.0f}",
        f"{100 * occupancy(found):.0f} %",
        f"{100 * found.share:.1f} %" if found.products else "-",
    ]
    return ", ".join(parts)


def page_table(found: list[Compiled]) -> str:
    """One row a kernel, one column a target."""
    archs = list(dict.fromkeys(x.arch for x in found))
    by_name: dict[str, dict[str, Compiled]] = {}
    for x in found:
        by_name.setdefault(x.name, {})[x.arch] = x
    rows = [
        [name, *(cell(on[arch]) if arch in on else "-" for arch in archs)]
        for name, on in by_name.items()
        if re.fullmatch(IN_PAGE, name) or any(problems(x) for x in on.values())
    ]
    head = ("kernel", *(f"{gpu(arch).name} ({arch})" for arch in archs))
    return report.markdown_table(rows, head)


def write(found: list[Compiled]) -> None:
    """The CSV file with these rows in place of those of the same names, and the section of the
    page; rows of cases that are no more are left out.
    """
    rows = {(x.arch, x.name): x for x in [*recorded(), *found]}
    names = [(target.arch, x.name) for target in GPUS for x in kernel_cases(target.arch)]
    merged = [rows[name] for name in names if name in rows]
    report.write_rows(
        CSV,
        COLUMNS,
        [
            [
                *map(str, asdict(x).values()),
                f"{x.share:.4f}",
                f"{occupancy(x):.4f}",
                "; ".join(problems(x)),
            ]
            for x in merged
        ],
    )
    broken = sum(bool(problems(x)) for x in merged)
    compilers = " and ".join(sorted({x.triton for x in merged}))
    about = (
        f"{len(merged)} of {len(names)} kernels were compiled, with Triton {compilers}; "
        f"{broken} of them break a rule."
    )
    report.replace_section(PAGE, "compiled", f"{page_table(merged)}\n\n{about}")


def missing() -> list[str]:
    """What the file lacks: a row for each case as it is now, and no other."""
    rows = {(x.arch, x.name): x.fingerprint for x in recorded()}
    cases = {(t.arch, x.name): fingerprint(x) for t in GPUS for x in kernel_cases(t.arch)}
    found = [" ".join(x) for x in cases if rows.get(x) != cases[x]]
    return found + [f"{' '.join(x)} (no longer a case)" for x in rows if x not in cases]


def check() -> None:
    """Fails if the file is not whole and current, or a kernel breaks a rule."""
    if found := missing():
        raise SystemExit(
            f"{CSV.name} lacks {len(found)} kernels as they are now: run python -m "
            f"bench.triton_table --stale. The first are\n" + "\n".join(found[:8])
        )
    if broken := broken_rules(recorded()):
        raise SystemExit("\n".join(broken))


def broken_rules(found: list[Compiled]) -> list[str]:
    """One line for each kernel that breaks a rule."""
    return [f"{x.arch} {x.name}: {'; '.join(why)}" for x in found if (why := problems(x))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    known = [x.arch for x in GPUS]
    parser.add_argument("--arch", nargs="+", choices=known, default=known)
    parser.add_argument("--quick", action="store_true", help="few kernels")
    parser.add_argument("--stale", action="store_true", help="kernels that the file has otherwise")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="kernels named so")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", action="store_true", help="print the results, write no file")
    parser.add_argument("--check", action="store_true", help="compile nothing")
    args = parser.parse_args()
    if args.check:
        return check()
    numbers = {arch: wanted(arch, args.only, args.quick, args.stale) for arch in args.arch}
    if not (any(numbers.values()) or args.stale):
        parser.error(f"no kernel is named {' '.join(args.only)}")
    found = []
    for some in compile_all(numbers, args.jobs, args.stale):
        found += some
        if not args.json:
            write(some)
    print(json.dumps([asdict(x) for x in found]) if args.json else page_table(found))
    if broken := broken_rules(found):
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    main()
