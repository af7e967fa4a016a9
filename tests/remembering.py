"""What selectors with a memory must equal: objects without one, and MaskCache's docstring."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import torch

from sparse_attn.selectors import (
    HiP,
    InfiniteHiP,
    MaskCache,
    PerHead,
    PrefillDecode,
    Quest,
    Selector,
    SinkWindow,
)

HIP = HiP(k=8, block_q=4, block_k=2, stride_q=1, sink=2, window=6, margin=3)
STAGES = InfiniteHiP((4, 2), (8, 4), (2, 1), block_q=4, sink=2, window=6, margin=3)


class Proof:
    """Counts the events after which nothing proves that keys are those of before."""

    events = 0

    @classmethod
    def lost(cls):
        cls.events += 1


class LiteralMaskCache(Selector):
    """MaskCache from its docstring; it keeps a copy of all keys, and is told what is proven."""

    def __init__(self, selector, refresh):
        self.selector, self.refresh, self.last = selector, refresh, None

    def for_layer(self, layer):
        return LiteralMaskCache(self.selector, self.refresh)

    def __call__(self, q, k, *, is_causal=True, scale=None):
        if q.shape[2] != 1 or not is_causal:
            self.last = None
            return self.selector(q, k, is_causal=is_causal, scale=scale)
        kind, n = (q.shape, q.dtype, scale), k.shape[2]
        before, self.last = self.last, (kind, Proof.events, k.clone())
        follows = (
            before is not None
            and n > 1
            and before[:2] == self.last[:2]
            and before[2].shape == k[:, :, :-1].shape
            and torch.equal(before[2], k[:, :, :-1])
        )
        if not follows:
            self.made, self.kept = {}, {}
        if isinstance(self.selector, HiP):
            if 0 not in self.made or n - self.made[0] >= self.refresh:
                self.made[0], self.kept[0] = n, self.selector(q, k, scale=scale)
            return replace(self.kept[0], seqlens=(1, n))
        intervals = self.refresh
        due = [i for i, r in enumerate(intervals) if i not in self.made or n - self.made[i] >= r]
        for i in range(due[0] if due else len(intervals), len(intervals)):
            before = self.kept[i - 1] if i else None
            self.made[i], self.kept[i] = n, self.selector.prune(i, before, q, k, scale=scale)
        return self.selector.layout(self.kept[len(intervals) - 1], q, k)


class FreshQuest(Selector):
    """Quest without a memory: a new object for every call."""

    def __init__(self, **sizes):
        self.sizes = sizes

    def __call__(self, q, k, **rest):
        return Quest(**self.sizes)(q, k, **rest)


def selectors(quest, mask_cache):
    """Selectors of every kind that have a memory somewhere, made of two kinds of parts."""
    window, one = SinkWindow(sink=1, window=3), quest(budget=8, page_size=4)
    return {
        "Quest": quest(budget=12, page_size=4),
        "shared Quest": quest(budget=8, page_size=3, shared=True),
        "MaskCache(HiP)": mask_cache(HIP, 3),
        "MaskCache(InfiniteHiP)": mask_cache(STAGES, (4, 2)),
        "Union": quest(budget=4, page_size=4) | mask_cache(HIP, 4),
        "PerHead": PerHead(
            {(0, 3): mask_cache(HIP, 2), 1: quest(budget=8, page_size=4)}, default=window
        ),
        "one object in a PerHead": PerHead({0: one, 3: one}, default=window),
        "PrefillDecode": PrefillDecode(quest(budget=8, page_size=4), mask_cache(HIP, 4), 2),
    }


@dataclass(frozen=True)
class Compared(Selector):
    """Selects by all of `selectors`, each of which has to agree with its oracle in every call."""

    remembering: dict = field(default_factory=lambda: selectors(Quest, MaskCache))
    literal: dict = field(default_factory=lambda: selectors(FreshQuest, LiteralMaskCache))
    calls: itertools.count = field(default_factory=itertools.count)

    def for_layer(self, layer):
        own = (
            {name: x.for_layer(layer) for name, x in y.items()}
            for y in (self.remembering, self.literal)
        )
        return Compared(*own, self.calls)

    def __call__(self, q, k, **rest):
        next(self.calls)
        for name, selector in self.remembering.items():
            layout, expected = selector(q, k, **rest), self.literal[name](q, k, **rest)
            assert same_lists(layout, expected), name
            assert layout.seqlens == (q.shape[2], k.shape[2]), name
            for x in layout.tensors().values():  # a caller may do so
                x.zero_()
        return SinkWindow(sink=2, window=5)(q, k, **rest)


def same_lists(layout, expected):
    """Whether two layouts are the same in every field."""
    ours, theirs = layout.tensors(), expected.tensors()
    return (
        ours.keys() == theirs.keys()
        and layout.block_size == expected.block_size
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )
