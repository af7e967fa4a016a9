"""The C++ sources: which folder may include which, and that every header stands for itself."""

import os
import platform
import re
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SOURCES = {str(path.relative_to(CSRC)): path.read_text() for path in sorted(CSRC.rglob("*.[ch]*"))}
HEADERS = [name for name in SOURCES if name.endswith(".h")]
INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)

# What an instruction set defines before it includes the kernels. Kernels on AMX know only one.
GENERIC = ["-DSPARSE_ATTN_ISA=generic", "-DSPARSE_ATTN_VECTOR_BYTES=16"]
AMX = ["-DSPARSE_ATTN_ISA=amx", "-DSPARSE_ATTN_VECTOR_BYTES=64"]
AMX += ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"]
AMX += ["-mamx-tile", "-mamx-bf16", "-mfma"]


def layers() -> dict[str, int]:
    """The drawing in csrc/README.md: each folder with its height."""
    drawing = re.search(r"^bindings -> .*$", (CSRC / "README.md").read_text(), re.MULTILINE)[0]
    storeys = [storey.split() for storey in drawing.split(" -> ")]
    return {name: -i for i, storey in enumerate(storeys) for name in storey}


def layer_of(name: str) -> str:
    return Path(name).parent.name if "/" in name else "csrc"


def test_includes_run_downwards():
    heights = layers()
    folders = {layer_of(name) for name in SOURCES}
    assert folders == set(heights)
    upwards = [
        f"{name} includes {included}"
        for name, text in SOURCES.items()
        for included in INCLUDE.findall(text)
        if layer_of(included) != layer_of(name)
        and heights[layer_of(included)] >= heights[layer_of(name)]
    ]
    assert not upwards


def included_by(names: list[str]) -> set[str]:
    found: set[str] = set()
    while names:
        name = names.pop()
        if name not in found:
            found.add(name)
            names += INCLUDE.findall(SOURCES[name])
    return found


@pytest.mark.parametrize("name", [n for n in SOURCES if "#pragma GCC target" in SOURCES[n]])
def test_only_kernels_are_compiled_for_a_target(name):
    """What all instruction sets share must not hold instructions that some machines lack."""
    before, after = SOURCES[name].split("#pragma GCC target")
    shared = included_by(INCLUDE.findall(after)) - included_by(INCLUDE.findall(before))
    assert not [header for header in shared if "SPARSE_ATTN_ISA {" not in SOURCES[header]]


def test_headers_stand_for_themselves():
    """A source includes its own header first; a header without a source compiles alone."""
    alone = []
    for header in HEADERS:
        if header.endswith("_ptx.h"):  # for nvcc alone
            continue
        source = header[:-2] + ".cpp"
        if source in SOURCES:
            assert INCLUDE.search(SOURCES[source])[1] == header
        elif "amx" not in header or platform.machine() == "x86_64":
            alone.append(header)
    with ThreadPoolExecutor(2) as pool:
        errors = [error for error in pool.map(compile_alone, alone) if error]
    assert not errors, "\n".join(errors)


def compile_alone(header: str) -> str:
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    flags = ["-std=c++20", "-fsyntax-only", "-w", "-x", "c++", f"-I{CSRC}"]
    if layer_of(header) == "bindings":
        flags += [f"-I{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    if layer_of(header) == "cuda":
        flags.append(f"-I{ROOT / 'tests' / 'cuda_emulation'}")
    flags += AMX if "amx" in header else GENERIC
    run = subprocess.run([*compiler, *flags, CSRC / header], capture_output=True, text=True)
    return run.stderr if run.returncode else ""
