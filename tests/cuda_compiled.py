"""What nvcc makes of the CUDA kernels: ``python -m tests.cuda_compiled [--record]``.

It compiles csrc/cuda/forward.cu for each target, prints a line for each kernel, and fails if one
spills, or takes more registers or instructions in its main loop than tests/cuda_compiled.json
allows; ``--record`` writes that file. Without nvcc it says so and ends. The disassembler may come
with Triton.

The main loop is the backward jump around the most multiplications. Its control bits say for how
many cycles a warp waits after each instruction; `issue` is their sum.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUNDS = Path(__file__).with_suffix(".json")
TARGETS = ("sm_80", "sm_90", "sm_100")
SLACK = 1.05  # of the instructions of a loop
FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-cubin")
INSTRUCTION = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);\s*/\* 0x([0-9a-f]{16}) \*/"
)


def find(tool: str) -> str | None:
    """A tool of the CUDA toolkit: on PATH, where the toolkit lies, or in Triton's package."""
    folders = [Path("/usr/local/cuda/bin")]
    if spec := importlib.util.find_spec("triton"):
        folders.append(Path(spec.origin).parent / "backends/nvidia/bin")
    found = [shutil.which(tool), *(shutil.which(tool, path=str(folder)) for folder in folders)]
    return next(filter(None, found), None)


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(lines: list[str]) -> tuple[list[tuple[str, str | None, int]], dict[str, int]]:
    """Opcode, label that it jumps to and cycles of each instruction; and where labels stand."""
    found, labels = [], {}
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        if match := INSTRUCTION.match(line):
            jump = re.search(r"`\((\.L_x_\d+)\)", match[3])
            control = int(re.search(r"0x([0-9a-f]{16})", after)[1], 16)
            found.append((match[2], jump[1] if jump else None, max(control >> 41 & 15, 1)))
    return found, labels


def main_loop(lines: list[str]) -> list[tuple[str, str | None, int]]:
    found, labels = instructions(lines)
    loops = [
        found[labels[jump] : at + 1]
        for at, (opcode, jump, _) in enumerate(found)
        if opcode.startswith("BRA") and labels.get(jump, at) < at
    ]

    def products(body):
        return sum(opcode.startswith("HMMA") for opcode, *_ in body)

    return max(loops, key=lambda body: (products(body), -len(body)), default=[])


def title(mangled: str) -> str:
    kernel, dtype, dim = re.search(r"(Forward)I.*?(BFloat16|Float16)ELi(\d+)E", mangled).groups()
    return f"{kernel} {dtype} {dim}"


def measure(target: str, folder: Path) -> dict[str, dict[str, object]]:
    """What the kernels for a target take."""
    cubin = str(folder / f"{target}.cubin")
    source = str(ROOT / "csrc/cuda/forward.cu")
    output_of(find("nvcc"), *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch={target}", "-o", cubin, source)
    usage = output_of(find("cuobjdump"), "--dump-resource-usage", cubin)
    resources = dict(re.findall(r"Function (\S+):\s*(REG:.*)", usage))
    text = output_of(find("nvdisasm"), "-c", "-hex", cubin)
    kernels = {}
    for part in text.split("\t.section\t.text.")[1:]:
        name = part.split(",", 1)[0]
        loop = main_loop(part.split("\n\t.section\t", 1)[0].splitlines())
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources[name])}
        kernels[title(name)] = {
            "registers": used["REG"],
            "stack": used["STACK"],
            "loop": len(loop),
            "issue": sum(cycles for *_, cycles in loop),
            "kinds": collections.Counter(opcode.split(".")[0] for opcode, *_ in loop),
        }
    return dict(sorted(kernels.items()))


def objections(name: str, found: dict, bound: dict | None) -> list[str]:
    if bound is None:
        return [f"{name}: nothing is recorded"]
    wrong = []
    if found["stack"] > 0:
        wrong.append(f"{name}: uses a stack of {found['stack']} bytes")
    if found["registers"] > bound["registers"]:
        wrong.append(f"{name}: {found['registers']} registers, recorded {bound['registers']}")
    if found["loop"] > bound["loop"] * SLACK:
        wrong.append(f"{name}: {found['loop']} instructions in the loop, recorded {bound['loop']}")
    if found["kinds"]["HMMA"] != bound["products"]:
        wrong.append(f"{name}: {found['kinds']['HMMA']} HMMA, recorded {bound['products']}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true", help="write what is found as the bounds")
    record = parser.parse_args().record
    for tool in ("nvcc", "cuobjdump", "nvdisasm"):
        if find(tool) is None:
            print(f"There is no {tool} here: the CUDA kernels were not compiled.")
            return 0
    bounds = json.loads(BOUNDS.read_text()) if BOUNDS.exists() else {}
    wrong, recorded = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            for kernel, found in measure(target, Path(folder)).items():
                name = f"{target} {kernel}"
                kinds = ", ".join(f"{kind} {n}" for kind, n in found["kinds"].most_common(12))
                print(
                    f"{name}: {found['registers']} registers, stack {found['stack']}; loop of "
                    f"{found['loop']} instructions, issue {found['issue']}: {kinds}"
                )
                wrong += objections(name, found, bounds.get(name))
                recorded[name] = {
                    "registers": found["registers"],
                    "loop": found["loop"],
                    "products": found["kinds"]["HMMA"],
                }
    if record:
        BOUNDS.write_text(json.dumps(recorded, indent=2) + "\n")
        return 0
    print(*wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
