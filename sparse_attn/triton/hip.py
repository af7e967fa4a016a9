"""HiP's tree search: one program finds the key blocks of one query block and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import validation
from ..contract.request import Request
from . import configs
from .launch import Launch, strides
from .ops import _rows, _run, refuse
from .primitives import load_rows

SIZES = (
    "num_heads", "num_searches", "num_row_blocks", "seqlen_q", "seqlen_kv", "slots", "width",
    "first_block", "sink", "window", "block_q", "first_row", "stride_q", "block_k", "stride_k",
    "num_keys",
)  # fmt: skip

_FIRST_NODES = tl.constexpr(8)  # of the search, for each block that is kept
_LOW_BITS = tl.constexpr(2**32 - 1)
_LEAST = tl.constexpr(-(2**63))


@triton.jit
def _sort_keys(score, slot, live):
    """Ascending in score, then descending in slot, which the low bits hold; what is not live is
    least.
    """
    score = tl.where(score == 0, 0.0, score)  # no negative zero
    score = tl.where(score == score, score, float("-inf"))
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(live, (bits.to(tl.int64) << 32) | (slot.to(tl.int64) ^ _LOW_BITS), _LEAST)


@triton.jit
def products(
    k_ptr, k_offsets, q_ptr, q_offsets, q, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys times rows; the latter are `q` if a tile holds all of their dimensions."""
    if CHUNK_D == BLOCK_D:
        k = load_rows(k_ptr, k_offsets, k_offsets >= 0, HEAD_DIM, BLOCK_D)
        s = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)
    else:
        s = tl.zeros([k_offsets.shape[0], q_offsets.shape[0]], tl.float32)
        for d in range(0, HEAD_DIM, CHUNK_D):
            columns = d + tl.arange(0, CHUNK_D)[None, :]
            live = columns < HEAD_DIM
            k = tl.load(k_ptr + k_offsets[:, None] + columns, mask=live, other=0.0)
            part = tl.load(q_ptr + q_offsets[:, None] + columns, mask=live, other=0.0)
            s = tl.dot(k, tl.trans(part), s, input_precision=INPUT_PRECISION)
    return s


@triton.jit
def _kept(score, live, slots, SLOTS: tl.constexpr):
    """Where the best of 2 SLOTS nodes are, ascending; what is not live comes last, which is no
    node then.
    """
    best = tl.topk(_sort_keys(score, tl.arange(0, 2 * SLOTS), live), SLOTS)
    kept = ((best & _LOW_BITS) ^ _LOW_BITS).to(tl.int32)
    chosen = (tl.arange(0, SLOTS) < slots) & (kept >= 0)
    return tl.sort(tl.where(chosen, kept, 2 * SLOTS - 1))


@triton.jit
def _behind(a, b):
    """`b` behind `a`."""
    return tl.reshape(tl.trans(tl.join(a, b)), [2 * a.shape[0]])


@triton.jit
def _row_offsets(part, first_row, stride_q, last_row, stride_qm, BLOCK_M: tl.constexpr):
    """Where sampled rows begin."""
    rows = first_row + (part * BLOCK_M + tl.arange(0, BLOCK_M)) * stride_q
    return tl.minimum(rows, last_row).to(tl.int64) * stride_qm


