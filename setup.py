"""Builds the optional C++ extension; everything else about the package is in pyproject.toml.

SPARSE_ATTN_SKIP_EXT=1 installs without the extension, SPARSE_ATTN_REQUIRE_EXT=1 makes a failed
build an error.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("SPARSE_ATTN_REQUIRE_EXT") == "1"
SKIPPED = os.environ.get("SPARSE_ATTN_SKIP_EXT") == "1"


def _explain(reason):
    print(f"sparse_attn: installing without the C++ kernels: {reason}", file=sys.stderr)


def _extension_options():
    if SKIPPED:
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if REQUIRED:
            raise
        _explain(f"torch is not installed ({error})")
        return {}

    class OptionalBuild(BuildExtension):
        def run(self):
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if REQUIRED:
                    raise
                _explain(f"{type(error).__name__}: {error}".splitlines()[0])
                self.extensions = []

    sources = [
        "csrc/bindings.cpp",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp")),
    ]
    headers = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.h"))]
    flags = [
        "-O3",
        "-std=c++20",
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-DPy_LIMITED_API=0x030A0000",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    extension = CppExtension(
        "sparse_attn._C",
        sources,
        depends=headers,
        extra_compile_args={"cxx": flags},
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**_extension_options())
