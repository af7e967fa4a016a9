"""The op pair as torch sees it: schemas, fakes, and the reference as the implementation for every
device.

A compiled extension overrides ``sparse_attn::attention[_backward]`` on its dispatch key. The pair
``sparse_attn::attention_reference[_backward]`` has the same schema and no override.
"""

from __future__ import annotations

import importlib
import logging

import torch
from torch import Tensor

from . import reference, varlen
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


def _reference_args(q: Tensor, k: Tensor, args: tuple) -> tuple[tuple, dict]:
    """The schema's arguments from `sink` on as the reference takes them, with the layout
    validated.
    """
    return _layout_args((q.shape[2], k.shape[2]), args)


def _layout_args(seqlens: tuple[int, int], args: tuple) -> tuple[tuple, dict]:
    sink, window, kv_num_blocks, kv_indices, num_columns, column_indices, sinks = args[:7]
    block_q, block_kv, column_group, scale, softcap, is_causal = args[7:13]
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
    rest, scalars = _reference_args(q, k, args)
    return reference.attention(q, k, v, *rest, **scalars)


def _attention_backward(dout, dlse, q, k, v, out, lse, *args) -> tuple[Tensor, ...]:
    rest, scalars = _reference_args(q, k, args)
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


for _name in ("attention", "attention_reference"):
    for _suffix, _schema, _impl, _fake in (
        ("", _FORWARD, _attention, _fake_attention),
        ("_backward", _BACKWARD, _attention_backward, _fake_attention_backward),
    ):
        library.define(_name + _suffix + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(_name + _suffix, _impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sparse_attn::{_name}{_suffix}", _fake, lib=library)
for _name in ("attention_varlen", "attention_varlen_reference"):
    library.define(_name + _VARLEN, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_name, _attention_varlen, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_attn::{_name}", _fake_attention_varlen, lib=library)

try:
    _C = importlib.import_module("sparse_attn._C")
    extension_error: str | None = None
except ImportError as error:
    _C = None
    extension_error = str(error)
    logging.getLogger("sparse_attn").warning(
        "the C++ extension is not available (%s): CPU tensors use the reference backend, which is "
        "right but slow. Install a C++20 compiler and reinstall sparse-attn to build it.",
        error,
    )
