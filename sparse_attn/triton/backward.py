"""The gradients: one kernel for what rows have in common, one for dq by rows, one for dk and dv by
keys. Each result has one writer; there are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, lists
from .autotune import Choice
from .launch import Call, Launch, input_precision, strides
from .primitives import (
    LOG2E,
    SIZES,
    all_visible,
    band_of_rows,
    even_part,
    in_list,
    list_of_row,
    load_keys,
    load_rows,
    load_window,
    locate,
    probabilities,
    rows_of_tile,
    score_gradients,
    scores,
    store_rows,
    tile_of_band,
    tile_of_columns,
    tile_of_list,
    visible,
)


@triton.jit(do_not_specialize=SIZES)
def _preprocess_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, sinks_ptr, delta_ptr, seen_lse_ptr,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm, num_heads, num_rows,
    num_states,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``delta = rowsum(dout * out) - dlse`` of `BLOCK_M` rows, counted over ``[batch, heads,
    rows]``; and lse in base 2, inf where a row saw no key, so that nothing of such rows is ever
    used.
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
    delta = tl.sum(out * dout.to(tl.float32), 1) - tl.load(dlse_ptr + row, mask=exists, other=0.0)
    tl.store(delta_ptr + row, delta, mask=exists)
    tl.store(seen_lse_ptr + row, tl.where(idle, float("inf"), lse * LOG2E), mask=exists)


@triton.jit
def _rows_step(
    dq, q, dout, lse, delta, p, keys, cache, sink, window, inner_scale, softcap,
    IS_BAND: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, IS_CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, without the scale, after one more tile of keys."""
    j, live, loaded, full = keys
    k, v = load_keys(j, loaded, cache, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, 1)
    s = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
    s = scores(s, inner_scale, softcap, SOFTCAP)
    dp = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
    ds = probabilities(s, lse[:, None]) * (dp - delta[:, None])
    ds = score_gradients(ds, s, softcap, SOFTCAP)
    if not full:
        seen = visible(p[:, None], j[None, :], live[None, :], sink, window, IS_BAND, IS_CAUSAL)
        ds = tl.where(seen, ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=INPUT_PRECISION)


