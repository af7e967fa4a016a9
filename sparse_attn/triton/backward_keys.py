"""dk, dv and the gradients of biases, by keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .exact import add_product, any_of, exact_probabilities, is_finite, products
from .primitives import (
    SIZES,
    all_visible,
    even_part,
    first_bias,
    in_band,
    in_list,
    list_of_row,
    load_part,
    load_rows,
    load_sink,
    load_window,
    probabilities,
    rows_of_tile,
    score_gradients,
    scores,
    store_part,
    store_rows,
    visible,
)


@triton.jit
def _keys_step(
    dk, dv, dbias, k, v, j, live, i, member, exists, full, head, rows, sink, window, shift,
    seqlen_q, rule,
    IS_BAND: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRESCALED: tl.constexpr, SOFTCAP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, without the scale, dv and the gradients of biases after one more tile of rows."""
    q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qh, stride_qm, stride_gh, stride_gm = rows
    heads = (head + member).to(tl.int64)
    row = i.to(tl.int64)
    state = heads * seqlen_q + row
    lse = tl.load(lse_ptr + state, mask=exists, other=float("inf"))
    delta = tl.load(delta_ptr + state, mask=exists, other=0.0)
    useful = exists if IS_BAND else lse != float("inf")  # rows of the band see some of the keys
    q = load_rows(q_ptr, heads * stride_qh + row * stride_qm, useful, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_ptr, heads * stride_gh + row * stride_gm, useful, HEAD_DIM_V, BLOCK_DV)
    x = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)
    x, capped = scores(x, (heads, i, shift, j, live), rule, 0, PRESCALED, SOFTCAP)
    p = probabilities(x, lse[None, :], rule[1])
    dp = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
    of_scores = p * (dp - delta[None, :])
    ds = score_gradients(of_scores, capped, SOFTCAP)
    if not full:
        seen = visible(
            (i + shift)[None, :], j[:, None], live[:, None] & useful[None, :], sink, window,
            IS_BAND, IS_CAUSAL,
        )  # fmt: skip
        p = tl.where(seen, p, 0.0)
        ds = tl.where(seen, ds, 0.0)
        if rule[4] is not None:
            of_scores = tl.where(seen, of_scores, 0.0)
    if rule[4] is not None:
        dbias += tl.sum(of_scores, 1, keep_dims=True)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=INPUT_PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=INPUT_PRECISION)
    return dk, dv, dbias


@triton.jit
def _put_pack(sums, x, pack):
    """`sums` of keys and packs of heads with `x` as those of one pack."""
    here = tl.arange(0, sums.shape[1])[None, :] == pack
    return tl.where(here, x, sums)


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


