"""The forward pass: prefill, decoding, packed sequences and paged caches are one kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract.packing import Packing
from ..contract.results import empty_out
from . import configs, lists
from .autotune import Choice
from .exact import any_of, is_finite, values_of_rows
from .launch import Call, Launch, input_precision, strides
from .primitives import (
    LOG2E,
    LOWEST,
    SIZES,
    band_of_rows,
    even_part,
    finish,
    first_bias,
    list_of_row,
    load_keys,
    load_rows,
    load_sink,
    load_window,
    locate,
    online_sum,
    rows_of_tile,
    scores,
    sequence,
    store_part,
    store_rows,
    tile_of_band,
    tile_of_columns,
    tile_of_list,
    visible,
)


@triton.jit
def _step(
    acc, m_i, l_i, q, heads, p, keys, cache, sink, window, rule,
    IS_BAND: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE_SIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRESCALED: tl.constexpr, SOFTCAP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after one more tile of keys: that of `online_sum`, and the same sum times v."""
    j, live, loaded, full = keys
    k, v = load_keys(j, loaded, cache, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, PAGE_SIZE)
    x = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
    x, _capped = scores(x, (heads, p, 0, j, loaded), rule, 1, PRESCALED, SOFTCAP)
    floor = tl.full([q.shape[0]], LOWEST, tl.float32)
    if not full:
        seen = visible(p[:, None], j[None, :], live[None, :], sink, window, IS_BAND, IS_CAUSAL)
        x = tl.where(seen, x, float("-inf"))
        floor = tl.where(tl.max(seen.to(tl.int32), 1) > 0, LOWEST, float("-inf"))
    weights, alpha, m_i, l_i = online_sum(m_i, l_i, x, floor, rule[1])
    acc = acc * alpha[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_acc_ptr, partial_m_ptr, partial_l_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om, stride_lb, stride_lh,
    sink_ptr, window_ptr, block_counts_ptr, block_indices_ptr, column_counts_ptr,
    column_indices_ptr, sinks_ptr, bias_ptr, slopes_ptr, order_ptr,
    sink_run, window_run, block_run, block_batch, block_rows, block_width, num_kv_blocks,
    column_run, column_batch, column_rows, column_width, blocks_per_group, bias_run, bias_batch,
    cu_seqlens_q_ptr, cu_seqlens_kv_ptr, seqlens_kv_ptr, pages_ptr, num_pages, pages_per_sequence,
    num_heads, seqlen_q, seqlen_kv, total_q, total_kv, num_row_blocks, rows_per_block, parts,
    num_splits, num_states, scale, unit, softcap, inverse_softcap,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr,
    GROUP_SIZE: tl.constexpr, BLOCK_KV: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, CHUNK: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRESCALED: tl.constexpr, SOFTCAP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of rows, or out and the state over one of `num_splits` even parts of
    the tiles of keys: sink and window, listed blocks, columns.
    """
    num_packs = num_heads // PACK
    programs = tl.num_programs(0) // parts // num_row_blocks
    pack, row_block = locate(tl.program_id(0) // parts, order_ptr, programs, num_row_blocks)
    part = tl.program_id(0) % parts
    batch = pack // num_packs
    head = pack % num_packs * PACK
    kv_head = (head // GROUP_SIZE).to(tl.int64)
    batch_offset = batch.to(tl.int64)

    bias_row = first_bias(bias_ptr, batch, head, bias_run, bias_batch, seqlen_kv)
    q_begin = tl.full([], 0, tl.int64)
    kv_begin = tl.full([], 0, tl.int64)
    if cu_seqlens_q_ptr is not None:
        q_begin, length = sequence(cu_seqlens_q_ptr, batch, total_q)
        seqlen_q = tl.minimum(length, seqlen_q)
        if pages_ptr is not None:
            pages_ptr += batch_offset * pages_per_sequence
            most = tl.full([], pages_per_sequence, tl.int64) * PAGE_SIZE
            length = tl.maximum(tl.load(seqlens_kv_ptr + batch), 0)
            length = tl.minimum(length, most).to(tl.int32)
        else:
            kv_begin, length = sequence(cu_seqlens_kv_ptr, batch, total_kv)
        seqlen_kv = tl.minimum(length, seqlen_kv)
        batch_offset = tl.full([], 0, tl.int64)

    begin = row_block * rows_per_block
    end = tl.minimum(begin + rows_per_block, seqlen_q)
    i, member, exists, first, last = rows_of_tile(begin, end, part, BLOCK_M, PACK)
    if first > last:
        return
    shift = seqlen_kv - seqlen_q
    p = i + shift
    p_low = first + shift
    p_high = last + shift

    row = q_begin + i
    heads = (head + member).to(tl.int64)
    q_offsets = batch_offset * stride_qb + heads * stride_qh + row * stride_qm
    queries = (q_ptr, q_offsets, exists)
    q = load_rows(q_ptr, q_offsets, exists, HEAD_DIM, BLOCK_D)
    k_ptr += batch_offset * stride_kb + kv_head * stride_kh + kv_begin * stride_kn
    v_ptr += batch_offset * stride_vb + kv_head * stride_vh + kv_begin * stride_vn

    cache = (k_ptr, v_ptr, stride_kn, stride_vn, pages_ptr, stride_kb, stride_vb, num_pages)

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
    split = tl.program_id(1)
    tile_begin, tile_end = even_part(tiles, split, num_splits)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(tile_begin, tl.minimum(tile_end, band_tiles)):
        keys = tile_of_band(tile, band, p_low, p_high, sink, window, BLOCK_N, IS_CAUSAL)
        acc, m_i, l_i = _step(
            acc, m_i, l_i, q, heads, p, keys, cache, sink, window, rule, True,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, PAGE_SIZE, IS_CAUSAL, PRESCALED, SOFTCAP,
            INPUT_PRECISION,
        )  # fmt: skip
    if block_counts_ptr is not None:
        for tile in range(tl.maximum(tile_begin, band_tiles), tl.minimum(tile_end, listed_end)):
            keys = tile_of_list(
                tile - band_tiles, p_low, p_high, sink, window, key_end, blocks_ptr, num_blocks,
                num_kv_blocks, BLOCK_N, BLOCK_KV, IS_CAUSAL,
            )  # fmt: skip
            acc, m_i, l_i = _step(
                acc, m_i, l_i, q, heads, p, keys, cache, sink, window, rule, False,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, PAGE_SIZE, IS_CAUSAL, PRESCALED,
                SOFTCAP, INPUT_PRECISION,
            )  # fmt: skip
    if column_counts_ptr is not None:
        for tile in tl.range(tl.maximum(tile_begin, listed_end), tile_end, num_stages=1):
            keys = tile_of_columns(
                tile - listed_end, p_low, p_high, sink, window, key_end, columns_ptr, num_columns,
                seqlen_kv, blocks_ptr, num_blocks, BLOCK_N, BLOCK_KV, SEARCH_STEPS, IS_CAUSAL,
            )  # fmt: skip
            acc, m_i, l_i = _step(
                acc, m_i, l_i, q, heads, p, keys, cache, sink, window, rule, False,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, PAGE_SIZE, IS_CAUSAL, PRESCALED,
                SOFTCAP, INPUT_PRECISION,
            )  # fmt: skip

    lse_offsets = batch_offset * stride_lb + heads * stride_lh + row
    if partial_acc_ptr is not None:
        lse_offsets += split.to(tl.int64) * num_states
        tl.store(partial_m_ptr + lse_offsets, m_i, mask=exists)
        tl.store(partial_l_ptr + lse_offsets, l_i, mask=exists)
        factor = 1 / tl.where(l_i == 0, 1.0, l_i)  # 0 where a score is inf, as no value is then
        out_ptr = partial_acc_ptr
        out_offsets = lse_offsets * HEAD_DIM_V
    else:
        sink_logit = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if sinks_ptr is not None:
            sink_logit = tl.load(sinks_ptr + heads, mask=exists, other=0.0)
        factor, lse = finish(m_i, l_i, sink_logit, unit)
        tl.store(lse_ptr + lse_offsets, lse, mask=exists)
        out_offsets = batch_offset * stride_ob + heads * stride_oh + row * stride_om
    store_rows(out_ptr, acc * factor[:, None], out_offsets, exists, HEAD_DIM_V, BLOCK_DV)
    repeated = exists & (l_i < float("inf"))  # other rows are NaN
    if any_of(repeated[:, None] & (is_finite(acc) == 0)):
        for column in range(0, HEAD_DIM_V, CHUNK):
            out = values_of_rows(
                column, tile_begin, tile_end, walk, queries, m_i, factor, cache, rule, CHUNK,
                BLOCK_N, BLOCK_KV, SEARCH_STEPS, HEAD_DIM, HEAD_DIM_V, BLOCK_D, PAGE_SIZE,
                IS_CAUSAL, PRESCALED, SOFTCAP, INPUT_PRECISION,
            )  # fmt: skip
            store_part(out_ptr, out, out_offsets, repeated, column, HEAD_DIM_V, CHUNK)


@triton.jit(do_not_specialize=SIZES)
def _merge_kernel(
    partial_acc_ptr, partial_m_ptr, partial_l_ptr, out_ptr, lse_ptr, sinks_ptr,
    stride_ob, stride_oh, stride_om, num_heads, num_rows, num_splits, num_states, unit,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """out and lse of `BLOCK_M` rows, counted over ``[batch, heads, rows]``, from the states of all
    splits, at most `SPLITS`.
    """
    state = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = state < num_states
    split = tl.arange(0, SPLITS)
    live = exists[:, None] & (split < num_splits)[None, :]
    offsets = split[None, :] * tl.full([], num_states, tl.int64) + state[:, None]
    m = tl.load(partial_m_ptr + offsets, mask=live, other=float("-inf"))
    l = tl.load(partial_l_ptr + offsets, mask=live, other=0.0)
    m_i = tl.max(m, 1)
    m_safe = tl.where(m_i == float("-inf"), 0.0, m_i)
    l *= tl.exp2((m - m_safe[:, None]) * (unit * LOG2E))
    head = state // num_rows % num_heads
    sink_logit = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if sinks_ptr is not None:
        sink_logit = tl.load(sinks_ptr + head, mask=exists, other=0.0)
    factor, lse = finish(m_i, tl.sum(l, 1), sink_logit, unit)
    weights = tl.where(m == float("-inf"), 0.0, l * factor[:, None])
    columns = tl.arange(0, BLOCK_DV)
    mask = live[:, :, None] & (columns < HEAD_DIM_V)[None, None, :]
    offsets = offsets[:, :, None] * HEAD_DIM_V + columns[None, None, :]
    out = tl.load(partial_acc_ptr + offsets, mask=mask, other=0.0)
    out = tl.sum(out * weights[:, :, None], 1)
    tl.store(lse_ptr + state, lse, mask=exists)
    offsets = state // num_rows // num_heads * stride_ob + head * stride_oh
    offsets += state % num_rows * stride_om
    store_rows(out_ptr, out, offsets, exists, HEAD_DIM_V, BLOCK_DV)


def _packed(packing: Packing, k: Tensor) -> dict:
    """Where packed sequences lie."""
    table = packing.block_table
    return {
        "cu_seqlens_q_ptr": packing.cu_seqlens_q,
        "cu_seqlens_kv_ptr": packing.cu_seqlens_kv,
        "seqlens_kv_ptr": packing.seqlens_kv,
        "pages_ptr": table,
        "num_pages": k.shape[0],
        "pages_per_sequence": 0 if table is None else table.shape[1],
        "PAGE_SIZE": 1 if table is None else k.shape[1],
    }


_UNPACKED = {
    "cu_seqlens_q_ptr": None,
    "cu_seqlens_kv_ptr": None,
    "seqlens_kv_ptr": None,
    "pages_ptr": None,
    "num_pages": 0,
    "pages_per_sequence": 0,
    "PAGE_SIZE": 1,
}


def _views(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, ...]:
    """Packed tensors as ``[1 or pages, heads, rows, dim]``."""
    return tuple((x[None] if x.dim() == 3 else x).transpose(1, 2) for x in (q, k, v, out))


def _results(q: Tensor, v: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """out and lse, without values yet."""
    if packing is None:
        return empty_out(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return q.new_empty(*q.shape[:2], v.shape[-1]), lse


def _of_call(
    call: Call, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, lse: Tensor
) -> dict[str, Any]:
    """The kernel's arguments that no configuration changes, but for tensors and their strides."""
    dims = (configs.padded(q.shape[-1]), configs.padded(v.shape[-1]))
    return {
        "stride_lb": call.num_heads * lse.shape[-1],
        "stride_lh": lse.shape[-1],
        **call.lists(),
        "sinks_ptr": call.sink_logits,
        **(_UNPACKED if packing is None else _packed(packing, k)),
        "num_heads": call.num_heads,
        "seqlen_q": call.layout.seqlen_q,
        "seqlen_kv": call.layout.seqlen_kv,
        "total_q": q.shape[0],
        "total_kv": k.shape[0],
        "num_states": lse.numel(),
        **call.scores(),
        "HEAD_DIM": q.shape[-1],
        "HEAD_DIM_V": v.shape[-1],
        "BLOCK_D": dims[0],
        "BLOCK_DV": dims[1],
        "CHUNK": configs.columns_at_a_time(dims[1]),
        "PACK": call.pack,
        "GROUP_SIZE": call.group_size,
    }


def steps(
    call: Call, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, may_split: bool,
    target: configs.Target,
) -> tuple[list[Choice], tuple[Tensor, Tensor]]:  # fmt: skip
    """What to run, in order, and the tensors that then hold out and lse."""
    out, lse = _results(q, v, packing)
    q4, k4, v4, out4 = (q, k, v, out) if packing is None else _views(q, k, v, out)
    shared = {
        "q_ptr": q4,
        "k_ptr": k4,
        "v_ptr": v4,
        "out_ptr": out4,
        "lse_ptr": lse,
        **strides("q", q4, "bhm"),
        **strides("k", k4, "bhn"),
        **strides("v", v4, "bhn"),
        **strides("o", out4, "bhm"),
        **_of_call(call, q, k, v, packing, lse),
        "INPUT_PRECISION": input_precision(q.dtype, may_split),
    }
    dims, rows = (shared["BLOCK_D"], shared["BLOCK_DV"]), lse.shape[-1]

    def build(config: configs.Config) -> list[Launch]:
        rows_per_block, parts = call.row_tiles(config.block_m)
        num_row_blocks = -(-call.layout.seqlen_q // rows_per_block)
        programs = num_row_blocks * parts * call.num_packs
        key_tiles = -(-call.layout.seqlen_kv // config.block_n)
        num_splits = configs.num_splits(programs, key_tiles, target)
        order = None
        if programs > target.num_cores and call.is_skewed(packing is not None):
            order = lists.order_of_rows(call, rows_per_block, lists.lengths(call.layout, packing))
        acc = m_i = l_i = None
        if num_splits > 1:
            acc = lse.new_empty(num_splits, lse.numel(), v.shape[-1])
            m_i, l_i = lse.new_empty(2, num_splits, lse.numel())
        arguments = shared | {
            "partial_acc_ptr": acc,
            "partial_m_ptr": m_i,
            "partial_l_ptr": l_i,
            "order_ptr": order,
            "num_row_blocks": num_row_blocks,
            "rows_per_block": rows_per_block,
            "parts": parts,
            "num_splits": num_splits,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }
        grid = (programs, num_splits)
        options = (config.num_warps, config.num_stages, config.max_registers)
        found = [Launch(_forward_kernel, grid, arguments, *options)]
        if num_splits > 1:
            limit = configs.max_registers(q.dtype, configs.WARPS_MERGING, target)
            found.append(_merge(arguments, rows, limit, target))
        return found

    is_paged = packing is not None and packing.block_table is not None
    kind = ("forward", q.dtype, dims, may_split, packing is not None, is_paged, *call.kind, target)
    candidates = configs.forward(
        q.dtype, max(dims), call.is_irregular, call.is_wide, call.has_biases, target=target,
        slots=call.slots, keys=call.layout.seqlen_kv,
    )  # fmt: skip
    return [Choice(kind, candidates, build)], (out, lse)


def _merge(forward: dict, rows: int, max_registers: int | None, target: configs.Target) -> Launch:
    """The launch that merges the states of `forward`, given its arguments."""
    names = ("partial_acc_ptr", "partial_m_ptr", "partial_l_ptr", "out_ptr", "lse_ptr")
    names += ("sinks_ptr", "stride_ob", "stride_oh", "stride_om", "num_heads", "num_splits")
    names += ("num_states", "unit", "HEAD_DIM_V", "BLOCK_DV")
    arguments = {name: forward[name] for name in names}
    block_m = configs.rows_merged(target)
    arguments |= {"num_rows": rows, "BLOCK_M": block_m, "SPLITS": configs.MAX_SPLITS}
    grid = (-(-forward["num_states"] // block_m),)
    return Launch(_merge_kernel, grid, arguments, configs.WARPS_MERGING, 1, max_registers)
