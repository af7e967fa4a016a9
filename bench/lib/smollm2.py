"""What a selector does to SmolLM2-135M on long prompts, and the q, k, v that it chooses by."""

from __future__ import annotations

import functools
import math

import torch

from . import texts
from .measure import Subject, measure, observed_attention
from .pretrained import load

TOKENS = 8192
DEPTHS = (0.25, 0.5, 0.7, 0.9)
LAYERS = (1, 10, 20)

load = functools.cache(load)


def retrieval(selector, first_layer: int = 0) -> list[str]:
    """Perplexity, loss on the second copy of a text, and passkeys found; the layers before
    `first_layer` are dense.
    """
    tokenizer, model = load("smollm2")
    layers = range(first_layer, model.config.num_hidden_layers)
    subject = Subject("", selector if not first_layer else dict.fromkeys(layers, selector))
    prompts = [texts.reading(tokenizer, TOKENS), texts.second_copy(tokenizer, TOKENS * 3 // 4)]
    prompts += [texts.passkey(tokenizer, TOKENS, depth) for depth in DEPTHS]
    for prompt in prompts:
        measure(model, subject, prompt, timed=False, densities=False)
    return [
        f"{math.exp(subject.losses['reading']):.2f}",
        f"{subject.losses['second copy']:.2f}",
        found(subject, DEPTHS),
    ]


def found(subject: Subject, depths: tuple[float, ...]) -> str:
    """The passkeys that were found, of one for each depth."""
    right = [f"{d:g}" for d, ok in zip(depths, subject.answers.values(), strict=True) if ok]
    return f"{len(right)}/{len(depths)}" + (f" ({', '.join(right)})" if right else "")


@functools.cache
def queries_keys_values() -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q, k and v of some layers on `TOKENS` tokens of English."""
    tokenizer, model = load("smollm2")
    seen = {}

    def observe(module, q, k, v, seconds, kwargs):
        if module.layer_idx in LAYERS:
            seen[module.layer_idx] = (q.clone(), k.clone(), v.clone())

    with torch.inference_mode(), observed_attention(model, observe):
        model.model(texts.reading(tokenizer, TOKENS).ids)
    return seen
