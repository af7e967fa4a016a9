"""The ops on Triton: arguments are checked, described to the kernels, and the kernels launched."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from .. import validation, varlen
from ..layout import BlockLayout
from . import backward, forward, prepare, reasons
from .autotune import Choice
from .configs import Target
from .launch import Call, Launch

_MAX_LENGTH = 2**30 - 1


def _refuse(q: Tensor, v: Tensor) -> None:
    if found := reasons(q, v):
        raise ValueError(f"sparse_attn on Triton: {'; '.join(found)}")


def _layout(seqlens: tuple[int, int], args: tuple) -> BlockLayout:
    """The layout from the schema's arguments from `sink` on, its values checked.

    On a GPU `prepare` checks them without waiting for the device: that fails asynchronously, and
    the kernels read within their tensors whatever the values are.
    """
    if max(seqlens) > _MAX_LENGTH:
        raise ValueError(f"seqlens must be at most {_MAX_LENGTH}, got {seqlens}")
    sink, window, *lists = args[:6]
    layout = BlockLayout(seqlens, sink, window, args[7:9], *lists, args[9])
    return layout if layout.device.type == "cuda" else layout.validate()


def _check_packing(q: Tensor, k: Tensor, packing: varlen.Packing, seqlens: tuple) -> None:
    if q.device.type != "cuda":
        varlen.check_values(q, k, packing, seqlens)
    else:
        _assert_none(varlen.violations(q, k, packing, seqlens))


def _assert_none(violations: Iterable[tuple[str, Tensor, str]]) -> None:
    for name, bad, why in violations:
        torch._assert_async(~bad.any(), f"a value of {name} {why}")


def _call(
    q: Tensor, k: Tensor, batch: int, layout: BlockLayout, args: tuple,
    packing: varlen.Packing | None = None,
) -> tuple[list[Launch], Call]:  # fmt: skip
    """What to run first, and the call."""
    sinks, (scale, softcap, is_causal) = args[6], args[10:13]
    validation.check_sinks(sinks, q)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    launches = []
    if batch > 0:
        launches, layout = prepare.launches(layout, packing, (q.shape[0], k.shape[0]), is_causal)
    heads = (q.shape[1], k.shape[-2 if packing else 1])
    return launches, Call(layout, *heads, batch, sinks, scale, softcap, is_causal)


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


def attention(q: Tensor, k: Tensor, v: Tensor, *args) -> tuple[Tensor, Tensor]:
    """out and lse; float32 in three products of TF32 if `split_float32` permits it and no gradient
    will compute the scores again.
    """
    _refuse(q, v)
    validation.check_qkv(q, k, v)
    layout = _layout((q.shape[2], k.shape[2]), args)
    validation.check_layout(layout, q, k)
    split_float32, for_gradients = (*args[13:], False, False)[:2]
    first, call = _call(q, k, q.shape[0], layout, args)
    may_split = split_float32 and not for_gradients
    tensors = [_rows(x) for x in (q, k, v)]
    steps, (out, lse) = forward.steps(call, *tensors, None, may_split, Target.of(q))
    _run(first + steps, q)
    return out.to(q.dtype), lse


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, *args) -> tuple[Tensor, Tensor]:
    """out and lse of packed sequences."""
    _refuse(q, v)
    packing, seqlens, args = varlen.Packing(*args[:4]), args[4:6], args[6:]
    validation.check_packed(q, k, v, packing)
    layout = _layout(tuple(seqlens), args)
    batch = packing.cu_seqlens_q.shape[0] - 1
    validation.check_packed_layout(layout, q, batch)
    _check_packing(q, k, packing, layout.seqlens)
    packing = varlen.Packing(
        *(None if x is None else x.contiguous() for x in vars(packing).values())
    )
    first, call = _call(q, k, batch, layout, args, packing)
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
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks (empty without sinks)."""
    _refuse(q, v)
    validation.check_qkv(q, k, v)
    layout = _layout((q.shape[2], k.shape[2]), args)
    validation.check_layout(layout, q, k)
    shape = (*q.shape[:3], v.shape[-1])
    for x, name in ((dout, "dout"), (out, "out")):
        _check_rows(x, name, shape, q.dtype)
    for x, name in ((dlse, "dlse"), (lse, "lse")):
        _check_rows(x, name, shape[:3], torch.float32)
    first, call = _call(q, k, q.shape[0], layout, args)
    dlse, lse = dlse.contiguous(), lse.contiguous()
    dout, out, *tensors = (_rows(x) for x in (dout, out, q, k, v))
    steps, (dq, dk, dv, delta) = backward.steps(call, dout, dlse, *tensors, out, lse, Target.of(q))
    _run(first + steps, q)
    return *(x.to(q.dtype) for x in (dq, dk, dv)), _sink_gradients(call.sinks, lse, delta, args[6])


def _sink_gradients(
    sinks: Tensor | None, lse: Tensor, delta: Tensor, given: Tensor | None
) -> Tensor:
    if sinks is None:
        return lse.new_empty(0)
    logits = sinks[:, None]
    weights = torch.where(logits == -torch.inf, 0, torch.exp(logits - lse))
    return -(weights * delta).sum((0, 2)).to(given.dtype)
