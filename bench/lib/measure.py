"""Runs a language model with one way of attending or another, and measures speed and quality.

Attention is timed inside the forward pass: a wrapper around the attention function that the model
looks up, torch's or ours, adds up the wall-clock time of its calls. What the call does is inside:
choosing keys too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import mean, median
from time import perf_counter

import torch
from torch.nn import functional as F

import sparse_attn
from sparse_attn import BlockLayout, selectors

from .texts import Prompt

LOGIT_ROWS = 256  # logits of a whole text at once would take gigabytes


@dataclass
class Subject:
    """One row of the table: a way of attending, and what was measured with it.

    `selector` is None for the model as it comes, on torch's SDPA. The lists in `prefill` and
    `attention` are paired: entry `i` of every subject of a model is of the same round. `layouts`
    keeps, by layer, what the layers in `drawn` let through.
    """

    name: str
    selector: Callable[..., BlockLayout] | None
    prefill: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    answers: dict[str, bool] = field(default_factory=dict)
    drawn: tuple[int, ...] = ()
    layouts: dict[int, BlockLayout] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Visible (query, key) pairs over causal pairs, mean over the layers."""
        return mean(self.densities)

    def speedup(self, baseline: Subject, part: str) -> float:
        """Median of the paired ratios of `part`, "prefill" or "attention"."""
        pairs = zip(getattr(baseline, part), getattr(self, part), strict=True)
        return median(theirs / ours for theirs, ours in pairs)


def attending(model, subject: Subject):
    """A context in which the model attends in the subject's way."""
    if subject.selector is None:
        return nullcontext()
    return sparse_attn.patch(model, subject.selector)


@contextmanager
def observed_attention(model, observe: Callable) -> Iterator[None]:
    """Call `observe(module, q, k, v, seconds, kwargs)` after each attention call of the model."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS[name]

    def observed(module, q, k, v, mask, **kwargs):
        start = perf_counter()
        result = function(module, q, k, v, mask, **kwargs)
        observe(module, q, k, v, perf_counter() - start, kwargs)
        return result

    ALL_ATTENTION_FUNCTIONS[name] = observed
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def layer_layout(subject: Subject, q, k, kwargs: dict) -> BlockLayout:
    """The layout of one attention call; layers with a window of their own keep it."""
    window = kwargs.get("sliding_window")
    selector = subject.selector or selectors.Dense()
    if window:
        selector = selectors.SlidingWindow(window=window)
    return selector(q, k, is_causal=True, scale=kwargs.get("scaling"))


@torch.inference_mode()
def measure(model, subject: Subject, prompt: Prompt, timed: bool, densities: bool):
    """Run `prompt` once, add what it is for to `subject`, and return the model's cache.

    `densities` asks for the density of every layer; that run is of no use for timing.
    """
    seconds: list[float] = []

    def observe(module, q, k, v, elapsed, kwargs):
        seconds.append(elapsed)
        if densities:
            layout = layer_layout(subject, q, k, kwargs)
            subject.densities.append(layout.density())
            if module.layer_idx in subject.drawn:
                subject.layouts[module.layer_idx] = layout

    with attending(model, subject):
        with observed_attention(model, observe):
            start = perf_counter()
            output = model.model(prompt.ids, use_cache=True)
            logits = model.lm_head(output.last_hidden_state[:, -1])
            prefill = perf_counter() - start
        if prompt.answer is not None:
            written = _greedy(model, logits, output.past_key_values, len(prompt.answer))
            subject.answers[prompt.name] = torch.equal(written, prompt.answer)
    if timed:
        subject.prefill.append(prefill)
        subject.attention.append(sum(seconds))
    if prompt.scored_from is not None and prompt.name not in subject.losses:
        subject.losses[prompt.name] = _loss(model, output.last_hidden_state[0], prompt)
    return output.past_key_values


def _loss(model, hidden, prompt: Prompt) -> float:
    """Mean negative log-likelihood, in nats, of the tokens from `scored_from` on."""
    first = prompt.scored_from
    rows = hidden[first - 1 : -1].split(LOGIT_ROWS)
    labels = prompt.ids[0, first:].split(LOGIT_ROWS)
    losses = [
        F.cross_entropy(model.lm_head(h).float(), label, reduction="none")
        for h, label in zip(rows, labels, strict=True)
    ]
    return torch.cat(losses).mean().item()


def _greedy(model, logits, cache, count: int) -> torch.Tensor:
    """The next `count` tokens after a prefill, one at a time through the cache."""
    tokens = [logits.argmax(-1)]
    while len(tokens) < count:
        output = model(tokens[-1][None], past_key_values=cache, use_cache=True)
        tokens.append(output.logits[:, -1].argmax(-1))
    return torch.cat(tokens)
