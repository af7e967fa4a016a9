"""Vertical lines and diagonals that the last rows of a prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layout import BlockLayout
from .base import Selector, seqlens
from .checks import count_fields, int_fields, refuse_not_causal
from .choose import blocks_at_distances
from .probes import last_rows_mass

_FIRST_KEYS, _NEAREST = 30, 100  # always among the keys, and among the distances


@dataclass(frozen=True)
class VerticalSlash(Selector):
    """For each head the keys and the distances that its last rows attend to most: the pattern of
    MInference (arXiv 2407.02490), for prefill.

    With ``P`` the causal softmax of the last `last_q` rows, a key scores the sum of its column of
    ``P``, a distance the sum of its diagonal; the first 30 keys and the 100 nearest distances, the
    nearest before the others, come first in any case. A row at position ``p`` sees the `vertical`
    best keys, one by one, and the keys ``p - d`` of the `slash` best distances ``d``, rounded
    outwards to blocks.

    Every row's keys are those that the *last* rows look for, so a selection depends on later
    tokens: right for a prompt, wrong for training and for perplexities.

    Args:
        vertical: number of keys, at least 30. Default 1000, the paper's for heads without a
            setting of their own.
        slash: number of distances, at least 50. Default 6096, the same.
        last_q: number of rows that choose. Default 64.
        block_size: rows of a query block and keys of a key block. Default 64.

    Raises:
        ValueError: if an argument is no number of its kind or out of range; when called with
            ``is_causal=False``.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 512, 64).unbind(0)
        >>> layout = VerticalSlash(vertical=32, slash=128)(q, k)
    """

    vertical: int = 1000
    slash: int = 6096
    last_q: int = 64
    block_size: int = 64

    def __post_init__(self) -> None:
        count_fields(self, vertical=30, slash=50, last_q=1)
        int_fields(self, block_size=1)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        refuse_not_causal(self, is_causal)
        base = BlockLayout.sink_window(seqlens(q, k), device=q.device)
        if k.shape[2] == 0 or q.shape[2] == 0:
            return base
        by_key, by_distance = last_rows_mass(q, k, self.last_q, scale)
        by_key[..., :_FIRST_KEYS] = torch.inf
        nearest = torch.arange(min(_NEAREST, k.shape[2]), device=q.device)
        by_distance[..., :_NEAREST] = 2.0 * _NEAREST + self.last_q - nearest  # above any sum
        keys = by_key.topk(min(self.vertical, k.shape[2])).indices
        distances = by_distance.topk(min(self.slash, k.shape[2])).indices
        counts, indices = blocks_at_distances(distances, seqlens(q, k), self.block_size)
        return replace(
            base,
            block_size=(self.block_size, self.block_size),
            kv_num_blocks=counts,
            kv_indices=indices,
            num_columns=torch.full_like(counts[..., :1], keys.shape[-1]),
            column_indices=keys.sort(-1).values.int()[:, :, None],
            column_group=counts.shape[-1],
        )
