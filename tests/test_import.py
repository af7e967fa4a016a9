"""What a fresh process sees: no optional package, no extension, one plain message."""

import importlib
import json
import subprocess
import sys
import textwrap

import pytest

PREAMBLE = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED or name in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""


BUILT = {"torch": "9.8", "compiler": "c++ 7"}


def missing(name: str = "sparse_attn._C") -> ImportError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


def run(blocked: set[str], code: str) -> subprocess.CompletedProcess:
    script = f"BLOCKED = {blocked!r}\n{PREAMBLE}\n{textwrap.dedent(code)}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def test_imports_without_triton_and_transformers():
    done = run(
        {"triton", "transformers", "einops", "matplotlib", "flash_attn"},
        """
        import sparse_attn, torch
        q = torch.randn(1, 2, 16, 8)
        out = sparse_attn.sparse_attention(q, q, q, sparse_attn.selectors.SinkWindow(1, 4))
        assert out.shape == q.shape
        for name in sparse_attn.__all__:
            getattr(sparse_attn, name)
        loaded = {m.split(".")[0] for m in sys.modules}
        assert not loaded & BLOCKED, loaded & BLOCKED
        """,
    )
    assert "not available" not in done.stderr


def test_without_the_extension_the_reference_runs_and_says_so_once():
    done = run(
        {"sparse_attn._C"},
        """
        import sparse_attn, torch
        q = torch.randn(1, 2, 16, 8, dtype=torch.bfloat16, requires_grad=True)
        assert sparse_attn.explain(q, q, q).backend == "reference"
        for _ in range(3):
            out = sparse_attn.sparse_attention(q, q, q, sparse_attn.selectors.SinkWindow(1, 4))
        out.sum().backward()
        assert q.grad is not None
        try:
            sparse_attn.sparse_attention(q, q, q, sparse_attn.selectors.Dense(), backend="cpu")
        except ValueError as error:
            assert "the C++ extension is not available" in str(error)
        else:
            raise AssertionError("backend='cpu' must be refused")
        """,
    )
    assert done.stderr.count("the C++ extension is not available") == 1


@pytest.mark.parametrize(
    ("record", "error", "said"),
    [
        (None, missing(), "was never built"),
        ({"reason": "left out by a variable"}, missing(), "left out by a variable"),
        (BUILT, missing(), "its file is gone from"),
        (BUILT, ImportError("undefined symbol: x"), "undefined symbol: x (built against torch 9.8"),
        ({"reason": "left out"}, ImportError("undefined symbol: x"), "undefined symbol: x"),
        (BUILT, missing("numpy"), "No module named 'numpy'"),
    ],
)
def test_the_reason_is_the_true_one(tmp_path, monkeypatch, record, error, said):
    from sparse_attn import extension

    def fail(name):
        raise error

    monkeypatch.setattr(extension, "RECORD", tmp_path / "_build.json")
    monkeypatch.setattr(extension.importlib, "import_module", fail)
    if record is not None:
        extension.RECORD.write_text(json.dumps(record))
    module, reason = extension.load()
    assert module is None and said in reason
    assert ("built against" in reason) == (record is BUILT and said != "No module named 'numpy'")


@pytest.mark.parametrize("name", ["", ".selectors", ".landmark", ".retrieval"])
def test_dir_shows_the_public_names(name):
    module = importlib.import_module(f"sparse_attn{name}")
    assert {x for x in dir(module) if not x.startswith("__")} == {*module.__all__}


def test_public_names_are_documented():
    import inspect

    import sparse_attn

    for name in sparse_attn.__all__:
        value = getattr(sparse_attn, name)
        assert inspect.getdoc(value), name
