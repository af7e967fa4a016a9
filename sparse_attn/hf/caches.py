"""Selectors with a memory in a patched model: an object for each layer, and news of its cache.

A `DynamicLayer` of transformers' caches copies all keys when it adds some, a `StaticLayer` writes
them in place. Either way nothing that torch counts tells a selector that the earlier keys are the
same, so the two ``update`` methods are made to say it (`lineage.carry`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ..selectors import lineage
from ..selectors.base import for_layer
from ..typing import SelectorLike

_in_use: WeakSet[LayerSelectors] = WeakSet()  # those with a memory


class LayerSelectors:
    """What `Selector.for_layer` returned for the attention modules of one patch, where that is an
    object of the module's own: two modules may have one ``layer_idx``. Copies and pickles are
    empty.
    """

    def __init__(self) -> None:
        self._own: WeakKeyDictionary[nn.Module, tuple[Any, Any]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple:
        return LayerSelectors, ()

    def own(self, module: nn.Module, selector: SelectorLike) -> SelectorLike:
        """What the module uses in place of `selector`, which other modules may have too."""
        if torch.compiler.is_compiling():  # compiled code keeps nothing between calls
            return selector
        given, own = self._own.get(module, (None, None))
        if given is selector:
            return own
        own = for_layer(selector, getattr(module, "layer_idx", None))
        if own is not selector:
            self._own[module] = selector, own
            self._follow()
        return own

    def expect(self, selector: SelectorLike, layer: int) -> None:
        """Follow the caches from now on, if the selector has an object of its own for a layer."""
        if for_layer(selector, layer) is not selector:
            self._follow()

    def _follow(self) -> None:
        _in_use.add(self)
        _follow_caches()

    def clear(self) -> None:
        """Let go of all of them."""
        self._own.clear()
        _in_use.discard(self)


@functools.cache
def _follow_caches() -> None:
    """Makes the caches say which keys they keep; once, and while no patch needs it they do not."""
    from transformers import cache_utils

    for name, follow in (("DynamicLayer", _update_dynamic), ("StaticLayer", _update_static)):
        if layer := getattr(cache_utils, name, None):
            layer.update = _following(layer.update, follow)


def _following(update: Callable, follow: Callable) -> Callable:
    @functools.wraps(update)
    def followed(self, *args, **kwargs):
        if torch.compiler.is_compiling() or not _in_use:
            return update(self, *args, **kwargs)
        return follow(functools.partial(update, self), self, *args, **kwargs)

    return followed


def _update_dynamic(update: Callable, layer, key_states: Tensor, *args, **kwargs):
    """An update that leaves ``cat([keys, key_states])`` in a new tensor. It is a normal tensor in
    inference mode too, so that torch counts what is written to it.
    """
    old, before = layer.keys, _find(layer.keys)
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            result = update(key_states, *args, **kwargs)
    else:
        result = update(key_states, *args, **kwargs)
    new = layer.keys
    if before is not None and new is not old and new.shape[2] == old.shape[2] + key_states.shape[2]:
        lineage.carry(before, old, new, old.shape[2])
    return result


def _update_static(update: Callable, layer, key_states: Tensor, value_states: Tensor, *args, **kw):
    """An update that writes `key_states` in place, and nothing before its first position."""
    if torch.is_inference_mode_enabled() and not layer.is_initialized:
        with torch.inference_mode(False), torch.no_grad():
            layer.lazy_initialization(key_states, value_states)
    old, before = layer.keys, _find(layer.keys)
    keep = _first_written(layer, *args, **kw) if before is not None else None
    result = update(key_states, value_states, *args, **kw)
    if keep is not None and layer.keys is old:
        lineage.carry(before, old, old, keep)
    return result


def _first_written(layer, cache_kwargs: dict | None = None, **kwargs) -> int | None:
    """The first position of a static update: the number of keys, which early releases are told."""
    given = cache_kwargs if isinstance(cache_kwargs, dict) else kwargs
    positions = [getattr(layer, "cumulative_length", None), given.get("cache_position")]
    known = [int(x.min()) for x in positions if isinstance(x, Tensor) and x.numel()]
    return min(known, default=None)


def _find(keys: Tensor | None) -> lineage.Source | None:
    return lineage.find(keys) if isinstance(keys, Tensor) and keys.dim() == 4 else None
