"""What a selector is, and how selectors combine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import BlockLayout
from ..layout.algebra import assemble_heads
from .checks import as_int, check_selector, count_fields, selector_fields
from .lineage import take_heads


class Selector:
    """Chooses the keys of each head by looking at q and k.

    ``selector(q, k, is_causal=True, scale=None)`` returns a `BlockLayout` for ``(seqlen_q,
    seqlen_kv)``; ``a | b`` selects what either selects. A subclass is a frozen dataclass that
    defines ``__call__``. What it keeps between calls is in a `lineage.Memory`, and `fresh` gives a
    selector without it.

    Example:
        >>> class EvenHeads(Selector):
        ...     def __call__(self, q, k, *, is_causal=True, scale=None):
        ...         windows = torch.arange(q.shape[1]) % 2 * 64 - 1  # -1 is no limit
        ...         return BlockLayout.sink_window((q.shape[2], k.shape[2]), window=windows)
        >>> EvenHeads()(torch.randn(1, 2, 256, 64), torch.randn(1, 2, 256, 64)).window
        tensor([-1, 63], dtype=torch.int32)
    """

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        """The layout for ``q [B, H, Sq, D]`` and ``k [B, Hkv, Skv, D]``; scale as in
        `sparse_attention`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    def fresh(self) -> Selector:
        """The selector itself or, if it keeps something between calls, an equal one that has kept
        nothing yet; `patch` gives each layer its own.
        """
        return self

    def __or__(self, other: Selector) -> Union:
        if not isinstance(other, Selector):
            return NotImplemented
        mine = self.selectors if isinstance(self, Union) else (self,)
        return Union(mine + (other.selectors if isinstance(other, Union) else (other,)))


@dataclass(frozen=True)
class Union(Selector):
    """Every key that any of several selectors selects; written ``a | b``.

    Args:
        selectors: the selectors, at least one.

    Raises:
        TypeError, ValueError: if `selectors` is no tuple, empty, or holds something else.

    Example:
        >>> union = SinkWindow(sink=16, window=256) | BlockTopK(top_k=8)
        >>> len(union.selectors)
        2
    """

    selectors: tuple[Selector, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.selectors, tuple | list):
            raise TypeError(f"selectors must be a tuple, got {type(self.selectors).__name__}")
        if not self.selectors:
            raise ValueError("selectors must hold at least one selector")
        for i, selector in enumerate(self.selectors):
            check_selector(f"selectors[{i}]", selector)

    def fresh(self) -> Union:
        own = tuple(fresh_copy(x) for x in self.selectors)
        return self if _same(own, self.selectors) else Union(own)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        first, *others = self.selectors
        layout = first(q, k, is_causal=is_causal, scale=scale)
        for other in others:
            layout = layout | other(q, k, is_causal=is_causal, scale=scale)
        return layout


@dataclass(frozen=True)
class PerHead(Selector):
    """A selector of its own for each query head, e.g. dense retrieval heads among streaming ones.

    Args:
        selectors: mapping from a query head, or a tuple of query heads, to its selector.
        default: the selector of heads not named, or None if every head is. Default None.

    Raises:
        ValueError: when called, if a head is out of range, named twice, or has no selector.

    Example:
        >>> retrieval = PerHead({(0, 3): Dense()}, default=SinkWindow(sink=16, window=256))
    """

    selectors: Mapping[int | tuple[int, ...], Selector]
    default: Selector | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.selectors, Mapping):
            raise TypeError(f"selectors must be a mapping, got {type(self.selectors).__name__}")
        for heads, selector in self.selectors.items():
            check_selector(f"selectors[{heads!r}]", selector)
            _named_heads(heads)
        if self.default is not None:
            check_selector("default", self.default)

    def fresh(self) -> PerHead:
        default = None if self.default is None else fresh_copy(self.default)
        own = {heads: fresh_copy(x) for heads, x in self.selectors.items()}
        before = (*self.selectors.values(), self.default)
        return self if _same((*own.values(), default), before) else PerHead(own, default)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
        layouts, heads = [], []
        for named, selector in self._assignments(num_heads):
            queries, keys = q[:, named], take_heads(k, [h // group for h in named])
            layouts.append(selector(queries, keys, is_causal=is_causal, scale=scale))
            heads.append(named)
        return assemble_heads(layouts, heads, num_heads)

    def _assignments(self, num_heads: int) -> list[tuple[list[int], Selector]]:
        """(heads, selector) pairs that together name each head once."""
        pairs = [(_named_heads(heads), s) for heads, s in self.selectors.items()]
        named = [h for heads, _ in pairs for h in heads]
        for h in named:
            if not 0 <= h < num_heads:
                raise ValueError(f"selectors names head {h}, but there are {num_heads} query heads")
        if len(set(named)) < len(named):
            raise ValueError(f"selectors names a head twice: {sorted(named)}")
        rest = [h for h in range(num_heads) if h not in set(named)]
        if rest and self.default is None:
            raise ValueError(f"heads {rest} have no selector; name them or give a default")
        return pairs + ([(rest, self.default)] if rest else [])


def _named_heads(key: int | tuple[int, ...]) -> list[int]:
    """The heads that a key of `PerHead` names."""
    heads = key if isinstance(key, tuple | range | frozenset) else (key,)
    return [as_int("a head that selectors names", h) for h in heads]


@dataclass(frozen=True)
class PrefillDecode(Selector):
    """One selector for prompts and another for the few rows of a decoding step.

    Args:
        prefill: selector for calls with more than `decode_rows` query rows.
        decode: selector for calls with fewer.
        decode_rows: most query rows of a decoding step. Default 16.

    Raises:
        TypeError, ValueError: if a selector is none, or `decode_rows` no int of at least 1.

    Example:
        >>> both = PrefillDecode(prefill=SinkWindow(sink=64, window=4096), decode=Dense())
    """

    prefill: Selector
    decode: Selector
    decode_rows: int = 16

    def __post_init__(self) -> None:
        selector_fields(self, "prefill", "decode")
        count_fields(self, decode_rows=1)

    def fresh(self) -> PrefillDecode:
        prefill, decode = fresh_copy(self.prefill), fresh_copy(self.decode)
        if _same((prefill, decode), (self.prefill, self.decode)):
            return self
        return replace(self, prefill=prefill, decode=decode)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        selector = self.decode if q.shape[2] <= self.decode_rows else self.prefill
        return selector(q, k, is_causal=is_causal, scale=scale)


def fresh_copy(selector: Any) -> Any:
    """`Selector.fresh` of a selector; any other callable as it is."""
    return selector.fresh() if isinstance(selector, Selector) else selector


def _same(own: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
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
