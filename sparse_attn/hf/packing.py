"""Packed sequences told by keyword arguments: each token sees its own sequence only."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from . import masks

# They say where sequences start; their companions `max_length_q`, `max_length_k` follow from them.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
Refuse = Callable[[str, str], NoReturn]  # takes the argument's name and why it cannot be honoured
_RESTRICTED = "_sparse_attn_restricted"  # on a mask: the arguments, and what they made of it


def restrict(
    mask: Tensor | None, kwargs: dict, sizes: tuple[int, int, int], refuse: Refuse
) -> Tensor | None:
    """The mask of a causal call with what its packing arguments say added to it.

    Args:
        mask: None for plain causal attention, or any mask of the attention function.
        kwargs: may hold `cu_seq_lens_q` and `cu_seq_lens_k`, int ``[num_sequences + 1]``, and
            `seq_idx`, int ``[1 or batch, seqlen_q]``: the number of each token's sequence.
        sizes: ``(batch, seqlen_q, seqlen_kv)`` of the call.
        refuse: is called for values that do not fit the call.
    """
    given = [kwargs.get(name) for name in PACKING]
    if all(value is None for value in given):
        return mask
    before, restricted = getattr(mask, _RESTRICTED, ([], None))
    if before and all(a is b for a, b in zip(before, given, strict=True)):
        return restricted
    restricted = mask
    for name, ids in _sequence_ids(*given, sizes, refuse):
        restricted = _split(restricted, name, ids, sizes, refuse)
    if mask is not None and not torch.compiler.is_compiling():
        setattr(mask, _RESTRICTED, (given, restricted))  # the next layer asks the same
    return restricted


def _sequence_ids(
    ends_q: Tensor | None,
    ends_k: Tensor | None,
    seq_idx: Tensor | None,
    sizes: tuple[int, int, int],
    refuse: Refuse,
) -> list[tuple[str, Tensor]]:
    """The arguments that tell of several sequences, as the number of each token's sequence."""
    batch, seqlen_q, seqlen_kv = sizes
    found = []
    if ends_q is None and ends_k is not None:
        refuse("cu_seq_lens_k", "it needs cu_seq_lens_q beside it")
    if ends_q is not None:
        ends = _ends("cu_seq_lens_q", ends_q, seqlen_q, refuse)
        if batch != 1:
            refuse("cu_seq_lens_q", f"packed sequences are one row, but the batch size is {batch}")
        one_sequence = ends is not None and len(ends) == 2
        if ends_k is not None:
            keys = _ends("cu_seq_lens_k", ends_k, seqlen_kv if one_sequence else seqlen_q, refuse)
            if keys != ends and not (one_sequence and len(keys) == 2):
                refuse("cu_seq_lens_k", "its sequences must be those of cu_seq_lens_q")
        if not one_sequence:
            tokens = torch.arange(seqlen_q, device=ends_q.device)
            ids = torch.searchsorted(ends_q[1:].to(tokens), tokens, right=True)
            found.append(("cu_seq_lens_q", ids[None]))
    if seq_idx is not None:
        if getattr(seq_idx, "shape", None) not in {(1, seqlen_q), (batch, seqlen_q)}:
            refuse("seq_idx", f"it must be a tensor [{batch}, {seqlen_q}]")
        found.append(("seq_idx", seq_idx.long()))
    return found


def _ends(name: str, ends: Tensor, length: int, refuse: Refuse) -> list[int] | None:
    """The checked values, or None while tracing, where they are not known."""
    if not isinstance(ends, Tensor) or ends.dim() != 1 or len(ends) < 2:
        refuse(name, f"it must be a 1-D tensor from 0 to {length}")
    if torch.compiler.is_compiling():
        return None
    values = ends.tolist()
    if values[0] != 0 or values[-1] != length or values != sorted(values):
        refuse(name, f"it must rise from 0 to {length}, got {values}")
    return values


def _split(
    mask: Tensor | None, name: str, ids: Tensor, sizes: tuple[int, int, int], refuse: Refuse
) -> Tensor:
    batch, seqlen_q, seqlen_kv = sizes
    if masks.is_key_mask(mask):
        split = masks.split(mask, ids, batch)
        if split is None:
            refuse(name, "it tells nothing of the keys in the cache")
        return split
    if seqlen_q != seqlen_kv:
        refuse(name, f"it tells nothing of {seqlen_kv - seqlen_q} of the {seqlen_kv} keys")
    if mask is None and not torch.compiler.is_compiling():
        return masks.split(masks.plain(batch, seqlen_q, ids.device), ids, batch)
    ids = ids if mask is None else ids.to(mask.device)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    if mask is None:
        return same & torch.ones_like(same).tril()
    if mask.dtype == torch.bool:
        return mask & same
    return mask.masked_fill(~same, torch.finfo(mask.dtype).min)
