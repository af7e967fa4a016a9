"""`patch`: send the attention layers of a transformers model through a selector, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import backends
from .forward import EAGER_NAME, NAME, ROUTERS, Router, attention_forward, eager_attention_forward
from .masks import eager_mask_function, mask_function

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def patch(
    model: nn.Module, selector: Any, *, exclude_layers: Iterable[int] = (), backend: str = "auto"
) -> Patch:
    """Run the full-attention layers of a transformers model with `selector`.

    Layers with a window of their own (Mistral, Gemma) keep it, token for token. Attention that is
    not causal (encoders, vision towers, cross attention) stays dense. Of a selector that keeps
    something between calls, such as ``selectors.Quest()``, each layer has a copy of its own.

    Args:
        model: a transformers model, or a module that wraps one (PEFT, DDP, a compiled model).
        selector: what chooses the keys of each layer, such as ``selectors.BlockTopK()``; or a dict
            ``{layer_idx: selector}``: layers that it lacks stay dense.
        exclude_layers: indices of layers that stay dense. Default none.
        backend: passed on to `sparse_attention`. Default ``"auto"``.

    Returns:
        Patch: `remove` gives the model its former implementation back, and so does leaving
        ``with patch(model, selector):``.

    Raises:
        ValueError: if the model's attention cannot be replaced, if it shares its config object
            with another patched model, or if a layer index or `backend` does not exist.
        TypeError: if `model` holds no transformers model, or `selector` is not a selector.
        ImportError: without transformers 5 or later.

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
    """

    def __init__(
        self,
        model: nn.Module,
        selector: Any,
        *,
        exclude_layers: Iterable[int] = (),
        backend: str = "auto",
    ) -> None:
        self._model = _pretrained_root(model)
        excluded = frozenset(exclude_layers)
        _check_selector(selector)
        _check_layers(self._model, excluded.union(selector if isinstance(selector, dict) else ()))
        backends.choose(backend, *torch.empty(2, 1, 1, 1, 1))  # refuses names that do not exist
        self._router = Router(selector, excluded, backend)
        self._before: list[tuple[PreTrainedConfig, str | None]] = []
        self._entered = 0
        self._apply()

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
        return bool(self._before)

    def remove(self) -> None:
        """Give the model back the implementation it had before; does nothing if that was done."""
        for module in self._model.modules():
            _take(module, self._router)
        self._router.layers.clear()
        for config, before in self._before:
            if not any(getattr(owner, ROUTERS, ()) for owner in _owners(self._model, config)):
                config._attn_implementation = {"": before}  # as a dict it spares the sub-configs
        self._before = []

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
        _register()
        self._before = _implementations(self._model)
        self._router.before = {id(config): before for config, before in self._before}
        chosen = self._router.selector
        self._router.layers.expect(*(chosen.values() if isinstance(chosen, dict) else (chosen,)))
        reached = False
        try:
            for module in self._model.modules():
                setattr(module, ROUTERS, (*getattr(module, ROUTERS, ()), self._router))
            before = self._router.before[id(self._model.config)]
            self._model.set_attn_implementation(EAGER_NAME if before == "eager" else NAME)
            _check_reached(self._model)
            reached = True
        finally:
            if not reached:
                self.remove()


def _transformers():
    try:
        import transformers
        from transformers import AttentionMaskInterface  # noqa: F401  (new in transformers 5)
    except ImportError as error:
        message = "sparse_attn.patch needs transformers 5 or later: pip install sparse-attn[hf]"
        raise ImportError(message) from error
    return transformers


def _register() -> None:
    transformers = _transformers()
    functions = {
        NAME: (attention_forward, mask_function),
        EAGER_NAME: (eager_attention_forward, eager_mask_function),
    }
    for name, (attention, mask) in functions.items():
        transformers.AttentionInterface.register(name, attention)
        transformers.AttentionMaskInterface.register(name, mask)


def _take(module: nn.Module, router: Router) -> None:
    routers = getattr(module, ROUTERS, ())
    left = tuple(other for other in routers if other is not router)
    if left:
        setattr(module, ROUTERS, left)
    elif routers:
        delattr(module, ROUTERS)


# ----------------------------------------------------------------------------- models and configs


def _pretrained_root(model: nn.Module) -> PreTrainedModel:
    kind = _transformers().PreTrainedModel
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
            before = next((r.before[id(config)] for r in routers if id(config) in r.before), before)
        if before in (NAME, EAGER_NAME):
            raise ValueError(
                f"the config of this {type(model).__name__} is shared with another model that is "
                "patched; give each model its own, with copy.deepcopy(config)"
            )
        found.append((config, before))
    return found


# ----------------------------------------------------------------------------------------- checks


def _check_reached(model: PreTrainedModel) -> None:
    """Whether the text model now asks the attention interface for us."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation not in (NAME, EAGER_NAME):
        raise ValueError(
            f"{type(model).__name__} ({config.model_type}) does not use the attention interface of "
            "transformers, so its attention cannot be replaced"
        )


def _check_selector(selector: Any) -> None:
    for one in selector.values() if isinstance(selector, dict) else (selector,):
        if not callable(one) or isinstance(one, type):
            raise TypeError(
                "selector must be a selector such as selectors.Dense(), or a dict of them, "
                f"got {one!r}"
            )


def _check_layers(model: PreTrainedModel, layers: frozenset) -> None:
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for layer in layers:
        if not isinstance(layer, int) or layer < 0 or (count is not None and layer >= count):
            raise ValueError(f"there is no layer {layer!r} in a model of {count} layers")
