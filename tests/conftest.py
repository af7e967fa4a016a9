"""Every test starts from a fixed seed, with uninitialised memory filled with NaN. Without a GPU,
Triton's kernels run in its interpreter.
"""

import importlib.util
import os

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

# The same examples in every run; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# The first multi-threaded exp of a process can be less accurate than the rest.
torch.exp(torch.linspace(-1, 0, 2**20)).sum()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` returns NaN (the largest integer for integers), so that reading it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def kernels_for_small_calls(monkeypatch):
    """Dense calls are never so small that they are left to torch: tests are meant for kernels."""
    monkeypatch.setattr("sparse_attn.ops.dense.FEWEST_PRODUCTS", {})


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter looks through all of `triton.language` whenever one kernel function
    calls another; once for each module is enough, and takes two thirds of the time.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    prepared = set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def pytest_collection_modifyitems(items):
    """`pytest -m gpu` selects all tests of Triton's kernels where there is a GPU."""
    for item in items:
        if torch.cuda.is_available() and "triton" in item.name:
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def isa(request):
    """Each instruction set of this processor in turn, see `pytest_generate_tests`."""
    from sparse_attn import _C

    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(None)


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        from .oracle import BACKENDS

        names = ()
        if "cpu" in BACKENDS:  # fails without the extension
            from sparse_attn import _C

            names = _C.supported_cpu_isas()
        metafunc.parametrize("isa", names, indirect=True)


@pytest.fixture
def one_thread():
    """Small tensors on a busy machine: threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_qk():
    """q [1, 9, 1024, 64] and k [1, 3, 1024, 64] of some layers of SmolLM2-135M on English text."""
    import pydoc_data.topics

    from bench.lib.pretrained import load

    tokenizer, model = load("smollm2", torch.float32)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024]
    seen = {}

    def record(module, q, k, v, mask, scaling=None, **kwargs):
        if module.layer_idx in (1, 10, 20):
            seen[module.layer_idx] = (q.float().clone(), k.float().clone())
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    from transformers import AttentionInterface

    AttentionInterface.register("test_recorder", record)
    model.set_attn_implementation("test_recorder")
    with torch.inference_mode():
        model.model(ids)
    assert len(seen) == 3
    return seen
