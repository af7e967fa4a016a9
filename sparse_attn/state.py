"""Joining partial attention states."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(*states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of keys, exactly: ``out = sum_n exp(lse_n - lse) * out_n``.

    With ``lse = log(sum_n exp(lse_n))`` this equals attention over the union of the sets, whatever
    split them: a long cache, a chunked prefill, several devices. Sink logits belong in exactly one
    of the parts.

    Args:
        *states: one or more pairs ``(out [B, H, S, Dv], lse [B, H, S])`` as returned by
            ``sparse_attention(..., return_lse=True)``; lse is a natural logarithm, -inf for an
            empty row.

    Returns:
        tuple[Tensor, Tensor]: ``(out, lse)`` with the shapes and dtypes of the first state;
        differentiable. A row that is empty in every part gives ``out = 0`` and ``lse = -inf``.

    Raises:
        ValueError: if no state is given or shapes differ.

    Example:
        >>> from sparse_attn import selectors, sparse_attention
        >>> q, k, v = torch.randn(3, 1, 2, 8, 16).unbind(0)
        >>> def attend(k, v):
        ...     dense = selectors.Dense()
        ...     return sparse_attention(q, k, v, dense, is_causal=False, return_lse=True)
        >>> first, second = attend(k[:, :, :5], v[:, :, :5]), attend(k[:, :, 5:], v[:, :, 5:])
        >>> out, lse = merge_states(first, second)
        >>> torch.testing.assert_close(out, attend(k, v)[0])
    """
    if not states:
        raise ValueError("merge_states needs at least one (out, lse) pair")
    for i, state in enumerate(states):
        pair = isinstance(state, tuple | list) and len(state) == 2
        if not pair or not all(isinstance(x, Tensor) for x in state):
            raise TypeError(f"states[{i}] must be a pair of tensors (out, lse), got {state!r:.100}")
    out, lse = states[0]
    for other, other_lse in states:
        if other.shape != out.shape or other_lse.shape != lse.shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"states must agree in shape: out {list(other.shape)}, lse {list(other_lse.shape)} "
                f"against out {list(out.shape)}, lse {list(lse.shape)}"
            )
    lses = torch.stack([x for _, x in states])
    peak = lses.detach().amax(0)
    peak = torch.where(peak == -torch.inf, 0, peak)
    weights = torch.exp(lses - peak)
    total = weights.sum(0)
    empty = total == 0
    total = torch.where(empty, 1, total)
    mixed = sum(w[..., None] * x.to(w.dtype) for w, (x, _) in zip(weights, states, strict=True))
    merged = mixed / total[..., None]
    merged_lse = torch.where(empty, -torch.inf, peak + torch.log(total))
    merged_lse = torch.where(peak == torch.inf, torch.inf, merged_lse)  # a score is inf
    return merged.to(out.dtype), merged_lse
