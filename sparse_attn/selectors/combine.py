"""Selectors made of others: by head, and by prefill and decoding. `base` has their union."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..layout import BlockLayout
from ..layout.algebra import assemble_heads
from ..typing import SelectorLike
from .base import Selector, for_layer, same
from .checks import as_int, check_selector, count_fields, selector_fields
from .lineage import take_heads
from .probes import softmax_scale


@dataclass(frozen=True)
class PerHead(Selector):
    """A selector of its own for each query head, e.g. dense retrieval heads among streaming ones.

    Args:
        selectors: mapping from a query head, or a tuple of query heads, to its selector.
        default: the selector of heads not named, or None if every head is. Default None.

    Raises:
        TypeError: if `selectors` is not a mapping to selectors.
        ValueError: if a key names no head; when called, if a head is out of range, named twice, or
            has no selector.

    Example:
        >>> retrieval = PerHead({(0, 3): Dense()}, default=SinkWindow(sink=16, window=256))
    """

    selectors: Mapping[int | tuple[int, ...], SelectorLike]
    default: SelectorLike | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.selectors, Mapping):
            raise TypeError(f"selectors must be a mapping, got {type(self.selectors).__name__}")
        for heads, selector in self.selectors.items():
            check_selector(f"selectors[{heads!r}]", selector)
            _named_heads(heads)
        if self.default is not None:
            check_selector("default", self.default)

    def for_layer(self, layer: int | None) -> PerHead:
        default = None if self.default is None else for_layer(self.default, layer)
        own = {heads: for_layer(x, layer) for heads, x in self.selectors.items()}
        before = (*self.selectors.values(), self.default)
        return self if same((*own.values(), default), before) else PerHead(own, default)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
        scale = softmax_scale(q, scale)
        layouts, heads = [], []
        for named, selector in self._assignments(num_heads):
            queries, keys = q[:, named], take_heads(k, [h // group for h in named])
            layouts.append(selector(queries, keys, is_causal=is_causal, scale=scale))
            heads.append(named)
        return assemble_heads(layouts, heads, num_heads)

    def _assignments(self, num_heads: int) -> list[tuple[list[int], SelectorLike]]:
        """(heads, selector) pairs that together name each head once."""
        pairs = [(_named_heads(heads), s) for heads, s in self.selectors.items()]
        named = [h for heads, _ in pairs for h in heads]
        for h in named:
            if not 0 <= h < num_heads:
                raise ValueError(f"selectors names head {h}, but there are {num_heads} query heads")
        if len(set(named)) < len(named):
            raise ValueError(f"selectors names a head twice: {sorted(named)}")
        rest = [h for h in range(num_heads) if h not in set(named)]
        if rest:
            if self.default is None:
                raise ValueError(f"heads {rest} have no selector; name them or give a default")
            pairs.append((rest, self.default))
        return pairs


def _named_heads(key: int | tuple[int, ...]) -> list[int]:
    """The heads that a key of `PerHead` names."""
    heads = key if isinstance(key, tuple | range | frozenset) else (key,)
    return [as_int("a head that selectors names", h) for h in heads]


@dataclass(frozen=True)
class PrefillDecode(Selector):
    """One selector for prompts and another for the few rows of a decoding step.

    Args:
        prefill: selector for calls with more than `decode_rows` query rows.
        decode: selector for all other calls.
        decode_rows: most query rows of a decoding step, at least 1. Default 16.

    Raises:
        TypeError: if `prefill` or `decode` is not a selector.
        ValueError: if `decode_rows` is out of range.

    Example:
        >>> both = PrefillDecode(prefill=SinkWindow(sink=64, window=4096), decode=Dense())
    """

    prefill: SelectorLike
    decode: SelectorLike
    decode_rows: int = 16

    def __post_init__(self) -> None:
        selector_fields(self, "prefill", "decode")
        count_fields(self, decode_rows=1)

    def for_layer(self, layer: int | None) -> PrefillDecode:
        prefill, decode = for_layer(self.prefill, layer), for_layer(self.decode, layer)
        if same((prefill, decode), (self.prefill, self.decode)):
            return self
        return replace(self, prefill=prefill, decode=decode)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        selector = self.decode if q.shape[2] <= self.decode_rows else self.prefill
        return selector(q, k, is_causal=is_causal, scale=softmax_scale(q, scale))
