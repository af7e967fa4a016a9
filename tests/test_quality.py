"""Measures of a selection, against literal ones and against what must hold of them."""

import pytest
import torch

from sparse_attn import BlockLayout, quality, sparse_attention
from sparse_attn.selectors import (
    BlockTopK,
    Dense,
    HiP,
    Quest,
    SinkWindow,
    SlidingWindow,
    VerticalSlash,
)

from .structured import structured_qk

SELECTORS = [
    SinkWindow(sink=3, window=20),
    BlockTopK(top_k=2, block_size=16, sink=4, window=20),
    HiP(k=16, block_q=16, block_k=4, sink=4, window=20),
    Quest(budget=16, page_size=4),
    VerticalSlash(vertical=30, slash=50, block_size=8),
]


def literal(q, k, v, layout, is_causal, b, h):
    """(density, recalls, best recall, error) of one head, row after row, in float64."""
    seqlen_q, seqlen_kv = q.shape[2], k.shape[2]
    block_q, block_kv = layout.block_size
    off, kv_head = seqlen_kv - seqlen_q, h // (q.shape[1] // k.shape[1])
    q, k, v = q[b, h].double(), k[b, kv_head].double(), v[b, kv_head].double()
    mask = layout.to_dense(is_causal=is_causal, num_heads=4)
    near = BlockLayout(layout.seqlens, layout.sink, layout.window)
    near = near.to_dense(is_causal=is_causal, num_heads=4)[0, h]
    mask = mask[b % len(mask), h]
    seen = pairs = 0
    recalls, wrong, right, far = [], 0.0, 0.0, {}
    for i in range(seqlen_q):
        end = off + i + 1 if is_causal else seqlen_kv
        mass = torch.zeros(seqlen_kv, dtype=torch.float64)
        mass[:end] = (k[:end] @ q[i] * q.shape[1] ** -0.5).softmax(0)
        pairs, seen = pairs + end, seen + int(mask[i].sum())
        recalls.append(float(mass[mask[i]].sum()))
        dense, out = mass @ v, (mass * mask[i]) @ v / recalls[-1]
        wrong, right = wrong + (out - dense).square().sum(), right + dense.square().sum()
        blocks = far.setdefault(i // block_q, [float(mass[near[i]].sum()), {}])
        blocks[0] += float(mass[near[i]].sum()) if i % block_q else 0.0
        for j in range(end):
            if not near[i, j]:
                n = j // block_kv
                blocks[1][n] = blocks[1].get(n, 0.0) + float(mass[j])
    best = 0.0
    for m, (shown, blocks) in far.items():
        budget = 0
        for counts, unit, row in (
            (layout.kv_num_blocks, block_kv, m),
            (layout.num_columns, 1, m // layout.column_group),
        ):
            if counts is not None:
                entry = counts[b % len(counts), h // (4 // counts.shape[1]), row]
                budget += int(entry) * unit
        best += shown + sum(sorted(blocks.values(), reverse=True)[: budget // block_kv])
    return seen / pairs, sorted(recalls), best / seqlen_q, float((wrong / right).sqrt())


@pytest.mark.parametrize(
    ("selector", "is_causal"),
    [(s, True) for s in SELECTORS]
    + [(s, False) for s in SELECTORS if not isinstance(s, VerticalSlash)],
    ids=lambda x: x if isinstance(x, bool) else type(x).__name__,
)
@pytest.mark.parametrize("seqlens", [(96, 96), (33, 90)], ids=str)
def test_measures_are_their_definitions(selector, seqlens, is_causal, monkeypatch):
    monkeypatch.setattr(quality, "_CHUNK_ELEMENTS", 2 * 4 * 96 * 40)  # some rows at a time
    q, k, _ = (torch.cat([x, y]) for x, y in zip(structured_qk(96), structured_qk(96), strict=True))
    q, k = q[:, :, : seqlens[0]], k[:, :, : seqlens[1]]
    v = torch.randn(*k.shape[:3], 24)
    layout = selector(q, k, is_causal=is_causal)
    result = quality.measure(q, k, v, layout, is_causal=is_causal)
    for b in range(2):
        for h in range(4):
            density, recalls, best, error = literal(q, k, v, layout, is_causal, b, h)
            for name, expected in (
                ("density", density),
                ("recall", sum(recalls) / len(recalls)),
                ("recall_p5", recalls[(len(recalls) - 1) // 20]),
                ("recall_min", recalls[0]),
                ("oracle_gap", best - sum(recalls) / len(recalls)),
                ("error", error),
            ):
                value = getattr(result, name)
                assert value.shape == (2, 4) and value.dtype == torch.float64
                assert float(value[b, h]) == pytest.approx(expected, abs=2e-6, rel=1e-5), name


def test_all_keys_lose_nothing():
    q, k, _ = structured_qk(64)
    result = quality.measure(q, k, k, Dense())
    for name, expected in (("density", 1.0), ("recall_min", 1.0), ("error", 0.0)):
        torch.testing.assert_close(
            getattr(result, name), torch.full((1, 4), expected).double(), atol=1e-6, rtol=0
        )


def test_the_error_is_that_of_the_op_and_density_that_of_the_layout():
    q, k, _ = structured_qk(128)
    v = torch.randn_like(k)
    layout = BlockTopK(top_k=2, block_size=16, sink=2, window=16)(q, k)
    result = quality.measure(q, k, v, layout)
    dense, out = (sparse_attention(q, k, v, x).double() for x in (Dense(), layout))
    error = (out - dense).norm(dim=(-2, -1)) / dense.norm(dim=(-2, -1))
    torch.testing.assert_close(result.error, error, atol=1e-6, rtol=1e-5)
    assert result.density.mean().item() == pytest.approx(layout.density())


@pytest.mark.parametrize("rows", [range(5, 60), range(64, 96), range(95, 96)])
def test_some_rows_are_looked_at_alone(rows):
    q, k, _ = structured_qk(96)
    layout = BlockTopK(top_k=2, block_size=16, sink=2, window=16)(q, k)
    result = quality.measure(q, k, k, layout, rows=rows)
    mask = layout.to_dense(num_heads=4)[:, :, rows.start : rows.stop]
    pairs = sum(i + 1 for i in rows)
    torch.testing.assert_close(result.density, mask.sum((-2, -1)).double() / pairs)
    assert (result.recall_min <= result.recall).all()


def test_a_change_of_output_is_bounded_by_what_is_lost(real_qk):
    for q, k in real_qk.values():
        v = torch.randn_like(k)
        result = quality.measure(q, k, v, HiP(k=128, sink=4, window=64), rows=range(512, 1024))
        assert (result.oracle_gap > -1e-6).all()
        assert (result.recall > result.density).all()
        dense = sparse_attention(q, k, v, Dense())[:, :, 512:].norm(dim=(-2, -1))
        longest = v.norm(dim=-1).amax()
        assert (result.error * dense / 512**0.5 <= 2 * (1 - result.recall_min) * longest).all()


@pytest.mark.parametrize("rows", [range(0), range(0, 97), range(-1, 5), range(0, 10, 2)])
def test_bad_rows_are_named(rows):
    q, k, _ = structured_qk(96)
    with pytest.raises(ValueError, match="rows must be a range of the 96 query rows"):
        quality.measure(q, k, k, SlidingWindow(8), rows=rows)


def test_rows_before_the_first_key_are_left_out():
    q, k, _ = structured_qk(64)
    k = k[:, :, :24]
    result = quality.measure(q, k, k, SlidingWindow(8))
    alone = quality.measure(q[:, :, 40:], k, k, SlidingWindow(8))
    assert torch.equal(result.recall, alone.recall)
    with pytest.raises(ValueError, match="layout is for seqlens"):
        quality.measure(q, k, k, BlockLayout.dense((8, 8)))
