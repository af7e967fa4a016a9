"""Checks of the public functions' arguments, each with a message that names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..layout import BlockLayout
from .dtypes import DTYPES
from .packing import Packing


def _check_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.is_nested:
            raise ValueError(f"{name} is a nested tensor; sparse_attention_varlen takes sequences")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Types, devices, dtypes and shapes of q, k, v.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _check_kinds(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must be [batch, heads, seqlen, head_dim], got shape {list(x.shape)}"
            )
    batch, num_heads, seqlen_q, head_dim = q.shape
    k_batch, num_kv_heads, seqlen_kv, k_head_dim = k.shape
    v_batch, v_heads, v_seqlen, head_dim_v = v.shape
    for name, size in (("k", k_batch), ("v", v_batch)):
        if size != batch:
            raise ValueError(f"{name} must have q's batch size {batch}, got {size}")
    if v_heads != num_kv_heads or v_seqlen != seqlen_kv:
        raise ValueError(
            f"v must have k's heads and seqlen {[num_kv_heads, seqlen_kv]}, "
            f"got {[v_heads, v_seqlen]}"
        )
    if k_head_dim != head_dim:
        raise ValueError(f"k must have q's head_dim {head_dim}, got {k_head_dim}")
    if min(batch, num_heads, num_kv_heads, head_dim, head_dim_v) < 1:
        raise ValueError(
            "batch, heads and head dims must be positive, got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if num_heads % num_kv_heads:
        hint = ""
        if seqlen_q and seqlen_kv and seqlen_q % seqlen_kv == 0:  # so are heads
            hint = ": tensors in [batch, seqlen, heads, head_dim] order need x.transpose(1, 2)"
        raise ValueError(
            f"q has {num_heads} heads, not a multiple of the {num_kv_heads} heads of k{hint}"
        )


def check_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> None:
    """Types, dtypes and shapes of packed sequences. Values are checked by the op.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _check_kinds(q, k, v)
    paged = packing.block_table is not None
    if paged != (packing.seqlens_kv is not None) or paged == (packing.cu_seqlens_kv is not None):
        raise ValueError(
            "give either cu_seqlens_kv for packed k and v, or block_table and seqlens_kv for a "
            "paged cache"
        )
    rows = "[num_pages, page_size," if paged else "[total_kv,"
    for name, x, shape in (
        ("q", q, "[total_q, num_heads, head_dim]"),
        ("k", k, f"{rows} num_kv_heads, head_dim]"),
        ("v", v, f"{rows} num_kv_heads, head_dim_v]"),
    ):
        if x.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} must be {shape}, got shape {list(x.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must have k's shape {list(k.shape[:-1])}, got {list(v.shape[:-1])}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's head_dim {q.shape[-1]}, got {k.shape[-1]}")
    if min(q.shape[1], *k.shape[1:], v.shape[-1]) < 1:
        raise ValueError(
            "heads, head dims and page_size must be positive, got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if q.shape[1] % k.shape[-2]:
        raise ValueError(
            f"q has {q.shape[1]} heads, not a multiple of the {k.shape[-2]} heads of k"
        )
    sizes = {"cu_seqlens_q": (1, 1), "cu_seqlens_kv": (1, 1), "seqlens_kv": (1, 0)}
    for name, (dim, extra) in (sizes | {"block_table": (2, 0)}).items():
        x = getattr(packing, name)
        if x is None and name != "cu_seqlens_q":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype != torch.int32 or x.dim() != dim or x.device != q.device:
            raise ValueError(
                f"{name} must be int32, {dim}-D and on {q.device}, got {x.dtype} {list(x.shape)} "
                f"on {x.device}"
            )
        batch = packing.cu_seqlens_q.shape[0] - 1
        if batch < 0 or x.shape[0] != batch + extra:
            raise ValueError(
                f"{name} has {x.shape[0]} entries, but cu_seqlens_q tells of {batch} sequences"
            )


def check_packed_layout(layout: BlockLayout, q: Tensor, batch: int) -> None:
    """Whether the layout fits the heads and the batch of packed sequences.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """
    if not isinstance(layout, BlockLayout):
        refuse_mask("layout", layout)
        raise TypeError(
            f"layout must be a BlockLayout, got {type(layout).__name__}; selectors look at padded "
            "q and k, so call them on each sequence and put their lists into one layout"
        )
    _check_layout_fits(layout, q, q.shape[1], batch)


def refuse_mask(name: str, value: object) -> None:
    """Raises a TypeError that names the builder, if `value` is another library's mask or a class.

    Args:
        name: what the argument is called.
        value: what was passed for a layout.
    """
    builder = None
    if isinstance(value, type):
        raise TypeError(f"{name} is the class {value.__name__}: pass {value.__name__}(...)")
    if type(value).__name__ == "BlockMask":
        builder = "BlockLayout.from_block_mask(mask)"
    elif isinstance(value, Tensor) and value.layout != torch.strided:
        builder = "BlockLayout.from_csr(mask, block_size=..., seqlens=...)"
    elif isinstance(value, Tensor):
        builder = (
            "BlockLayout.from_dense(mask, block_size=(1, 1), seqlens=...), bool [B, H, Sq, Skv], "
            "takes one of tokens; another block_size one of blocks"
        )
    if builder is not None:
        raise TypeError(f"{name} must be a BlockLayout, got a mask: {builder}")


def check_layout(layout: BlockLayout, q: Tensor, k: Tensor) -> None:
    """Whether the layout was made for these tensors. Its values are checked by the backend.

    Raises:
        TypeError, ValueError: naming the field that does not fit.
    """
    if not isinstance(layout, BlockLayout):
        refuse_mask("layout_or_selector", layout)
        raise TypeError(
            "layout_or_selector must be a BlockLayout or a selector that returns one, got "
            f"{type(layout).__name__}"
        )
    fitted = (q.shape, k.size(2), q.device)
    if layout.__dict__.get("_fits") == fitted and not torch.compiler.is_compiling():
        return
    seqlens = (q.size(2), k.size(2))
    if tuple(layout.seqlens) != seqlens:
        raise ValueError(
            f"the layout is for seqlens {tuple(layout.seqlens)}, but q and k have {seqlens}"
        )
    _check_layout_fits(layout, q, q.size(1), q.size(0))
    if not torch.compiler.is_compiling():
        layout.__dict__["_fits"] = fitted  # the check is a tenth of a small call


def _check_layout_fits(layout: BlockLayout, q: Tensor, num_heads: int, batch: int) -> None:
    if layout.device != q.device:
        raise ValueError(f"the layout is on {layout.device}, but q is on {q.device}")
    for name, x in layout.tensors().items():
        per_head = x.dim() == 1
        heads = x.size(0 if per_head else 1)
        if num_heads % heads:
            raise ValueError(
                f"{name} has {heads} heads, which does not divide the {num_heads} heads of q"
            )
        if not per_head and x.size(0) not in (1, batch):
            raise ValueError(f"{name} has batch size {x.size(0)}, it must be 1 or q's {batch}")


def check_scalars(q: Tensor, scale: float | None, softcap: float | None) -> tuple[float, float]:
    """The softmax scale, ``1 / sqrt(head_dim)`` if None, and the softcap, 0 if None.

    Raises:
        ValueError: if one is no finite number, or softcap is negative.
    """
    if scale is None:
        scale = 1 / math.sqrt(q.size(-1))
    elif type(scale) is not float:
        scale = checks.as_number("scale", scale)
    if softcap is None:
        softcap = 0.0
    elif type(softcap) is not float:
        softcap = checks.as_number("softcap", softcap)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be finite and at least 0 (0 is off), got {softcap}")
    return scale, softcap


def check_per_head(name: str, x: Tensor | None, q: Tensor) -> None:
    """A floating-point ``[H]`` tensor on q's device, or None.

    Raises:
        TypeError, ValueError: if it is not.
    """
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.shape != (q.shape[1],) or not torch.is_floating_point(x):
        raise ValueError(
            f"{name} must be a float tensor [{q.shape[1]}], got {x.dtype} {list(x.shape)}"
        )
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def check_key_bias(
    key_bias: Tensor | None, q: Tensor, batch: int, num_heads: int, seqlen_kv: int
) -> None:
    """A floating-point ``[B', H', seqlen_kv]`` tensor on q's device, or None; ``B'`` is 1 or the
    batch size, ``H'`` divides the number of heads.

    Raises:
        TypeError, ValueError: if it is not.
    """
    if key_bias is None:
        return
    if not isinstance(key_bias, Tensor):
        raise TypeError(f"key_bias must be a tensor, got {type(key_bias).__name__}")
    shape = list(key_bias.shape)
    fits = len(shape) == 3 and shape[0] in (1, batch) and shape[2] == seqlen_kv
    if not fits or shape[1] < 1 or num_heads % shape[1] or not key_bias.is_floating_point():
        raise ValueError(
            f"key_bias must be a float tensor [1 or {batch}, a divisor of {num_heads} heads, "
            f"{seqlen_kv}], got {key_bias.dtype} {shape}"
        )
    if key_bias.device != q.device:
        raise ValueError(f"key_bias must be on q's device {q.device}, got {key_bias.device}")
