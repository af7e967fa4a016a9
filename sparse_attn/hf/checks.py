"""What `patch` refuses, or warns of, before a model runs."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..typing import SelectorLike
from . import adapters
from .names import EAGER_NAME, NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# ------------------------------------------------------------------------------------- arguments


def checked_selector(
    selector: SelectorLike | Mapping[int, SelectorLike],
) -> SelectorLike | dict[int, SelectorLike]:
    """The selector, or a dict of them by layer index, as it was given."""
    if not isinstance(selector, Mapping):
        _check_one(selector, "selector")
        return selector
    for layer, one in selector.items():
        _check_one(one, f"selector[{layer!r}]")
    return dict(zip(checked_layers("selector", selector), selector.values(), strict=True))


def _check_one(selector: Any, name: str) -> None:
    if isinstance(selector, type):
        kind = selector.__name__
        raise TypeError(f"{name} must be an object, got the class {kind}: pass {kind}(...)")
    if not callable(selector):
        raise TypeError(
            f"{name} must be a selector such as selectors.Dense(), or a dict of them by layer, "
            f"got {selector!r}"
        )


def checked_layers(name: str, layers: Iterable[int]) -> tuple[int, ...]:
    """Layer indices as ints; `name` is the argument that holds them."""
    try:
        if isinstance(layers, str):
            raise TypeError
        found = tuple(layers)
    except TypeError:
        raise TypeError(f"{name} must hold layer indices, such as [2], got {layers!r}") from None
    return tuple(_index(name, layer) for layer in found)


def _index(name: str, layer: Any) -> int:
    try:
        if isinstance(layer, bool):
            raise TypeError
        return operator.index(layer)
    except TypeError:
        raise TypeError(f"{name} must hold layer indices (int), got {layer!r}") from None


def check_layers_exist(model: PreTrainedModel, name: str, layers: Iterable[int]) -> None:
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for layer in layers:
        if layer < 0 or (count is not None and layer >= count):
            of = "the model" if count is None else f"a model of {count} layers"
            raise ValueError(f"{name}: there is no layer {layer} in {of}")


# ---------------------------------------------------------------------------------------- models


def check_served(model: PreTrainedModel) -> None:
    """Refuses models all of whose calls would be refused, by what their modules say."""
    for module in model.modules():
        given = attention_keywords(type(module))
        reason = adapters.refused(module)
        kind = getattr(module, "position_embeddings_type", "relative") or ""
        if "position_bias" in given and kind.startswith("relative"):
            reason = "passes 'position_bias' to attention, and nothing here adds it to the scores"
        for keyword in ("indices", "block_indices"):
            if keyword in given and getattr(module, "indexer", None) is not None:
                reason = f"selects its own keys (it passes {keyword!r} to attention)"
        if getattr(module, "compressor", None) is not None:
            reason = "adds compressed keys and computes with the attention mask itself"
        if reason:
            name = f"{type(model).__name__} ({model.config.model_type})"
            raise ValueError(
                f"sparse_attn cannot serve {name}: its {type(module).__name__} {reason}"
            )


def attention_keywords(kind: type[nn.Module]) -> set[str]:
    """The strings in a `forward` that calls the attention interface: keywords of its calls, too."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    names: set[str] = set()
    if "ALL_ATTENTION_FUNCTIONS" not in getattr(code, "co_names", ()):
        return names
    for constant in getattr(code, "co_consts", ()):
        names.update(constant if isinstance(constant, tuple) else (constant,))
    return names


def check_reached(model: PreTrainedModel) -> None:
    """Whether the text model now asks the attention interface for us."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation not in (NAME, EAGER_NAME):
        raise ValueError(
            f"{type(model).__name__} ({config.model_type}) does not use the attention interface of "
            "transformers, so its attention cannot be replaced"
        )


def warn_if_nothing_is_causal(model: PreTrainedModel) -> None:
    """Warns of encoders, whose attention a selector does not change."""
    config = model.config
    flags = {
        m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)
    }
    says_decoder = getattr(config, "is_decoder", False) or getattr(config, "is_causal", False)
    if getattr(config, "is_causal", True) and (flags != {False} or says_decoder):
        return
    warnings.warn(
        f"no attention layer of this {type(model).__name__} says that it is causal; attention that "
        "is not causal stays dense, whatever the selector (see `stats`)",
        stacklevel=4,
    )
