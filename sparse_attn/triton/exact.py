"""What a program does again where its result is not finite: the same sums over the visible pairs
alone.

A tile's matrix product adds ``0 * x`` for pairs that do not see each other, which is NaN if `x` is
not finite; and sums that are divided at the end can overflow where their parts, divided first, do
not. Both leave traces in the result, so that programs look at that once and multiply tiles without
looking at them. Here keys (or rows) that hold NaN or infinities are added one by one to what sees
them. To take no more registers than the programs themselves, `CHUNK` columns of the result are
found at a time, and each step loads all that it multiplies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    LOWEST,
    distances,
    in_band,
    key_offsets,
    load_part,
    load_rows,
    online_sum,
    score_gradients,
    scores,
    tile_of_band,
    tile_of_columns,
    tile_of_list,
)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def products(rows, others, SIZE: tl.constexpr, BLOCK: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """Each of some rows times each of others, both given as ``(pointer, offsets, which exist)``.

    In float32 16 columns at a time: there are no registers for all. The loads are volatile then,
    lest rows are kept from step to step.
    """
    ptr, offsets, live = rows
    other_ptr, other_offsets, other_live = others
    if ptr.dtype.element_ty == tl.float32:
        x = tl.zeros([live.shape[0], other_live.shape[0]], tl.float32)
        for first in tl.range(0, SIZE, 16, num_stages=1):
            columns = first + tl.arange(0, 16)[None, :]
            mask = live[:, None] & (columns < SIZE)
            a = tl.load(ptr + offsets[:, None] + columns, mask=mask, other=0.0, volatile=True)
            mask = other_live[:, None] & (columns < SIZE)
            b = tl.load(
                other_ptr + other_offsets[:, None] + columns, mask=mask, other=0.0, volatile=True
            )
            x = tl.dot(a, tl.trans(b), x, input_precision=INPUT_PRECISION)
    else:
        a = load_rows(ptr, offsets, live, SIZE, BLOCK)
        b = load_rows(other_ptr, other_offsets, other_live, SIZE, BLOCK)
        x = tl.dot(a, tl.trans(b), input_precision=INPUT_PRECISION)
    return x


@triton.jit
def any_of(x):
    """Whether anything of a tile holds."""
    return tl.max(tl.max(x.to(tl.int32), 1), 0) > 0


@triton.jit
def add_product(acc, a, seen, b, INPUT_PRECISION: tl.constexpr):
    """`acc` plus ``a[m, n] * b[n, d]`` for each pair ``(m, n)`` that is `seen`, and no other."""
    slots = tl.arange(0, b.shape[0])
    special = tl.max((is_finite(b) == 0).to(tl.int32), 1) > 0
    usual = tl.where(seen & (special == 0)[None, :], a, 0.0).to(b.dtype)
    usual_b = tl.where(special[:, None], 0.0, b).to(b.dtype)
    acc = tl.dot(usual, usual_b, acc, input_precision=INPUT_PRECISION)
    special = special & (tl.max(seen.to(tl.int32), 0) > 0)
    count = tl.sum(special.to(tl.int32), 0)
    if count > 0:  # and nothing more once all is NaN
        count = tl.where(any_of(acc == acc), count, 0)
    for _ in tl.range(count, num_stages=1):
        n = tl.min(tl.where(special, slots, b.shape[0]), 0)
        special = special & (slots != n)
        here = slots == n
        weights = tl.sum(tl.where(here[None, :], a, 0.0), 1)
        sees = tl.max((here[None, :] & seen).to(tl.int32), 1) > 0
        row = tl.sum(tl.where(here[:, None], b.to(tl.float32), 0.0), 0)
        acc += tl.where(sees[:, None], weights[:, None] * row[None, :], 0.0)
    return acc


@triton.jit
def exact_probabilities(x, peak, norm, unit):
    """``exp((x - peak) * unit) / 2**norm``: lse as two numbers, for `x` of any size; rows without
    keys have a norm of inf. At most 1, though products in other tiles than the peak's may be
    rounded otherwise.
    """
    exponent = (x - peak) * (unit * LOG2E) - norm
    return tl.exp2(tl.where(exponent > 0, 0.0, exponent))


@triton.jit
def keys_of_walk(
    tile, walk, BLOCK_N: tl.constexpr, BLOCK_KV: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """The keys of any tile of the walk over sink and window, blocks and columns, and which rows see
    which of them.
    """
    _, p, p_low, p_high, sink, window, band, lists = walk
    listed_end, blocks_ptr, num_blocks, num_kv_blocks, columns_ptr, num_columns, seqlen_kv = lists
    band_tiles = band[4]
    key_end = band[5]
    j, live, _loaded, _full = tile_of_band(
        tile, band, p_low, p_high, sink, window, BLOCK_N, IS_CAUSAL
    )
    if blocks_ptr is not None:  # noqa: SIM102
        if (tile >= band_tiles) & (tile < listed_end):
            j, live, _loaded, _full = tile_of_list(
                tile - band_tiles, p_low, p_high, sink, window, key_end, blocks_ptr, num_blocks,
                num_kv_blocks, BLOCK_N, BLOCK_KV, IS_CAUSAL,
            )  # fmt: skip
    if columns_ptr is not None:  # noqa: SIM102
        if tile >= listed_end:
            j, live, _loaded, _full = tile_of_columns(
                tile - listed_end, p_low, p_high, sink, window, key_end, columns_ptr, num_columns,
                seqlen_kv, blocks_ptr, num_blocks, BLOCK_N, BLOCK_KV, SEARCH_STEPS, IS_CAUSAL,
            )  # fmt: skip
    banded = in_band(p[:, None], j[None, :], sink, window, IS_CAUSAL)
    seen = live[None, :] & (banded == (tile < band_tiles))
    if IS_CAUSAL:
        seen = seen & (j[None, :] <= p[:, None])
    return j, live, seen


@triton.jit
def scores_of_walk(
    tile, walk, queries, cache, rule, BLOCK_N: tl.constexpr, BLOCK_KV: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr, IS_CAUSAL: tl.constexpr, PRESCALED: tl.constexpr,
    SOFTCAP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of rows and the keys of a tile, as `scores` has them; these keys, and which rows
    see which.
    """
    k_ptr, stride_kn, pages_ptr = cache[0], cache[2], cache[4]
    stride_kp, num_pages = cache[5], cache[7]
    j, live, seen = keys_of_walk(tile, walk, BLOCK_N, BLOCK_KV, SEARCH_STEPS, IS_CAUSAL)
    offsets, live_k = key_offsets(j, live, stride_kn, pages_ptr, stride_kp, num_pages, PAGE_SIZE)
    x = products(queries, (k_ptr, offsets, live_k), HEAD_DIM, BLOCK_D, INPUT_PRECISION)
    x, capped = scores(x, (walk[0], walk[1], 0, j, live), rule, 1, PRESCALED, SOFTCAP)
    return x, capped, j, live, seen


