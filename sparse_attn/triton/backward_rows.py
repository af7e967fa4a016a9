"""What rows have in common in the backward pass, and dq, by rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .exact import any_of, gradients_of_rows, is_finite, normaliser_of_rows
from .primitives import (
    HIGHEST,
    LOG2E,
    SIZES,
    band_of_rows,
    distances,
    first_bias,
    list_of_row,
    load_keys,
    load_rows,
    load_sink,
    load_window,
    locate,
    probabilities,
    rows_of_tile,
    score_gradients,
    scores,
    store_part,
    store_rows,
    tile_of_band,
    tile_of_columns,
    tile_of_list,
    visible,
)

LARGE = tl.constexpr(4096.0)  # an lse in base 2 that rounding makes inexact
UNDECIDED = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def _preprocess_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, sinks_ptr, delta_ptr, base2_lse_ptr, peak_ptr, norm_ptr,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm, num_heads, num_rows,
    num_states,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``delta = rowsum(dout * out) - dlse`` of `BLOCK_M` rows, counted over ``[batch, heads,
    rows]``; and lse in base 2, inf where a row saw no key, so that nothing of such rows is ever
    used.

    Where lse is so large that rounding makes it inexact, it is NaN there, so that what takes it is
    computed again, from peak and norm, see `exact_probabilities`; which `_backward_rows_kernel`
    then finds. So it is with a sink where all probabilities are 0, as if the row saw no key.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < num_states
    head = row // num_rows % num_heads
    batch = row // num_rows // num_heads
    i = row % num_rows
    offsets = batch * stride_ob + head * stride_oh + i * stride_om
    out = load_rows(out_ptr, offsets, exists, HEAD_DIM_V, BLOCK_DV).to(tl.float32)
    lse = tl.load(lse_ptr + row, mask=exists, other=0.0)
    sink_logit = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if sinks_ptr is not None:
        sink_logit = tl.load(sinks_ptr + head, mask=exists, other=0.0)
    idle = (lse == sink_logit) & (tl.max(tl.abs(out), 1) == 0)
    offsets = batch * stride_gb + head * stride_gh + i * stride_gm
    dout = load_rows(dout_ptr, offsets, exists & (idle == 0), HEAD_DIM_V, BLOCK_DV)
    dout = dout.to(tl.float32)
    delta = tl.sum(out * dout, 1) - tl.load(dlse_ptr + row, mask=exists, other=0.0)
    delta += tl.sum(dout * 0, 1)  # NaN where dp is infinite or NaN for all keys
    undecided = (tl.abs(lse) > LARGE) | idle
    unseen = idle & (lse == float("-inf"))
    lse *= LOG2E
    norm = tl.where(unseen, float("inf"), tl.where(undecided, UNDECIDED, lse))
    lse = tl.where(unseen, float("inf"), tl.where(undecided, float("nan"), lse))
    tl.store(delta_ptr + row, delta, mask=exists)
    tl.store(base2_lse_ptr + row, lse, mask=exists)
    tl.store(peak_ptr + row, tl.zeros([BLOCK_M], tl.float32), mask=exists)
    tl.store(norm_ptr + row, norm, mask=exists)


@triton.jit
def _rows_step(
    dq, dslopes, q, dout, lse, delta, heads, p, keys, cache, sink, window, rule,
    IS_BAND: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRESCALED: tl.constexpr, SOFTCAP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, without the scale, after one more tile of keys; and what the rows add to the gradients of
    slopes.
    """
    j, live, loaded, full = keys
    k, v = load_keys(j, loaded, cache, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, 1)
    x = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
    pairs = (heads, p, 0, j, loaded)
    x, capped = scores(x, pairs, rule, 1, PRESCALED, SOFTCAP)
    dp = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
    of_scores = probabilities(x, lse[:, None], rule[1]) * (dp - delta[:, None])
    ds = score_gradients(of_scores, capped, SOFTCAP)
    if not full:
        seen = visible(p[:, None], j[None, :], live[None, :], sink, window, IS_BAND, IS_CAUSAL)
        ds = tl.where(seen, ds, 0.0)
        if rule[5] is not None:
            of_scores = tl.where(seen, of_scores, 0.0)
    if rule[5] is not None:
        dslopes -= tl.sum(of_scores * distances(pairs, 1), 1)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=INPUT_PRECISION), dslopes


