"""`torch.nn.functional.scaled_dot_product_attention` with a selector of keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from . import checks
from .api import checked, sparse_attention
from .contract import validation
from .contract.dtypes import autocast
from .contract.request import Request
from .layout import BlockLayout
from .ops.backends import BACKENDS
from .ops.dense import torch_is_faster
from .typing import Backend, SelectorLike


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    selector: BlockLayout | SelectorLike | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with an optional selector of keys.

    Without a selector the result is torch's in every case: dense calls that the C++ kernels serve
    run there, all others (masks, dropout, other ranks and dtypes, subclasses of tensors, GPUs,
    `torch.func`, `torch.nn.attention.sdpa_kernel`, and calls so small that torch takes less time)
    go to torch itself. Two things are better than torch's on CPUs: causal calls with ``scale <=
    0``, for which its kernel gives NaN, are right, and what the C++ kernels serve has second
    derivatives and forward mode.
    With a selector, row ``i`` sees only the keys that it selects, and what cannot be combined with
    it is refused by name.

    Args:
        query: ``[..., seqlen_q, head_dim]``; 4-D ``[batch, num_heads, seqlen_q, head_dim]`` with a
            selector.
        key: ``[..., seqlen_kv, head_dim]``.
        value: ``[..., seqlen_kv, head_dim_v]``.
        attn_mask: bool (True = attend) or additive float mask, broadcastable to ``[..., seqlen_q,
            seqlen_kv]``; not with a selector. Default None.
        dropout_p: probability of dropping an attention weight; must be 0 with a selector. Default
            0.
        is_causal: whether row ``i`` sees only keys ``j <= i``: torch's top-left alignment, unlike
            `sparse_attention`. Default False.
        scale: factor of the scores. Default ``1 / sqrt(head_dim)``.
        enable_gqa: whether key and value may have fewer heads than query. Default False.
        selector: a `BlockLayout` or a selector as in `sparse_attention`, or None for dense. Default
            None.
        backend: "auto", "cpu", "triton" or "reference"; a named backend serves the call or refuses
            it. Default "auto".

    Returns:
        Tensor: ``[..., seqlen_q, head_dim_v]`` in query's dtype.

    Raises:
        TypeError, ValueError: naming the argument that a selector or a named backend does not
            serve, and whatever torch raises for the rest.

    Example:
        >>> from sparse_attn import selectors
        >>> q, k, v = torch.randn(3, 1, 4, 256, 64).unbind(0)
        >>> dense = scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> window = selectors.SlidingWindow(window=64)
        >>> banded = scaled_dot_product_attention(q, k, v, is_causal=True, selector=window)
    """
    if selector is None and backend == "auto" and _is_torchs(query, key):
        return _torchs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    query, key, value = autocast(query, key, value)
    call = (query, key, value, attn_mask, dropout_p, is_causal)
    if selector is None and backend == "auto":
        if not _gains(*call, scale, enable_gqa):
            return _torchs(*call, scale, enable_gqa)
    elif reasons := _sdpa_refusals(*call, enable_gqa):
        asker = "a selector" if selector is not None else f"backend={backend!r}"
        raise ValueError(f"scaled_dot_product_attention with {asker}: {'; '.join(reasons)}")
    if selector is not None and not isinstance(selector, BlockLayout):
        validation.refuse_mask("selector", selector)
        checks.check_selector("selector", selector)
    if is_causal and key.shape[2] != query.shape[2]:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if selector is None:
        selector = BlockLayout.dense((query.shape[2], key.shape[2]), device=query.device)
    return sparse_attention(
        query, key, value, selector, is_causal=is_causal, scale=scale, backend=backend
    )


def _is_torchs(q: Tensor, k: Tensor) -> bool:
    """Whether torch's function is the quicker one for a call of the ordinary kind."""
    return _plain(q) and _plain(k) and torch_is_faster(q, k)


def _gains(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> bool:
    """Whether the C++ kernels serve a call of torch's function, in less time than torch. What they
    refuse is left to torch, and so are subclasses of tensors, `torch.func` and `sdpa_kernel`.
    """
    if attn_mask is not None or dropout_p != 0.0:
        return False
    if not (type(is_causal) is type(enable_gqa) is bool):
        return False
    if not (scale is None or (type(scale) is float and -math.inf < scale < math.inf)):
        return False
    if not (_plain(q) and _plain(k) and _plain(v)):
        return False
    if torch._C._are_functorch_transforms_active() or _pinned():
        return False
    return (
        _is_compiled_for(q, k, v)
        and (enable_gqa or q.shape[1] == k.shape[1])
        and not (is_causal and q.shape[2] > k.shape[2])
    )


def _is_compiled_for(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the C++ kernels take dense calls of such tensors."""
    try:
        op = checked(q, k, v, "auto").get(frozenset())
    except (TypeError, ValueError):  # torch takes them, or says what is wrong
        return False
    if op is None:
        return not BACKENDS["cpu"].reasons(Request("attention", q, k, v))
    return op is torch.ops.sparse_attn.attention.default


def _plain(x: Tensor) -> bool:
    """Whether x is ``[batch, heads, seqlen, head_dim]``, and a tensor of the ordinary kind."""
    kind = type(x) in (Tensor, Parameter) and x.layout is torch.strided and not x.is_nested
    return kind and x.dim() == 4


@torch.compiler.assume_constant_result
def _pinned() -> bool:
    """Whether `torch.nn.attention.sdpa_kernel` leaves torch some of its kernels only."""
    kernels = torch.backends.cuda
    return not (
        kernels.flash_sdp_enabled()
        and kernels.math_sdp_enabled()
        and kernels.mem_efficient_sdp_enabled()
    )


def _torchs(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> Tensor:
    """torch's function, right for every scale: its CPU kernel for causal calls gives NaN, or other
    numbers, with ``scale <= 0``. The sign, or the 0, goes into q, exactly.
    """
    wrong = is_causal is True and isinstance(scale, float | int) and scale <= 0
    if wrong and isinstance(q, Tensor):
        q, scale = (q * -1, -scale) if scale < 0 else (q * 0, 1.0)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _sdpa_refusals(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa) -> list[str]:
    """Why `sparse_attention` cannot serve a call of torch's function; one sentence for each
    argument.
    """
    reasons = []
    if attn_mask is not None:
        reasons.append("attn_mask is not supported; express it as a BlockLayout")
    if dropout_p != 0.0:
        reasons.append(f"dropout_p must be 0, got {dropout_p}")
    try:
        validation.check_qkv(q, k, v)
    except (TypeError, ValueError) as error:
        return [*reasons, str(error)]
    is_causal, enable_gqa = (
        checks.as_bool(name, x)
        for name, x in (("is_causal", is_causal), ("enable_gqa", enable_gqa))
    )
    if not enable_gqa and q.shape[1] != k.shape[1]:
        reasons.append(f"enable_gqa must be True for {q.shape[1]} query and {k.shape[1]} key heads")
    if is_causal and q.shape[2] > k.shape[2]:
        reasons.append(
            "is_causal with more queries than keys is top-left aligned in torch, which no layout "
            "says: use sparse_attention, whose alignment is bottom-right"
        )
    return reasons