@triton.jit
def values_of_rows(
    first, begin, end, walk, queries, m_i, factor, cache, rule, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_KV: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr, IS_CAUSAL: tl.constexpr, PRESCALED: tl.constexpr,
    SOFTCAP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """out of rows, from the tiles `begin` to `end` of their walk: columns from number `first` on.

    Probabilities are divided first, except in float16, where they would lose digits and nothing
    overflows.
    """
    v_ptr, stride_vn, pages_ptr = cache[1], cache[3], cache[4]
    stride_vp, num_pages = cache[6], cache[7]
    divides_first: tl.constexpr = v_ptr.dtype.element_ty != tl.float16
    m_safe = tl.where(m_i == float("-inf"), 0.0, m_i)
    acc = tl.zeros([queries[2].shape[0], CHUNK], tl.float32)
    for tile in tl.range(begin, end, num_stages=1):
        x, _capped, j, live, seen = scores_of_walk(
            tile, walk, queries, cache, rule, BLOCK_N, BLOCK_KV, SEARCH_STEPS, HEAD_DIM, BLOCK_D,
            PAGE_SIZE, IS_CAUSAL, PRESCALED, SOFTCAP, INPUT_PRECISION,
        )  # fmt: skip
        p = exact_probabilities(x, m_safe[:, None], 0.0, rule[1])
        if divides_first:
            p = p * factor[:, None]
        offsets, live_v = key_offsets(
            j, live, stride_vn, pages_ptr, stride_vp, num_pages, PAGE_SIZE
        )
        v = load_part(v_ptr, offsets, live_v, first, HEAD_DIM_V, CHUNK)
        acc = add_product(acc, p, seen, v, INPUT_PRECISION)
    if not divides_first:
        acc = acc * factor[:, None]
    return acc


@triton.jit
def normaliser_of_rows(
    tiles, walk, queries, cache, rule, BLOCK_N: tl.constexpr, BLOCK_KV: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRESCALED: tl.constexpr, SOFTCAP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest score of each row (-inf if it sees no key), and the sum as `online_softmax` has
    it.
    """
    m_i = tl.full([queries[2].shape[0]], float("-inf"), tl.float32)
    l_i = tl.zeros([queries[2].shape[0]], tl.float32)
    for tile in tl.range(tiles, num_stages=1):
        x, _capped, _j, _live, seen = scores_of_walk(
            tile, walk, queries, cache, rule, BLOCK_N, BLOCK_KV, SEARCH_STEPS, HEAD_DIM, BLOCK_D, 1,
            IS_CAUSAL, PRESCALED, SOFTCAP, INPUT_PRECISION,
        )  # fmt: skip
        x = tl.where(seen, x, float("-inf"))
        floor = tl.where(tl.max(seen.to(tl.int32), 1) > 0, LOWEST, float("-inf"))
        _p, _alpha, m_i, l_i = online_sum(m_i, l_i, x, floor, rule[1])
    return m_i, l_i


@triton.jit
def gradients_of_rows(
    first, tiles, walk, queries, grads, peak, norm, delta, cache, rule, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_KV: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, IS_CAUSAL: tl.constexpr, PRESCALED: tl.constexpr,
    SOFTCAP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of rows, without the scale: columns from number `first` on; and what the rows add to the
    gradients of slopes.
    """
    k_ptr, v_ptr, stride_kn, stride_vn = cache[0], cache[1], cache[2], cache[3]
    dq = tl.zeros([queries[2].shape[0], CHUNK], tl.float32)
    dslopes = tl.zeros([queries[2].shape[0]], tl.float32)
    for tile in tl.range(tiles, num_stages=1):
        x, capped, j, live, seen = scores_of_walk(
            tile, walk, queries, cache, rule, BLOCK_N, BLOCK_KV, SEARCH_STEPS, HEAD_DIM, BLOCK_D, 1,
            IS_CAUSAL, PRESCALED, SOFTCAP, INPUT_PRECISION,
        )  # fmt: skip
        values = (v_ptr, j.to(tl.int64) * stride_vn, live)
        dp = products(grads, values, HEAD_DIM_V, BLOCK_DV, INPUT_PRECISION)
        ds = exact_probabilities(x, peak[:, None], norm[:, None], rule[1]) * (dp - delta[:, None])
        if rule[5] is not None:
            far = distances((walk[0], walk[1], 0, j, live), 1)
            dslopes -= tl.sum(tl.where(seen, ds * far, 0.0), 1)
        ds = score_gradients(ds, capped, SOFTCAP)
        k = load_part(k_ptr, j.to(tl.int64) * stride_kn, live, first, HEAD_DIM, CHUNK)
        dq = add_product(dq, ds, seen, k, INPUT_PRECISION)
    return dq, dslopes
