"""Landmark attention, put together from calls of the op pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks
from ..contract import validation
from ..contract.arguments import Arguments
from ..contract.dtypes import autocast, compute_dtype
from ..contract.request import Request
from ..contract.results import empty_out
from ..layout import BlockLayout
from ..ops.backends import op_for
from ..typing import Backend

_CHUNK = 16  # landmarks whose scores are computed at once
_TILE_ELEMENTS, _FEWEST_ROWS = 2**19, 256  # of the sums of rows that are computed together


# fmt: off
@overload
def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, top_k: int | None = ...,
    scale: float | None = ..., return_lse: Literal[False] = ..., backend: Backend = ...,
) -> Tensor: ...
@overload
def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, top_k: int | None = ...,
    scale: float | None = ..., return_lse: Literal[True], backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, top_k: int | None = ...,
    scale: float | None = ..., return_lse: bool, backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which the last token of each block, its landmark, decides how much the
    block's tokens weigh (Mohtashami and Jaggi, arXiv 2305.16300).

    Position ``j`` lies in block ``j // block_size``; row ``i`` stands at ``p = i + seqlen_kv -
    seqlen_q``. With ``s = scale * q @ k.T``, the row's own block ``b``, and ``lm(n)`` the landmark
    of block ``n``::

        gamma = softmax of s over the tokens of block b up to p, no landmark, and lm(n), n < b
        weight of a token j of block b      = gamma[j]
        weight of a token j of block n < b  = gamma[lm(n)] * softmax of s over block n, no landmark
        weight of a landmark                = 0

    So weights of a row sum to 1, values of landmarks are never read, and a landmark's own row does
    not see itself. An unfinished last block has no landmark.

    Each block is a call of the op pair for the rows after it, on any of its backends, and the
    outputs are added up, ``gamma[lm(n)]`` times each; gradients compute them again. Time is that of
    dense attention and of adding up, memory ``O(S)``.

    Args:
        q: ``[batch, num_heads, seqlen_q, head_dim]``, float32, bfloat16, float16 or float64.
        k: ``[batch, num_kv_heads, seqlen_kv, head_dim]``, landmarks included.
        v: ``[batch, num_kv_heads, seqlen_kv, head_dim_v]``.
        block_size: tokens of a block, its landmark included, at least 2.
        top_k: for each row and head only so many earlier blocks are seen, those of the greatest
            landmark scores (all that equal the least of them too), as the paper does while
            generating; the choice is a constant for gradients. Default None: all.
        scale: factor of the scores. Default ``1 / sqrt(head_dim)``.
        return_lse: whether to return the log of gamma's denominator too. Default False.
        backend: "auto", "cpu", "triton" or "reference". Default "auto".

    Returns:
        Tensor: ``[batch, num_heads, seqlen_q, head_dim_v]`` in q's dtype; 0 in rows before the
        first key. With ``return_lse=True`` a tuple ``(out, lse)``, lse float32 (float64 for
        float64) ``[batch, num_heads, seqlen_q]``. Both are differentiable with respect to q, k, v.

    Raises:
        TypeError, ValueError: naming the argument; for a backend that cannot run the call, with its
        reasons.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 200, 64).unbind(0)
        >>> landmark_attention(q, k, v, block_size=51).shape
        torch.Size([1, 4, 200, 64])
    """
    q, k, v = autocast(q, k, v)
    validation.check_qkv(q, k, v)
    scale, _ = validation.check_scalars(q, scale, 0.0)
    block_size = checks.as_int("block_size", block_size, 2)
    top_k = None if top_k is None else checks.as_count("top_k", top_k, 1)
    return_lse = checks.as_bool("return_lse", return_lse)
    forward = op_for(backend, Request("attention", q, k, v))
    backward = op_for(backend, Request("attention_backward", q, k, v), quiet=True)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    dense = BlockLayout.dense((q.shape[2], k.shape[2]), device=q.device)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    blocks = _Blocks(block_size, top_k, scale, forward, backward, dense, trains)
    out, lse = _LandmarkAttention.apply(q, k, v, blocks)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Part:
    """Rows that see some keys in one call of the op: their own block, causally, or an earlier one,
    whose landmark then stands for its log-sum-exp.
    """

    rows: slice
    keys: slice
    landmark: int | None = None