@triton.jit
def _rows_of_band(
    tile, begin, end, keys, shift, sink, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACK: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """The rows of a tile of those that see keys through sink or window, the head of each in its
    pack, which of them exist, and whether all see all keys.
    """
    j_low, j_end = keys
    i, member, exists, first, last = rows_of_tile(begin, end, tile, BLOCK_M, PACK)
    full = (j_end - j_low == BLOCK_N) & all_visible(
        first + shift, last + shift, j_low, j_low + BLOCK_N - 1, sink, window, True, IS_CAUSAL
    )
    return i, member, exists, full


@triton.jit
def _rows_of_entry(
    step, begin, j, live, keys, entries, batch, head, shift, seqlen_q, sink, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr, SEARCH_STEPS: tl.constexpr, OF_COLUMNS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """The same of step number `step` of a transposed list whose entries begin at `begin`; and which
    of the keys they list.
    """
    sources_ptr, bits_ptr, rows_per_block, parts, blocks_per_entry, blocks = entries
    j_low, j_end = keys
    per_entry = blocks_per_entry * parts
    entry = begin + step // per_entry
    source = tl.load(sources_ptr + entry)
    row_block = source * blocks_per_entry + step % per_entry // parts
    i_begin = row_block * rows_per_block
    i_end = tl.minimum(i_begin + rows_per_block, seqlen_q)
    i, member, exists, first, last = rows_of_tile(i_begin, i_end, step % parts, BLOCK_M, PACK)
    listed = live
    full = (j_end - j_low == BLOCK_N) & all_visible(
        first + shift, last + shift, j_low, j_low + BLOCK_N - 1, sink, window, False, IS_CAUSAL
    )
    if bits_ptr is not None:
        slots = tl.arange(0, BLOCK_N)
        number = slots if OF_COLUMNS else slots // BLOCK_KV
        bits = tl.load(bits_ptr + entry)
        all_bits: tl.constexpr = -1 if BLOCKS_PER_TILE == 64 else 2**BLOCKS_PER_TILE - 1
        full = full & (bits == all_bits)
        listed = live & ((bits >> number.to(tl.int64)) & 1 == 1)
    counts_ptr, indices_ptr, block_run, block_batch, block_rows, block_width = blocks
    if OF_COLUMNS and counts_ptr is not None:
        list_row = batch * block_batch + head // block_run
        list_row = list_row * block_rows + tl.minimum(row_block, block_rows - 1)
        blocks_ptr, num_blocks = list_of_row(counts_ptr, indices_ptr, list_row, block_width)
        in_blocks = in_list(blocks_ptr, num_blocks, j // BLOCK_KV, SEARCH_STEPS)
        listed = listed & (in_blocks == 0)
    return i, member, exists, full, listed


@triton.jit
def _exact_step(
    dk, dv, dbias, column, keys, values, j, live, is_band, i, member, exists, head, rows, norms,
    sink, window, shift, seqlen_q, rule,
    CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, IS_CAUSAL: tl.constexpr, PRESCALED: tl.constexpr,
    SOFTCAP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """`_keys_step` for `CHUNK` columns of dk and dv, as `exact` says."""
    q_ptr, dout_ptr, _lse_ptr, delta_ptr, stride_qh, stride_qm, stride_gh, stride_gm = rows
    peak_ptr, norm_ptr = norms
    heads = (head + member).to(tl.int64)
    row = i.to(tl.int64)
    state = heads * seqlen_q + row
    delta = tl.load(delta_ptr + state, mask=exists, other=0.0)
    peak = tl.load(peak_ptr + state, mask=exists, other=0.0)
    norm = tl.load(norm_ptr + state, mask=exists, other=float("inf"))
    useful = norm != float("inf")
    position = (i + shift)[None, :]
    banded = in_band(position, j[:, None], sink, window, IS_CAUSAL)
    seen = live[:, None] & useful[None, :] & (banded == is_band)
    if IS_CAUSAL:
        seen = seen & (j[:, None] <= position)
    q_offsets = heads * stride_qh + row * stride_qm
    dout_offsets = heads * stride_gh + row * stride_gm
    queries, grads = (q_ptr, q_offsets, useful), (dout_ptr, dout_offsets, useful)
    x = tl.trans(products(queries, keys, HEAD_DIM, BLOCK_D, INPUT_PRECISION))  # as rows have it
    x, capped = scores(x, (heads, i, shift, j, live), rule, 0, PRESCALED, SOFTCAP)
    p = exact_probabilities(x, peak[None, :], norm[None, :], rule[1])
    dp = tl.trans(products(grads, values, HEAD_DIM_V, BLOCK_DV, INPUT_PRECISION))
    ds = p * (dp - delta[None, :])
    if rule[4] is not None:
        dbias += tl.sum(tl.where(seen, ds, 0.0), 1, keep_dims=True)
    ds = score_gradients(ds, capped, SOFTCAP)
    dout = load_part(dout_ptr, dout_offsets, useful, column, HEAD_DIM_V, CHUNK)
    dv = add_product(dv, p, seen, dout, INPUT_PRECISION)
    q = load_part(q_ptr, q_offsets, useful, column, HEAD_DIM, CHUNK)
    return add_product(dk, ds, seen, q, INPUT_PRECISION), dv, dbias


@triton.jit
def _exact_sums(
    column, loads, j, live, keys, batch, kv_head, split, splits, rows, norms, limits, lists,
    entries, shift, seqlen_q, numbers, biases,
    IS_BAND: tl.constexpr, CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_PACKS: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCKS_PER_TILE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr, IS_CAUSAL: tl.constexpr, PRESCALED: tl.constexpr,
    SOFTCAP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The walk of `_backward_keys_kernel` for `CHUNK` columns of dk, without the scale, and dv; and
    the gradients of biases.
    """
    sink_ptr, sink_run, window_ptr, window_run = limits
    offsets_ptr, list_batch, list_run, list_tiles, list_tile, per_entry = lists
    dk = tl.zeros([BLOCK_N, CHUNK], tl.float32)
    dv = tl.zeros([BLOCK_N, CHUNK], tl.float32)
    dbias = tl.zeros([BLOCK_N, BLOCK_PACKS], tl.float32)
    scale, unit, softcap, inverse_softcap = numbers
    bias_ptr, slopes_ptr, bias_run, bias_batch, seqlen_kv = biases
    for pack in range(GROUP_SIZE // PACK):
        head = kv_head * GROUP_SIZE + pack * PACK
        bias_row = first_bias(bias_ptr, batch, head, bias_run, bias_batch, seqlen_kv)
        rule = (scale, unit, softcap, inverse_softcap, bias_ptr, slopes_ptr, bias_row)
        of_pack = tl.zeros([BLOCK_N, 1], tl.float32)
        sink = load_sink(sink_ptr, head // sink_run)
        window = load_window(window_ptr, head // window_run)
        i_begin = 0
        i_end = 0
        tile_begin = 0
        tile_end = 0
        step_begin = 0
        step_end = 0
        begin = tl.full([], 0, tl.int64)
        if IS_BAND:
            i_begin, i_end = _band_of_keys(
                keys[0], keys[1] - 1, shift, seqlen_q, sink, window, IS_CAUSAL
            )
            tiles = tl.cdiv(tl.maximum(i_end - i_begin, 0) * PACK, BLOCK_M)
            tile_begin, tile_end = even_part(tiles, split, splits)
        if offsets_ptr is not None:
            at = (batch * list_batch + head // list_run).to(tl.int64) * list_tiles + list_tile
            begin = tl.load(offsets_ptr + at)
            steps = (tl.load(offsets_ptr + at + 1) - begin) * per_entry
            step_begin, step_end = even_part(steps.to(tl.int32), split, splits)
        of_band = tile_end - tile_begin
        for step in tl.range(of_band + step_end - step_begin, num_stages=1):
            is_band = step < of_band
            i, member, exists, _full = _rows_of_band(
                tile_begin + step, i_begin, i_end, keys, shift, sink, window, BLOCK_M, BLOCK_N,
                PACK, IS_CAUSAL,
            )  # fmt: skip
            listed = live
            if offsets_ptr is not None:  # noqa: SIM102
                if step >= of_band:
                    i, member, exists, _full, listed = _rows_of_entry(
                        step_begin + step - of_band, begin, j, live, keys, entries, batch, head,
                        shift, seqlen_q, sink, window, BLOCK_M, BLOCK_N, PACK, BLOCK_KV,
                        BLOCKS_PER_TILE, SEARCH_STEPS, not IS_BAND, IS_CAUSAL,
                    )  # fmt: skip
            dk, dv, of_pack = _exact_step(
                dk, dv, of_pack, column, loads[0], loads[1], j, listed, is_band, i, member, exists,
                head, rows, norms, sink, window, shift, seqlen_q, rule, CHUNK, HEAD_DIM, HEAD_DIM_V,
                BLOCK_D, BLOCK_DV, IS_CAUSAL, PRESCALED, SOFTCAP, INPUT_PRECISION,
            )  # fmt: skip
        if bias_ptr is not None:
            dbias = _put_pack(dbias, of_pack, pack)
    return dk, dv, dbias


@triton.jit
def _store_sums(
    ptr, partial_ptr, x, where, first, live, is_split, ADDS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`BLOCK` columns of a result, from number `first` on: stored or, if `ADDS`, added to what is
    there; or the same of a split's part.
    """
    row, part = where
    if partial_ptr is not None and is_split:
        store_part(partial_ptr, x, part * SIZE, live, first, SIZE, BLOCK)
    else:
        if ADDS:
            x += load_part(ptr, row * SIZE, live, first, SIZE, BLOCK)
        store_part(ptr, x, row * SIZE, live, first, SIZE, BLOCK)


@triton.jit(do_not_specialize=SIZES)
def _backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, peak_ptr, norm_ptr, dk_ptr, dv_ptr,
    dbias_ptr, partial_dk_ptr, partial_dv_ptr, partial_dbias_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gm,
    sink_ptr, window_ptr, block_counts_ptr, block_indices_ptr,
    active_ptr, offsets_ptr, sources_ptr, bits_ptr, bias_ptr, slopes_ptr, order_ptr,
    sink_run, window_run, block_run, block_batch, block_rows, block_width,
    active_run, active_batch, active_width, list_run, list_batch, list_tiles, blocks_per_entry,
    bias_run, bias_batch,
    num_heads, num_kv_heads, num_owners, seqlen_q, seqlen_kv, rows_per_block, parts,
    num_split_tiles, num_splits, gradient_scale, scale, unit, softcap, inverse_softcap,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr,
    GROUP_SIZE: tl.constexpr, BLOCK_PACKS: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr, TILES_PER_BLOCK: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    CHUNK: tl.constexpr, IS_CAUSAL: tl.constexpr, PRESCALED: tl.constexpr, SOFTCAP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, over all query heads of their KV head, and the gradients of
    their biases, of each pack of heads apart.

    The first `num_split_tiles` tiles of the order are those of most rows: as many programs as there
    are splits each take an even part of the walk, and leave their sums to `_sum_kernel`.

    The tile holds either the keys of `BLOCKS_PER_TILE` key blocks or a part of one block: what rows
    see through sink, window and blocks. Or it holds keys of `active_ptr`, which are columns of some
    row, and adds what rows see through columns alone.
    """
    index = tl.program_id(0)
    split = tl.full([], 0, tl.int32)
    splits = 1
    is_split = index < 0
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
    states = b * num_heads * seqlen_q
    rows = (
        q_ptr + b * stride_qb, dout_ptr + b * stride_gb, lse_ptr + states, delta_ptr + states,
        stride_qh, stride_qm, stride_gh, stride_gm,
    )  # fmt: skip
    numbers = (scale, unit, softcap, inverse_softcap)
    biases = (bias_ptr, slopes_ptr, bias_run, bias_batch, seqlen_kv)
    shift = seqlen_kv - seqlen_q
    keys = (j_low, j_end)
    blocks = (block_counts_ptr, block_indices_ptr, block_run, block_batch, block_rows, block_width)
    entries = (sources_ptr, bits_ptr, rows_per_block, parts, blocks_per_entry, blocks)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dbias = tl.zeros([BLOCK_N, BLOCK_PACKS], tl.float32)
    for pack in range(GROUP_SIZE // PACK):
        head = kv_head * GROUP_SIZE + pack * PACK
        sink = load_sink(sink_ptr, head // sink_run)
        window = load_window(window_ptr, head // window_run)
        bias_row = first_bias(bias_ptr, batch, head, bias_run, bias_batch, seqlen_kv)
        rule = (scale, unit, softcap, inverse_softcap, bias_ptr, slopes_ptr, bias_row)
        of_pack = tl.zeros([BLOCK_N, 1], tl.float32)
        if active_ptr is None:
            i_begin, i_end = _band_of_keys(
                j_low, j_end - 1, shift, seqlen_q, sink, window, IS_CAUSAL
            )
            tiles = tl.cdiv(tl.maximum(i_end - i_begin, 0) * PACK, BLOCK_M)
            tile_begin, tile_end = even_part(tiles, split, splits)
            for tile_of_rows in range(tile_begin, tile_end):
                i, member, exists, full = _rows_of_band(
                    tile_of_rows, i_begin, i_end, keys, shift, sink, window, BLOCK_M, BLOCK_N, PACK,
                    IS_CAUSAL,
                )  # fmt: skip
                dk, dv, of_pack = _keys_step(
                    dk, dv, of_pack, k, v, j, live, i, member, exists, full, head, rows, sink,
                    window, shift, seqlen_q, rule, True, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                    IS_CAUSAL, PRESCALED, SOFTCAP, INPUT_PRECISION,
                )  # fmt: skip
        if offsets_ptr is not None:
            at = (batch * list_batch + head // list_run).to(tl.int64) * list_tiles + list_tile
            begin = tl.load(offsets_ptr + at)
            steps = (tl.load(offsets_ptr + at + 1) - begin) * (blocks_per_entry * parts)
            step_begin, step_end = even_part(steps.to(tl.int32), split, splits)
            for step in range(step_begin, step_end):
                i, member, exists, full, listed = _rows_of_entry(
                    step, begin, j, live, keys, entries, batch, head, shift, seqlen_q, sink, window,
                    BLOCK_M, BLOCK_N, PACK, BLOCK_KV, BLOCKS_PER_TILE, SEARCH_STEPS,
                    active_ptr is not None, IS_CAUSAL,
                )  # fmt: skip
                dk, dv, of_pack = _keys_step(
                    dk, dv, of_pack, k, v, j, listed, i, member, exists, full, head, rows, sink,
                    window, shift, seqlen_q, rule, False, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                    IS_CAUSAL, PRESCALED, SOFTCAP, INPUT_PRECISION,
                )  # fmt: skip
        if bias_ptr is not None:
            dbias = _put_pack(dbias, of_pack, pack)

    loads = ((k_ptr, k_offsets, live), (v_ptr, v_offsets, live))
    norms = (peak_ptr + states, norm_ptr + states)
    limits = (sink_ptr, sink_run, window_ptr, window_run)
    lists = (offsets_ptr, list_batch, list_run, list_tiles, list_tile, blocks_per_entry * parts)
    adds: tl.constexpr = active_ptr is not None
    part = slots
    if partial_dk_ptr is not None:
        part = (index.to(tl.int64) * num_splits + split) * BLOCK_N + slots
    where = ((b * num_kv_heads + h) * seqlen_kv + row, part)
    if any_of((is_finite(dk) == 0) & live[:, None]) | any_of((is_finite(dv) == 0) & live[:, None]):
        for column in range(0, HEAD_DIM if HEAD_DIM > HEAD_DIM_V else HEAD_DIM_V, CHUNK):
            some_dk, some_dv, dbias = _exact_sums(
                column, loads, j, live, keys, batch, kv_head, split, splits, rows, norms, limits,
                lists, entries, shift, seqlen_q, numbers, biases, active_ptr is None, CHUNK,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PACK, GROUP_SIZE,
                BLOCK_PACKS, BLOCK_KV, BLOCKS_PER_TILE, SEARCH_STEPS, IS_CAUSAL, PRESCALED, SOFTCAP,
                INPUT_PRECISION,
            )  # fmt: skip
            some_dk *= gradient_scale
            _store_sums(
                dk_ptr, partial_dk_ptr, some_dk, where, column, live, is_split, adds, HEAD_DIM,
                CHUNK,
            )  # fmt: skip
            _store_sums(
                dv_ptr, partial_dv_ptr, some_dv, where, column, live, is_split, adds, HEAD_DIM_V,
                CHUNK,
            )  # fmt: skip
    else:
        dk *= gradient_scale
        _store_sums(dk_ptr, partial_dk_ptr, dk, where, 0, live, is_split, adds, HEAD_DIM, BLOCK_D)
        _store_sums(
            dv_ptr, partial_dv_ptr, dv, where, 0, live, is_split, adds, HEAD_DIM_V, BLOCK_DV
        )
    if bias_ptr is not None:
        _store_sums(
            dbias_ptr, partial_dbias_ptr, dbias, where, 0, live, is_split, adds, GROUP_SIZE // PACK,
            BLOCK_PACKS,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _sum_kernel(
    partial_dk_ptr, partial_dv_ptr, partial_dbias_ptr, dk_ptr, dv_ptr, dbias_ptr, active_ptr,
    order_ptr, active_run, active_batch, active_width, num_kv_heads, num_owners, seqlen_kv,
    num_splits,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PACK: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_PACKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCKS_PER_TILE: tl.constexpr, TILES_PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """dk, dv and the gradients of biases of `BLOCK_M` keys of a split tile: the sum of its parts,
    added to what is there if the keys are columns.
    """
    packs: tl.constexpr = GROUP_SIZE // PACK
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
    dbias = tl.zeros([BLOCK_M, BLOCK_PACKS], tl.float32)
    if active_ptr is not None:
        dk += load_rows(dk_ptr, offsets * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
        dv += load_rows(dv_ptr, offsets * HEAD_DIM_V, live, HEAD_DIM_V, BLOCK_DV)
        if dbias_ptr is not None:
            dbias += load_rows(dbias_ptr, offsets * packs, live, packs, BLOCK_PACKS)
    for split in range(num_splits):
        part = (index.to(tl.int64) * num_splits + split) * BLOCK_N + slots
        dk += load_rows(partial_dk_ptr, part * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
        dv += load_rows(partial_dv_ptr, part * HEAD_DIM_V, live, HEAD_DIM_V, BLOCK_DV)
        if dbias_ptr is not None:
            dbias += load_rows(partial_dbias_ptr, part * packs, live, packs, BLOCK_PACKS)
    store_rows(dk_ptr, dk, offsets * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, dv, offsets * HEAD_DIM_V, live, HEAD_DIM_V, BLOCK_DV)
    if dbias_ptr is not None:
        store_rows(dbias_ptr, dbias, offsets * packs, live, packs, BLOCK_PACKS)
