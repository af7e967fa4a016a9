"""Which first keys of a tensor are proven to be those of a tensor seen before.

torch counts the writes to the memory of a tensor, and all views share the count. So two tensors of
equal count that are views of one tensor alive, at one place of it, hold the same keys as far as the
shorter one goes. Where keys are added, whoever adds them says so: `carry`. Nothing else is known.

What torch does not count is not seen: writes through ``.data``, NumPy, DLPack or a pointer. After
such a write call ``torch.autograd.graph.increment_version(k)``, as autograd itself needs it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Frame = tuple[Any, ...]  # where a view lies in memory, and in what shape
_MOST_FRAMES = 8  # views of one tensor that are told apart
_MOST_ORIGINS = 8  # earlier states that a state knows


class State:
    """Keys as they were at one time.

    `origins` names earlier states, and how many of their first keys are the first ones of this.
    """

    __slots__ = ("__weakref__", "origins")

    def __init__(self, origins: tuple[tuple[weakref.ref[State], int], ...] = ()) -> None:
        self.origins = origins

    def grown(self, keep: int) -> State:
        """A state that begins with the first `keep` keys of this one."""
        earlier = [(ref, min(same, keep)) for ref, same in self.origins if ref() is not None]
        return State(((weakref.ref(self), keep), *earlier[: _MOST_ORIGINS - 1]))

    def shared(self, before: State, length: int) -> int:
        """How many of the first `length` keys of `before` are the first keys of this one."""
        if before is self:
            return length
        return next((min(same, length) for ref, same in self.origins if ref() is before), 0)


@dataclass(frozen=True)
class Source:
    """Whose keys a tensor holds: those of `state`, or the heads of them that `heads` lists, of
    these the heads that its second entry lists, and so on.
    """

    state: State
    heads: tuple[tuple[int, ...], ...] = ()


@dataclass
class _Views:
    """Sources of the views of a tensor, by where they lie, as long as it has this version."""

    version: int
    sources: dict[Frame, Source] = field(default_factory=dict)


_VIEWS = WeakTensorKeyDictionary()  # from a tensor that is no view to its `_Views`


def find(k: Tensor) -> Source | None:
    """The source of ``k [B, H, S, D]``, or None if nobody has asked for it since the last write."""
    place = _place(k)
    if place is None:
        return None
    root, version, frame = place
    views = _VIEWS.get(root)
    return None if views is None or views.version != version else views.sources.get(frame)


def source(k: Tensor) -> Source | None:
    """The source of ``k [B, H, S, D]``, a new one if need be; None if torch counts no writes."""
    found = find(k)
    if found is None and _place(k) is not None:
        found = Source(State())
        _enter(k, found)
    return found


def carry(before: Source | None, old: Tensor, new: Tensor, keep: int) -> None:
    """Declares that the first `keep` keys of `new` are those that `old` had when `find` returned
    `before`. They may be one tensor, written to since.
    """
    kind = (new.dtype, new.device, new.shape[:2], new.shape[3:])
    if before is not None and kind == (old.dtype, old.device, old.shape[:2], old.shape[3:]):
        _enter(new, Source(before.state.grown(keep), before.heads))


def take_heads(k: Tensor, heads: list[int]) -> Tensor:
    """``k[:, heads]``, a copy that is known again as those heads of k."""
    whole = source(k)
    if whole is None:
        return k[:, heads]
    with torch.inference_mode(False), torch.no_grad():  # so that torch counts writes to the copy
        taken = k[:, heads]
    _enter(taken, Source(whole.state, (*whole.heads, tuple(heads))))
    return taken


def _enter(k: Tensor, source: Source) -> None:
    place = _place(k)
    if place is None:
        return
    root, version, frame = place
    views = _VIEWS.get(root)
    if views is None or views.version != version or len(views.sources) >= _MOST_FRAMES:
        views = _VIEWS[root] = _Views(version)
    views.sources[frame] = source


def _place(k: Tensor) -> tuple[Tensor, int, Frame] | None:
    """The tensor that k is a view of, its version, and where k lies; None if torch counts no writes
    (inference tensors) or k has no memory of its own (subclasses, tensors that are being traced).
    """
    if torch.compiler.is_compiling():
        return None
    root = k if k._base is None else k._base
    if type(k) is not Tensor or type(root) is not Tensor:
        return None
    try:
        version, address = k._version, k.data_ptr()
    except RuntimeError:
        return None
    sizes = (k.shape[0], k.shape[1], *k.shape[3:])
    return root, version, (address, k.dtype, k.is_neg(), sizes, k.stride())


class Memory:
    """What a selector keeps from one call to the next, and of which keys; a copy of it is empty."""

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()

    def forget(self) -> None:
        """Let go of everything."""
        self.value: Any = None
        self.length = 0
        self._source: Source | None = None

    def keep(self, k: Tensor, value: Any) -> None:
        """Remember `value`, made of the keys ``k [B, H, S, D]``, unless torch counts no writes."""
        self.forget()
        self._source = source(k)
        if self._source is not None:
            self.value, self.length = value, k.shape[2]

    def known(self, k: Tensor) -> int:
        """How many of the first keys of k are proven to be the first of those last kept."""
        before, now = self._source, find(k)
        if before is None or now is None or now.heads != before.heads:
            return 0
        return min(now.state.shared(before.state, self.length), k.shape[2])
