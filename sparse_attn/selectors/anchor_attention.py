"""Single keys that come close to what a group of rows sees anyway."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..layout.lists import compact
from .base import Selector, block_rows, pool_mean, seqlens
from .checks import int_fields, number_field, refuse_not_causal
from .probes import products, softmax_scale


@dataclass(frozen=True)
class AnchorAttention(Selector):
    """For each group of query blocks and head the single keys whose products come within `theta`
    of the greatest ones that the group sees anyway (AnchorAttention, arXiv 2505.23520), for
    prefill.

    Every row sees the first `block_size` keys, and those of its own group: `step` query blocks. The
    greatest of their products ``scale * q @ k`` is the row's anchor. Of a query block, the mean row
    and the mean anchor ask each key between the two zones::

        scale * mean(q) @ k[j] >= mean(anchor) - theta

    and the group sees the keys for which any of its query blocks says yes. Their number is what it
    is: there is no budget.

    The paper's description is followed, not its code, which adds some keys twice and leaves out
    others. The rows of a group share its keys, so a row's keys may depend on later rows of its own
    group, never on rows after it.

    Args:
        theta: how far below the anchor a product may be, in natural logarithms. Default 12.0.
        block_size: rows of a query block, and the number of first keys. Default 128.
        step: query blocks of a group. Default 16.

    Raises:
        ValueError: if an argument is no number of its kind or out of range; when called with
            ``is_causal=False``.

    Example:
        >>> q, k = torch.randn(2, 1, 4, 512, 64).unbind(0)
        >>> layout = AnchorAttention(theta=4.0, block_size=32, step=4)(q, k)
    """

    theta: float = 12.0
    block_size: int = 128
    step: int = 16

    def __post_init__(self) -> None:
        number_field(self, "theta")
        int_fields(self, block_size=1, step=1)

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        refuse_not_causal(self, is_causal)
        size = self.block_size
        base = BlockLayout.sink_window(seqlens(q, k), sink=size, device=q.device)
        if k.shape[2] == 0 or q.shape[2] == 0:
            return base
        off = k.shape[2] - q.shape[2]
        _, last = block_rows(seqlens(q, k), size, 0, q.shape[2], q.device)
        step = min(self.step, len(last))
        starts = range(off, k.shape[2], size * step)  # of the groups' rows
        zones = [max(0, start) // size * size for start in starts]
        own = torch.tensor(zones, device=q.device).repeat_interleave(step)[:, None] // size
        own = own[: len(last)]
        counts, columns = self._stripes(q, k, zones, step, scale)
        return replace(
            base,
            block_size=(size, size),
            kv_num_blocks=(last // size - own + 1).clamp(min=0).int().view(1, 1, -1),
            kv_indices=(own + torch.arange(step + 1, device=q.device)).int()[None, None],
            num_columns=counts,
            column_indices=columns,
            column_group=step,
        )

    def _stripes(
        self, q: Tensor, k: Tensor, zones: list[int], step: int, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """The keys between the first ones and the zone of each group that its rows ask for.

        Returns:
            tuple[Tensor, Tensor]: int32 lists ``(counts [B, H, groups], indices [B, H, groups,
            width])``.
        """
        size, scale = self.block_size, softmax_scale(q, scale)
        shape = (*q.shape[:2], len(zones))
        lists, keys = [], []  # pairs of a (batch, head, group), by number, and a key that it sees
        for group, zone in enumerate(zones):
            if zone <= size:
                continue
            start = group * size * step
            rows = q[:, :, start : start + size * step] * scale
            position = start + k.shape[2] - q.shape[2]
            anchors = self._anchors(rows, k, position, zone)
            scores = products(pool_mean(rows, size).to(q.dtype), k[:, :, size:zone]).float()
            asked = (scores >= anchors - self.theta).any(2)
            batch, head, key = asked.nonzero(as_tuple=True)
            lists.append((batch * shape[1] + head) * shape[2] + group)
            keys.append(key + size)
        if not lists:
            none = torch.zeros(shape, dtype=torch.int32, device=q.device)
            return none, none[..., None][..., :0]
        pairs = (torch.cat(lists) * k.shape[2] + torch.cat(keys)).sort().values
        counts, indices = compact(pairs // k.shape[2], pairs % k.shape[2], math.prod(shape))
        return counts.view(shape), indices.view(*shape, -1)

    def _anchors(self, rows: Tensor, k: Tensor, position: int, zone: int) -> Tensor:
        """The mean anchor of each query block of a group: float32 ``[B, H, blocks, 1]``.

        Args:
            rows: the rows of the group, scaled.
            k: all keys.
            position: that of the first row.
            zone: the first key of the group's zone.
        """
        means = []
        for block in rows.split(self.block_size, 2):
            own = products(block, k[:, :, zone : position + block.shape[2]])
            own[..., position - zone :].masked_fill_(_above_diagonal(block), -torch.inf)
            first = products(block, k[:, :, : self.block_size])
            anchors = torch.maximum(own.amax(3), first.amax(3))
            means.append(anchors.mean(2, keepdim=True, dtype=torch.float32))
            position += block.shape[2]
        return torch.stack(means, 2)


def _above_diagonal(rows: Tensor) -> Tensor:
    """Which of the rows' own positions come after each row: bool ``[rows, rows]``."""
    n = rows.shape[2]
    return torch.ones(n, n, dtype=torch.bool, device=rows.device).triu(1)
