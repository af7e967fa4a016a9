"""Pages whose bounds promise large products."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import bool_fields, count_fields, int_fields
from .choose import top_blocks
from .lineage import Memory
from .probes import products
from .scored import BlockScores, QueryBlocks


@dataclass(frozen=True)
class Quest(BlockScores):
    """For each row and head the pages of keys that may hold the greatest products, by the bounds of
    each page (Quest, arXiv 2406.10774), for decoding.

    With ``low`` and ``high`` the least and the greatest value of each channel in a page of
    `page_size` keys, a page scores::

        sum over channels c of max(q[c] * low[c], q[c] * high[c])

    which no product of q with a key of the page exceeds. A row sees the page that it stands in and,
    of the whole pages before it (of all others if not causal), the best; together ``budget //
    page_size``.

    The bounds of whole pages are kept from one call to the next, and those of keys that are proven
    to be the same are used again: keys in one tensor that nobody has written to, in a `KeyBuffer`,
    or in transformers' caches in a patched model. All other keys are read anew, so the choice is
    always that of a new object. The bounds take ``2 / page_size`` of the memory of k. They are of
    use to one attention layer: give each layer an object of its own, as `patch` does.

    The paper keeps the first two layers dense, and prefill: ``patch(model, PrefillDecode(Dense(),
    Quest()), exclude_layers=[0, 1])``. Rows choose one by one, so for a prompt the time of choosing
    is quadratic.

    Args:
        budget: number of keys, at least `page_size`. Default 1024.
        page_size: keys of a page. Default 16.
        shared: whether the query heads of a KV head share their pages: the sum of their scores
            chooses. Default False.

    Raises:
        ValueError: if an argument is no number of its kind or out of range.

    Example:
        >>> k = torch.randn(1, 2, 300, 64)
        >>> layout = Quest(budget=64)(torch.randn(1, 8, 1, 64), k)
        >>> layout.kv_num_blocks.flatten().tolist()
        [4, 4, 4, 4, 4, 4, 4, 4]
    """

    budget: int = 1024
    page_size: int = 16
    shared: bool = False
    _memory: Memory = field(default_factory=Memory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        int_fields(self, page_size=1)
        count_fields(self, budget=self.page_size)
        bool_fields(self, "shared")

    @property
    def block_sizes(self) -> tuple[int, int]:
        return 1, self.page_size

    def prepare(self, q: Tensor, k: Tensor, *, is_causal: bool, scale: float) -> Any:
        q = -q.detach() if scale < 0 else q.detach()
        queries = torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)
        bounds = [self._whole_pages(k)]
        if not is_causal and k.shape[2] % self.page_size:
            tail = k[:, :, k.shape[2] // self.page_size * self.page_size :]
            bounds.append(_page_bounds(tail, tail.shape[2]))
        return queries, bounds

    def scores(self, prepared: Any, blocks: QueryBlocks) -> Tensor:
        queries, bounds = prepared
        some = queries[:, :, blocks.numbers]
        scores = torch.cat([products(some, x) for x in bounds], -1).float()
        if self.shared:
            scores = scores.unflatten(1, (bounds[0].shape[1], -1)).sum(2)
        scores = pad(scores, (0, len(blocks.first_key) - scores.shape[3]))
        return scores.masked_fill_(blocks.own(), torch.inf)  # the page that the row stands in

    def choose(self, scores: Tensor, forced: Tensor | None) -> tuple[Tensor, Tensor]:
        return top_blocks(scores, self.budget // self.page_size, forced)

    def for_layer(self, layer: int | None) -> Quest:
        return replace(self)

    def _whole_pages(self, k: Tensor) -> Tensor:
        """The bounds of all whole pages of k, ``[B, Hkv, pages, 2 * D]``; known ones are reused."""
        seqlen = k.shape[2] // self.page_size * self.page_size
        if torch.compiler.is_compiling():
            return _page_bounds(k[:, :, :seqlen], self.page_size)
        bounds, known = self._memory.value, self._memory.known(k) // self.page_size
        if known == 0 or (known, seqlen) != (bounds.shape[2], known * self.page_size):
            new = k.detach()[:, :, known * self.page_size : seqlen]
            parts = [bounds[:, :, :known]] if known else []
            bounds = torch.cat([*parts, _page_bounds(new, self.page_size)], 2)
        self._memory.keep(k, bounds)
        return bounds


def _page_bounds(k: Tensor, page_size: int) -> Tensor:
    """The greatest and the least value of each channel in each page: ``[B, H, S, D]`` to ``[B, H,
    S / page_size, 2 * D]``.
    """
    pages = k.unflatten(2, (-1, page_size))
    return torch.cat([pages.amax(3), pages.amin(3)], -1)
