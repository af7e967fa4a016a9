"""Retrieval heads by what they do where random tokens repeat: no text and no question is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..api import sparse_attention
from ..checks import as_int, as_number
from ..layout import BlockLayout
from ..selectors.probes import softmax_scale
from .heads import check_heads, shared_by_groups, top_heads
from .observing import num_heads, num_layers, observed


@torch.inference_mode()
def repetition_scores(
    model: Any,
    *,
    period: int = 2500,
    repeats: int = 4,
    start: tuple[int, ...] = (),
    tokens: range | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """How much each head looks at the same token, and at the one after it, in earlier copies of a
    text of random tokens (RazorAttention, arXiv 2407.15891).

    With ``P`` the causal softmax of a head, over the rows ``i >= period`` of all copies::

        echo = mean over i of sum over n >= 1 of P[i, i - n * period]
        induction = mean over i of sum over n >= 1 of P[i, i - n * period + 1]

    Args:
        model: a transformers model; full-attention layers are looked at.
        period: number of random tokens. Default 2500.
        repeats: number of copies of them, at least 2. Default 4.
        start: tokens before the first copy, such as the model's start token. Default none.
        tokens: the tokens to draw from. Default all of the vocabulary.
        seed: of the draw. Default 0.

    Returns:
        tuple[Tensor, Tensor]: ``(induction, echo)``, float64 ``[layers, heads]`` in [0, 1]; 0 for
        layers that are not looked at.

    Raises:
        ValueError: if period or repeats is too small, or tokens is empty.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from sparse_attn.retrieval import repetition_scores
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=50)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> induction, echo = repetition_scores(model, period=8, repeats=3)
        >>> induction.shape
        torch.Size([2, 2])
    """
    period, repeats = as_int("period", period, 2), as_int("repeats", repeats, 2)
    seed = as_int("seed", seed, high=None)
    if tokens is not None and not tokens:
        raise ValueError(f"tokens is empty: {tokens}")
    tokens = range(model.get_input_embeddings().num_embeddings) if tokens is None else tokens
    draw = torch.randint(len(tokens), (period,), generator=torch.Generator().manual_seed(seed))
    text = tokens.start + draw * tokens.step
    ids = torch.cat([torch.tensor(start, dtype=torch.int64), text.repeat(repeats)])[None]
    induction, echo = torch.zeros(2, num_layers(model), num_heads(model), dtype=torch.float64)

    def observe(layer: int, q: Tensor, k: Tensor, scale: float | None) -> None:
        dense = BlockLayout.dense((q.shape[2], k.shape[2]), device=q.device)
        _, lse = sparse_attention(q, k, k, dense, scale=scale, return_lse=True)
        keys = k[:, :, len(start) :].float().repeat_interleave(q.shape[1] // k.shape[1], 1)
        rows = q[:, :, len(start) :].float() * softmax_scale(q, scale)
        lse = lse[:, :, len(start) :]
        for scores, ahead in ((echo, 0), (induction, 1)):
            for distance in range(period, rows.shape[2], period):
                liked = keys[:, :, ahead : ahead + rows.shape[2] - distance]
                mass = (rows[:, :, distance:] * liked).sum(-1) - lse[:, :, distance:]
                scores[layer] += mass.exp().double().sum((0, 2)).cpu()

    with observed(model, observe):
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    rows = period * (repeats - 1)
    return induction / rows, echo / rows


def repetition_heads(
    induction: Tensor,
    echo: Tensor,
    *,
    num_kv_heads: int,
    induction_share: float = 0.14,
    echo_share: float = 0.01,
) -> Tensor:
    """The heads that RazorAttention (arXiv 2407.15891) keeps whole: those of the KV heads with a
    query head among the best by induction or by echo, over all layers together.

    Args:
        induction: ``[layers, heads]``, of `repetition_scores`.
        echo: ``[layers, heads]``, the same.
        num_kv_heads: number of KV heads of a layer; a KV head counts by its best query head.
        induction_share: share of the KV heads that are kept by induction. Default 0.14.
        echo_share: share of those kept by echo. Default 0.01.

    Returns:
        Tensor: bool ``[layers, heads]``.

    Raises:
        TypeError, ValueError: if scores are not ``[layers, heads]``, `num_kv_heads` does not divide
            the heads, or a share is out of range.

    Example:
        >>> induction, echo = torch.tensor([[0.9, 0.1, 0.2, 0.3]]), torch.zeros(1, 4)
        >>> repetition_heads(induction, echo, num_kv_heads=2, induction_share=0.5, echo_share=0)
        tensor([[ True,  True, False, False]])
    """
    num_kv_heads = as_int("num_kv_heads", num_kv_heads, 1)
    for name, scores in (("induction", induction), ("echo", echo)):
        check_heads(name, scores)
        if scores.shape[1] % num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {num_kv_heads}, no divisor of the {scores.shape[1]} heads of "
                f"{name}"
            )
    induction_share = as_number("induction_share", induction_share, 0, 1)
    echo_share = as_number("echo_share", echo_share, 0, 1)
    best = [
        top_heads(scores.unflatten(1, (num_kv_heads, -1)).amax(2), share)
        for scores, share in ((induction, induction_share), (echo, echo_share))
    ]
    return shared_by_groups(best[0] | best[1], induction.shape[1])
