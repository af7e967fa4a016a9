"""`patch`: send the attention layers of a transformers model through a selector, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from torch import nn

from ..ops.backends import check_backend
from ..typing import SelectorLike
from . import adapters, checks
from .forward import Router, patched_elsewhere, register
from .names import EAGER_NAME, NAME, ROUTERS
from .versions import transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def patch(
    model: nn.Module,
    selector: SelectorLike | Mapping[int, SelectorLike],
    *,
    exclude_layers: Iterable[int] = (),
    backend: str = "auto",
) -> Patch:
    """Run the full-attention layers of a transformers model with `selector`.

    Layers with a window of their own (Mistral, Gemma) keep it, token for token. Attention that is
    not causal (encoders, vision towers, cross attention) stays dense; a model in which no layer
    says that it is causal is warned of. With ``selectors.Dense()`` the model computes what it did
    before, in rows of padding too. Each layer uses ``selector.for_layer(layer_idx)`` where there is
    such a method: of one that keeps something between calls, such as ``selectors.Quest()``, that is
    a copy of its own.

    Args:
        model: a transformers model, or a module that wraps one (PEFT, DDP, a compiled model).
        selector: what chooses the keys of each layer, such as ``selectors.BlockTopK()``; or a dict
            ``{layer_idx: selector}``: layers that it lacks stay dense.
        exclude_layers: indices of layers that stay dense, integers from 0. Default none.
        backend: passed on to `sparse_attention`. Default ``"auto"``.

    Returns:
        Patch: `remove` gives the model its former implementation back, and so does leaving
        ``with patch(model, selector):``. Copies of the model are patched too: see `unpatch`.

    Raises:
        ValueError: if the model's attention cannot be replaced or gives arguments that nothing
            here acts on (T5, DeepSeek V3.2), if it shares its config object with another patched
            model, or if a layer index or `backend` does not exist. Calls that could only be served
            by ignoring an argument raise it later, naming the argument and the layer.
        TypeError: if `model` holds no transformers model, `selector` is not a selector or a dict of
            them (a class, say), or layer indices are not integers.
        ImportError: without transformers, or with an older one than is needed, naming both.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from sparse_attn import patch, selectors
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=50)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> selector = selectors.SinkWindow(sink=4, window=64)
        >>> with patch(model, selector, exclude_layers=[0]) as patched:
        ...     logits = model(torch.arange(8)[None]).logits
        >>> dict(patched.stats)
        {'dense': 1, 'sparse': 1}
    """
    return Patch(model, selector, exclude_layers=exclude_layers, backend=backend)


class Patch:
    """A patched model, made by `patch`; as a context manager it removes itself at the end.

    Patches nest: the last one counts, and each `remove` takes out its own, in any order.

    Args:
        model: as in `patch`.
        selector: as in `patch`.
        exclude_layers: as in `patch`. Default none.
        backend: as in `patch`. Default ``"auto"``.

    Raises:
        TypeError, ValueError, ImportError: as `patch` does.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from sparse_attn import patch, selectors
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=50)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> patched = patch(model, selectors.SinkWindow(sink=4, window=64))
        >>> patched.active
        True
        >>> patched.remove()
        >>> patched
        Patch(LlamaForCausalLM, SinkWindow(sink=4, window=64), no calls, removed)
    """

    def __init__(
        self,
        model: nn.Module,
        selector: SelectorLike | Mapping[int, SelectorLike],
        *,
        exclude_layers: Iterable[int] = (),
        backend: str = "auto",
    ) -> None:
        self._model = _pretrained_root(model)
        chosen = checks.checked_selector(selector)
        excluded = checks.checked_layers("exclude_layers", exclude_layers)
        checks.check_layers_exist(self._model, "exclude_layers", excluded)
        if isinstance(chosen, dict):
            checks.check_layers_exist(self._model, "selector", chosen)
        check_backend(backend)
        checks.check_served(self._model)
        self._router = Router(chosen, frozenset(excluded), backend)
        self._entered = 0
        self._apply()
        checks.warn_if_nothing_is_causal(self._model)

    @property
    def stats(self) -> Counter:
        """Number of attention calls by how they were served; compiled models are not counted.

        Keys: ``"sparse"`` (the selector), ``"dense"`` (`Dense()`, excluded layers), ``"window"``
        (the model's own window or chunks), ``"explicit_mask"`` and ``"not_causal"`` (dense, torch).
        """
        return self._router.stats

    @property
    def active(self) -> bool:
        """Whether the patch is on the model, even if a later one covers it."""
        return bool(self._router.before)

    def remove(self) -> None:
        """Give the model back the implementation it had before; does nothing if that was done."""
        _remove(self._model, self._router)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._router.orphaned = False

    def __enter__(self) -> Patch:
        if not self.active:
            self._apply()
        self._entered += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            self.remove()

    def __repr__(self) -> str:
        state = "" if self.active else ", removed"
        calls = ", ".join(f"{count} {path}" for path, count in self.stats.items()) or "no"
        model = type(self._model).__name__
        return f"Patch({model}, {self._router.selector!r}, {calls} calls{state})"

    def _apply(self) -> None:
        register()
        for router in _routers_of(self._model):
            if router.orphaned:
                _remove(self._model, router)
        self._router.before = _implementations(self._model)
        chosen = self._router.selector
        for layer, selector in (chosen if isinstance(chosen, dict) else {0: chosen}).items():
            self._router.layers.expect(selector, layer)
        reached = False
        try:
            for module in self._model.modules():
                setattr(module, ROUTERS, (*getattr(module, ROUTERS, ()), self._router))
            before = _lookup(self._router, self._model.config)
            name = EAGER_NAME if before == "eager" else NAME
            if adapters.adapts(self._model.config):
                self._model.config._attn_implementation = {"": name}
            else:
                self._model.set_attn_implementation(name)
            checks.check_reached(self._model)
            reached = True
        finally:
            if not reached:
                self.remove()


def unpatch(model: nn.Module) -> None:
    """Take every patch off a model, copied ones included; does nothing if there is none.

    Args:
        model: what was given to `patch`, or a copy of it: from `copy.deepcopy`, `pickle` or
            `torch.load`, none of which hands out the `Patch` to `remove`.

    Raises:
        TypeError: if `model` holds no transformers model.

    Example:
        >>> import copy
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from sparse_attn import patch, selectors, unpatch
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=50)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> with patch(model, selectors.SinkWindow(sink=4, window=64)):
        ...     copied = copy.deepcopy(model)
        >>> unpatch(copied)
        >>> copied.config._attn_implementation
        'sdpa'
    """
    root = _pretrained_root(model)
    for router in _routers_of(root):
        _remove(root, router)


def _routers_of(model: nn.Module) -> list[Router]:
    """Every router on the modules of `model`, once."""
    found = {id(r): r for module in model.modules() for r in getattr(module, ROUTERS, ())}
    return list(found.values())


def _remove(model: PreTrainedModel, router: Router) -> None:
    """Take a router off, and give back the implementations where it was the last."""
    for module in model.modules():
        _take(module, router)
    router.layers.clear()
    for config, before in router.before:
        if not any(getattr(owner, ROUTERS, ()) for owner in _owners(model, config)):
            config._attn_implementation = {"": before}  # as a dict it spares the sub-configs
    router.before = []


def _take(module: nn.Module, router: Router) -> None:
    routers = getattr(module, ROUTERS, ())
    left = tuple(other for other in routers if other is not router)
    if left:
        setattr(module, ROUTERS, left)
    elif routers:
        delattr(module, ROUTERS)


# ----------------------------------------------------------------------------- models and configs


def _pretrained_root(model: nn.Module) -> PreTrainedModel:
    kind = transformers().PreTrainedModel
    modules = model.modules() if isinstance(model, nn.Module) else ()
    root = next((module for module in modules if isinstance(module, kind)), None)
    if root is None:
        got = type(model).__name__
        raise TypeError(f"model must be a transformers model or hold one, got {got}")
    return root


def _owners(model: PreTrainedModel, config: PreTrainedConfig) -> list[nn.Module]:
    """The modules of `model` that read their implementation from `config`."""
    return [m for m in model.modules() if getattr(m, "config", None) is config] or [model]


def _configs(model: PreTrainedModel) -> Iterator[PreTrainedConfig]:
    """Every config that `set_attn_implementation` may change, once."""
    seen, todo = set(), [getattr(module, "config", None) for module in model.modules()]
    while todo:
        config = todo.pop(0)
        if id(config) in seen or not hasattr(config, "_attn_implementation"):
            continue
        seen.add(id(config))
        yield config
        todo += [getattr(config, name, None) for name in config.sub_configs]


def _implementations(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """Each config with the implementation that it would have without any patch."""
    found = []
    for config in _configs(model):
        before = config._attn_implementation
        if before in (NAME, EAGER_NAME):
            routers = [r for owner in _owners(model, config) for r in getattr(owner, ROUTERS, ())]
            routers = [r for r in routers if any(config is one for one, _ in r.before)]
            if routers:
                before = _lookup(routers[0], config)
            elif patched_elsewhere(config):
                raise ValueError(
                    f"the config of this {type(model).__name__} is shared with another model that "
                    "is patched; give each model its own, with copy.deepcopy(config)"
                )
            else:  # copied from that of a patched model
                before = "eager" if before == EAGER_NAME else "sdpa"
        found.append((config, before))
    return found


def _lookup(router: Router, config: PreTrainedConfig) -> str | None:
    return next(before for one, before in router.before if one is config)
