"""Which dense calls torch's own kernel does faster than ours."""

from __future__ import annotations

import torch
from torch import Tensor

# Below so many multiplications of numbers of q and k, what a call itself costs outweighs what the
# kernels gain: of calls with one row of queries (decoding), and of others. Measured with AVX2 by
# `python -m bench.drop_in`; tests/test_sdpa.py compares it with what was measured.
FEWEST_PRODUCTS = {
    torch.float32: (2**22, 2**23),
    torch.bfloat16: (2**16, 2**23),
    torch.float16: (2**16, 2**20),
}


def torch_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether torch's dense attention of ``q [B, H, Sq, D]`` and ``k [B, Hkv, Skv, D]`` on a CPU
    takes less time than that of the C++ kernels.
    """
    batch, heads, rows, head_dim = q.shape
    of_one_row, of_more = FEWEST_PRODUCTS.get(q.dtype, (0, 0))
    fewest = of_one_row if rows == 1 else of_more
    return batch * heads * rows * k.shape[2] * head_dim < fewest
