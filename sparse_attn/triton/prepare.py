"""What runs first: a launch checks the values of a layout and finds where its lists end."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..contract.packing import Packing
from ..layout import BlockLayout
from . import configs
from .launch import Launch
from .primitives import SIZES, sequence

LISTS, ENTRIES = 16, 128
COUNTS = (
    "num_sinks", "num_windows", "num_block_lists", "block_batch", "block_kv", "num_column_lists",
    "column_batch", "rows_per_group", "num_sequences",
)  # fmt: skip


@triton.jit
def _shift(
    batch, live, seqlen_q, seqlen_kv, ends_q_ptr, ends_kv_ptr, seqlens_kv_ptr, total_q, total_kv
):
    """How far the keys of sequences reach beyond their queries; that of all calls if there are no
    packed sequences.
    """
    shift = batch * 0 + (seqlen_kv - seqlen_q)
    if ends_q_ptr is not None:
        batch = tl.where(live, batch, 0)
        _, rows = sequence(ends_q_ptr, batch, total_q)
        if seqlens_kv_ptr is None:
            _, keys = sequence(ends_kv_ptr, batch, total_kv)
        else:
            keys = tl.load(seqlens_kv_ptr + batch)
        shift = tl.minimum(tl.maximum(keys, 0), seqlen_kv) - tl.minimum(rows, seqlen_q)
        shift = tl.where(live, shift, -seqlen_q)
    return shift


@triton.jit
def _ends_of_lists(
    program, counts_ptr, indices_ptr, ends_ptr, num_lists, list_batch, list_rows, width, limit,
    rows_per_list, keys_per_entry, num_sequences, seqlen_q, seqlen_kv, ends_q_ptr, ends_kv_ptr,
    seqlens_kv_ptr, total_q, total_kv,
    LISTS: tl.constexpr, ENTRIES: tl.constexpr, SEQUENCES: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """Of `LISTS` lists the number of entries that any of their rows may see."""
    number = program * LISTS + tl.arange(0, LISTS)
    exists = number < num_lists
    count = tl.load(counts_ptr + number, mask=exists, other=0)
    if NAME == "blocks":
        tl.device_assert((count >= 0) & (count <= width), "kv_num_blocks: not a number of blocks")
    else:
        tl.device_assert((count >= 0) & (count <= width), "num_columns: not a number of columns")
    count = tl.minimum(tl.maximum(count, 0), width)
    if list_batch > 0:
        batch = number // list_batch
        shift = _shift(
            batch, exists, seqlen_q, seqlen_kv, ends_q_ptr, ends_kv_ptr, seqlens_kv_ptr, total_q,
            total_kv,
        )  # fmt: skip
    else:
        batches = tl.arange(0, SEQUENCES)
        shifts = _shift(
            batches, batches < num_sequences, seqlen_q, seqlen_kv, ends_q_ptr, ends_kv_ptr,
            seqlens_kv_ptr, total_q, total_kv,
        )  # fmt: skip
        shift = tl.zeros([LISTS], tl.int32) + tl.max(shifts, 0)
    row_end = (number % list_rows + 1).to(tl.int64) * rows_per_list
    last_key = tl.minimum(row_end, seqlen_q).to(tl.int32) - 1 + shift
    last = tl.where(last_key < 0, -1, last_key // keys_per_entry)
    end = tl.zeros([LISTS], tl.int32)
    indices_ptr += number.to(tl.int64)[:, None] * width
    for begin in range(0, tl.max(count, 0), ENTRIES):
        entry = begin + tl.arange(0, ENTRIES)[None, :]
        listed = entry < count[:, None]
        index = tl.load(indices_ptr + entry, mask=listed, other=0)
        before = tl.load(indices_ptr + entry - 1, mask=listed & (entry > 0), other=-1)
        inside = (index >= 0) & (index < limit)
        ascends = index > before
        if NAME == "blocks":
            tl.device_assert(inside | (listed == 0), "kv_indices: out of range")
            tl.device_assert(ascends | (listed == 0), "kv_indices: a list does not ascend")
        else:
            tl.device_assert(inside | (listed == 0), "column_indices: out of range")
            tl.device_assert(ascends | (listed == 0), "column_indices: a list does not ascend")
        end += tl.sum((listed & (index <= last[:, None])).to(tl.int32), 1)
    tl.store(ends_ptr + number, end, mask=exists)


@triton.jit
def _check_limits(ptr, size, low, NAME: tl.constexpr):
    """No sink or window is less than `low`."""
    for begin in range(0, size, 128):
        number = begin + tl.arange(0, 128)
        x = tl.load(ptr + number, mask=number < size, other=0)
        if NAME == "sink":
            tl.device_assert(x >= low, "sink: negative")
        else:
            tl.device_assert(x >= low, "window: less than -1")


@triton.jit(do_not_specialize=(*SIZES, *COUNTS))
def _prepare_kernel(
    sink_ptr, window_ptr, num_sinks, num_windows,
    block_counts_ptr, block_indices_ptr, block_ends_ptr, num_block_lists, block_batch, block_rows,
    block_width, num_kv_blocks, rows_per_block, block_kv,
    column_counts_ptr, column_indices_ptr, column_ends_ptr, num_column_lists, column_batch,
    column_rows, column_width, rows_per_group,
    num_sequences, seqlen_q, seqlen_kv, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, seqlens_kv_ptr,
    total_q, total_kv,
    LISTS: tl.constexpr, ENTRIES: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Where some lists of blocks end, or some lists of columns; the first program looks at sinks
    and windows too.
    """
    program = tl.program_id(0)
    if program == 0:
        _check_limits(sink_ptr, num_sinks, 0, "sink")
        _check_limits(window_ptr, num_windows, -1, "window")
    block_programs = 0
    if block_counts_ptr is not None:
        block_programs = tl.cdiv(num_block_lists, LISTS)
        if program < block_programs:
            _ends_of_lists(
                program, block_counts_ptr, block_indices_ptr, block_ends_ptr, num_block_lists,
                block_batch, block_rows, block_width, num_kv_blocks, rows_per_block, block_kv,
                num_sequences, seqlen_q, seqlen_kv, cu_seqlens_q_ptr, cu_seqlens_kv_ptr,
                seqlens_kv_ptr, total_q, total_kv, LISTS, ENTRIES, SEQUENCES, "blocks",
            )  # fmt: skip
    if column_counts_ptr is not None:  # noqa: SIM102
        if program >= block_programs:
            _ends_of_lists(
                program - block_programs, column_counts_ptr, column_indices_ptr, column_ends_ptr,
                num_column_lists, column_batch, column_rows, column_width, seqlen_kv,
                rows_per_group, 1, num_sequences, seqlen_q, seqlen_kv, cu_seqlens_q_ptr,
                cu_seqlens_kv_ptr, seqlens_kv_ptr, total_q, total_kv, LISTS, ENTRIES, SEQUENCES,
                "columns",
            )  # fmt: skip


