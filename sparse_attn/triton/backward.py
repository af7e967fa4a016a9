"""The gradients: one kernel for what rows have in common, one by rows for dq and slopes, one by
keys for dk, dv and biases. Each result has one writer; there are no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import configs, lists
from .autotune import Choice
from .backward_keys import _backward_keys_kernel, _sum_kernel
from .backward_rows import _backward_rows_kernel, _preprocess_kernel
from .launch import Call, Launch, input_precision, strides


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
        "CHUNK": configs.columns_at_a_time(configs.padded(min(q.shape[-1], v.shape[-1]))),
        "gradient_scale": call.scale,
    }


def _preprocess(call: Call, dout, dlse, out, lse, states: dict) -> Launch:
    dim, rows = configs.padded(out.shape[-1]), configs.ROWS_PREPROCESSED
    arguments = {
        "out_ptr": out,
        "dout_ptr": dout,
        "lse_ptr": lse,
        "dlse_ptr": dlse,
        "sinks_ptr": call.sink_logits,
        **{name.replace("lse", "base2_lse"): x for name, x in states.items()},
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


def _rows(
    call: Call, tensors: dict, dq: Tensor, dslopes: Tensor | None, target: configs.Target
) -> Choice:
    """The launch for dq and for what each row adds to the gradients of slopes."""
    q, v = tensors["q_ptr"], tensors["v_ptr"]
    outputs = {"dq_ptr": dq, "dslopes_ptr": dslopes, "sinks_ptr": call.sink_logits}
    shared = tensors | outputs | call.lists() | _sizes(call, q, v)

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
        q.dtype, max(shared["BLOCK_D"], shared["BLOCK_DV"]), call.is_irregular, not call.is_plain,
        target=target, slots=call.slots, keys=call.layout.seqlen_kv,
    )  # fmt: skip
    return Choice(_kind("backward_rows", call, q, v, target), candidates, build)


def _keys(
    call: Call, tensors: dict, dk: Tensor, dv: Tensor, dbias: Tensor | None, target: configs.Target
) -> Choice:
    """The launches for dk, dv and the gradients of biases: sink, window and blocks first, then
    columns on top.
    """
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
        "dbias_ptr": dbias,
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
        call.is_irregular or not call.is_plain, target=target,
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
    owners = arguments["num_owners"]
    split_tiles = min(heavy, tiles) * owners
    row_tiles = -(-call.layout.seqlen_q * call.group_size // config.block_m)
    num_splits = configs.num_splits(split_tiles, row_tiles, target)
    size = (split_tiles, num_splits, config.block_n)
    partials = {}
    for name in ("dk_ptr", "dv_ptr", "dbias_ptr"):
        x, part = arguments[name], None
        if x is not None and num_splits > 1:
            part = x.new_empty(*size, x.shape[-1], dtype=torch.float32)
        partials[f"partial_{name}"] = part
    arguments = arguments | partials
    arguments |= {
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
        "BLOCK_PACKS": configs.next_power_of_2(call.group_size // call.pack),
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
    """What to run, in order, and the tensors that then hold ``dq, dk, dv, delta``; what each row
    adds to the gradient of its head's slope ``[B, H, Sq]``; and the gradients of biases for each
    pack of heads of a KV head ``[B, Hkv, Skv, packs]``. The last two are None without these.

    dk and dv are float32 where columns are added to them.
    """
    names = ("lse_ptr", "delta_ptr", "peak_ptr", "norm_ptr")
    states = {name: torch.empty_like(lse) for name in names}
    dtype = q.dtype if call.layout.num_columns is None else torch.float32
    dq = q.new_empty(q.shape)
    dk, dv = k.new_empty(k.shape, dtype=dtype), v.new_empty(v.shape, dtype=dtype)
    dbias = dslopes = None
    if call.key_bias is not None:
        dbias = lse.new_empty(*k.shape[:3], call.group_size // call.pack)
    if call.alibi_slopes is not None:
        dslopes = torch.empty_like(lse)
    tensors = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "dout_ptr": dout,
        **states,
        **strides("q", q, "bhm"),
        **strides("k", k, "bhn"),
        **strides("v", v, "bhn"),
        **strides("g", dout, "bhm"),
    }
    found = [
        _preprocess(call, dout, dlse, out, lse, states),
        _rows(call, tensors, dq, dslopes, target),
        _keys(call, tensors, dk, dv, dbias, target),
    ]
    return found, (dq, dk, dv, states["delta_ptr"], dslopes, dbias)
