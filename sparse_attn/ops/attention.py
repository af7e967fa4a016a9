"""The attention ops: the op pair of forward and backward pass, and the one for packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract.arguments import DIFFERENTIABLE, SCHEMA, Arguments
from ..contract.dtypes import compute_dtype
from ..contract.packing import Packing
from ..contract.request import Request
from ..contract.results import empty_lse, empty_out
from ..reference import attention as reference
from ..reference import varlen
from ..triton import entry as triton
from . import autograd
from .register import register

# split_float32 permits products of float32 in three of bfloat16. for_gradients asks for the scores,
# rounding included, that the backward op computes again from lse.
_FORWARD = (
    f"(Tensor q, Tensor k, Tensor v, {SCHEMA}, *, bool split_float32=False, "
    "bool for_gradients=False) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{SCHEMA}) -> ({', '.join(['Tensor'] * (3 + len(DIFFERENTIABLE)))})"
)
_VARLEN = (
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_kv, "
    "Tensor? seqlens_kv, Tensor? block_table, int max_seqlen_q, int max_seqlen_kv, "
    f"{SCHEMA}) -> (Tensor, Tensor)"
)


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: bool) -> tuple[Tensor, ...]:
    layout, scores = autograd.validated(q, k, Arguments(*rest))
    return reference.attention(q, k, v, layout, **scores)


def _attention_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest
) -> tuple[Tensor, ...]:
    layout, scores = autograd.validated(q, k, Arguments(*rest))
    return reference.attention_backward(dout, dlse, q, k, v, layout, **scores)


def _attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor | None,
    seqlens_kv: Tensor | None, block_table: Tensor | None, max_seqlen_q: int, max_seqlen_kv: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    arguments = Arguments(*rest).copied()
    layout = arguments.layout((max_seqlen_q, max_seqlen_kv)).validate()
    packing = Packing(cu_seqlens_q, cu_seqlens_kv, seqlens_kv, block_table)

    def attend(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor]:
        own = arguments.layout((q.shape[2], k.shape[2]))
        return reference.attention(q, k, v, own, **arguments.scores())

    return varlen.attention(attend, q, k, v, layout, arguments, packing)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: bool):
    return empty_out(q, v), empty_lse(q)


def _fake_attention_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest
) -> tuple[Tensor, ...]:
    arguments = Arguments(*rest)
    dtype = compute_dtype(q.dtype)
    given = [getattr(arguments, name) for name in DIFFERENTIABLE]
    others = (q.new_empty(0, dtype=dtype) if x is None else x for x in given)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, *others)
    )


def _fake_attention_varlen(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=compute_dtype(q.dtype))
    return q.new_empty((*q.shape[:2], v.shape[-1])), lse


def _request(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: bool) -> Request:
    return Request("attention", q, k, v, Arguments(*rest).features())


def _backward_request(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest
) -> Request:
    return _request(q, k, v, *rest)


def _varlen_request(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor | None,
    seqlens_kv: Tensor | None, block_table: Tensor | None, max_seqlen_q: int, max_seqlen_kv: int,
    *rest: Any,
) -> Request:  # fmt: skip
    packed = "packed" if block_table is None else "paged"
    return Request("attention_varlen", q, k, v, Arguments(*rest).features() | {packed})


register(
    "attention_backward",
    _BACKWARD,
    fake=_fake_attention_backward,
    reference=_attention_backward,
    triton=triton.attention_backward,
    request=_backward_request,
    gradient=autograd.twice_differentiable,
)
register(
    "attention",
    _FORWARD,
    fake=_fake_attention,
    reference=_attention,
    triton=triton.attention,
    request=_request,
    gradient=autograd.differentiable,
)
register(
    "attention_varlen",
    _VARLEN,
    fake=_fake_attention_varlen,
    reference=_attention_varlen,
    triton=triton.attention_varlen,
    request=_varlen_request,
    gradient=autograd.not_differentiable,
)