@triton.jit(do_not_specialize=SIZES)
def _backward_rows_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gm,
    sink_ptr, window_ptr, block_counts_ptr, block_indices_ptr, column_counts_ptr,
    column_indices_ptr, order_ptr,
    sink_run, window_run, block_run, block_batch, block_rows, block_width, num_kv_blocks,
    column_run, column_batch, column_rows, column_width, blocks_per_group,
    num_heads, seqlen_q, seqlen_kv, num_row_blocks, rows_per_block, parts,
    scale, inner_scale, softcap,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr,
    GROUP_SIZE: tl.constexpr, BLOCK_KV: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of rows: the walk of the forward kernel."""
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
    useful = lse < float("inf")
    offsets = b * stride_qb + heads * stride_qh + i.to(tl.int64) * stride_qm
    q = load_rows(q_ptr, offsets, useful, HEAD_DIM, BLOCK_D)
    offsets = b * stride_gb + heads * stride_gh + i.to(tl.int64) * stride_gm
    dout = load_rows(dout_ptr, offsets, useful, HEAD_DIM_V, BLOCK_DV)
    k_ptr += b * stride_kb + kv_head * stride_kh
    v_ptr += b * stride_vb + kv_head * stride_vh
    cache = (k_ptr, v_ptr, stride_kn, stride_vn, None, 0, 0, 0)

    sink = tl.load(sink_ptr + head // sink_run)
    window = load_window(window_ptr, head // window_run)
    band = band_of_rows(p_low, p_high, seqlen_kv, sink, window, BLOCK_N, IS_CAUSAL)
    key_end = band[5]
    blocks_ptr = None
    num_blocks = 0
    if block_counts_ptr is not None:
        list_row = (batch * block_batch + head // block_run) * block_rows + row_block
        blocks_ptr, num_blocks = list_of_row(
            block_counts_ptr, block_indices_ptr, list_row, block_width
        )
        num_blocks = tl.where(key_end > 0, num_blocks, 0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(band[4]):
        keys = tile_of_band(tile, band, p_low, p_high, sink, window, BLOCK_N, IS_CAUSAL)
        dq = _rows_step(
            dq, q, dout, lse, delta, p, keys, cache, sink, window, inner_scale, softcap, True,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, IS_CAUSAL, SOFTCAP, INPUT_PRECISION,
        )  # fmt: skip
    if block_counts_ptr is not None:
        for tile in range(tl.cdiv(num_blocks * BLOCK_KV, BLOCK_N)):
            keys = tile_of_list(
                tile, p_low, p_high, sink, window, key_end, blocks_ptr, num_blocks, num_kv_blocks,
                BLOCK_N, BLOCK_KV, IS_CAUSAL,
            )  # fmt: skip
            dq = _rows_step(
                dq, q, dout, lse, delta, p, keys, cache, sink, window, inner_scale, softcap, False,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, IS_CAUSAL, SOFTCAP, INPUT_PRECISION,
            )  # fmt: skip
    if column_counts_ptr is not None:
        list_row = batch * column_batch + head // column_run
        list_row = list_row * column_rows + row_block // blocks_per_group
        columns_ptr, num_columns = list_of_row(
            column_counts_ptr, column_indices_ptr, list_row, column_width
        )
        for tile in tl.range(tl.cdiv(num_columns, BLOCK_N), num_stages=1):
            keys = tile_of_columns(
                tile, p_low, p_high, sink, window, key_end, columns_ptr, num_columns, seqlen_kv,
                blocks_ptr, num_blocks, BLOCK_N, BLOCK_KV, SEARCH_STEPS, IS_CAUSAL,
            )  # fmt: skip
            dq = _rows_step(
                dq, q, dout, lse, delta, p, keys, cache, sink, window, inner_scale, softcap, False,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, IS_CAUSAL, SOFTCAP, INPUT_PRECISION,
            )  # fmt: skip
    offsets = state * HEAD_DIM
    store_rows(dq_ptr, dq * scale, offsets, exists, HEAD_DIM, BLOCK_D)


@triton.jit
def _keys_step(
    dk, dv, k, v, j, live, i, member, exists, full, head, rows, sink, window, shift, seqlen_q,
    inner_scale, softcap,
    IS_BAND: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, IS_CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, without the scale, and dv after one more tile of rows."""
    q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qh, stride_qm, stride_gh, stride_gm = rows
    heads = (head + member).to(tl.int64)
    row = i.to(tl.int64)
    state = heads * seqlen_q + row
    lse = tl.load(lse_ptr + state, mask=exists, other=float("inf"))
    delta = tl.load(delta_ptr + state, mask=exists, other=0.0)
    useful = exists if IS_BAND else lse < float("inf")  # rows of the band see some of the keys
    q = load_rows(q_ptr, heads * stride_qh + row * stride_qm, useful, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_ptr, heads * stride_gh + row * stride_gm, useful, HEAD_DIM_V, BLOCK_DV)
    s = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)
    s = scores(s, inner_scale, softcap, SOFTCAP)
    p = probabilities(s, lse[None, :])
    dp = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
    ds = score_gradients(p * (dp - delta[None, :]), s, softcap, SOFTCAP)
    if not full:
        seen = visible(
            (i + shift)[None, :], j[:, None], live[:, None] & useful[None, :], sink, window,
            IS_BAND, IS_CAUSAL,
        )  # fmt: skip
        p = tl.where(seen, p, 0.0)
        ds = tl.where(seen, ds, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=INPUT_PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=INPUT_PRECISION)
    return dk, dv


@triton.jit
def _band_of_keys(j_low, j_high, shift, seqlen_q, sink, window, IS_CAUSAL: tl.constexpr):
    """The rows that see any of the keys `j_low` to `j_high` through the sink or the window, as one
    range.
    """
    through_sink = j_low < sink
    begin = j_low - shift
    if not IS_CAUSAL:
        begin = tl.where(through_sink, 0, begin - window + 1)
    end = tl.minimum(j_high.to(tl.int64) + window - shift, seqlen_q).to(tl.int32)
    end = tl.where(window == 0, 0, end)
    return tl.maximum(begin, 0), tl.where(through_sink, seqlen_q, end)


