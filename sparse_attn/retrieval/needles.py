"""Retrieval heads by what they copy: a needle is hidden in a text, and asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import as_int, as_number
from ..selectors.probes import products
from .observing import num_heads, num_layers, observed


@dataclass(frozen=True)
class NeedlePrompt:
    """Tokens of a prompt, and where its needle is.

    Args:
        ids: int64 ``[1, tokens]``.
        needle: the positions of the needle's tokens.

    Raises:
        TypeError: if `ids` is no tensor, or `needle` no range.
        ValueError: if `ids` has another shape, or `needle` is empty or not within it.

    Example:
        >>> prompt = NeedlePrompt(torch.arange(100)[None], needle=range(40, 48))
    """

    ids: Tensor
    needle: range

    def __post_init__(self) -> None:
        for name, value, kind in (("ids", self.ids, Tensor), ("needle", self.needle, range)):
            if not isinstance(value, kind):
                got = type(value).__name__
                raise TypeError(f"{name} must be a {kind.__name__.lower()}, got {got}")
        if self.ids.dim() != 2 or self.ids.shape[0] != 1:
            raise ValueError(f"ids must be [1, tokens], got {list(self.ids.shape)}")
        inside = self.needle.start >= 0 and self.needle.stop <= self.ids.shape[1]
        if not self.needle or self.needle.step != 1 or not inside:
            raise ValueError(
                f"needle must be a range of the {self.ids.shape[1]} positions, got {self.needle}"
            )


def needle_prompt(
    tokenizer: Any, haystack: str, needle: str, question: str, *, tokens: int, depth: float
) -> NeedlePrompt:
    """A text of `tokens` tokens with a needle in it, and a question at its end.

    Args:
        tokenizer: of transformers.
        haystack: a text; as much of its beginning is taken as there is room for.
        needle: the sentence to hide.
        question: what makes the model say it, for instance the needle's first words.
        tokens: length of the prompt.
        depth: where the needle stands, from 0 (start) to 1 (end).

    Returns:
        NeedlePrompt: with the start token, if the tokenizer has one.

    Raises:
        ValueError: if depth is out of range, or the haystack too short or the rest too long.

    Example:
        >>> from types import SimpleNamespace
        >>> def tokenizer(text, **options):  # a token for each letter
        ...     return SimpleNamespace(input_ids=[ord(letter) for letter in text])
        >>> text, fact = "Once upon a time. " * 9, "The key is 7."
        >>> prompt = needle_prompt(tokenizer, text, fact, "The key", tokens=100, depth=0.5)
        >>> prompt.ids.shape, prompt.needle
        (torch.Size([1, 100]), range(40, 53))
    """
    depth, tokens = as_number("depth", depth, 0, 1), as_int("tokens", tokens, 1)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    start, fact, end = tokenizer("").input_ids, encode(needle), encode(question)
    text = encode(haystack)
    room = tokens - len(start) - len(fact) - len(end)
    if not 0 <= room <= len(text):
        raise ValueError(
            f"tokens must leave room for needle and question and be covered by the haystack's "
            f"{len(text)}, got {tokens}"
        )
    before = int(depth * room)
    ids = [*start, *text[:before], *fact, *text[before:room], *end]
    first = len(start) + before
    return NeedlePrompt(torch.tensor([ids]), range(first, first + len(fact)))


@torch.inference_mode()
def needle_scores(
    model: Any,
    prompts: Iterable[NeedlePrompt],
    *,
    max_new_tokens: int = 50,
    stop: Iterable[int] = (),
) -> Tensor:
    """How much of the needles each head copies (Wu et al., arXiv 2404.15574).

    The model goes on writing after each prompt, always the most likely token. A head copies a token
    of the needle when the key that its last row likes best is that token's, and the token is
    written next. The score of a head is the share of the needle's tokens that it copies, a token
    at each position once; the mean over those prompts of whose needle more than half was written.
    Heads above 0.1 are retrieval heads in the paper: 3 to 6 % of all.

    Args:
        model: a transformers model that generates; full-attention layers are looked at.
        prompts: needles at different depths of texts of different lengths.
        max_new_tokens: how much is written at most. Default 50.
        stop: tokens that end the writing, such as a line break. Default none.

    Returns:
        Tensor: float64 ``[layers, heads]``; 0 for layers that are not looked at.

    Raises:
        ValueError: if the model writes half of no needle.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=50)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> _ = torch.nn.init.zeros_(model.lm_head.weight)  # it writes nothing but token 0
        >>> prompt = NeedlePrompt(torch.tensor([[5, 0, 7, 8]]), needle=range(1, 2))
        >>> needle_scores(model, [prompt], max_new_tokens=2).shape
        torch.Size([2, 2])
    """
    max_new_tokens = as_int("max_new_tokens", max_new_tokens, 1)
    scores = torch.zeros(num_layers(model), num_heads(model), dtype=torch.float64)
    written = 0
    for prompt in prompts:
        copied = _copied(model, prompt, max_new_tokens, frozenset(stop))
        if copied is not None:
            written += 1
            scores += copied
    if not written:
        raise ValueError("prompts: the model wrote half of no needle, so no head can be judged")
    return scores / written


def _copied(
    model: Any, prompt: NeedlePrompt, max_new_tokens: int, stop: frozenset[int]
) -> Tensor | None:
    """The share of the needle that each head copies, or None if the model does not write it."""
    liked = torch.full((num_layers(model), num_heads(model)), -1)

    def observe(layer: int, q: Tensor, k: Tensor, scale: float | None) -> None:
        sign = -1 if scale is not None and scale < 0 else 1
        liked[layer] = products(sign * q[:, :, -1:], k)[0, :, 0].argmax(-1).cpu()

    tokens = prompt.ids[0].tolist()
    found = torch.zeros(*liked.shape, len(prompt.needle), dtype=torch.bool)
    ids, cache, text = prompt.ids.to(model.device), None, set()
    with observed(model, observe):
        for _ in range(max_new_tokens):
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            token = int(ids)
            if token in stop:
                break
            text.add(token)
            for n, position in enumerate(prompt.needle):
                if tokens[position] == token:
                    found[..., n] |= liked == position
    needle = {tokens[position] for position in prompt.needle}
    if 2 * len(needle & text) <= len(needle):
        return None
    return found.double().mean(-1)
