"""What every result is measured against: float64 dense attention with an explicit mask, and literal
loops.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import sparse_attn
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


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Eager attention in the dtype of its inputs: ``(out, lse)``; rows that see nothing give 0 and
    -inf.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.mT) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    peak = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    safe = torch.where(empty, 1, total)
    probs = (weights / safe)[..., : k.shape[2]]
    lse = torch.where(empty, -torch.inf, peak + torch.log(safe)).squeeze(-1)
    return probs @ v, lse


def rounding_noise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dout: Tensor,
    dlse: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> dict[str, Tensor]:
    """What one rounding of lse to float32, and one of every dp and delta, can change in each
    gradient: the gradients' formulas with absolute values in place of differences.

    Eager attention never rounds a logarithm of its sums, and where a row sees one key it cancels
    dp and delta exactly; a kernel that gets ``(out, lse)`` can do neither.
    """
    q, k, v, dout, dlse = (x.detach().double() for x in (q, k, v, dout, dlse))
    group = q.shape[1] // k.shape[1]
    every_key = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:3], -1)
    probs, lse = dense_attention(q, k, every_key, mask, scale=scale, softcap=softcap, sinks=sinks)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    delta = (dout * (probs @ v)).abs().sum(-1) + dlse.abs()
    lse = torch.where(torch.isinf(lse), 0, lse)
    roundings = 2.0**-24 * (1 + lse.abs())
    probs = probs * roundings[..., None]
    ds = probs * (dout.abs() @ v.abs().mT + delta[..., None])
    ds = ds * (q.shape[-1] ** -0.5 if scale is None else abs(scale))
    dk, dv = ds.mT @ q.abs(), probs.mT @ dout.abs()
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    noise = {"dq": ds @ k.abs(), "dk": dk, "dv": dv}
    if sinks is not None:
        weight = torch.exp(sinks.double()[:, None] - lse) * roundings
        noise["dsinks"] = (weight * delta).sum((0, 2))
    return noise


def short_id(value: object) -> str:
    """The id of a parameter: the keys of a dict, which may hold random tensors."""
    return "-".join(value) if isinstance(value, dict) else str(value)[:30]


def assert_accurate(
    ours: Tensor, exact: Tensor, eager: Tensor, name: str = "out", noise: Tensor | None = None
) -> None:
    """Error at most twice that of eager attention in the same dtype, in the maximum and in the
    mean.

    Two units in the last place of the largest value are granted on top, because eager can be exact
    by chance (64 in float64, where eager is the exact result itself), and the `noise` that the
    interface of gradients implies, see `rounding_noise`.
    """
    assert ours.dtype == eager.dtype, (name, ours.dtype, eager.dtype)
    assert ours.shape == exact.shape, (name, ours.shape, exact.shape)
    ulps = (64 if ours.dtype == torch.float64 else 2) * torch.finfo(ours.dtype).eps
    infinite = torch.isinf(exact)
    assert torch.equal(torch.isinf(ours), infinite), f"{name}: infinities differ"
    if ours.numel() == 0:
        return
    ours, exact, eager = (torch.where(infinite, 0, x.double()) for x in (ours, exact, eager))
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    error, allowed = (ours - exact).abs(), (eager - exact).abs()
    slack = ulps * exact.abs().max()
    noise = torch.zeros(1) if noise is None else noise
    limit = 2 * allowed.max() + slack + noise.max()
    assert error.max() <= limit, f"{name}: max error {error.max():.3g} > {limit:.3g}"
    limit = 2 * allowed.mean() + slack / 4 + noise.mean()
    assert error.mean() <= limit, f"{name}: mean error {error.mean():.3g} > {limit:.3g}"


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