@triton.jit(do_not_specialize=SIZES)
def _backward_rows_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, peak_ptr, norm_ptr, sinks_ptr,
    dq_ptr, dslopes_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gm,
    sink_ptr, window_ptr, block_counts_ptr, block_indices_ptr, column_counts_ptr,
    column_indices_ptr, bias_ptr, slopes_ptr, order_ptr,
    sink_run, window_run, block_run, block_batch, block_rows, block_width, num_kv_blocks,
    column_run, column_batch, column_rows, column_width, blocks_per_group, bias_run, bias_batch,
    num_heads, seqlen_q, seqlen_kv, num_row_blocks, rows_per_block, parts,
    gradient_scale, scale, unit, softcap, inverse_softcap,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr,
    GROUP_SIZE: tl.constexpr, BLOCK_KV: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    CHUNK: tl.constexpr, IS_CAUSAL: tl.constexpr, PRESCALED: tl.constexpr, SOFTCAP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of rows, and what each adds to the gradient of its head's slope: the walk of
    the forward kernel. Before it, what the probabilities of the rows are divided by, where lse does
    not tell.
    """
    num_packs = num_heads // PACK
    programs = tl.num_programs(0) // parts // num_row_blocks
    pack, row_block = locate(tl.program_id(0) // parts, order_ptr, programs, num_row_blocks)
    batch = pack // num_packs
    head = pack % num_packs * PACK
    begin = row_block * rows_per_block
    end = tl.minimum(begin + rows_per_block, seqlen_q)
    i, member, exists, first, last = rows_of_tile(
        begin, end, tl.program_id(0) % parts, BLOCK_M, PACK
    )
    if first > last:
        return
    shift = seqlen_kv - seqlen_q
    p = i + shift
    p_low = first + shift
    p_high = last + shift

    b = batch.to(tl.int64)
    heads = (head + member).to(tl.int64)
    kv_head = (head // GROUP_SIZE).to(tl.int64)
    state = (b * num_heads + heads) * seqlen_q + i
    lse = tl.load(lse_ptr + state, mask=exists, other=float("inf"))
    delta = tl.load(delta_ptr + state, mask=exists, other=0.0)
    useful = lse != float("inf")
    offsets = b * stride_qb + heads * stride_qh + i.to(tl.int64) * stride_qm
    queries = (q_ptr, offsets, useful)
    q = load_rows(q_ptr, offsets, useful, HEAD_DIM, BLOCK_D)
    offsets = b * stride_gb + heads * stride_gh + i.to(tl.int64) * stride_gm
    grads = (dout_ptr, offsets, useful)
    dout = load_rows(dout_ptr, offsets, useful, HEAD_DIM_V, BLOCK_DV)
    k_ptr += b * stride_kb + kv_head * stride_kh
    v_ptr += b * stride_vb + kv_head * stride_vh
    cache = (k_ptr, v_ptr, stride_kn, stride_vn, None, 0, 0, 0)
    bias_row = first_bias(bias_ptr, batch, head, bias_run, bias_batch, seqlen_kv)
    rule = (scale, unit, softcap, inverse_softcap, bias_ptr, slopes_ptr, bias_row)

    sink = load_sink(sink_ptr, head // sink_run)
    window = load_window(window_ptr, head // window_run)
    band = band_of_rows(p_low, p_high, seqlen_kv, sink, window, BLOCK_N, IS_CAUSAL)
    band_tiles = band[4]
    key_end = band[5]
    listed_end = band_tiles
    tiles = band_tiles
    blocks_ptr, num_blocks = None, 0
    columns_ptr, num_columns = None, 0
    if block_counts_ptr is not None:
        list_row = (batch * block_batch + head // block_run) * block_rows + row_block
        blocks_ptr, num_blocks = list_of_row(
            block_counts_ptr, block_indices_ptr, list_row, block_width
        )
        num_blocks = tl.where(key_end > 0, num_blocks, 0)
        listed_end = band_tiles + tl.cdiv(num_blocks * BLOCK_KV, BLOCK_N)
        tiles = listed_end
    if column_counts_ptr is not None:
        list_row = batch * column_batch + head // column_run
        list_row = list_row * column_rows + row_block // blocks_per_group
        columns_ptr, num_columns = list_of_row(
            column_counts_ptr, column_indices_ptr, list_row, column_width
        )
        tiles = listed_end + tl.cdiv(num_columns, BLOCK_N)
    lists = (listed_end, blocks_ptr, num_blocks, num_kv_blocks, columns_ptr, num_columns, seqlen_kv)
    walk = (heads, p, p_low, p_high, sink, window, band, lists)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dslopes = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(band_tiles):
        keys = tile_of_band(tile, band, p_low, p_high, sink, window, BLOCK_N, IS_CAUSAL)
        dq, dslopes = _rows_step(
            dq, dslopes, q, dout, lse, delta, heads, p, keys, cache, sink, window, rule, True,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, IS_CAUSAL, PRESCALED, SOFTCAP, INPUT_PRECISION,
        )  # fmt: skip
    if block_counts_ptr is not None:
        for tile in range(listed_end - band_tiles):
            keys = tile_of_list(
                tile, p_low, p_high, sink, window, key_end, blocks_ptr, num_blocks, num_kv_blocks,
                BLOCK_N, BLOCK_KV, IS_CAUSAL,
            )  # fmt: skip
            dq, dslopes = _rows_step(
                dq, dslopes, q, dout, lse, delta, heads, p, keys, cache, sink, window, rule, False,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, IS_CAUSAL, PRESCALED, SOFTCAP,
                INPUT_PRECISION,
            )  # fmt: skip
    if column_counts_ptr is not None:
        for tile in tl.range(tiles - listed_end, num_stages=1):
            keys = tile_of_columns(
                tile, p_low, p_high, sink, window, key_end, columns_ptr, num_columns, seqlen_kv,
                blocks_ptr, num_blocks, BLOCK_N, BLOCK_KV, SEARCH_STEPS, IS_CAUSAL,
            )  # fmt: skip
            dq, dslopes = _rows_step(
                dq, dslopes, q, dout, lse, delta, heads, p, keys, cache, sink, window, rule, False,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, IS_CAUSAL, PRESCALED, SOFTCAP,
                INPUT_PRECISION,
            )  # fmt: skip
    dq_offsets = state * HEAD_DIM
    store_rows(dq_ptr, dq * gradient_scale, dq_offsets, exists, HEAD_DIM, BLOCK_D)
    if slopes_ptr is not None:
        tl.store(dslopes_ptr + state, dslopes, mask=exists)
    if any_of(exists[:, None] & (is_finite(dq) == 0)):
        peak = tl.load(peak_ptr + state, mask=exists, other=0.0)
        norm = tl.load(norm_ptr + state, mask=exists, other=float("inf"))
        undecided = norm == UNDECIDED
        if tl.max(undecided.to(tl.int32), 0) > 0:
            m_i, l_i = normaliser_of_rows(
                tiles, walk, queries, cache, rule, BLOCK_N, BLOCK_KV, SEARCH_STEPS, HEAD_DIM,
                BLOCK_D, IS_CAUSAL, PRESCALED, SOFTCAP, INPUT_PRECISION,
            )  # fmt: skip
            empty = m_i == float("-inf")
            m_i = tl.where(empty, 0.0, m_i)
            l_i = tl.where(l_i < float("inf"), l_i, float("nan"))  # a score is inf
            if sinks_ptr is not None:
                sink_logit = tl.load(sinks_ptr + heads, mask=exists, other=0.0)
                sink_logit = tl.where(sink_logit < float("inf"), sink_logit, float("nan"))
                l_i += tl.exp2((sink_logit - m_i * unit) * LOG2E)
                dout = load_rows(dout_ptr, offsets, useful, HEAD_DIM_V, BLOCK_DV)
                not_finite = tl.sum(dout.to(tl.float32) * 0, 1)  # NaN, else 0
                delta += tl.where(undecided & (empty == 0), not_finite, 0.0)
                tl.store(delta_ptr + state, delta, mask=exists)
            found = tl.where(l_i > HIGHEST, HIGHEST, tl.log2(l_i))
            peak = tl.where(undecided, m_i, peak)
            norm = tl.where(undecided, tl.where(empty, float("inf"), found), norm)
            tl.store(peak_ptr + state, peak, mask=exists)
            tl.store(norm_ptr + state, norm, mask=exists)
        repeated = exists & (norm == norm)  # other rows are NaN
        for column in range(0, HEAD_DIM, CHUNK):
            part, found_dslopes = gradients_of_rows(
                column, tiles, walk, queries, grads, peak, norm, delta, cache, rule, CHUNK, BLOCK_N,
                BLOCK_KV, SEARCH_STEPS, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, IS_CAUSAL,
                PRESCALED, SOFTCAP, INPUT_PRECISION,
            )  # fmt: skip
            part *= gradient_scale
            store_part(dq_ptr, part, dq_offsets, repeated, column, HEAD_DIM, CHUNK)
            if slopes_ptr is not None:
                tl.store(dslopes_ptr + state, found_dslopes, mask=repeated)