@triton.jit
def _origins(
    num_first, end, num_near, q_ptr, k_ptr, first_row, stride_q, last_row, stride_qm, stride_kn,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    ROW_PARTS: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The greatest product of each sampled row with the first keys and with those from `end` on."""
    parts = tl.arange(0, PARTS)[:, None]
    origins = tl.zeros([PARTS, BLOCK_M], tl.float32)
    if num_near > 0:
        for row_part in tl.static_range(ROW_PARTS):
            q_offsets = _row_offsets(row_part, first_row, stride_q, last_row, stride_qm, BLOCK_M)
            q = None
            if CHUNK_D == BLOCK_D:
                q = load_rows(q_ptr, q_offsets, q_offsets >= 0, HEAD_DIM, BLOCK_D)
            origin = tl.full([BLOCK_M], float("-inf"), tl.float32)
            for step in range(tl.cdiv(num_near, KEYS)):
                j = tl.minimum(step * KEYS + tl.arange(0, KEYS), num_near - 1)
                j = tl.where(j < num_first, j, end + j - num_first)
                s = products(
                    k_ptr, j.to(tl.int64) * stride_kn, q_ptr, q_offsets, q, HEAD_DIM, BLOCK_D,
                    CHUNK_D, INPUT_PRECISION,
                )  # fmt: skip
                origin = tl.maximum(origin, tl.max(s, 0))
            origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
            origins = tl.where(parts == row_part, origin[None, :], origins)
    return origins


@triton.jit
def _best_scores(
    blocks, num_tiles, end, origins, q_ptr, k_ptr, first_row, stride_q, last_row, stride_qm,
    stride_kn, block_k, stride_k, num_keys,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    ROW_PARTS: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr,
    KEYS: tl.constexpr, KEY_PARTS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The greatest product of a sampled row, from its origin, with a sampled key of each of
    `blocks`.
    """
    blocks = tl.reshape(blocks, [TILES, BLOCKS])
    tiles = tl.arange(0, TILES)[:, None]
    best = tl.full([TILES, BLOCKS], float("-inf"), tl.float32)
    for row_part in tl.static_range(ROW_PARTS):
        q_offsets = _row_offsets(row_part, first_row, stride_q, last_row, stride_qm, BLOCK_M)
        q = None
        if CHUNK_D == BLOCK_D:
            q = load_rows(q_ptr, q_offsets, q_offsets >= 0, HEAD_DIM, BLOCK_D)
        origin = tl.sum(tl.where(tl.arange(0, PARTS)[:, None] == row_part, origins, 0.0), 0)
        for step in range(num_tiles * KEY_PARTS):
            tile = step // KEY_PARTS
            block = tl.sum(tl.where(tiles == tile, blocks, 0), 0)
            key = tl.minimum(step % KEY_PARTS * KEYS + tl.arange(0, KEYS), num_keys - 1)
            j = block[:, None] * block_k + (stride_k // 2 + key * stride_k)[None, :]
            j = tl.reshape(tl.minimum(j, end - 1), [BLOCKS * KEYS])
            s = products(
                k_ptr, j.to(tl.int64) * stride_kn, q_ptr, q_offsets, q, HEAD_DIM, BLOCK_D, CHUNK_D,
                INPUT_PRECISION,
            )  # fmt: skip
            s = tl.max(tl.reshape(tl.max(s - origin[None, :], 1), [BLOCKS, KEYS]), 1)
            best = tl.where(tiles == tile, tl.maximum(best, s[None, :]), best)
    return tl.reshape(best, [TILES * BLOCKS])


@triton.jit(do_not_specialize=SIZES)
def _hip_kernel(
    q_ptr, k_ptr, counts_ptr, indices_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    num_heads, num_searches, num_row_blocks, seqlen_q, seqlen_kv, slots, width, first_block, sink,
    window, block_q, first_row, stride_q, block_k, stride_k, num_keys,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, ROW_PARTS: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCKS: tl.constexpr, KEYS: tl.constexpr, KEY_PARTS: tl.constexpr, JUDGE_FIRST: tl.constexpr,
    IS_CAUSAL: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The list of one query block and head.

    A node is a run of `size` blocks, or less at the end; nodes are in ascending order. The first
    ones are looked at in parts, of which the best are kept. Their first blocks take a step of their
    own, those of later nodes have been judged before.
    """
    search = tl.program_id(0) % num_searches
    row_block = num_row_blocks - 1 - tl.program_id(0) // num_searches
    batch, head = search // num_heads, search % num_heads
    start = row_block * block_q
    last_row = tl.minimum(start + block_q, seqlen_q) - 1
    last_end = seqlen_kv
    end = seqlen_kv
    if IS_CAUSAL:
        last_end = tl.minimum(start + block_q + seqlen_kv - seqlen_q, seqlen_kv)
        end = last_end - window
    num_blocks = tl.maximum(tl.cdiv(tl.maximum(end, 0), block_k) - first_block, 0)
    count = tl.minimum(slots, num_blocks)

    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += batch.to(tl.int64) * stride_kb + (head // GROUP_SIZE).to(tl.int64) * stride_kh
    slot = tl.arange(0, SLOTS)
    node = tl.arange(0, 2 * SLOTS)
    found = slot
    size = tl.where(num_blocks > slots, 1, 0)
    while tl.cdiv(num_blocks, tl.maximum(size, 1)) > _FIRST_NODES * slots:
        size = size * 2
    several_rows = (stride_q > 0) & (start + first_row < last_row)
    num_first = tl.minimum(sink, end)
    num_near = tl.where((size > 0) & several_rows & (end < last_end), num_first + last_end - end, 0)
    origins = _origins(
        num_first, end, num_near, q_ptr, k_ptr, start + first_row, stride_q, last_row, stride_qm,
        stride_kn, HEAD_DIM, BLOCK_D, CHUNK_D, BLOCK_M, ROW_PARTS, PARTS, BLOCKS * KEYS,
        INPUT_PRECISION,
    )  # fmt: skip

    first = tl.where(node < 2 * slots, tl.minimum(node * size, num_blocks), num_blocks)
    first_score = tl.full([2 * SLOTS], float("-inf"), tl.float32)
    found_firsts = tl.full([SLOTS], float("-inf"), tl.float32)
    found_centres = tl.full([SLOTS], float("-inf"), tl.float32)
    part = tl.where(size > 0, 0, -1)  # of the first nodes, or -1 when they are done
    judge_first = (size > 0) & JUDGE_FIRST
    while size > 0:
        block = tl.where(judge_first, first, first + size // 2)
        block = first_block + tl.minimum(block, num_blocks - 1)
        num_tiles = tl.cdiv(2 * slots, BLOCKS)
        if JUDGE_FIRST:
            num_tiles = tl.where((size > 1) | judge_first, num_tiles, 0)
        score = _best_scores(
            block, num_tiles, end, origins, q_ptr, k_ptr, start + first_row, stride_q, last_row,
            stride_qm, stride_kn, block_k, stride_k, num_keys, HEAD_DIM, BLOCK_D, CHUNK_D, BLOCK_M,
            ROW_PARTS, PARTS, 2 * SLOTS // BLOCKS, BLOCKS, KEYS, KEY_PARTS, INPUT_PRECISION,
        )  # fmt: skip
        if judge_first:
            first_score = score
            judge_first = False
        else:
            kept = _kept(tl.maximum(first_score, score), first < num_blocks, slots, SLOTS)
            best, centres = tl.gather(first, kept, 0), tl.gather(score, kept, 0)
            firsts = tl.gather(first_score, kept, 0)
            if part > 0:
                both = _behind(found, best)
                both_firsts = _behind(found_firsts, firsts)
                both_centres = _behind(found_centres, centres)
                score = tl.maximum(both_firsts, both_centres)
                kept = _kept(score, both < num_blocks, slots, SLOTS)
                best = tl.gather(both, kept, 0)
                firsts = tl.gather(both_firsts, kept, 0)
                centres = tl.gather(both_centres, kept, 0)
            found = best
            found_firsts = firsts
            found_centres = centres
            begun = 2 * slots * (part + 1)
            if (part >= 0) & (begun * size < num_blocks):
                part += 1
                judge_first = (size > 0) & JUDGE_FIRST
                first = (begun + node) * size
            else:
                part = -1
                size = size // 2
                first = tl.reshape(tl.join(found, found + size), [2 * SLOTS])
                if JUDGE_FIRST:
                    first_score = tl.reshape(tl.join(firsts, centres), [2 * SLOTS])
            first = tl.where(node < 2 * slots, tl.minimum(first, num_blocks), num_blocks)

    row = search.to(tl.int64) * num_row_blocks + row_block
    tl.store(counts_ptr + row, count)
    found = tl.where(slot < count, first_block + found, 0)
    tl.store(indices_ptr + row * width + slot, found, mask=slot < width)


def launches(
    q: Tensor, k: Tensor, slots: int, block_q: int, block_k: int, stride_q: int, stride_k: int,
    representatives: int, sink: int, window: int, strict: bool, is_causal: bool,
    target: configs.Target,
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:  # fmt: skip
    """What to launch, and the tensors that then hold counts and indices."""
    batch, heads, seqlen_q, head_dim = q.shape
    num_kv_heads, seqlen_kv = k.shape[1:3]
    num_row_blocks = -(-seqlen_q // block_q)
    width = min(slots, -(-seqlen_kv // block_k))
    counts = torch.empty((batch, heads, num_row_blocks), dtype=torch.int32, device=q.device)
    indices = torch.empty((*counts.shape, width), dtype=torch.int32, device=q.device)
    first_block = min(sink // block_k, seqlen_kv)
    # Beyond the sequence they change nothing more.
    block_q, block_k = min(block_q, max(seqlen_q, 1)), min(block_k, max(seqlen_kv, 1))
    stride_q, stride_k = min(stride_q, block_q), min(stride_k, block_k)
    num_keys = len(range(stride_k // 2, block_k, stride_k))
    num_rows = 1 if strict else -(-block_q // stride_q)
    config = configs.hip(q.dtype, configs.padded(head_dim), num_rows, target)
    row_parts = -(-num_rows // config.block_m)
    keys = min(configs.next_power_of_2(num_keys), config.block_n)
    padded_slots = max(configs.next_power_of_2(max(width, 1)), 8 // keys, 1)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "counts_ptr": counts,
        "indices_ptr": indices,
        **strides("q", q, "bhm"),
        **strides("k", k, "bhn"),
        "num_heads": heads,
        "num_searches": batch * heads,
        "num_row_blocks": num_row_blocks,
        "seqlen_q": seqlen_q,
        "seqlen_kv": seqlen_kv,
        "slots": width,
        "width": width,
        "first_block": first_block,
        "sink": min(sink, seqlen_kv),
        "window": min(window, seqlen_kv),
        "block_q": block_q,
        "first_row": 0 if strict else stride_q - 1,
        "stride_q": 0 if strict else stride_q,
        "block_k": block_k,
        "stride_k": stride_k,
        "num_keys": num_keys,
        "GROUP_SIZE": heads // max(num_kv_heads, 1),
        "HEAD_DIM": head_dim,
        "BLOCK_D": configs.padded(head_dim),
        "CHUNK_D": configs.chunk(q.dtype, head_dim),
        "BLOCK_M": config.block_m,
        "ROW_PARTS": row_parts,
        "PARTS": configs.next_power_of_2(row_parts),
        "SLOTS": padded_slots,
        "BLOCKS": min(config.block_n // keys, 2 * padded_slots),
        "KEYS": keys,
        "KEY_PARTS": -(-num_keys // keys),
        "JUDGE_FIRST": representatives > 1,
        "IS_CAUSAL": is_causal,
        "INPUT_PRECISION": "ieee",
    }
    grid = (num_row_blocks * batch * heads,)
    registers = configs.max_registers(q.dtype, config.num_warps, target)
    step = Launch(_hip_kernel, grid, arguments, config.num_warps, config.num_stages, registers)
    return [step], (counts, indices)


def select(
    q: Tensor, k: Tensor, slots: int, block_q: int, block_k: int, stride_q: int, stride_k: int,
    representatives: int, sink: int, window: int, strict: bool, is_causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sparse_attn::hip_select`."""
    refuse(Request("hip_select", q, k))
    validation.check_qkv(q, k, k)
    sizes = {"slots": slots, "block_q": block_q, "block_k": block_k}
    sizes |= {"stride_q": stride_q, "stride_k": stride_k}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}")
    for name, value in {"sink": sink, "window": window}.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, but is {value}")
    if representatives not in (1, 2):
        raise ValueError(f"representatives must be 1 or 2, but is {representatives}")
    if stride_q > block_q or stride_k > block_k:
        raise ValueError("stride_q must not be more than block_q, nor stride_k more than block_k")
    q, k = _rows(q), _rows(k)
    steps, found = launches(
        q, k, slots, block_q, block_k, stride_q, stride_k, representatives, sink, window, strict,
        is_causal, configs.Target.of(q),
    )  # fmt: skip
    _run(steps, q)
    return found
