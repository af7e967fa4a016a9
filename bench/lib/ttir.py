"""What Triton is given to compile: its own intermediate code, which decides on the machine code."""

from __future__ import annotations

import hashlib
import re
from importlib.metadata import version

from .gpus import gpu


def source_and_target(case, arch: str):
    """A case of `bench.lib.compile_cases` as `triton.compile` takes it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.signature)
    source = ASTSource(
        case.kernel,
        signature=case.signature,
        constexprs=case.constexprs,
        attrs={(names.index(x),): [["tt.divisibility", 16]] for x in case.aligned},
    )
    nvidia = arch.startswith("sm")
    number = int(arch[3:]) if nvidia else arch
    return source, GPUTarget("cuda" if nvidia else "hip", number, gpu(arch).warp_size)


def digest(case, arch: str, cold: str) -> str:
    """What changes if the compiler makes something else of a case: Triton's code, options, target
    or version. Where a line stands in which source file does not matter, but for its being in the
    file `cold`, of which `bench.lib.assembly` wants to know.
    """
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    source, target = source_and_target(case, arch)
    backend = make_backend(target)
    options = backend.parse_options(dict(case.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict = {}
    backend.add_stages(stages, options, source.language)
    helpers = (backend.get_codegen_implementation(options), backend.get_module_map())
    module = source.make_ir(target, options, *helpers, context)
    module = stages["ttir"](module, {})
    marked = marked_lines(module.str_nodebug(), str(module), cold)
    given = (marked, arch, sorted(case.options.items()), version("triton"))
    return hashlib.sha256(repr(given).encode()).hexdigest()[:16]


def marked_lines(code: str, located: str, cold: str) -> list[tuple[str, bool]]:
    """The lines of `code`, which has no locations, and whether each is from the file `cold`, or
    called from there, as `located` says, the same code with locations.
    """
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", located, re.M))
    is_cold: dict[str, bool] = {}

    def holds(name: str) -> bool:
        if name not in is_cold:
            inner = re.findall(r"#loc\d*", places[name])
            is_cold[name] = f"/{cold}" in places[name] or any(map(holds, inner))
        return is_cold[name]

    lines = [x for x in located.splitlines() if not re.match(r"#loc\d* = ", x)]
    return [
        (line, any(map(holds, re.findall(r"#loc\d*", with_place))))
        for line, with_place in zip(code.splitlines(), lines, strict=True)
    ]
