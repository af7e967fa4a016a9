"""What the values of a layout must be."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .fields import Fields


def violations(layout: Fields) -> Iterator[tuple[str, Tensor, str]]:
    """What values must not be: for each rule the tensor's name, a mask of its values that break it,
    and why.
    """
    for name, low in (("sink", 0), ("window", -1)):
        yield name, getattr(layout, name) < low, f"is less than {low}"
    for counts_name, indices_name, lists, limit, unit in (
        ("kv_num_blocks", "kv_indices", layout.blocks, layout.num_kv_blocks, "key blocks"),
        ("num_columns", "column_indices", layout.columns, layout.seqlen_kv, "keys"),
    ):
        if lists is None:
            continue
        counts, indices = lists
        width = indices.shape[-1]
        bad = (counts < 0) | (counts > width)
        yield counts_name, bad, f"is not in [0, {width}], the width of {indices_name}"
        inside = lists.listed()
        bad = inside & ((indices < 0) | (indices >= limit))
        yield indices_name, bad, f"is out of range: the layout has {limit} {unit}"
        repeated = torch.zeros_like(inside)
        repeated[..., 1:] = indices[..., 1:] <= indices[..., :-1]
        why = "does not ascend: lists must be sorted, without duplicates"
        yield indices_name, repeated & inside, why


def validate(layout: Fields) -> None:
    """No violations.

    Raises:
        ValueError: naming the tensor, the place and the value.
    """
    for name, bad, why in violations(layout):
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            raise ValueError(f"{name}{at} = {getattr(layout, name)[tuple(at)].item()} {why}")
