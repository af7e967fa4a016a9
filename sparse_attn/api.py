"""The public attention functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import checks, notices
from .contract import validation
from .contract.arguments import Arguments
from .contract.dtypes import autocast, compute_dtype
from .contract.packing import Packing
from .contract.request import FEATURES, Request
from .layout import BlockLayout
from .ops import autograd, backends
from .reference import varlen
from .typing import Backend, SelectorLike


# fmt: off
@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout_or_selector: BlockLayout | SelectorLike, *,
    is_causal: bool = ..., scale: float | None = ..., softcap: float | None = ...,
    sink_logits: Tensor | None = ..., key_bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., return_lse: Literal[False] = ..., backend: Backend = ...,
) -> Tensor: ...
@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout_or_selector: BlockLayout | SelectorLike, *,
    is_causal: bool = ..., scale: float | None = ..., softcap: float | None = ...,
    sink_logits: Tensor | None = ..., key_bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., return_lse: Literal[True], backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout_or_selector: BlockLayout | SelectorLike, *,
    is_causal: bool = ..., scale: float | None = ..., softcap: float | None = ...,
    sink_logits: Tensor | None = ..., key_bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., return_lse: bool, backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_or_selector: BlockLayout | SelectorLike,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    softcap: float | None = 0.0,
    sink_logits: Tensor | None = None,
    key_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each row sees only the keys that a layout names.

    Equivalent PyTorch, for ``softcap=0`` and ``sink_logits=None``::

        mask = layout.to_dense(is_causal=is_causal, num_heads=q.shape[1])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    With ``softcap > 0`` the scores are ``softcap * tanh(scale * q @ k.mT / softcap)``; with
    `sink_logits`, ``exp(sink_logits[h])`` joins the softmax denominator of head ``h`` and carries
    no value.

    Args:
        q: ``[batch, num_heads, seqlen_q, head_dim]``, float32, bfloat16, float16 or float64; any
            strides.
        k: ``[batch, num_kv_heads, seqlen_kv, head_dim]``; `num_kv_heads` divides `num_heads` (GQA,
            MQA): query head ``h`` reads KV head ``h // (num_heads // num_kv_heads)``.
        v: ``[batch, num_kv_heads, seqlen_kv, head_dim_v]``.
        layout_or_selector: a `BlockLayout` for ``(seqlen_q, seqlen_kv)``, or a callable
            ``selector(q, k, is_causal=..., scale=...)`` that returns one; it runs without
            gradients.
        is_causal: whether row ``i`` sees no key after ``i + seqlen_kv - seqlen_q``, so that the
            last query sees the last key (bottom-right alignment, what decoding and chunked prefill
            need). Default True.
        scale: factor of the scores. Default ``1 / sqrt(head_dim)``.
        softcap: bound of the scores, 0 or None for none. Default 0.
        sink_logits: learnable sink logits, floating-point ``[num_heads]``, or None. Default None.
        key_bias: added to the scores of each key, after the softcap: floating-point ``[batch or 1,
            H', seqlen_kv]``, where ``H'`` divides `num_heads`; the log of how many keys a merged
            one stands for. None for none. Default None.
        alibi_slopes: ALiBi's slopes, floating-point ``[num_heads]``: ``slope * |p - j|`` is
            subtracted from the score of key ``j`` in the row at position ``p = i + seqlen_kv -
            seqlen_q``. None for none. Default None.
        return_lse: whether to return the log-sum-exp too. Default False.
        backend: "auto", "cpu", "triton" or "reference". A named backend never falls back. Default
            "auto".

    float32 is multiplied as float32, unless `torch.set_float32_matmul_precision` permits less: at
    "high" or "medium", when no gradient is asked for, a CPU with AMX multiplies it as the sum of
    two bfloat16, to 16 bits, and a GPU in three products of TF32.

    Returns:
        Tensor: ``[batch, num_heads, seqlen_q, head_dim_v]`` in q's dtype; 0 in rows that see no
        key. With ``return_lse=True`` a tuple ``(out, lse)``, lse float32 (float64 for float64)
        ``[batch, num_heads, seqlen_q]``, the natural log of the softmax denominator (sink
        included), -inf in empty rows. Both are differentiable with respect to q, k, v, sink_logits,
        key_bias and alibi_slopes.

    Raises:
        TypeError, ValueError: naming the argument; for a backend that cannot run the call, with its
        reasons.

    Example:
        >>> from sparse_attn import selectors
        >>> q, k, v = torch.randn(3, 1, 4, 256, 64).unbind(0)
        >>> sparse_attention(q, k, v, selectors.SinkWindow(sink=4, window=64)).shape
        torch.Size([1, 4, 256, 64])
    """
    q, k, v = autocast(q, k, v)
    ops_of = checked(q, k, v, backend)
    if not (type(is_causal) is type(return_lse) is bool):
        is_causal = checks.as_bool("is_causal", is_causal)
        return_lse = checks.as_bool("return_lse", return_lse)
    scale, softcap = validation.check_scalars(q, scale, softcap)
    layout = _layout(layout_or_selector, q, k, is_causal, scale)
    biases = (sink_logits, key_bias, alibi_slopes)
    if not sink_logits is key_bias is alibi_slopes is None:
        biases = _biases(q, *biases, q.shape[0], k.shape[2])
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    arguments = Arguments.of(layout, scale, softcap, is_causal, *biases)
    features = arguments.features()
    op = ops_of.get(features) or _chosen(ops_of, Request("attention", q, k, v, features), backend)
    split_float32 = q.dtype == torch.float32 and _may_split_float32()
    out, lse = autograd.run(op, q, k, v, arguments, split_float32)
    return (out, lse) if return_lse else out


