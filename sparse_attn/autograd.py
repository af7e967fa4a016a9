"""Gradients of the op pair, on torch's Autograd key: the op itself is differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import derivatives
from .ops import library, reference_args


def run(op: Callable[..., Any], *args: Any) -> Any:
    """``op(*args)`` for the forward op, past the Autograd key's Python kernel when no gradient is
    asked for: that kernel costs more than a small call.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    if _forward_mode():
        return _in_forward_mode(*args)
    if torch._C._are_functorch_transforms_active():  # torch.func knows Functions, not Autograd keys
        return _functions[op].apply(*args)
    if _needs_grad(args):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _forward_mode() -> bool:
    """Whether tangents may be asked for."""
    return torch.autograd.forward_ad._current_level >= 0


def _in_forward_mode(q: Tensor, k: Tensor, v: Tensor, *args) -> tuple[Tensor, Tensor]:
    """The op through plain torch operations, which have tangents, and derivatives of those."""
    rest, scalars = reference_args(q, k, args)
    return derivatives.attention(q, k, v, *rest, **scalars)


def _needs_grad(args: tuple) -> bool:
    """Whether the Autograd kernel has work to do."""
    if not torch.is_grad_enabled():
        return False
    q, k, v, sinks = *args[:3], args[9]
    return (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (sinks is not None and sinks.requires_grad)
    )


_functions: dict = {}  # from an op to what differentiates it


def _differentiable(name: str):
    """The Autograd kernel of the op `name`, whose gradient is the op ``<name>_backward``."""
    forward_op = getattr(torch.ops.sparse_attn, name).default
    backward_op = getattr(torch.ops.sparse_attn, f"{name}_backward").default

    class Attention(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return forward_op(*args[:17], for_gradients=True)

        @staticmethod
        def setup_context(ctx, inputs, output):
            tensors, ctx.scalars = inputs[:10], inputs[10:16]
            ctx.num_args = len(inputs)
            ctx.save_for_backward(*tensors, *output)

        @staticmethod
        def backward(ctx, dout: Tensor, dlse: Tensor):
            q, k, v, *layout, sinks, out, lse = ctx.saved_tensors
            gradient = backward_op
            if torch._C._are_functorch_transforms_active():
                gradient = _functions[backward_op].apply
            dq, dk, dv, dsinks = gradient(
                dout, dlse, q, k, v, out, lse, *layout, sinks, *ctx.scalars
            )
            none = (None,) * len(layout)
            dsinks = None if sinks is None else dsinks
            return dq, dk, dv, *none, dsinks, *(None,) * (ctx.num_args - 10)

    def call(*args):
        if _forward_mode():
            return _in_forward_mode(*args)
        if _needs_grad(args):
            return Attention.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*args)

    _functions[forward_op] = Attention
    return call


def _twice(name: str):
    """The Autograd kernel of a backward op, whose own derivatives are those of the reference."""
    op = getattr(torch.ops.sparse_attn, name).default

    class AttentionBackward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            dout, dlse, q, k, v, _, _, *layout_and_sinks = inputs[:14]
            ctx.scalars = inputs[14:]
            ctx.save_for_backward(dout, dlse, q, k, v, *layout_and_sinks)

        @staticmethod
        def backward(ctx, *cotangents):
            dout, dlse, q, k, v, *layout_and_sinks = ctx.saved_tensors
            rest, scalars = reference_args(q, k, (*layout_and_sinks, *ctx.scalars))
            *inputs, dsinks = derivatives.of_gradients(
                cotangents, dout, dlse, q, k, v, *rest, **scalars
            )
            # out and lse follow from q, k, v and sinks, which take their share.
            return *inputs, None, None, *(None,) * 6, dsinks, *(None,) * len(ctx.scalars)

    _functions[op] = AttentionBackward
    return AttentionBackward.apply


for _name in ("attention", "attention_reference", "attention_triton"):
    library.impl(_name, _differentiable(_name), "Autograd")
    library.impl(f"{_name}_backward", _twice(f"{_name}_backward"), "Autograd")


def _not_differentiable(name: str):
    """The Autograd kernel of an op without a gradient: it refuses inputs that need one."""
    op = getattr(torch.ops.sparse_attn, name).default

    def call(*args):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise RuntimeError(
                f"sparse_attn::{name} has no gradient; sparse_attention_varlen is differentiable"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


for _name in ("attention_varlen", "attention_varlen_reference", "attention_varlen_triton"):
    library.impl(_name, _not_differentiable(_name), "Autograd")
