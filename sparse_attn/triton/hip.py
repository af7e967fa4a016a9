"""HiP's tree search: one program finds the key blocks of one query block and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import validation
from . import configs
from .launch import Launch, strides
from .ops import _refuse, _rows, _run
from .primitives import load_rows

SIZES = (
    "num_heads", "num_searches", "num_row_blocks", "seqlen_q", "seqlen_kv", "slots", "width",
    "first_block", "window", "block_q", "first_row", "stride_q", "block_k", "stride_k", "num_keys",
)  # fmt: skip

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
def _best_scores(
    blocks, num_tiles, end, q_ptr, k_ptr, first_row, stride_q, last_row, stride_qm, stride_kn,
    block_k, stride_k, num_keys,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    ROW_PARTS: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr,
    KEY_PARTS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The greatest product of a sampled row with a sampled key of each of `blocks`."""
    blocks = tl.reshape(blocks, [TILES, BLOCKS])
    tiles = tl.arange(0, TILES)[:, None]
    best = tl.full([TILES, BLOCKS], float("-inf"), tl.float32)
    slots = tl.arange(0, BLOCK_M)
    for row_part in tl.static_range(ROW_PARTS):
        rows = first_row + (row_part * BLOCK_M + slots) * stride_q
        q_offsets = tl.minimum(rows, last_row).to(tl.int64) * stride_qm
        q = None
        if CHUNK_D == BLOCK_D:
            q = load_rows(q_ptr, q_offsets, rows >= 0, HEAD_DIM, BLOCK_D)
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
            s = tl.max(tl.reshape(tl.max(s, 1), [BLOCKS, KEYS]), 1)
            best = tl.where(tiles == tile, tl.maximum(best, s[None, :]), best)
    return tl.reshape(best, [TILES * BLOCKS])


@triton.jit(do_not_specialize=SIZES)
def _hip_kernel(
    q_ptr, k_ptr, counts_ptr, indices_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    num_heads, num_searches, num_row_blocks, seqlen_q, seqlen_kv, slots, width, first_block, window,
    block_q, first_row, stride_q, block_k, stride_k, num_keys,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, ROW_PARTS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr,
    KEYS: tl.constexpr, KEY_PARTS: tl.constexpr, JUDGE_FIRST: tl.constexpr,
    IS_CAUSAL: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The list of one query block and head.

    A node is a run of `size` blocks, or less at the end; nodes are in ascending order. Their first
    blocks have been judged before, but for those of the first nodes, which take a step of their
    own.
    """
    search = tl.program_id(0) % num_searches
    row_block = num_row_blocks - 1 - tl.program_id(0) // num_searches
    batch, head = search // num_heads, search % num_heads
    start = row_block * block_q
    last_row = tl.minimum(start + block_q, seqlen_q) - 1
    end = seqlen_kv
    if IS_CAUSAL:
        end = tl.minimum(start + block_q + seqlen_kv - seqlen_q, seqlen_kv) - window
    num_blocks = tl.maximum(tl.cdiv(tl.maximum(end, 0), block_k) - first_block, 0)
    count = tl.minimum(slots, num_blocks)

    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += batch.to(tl.int64) * stride_kb + (head // GROUP_SIZE).to(tl.int64) * stride_kh
    slot = tl.arange(0, SLOTS)
    node = tl.arange(0, 2 * SLOTS)
    found = slot
    size = tl.where(num_blocks > slots, 1, 0)
    while tl.cdiv(num_blocks, tl.maximum(size, 1)) > 2 * slots:
        size = size * 2
    first = tl.minimum(node * size, num_blocks)
    first_score = tl.full([2 * SLOTS], float("-inf"), tl.float32)
    step = tl.where(JUDGE_FIRST, 0, 1)
    while size > 0:
        judge_first = step == 0
        block = tl.where(judge_first, first, first + size // 2)
        block = first_block + tl.minimum(block, num_blocks - 1)
        num_tiles = tl.cdiv(2 * slots, BLOCKS)
        if JUDGE_FIRST:
            num_tiles = tl.where((size > 1) | judge_first, num_tiles, 0)
        score = _best_scores(
            block, num_tiles, end, q_ptr, k_ptr, start + first_row, stride_q, last_row, stride_qm,
            stride_kn, block_k, stride_k, num_keys, HEAD_DIM, BLOCK_D, CHUNK_D, BLOCK_M, ROW_PARTS,
            2 * SLOTS // BLOCKS, BLOCKS, KEYS, KEY_PARTS, INPUT_PRECISION,
        )  # fmt: skip
        if judge_first:
            first_score = score
        else:
            best = tl.maximum(first_score, score)
            best = tl.topk(_sort_keys(best, node, first < num_blocks), SLOTS)
            kept = ((best & _LOW_BITS) ^ _LOW_BITS).to(tl.int32)
            kept = tl.sort(tl.where(slot < slots, kept, 2 * SLOTS - 1))
            found = tl.gather(first, kept, 0)
            size = size // 2
            first = tl.reshape(tl.join(found, found + size), [2 * SLOTS])
            first = tl.where(node < 2 * slots, tl.minimum(first, num_blocks), num_blocks)
            if JUDGE_FIRST:
                firsts, centres = tl.gather(first_score, kept, 0), tl.gather(score, kept, 0)
                first_score = tl.reshape(tl.join(firsts, centres), [2 * SLOTS])
        step += 1

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
        "ROW_PARTS": -(-num_rows // config.block_m),
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
    _refuse(q, k)
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