@dataclass(frozen=True)
class _Blocks:
    """How a call is cut into parts, and the ops that run them."""

    block_size: int
    top_k: int | None
    scale: float
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    dense: BlockLayout  # it says the same for all lengths
    trains: bool  # whether gradients will be asked for

    def own(self, q: Tensor, k: Tensor) -> Iterator[_Part]:
        """Each row once, with the tokens of its own block."""
        off, size = k.shape[2] - q.shape[2], self.block_size
        first = max(0, off)
        while first < k.shape[2]:
            begin = first // size * size
            landmark = begin + size - 1
            stop = min(landmark, k.shape[2])
            if first < stop:
                yield _Part(slice(first - off, stop - off), slice(begin, stop))
            if landmark < k.shape[2]:
                yield _Part(slice(landmark - off, landmark - off + 1), slice(begin, landmark))
            first = landmark + 1

    def earlier(self, q: Tensor, k: Tensor) -> Iterator[list[_Part]]:
        """The rows after each block, some blocks at a time."""
        off, size = k.shape[2] - q.shape[2], self.block_size
        last = (k.shape[2] - 1) // size  # the block of the last row
        for start in range(0, last, _CHUNK):
            yield [
                _Part(
                    slice(max(0, (n + 1) * size - off), q.shape[2]),
                    slice(n * size, (n + 1) * size - 1),
                    (n + 1) * size - 1,
                )
                for n in range(start, min(start + _CHUNK, last))
            ]

    def scores(self, q: Tensor, k: Tensor, parts: list[_Part]) -> Tensor:
        """The landmarks' scores ``[B, H, Sq, parts]``, -inf in rows that are not after the block.

        Args:
            q: the queries, in the dtype of scores.
            k: the keys.
            parts: of one list of `earlier`.
        """
        marks = k[:, :, [part.landmark for part in parts]].to(q.dtype)
        scores = q.unflatten(1, (k.shape[1], -1)) @ (self.scale * marks)[:, :, None].mT
        scores = scores.flatten(1, 2)
        for n, part in enumerate(parts):
            scores[:, :, : part.rows.start, n] = -torch.inf
        return scores

    def attend(self, q: Tensor, k: Tensor, v: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of a part."""
        tensors = (q[:, :, part.rows], k[:, :, part.keys], v[:, :, part.keys])
        return self.forward(*tensors, *self._layout(part), for_gradients=self.trains)

    def gradients(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        part: _Part,
        dout: Tensor,
        dlse: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a part's q, k and v from those of its out and lse."""
        tensors = (q[:, :, part.rows], k[:, :, part.keys], v[:, :, part.keys])
        return self.backward(dout, dlse, *tensors, out, lse, *self._layout(part))[:3]

    def _layout(self, part: _Part) -> tuple[Any, ...]:
        return Arguments.of(self.dense, self.scale, is_causal=part.landmark is None)


class _LandmarkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: _Blocks
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(q.dtype)
        out = empty_out(q, v)
        lse, least = torch.empty(2, *q.shape[:3], dtype=dtype, device=q.device)
        for rows, keys in _tiles(q, k, v):
            tensors = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            out[:, :, rows], lse[:, :, rows], least[:, :, rows] = _attend(blocks, *tensors)
        ctx.blocks = blocks
        ctx.save_for_backward(q, k, v, out, lse, least)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse, least = ctx.saved_tensors
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
        for rows, keys in _tiles(q, k, v):
            grad = dout[:, :, rows].to(lse.dtype)
            delta = (grad * out[:, :, rows]).sum(-1) - dlse[:, :, rows]
            dq[:, :, rows] = _add_gradients(
                ctx.blocks,
                (q[:, :, rows], k[:, :, keys], v[:, :, keys]),
                (lse[:, :, rows], least[:, :, rows]),
                (grad, delta),
                (dk[:, :, keys], dv[:, :, keys]),
            )
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _tiles(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows whose sums stay in the caches, and the keys up to the last of them."""
    off, each = k.shape[2] - q.shape[2], q.shape[0] * q.shape[1] * v.shape[3]
    rows = max(_FEWEST_ROWS, _TILE_ELEMENTS // each)
    for start in range(0, q.shape[2], rows):
        stop = min(start + rows, q.shape[2])
        yield slice(start, stop), slice(0, max(0, stop + off))


def _attend(blocks: _Blocks, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and lse of some rows, of which the last sees the last key, and the least score of a
    landmark that each row keeps.
    """
    dtype = compute_dtype(q.dtype)
    queries = q.to(dtype)
    total = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
    own_lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    for part in blocks.own(q, k):
        total[:, :, part.rows], own_lse[:, :, part.rows] = blocks.attend(q, k, v, part)
    lse, least = _normalise(blocks, queries, k, own_lse)
    total *= _weights(own_lse, lse)[..., None]
    for parts in blocks.earlier(q, k):
        gamma = _gamma(blocks, queries, k, parts, lse, least)
        for n, part in enumerate(parts):
            weight = gamma[:, :, part.rows, n]
            if _matters(blocks, weight):
                out, _ = blocks.attend(q, k, v, part)
                total[:, :, part.rows] += out * weight[..., None]
    return total, lse, least


def _add_gradients(
    blocks: _Blocks,
    tensors: tuple[Tensor, Tensor, Tensor],
    softmax: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
) -> Tensor:
    """The gradient of some rows' q; those of k and v are added to `sums`.

    Args:
        blocks: how the call is cut into parts.
        tensors: q, k and v, as in `_attend`.
        softmax: lse and the least scores, from there.
        grads: dout, and ``rowsum(dout * out) - dlse``.
        sums: what dk and dv are added to.
    """
    (q, k, v), (lse, least), (dout, delta), (dk, dv) = tensors, softmax, grads, sums
    queries, dq = q.to(lse.dtype), torch.zeros(q.shape, dtype=lse.dtype, device=q.device)

    def add(part: _Part, weight: Tensor, out: Tensor, part_lse: Tensor) -> Tensor:
        """Adds the gradients through a part of some weight, and returns that of its logit."""
        grad = dout[:, :, part.rows]
        dlogit = weight * ((grad * out).sum(-1) - delta[:, :, part.rows])
        dlse = dlogit if part.landmark is None else torch.zeros_like(dlogit)
        results = (grad * weight[..., None]).to(q.dtype), dlse, out, part_lse
        for total, where, x in zip(
            (dq, dk, dv),
            (part.rows, part.keys, part.keys),
            blocks.gradients(q, k, v, part, *results),
            strict=True,
        ):
            total[:, :, where] += x
        return dlogit

    for part in blocks.own(q, k):
        out, own_lse = blocks.attend(q, k, v, part)
        add(part, _weights(own_lse, lse[:, :, part.rows]), out, own_lse)
    for parts in blocks.earlier(q, k):
        gamma = _gamma(blocks, queries, k, parts, lse, least)
        dscores = torch.zeros_like(gamma)
        for n, part in enumerate(parts):
            weight = gamma[:, :, part.rows, n]
            if _matters(blocks, weight):
                dscores[:, :, part.rows, n] = add(part, weight, *blocks.attend(q, k, v, part))
        marks = [part.landmark for part in parts]
        grouped = (blocks.scale * dscores).unflatten(1, (k.shape[1], -1))
        dq += (grouped @ k[:, :, None, marks].to(lse.dtype)).flatten(1, 2)
        rows = queries.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        dk[:, :, marks] += grouped.flatten(2, 3).mT @ rows
    return dq


def _normalise(blocks: _Blocks, q: Tensor, k: Tensor, own_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The log of gamma's denominator, and the least landmark score that each row keeps."""
    lse, best = own_lse, q.new_empty(*q.shape[:3], 0)
    least = torch.full_like(own_lse, -torch.inf)
    if blocks.top_k is not None:
        for parts in blocks.earlier(q, k):
            best = torch.cat([best, blocks.scores(q, k, parts)], -1)
            best = best.topk(min(blocks.top_k, best.shape[-1]), -1).values
            least = best[..., -1]
    for parts in blocks.earlier(q, k):
        lse = torch.logaddexp(lse, _kept(blocks.scores(q, k, parts), least).logsumexp(-1))
    return lse, least


def _kept(scores: Tensor, least: Tensor) -> Tensor:
    """The scores of the landmarks that each row keeps, -inf for others."""
    return scores.masked_fill(scores < least[..., None], -torch.inf)


def _gamma(
    blocks: _Blocks, q: Tensor, k: Tensor, parts: list[_Part], lse: Tensor, least: Tensor
) -> Tensor:
    """The weights of some blocks ``[B, H, Sq, parts]``."""
    return _weights(_kept(blocks.scores(q, k, parts), least), lse[..., None])


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """``exp(logits - lse)``, 0 where both are -inf."""
    return (logits - lse.clamp(min=torch.finfo(lse.dtype).min)).exp()


def _matters(blocks: _Blocks, weight: Tensor) -> bool:
    """Whether a block has to be computed: with `top_k`, no row may want it."""
    return blocks.top_k is None or bool(weight.any())
