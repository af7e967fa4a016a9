"""Which dense calls torch's own kernel does faster than ours."""

from __future__ import annotations

from torch import Tensor

# What a call itself costs outweighs what the kernels gain below so many multiplications of q and k.
# `python -m bench.drop_in` measures it; tests/test_sdpa.py compares it with what was measured.
FEWEST_PRODUCTS = 2**20


def torch_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether torch's dense attention of ``q [B, H, Sq, D]`` and ``k [B, Hkv, Skv, D]`` on a CPU
    takes less time than that of the C++ kernels.
    """
    batch, heads, rows, head_dim = q.shape
    return batch * heads * rows * k.shape[2] * head_dim < FEWEST_PRODUCTS
