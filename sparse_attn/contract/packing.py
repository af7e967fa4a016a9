"""Sequences of different lengths in packed tensors or a paged cache, and what their values must
be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the sequences lie: queries packed; keys packed, or in the pages of a cache.

    Shapes as in `sparse_attention_varlen`.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor | None = None
    seqlens_kv: Tensor | None = None
    block_table: Tensor | None = None


def _cumulated(x: Tensor, name: str, total: int, whole: bool) -> list[int]:
    values = x.tolist()
    if not values or values[0] != 0:
        raise ValueError(f"{name} must start with 0, got {values[:1]}")
    for b in range(1, len(values)):
        if values[b] < values[b - 1]:
            raise ValueError(
                f"{name}[{b}] = {values[b]} follows {values[b - 1]}: it must be ascending"
            )
    if values[-1] > total or (whole and values[-1] != total):
        raise ValueError(f"{name}[{len(values) - 1}] = {values[-1]}, but there are {total} rows")
    return values


def _check_lengths(lengths: list[int], name: str, most: int, what: str) -> None:
    for b, n in enumerate(lengths):
        if not 0 <= n <= most:
            raise ValueError(
                f"{name}: sequence {b} has {n} {what}, but the layout is for at most {most}"
            )


def key_rows(k: Tensor, packing: Packing, most: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """For each sequence the function that takes its rows ``[S, Hkv, D]`` out of k or v."""
    if packing.block_table is None:
        assert packing.cu_seqlens_kv is not None  # `validation.check_packed` asks for it
        ends = _cumulated(packing.cu_seqlens_kv, "cu_seqlens_kv", k.shape[0], False)
        lengths = [b - a for a, b in pairwise(ends)]
        _check_lengths(lengths, "cu_seqlens_kv", most, "keys")
        for begin, end in pairwise(ends):

            def take_rows(x: Tensor, rows: slice = slice(begin, end)) -> Tensor:
                return x[rows]

            yield take_rows
        return
    assert packing.seqlens_kv is not None  # and for this
    lengths, page_size = packing.seqlens_kv.tolist(), k.shape[1]
    _check_lengths(lengths, "seqlens_kv", most, "keys")
    for b, (n, table) in enumerate(zip(lengths, packing.block_table, strict=True)):
        used = -(-n // page_size)
        if used > len(table):
            raise ValueError(
                f"seqlens_kv[{b}] = {n}, but block_table has {len(table)} pages of {page_size} "
                "keys for a sequence"
            )
        pages = table[:used].long()
        for i, page in enumerate(pages.tolist()):
            if not 0 <= page < k.shape[0]:
                raise ValueError(
                    f"block_table[{b}, {i}] = {page} is out of range: k has {k.shape[0]} pages"
                )

        def take_pages(x: Tensor, pages: Tensor = pages, n: int = n) -> Tensor:
            return x[pages].flatten(0, 1)[:n]

        yield take_pages


def check_values(q: Tensor, k: Tensor, packing: Packing, seqlens: tuple[int, int]) -> list[int]:
    """Where the queries of each sequence begin, all values of `packing` being checked.

    Raises:
        ValueError: naming the tensor, the place and the value.
    """
    ends = _cumulated(packing.cu_seqlens_q, "cu_seqlens_q", q.shape[0], True)
    lengths = [b - a for a, b in pairwise(ends)]
    _check_lengths(lengths, "cu_seqlens_q", seqlens[0], "queries")
    for _ in key_rows(k, packing, seqlens[1]):
        pass
    return ends


def violations(
    q: Tensor, k: Tensor, packing: Packing, seqlens: tuple[int, int]
) -> Iterator[tuple[str, Tensor, str]]:
    """What `check_values` refuses, without waiting for the device: for each rule the tensor's name,
    a mask of the sequences that break it, and why.
    """
    for name, rows, most in (("cu_seqlens_q", q, seqlens[0]), ("cu_seqlens_kv", k, seqlens[1])):
        ends = getattr(packing, name)
        if ends is None:
            continue
        lengths = ends.diff()
        yield name, ends[:1] != 0, "is not 0 at the beginning"
        yield name, (lengths < 0) | (lengths > most), f"does not ascend by 0 to {most}"
        wrong = ends[-1:] != len(rows) if name == "cu_seqlens_q" else ends[-1:] > len(rows)
        yield name, wrong, f"ends elsewhere than the {len(rows)} rows"
    lengths, table = packing.seqlens_kv, packing.block_table
    if table is not None and lengths is not None:
        most = min(seqlens[1], table.shape[1] * k.shape[1])
        yield "seqlens_kv", (lengths < 0) | (lengths > most), f"is not in [0, {most}]"
        used = torch.arange(table.shape[1], device=q.device) * k.shape[1] < lengths[:, None]
        bad = used & ((table < 0) | (table >= k.shape[0]))
        yield "block_table", bad, f"is out of range: k has {k.shape[0]} pages"
