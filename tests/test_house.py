"""The rules of the house: who may import whom, how long files and functions may be, and that only
one file knows in which order an op takes its arguments.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sparse_attn"

# From the lowest layer up. A module imports its own layer's folder and lower layers, nothing above;
# parts of one layer do not import each other.
LAYERS = (
    ("checks", "names", "notices", "extension"),
    ("layout",),
    ("typing", "contract"),
    ("reference", "triton"),
    ("ops",),
    ("selectors", "quality", "state"),
    ("api",),
    ("sdpa", "landmark"),
    ("hf",),
    ("retrieval",),
    ("__init__",),
)
MAX_LINES = {".py": 400, ".h": 400, ".cpp": 400}
MAX_KERNEL_LINES = 700  # files of sparse_attn/triton, and those of csrc with one kernel
MAX_FUNCTION = 60  # lines, without docstring and signature
MAX_KERNEL_FUNCTION = 150


def modules() -> dict[str, Path]:
    """Each module of the package by its dotted name below ``sparse_attn``; "" is the package."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of the package that a module imports anywhere, but for annotations."""
    path = MODULES[name]
    tree = ast.parse(path.read_text())
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [x for x in package if x]
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                yield inner if inner in MODULES else ".".join(base)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            assert not any(x.split(".")[0] == "sparse_attn" for x in names if x), (
                f"{name} imports its own package by its absolute name"
            )


IMPORTS = {name: set(imports(name)) for name in MODULES}


def layer_of(name: str) -> int:
    part = name.split(".")[0] or "__init__"
    found = [n for n, layer in enumerate(LAYERS) if part in layer]
    assert found, f"{part} is in no layer"
    return found[0]


def test_imports_go_down():
    for name, imported in IMPORTS.items():
        for other in imported:
            same_part = name.split(".")[0] == other.split(".")[0]
            assert same_part or layer_of(other) < layer_of(name), f"{name} imports {other}"


def test_no_module_imports_itself_through_others():
    for name in MODULES:
        seen, waiting = set(), [name]
        while waiting:
            for other in IMPORTS[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        assert name not in seen, f"{name} is part of a cycle"


def test_layers_name_what_exists():
    parts = {name.split(".")[0] or "__init__" for name in MODULES}
    named = [part for layer in LAYERS for part in layer]
    assert sorted(named) == sorted(parts)


SOURCES = sorted(
    path
    for folder in ("sparse_attn", "csrc", "bench", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in MAX_LINES and "build" not in path.parts
)


def test_files_are_short():
    long = {}
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        is_kernel = name.startswith(("sparse_attn/triton/", "csrc/cpu/"))
        limit = MAX_KERNEL_LINES if is_kernel else MAX_LINES[path.suffix]
        lines = len(path.read_text().splitlines())
        if lines > limit:
            long[name] = lines
    assert not long


def functions(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Name, lines of code and whether it is a kernel, of each function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            is_kernel = any("jit" in ast.unparse(x) for x in node.decorator_list)
            yield node.name, lines, is_kernel


def test_functions_are_short():
    long = {}
    for path in SOURCES:
        if path.suffix == ".py":
            for name, lines, is_kernel in functions(path):
                if lines > (MAX_KERNEL_FUNCTION if is_kernel else MAX_FUNCTION):
                    long[f"{path.relative_to(ROOT)}: {name}"] = lines
    assert not long


def test_nobody_counts_the_arguments_of_an_op():
    found = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"\b(args|rest|inputs|positions)\[-?\d*:?-?\d+|\b(args|rest)\[:", line):
                found[str(path.relative_to(ROOT))].append(number)
    assert not found


@pytest.mark.parametrize("line", ["args[7:13]", "inputs[:10]", "rest[3]", "args[-1:]"])
def test_counting_is_seen(line):
    assert re.search(r"\b(args|rest|inputs|positions)\[-?\d*:?-?\d+|\b(args|rest)\[:", line)
