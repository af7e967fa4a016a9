"""Builds the C++ kernels; everything else about the package is in pyproject.toml.

A build has the kernels or fails, unless SPARSE_ATTN_SKIP_EXT=1 leaves them out. It records in the
package what built them, or why they were left out.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_backend  # noqa: E402  (before torch, which it finds)

RECORD = Path("sparse_attn", "_build.json")
FLAGS = [
    "-O3",
    "-g0",  # Python's own flags ask for debug symbols
    "-std=c++20",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-DPy_LIMITED_API=0x030A0000",
    "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*build_backend.OLDEST_TORCH),
]


def main():
    commands = {"build": Build, "record_build": RecordBuild}
    RecordBuild.reason = build_backend.left_out()
    if RecordBuild.reason:
        print(f"sparse_attn: no C++ kernels: {RecordBuild.reason}", file=sys.stderr)
        setup(cmdclass=commands)
        return
    extension, commands["build_ext"] = _kernels()
    setup(
        ext_modules=[extension],
        cmdclass=commands,
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


def _kernels():
    """The extension and the command that builds it, or that says why it cannot."""
    oldest = "torch {}.{} or later".format(*build_backend.OLDEST_TORCH)
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return _refusal(f"they need {oldest} to build against, installed before ({error})")
    if torch.__version__ < build_backend.OLDEST_TORCH:
        return _refusal(f"they need {oldest} to build against, and this is {torch.__version__}")
    RecordBuild.torch = str(torch.__version__)

    class BuildKernels(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                raise _failure(_missing_compiler() or f"{error}; see above") from error

    # torch looks for ninja on PATH, where pip does not put the scripts of its own environment.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    extension = CppExtension(
        "sparse_attn._C",
        _relative("csrc/**/*.cpp"),
        depends=_relative("csrc/**/*.h"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": FLAGS},
        extra_link_args=["-s"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )
    return extension, BuildKernels


def _relative(pattern: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern))]


def _refusal(reason: str):
    """An extension that does not build, and a command that says so once the build comes to it."""

    class RefuseKernels(build_ext):
        def run(self):
            raise _failure(reason)

    return Extension("sparse_attn._C", [], py_limited_api=True), RefuseKernels


def _failure(reason: str) -> CompileError:
    return CompileError(
        f"sparse_attn: cannot build the C++ kernels: {reason}. "
        "(SPARSE_ATTN_SKIP_EXT=1 installs without them: calls then run on the slow reference.)"
    )


def _compilers() -> tuple[str, str]:
    """The commands that compile with and without ninja; the second one links too."""
    named = os.environ.get("CXX")
    return named or "c++", named or sysconfig.get_config_var("CXX") or "c++"


def _missing_compiler() -> str | None:
    for command in _compilers():
        if shutil.which(shlex.split(command)[0]) is None:
            return (
                f"the C++ compiler `{command}` is not on PATH; install one that knows C++20 "
                "(apt install g++, dnf install gcc-c++, conda install cxx-compiler), or name one "
                "in the variable CXX"
            )
    return None


def _compiler_version() -> str:
    command = [*shlex.split(_compilers()[0]), "--version"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]


class RecordBuild(Command):
    """Writes into the package what built the kernels, or why they were left out."""

    reason = torch = None
    user_options = ()
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        record = {"torch": self.torch, "compiler": _compiler_version(), "flags": FLAGS}
        path = RECORD if self.editable_mode else self.build_lib / RECORD
        path.write_text(json.dumps({"reason": self.reason} if self.reason else record) + "\n")

    def get_source_files(self):
        return []

    def get_outputs(self):
        return [str(self.build_lib / RECORD)]

    def get_output_mapping(self):
        return {}


class Build(build):
    sub_commands = (*build.sub_commands, ("record_build", None))


main()
