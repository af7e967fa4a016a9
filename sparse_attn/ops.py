"""The op pair as torch sees it: schemas, fakes, and the reference as the implementation for every
device.

The compiled extension overrides ``sparse_attn::attention[_backward]`` on the CPU, Triton on GPUs.
The pairs ``sparse_attn::attention_reference[_backward]`` and ``attention_triton[_backward]`` have
the same schema and no override.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from . import extension, reference, triton, varlen
from .layout import BlockLayout

_LAYOUT = (
    "Tensor sink, Tensor window, Tensor? kv_num_blocks, Tensor? kv_indices, Tensor? num_columns, "
    "Tensor? column_indices, Tensor? sinks, int block_q, int block_kv, int column_group, "
    "float scale, float softcap, bool is_causal"
)
# split_float32 permits products of float32 in three of bfloat16. for_gradients asks for the scores,
# rounding included, that the backward op computes again from lse.
_FORWARD = (
    f"(Tensor q, Tensor k, Tensor v, {_LAYOUT}, bool split_float32=False, "
    "bool for_gradients=False) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_LAYOUT}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_VARLEN = (
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_kv, "
    "Tensor? seqlens_kv, Tensor? block_table, int max_seqlen_q, int max_seqlen_kv, "
    f"{_LAYOUT}) -> (Tensor, Tensor)"
)

library = torch.library.Library("sparse_attn", "DEF")


def layout_args(
    layout: BlockLayout, sinks: Tensor | None, scale: float, softcap: float, is_causal: bool
) -> tuple:
    """The arguments of both ops from `sink` on, in the schema's order."""
    return (
        layout.sink,
        layout.window,
        layout.kv_num_blocks,
        layout.kv_indices,
        layout.num_columns,
        layout.column_indices,
        sinks,
        *layout.block_size,
        layout.column_group,
        scale,
        softcap,
        is_causal,
    )


def reference_args(q: Tensor, k: Tensor, args: tuple) -> tuple[tuple, dict]:
    """The schema's arguments from `sink` on as the reference takes them, with a validated copy of
    the layout.
    """
    return _layout_args((q.shape[2], k.shape[2]), args)


def _layout_args(seqlens: tuple[int, int], args: tuple) -> tuple[tuple, dict]:
    # Another thread may write into the tensors of the caller.
    lists = (None if x is None else x.clone() for x in args[:6])
    sink, window, kv_num_blocks, kv_indices, num_columns, column_indices = lists
    sinks, block_q, block_kv, column_group, scale, softcap, is_causal = args[6:13]
    layout = BlockLayout(
        seqlens,
        sink,
        window,
        (block_q, block_kv),
        kv_num_blocks,
        kv_indices,
        num_columns,
        column_indices,
        column_group,
    ).validate()
    return (layout, sinks), {"scale": scale, "softcap": softcap, "is_causal": is_causal}


def _attention(q: Tensor, k: Tensor, v: Tensor, *args) -> tuple[Tensor, Tensor]:
    rest, scalars = reference_args(q, k, args)
    return reference.attention(q, k, v, *rest, **scalars)


def _attention_backward(dout, dlse, q, k, v, out, lse, *args) -> tuple[Tensor, ...]:
    rest, scalars = reference_args(q, k, args)
    return reference.attention_backward(dout, dlse, q, k, v, *rest, **scalars)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *args) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=reference.compute_dtype(q.dtype))
    return reference.empty_out(q, v), lse


def _fake_attention_backward(dout, dlse, q, k, v, out, lse, *args) -> tuple[Tensor, ...]:
    sinks = args[6]
    contiguous = torch.contiguous_format
    dsinks = q.new_empty(0, dtype=reference.compute_dtype(q.dtype))
    return (
        torch.empty_like(q, memory_format=contiguous),
        torch.empty_like(k, memory_format=contiguous),
        torch.empty_like(v, memory_format=contiguous),
        dsinks if sinks is None else torch.empty_like(sinks),
    )


def _attention_varlen(q: Tensor, k: Tensor, v: Tensor, *args) -> tuple[Tensor, Tensor]:
    (layout, sinks), scalars = _layout_args(args[4:6], args[6:])

    def attend(q, k, v, layout):
        return reference.attention(q, k, v, layout, sinks, **scalars)

    return varlen.attention(attend, q, k, v, layout, varlen.Packing(*args[:4]))


def _fake_attention_varlen(q: Tensor, k: Tensor, v: Tensor, *args) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=reference.compute_dtype(q.dtype))
    return q.new_empty((*q.shape[:2], v.shape[-1])), lse


def _on_gpu(triton_op, reference_op, first: int):
    """The Triton op where it can run the call, else the reference; q is argument `first`, and v two
    arguments later.
    """

    def call(*args):
        op = reference_op if triton.reasons(args[first], args[first + 2]) else triton_op
        return op(*args)

    return call


for _base, _schema, _first, _reference, _triton, _fake in (
    ("attention{}", _FORWARD, 0, _attention, triton.attention, _fake_attention),
    (
        "attention{}_backward",
        _BACKWARD,
        2,
        _attention_backward,
        triton.attention_backward,
        _fake_attention_backward,
    ),
    (
        "attention_varlen{}",
        _VARLEN,
        0,
        _attention_varlen,
        triton.attention_varlen,
        _fake_attention_varlen,
    ),
):
    for _suffix, _impl in (("", _reference), ("_reference", _reference), ("_triton", _triton)):
        _name = _base.format(_suffix)
        library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(_name, _impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sparse_attn::{_name}", _fake, lib=library)
    library.impl(_base.format(""), _on_gpu(_triton, _reference, _first), "CUDA")

_C, extension_error = extension.load()
if _C is None:
    logging.getLogger("sparse_attn").warning(
        "the C++ extension is not available: %s. Until then CPU tensors use the reference backend, "
        "which is right but slow.",
        extension_error,
    )
