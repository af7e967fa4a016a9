"""What a build asks for, and which torch it finds; tests/install.py runs builds."""

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT.joinpath("pyproject.toml").read_text()


@pytest.fixture
def backend(monkeypatch):
    """The build backend in an isolated build: no torch, no ninja, and its own copy of sys.path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "SPARSE_ATTN_SKIP_EXT"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("backend", ROOT / "csrc/build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module.site, "getsitepackages", lambda: [])
    monkeypatch.setattr(module.site, "getusersitepackages", lambda: "")
    monkeypatch.setattr(module, "ROOT", "/nowhere")
    return module


def put_torch(prefix: Path, version: str) -> str:
    folder = Path(sysconfig.get_path("platlib", "posix_prefix", {"platbase": str(prefix)}))
    folder.joinpath("torch").mkdir(parents=True)
    text = f"from typing import Optional\n\n__version__ = '{version}'\ndebug = False\n"
    folder.joinpath("torch", "version.py").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("version", "usable"),
    [
        ("2.9.1+cpu", False),
        ("1.13.0", False),
        ("2.10.0", True),
        ("2.13.0+cpu", True),
        ("3.0", True),
    ],
)
def test_a_torch_that_will_do_is_found(backend, monkeypatch, tmp_path, version, usable):
    path = put_torch(tmp_path, version)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    backend._append_torch()
    assert (path in sys.path) == usable


@pytest.mark.parametrize("where", ["target", "VIRTUAL_ENV", "CONDA_PREFIX", ".venv"])
def test_where_torch_is_looked_for(backend, monkeypatch, tmp_path, where):
    path = put_torch(tmp_path / ".venv", "2.13.0")
    if where == "target":
        monkeypatch.setattr(backend.site, "getsitepackages", lambda: [path])
    elif where == ".venv":
        monkeypatch.setattr(backend, "ROOT", str(tmp_path))
    else:
        monkeypatch.setenv(where, str(tmp_path / ".venv"))
    backend._append_torch()
    assert sys.path[-1] == path


def test_what_a_build_asks_for(backend, monkeypatch):
    assert backend._kernel_requirements() == ["ninja", "torch>=2.10"]
    monkeypatch.setenv("SPARSE_ATTN_SKIP_EXT", "1")
    assert backend._kernel_requirements() == []
    monkeypatch.delenv("SPARSE_ATTN_SKIP_EXT")
    monkeypatch.setattr(backend.shutil, "which", lambda name: "/usr/bin/ninja")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: "found")
    assert backend._kernel_requirements() == []


def test_versions_are_those_of_the_project(backend):
    (torch,) = re.findall(r'^dependencies = \["torch>=(.*)"\]', PROJECT, re.M)
    assert torch == "{}.{}".format(*backend.OLDEST_TORCH)
    assert f'requires = ["setuptools>={backend.OLDEST_SETUPTOOLS}"]' in PROJECT
