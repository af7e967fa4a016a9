"""Memory stays proportional to what is kept: nothing of the order of seqlen x seqlen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparse_attn  # noqa: F401 - defines the ops

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)

SEQLEN = 65536  # squared: 4 GiB of bools
LIMIT = 64 * 2**20
# The reference walks over every pair, in chunks: fewer tokens, and smaller chunks.
NATIVE_BACKWARD = torch._C._dispatch_has_kernel_for_dispatch_key(
    "sparse_attn::attention_backward", "CPU"
)
BACKWARD_SEQLEN = SEQLEN if NATIVE_BACKWARD else 8192
BACKWARD_LIMIT = LIMIT if NATIVE_BACKWARD else BACKWARD_SEQLEN**2 // 2

SET_UP = """
import json, torch
from bench.lib.memory import peak_growth
from sparse_attn import BlockLayout, reference, selectors, sparse_attention

def inputs(n):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, n, 16).bfloat16().unbind(0)
    picked = (torch.rand(1, 1, n // 64, 8) * torch.arange(1, n // 64 + 1)[:, None]).int()
    blocks = BlockLayout.from_topk(picked, block_size=(64, 64), seqlens=(n, n))
    return q, k, v, picked, blocks, BlockLayout.sink_window((n, n), sink=16, window=256)

top_k, sink_window = selectors.BlockTopK(top_k=8), selectors.SinkWindow(sink=16, window=256)
def backward(n):
    q, k, v, picked, blocks, window = inputs(n)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sparse_attention(*leaves, blocks | window)
    dout = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout)

for _ in range(2):
    peak_growth(backward(256))  # loads what it needs
many = torch.randint(0, 2**14 - 7, (1, 1, 2**14, 16))
growth = {}
"""

CALLS = {
    "an array of seqlen squared": "torch.ones(n // 4, n // 4, dtype=torch.bool).any()",
    "forward": "sparse_attention(q, k, v, blocks | window)",
    "forward through a selector": "sparse_attention(q, k, v, sink_window | top_k)",
    "SinkWindow": "sink_window(q, k)",
    "BlockTopK": "top_k(q, k)",
    "union": "(sink_window | top_k | selectors.BlockTopK(top_k=4, block_size=128))(q, k)",
    "from_topk": "BlockLayout.from_topk(picked, block_size=(64, 64), seqlens=(n, n))",
    "a union at 1M tokens": "BlockLayout.from_topk(many, block_size=(64, 64), seqlens=(2**20,) * 2)"
    " | BlockLayout.from_topk(many + 7, block_size=(64, 64), seqlens=(2**20,) * 2)",
    "density": "(blocks | window).density()",
    "transposed": "blocks.transposed",
}

BACKWARD = f"""
reference._CHUNK_ELEMENTS = 2**18
growth["backward"] = peak_growth(backward({BACKWARD_SEQLEN}))[1]
print(json.dumps(growth))
"""


@pytest.fixture(scope="module")
def growth():
    """Bytes by which a fresh process grew at most during each call."""
    steps = [SET_UP, f"n = {SEQLEN}", "q, k, v, picked, blocks, window = inputs(n)"]
    steps += [f"growth[{x!r}] = peak_growth(lambda: {call})[1]" for x, call in CALLS.items()]
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", "\n".join([*steps, BACKWARD])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_measure_sees_an_array_of_seqlen_squared(growth):
    # Linux counts resident pages in batches, so its figures are some dozens of pages off.
    assert growth["an array of seqlen squared"] >= 0.99 * (SEQLEN // 4) ** 2


@pytest.mark.parametrize("name", list(CALLS)[1:])
def test_no_array_of_seqlen_squared(growth, name):
    assert growth[name] < LIMIT


def test_no_array_of_seqlen_squared_in_backward(growth):
    assert growth["backward"] < BACKWARD_LIMIT