def launches(
    layout: BlockLayout, packing: Packing | None, totals: tuple[int, int], is_causal: bool
) -> tuple[list[Launch], BlockLayout]:
    """What to run, and the layout whose lists then end, in a causal call, before the first entry
    that lies behind all of their rows.

    On a GPU the values of the layout are asserted, without waiting for the device.
    """
    checks = layout.device.type == "cuda"
    cuts = is_causal and layout.seqlen_q > 1
    if not checks and not cuts:
        return [], layout
    rows, keys = (min(n, max(m, 1)) for n, m in zip(layout.block_size, layout.seqlens, strict=True))
    num_sequences = 1 if packing is None else packing.cu_seqlens_q.shape[0] - 1
    found, programs = layout, 0
    arguments = {
        "sink_ptr": layout.sink.contiguous(),
        "window_ptr": layout.window.contiguous(),
        "num_sinks": layout.sink.numel(),
        "num_windows": layout.window.numel(),
    }
    for part, counts_name, indices_name in (
        ("block", "kv_num_blocks", "kv_indices"),
        ("column", "num_columns", "column_indices"),
    ):
        counts, indices = getattr(layout, counts_name), getattr(layout, indices_name)
        ends = None
        if counts is not None:
            counts, indices = counts.contiguous(), indices.contiguous()
            ends = torch.empty_like(counts)
            programs += -(-counts.numel() // LISTS)
            if cuts:
                found = replace(found, **{counts_name: ends})
        batch, heads, list_rows = (1, 1, 1) if counts is None else counts.shape
        arguments |= {
            f"{part}_counts_ptr": counts,
            f"{part}_indices_ptr": indices,
            f"{part}_ends_ptr": ends,
            f"num_{part}_lists": 0 if counts is None else counts.numel(),
            f"{part}_batch": heads * list_rows if batch > 1 else 0,
            f"{part}_rows": list_rows,
            f"{part}_width": 0 if counts is None else indices.shape[-1],
        }
    arguments |= {
        "num_kv_blocks": layout.num_kv_blocks,
        "rows_per_block": rows,
        "block_kv": keys,
        "rows_per_group": rows * layout.column_group,
        "num_sequences": num_sequences,
        "seqlen_q": layout.seqlen_q,
        "seqlen_kv": layout.seqlen_kv,
        "cu_seqlens_q_ptr": None if packing is None else packing.cu_seqlens_q,
        "cu_seqlens_kv_ptr": None if packing is None else packing.cu_seqlens_kv,
        "seqlens_kv_ptr": None if packing is None else packing.seqlens_kv,
        "total_q": totals[0],
        "total_kv": totals[1],
        "LISTS": LISTS,
        "ENTRIES": ENTRIES,
        "SEQUENCES": configs.next_power_of_2(num_sequences),
    }
    grid = (max(programs, 1),)
    return [Launch(_prepare_kernel, grid, arguments, 4, 1, checks=checks)], found
