"""Gradients of the attention ops, on torch's Autograd key: the ops themselves are differentiable.

An op reaches its Autograd kernel first, which either records a node of the graph or goes on below
that key (`_AutoDispatchBelowAutograd`) to the backend's kernel. `torch.func` does not run Autograd
kernels of Python: there the `torch.autograd.Function` is applied by hand. Forward mode, and
derivatives of gradients, go through plain torch operations (`reference.derivatives`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..contract.arguments import Arguments, gradients_of, split
from ..layout import BlockLayout
from ..reference import derivatives


def run(
    op: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    arguments: Arguments,
    split_float32: bool,
) -> tuple[Tensor, Tensor]:
    """``op(q, k, v, *arguments)`` for the forward op, by what its Autograd kernel does: to reach
    that kernel, in Python, costs more than a small call.
    """
    options = {"split_float32": True} if split_float32 else {}
    if torch.compiler.is_compiling():
        return op(q, k, v, *arguments, **options)
    if _forward_mode():
        return _in_forward_mode(q, k, v, *arguments)
    if torch._C._are_functorch_transforms_active() or (
        torch.is_grad_enabled() and _needs_grad(q, k, v, arguments)
    ):
        return _functions[op].apply(q, k, v, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(q, k, v, *arguments, **options)


def validated(q: Tensor, k: Tensor, arguments: Arguments) -> tuple[BlockLayout, dict[str, Any]]:
    """What the reference takes: a layout whose values were checked, and how to make scores. Both
    are copies, because another thread may write into the tensors of the caller.
    """
    arguments = arguments.copied()
    return arguments.layout((q.shape[2], k.shape[2])).validate(), arguments.scores()


def _forward_mode() -> bool:
    """Whether tangents may be asked for."""
    return torch.autograd.forward_ad._current_level >= 0


def _in_forward_mode(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The op through plain torch operations, which have tangents, and derivatives of those."""
    layout, scores = validated(q, k, Arguments(*rest))
    return derivatives.attention(q, k, v, layout, **scores)


def _needs_grad(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments) -> bool:
    """Whether an input requires a gradient."""
    needs_grad = q.requires_grad or k.requires_grad or v.requires_grad
    return needs_grad or arguments.needs_grad()


_functions: dict[Any, Any] = {}  # from an op to what differentiates it


def _op(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.sparse_attn, name).default


def differentiable(name: str, suffix: str) -> Callable[..., Any]:
    """The Autograd kernel of a backend's op, whose gradient is its op ``<name>_backward``."""
    forward_op, backward_op = _op(f"{name}{suffix}"), _op(f"{name}_backward{suffix}")

    class Attention(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs):  # named arguments would cost more than the rest of a small call
            with torch._C._AutoDispatchBelowAutograd():
                return forward_op(*inputs, for_gradients=True)

        @staticmethod
        def setup_context(ctx, inputs, output):
            q, k, v, *rest = inputs
            tensors, ctx.numbers = split(rest)
            ctx.save_for_backward(q, k, v, *output, *tensors)

        @staticmethod
        def backward(ctx, dout: Tensor, dlse: Tensor):
            q, k, v, out, lse, *tensors = ctx.saved_tensors
            arguments = Arguments(*tensors, *ctx.numbers)
            inputs = (dout, dlse, q, k, v, out, lse, *arguments)
            if torch._C._are_functorch_transforms_active():
                gradients = _functions[backward_op].apply(*inputs)
            elif torch.is_grad_enabled() or _forward_mode():
                gradients = backward_op(*inputs)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    gradients = backward_op(*inputs)
            dq, dk, dv, *others = gradients
            return dq, dk, dv, *gradients_of(arguments, others)

    def call(q: Tensor, k: Tensor, v: Tensor, *rest, **options):
        if _forward_mode():
            return _in_forward_mode(q, k, v, *rest)
        if torch.is_grad_enabled() and _needs_grad(q, k, v, Arguments(*rest)):
            return Attention.apply(q, k, v, *rest)
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(q, k, v, *rest, **options)

    _functions[forward_op] = Attention
    return call


def twice_differentiable(name: str, suffix: str) -> Callable[..., Any]:
    """The Autograd kernel of a backward op, whose own derivatives are those of the reference."""
    op = _op(f"{name}{suffix}")

    class AttentionBackward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            dout, dlse, q, k, v, _out, _lse, *rest = inputs
            tensors, ctx.numbers = split(rest)
            ctx.save_for_backward(dout, dlse, q, k, v, *tensors)

        @staticmethod
        def backward(ctx, *cotangents):
            dout, dlse, q, k, v, *tensors = ctx.saved_tensors
            arguments = Arguments(*tensors, *ctx.numbers)
            layout, scores = validated(q, k, arguments)
            inputs, others = derivatives.of_gradients(
                cotangents, dout, dlse, q, k, v, layout, **scores
            )
            # out and lse follow from the other inputs, which take their share.
            return *inputs, None, None, *gradients_of(arguments, others)

    _functions[op] = AttentionBackward
    return AttentionBackward.apply


def not_differentiable(name: str, suffix: str) -> Callable[..., Any]:
    """The Autograd kernel of an op without a gradient: it refuses inputs that need one."""
    op = _op(f"{name}{suffix}")

    def call(*args):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise RuntimeError(
                f"sparse_attn::{name}{suffix} has no gradient; "
                "sparse_attention_varlen is differentiable"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call
