"""What a selector is, and what may be asked of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import BlockLayout
from ..typing import SelectorLike
from .checks import check_selector
from .probes import softmax_scale


class Selector:
    """Chooses the keys of each head by looking at q and k.

    ``selector(q, k, is_causal=True, scale=None)`` returns a `BlockLayout` for ``(seqlen_q,
    seqlen_kv)``; ``a | b`` selects what either selects. A subclass is a frozen dataclass that
    defines ``__call__``. What it keeps between calls is in a `lineage.Memory`, and `for_layer`
    gives a selector without it.

    Attributes:
        is_dense: whether every call selects all keys, so that any other way of computing dense
            attention serves it as well. Default False.

    Example:
        >>> class EveryOtherHead(Selector):
        ...     def __call__(self, q, k, *, is_causal=True, scale=None):
        ...         windows = torch.arange(q.shape[1]) % 2 * 64 - 1  # -1 is no limit
        ...         return BlockLayout.sink_window((q.shape[2], k.shape[2]), window=windows)
        >>> EveryOtherHead()(torch.randn(1, 2, 256, 64), torch.randn(1, 2, 256, 64)).window
        tensor([-1, 63], dtype=torch.int32)
    """

    is_dense: ClassVar[bool] = False

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        """The layout for ``q [B, H, Sq, D]`` and ``k [B, Hkv, Skv, D]``; scale as in
        `sparse_attention`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    def for_layer(self, layer: int | None) -> SelectorLike:
        """The selector of one attention layer: by default this one.

        A selector that keeps something between calls returns an equal one that has kept nothing
        yet, as keys are those of a layer.

        Args:
            layer: the index of the layer, or None if it has none.

        Returns:
            Selector: equal to this one.

        Example:
            >>> quest = Quest(budget=64)
            >>> quest.for_layer(3) == quest, quest.for_layer(3) is quest
            (True, False)
        """
        return self

    def __or__(self, other: SelectorLike) -> Union:
        return _union(self, other) if _is_selector(other) else NotImplemented

    def __ror__(self, other: SelectorLike) -> Union:
        return _union(other, self) if _is_selector(other) else NotImplemented


class Refreshable(Protocol):
    """A selector that chooses in stages, whose selection can be kept for later rows: what
    `MaskCache` asks of one. A call is all stages, one after the other::

        kept = None
        for stage in range(num_stages):
            kept = prune(stage, kept, q, k, is_causal=is_causal, scale=scale)
        return layout(kept, q, k)

    Attributes:
        margin: the last keys of the window that are searched too, so many of them: as many rows may
            follow before the first key leaves the window that was never searched.
        num_stages: number of stages, at least 1.
    """

    @property
    def margin(self) -> int: ...

    @property
    def num_stages(self) -> int: ...

    def prune(
        self,
        stage: int,
        kept: Any,
        q: Tensor,
        k: Tensor,
        *,
        is_causal: bool = True,
        scale: float | None = None,
    ) -> Any:
        """What a stage keeps, in a form of its own; nothing writes to it.

        Args:
            stage: its number, from 0.
            kept: what the stage before it has kept; None for the first one.
            q, k, is_causal, scale: as in a call.
        """

    def layout(self, kept: Any, q: Tensor, k: Tensor) -> BlockLayout:
        """The layout of what the last stage has kept. Later rows may have more keys."""
        ...

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout: ...


def for_layer(selector: SelectorLike, layer: int | None) -> SelectorLike:
    """`Selector.for_layer` of a selector; a callable without that method as it is."""
    method = getattr(selector, "for_layer", None)
    return selector if method is None else method(layer)


def is_dense(selector: SelectorLike) -> bool:
    """`Selector.is_dense` of a selector; False for a callable without that attribute."""
    return getattr(selector, "is_dense", False)


def _is_selector(value: object) -> bool:
    """Whether `value` can be called as a selector: a class is none."""
    return callable(value) and not isinstance(value, type)


@dataclass(frozen=True)
class Union(Selector):
    """Every key that any of several selectors selects; written ``a | b``.

    Args:
        selectors: the selectors, at least one.

    Raises:
        TypeError: if `selectors` is not a tuple of selectors.
        ValueError: if it is empty.

    Example:
        >>> either = BlockTopK(top_k=8) | SinkWindow(sink=4, window=64)
        >>> len(either.selectors)
        2
    """

    selectors: tuple[SelectorLike, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.selectors, tuple | list):
            raise TypeError(f"selectors must be a tuple, got {type(self.selectors).__name__}")
        if not self.selectors:
            raise ValueError("selectors must hold at least one selector")
        for i, selector in enumerate(self.selectors):
            check_selector(f"selectors[{i}]", selector)

    @property
    def alternatives(self) -> tuple[SelectorLike, ...]:
        """The same: ``a | b | c`` is one union of three."""
        return self.selectors

    def for_layer(self, layer: int | None) -> Union:
        own = tuple(for_layer(x, layer) for x in self.selectors)
        return self if same(own, self.selectors) else Union(own)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        first, *others = self.selectors
        scale = softmax_scale(q, scale)
        layout = first(q, k, is_causal=is_causal, scale=scale)
        for other in others:
            layout = layout | other(q, k, is_causal=is_causal, scale=scale)
        return layout


def _union(*selectors: SelectorLike) -> Union:
    return Union(tuple(x for one in selectors for x in getattr(one, "alternatives", (one,))))


def same(own: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    """Whether both hold the same objects."""
    return all(a is b for a, b in zip(own, before, strict=True))


def seqlens(q: Tensor, k: Tensor) -> tuple[int, int]:
    """``(seqlen_q, seqlen_kv)`` of q and k."""
    return q.shape[2], k.shape[2]


def pool_mean(x: Tensor, block: int) -> Tensor:
    """Mean over consecutive blocks of rows: ``[B, H, S, D]`` to float32 ``[B, H, ceil(S / block),
    D]``; a short last block counts its rows only.
    """
    seqlen = x.shape[2]
    if torch.compiler.is_compiling():  # one graph for all lengths
        sums = pad(x.float(), (0, 0, 0, -seqlen % block)).unflatten(2, (-1, block)).sum(3)
        stops = (torch.arange(sums.shape[2], device=x.device) + 1) * block
        return sums / (block - (stops - seqlen).clamp(min=0))[:, None]
    whole = seqlen // block
    pooled = x[:, :, : whole * block].unflatten(2, (whole, block)).mean(3, dtype=torch.float32)
    if whole * block == seqlen:
        return pooled
    tail = x[:, :, whole * block :].mean(2, keepdim=True, dtype=torch.float32)
    return torch.cat([pooled, tail], 2)


def block_rows(
    seqlens: tuple[int, int], block_size: int, start: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions of the first and of the last row of the query blocks ``start .. start + count``,
    as far as they exist: two int64 ``[count, 1]``.
    """
    seqlen_q, seqlen_kv = seqlens
    stop = min(start + count, -(-seqlen_q // block_size))
    first = torch.arange(start, stop, device=device)[:, None] * block_size
    last = (first + block_size - 1).clamp(max=seqlen_q - 1)
    return first + seqlen_kv - seqlen_q, last + seqlen_kv - seqlen_q


def chunk_starts(total: int, each: int) -> range | tuple[int]:
    """Where chunks of `each` begin. A single one is no range, which would tie a compiled graph to
    `total`.
    """
    return range(0, total, each) if total > each else (0,)
