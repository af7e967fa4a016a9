"""The binary searches of a stage of InfiniteHiP: one program serves some chunks of one query block
and head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .hip import products
from .launch import Launch, strides
from .ops import _rows, _run
from .primitives import load_rows

SIZES = (
    "num_heads", "num_chunks", "num_tiles", "num_row_blocks", "num_rows", "seqlen_kv", "end",
)  # fmt: skip
_LEAST = tl.constexpr(-3.4028234663852886e38)  # of float32


@triton.jit
def _best_products(
    j, k_ptr, stride_kn, q_ptr, stride_qr, num_rows, q,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    ROW_PARTS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The greatest product of each key `j` with any row; NaN counts as -inf."""
    best = tl.full([j.shape[0]], float("-inf"), tl.float32)
    for part in tl.static_range(ROW_PARTS):
        rows = tl.minimum(part * BLOCK_M + tl.arange(0, BLOCK_M), num_rows - 1)
        q_offsets = rows.to(tl.int64) * stride_qr
        if CHUNK_D == BLOCK_D and ROW_PARTS > 1:
            q = load_rows(q_ptr, q_offsets, rows >= 0, HEAD_DIM, BLOCK_D)
        s = products(
            k_ptr, j.to(tl.int64) * stride_kn, q_ptr, q_offsets, q, HEAD_DIM, BLOCK_D, CHUNK_D,
            INPUT_PRECISION,
        )  # fmt: skip
        s = tl.max(s, 1)
        best = tl.maximum(best, tl.where(s == s, s, float("-inf")))
    return best


@triton.jit(do_not_specialize=SIZES)
def _infinite_hip_kernel(
    q_ptr, k_ptr, left_ptr, limits_ptr, scores_ptr,
    stride_qb, stride_qh, stride_qm, stride_qr, stride_kb, stride_kh, stride_kn,
    stride_lb, stride_lh, stride_lm, stride_lc,
    num_heads, num_chunks, num_tiles, num_row_blocks, num_rows, seqlen_kv, end,
    GROUP_SIZE: tl.constexpr, SIZE: tl.constexpr, LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROW_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of `BLOCK_N` chunks, searched in steps of the same depth."""
    tile = tl.program_id(0) % num_tiles
    row_block = tl.program_id(0) // num_tiles % num_row_blocks
    search = tl.program_id(0) // num_tiles // num_row_blocks
    batch, head = (search // num_heads).to(tl.int64), (search % num_heads).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh + row_block.to(tl.int64) * stride_qm
    k_ptr += batch * stride_kb + head // GROUP_SIZE * stride_kh
    left_ptr += batch * stride_lb + head * stride_lh + row_block.to(tl.int64) * stride_lm
    chunk = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = chunk < num_chunks
    left = tl.load(left_ptr + chunk.to(tl.int64) * stride_lc, mask=exists, other=seqlen_kv)
    left = tl.maximum(left, 0)
    limit = tl.load(limits_ptr + row_block)
    right = tl.minimum(left + SIZE, end)
    q = None
    if CHUNK_D == BLOCK_D and ROW_PARTS == 1:
        rows = tl.minimum(tl.arange(0, BLOCK_M), num_rows - 1)
        q = load_rows(q_ptr, rows.to(tl.int64) * stride_qr, rows >= 0, HEAD_DIM, BLOCK_D)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for _ in range(LEVELS):
        searched = (left < right) & (left <= limit)
        centre = (left + right) // 2
        at = tl.where(searched, (left + centre) // 2, 0)
        lower = _best_products(
            at, k_ptr, stride_kn, q_ptr, stride_qr, num_rows, q, HEAD_DIM, BLOCK_D, CHUNK_D,
            BLOCK_M, ROW_PARTS, INPUT_PRECISION,
        )  # fmt: skip
        at = tl.where(searched, (centre + right) // 2, 0)
        upper = _best_products(
            at, k_ptr, stride_kn, q_ptr, stride_qr, num_rows, q, HEAD_DIM, BLOCK_D, CHUNK_D,
            BLOCK_M, ROW_PARTS, INPUT_PRECISION,
        )  # fmt: skip
        winner = tl.maximum(tl.maximum(lower, upper), _LEAST)
        best = tl.where(searched, tl.maximum(best, winner), best)
        go_left = lower > upper
        right = tl.where(searched & go_left, centre, right)
        left = tl.where(searched & (lower <= upper), centre, left)
    row = search.to(tl.int64) * num_row_blocks + row_block
    tl.store(scores_ptr + row * num_chunks + chunk, best, mask=exists)


def launches(
    queries: Tensor, k: Tensor, left: Tensor, size: int, end: int, limits: Tensor,
    target: configs.Target,
) -> tuple[list[Launch], Tensor]:  # fmt: skip
    """What to launch, and the tensor that then holds the scores."""
    batch, heads, row_blocks, num_rows, head_dim = queries.shape
    num_chunks = left.shape[-1]
    scores = torch.empty(
        (batch, heads, row_blocks, num_chunks), dtype=torch.float32, device=k.device
    )
    left = left.expand(batch, heads, -1, -1)
    config = configs.infinite_hip(queries.dtype, configs.padded(head_dim), num_rows, target)
    tiles = -(-num_chunks // config.block_n)
    arguments = {
        "q_ptr": queries,
        "k_ptr": k,
        "left_ptr": left,
        "limits_ptr": limits,
        "scores_ptr": scores,
        **strides("q", queries, "bhmr"),
        **strides("k", k, "bhn"),
        **strides("l", left, "bhmc"),
        "num_heads": heads,
        "num_chunks": num_chunks,
        "num_tiles": tiles,
        "num_row_blocks": row_blocks,
        "num_rows": num_rows,
        "seqlen_kv": k.shape[2],
        "end": min(end, k.shape[2]),
        "GROUP_SIZE": heads // k.shape[1],
        "SIZE": size,
        # A search down to one key: the product of that one has been met before, unless it is alone.
        "LEVELS": max(1, (size - 1).bit_length()),
        "HEAD_DIM": head_dim,
        "BLOCK_D": configs.padded(head_dim),
        "CHUNK_D": configs.chunk(queries.dtype, head_dim),
        "BLOCK_M": config.block_m,
        "ROW_PARTS": -(-num_rows // config.block_m),
        "BLOCK_N": config.block_n,
        "INPUT_PRECISION": "ieee",
    }
    grid = (tiles * row_blocks * batch * heads,)
    registers = configs.max_registers(queries.dtype, config.num_warps, target)
    step = Launch(
        _infinite_hip_kernel, grid, arguments, config.num_warps, config.num_stages, registers
    )
    return [step], scores


def scores(queries: Tensor, k: Tensor, left: Tensor, size: int, end: int, limits: Tensor) -> Tensor:
    """The scores of chunks, as `selectors.infinite_hip` has them."""
    queries, k = _rows(queries), _rows(k)
    steps, found = launches(
        queries, k, left.int(), size, end, limits.int(), configs.Target.of(queries)
    )
    _run(steps, queries)
    return found