@triton.jit
def _keys_of_tile(
    index, slots, order_ptr, active_ptr, active_run, active_batch, active_width, num_kv_heads,
    num_owners, seqlen_kv, BLOCK_N: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr, TILES_PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys number `slots` of a tile, and which of them exist; the range that they are from, unless
    they are columns; batch and KV head; and which transposed list is theirs.
    """
    if order_ptr is not None:
        index = tl.load(order_ptr + index)
    tile = index // num_owners
    owner = index % num_owners
    batch = owner // num_kv_heads
    kv_head = owner % num_kv_heads
    j_low = 0
    j_end = 0
    list_tile = tile
    if active_ptr is None:
        list_tile = tile // TILES_PER_BLOCK
        j_low = list_tile * BLOCKS_PER_TILE * BLOCK_KV + tile % TILES_PER_BLOCK * BLOCK_N
        j_end = tl.minimum((list_tile + 1) * BLOCKS_PER_TILE * BLOCK_KV, seqlen_kv)
        j_end = tl.minimum(j_low + BLOCK_N, j_end)
        j = j_low + slots
        live = j < j_end
    else:
        rank = tile * BLOCK_N + slots
        active_ptr += (batch * active_batch + kv_head // active_run).to(tl.int64) * active_width
        j = tl.load(active_ptr + rank, mask=rank < active_width, other=-1)
        live = j >= 0
        j = tl.maximum(j, 0)
    return j, live, j_low, j_end, batch, kv_head, list_tile


@triton.jit(do_not_specialize=SIZES)
def _backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, partial_dk_ptr,
    partial_dv_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gm,
    sink_ptr, window_ptr, block_counts_ptr, block_indices_ptr,
    active_ptr, offsets_ptr, sources_ptr, bits_ptr, order_ptr,
    sink_run, window_run, block_run, block_batch, block_rows, block_width,
    active_run, active_batch, active_width, list_run, list_batch, list_tiles, blocks_per_entry,
    num_heads, num_kv_heads, num_owners, seqlen_q, seqlen_kv, rows_per_block, parts,
    num_split_tiles, num_splits, scale, inner_scale, softcap,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr,
    GROUP_SIZE: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCKS_PER_TILE: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr, SEARCH_STEPS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, over all query heads of their KV head.

    The first `num_split_tiles` tiles of the order are those of most rows: as many programs as there
    are splits each take an even part of the walk, and leave their sums to `_sum_kernel`.

    The tile holds either the keys of `BLOCKS_PER_TILE` key blocks or a part of one block: what rows
    see through sink, window and blocks. Or it holds keys of `active_ptr`, which are columns of some
    row, and adds what rows see through columns alone.
    """
    index = tl.program_id(0)
    split = tl.full([], 0, tl.int32)
    splits = 1
    if partial_dk_ptr is not None:
        is_split = index < num_split_tiles * num_splits
        split = tl.where(is_split, index % num_splits, 0)
        splits = tl.where(is_split, num_splits, 1)
        index = tl.where(is_split, index // num_splits, index - num_split_tiles * (num_splits - 1))
    slots = tl.arange(0, BLOCK_N)
    j, live, j_low, j_end, batch, kv_head, list_tile = _keys_of_tile(
        index, slots, order_ptr, active_ptr, active_run, active_batch, active_width, num_kv_heads,
        num_owners, seqlen_kv, BLOCK_N, BLOCK_KV, BLOCKS_PER_TILE, TILES_PER_BLOCK,
    )  # fmt: skip
    if tl.max(live.to(tl.int32), 0) == 0:
        return

    b = batch.to(tl.int64)
    h = kv_head.to(tl.int64)
    row = j.to(tl.int64)
    k_offsets = b * stride_kb + h * stride_kh + row * stride_kn
    v_offsets = b * stride_vb + h * stride_vh + row * stride_vn
    k = load_rows(k_ptr, k_offsets, live, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, v_offsets, live, HEAD_DIM_V, BLOCK_DV)
    lse_ptr += b * num_heads * seqlen_q
    delta_ptr += b * num_heads * seqlen_q
    q_ptr += b * stride_qb
    dout_ptr += b * stride_gb
    rows = (q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qh, stride_qm, stride_gh, stride_gm)
    shift = seqlen_kv - seqlen_q
    all_keys = j_end - j_low == BLOCK_N

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for pack in range(GROUP_SIZE // PACK):
        head = kv_head * GROUP_SIZE + pack * PACK
        sink = tl.load(sink_ptr + head // sink_run)
        window = load_window(window_ptr, head // window_run)
        if active_ptr is None:
            i_begin, i_end = _band_of_keys(
                j_low, j_end - 1, shift, seqlen_q, sink, window, IS_CAUSAL
            )
            tiles = tl.cdiv(tl.maximum(i_end - i_begin, 0) * PACK, BLOCK_M)
            tile_begin, tile_end = even_part(tiles, split, splits)
            for tile_of_rows in range(tile_begin, tile_end):
                i, member, exists, first, last = rows_of_tile(
                    i_begin, i_end, tile_of_rows, BLOCK_M, PACK
                )
                full = all_keys & all_visible(
                    first + shift, last + shift, j_low, j_low + BLOCK_N - 1, sink, window, True,
                    IS_CAUSAL,
                )  # fmt: skip
                dk, dv = _keys_step(
                    dk, dv, k, v, j, live, i, member, exists, full, head, rows, sink, window, shift,
                    seqlen_q, inner_scale, softcap, True, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                    IS_CAUSAL, SOFTCAP, INPUT_PRECISION,
                )  # fmt: skip
        if offsets_ptr is not None:
            at = (batch * list_batch + head // list_run).to(tl.int64) * list_tiles + list_tile
            begin = tl.load(offsets_ptr + at)
            per_entry = blocks_per_entry * parts
            steps = ((tl.load(offsets_ptr + at + 1) - begin) * per_entry).to(tl.int32)
            step_begin, step_end = even_part(steps, split, splits)
            for step in range(step_begin, step_end):
                entry = begin + step // per_entry
                source = tl.load(sources_ptr + entry)
                row_block = source * blocks_per_entry + step % per_entry // parts
                i_begin = row_block * rows_per_block
                i_end = tl.minimum(i_begin + rows_per_block, seqlen_q)
                i, member, exists, first, last = rows_of_tile(
                    i_begin, i_end, step % parts, BLOCK_M, PACK
                )
                listed = live
                full = all_keys & all_visible(
                    first + shift, last + shift, j_low, j_low + BLOCK_N - 1, sink, window, False,
                    IS_CAUSAL,
                )  # fmt: skip
                if bits_ptr is not None:
                    number = slots if active_ptr is not None else slots // BLOCK_KV
                    bits = tl.load(bits_ptr + entry)
                    all_bits: tl.constexpr = -1 if BLOCKS_PER_TILE == 64 else 2**BLOCKS_PER_TILE - 1
                    full = full & (bits == all_bits)
                    listed = live & ((bits >> number.to(tl.int64)) & 1 == 1)
                if active_ptr is not None and block_counts_ptr is not None:
                    list_row = batch * block_batch + head // block_run
                    list_row = list_row * block_rows + tl.minimum(row_block, block_rows - 1)
                    blocks_ptr, num_blocks = list_of_row(
                        block_counts_ptr, block_indices_ptr, list_row, block_width
                    )
                    in_blocks = in_list(blocks_ptr, num_blocks, j // BLOCK_KV, SEARCH_STEPS)
                    listed = listed & (in_blocks == 0)
                dk, dv = _keys_step(
                    dk, dv, k, v, j, listed, i, member, exists, full, head, rows, sink, window,
                    shift, seqlen_q, inner_scale, softcap, False, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
                    BLOCK_DV, IS_CAUSAL, SOFTCAP, INPUT_PRECISION,
                )  # fmt: skip

    offsets = (b * num_kv_heads + h) * seqlen_kv + row
    dk *= scale
    if partial_dk_ptr is not None:  # noqa: SIM102
        if is_split:
            part = (index.to(tl.int64) * num_splits + split) * BLOCK_N + slots
            store_rows(partial_dk_ptr, dk, part * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
            store_rows(partial_dv_ptr, dv, part * HEAD_DIM_V, live, HEAD_DIM_V, BLOCK_DV)
            return
    if active_ptr is not None:
        dk += load_rows(dk_ptr, offsets * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
        dv += load_rows(dv_ptr, offsets * HEAD_DIM_V, live, HEAD_DIM_V, BLOCK_DV)
    store_rows(dk_ptr, dk, offsets * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, dv, offsets * HEAD_DIM_V, live, HEAD_DIM_V, BLOCK_DV)


@triton.jit(do_not_specialize=SIZES)
def _sum_kernel(
    partial_dk_ptr, partial_dv_ptr, dk_ptr, dv_ptr, active_ptr, order_ptr,
    active_run, active_batch, active_width, num_kv_heads, num_owners, seqlen_kv, num_splits,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr, TILES_PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """dk and dv of `BLOCK_M` keys of a split tile: the sum of its parts, added to what is there if
    the keys are columns.
    """
    index = tl.program_id(0)
    slots = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j, live, _, _, batch, kv_head, _ = _keys_of_tile(
        index, slots, order_ptr, active_ptr, active_run, active_batch, active_width, num_kv_heads,
        num_owners, seqlen_kv, BLOCK_N, BLOCK_KV, BLOCKS_PER_TILE, TILES_PER_BLOCK,
    )  # fmt: skip
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    offsets = (batch.to(tl.int64) * num_kv_heads + kv_head) * seqlen_kv + j
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if active_ptr is not None:
        dk += load_rows(dk_ptr, offsets * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
        dv += load_rows(dv_ptr, offsets * HEAD_DIM_V, live, HEAD_DIM_V, BLOCK_DV)
    for split in range(num_splits):
        part = (index.to(tl.int64) * num_splits + split) * BLOCK_N + slots
        dk += load_rows(partial_dk_ptr, part * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
        dv += load_rows(partial_dv_ptr, part * HEAD_DIM_V, live, HEAD_DIM_V, BLOCK_DV)
    store_rows(dk_ptr, dk, offsets * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, dv, offsets * HEAD_DIM_V, live, HEAD_DIM_V, BLOCK_DV)


def _sizes(call: Call, q: Tensor, v: Tensor) -> dict:
    """What both kernels are specialised for, and the scores that they compute again."""
    return {
        "num_heads": call.num_heads,
        "seqlen_q": call.layout.seqlen_q,
        "seqlen_kv": call.layout.seqlen_kv,
        "HEAD_DIM": q.shape[-1],
        "HEAD_DIM_V": v.shape[-1],
        "BLOCK_D": configs.padded(q.shape[-1]),
        "BLOCK_DV": configs.padded(v.shape[-1]),
        "PACK": call.pack,
        "GROUP_SIZE": call.group_size,
        "INPUT_PRECISION": input_precision(q.dtype),
        **call.scores(),
        "scale": call.scale,
    }


def _preprocess(call: Call, dout, dlse, out, lse, delta, seen_lse) -> Launch:
    dim, rows = configs.padded(out.shape[-1]), configs.ROWS_PREPROCESSED
    arguments = {
        "out_ptr": out,
        "dout_ptr": dout,
        "lse_ptr": lse,
        "dlse_ptr": dlse,
        "sinks_ptr": call.sinks,
        "delta_ptr": delta,
        "seen_lse_ptr": seen_lse,
        **strides("o", out, "bhm"),
        **strides("g", dout, "bhm"),
        "num_heads": call.num_heads,
        "num_rows": call.layout.seqlen_q,
        "num_states": lse.numel(),
        "HEAD_DIM_V": out.shape[-1],
        "BLOCK_DV": dim,
        "BLOCK_M": rows,
    }
    return Launch(_preprocess_kernel, (-(-lse.numel() // rows),), arguments, 4, 1)


def _kind(kernel: str, call: Call, q: Tensor, v: Tensor, target: configs.Target) -> tuple:
    dims = (configs.padded(q.shape[-1]), configs.padded(v.shape[-1]))
    return (kernel, q.dtype, dims, *call.kind, target)


def _rows(call: Call, tensors: dict, dq: Tensor, target: configs.Target) -> Choice:
    """The launch for dq."""
    q, v = tensors["q_ptr"], tensors["v_ptr"]
    shared = tensors | {"dq_ptr": dq, **call.lists(), **_sizes(call, q, v)}

    def build(config: configs.Config) -> list[Launch]:
        rows_per_block, parts = call.row_tiles(config.block_m)
        num_row_blocks = -(-call.layout.seqlen_q // rows_per_block)
        programs = num_row_blocks * parts * call.num_packs
        order = None
        if programs > target.num_cores and call.is_skewed():
            order = lists.order_of_rows(call, rows_per_block, call.layout.seqlens)
        arguments = shared | {
            "order_ptr": order,
            "num_row_blocks": num_row_blocks,
            "rows_per_block": rows_per_block,
            "parts": parts,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }
        options = (config.num_warps, config.num_stages, config.max_registers)
        return [Launch(_backward_rows_kernel, (programs,), arguments, *options)]

    candidates = configs.backward_rows(
        q.dtype, max(shared["BLOCK_D"], shared["BLOCK_DV"]), call.is_irregular, call.softcap > 0,
        target, slots=call.slots, keys=call.layout.seqlen_kv,
    )  # fmt: skip
    return Choice(_kind("backward_rows", call, q, v, target), candidates, build)


def _keys(call: Call, tensors: dict, dk: Tensor, dv: Tensor, target: configs.Target) -> Choice:
    """The launches for dk and dv: sink, window and blocks first, then columns on top."""
    layout = call.layout
    q, v = tensors["q_ptr"], tensors["v_ptr"]
    listed = call.lists()
    used = ("sink", "window", "block_counts", "block_indices", "block_run", "block_batch")
    used += ("block_rows", "block_width", "SEARCH_STEPS", "BLOCK_KV")
    owners = call.batch * call.num_kv_heads
    shared = {
        **tensors,
        "dk_ptr": dk,
        "dv_ptr": dv,
        **{name: x for name, x in listed.items() if name.startswith(used)},
        "num_kv_heads": call.num_kv_heads,
        "num_owners": owners,
        **_sizes(call, q, v),
    }

    def build(config: configs.Config) -> list[Launch]:
        block_n, block_kv = config.block_n, call.block_kv
        blocks_per_tile = max(1, block_n // block_kv)
        tiles_per_block = -(-block_kv // block_n)
        list_tiles = -(-layout.seqlen_kv // (blocks_per_tile * block_kv))
        transposed = None
        if layout.kv_num_blocks is not None:
            transposed = lists.transposed_blocks(call, blocks_per_tile)
        tiles = list_tiles * tiles_per_block
        order = None
        if tiles * owners > target.num_cores and call.is_skewed():
            part = torch.arange(tiles_per_block, device=q.device) * block_n
            starts = torch.arange(list_tiles, device=q.device) * blocks_per_tile * block_kv
            starts = (starts[:, None] + part).flatten()
            size = min(block_n, blocks_per_tile * block_kv)
            order = lists.order_of_keys(call, starts, size, transposed)
        tilings = {"BLOCKS_PER_TILE": blocks_per_tile, "TILES_PER_BLOCK": tiles_per_block}
        nothing = {"active_ptr": None, "active_run": 1, "active_batch": 0, "active_width": 0}
        entry = {"order_ptr": order, "blocks_per_entry": 1}
        heavy = -(-configs.HEAVY_KEYS // block_n) if tiles * owners > target.num_cores else tiles
        arguments = shared | nothing | tilings | entry
        found = _keys_launches(call, arguments, config, tiles, heavy, transposed, target)
        if layout.num_columns is None or layout.column_indices.shape[-1] == 0:
            return found
        keys, transposed = lists.transposed_columns(call, block_n)
        batch, heads, width = keys.shape
        active = {
            "active_ptr": keys,
            "active_run": call.num_kv_heads // heads,
            "active_batch": heads if batch > 1 else 0,
            "active_width": width,
        }
        entry = {"order_ptr": None, "blocks_per_entry": call.listed_rows[1]}
        tiles, heavy = transposed.shape[2], -(-layout.column_indices.shape[-1] // block_n)
        arguments = shared | active | tilings | entry
        return found + _keys_launches(call, arguments, config, tiles, heavy, transposed, target)

    candidates = configs.backward_keys(
        q.dtype, max(shared["BLOCK_D"], shared["BLOCK_DV"]),
        call.is_irregular or call.softcap > 0, target,
        slots=call.slots, keys=layout.seqlen_kv,
    )  # fmt: skip
    return Choice(_kind("backward_keys", call, q, v, target), candidates, build)


def _keys_launches(
    call: Call, arguments: dict, config: configs.Config, tiles: int, heavy: int,
    transposed: lists.Transposed | None, target: configs.Target,
) -> list[Launch]:  # fmt: skip
    """The launch for dk and dv of so many tiles of keys for each KV head, the first `heavy` of them
    split if they are too few to keep the device busy; then that of the sums of the splits.
    """
    rows_per_block, parts = call.row_tiles(config.block_m)
    batch, heads, list_tiles = transposed.shape if transposed else (1, 1, 0)
    owners, dk, dv = arguments["num_owners"], arguments["dk_ptr"], arguments["dv_ptr"]
    split_tiles = min(heavy, tiles) * owners
    row_tiles = -(-call.layout.seqlen_q * call.group_size // config.block_m)
    num_splits = configs.num_splits(split_tiles, row_tiles, target)
    partial_dk = partial_dv = None
    if num_splits > 1:
        size = (split_tiles, num_splits, config.block_n)
        partial_dk, partial_dv = (
            x.new_empty(*size, x.shape[-1], dtype=torch.float32) for x in (dk, dv)
        )
    arguments = arguments | {
        "partial_dk_ptr": partial_dk,
        "partial_dv_ptr": partial_dv,
        "num_split_tiles": split_tiles,
        "num_splits": num_splits,
        "offsets_ptr": transposed and transposed.offsets,
        "sources_ptr": transposed and transposed.sources,
        "bits_ptr": transposed and transposed.bits,
        "list_run": call.num_heads // heads,
        "list_batch": heads if batch > 1 else 0,
        "list_tiles": list_tiles,
        "rows_per_block": rows_per_block,
        "parts": parts,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    grid = (tiles * owners + split_tiles * (num_splits - 1),)
    options = (config.num_warps, config.num_stages, config.max_registers)
    found = [Launch(_backward_keys_kernel, grid, arguments, *options)]
    if num_splits > 1:
        rows = configs.ROWS_SUMMED
        sums = {x: arguments[x] for x in _sum_kernel.arg_names} | {"BLOCK_M": rows}
        found.append(Launch(_sum_kernel, (split_tiles, config.block_n // rows), sums, 4, 1))
    return found


def steps(
    call: Call, dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, target: configs.Target,
) -> tuple[list[Choice | Launch], tuple[Tensor, ...]]:  # fmt: skip
    """What to run, in order, and the tensors that then hold ``dq, dk, dv, delta``.

    dk and dv are float32 where columns are added to them.
    """
    delta, seen_lse = torch.empty_like(lse), torch.empty_like(lse)
    dtype = q.dtype if call.layout.num_columns is None else torch.float32
    dq = q.new_empty(q.shape)
    dk, dv = k.new_empty(k.shape, dtype=dtype), v.new_empty(v.shape, dtype=dtype)
    tensors = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "dout_ptr": dout,
        "lse_ptr": seen_lse,
        "delta_ptr": delta,
        **strides("q", q, "bhm"),
        **strides("k", k, "bhn"),
        **strides("v", v, "bhn"),
        **strides("g", dout, "bhm"),
    }
    found = [
        _preprocess(call, dout, dlse, out, lse, delta, seen_lse),
        _rows(call, tensors, dq, target),
        _keys(call, tensors, dk, dv, target),
    ]
    return found, (dq, dk, dv, delta)
