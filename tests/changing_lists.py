"""Calls of the CPU ops while a thread writes what is wrong into their lists, and what is right
again: each kind of call in a process of its own. Prints the names of the calls that died.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time

import torch

from sparse_attn import BlockLayout
from sparse_attn.contract.arguments import Arguments

HEADS, KV_HEADS, DIM, BLOCK, PAGE = 2, 1, 32, 32, 16
SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 0.5
OPS = torch.ops.sparse_attn


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def every_other(rows, values):
    """The lists of some rows that hold every other of the values."""
    indices = torch.arange(0, values, 2, dtype=torch.int32).expand(1, 1, rows, -1).contiguous()
    return torch.full(indices.shape[:3], indices.shape[3], dtype=torch.int32), indices


def layout(seqlen_q, seqlen_kv):
    """The layout's tensors, and the op's arguments from `sink` on."""
    rows = -(-seqlen_q // BLOCK)
    lists = [ints(3), ints(40), *every_other(rows, -(-seqlen_kv // BLOCK))]
    lists += every_other(rows, seqlen_kv)
    sink, window, *others = lists
    made = BlockLayout((seqlen_q, seqlen_kv), sink, window, (BLOCK, BLOCK), *others)
    return lists, Arguments.of(made, DIM**-0.5)


def dense(seqlen_q, seqlen_kv):
    shapes = (HEADS, seqlen_q), (KV_HEADS, seqlen_kv), (KV_HEADS, seqlen_kv)
    return [torch.randn(1, *shape, DIM) for shape in shapes]


def attention(seqlen_q, seqlen_kv):
    qkv = dense(seqlen_q, seqlen_kv)
    lists, args = layout(seqlen_q, seqlen_kv)
    return lists, lambda: OPS.attention(*qkv, *args)


def backward():
    qkv = dense(512, 512)
    lists, args = layout(512, 512)
    out, lse = OPS.attention(*qkv, *args)
    return lists, lambda: OPS.attention_backward(out, lse, *qkv, out, lse, *args)


def varlen(lengths_q, lengths_kv, paged=False):
    ends_q, ends_kv = (ints(0, *itertools.accumulate(x)) for x in (lengths_q, lengths_kv))
    lists, args = layout(max(lengths_q), max(lengths_kv))
    q = torch.randn(sum(lengths_q), HEADS, DIM)
    if paged:
        used = -(-max(lengths_kv) // PAGE)
        table = torch.arange(len(lengths_kv) * used, dtype=torch.int32).view(-1, used)
        k, v = torch.randn(2, table.numel(), PAGE, KV_HEADS, DIM).unbind(0)
        packing = (ends_q, None, ints(*lengths_kv), table)
    else:
        k, v = torch.randn(2, sum(lengths_kv), KV_HEADS, DIM).unbind(0)
        packing = (ends_q, ends_kv, None, None)
    lists += [x for x in packing if x is not None]
    sizes = max(lengths_q), max(lengths_kv)
    return lists, lambda: OPS.attention_varlen(q, k, v, *packing, *sizes, *args)


def infinite_hip_stage():
    q, k, _ = dense(512, 4096)
    indices = torch.arange(32, dtype=torch.int32).expand(1, HEADS, 16, 32).contiguous()
    counts = torch.full((1, HEADS, 16), 32, dtype=torch.int32)
    numbers = 64, 16, 8, 1, 32, 0, 0, 0, False, True
    return [counts, indices], lambda: OPS.infinite_hip_stage(q, k, counts, indices, *numbers)


CALLS = {
    "prefill": lambda: attention(1024, 1024),
    "decode": lambda: attention(1, 65536),
    "backward": backward,
    "packed prefill": lambda: varlen([500, 12, 500], [600, 500, 500]),
    "packed decode": lambda: varlen([1, 3], [65536, 7]),
    "paged prefill": lambda: varlen([500, 12, 500], [600, 500, 500], paged=True),
    "paged decode": lambda: varlen([1, 3], [65536, 70], paged=True),
    "infinite_hip_stage": infinite_hip_stage,
}


def spoil(lists):
    """One list after the other becomes wrong for a moment, for ever."""
    right = [x.clone() for x in lists]
    for wrong in itertools.cycle((2**31 - 1, -(2**30), 2**20)):
        for x, before in zip(lists, right, strict=True):
            x.fill_(wrong)
            time.sleep(2e-5)
            x.copy_(before)
            time.sleep(1e-3)


def run(name):
    torch.set_num_threads(1)
    lists, call = CALLS[name]()
    call()
    threading.Thread(target=spoil, args=(lists,), daemon=True).start()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        # A list that is wrong when the call begins is refused.
        with contextlib.suppress(ValueError, RuntimeError):
            call()


def main():
    for name in CALLS:
        child = os.fork()
        if child == 0:
            run(name)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            print(name)


if __name__ == "__main__":
    main()
