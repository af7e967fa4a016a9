"""Keys that grow in place."""

from __future__ import annotations

import torch
from torch import Tensor

from . import lineage


class KeyBuffer:
    """The keys (or values) of sequences that grow, in memory with room to spare::

        append(new)    keys = torch.cat([keys, new], 2), but the old keys are not copied
        crop(length)   keys = keys[:, :, :length]

    Selectors with a memory (`Quest`, `MaskCache`) know the keys again that were there before, and
    look at the new ones only. The keys may be edited in place: then they are looked at anew.

    Args:
        keys: the first keys ``[B, Hkv, S, D]``, copied. For the keys of other sequences, or of some
            of these, make a new buffer.
        capacity: keys that fit before memory is asked for again; S if that is more. It doubles when
            full. Default 0.

    Raises:
        ValueError: if a tensor has the wrong shape, dtype or device, or needs a gradient.

    Example:
        >>> k = KeyBuffer(torch.randn(1, 2, 100, 64), capacity=200)
        >>> selector = Quest(budget=64)
        >>> for _ in range(3):
        ...     k.append(torch.randn(1, 2, 1, 64))
        ...     layout = selector(torch.randn(1, 8, 1, 64), k.keys)
        >>> k.keys.shape
        torch.Size([1, 2, 103, 64])
    """

    def __init__(self, keys: Tensor, capacity: int = 0) -> None:
        if keys.dim() != 4:
            raise ValueError(f"keys must have shape [B, Hkv, S, D], got {list(keys.shape)}")
        if not isinstance(capacity, int) or capacity < 0:
            raise ValueError(f"capacity must be an int of at least 0, got {capacity!r}")
        self._check_gradient("keys", keys)
        self._length = keys.shape[2]
        self._memory = _room(keys, max(capacity, keys.shape[2]))

    def __len__(self) -> int:
        return self._length

    @property
    def keys(self) -> Tensor:
        """All keys ``[B, Hkv, S, D]``, a view; the next `append` may leave it behind."""
        return self._memory[:, :, : self._length]

    def append(self, new: Tensor) -> None:
        """Adds keys behind the others.

        Args:
            new: ``[B, Hkv, S', D]``, of the dtype and on the device of the others.

        Raises:
            ValueError: if `new` does not continue the keys, or needs a gradient.

        Example:
            >>> buffer = KeyBuffer(torch.zeros(1, 2, 100, 64))
            >>> buffer.append(torch.ones(1, 2, 1, 64))
            >>> len(buffer)
            101
        """
        self._check_gradient("new", new)
        old, start = self.keys, self._length
        kind = (old.dtype, old.device, old.shape[:2], old.shape[3:])
        if kind != (new.dtype, new.device, new.shape[:2], new.shape[3:]):
            raise ValueError(
                f"new is {new.dtype} {list(new.shape)} on {new.device}, which does not continue "
                f"keys of {old.dtype} {list(old.shape)} on {old.device}"
            )
        before, stop = lineage.find(old), start + new.shape[2]
        if stop > self._memory.shape[2]:
            self._memory = _room(old, max(stop, 2 * self._memory.shape[2]))
        self._memory[:, :, start:stop] = new.detach()
        self._length = stop
        lineage.carry(before, old, self.keys, start)

    def crop(self, length: int) -> None:
        """Keeps the first keys only.

        Args:
            length: how many, from 0 to as many as there are.

        Raises:
            ValueError: if there are fewer keys, or `length` is no int.

        Example:
            >>> buffer = KeyBuffer(torch.zeros(1, 2, 100, 64))
            >>> buffer.crop(60)
            >>> len(buffer)
            60
        """
        if not isinstance(length, int) or not 0 <= length <= self._length:
            raise ValueError(f"length must be an int from 0 to {self._length}, got {length!r}")
        self._length = length

    def _check_gradient(self, name: str, x: Tensor) -> None:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} needs a gradient, which a KeyBuffer does not pass on")


def _room(keys: Tensor, capacity: int) -> Tensor:
    """Memory for keys that begins with these; torch counts its writes in inference mode too."""
    with torch.inference_mode(False), torch.no_grad():
        memory = keys.new_empty((*keys.shape[:2], capacity, keys.shape[3]))
    memory[:, :, : keys.shape[2]] = keys.detach()
    return memory
