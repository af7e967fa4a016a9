"""Looking at what the heads of a model attend to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..hf import patch
from ..hf.patching import Patch
from ..layout import BlockLayout
from ..selectors import Dense, Selector

Observe = Callable[[int, Tensor, Tensor, float | None], None]


@dataclass(frozen=True)
class _Observer(Selector):
    """All keys, after `observe` has seen the q, k and scale of the layer."""

    layer: int
    observe: Observe

    def __call__(
        self, q: Tensor, k: Tensor, *, is_causal: bool = True, scale: float | None = None
    ) -> BlockLayout:
        self.observe(self.layer, q, k, scale)
        return Dense()(q, k)


def observed(model: Any, observe: Observe) -> Patch:
    """A context in which each full-attention layer of a transformers model is dense and calls
    ``observe(layer, q, k, scale)`` first.
    """
    layers = range(num_layers(model))
    return patch(model, {layer: _Observer(layer, observe) for layer in layers})


def num_layers(model: Any) -> int:
    """Number of layers of a transformers model."""
    return model.config.get_text_config(decoder=True).num_hidden_layers


def num_heads(model: Any) -> int:
    """Number of query heads of a transformers model."""
    return model.config.get_text_config(decoder=True).num_attention_heads
