"""The ops on Triton, which import their kernels, and Triton, at the first call."""

from __future__ import annotations

from torch import Tensor


def attention(*args, **options) -> tuple[Tensor, Tensor]:
    """`sparse_attn::attention`."""
    from . import ops

    return ops.attention(*args, **options)


def attention_backward(*args) -> tuple[Tensor, ...]:
    """`sparse_attn::attention_backward`."""
    from . import ops

    return ops.attention_backward(*args)


def attention_varlen(*args) -> tuple[Tensor, Tensor]:
    """`sparse_attn::attention_varlen`."""
    from . import ops

    return ops.attention_varlen(*args)


def hip_select(*args) -> tuple[Tensor, Tensor]:
    """`sparse_attn::hip_select`."""
    from . import hip

    return hip.select(*args)


def infinite_hip_scores(
    queries: Tensor, k: Tensor, left: Tensor, size: int, end: int, limits: Tensor
) -> Tensor:
    """The scores of a stage of `selectors.InfiniteHiP`."""
    from . import infinite_hip

    return infinite_hip.scores(queries, k, left, size, end, limits)
