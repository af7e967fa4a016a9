"""The ops on Triton: arguments are checked, described to the kernels, and the kernels launched."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from ..contract import packing as packed
from ..contract import validation
from ..contract.arguments import DIFFERENTIABLE, Arguments
from ..contract.packing import Packing
from ..contract.request import Request
from ..layout import BlockLayout
from . import backward, forward, prepare
from .autotune import Choice
from .configs import Target
from .launch import Call, Launch
from .support import reasons

_MAX_LENGTH = 2**30 - 1


def refuse(request: Request) -> None:
    """Raises a ValueError with all reasons against a request."""
    if found := reasons(request):
        raise ValueError(f"sparse_attn on Triton: {'; '.join(found)}")


def _layout(seqlens: tuple[int, int], arguments: Arguments) -> BlockLayout:
    """The call's layout, its values checked.

    On a GPU `prepare` checks them without waiting for the device: that fails asynchronously, and
    the kernels read within their tensors whatever the values are.
    """
    if max(seqlens) > _MAX_LENGTH:
        raise ValueError(f"seqlens must be at most {_MAX_LENGTH}, got {seqlens}")
    layout = arguments.layout(seqlens)
    return layout if layout.device.type == "cuda" else layout.validate()


def _check_packing(q: Tensor, k: Tensor, packing: Packing, seqlens: tuple[int, int]) -> None:
    if q.device.type != "cuda":
        packed.check_values(q, k, packing, seqlens)
    else:
        _assert_none(packed.violations(q, k, packing, seqlens))


def _assert_none(violations: Iterable[tuple[str, Tensor, str]]) -> None:
    for name, bad, why in violations:
        torch._assert_async(~bad.any(), f"a value of {name} {why}")


def _call(
    q: Tensor, k: Tensor, batch: int, layout: BlockLayout, arguments: Arguments,
    packing: Packing | None = None,
) -> tuple[list[Launch], Call]:  # fmt: skip
    """What to run first, and the call."""
    validation.check_per_head("sink_logits", arguments.sink_logits, q)
    validation.check_per_head("alibi_slopes", arguments.alibi_slopes, q)
    validation.check_key_bias(arguments.key_bias, q, batch, q.shape[1], layout.seqlen_kv)
    sink_logits, *biases = (
        None if x is None else x.float().contiguous()
        for x in (arguments.sink_logits, arguments.key_bias, arguments.alibi_slopes)
    )
    launches = []
    if batch > 0:
        totals = (q.shape[0], k.shape[0])
        launches, layout = prepare.launches(layout, packing, totals, arguments.is_causal)
    heads = (q.shape[1], k.shape[-2 if packing else 1])
    numbers = (arguments.scale, arguments.softcap, arguments.is_causal)
    return launches, Call(layout, *heads, batch, sink_logits, *numbers, *biases)


def _run(steps: list[Choice | Launch], q: Tensor) -> None:
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        for step in steps:
            step()


def _rows(x: Tensor) -> Tensor:
    """A tensor whose rows the kernels can read.

    The interpreter computes with bfloat16's bit patterns as if they were numbers, and truncates
    where it stores bfloat16: there, and only there, bfloat16 is computed in float32.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def attention(
    q: Tensor, k: Tensor, v: Tensor, *rest, split_float32: bool = False, for_gradients: bool = False
) -> tuple[Tensor, Tensor]:
    """out and lse; float32 in three products of TF32 if `split_float32` permits it and no gradient
    will compute the scores again.
    """
    arguments = Arguments(*rest)
    refuse(Request("attention", q, k, v, arguments.features()))
    validation.check_qkv(q, k, v)
    layout = _layout((q.shape[2], k.shape[2]), arguments)
    validation.check_layout(layout, q, k)
    first, call = _call(q, k, q.shape[0], layout, arguments)
    may_split = split_float32 and not for_gradients
    tensors = [_rows(x) for x in (q, k, v)]
    steps, (out, lse) = forward.steps(call, *tensors, None, may_split, Target.of(q))
    _run(first + steps, q)
    return out.to(q.dtype), lse


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor | None,
    seqlens_kv: Tensor | None, block_table: Tensor | None, max_seqlen_q: int, max_seqlen_kv: int,
    *rest,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse of packed sequences."""
    arguments = Arguments(*rest)
    refuse(Request("attention", q, k, v, arguments.features()))
    packing = Packing(cu_seqlens_q, cu_seqlens_kv, seqlens_kv, block_table)
    validation.check_packed(q, k, v, packing)
    layout = _layout((max_seqlen_q, max_seqlen_kv), arguments)
    batch = packing.cu_seqlens_q.shape[0] - 1
    validation.check_packed_layout(layout, q, batch)
    _check_packing(q, k, packing, layout.seqlens)
    packing = Packing(*(None if x is None else x.contiguous() for x in vars(packing).values()))
    first, call = _call(q, k, batch, layout, arguments, packing)
    tensors = [_rows(x) for x in (q, k, v)]
    steps, (out, lse) = forward.steps(call, *tensors, packing, False, Target.of(q))
    _run(first + steps, q)
    return out.to(q.dtype), lse


def _check_rows(x: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x.dim() != len(shape):
        raise ValueError(f"{name} must have {len(shape)} dimensions, but has shape {list(x.shape)}")
    if x.dtype != dtype:
        raise ValueError(f"{name} has the wrong dtype {x.dtype}, it must be {dtype}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, it must be {list(shape)}")


def attention_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest
) -> tuple[Tensor, ...]:
    """dq, dk, dv and the gradients of `DIFFERENTIABLE` (empty where there is no such argument)."""
    arguments = Arguments(*rest)
    refuse(Request("attention", q, k, v, arguments.features()))
    validation.check_qkv(q, k, v)
    layout = _layout((q.shape[2], k.shape[2]), arguments)
    validation.check_layout(layout, q, k)
    shape = (*q.shape[:3], v.shape[-1])
    for x, name in ((dout, "dout"), (out, "out")):
        _check_rows(x, name, shape, q.dtype)
    for x, name in ((dlse, "dlse"), (lse, "lse")):
        _check_rows(x, name, shape[:3], torch.float32)
    first, call = _call(q, k, q.shape[0], layout, arguments)
    dlse, lse = dlse.contiguous(), lse.contiguous()
    dout, out, *tensors = (_rows(x) for x in (dout, out, q, k, v))
    steps, results = backward.steps(call, dout, dlse, *tensors, out, lse, Target.of(q))
    _run(first + steps, q)
    dq, dk, dv, delta, dslopes, dbias = results
    dsinks = _sink_gradients(call.sink_logits, lse, delta)
    others = (dsinks, _bias_gradients(dbias, arguments.key_bias))
    others += (None if dslopes is None else dslopes.sum((0, 2)),)
    given = (getattr(arguments, name) for name in DIFFERENTIABLE)
    return *(x.to(q.dtype) for x in (dq, dk, dv)), *(
        lse.new_empty(0) if x is None else x.to(y.dtype) for x, y in zip(others, given, strict=True)
    )


def _bias_gradients(dbias: Tensor | None, key_bias: Tensor | None) -> Tensor | None:
    """Gradients of key_bias from those for each pack of heads ``[B, Hkv, Skv, packs]``."""
    if dbias is None:
        return None
    by_pack = dbias.transpose(2, 3).flatten(1, 2)
    by_head = by_pack.unflatten(1, (key_bias.shape[1], -1)).sum(2)
    return by_head.sum(0, keepdim=True) if len(key_bias) == 1 else by_head


def _sink_gradients(sink_logits: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    if sink_logits is None:
        return None
    logits = sink_logits[:, None]
    weights = torch.where(logits == -torch.inf, 0, torch.exp(logits - lse))
    return -(weights * delta).sum((0, 2))
