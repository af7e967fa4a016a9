"""setuptools' build backend, which also sees to a torch to build the kernels against.

An isolated build sees no torch. The kernels use torch's stable ABI, so that any torch from
OLDEST_TORCH on will do: one that lies in an environment at hand, or else a build requirement.
"""

import importlib.util
import os
import re
import shutil
import site
import sys
import sysconfig

OLDEST_TORCH = (2, 10)
OLDEST_SETUPTOOLS = 77  # the first to read the licence field of pyproject.toml
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

try:
    from setuptools import __version__ as _setuptools
except ImportError:
    _setuptools = None
if _setuptools is None or int(_setuptools.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"sparse_attn: a build without isolation needs setuptools {OLDEST_SETUPTOOLS} or later, "
        f"and {f'version {_setuptools}' if _setuptools else 'none'} is installed: "
        f"pip install 'setuptools>={OLDEST_SETUPTOOLS}' ninja, or leave out --no-build-isolation"
    )

from setuptools import build_meta  # noqa: E402
from setuptools.build_meta import *  # noqa: E402, F403


def left_out() -> str | None:
    """Why this build leaves the kernels out on purpose, or None if it builds them."""
    if os.environ.get("SPARSE_ATTN_SKIP_EXT") == "1":
        return (
            "SPARSE_ATTN_SKIP_EXT=1 left the kernels out when the package was installed; install "
            "it again without that variable"
        )
    if os.name == "nt":
        return "the kernels are written in GNU C++, which the compilers of Windows do not read"
    return None


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _kernel_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _kernel_requirements()


def _kernel_requirements() -> list[str]:
    if left_out():
        return []
    needed = [] if shutil.which("ninja") else ["ninja"]
    if importlib.util.find_spec("torch") is None:
        needed.append("torch>={}.{}".format(*OLDEST_TORCH))
    return needed


def _environments():
    """Where a torch may lie that an isolated build does not see."""
    yield from site.getsitepackages()  # of the target, with pip
    if sys.prefix == sys.base_prefix:
        yield site.getusersitepackages()
    prefixes = os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), f"{ROOT}/.venv"
    for prefix in filter(None, prefixes):
        for key in ("purelib", "platlib"):
            yield sysconfig.get_path(key, "posix_prefix", {"base": prefix, "platbase": prefix})


def _is_usable(path: str) -> bool:
    """Whether `path` holds a torch from OLDEST_TORCH on."""
    try:
        with open(os.path.join(path, "torch", "version.py")) as file:
            version = re.search(r"__version__ = '(\d+)\.(\d+)", file.read())
    except OSError:
        return False
    return version is not None and tuple(map(int, version.groups())) >= OLDEST_TORCH


def _append_torch() -> None:
    """Makes a torch at hand importable; behind all else, so that the build's own setuptools stays
    in front.
    """
    if importlib.util.find_spec("torch") is None:
        sys.path.extend(next(([path] for path in _environments() if _is_usable(path)), []))


_append_torch()
