"""From scores of heads to selectors of layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import as_int, as_number, check_selector
from ..selectors import Dense, PerHead, SinkWindow
from ..typing import SelectorLike


def top_heads(scores: Tensor, share: float) -> Tensor:
    """The heads of greatest score, over all layers together.

    Args:
        scores: ``[layers, heads]``.
        share: of all heads, from 0 to 1; ``round(share * layers * heads)`` are taken, of equal ones
            the earlier.

    Returns:
        Tensor: bool ``[layers, heads]``.

    Raises:
        ValueError: if share is out of range.

    Example:
        >>> top_heads(torch.tensor([[0.1, 0.7], [0.9, 0.2]]), share=0.5)
        tensor([[False,  True],
                [ True, False]])
    """
    check_heads("scores", scores)
    share = as_number("share", share, 0, 1)
    return greatest(scores, round(share * scores.numel()))


def check_heads(name: str, value: Tensor) -> None:
    """Raises a TypeError or a ValueError unless `value` says something of heads: ``[layers,
    heads]``.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor [layers, heads], got {type(value).__name__}")
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(f"{name} must be [layers, heads], got {list(value.shape)}")


def greatest(scores: Tensor, count: int) -> Tensor:
    """Which are the `count` greatest of `scores`, of equal ones the earlier: bool."""
    order = scores.flatten().sort(descending=True, stable=True).indices
    best = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    best[order[:count]] = True
    return best.view(scores.shape)


def shared_by_groups(heads: Tensor, num_heads: int) -> Tensor:
    """What holds of KV heads, or of some of the query heads of each, as said of all query heads.

    Args:
        heads: bool ``[layers, n]``: of `num_heads` query heads, or of KV heads, a divisor of them.
        num_heads: number of query heads.

    Returns:
        Tensor: bool ``[layers, num_heads]``.

    Raises:
        ValueError: if n does not divide `num_heads`.

    Example:
        >>> shared_by_groups(torch.tensor([[True, False]]), num_heads=4)
        tensor([[ True,  True, False, False]])
    """
    check_heads("heads", heads)
    num_heads = as_int("num_heads", num_heads, 1)
    if num_heads % heads.shape[1]:
        raise ValueError(f"{heads.shape[1]} KV heads do not divide {num_heads} query heads")
    return heads.repeat_interleave(num_heads // heads.shape[1], 1)


def head_selectors(
    full: Tensor, *, retrieval: SelectorLike | None = None, streaming: SelectorLike | None = None
) -> dict[int, SelectorLike]:
    """Selectors for `patch`: one way of attending for retrieval heads, another for all others.

    Args:
        full: bool ``[layers, heads]``: which query heads are retrieval heads.
        retrieval: their selector. Default `Dense()`.
        streaming: that of the others. Default ``SinkWindow(sink=64, window=256)``, as in
            DuoAttention (arXiv 2410.10819).

    Returns:
        dict[int, SelectorLike]: one selector for each layer.

    Raises:
        TypeError, ValueError: if `full` is no bool ``[layers, heads]``, or a selector is none.

    Example:
        >>> from sparse_attn.retrieval import head_selectors
        >>> head_selectors(torch.tensor([[True, True], [False, True]]))
        {0: Dense(), 1: PerHead(selectors={(1,): Dense()}, default=SinkWindow(sink=64, window=256))}
    """
    check_heads("full", full)
    if full.dtype != torch.bool:
        raise ValueError(f"full must be bool [layers, heads], got {full.dtype}")
    for name, selector in (("retrieval", retrieval), ("streaming", streaming)):
        if selector is not None:
            check_selector(name, selector)
    retrieval = Dense() if retrieval is None else retrieval
    streaming = SinkWindow(sink=64, window=256) if streaming is None else streaming
    selectors: dict[int, SelectorLike] = {}
    for layer, row in enumerate(full):
        named = tuple(row.nonzero()[:, 0].tolist())
        if len(named) in (0, len(row)):
            selectors[layer] = retrieval if named else streaming
        else:
            selectors[layer] = PerHead({named: retrieval}, default=streaming)
    return selectors
