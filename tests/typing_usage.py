"""How users' code types, for `make lint`: mypy checks this file and nobody runs it.

`assert_type` fails where the type is another, and an unused "type: ignore" where a mistake passes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import sparse_attn
from sparse_attn import BlockLayout, selectors, sparse_attention, sparse_attention_varlen
from sparse_attn.selectors.base import Refreshable
from sparse_attn.typing import Backend, SelectorLike

q, k, v = torch.randn(3, 1, 4, 64, 16).unbind(0)
layout = BlockLayout.sink_window((64, 64), sink=4, window=16)
selector = selectors.SinkWindow(sink=4, window=16) | selectors.BlockTopK(top_k=2)


def by_hand(query: Tensor, key: Tensor, *, is_causal: bool, scale: float) -> BlockLayout:
    return BlockLayout.dense((query.shape[2], key.shape[2]))


def without_scale(query: Tensor, key: Tensor) -> BlockLayout:
    return BlockLayout.dense((query.shape[2], key.shape[2]))


def choose(flag: bool, backend: Backend, named: str) -> None:
    assert_type(sparse_attention(q, k, v, layout), Tensor)
    assert_type(sparse_attention(q, k, v, layout, return_lse=False).shape, torch.Size)
    assert_type(sparse_attention(q, k, v, layout, return_lse=True), tuple[Tensor, Tensor])
    either = sparse_attention(q, k, v, layout, return_lse=flag, backend=backend)
    assert_type(either, Tensor | tuple[Tensor, Tensor])
    sparse_attention(q, k, v, layout, backend=named)  # type: ignore[call-overload]
    sparse_attention(q, k, v, layout, backend="cuda")  # type: ignore[call-overload]
    sparse_attention(q, k, v, layout, causal=True)  # type: ignore[call-overload]


def select() -> None:
    anything: list[SelectorLike] = [selector, by_hand, selectors.Dense()]
    for one in anything:
        assert_type(sparse_attention(q, k, v, one), Tensor)
    staged: list[Refreshable] = [selectors.HiP(), selectors.InfiniteHiP(), selectors.BlockTopK()]
    assert_type([selectors.MaskCache(one, refresh=1) for one in staged], list[selectors.MaskCache])
    selectors.MaskCache(by_hand)  # type: ignore[arg-type]
    sparse_attention(q, k, v, lambda q, k, *, is_causal, scale: layout)
    sparse_attention(q, k, v, without_scale)  # type: ignore[call-overload]
    sparse_attention(q, k, v, selectors.Dense)  # type: ignore[call-overload]
    assert_type(sparse_attn.scaled_dot_product_attention(q, k, v, selector=by_hand), Tensor)


def packed() -> None:
    ends = torch.tensor([0, 64], dtype=torch.int32)
    x = torch.randn(64, 4, 16)
    out = sparse_attention_varlen(x, x, x, layout, cu_seqlens_q=ends, cu_seqlens_kv=ends)
    assert_type(out, Tensor)
    pair = sparse_attention_varlen(x, x, x, layout, cu_seqlens_q=ends, return_lse=True)
    assert_type(pair, tuple[Tensor, Tensor])
    sparse_attention_varlen(x, x, x, layout)  # type: ignore[call-overload]


def others() -> None:
    assert_type(selector(q, k), BlockLayout)
    assert_type(sparse_attn.explain(q, k, v), sparse_attn.Explanation)
    assert_type(layout.density(), float)
    landmarks = sparse_attn.landmark_attention(q, k, v, block_size=8, return_lse=True)
    assert_type(landmarks, tuple[Tensor, Tensor])
