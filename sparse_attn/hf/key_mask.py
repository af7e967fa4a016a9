"""A mask of `masks.mask_function` as transformers passes it on."""

from __future__ import annotations

import torch
from torch import Tensor

_WHOLE = "_sparse_attn_whole"  # on a flat mask: the mask that it was made of


class KeyMask(Tensor):
    """A mask of `mask_function`: models may pass it on, but not compute with it."""

    _allowed = frozenset(
        {
            "__get__",
            "__getitem__",
            "__repr__",
            "as_subclass",
            "chunk",
            "clone",
            "contiguous",
            "cpu",
            "cuda",
            "detach",
            "dim",
            "expand",
            "is_contiguous",
            "is_floating_point",
            "numel",
            "requires_grad_",
            "size",
            "split",
            "stride",
            "to",
            "unbind",
        }
    )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ not in cls._allowed:
            raise ValueError(
                "sparse_attn cannot serve a model that computes with the attention mask itself "
                f"({func.__name__}): the mask only tells the attention function what to do"
            )
        kwargs = kwargs or {}
        if func.__name__ == "to":  # what it tells does not depend on how masks are written
            mask, *others = (x for x in args if x is not torch.bool)
            kwargs = {name: x for name, x in kwargs.items() if x is not torch.bool}
            if not (others or kwargs):
                return mask
            args = (mask, *others)
        return super().__torch_function__(func, types, args, kwargs)


def flat(mask: KeyMask) -> KeyMask:
    """The mask as ``[batch, seqlen_kv]``, for models that compute with those of four dimensions."""
    flattened = mask[:, 0, 0]
    setattr(flattened, _WHOLE, mask)
    return flattened


def whole(mask: Tensor | None) -> Tensor | None:
    """The mask that a flat one was made of, the same one for all layers; others as they are."""
    if not isinstance(mask, KeyMask) or mask.dim() != 2:
        return mask
    return getattr(mask, _WHOLE, mask[:, None, None])