# fmt: off
@overload
def sparse_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor | None = ..., seqlens_kv: Tensor | None = ...,
    block_table: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., softcap: float | None = ...,
    sink_logits: Tensor | None = ..., key_bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., return_lse: Literal[False] = ..., backend: Backend = ...,
) -> Tensor: ...
@overload
def sparse_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor | None = ..., seqlens_kv: Tensor | None = ...,
    block_table: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., softcap: float | None = ...,
    sink_logits: Tensor | None = ..., key_bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., return_lse: Literal[True], backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def sparse_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor | None = ..., seqlens_kv: Tensor | None = ...,
    block_table: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., softcap: float | None = ...,
    sink_logits: Tensor | None = ..., key_bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., return_lse: bool, backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
def sparse_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor | None = None,
    seqlens_kv: Tensor | None = None,
    block_table: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    softcap: float | None = 0.0,
    sink_logits: Tensor | None = None,
    key_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`sparse_attention` for sequences of different lengths, without padding; long and short ones
    may be mixed.

    Equivalent PyTorch for packed k and v, with ``layout_of(b)`` the layout for the lengths of
    sequence ``b``::

        for b in range(batch):
            rows = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
            keys = slice(cu_seqlens_kv[b], cu_seqlens_kv[b + 1])
            one = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
            out[rows] = sparse_attention(*one, layout_of(b))[0].transpose(0, 1)

    Args:
        q: ``[total_q, num_heads, head_dim]``, the queries of all sequences after one another.
        k: packed ``[total_kv, num_kv_heads, head_dim]`` with `cu_seqlens_kv`, or a paged cache
            ``[num_pages, page_size, num_kv_heads, head_dim]`` with `block_table` and `seqlens_kv`.
        v: like k, with ``head_dim_v``.
        layout: one layout for the batch, whose `seqlens` are at least the greatest lengths; its
            lists have batch size 1 or `batch`. Sequence ``b`` uses its first rows; position ``p``
            follows from its own lengths, and blocks and columns beyond them are not seen.
        cu_seqlens_q: int32 ``[batch + 1]``, where each sequence's queries begin, from 0 to
            `total_q`.
        cu_seqlens_kv: int32 ``[batch + 1]``, the same for keys, to at most `total_kv`; with packed
            keys. Default None.
        seqlens_kv: int32 ``[batch]``, number of keys of each sequence in the cache; with a paged
            cache. Default None.
        block_table: int32 ``[batch, max_pages]``: key ``j`` of sequence ``b`` lies in row
            ``j % page_size`` of page ``block_table[b, j // page_size]``. Entries behind a
            sequence's last page are ignored; with a paged cache. Default None.
        is_causal: as in `sparse_attention`, for each sequence by its own lengths. Default True.
        scale: factor of the scores. Default ``1 / sqrt(head_dim)``.
        softcap: bound of the scores, 0 or None for none. Default 0.
        sink_logits: learnable sink logits ``[num_heads]``, or None. Default None.
        key_bias: as in `sparse_attention`, ``[batch or 1, H', layout.seqlen_kv]``: each sequence
            takes the first ones. Default None.
        alibi_slopes: as in `sparse_attention`, positions by each sequence's own lengths. Default
            None.
        return_lse: whether to return the log-sum-exp too. Default False.
        backend: "auto", "cpu", "triton" or "reference". Default "auto".

    Returns:
        Tensor: ``[total_q, num_heads, head_dim_v]`` in q's dtype; with ``return_lse=True`` a tuple
        ``(out, lse)``, lse ``[num_heads, total_q]``. Differentiable for packed k and v.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument; for gradients with a paged cache.

    Example:
        >>> q, k, v = torch.randn(3, 12, 4, 64).unbind(0)
        >>> ends = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> layout = BlockLayout.sink_window((7, 7), sink=1, window=4)
        >>> out = sparse_attention_varlen(
        ...     q, k, v, layout, cu_seqlens_q=ends, cu_seqlens_kv=ends
        ... )
        >>> out.shape
        torch.Size([12, 4, 64])
    """
    q, k, v = autocast(q, k, v)
    packing = Packing(cu_seqlens_q, cu_seqlens_kv, seqlens_kv, block_table)
    validation.check_packed(q, k, v, packing)
    is_causal = checks.as_bool("is_causal", is_causal)
    return_lse = checks.as_bool("return_lse", return_lse)
    scale, softcap = validation.check_scalars(q, scale, softcap)
    batch = cu_seqlens_q.shape[0] - 1
    validation.check_packed_layout(layout, q, batch)
    biases = _biases(q, sink_logits, key_bias, alibi_slopes, batch, layout.seqlen_kv)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    arguments = Arguments.of(layout, scale, softcap, is_causal, *biases)
    features = arguments.features() | {"packed" if block_table is None else "paged"}
    request = Request("attention_varlen", q, k, v, features)
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or arguments.needs_grad()
    ):
        if block_table is not None:
            raise ValueError(
                "a paged cache (block_table) has no gradients: detach all inputs, or use "
                "torch.no_grad()"
            )
        op = backends.op_for(backend, request._replace(op="attention"))

        def attend(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments) -> tuple[Tensor, Tensor]:
            return op(q, k, v, *arguments)

        out, lse = varlen.attention(attend, q, k, v, layout.validate(), arguments, packing)
    else:
        op = backends.op_for(backend, request)
        tensors = (cu_seqlens_q, cu_seqlens_kv, seqlens_kv, block_table)
        tensors = (None if x is None else x.contiguous() for x in tensors)
        out, lse = op(q, k, v, *tensors, *layout.seqlens, *arguments)
    return (out, lse) if return_lse else out


def _biases(
    q: Tensor,
    sink_logits: Tensor | None,
    key_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    batch: int,
    seqlen_kv: int,
) -> list[Tensor | None]:
    """What is added to scores, checked, in the dtype of scores."""
    validation.check_per_head("sink_logits", sink_logits, q)
    validation.check_key_bias(key_bias, q, batch, q.shape[1], seqlen_kv)
    validation.check_per_head("alibi_slopes", alibi_slopes, q)
    dtype = compute_dtype(q.dtype)
    return [None if x is None else x.to(dtype) for x in (sink_logits, key_bias, alibi_slopes)]


_Ops = dict[frozenset[str], Any]  # from the features of calls to the op that serves them

# What `checked` found for shapes, dtypes and devices seen before. Checking takes longer than a
# small call.
_seen: dict[tuple, _Ops] = {}
_MAX_SEEN = 4096


def checked(q: Tensor, k: Tensor, v: Tensor, backend: str) -> _Ops:
    """Checks q, k and v, and returns the ops that `_chosen` has found for such tensors."""
    if torch.compiler.is_compiling():
        validation.check_qkv(q, k, v)
        return {}
    try:
        # fmt: off
        key = (
            backend, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device,
        )
        # fmt: on
        found = _seen.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no tensors, symbolic sizes, nested ones
        key = found = None
    if found is None:
        validation.check_qkv(q, k, v)
        backends.check_backend(backend)
        found = {}
        if key is not None:
            if len(_seen) >= _MAX_SEEN:
                _seen.clear()
            _seen[key] = found
    return found


def _chosen(found: _Ops, request: Request, backend: str) -> Any:
    """The op that serves a request of checked tensors. The first of a kind may have a warning."""
    op = backends.op_for(backend, request)
    if not torch.compiler.is_compiling():
        notices.notice_order(request.q, request.k)
        found[request.features] = op
    return op


@torch.compiler.assume_constant_result
def _may_split_float32() -> bool:
    """Whether torch's global setting permits products of float32 in fewer bits."""
    return torch.get_float32_matmul_precision() != "highest"


def _layout(
    source: BlockLayout | SelectorLike, q: Tensor, k: Tensor, is_causal: bool, scale: float
) -> BlockLayout:
    """The layout itself, or what the selector makes of q and k."""
    if not isinstance(source, BlockLayout) and callable(source):
        if isinstance(source, type):
            checks.check_selector("layout_or_selector", source)
        if torch.is_grad_enabled():
            with torch.no_grad():
                source = source(q, k, is_causal=is_causal, scale=scale)
        else:
            source = source(q, k, is_causal=is_causal, scale=scale)
    validation.check_layout(source, q, k)
    return source


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features: Iterable[str] = (),
    backend: Backend = "auto",
) -> backends.Explanation:
    """Which backend `sparse_attention` would run a call on, and every reason against the others;
    runs nothing.

    Args:
        q: as in `sparse_attention`.
        k: as in `sparse_attention`.
        v: as in `sparse_attention`.
        features: what the call asks for beyond dense attention, names out of "blocks", "columns",
            "softcap", "sink_logits", "key_bias", "alibi_slopes", "packed" and "paged". Default
            none.
        backend: as in `sparse_attention`. Default "auto".

    Returns:
        Explanation: `.backend` (str, or None if no backend can run it) and `.reasons` (dict from
        backend to a list of sentences, empty if it can); ``print()`` shows both.

    Raises:
        TypeError, ValueError: if the tensors do not fit together, or a feature or `backend` is
            unknown.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 256, 64, dtype=torch.float64).unbind(0)
        >>> explain(q, k, v).backend
        'reference'
    """
    q, k, v = autocast(q, k, v)
    validation.check_qkv(q, k, v)
    if isinstance(features, str) or not isinstance(features, Iterable):
        raise TypeError(f"features must be a collection of names, got {features!r}")
    asked = frozenset(features)
    if unknown := sorted(asked - FEATURES):
        raise ValueError(f"features must be out of {sorted(FEATURES)}, got {unknown}")
    return backends.choose(backend, Request("attention", q, k, v, asked))
