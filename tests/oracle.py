"""What results are measured against: dense attention (of `bench.lib.oracle`) and literal loops; the
backends and dtypes that must run.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import sparse_attn
from bench.lib.oracle import assert_accurate, dense_attention, rounding_noise  # noqa: F401
from sparse_attn import BlockLayout

# A backend named here must run: if it is not available its tests fail, they do not skip.
BACKENDS = os.environ.get("SPARSE_ATTN_TEST_BACKENDS", "reference,cpu,triton").split(",")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# `pytest -m gpu` selects what runs on a GPU.
GPU = torch.cuda.is_available()


def is_interpreted(backend: str) -> bool:
    """Whether a backend runs in an interpreter, 4 ms for a tile: fewer and smaller cases will
    do.
    """
    return backend == "triton" and not GPU


def shorter(backend: str, seqlens: tuple[int, int]) -> tuple[int, int]:
    """Half as many rows and keys for an interpreted backend."""
    return tuple(-(-n // 2) for n in seqlens) if is_interpreted(backend) else seqlens


def backends(condition=lambda backend: True):
    """The backends that must run and meet a condition, those on a GPU being marked."""
    return [pytest.param(b, marks=_marks(b)) for b in BACKENDS if condition(b)]


# Ops that take the CPU tensors of a test as they are.
CPU_SUFFIXES = ("", "_reference") if GPU else ("", "_reference", "_triton")


def cases(dtypes_of_interpreted=DTYPES[:1]):
    """(backend, dtype) pairs that must be served."""
    pairs = [
        pytest.param(b, d, marks=_marks(b))
        for b in BACKENDS
        for d in (dtypes_of_interpreted if is_interpreted(b) else DTYPES)
    ]
    return pairs + ([("reference", torch.float64)] if "reference" in BACKENDS else [])


def _marks(backend: str):
    return pytest.mark.gpu if backend == "triton" and GPU else ()


def _moved(x, device: str):
    """Tensors and layouts on another device; anything else as it is."""
    if isinstance(x, Tensor):
        return x.to(device)
    return x.to(device) if isinstance(x, BlockLayout) else x


def on_device(function, backend: str, *args, **kwargs):
    """``function(*args, backend=backend, **kwargs)`` on the device of the backend; the tensors come
    from the CPU and go back to it.
    """
    device = "cuda" if backend == "triton" and GPU else "cpu"
    args = [_moved(x, device) for x in args]
    kwargs = {name: _moved(x, device) for name, x in kwargs.items()}
    result = function(*args, backend=backend, **kwargs)
    return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()


def sparse_attention(*args, backend: str, **kwargs):
    """`sparse_attn.sparse_attention` on the backend's device."""
    return on_device(sparse_attn.sparse_attention, backend, *args, **kwargs)


def short_id(value: object) -> str:
    """The id of a parameter: the keys of a dict, which may hold random tensors."""
    return "-".join(value) if isinstance(value, dict) else str(value)[:30]


def literal_mask(
    layout: BlockLayout, *, is_causal: bool, batch: int = 0, head: int = 0, num_heads: int = 1
):
    """The token mask of one head by the definition, one (row, key) pair at a time."""
    seqlen_q, seqlen_kv = layout.seqlens
    block_q, block_kv = layout.block_size

    def entry(x: Tensor, head_dim: int) -> Tensor:
        if head_dim == 1:
            x = x[batch if x.shape[0] > 1 else 0]
        return x[head // (num_heads // x.shape[0])]

    def listed(counts: Tensor | None, indices: Tensor | None, row: int) -> set[int]:
        if counts is None:
            return set()
        return set(entry(indices, 1)[row][: int(entry(counts, 1)[row])].tolist())

    sink, window = int(entry(layout.sink, 0)), int(entry(layout.window, 0))
    mask = torch.zeros(seqlen_q, seqlen_kv, dtype=torch.bool)
    for i in range(seqlen_q):
        p = i + seqlen_kv - seqlen_q
        m = i // block_q
        blocks = listed(layout.kv_num_blocks, layout.kv_indices, m)
        columns = listed(layout.num_columns, layout.column_indices, m // layout.column_group)
        for j in range(seqlen_kv):
            distance = p - j if is_causal else abs(p - j)
            seen = j < sink or window == -1 or distance < window
            seen = seen or j // block_kv in blocks or j in columns
            mask[i, j] = seen and (j <= p or not is_causal)
    return mask


def random_layout(
    seqlens: tuple[int, int],
    *,
    batch: int = 1,
    heads: int = 1,
    block_size: tuple[int, int] = (16, 16),
    keep: float = 0.3,
    sink: int = 0,
    window: int = 0,
    columns: int = 0,
    column_group: int = 1,
) -> BlockLayout:
    """Random blocks and up to `columns` random columns in each row, with garbage behind the
    counts.
    """
    num_q, num_kv = (-(-s // b) for s, b in zip(seqlens, block_size, strict=True))
    mask = torch.rand(batch, heads, num_q, num_kv) < keep
    layout = BlockLayout.from_dense(mask, block_size=block_size, seqlens=seqlens)
    garbage = torch.arange(layout.kv_indices.shape[-1]) >= layout.kv_num_blocks[..., None]
    fields = {
        "seqlens": tuple(seqlens),
        "sink": torch.randint(0, sink + 1, (heads,), dtype=torch.int32),
        "window": torch.randint(0, window + 1, (heads,), dtype=torch.int32),
        "block_size": block_size,
        "kv_num_blocks": layout.kv_num_blocks,
        "kv_indices": layout.kv_indices.masked_fill(garbage, -7),
        "column_group": column_group,
    }
    if columns:
        groups = -(-num_q // column_group)
        width = min(columns, seqlens[1])
        picked = torch.rand(batch, heads, groups, seqlens[1]).topk(width).indices.sort().values
        fields["column_indices"] = picked.int()
        fields["num_columns"] = torch.randint(0, width + 1, picked.shape[:3], dtype=torch.int32)
    return BlockLayout(**fields)
