"""Selectors against a slow literal reading of what they promise, on structured and on real q, k."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparse_attn import BlockLayout, selectors, sparse_attention
from sparse_attn.selectors import (
    AnchorAttention,
    BlockTopK,
    Dense,
    FlexPrefill,
    HiP,
    InfiniteHiP,
    LocalStride,
    MaskCache,
    PerHead,
    PrefillDecode,
    Quest,
    SinkWindow,
    SlidingWindow,
    SpargeAttn,
    TriShape,
    VerticalSlash,
    XAttention,
)
from sparse_attn.selectors.choose import top_blocks
from sparse_attn.selectors.scored import BlockScores

from .structured import structured_qk


@dataclass(frozen=True)
class NearestBlocks(BlockScores):
    """The `top_k` key blocks whose mean key lies nearest to the mean query, and a window."""

    top_k: int = 8
    block_size: int = 64
    window: int = 256
    margin: int = 0

    def scores(self, means, blocks):
        queries, keys = means  # [B, H, Mq, D] and [B, Hkv, Mkv, D]
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        return -torch.cdist(queries[:, :, blocks.numbers], keys)

    def choose(self, scores, forced):
        return top_blocks(scores, self.top_k, forced)


# A new selector adds one row: every generic test below runs on it.
TABLE = {
    "Dense": Dense(),
    "SlidingWindow": SlidingWindow(window=33),
    "SinkWindow": SinkWindow(sink=5, window=40),
    "BlockTopK": BlockTopK(top_k=3, block_size=32, sink=4, window=40),
    "HiP": HiP(k=24, block_q=32, block_k=4, sink=5, window=20),
    "InfiniteHiP": InfiniteHiP((16, 4), (64, 24), (4, 1), block_q=16, sink=4, window=40),
    "MaskCache": MaskCache(
        HiP(k=24, block_q=32, block_k=4, sink=5, window=20, margin=3), refresh=4
    ),
    "Union": BlockTopK(top_k=2, block_size=32, sink=0, window=1) | SinkWindow(sink=8, window=64),
    "PerHead": PerHead({0: Dense(), (1, 3): BlockTopK(2, 16, 0, 16)}, default=SinkWindow(2, 8)),
    "PrefillDecode": PrefillDecode(SinkWindow(sink=5, window=40), Quest(40, 8), decode_rows=7),
    "VerticalSlash": VerticalSlash(vertical=30, slash=50, last_q=32, block_size=16),
    "XAttention": XAttention(mass=0.6, stride=4, block_size=32),
    "FlexPrefill": FlexPrefill(mass=0.5, block_size=16, min_budget=16),
    "AnchorAttention": AnchorAttention(theta=2.0, block_size=16, step=2),
    "Quest": Quest(budget=32, page_size=8),
    "SpargeAttn": SpargeAttn(top=0.3, block_q=32, block_k=16),
    "TriShape": TriShape(sink=5, window=40, last=30),
    "LocalStride": LocalStride(local=2, stride=4, block_size=16),
    "NearestBlocks": NearestBlocks(top_k=3, block_size=16, window=20),
}
# Defined for causal attention only, and for prompts whose last rows choose for all.
CAUSAL_ONLY = {"VerticalSlash", "FlexPrefill", "AnchorAttention", "LocalStride"}
LOOKING_AHEAD = {"VerticalSlash", "FlexPrefill"}
every_selector = pytest.mark.parametrize("selector", TABLE.values(), ids=TABLE)


def test_every_public_selector_has_a_row():
    assert set(selectors.__all__) - {"Selector", "KeyBuffer"} == set(TABLE) - {"NearestBlocks"}


def test_the_docs_write_the_selector_that_is_tested_here():
    page = Path(__file__).parents[1] / "docs" / "selectors.md"
    assert inspect.getsource(NearestBlocks) in page.read_text()


@every_selector
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("seqlens", [(256, 256), (100, 256), (1, 256), (7, 7), (130, 130), (0, 5)])
def test_layouts_are_valid_and_show_each_row_itself(selector, is_causal, seqlens):
    q, k, _ = structured_qk(256)
    q, k = q[:, :, : seqlens[0]], k[:, :, : seqlens[1]]
    if not is_causal and type(selector).__name__ in CAUSAL_ONLY:
        with pytest.raises(ValueError, match="causal attention, got is_causal=False"):
            selector(q, k, is_causal=False)
        return
    layout = selector(q, k, is_causal=is_causal).validate()
    assert layout.seqlens == seqlens
    mask = layout.to_dense(is_causal=is_causal, num_heads=4)
    rows = torch.arange(seqlens[0])
    assert mask[..., rows, rows + seqlens[1] - seqlens[0]].all()
    out = sparse_attention(q, k, k, selector, is_causal=is_causal)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", sorted(set(TABLE) - LOOKING_AHEAD))
def test_later_blocks_change_nothing(name):
    """A row's selection depends on no token after its own query block (64 covers every block size
    here).
    """
    selector = TABLE[name]
    q, k, _ = structured_qk(256)
    mask = selector(q, k).to_dense(num_heads=4)
    changed_q, changed_k = q.clone(), k.clone()
    changed_q[:, :, 128:], changed_k[:, :, 128:] = 9.0, torch.randn(64)
    changed = selector(changed_q, changed_k).to_dense(num_heads=4)
    assert torch.equal(changed[:, :, :128], mask[:, :, :128])


@every_selector
def test_batches_and_gqa_are_independent(selector):
    pairs = [structured_qk(128)[:2] for _ in range(2)]
    q, k = (torch.cat(x) for x in zip(*pairs, strict=True))
    together = selector(q, k).to_dense(num_heads=4).expand(2, -1, -1, -1)
    for b, (one_q, one_k) in enumerate(pairs):
        if not isinstance(selector, LocalStride):  # it chooses by the number of the KV head
            one_k = one_k.repeat_interleave(2, 1)
        alone = selector(one_q, one_k).to_dense(num_heads=4)
        assert torch.equal(together[b], alone[0])


@every_selector
def test_union_with_a_window_adds_it(selector):
    q, k, _ = structured_qk(128)
    both = (selector | SinkWindow(sink=3, window=50))(q, k).to_dense(num_heads=4)
    window = BlockLayout.sink_window((128, 128), sink=3, window=50).to_dense()
    assert torch.equal(both, selector(q, k).to_dense(num_heads=4) | window)


@every_selector
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_make_no_invalid_layout(selector, value):
    q, k, _ = structured_qk(128)
    k[:, :, 50] = value
    selector(q, k).validate()
    q[:, :, 50] = value
    selector(q, k).validate()


@every_selector
def test_a_selection_compiles_in_one_graph(selector):
    torch._dynamo.reset()  # as every selector compiles the same function anew
    q, k, _ = structured_qk(96)
    compiled = torch.compile(
        lambda q, k: sparse_attention(q, k, k, selector), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(q, k), sparse_attention(q, k, k, selector))


@every_selector
def test_gradients_flow_through_the_selection(selector):
    q, k, _ = structured_qk(64)
    q, k, v = q.requires_grad_(), k.requires_grad_(), k.clone().detach().requires_grad_()
    sparse_attention(q, k, v, selector).square().sum().backward()
    assert all(torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0 for x in (q, k, v))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("seqlens", [(300, 300), (70, 300), (1, 300), (300, 200)], ids=str)
def test_tri_shape_shows_all_keys_to_the_last_rows(seqlens, is_causal):
    q, k, _ = structured_qk(300)
    q, k = q[:, :, : seqlens[0]], k[:, :, : seqlens[1]]
    mask = TriShape(sink=3, window=20, last=50)(q, k, is_causal=is_causal)
    mask = mask.to_dense(is_causal=is_causal)[0, 0]
    window = SinkWindow(sink=3, window=20)(q, k).to_dense(is_causal=is_causal)[0, 0]
    dense = Dense()(q, k).to_dense(is_causal=is_causal)[0, 0]
    first = max(0, seqlens[0] - 50) // 64 * 64
    assert torch.equal(mask[:first], window[:first])
    assert torch.equal(mask[first:], dense[first:])


def test_tri_shape_is_small_for_long_contexts():
    q, k = torch.empty(1, 1, 2**17, 1), torch.empty(1, 1, 2**17, 1)
    assert TriShape()(q, k).kv_indices.shape[-1] <= 64


@pytest.mark.parametrize(
    "seqlens", [(300, 300), (70, 300), (60, 300), (1, 300), (300, 200)], ids=str
)
@pytest.mark.parametrize(("stride", "offset"), [(4, 0), (8, 3), (1, 0), (100, 1)])
def test_local_stride_is_its_docstring(seqlens, stride, offset):
    q, k, _ = structured_qk(300)
    q, k = q[:, :, : seqlens[0]], k[:, :, : seqlens[1]]
    selector = LocalStride(local=2, stride=stride, offset=offset, block_size=16)
    mask = selector(q, k).to_dense(num_heads=4)[0]
    off = seqlens[1] - seqlens[0]
    for h in range(4):
        for i in range(seqlens[0]):
            own, expected = (off + i) // 16, []
            for key in range(off + i + 1):
                j = key // 16
                strided = (j + h // 2 * max(1, stride // 2) + offset) % stride == 0
                expected.append(own - j < 2 or strided)
            assert mask[h, i].tolist() == expected + [False] * (seqlens[1] - len(expected))


def literal_block_topk(q, k, selector, is_causal, b, h):
    """BlockTopK for one head, as its docstring reads."""
    seqlen_q, seqlen_kv, size = q.shape[2], k.shape[2], selector.block_size
    off, kv_head = seqlen_kv - seqlen_q, h // (q.shape[1] // k.shape[1])
    chosen = []
    for start in range(0, seqlen_q, size):
        rows = list(range(start, min(start + size, seqlen_q)))
        query = q[b, h, rows].double().mean(0)
        scores = {}
        for n, first in enumerate(range(0, seqlen_kv, size)):
            keys = list(range(first, min(first + size, seqlen_kv)))
            if is_causal and first > off + rows[-1]:
                continue

            def near(i, j):
                distance = off + i - j
                return (distance if is_causal else abs(distance)) < selector.window

            in_sink = all(j < selector.sink for j in keys)
            if in_sink or all(near(i, j) for i in rows for j in keys):
                continue
            scores[n] = float(query @ k[b, kv_head, keys].double().mean(0))
        ranked = sorted(scores, key=lambda n: -scores[n])
        chosen.append(sorted(ranked[: selector.top_k]))
    return chosen


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("seqlens", [(300, 300), (70, 300), (1, 300), (300, 200)])
@pytest.mark.parametrize("window", [1, 40, 100])
def test_block_topk_is_its_docstring(is_causal, seqlens, window):
    q, k, _ = structured_qk(300)
    _check_block_topk(q[:, :, : seqlens[0]], k[:, :, : seqlens[1]], window, is_causal)


def test_block_topk_on_real_queries_and_keys(real_qk):
    for q, k in real_qk.values():
        _check_block_topk(q, k, 64, True)


def _check_block_topk(q, k, window, is_causal):
    selector = BlockTopK(top_k=3, block_size=32, sink=40, window=window)
    layout = selector(q, k, is_causal=is_causal)
    for h in range(q.shape[1]):
        expected = literal_block_topk(q, k, selector, is_causal, 0, h)
        counts, lists = layout.kv_num_blocks[0, h].tolist(), layout.kv_indices[0, h].tolist()
        assert [row[:n] for row, n in zip(lists, counts, strict=True)] == expected


def test_block_topk_finds_needles_that_a_window_loses():
    q, k, needles = structured_qk(1024)
    mask = BlockTopK(top_k=6, block_size=32, sink=4, window=64)(q, k).to_dense(num_heads=4)
    assert mask[0, :, -1, needles].all()
    window = SinkWindow(sink=4, window=64)(q, k).to_dense()
    assert not window[0, :, -1, needles].any()


def test_block_topk_in_chunks_is_the_same(monkeypatch):
    q, k, _ = structured_qk(512)
    whole = BlockTopK(3, 16, 4, 32)(q, k)
    monkeypatch.setattr(BlockTopK, "chunk_elements", 300)
    assert torch.equal(BlockTopK(3, 16, 4, 32)(q, k).kv_indices, whole.kv_indices)


def test_per_head_gives_each_head_its_own():
    q, k, _ = structured_qk(128)
    mask = TABLE["PerHead"](q, k).to_dense(num_heads=4)[0]
    assert torch.equal(mask[0], Dense()(q, k).to_dense()[0, 0])
    assert torch.equal(mask[2], SinkWindow(2, 8)(q, k).to_dense()[0, 0])
    blocks = BlockTopK(2, 16, 0, 16)(q, k).to_dense(num_heads=4)[0]
    assert torch.equal(mask[[1, 3]], blocks[[1, 3]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(window=0), "window must be an int of at least 1, got 0"),
        (lambda: SinkWindow(sink=-1), "sink must be an int of at least 0, got -1"),
        (lambda: SinkWindow(window=1.5), "window must be an int of at least 1, got 1.5"),
        (lambda: BlockTopK(top_k=0), "top_k must be an int of at least 1"),
        (lambda: BlockTopK(block_size=0), "block_size must be an int of at least 1"),
        (lambda: PerHead({9: Dense()})(*structured_qk(8)[:2]), "selectors names head 9"),
        (lambda: PerHead({0: Dense(), (0, 1): Dense()})(*structured_qk(8)[:2]), "a head twice"),
        (lambda: PerHead({0: Dense()})(*structured_qk(8)[:2]), "have no selector"),
        (lambda: selectors.Union(()), "at least one selector"),
        (lambda: VerticalSlash(vertical=29), "vertical must be an int of at least 30, got 29"),
        (lambda: VerticalSlash(slash=49), "slash must be an int of at least 50, got 49"),
        (lambda: XAttention(mass=0.0), r"mass must lie in \(0, 1\], got 0.0"),
        (lambda: XAttention(mass=1.5), r"mass must lie in \(0, 1\], got 1.5"),
        (lambda: XAttention(stride=6), "stride must divide block_size, got 6 and 128"),
        (lambda: FlexPrefill(mass="all"), r"mass must lie in \(0, 1\], got 'all'"),
        (lambda: FlexPrefill(tau=-0.1), "tau must be at least 0, got -0.1"),
        (lambda: FlexPrefill(min_budget=64), "min_budget must be an int of at least 128"),
        (lambda: FlexPrefill(max_budget=512), "max_budget must be an int of at least 1024"),
        (lambda: AnchorAttention(theta=float("nan")), "theta must be a number, got nan"),
        (lambda: AnchorAttention(step=0), "step must be an int of at least 1, got 0"),
        (lambda: SpargeAttn(top=2), r"top must lie in \(0, 1\], got 2"),
        (lambda: SpargeAttn(mass=0.0), r"mass must lie in \(0, 1\], got 0.0"),
        (lambda: SpargeAttn(similarity=-2), r"similarity must lie in \[-1, 1\], got -2"),
        (lambda: SpargeAttn(block_k=0), "block_k must be an int of at least 1, got 0"),
        (lambda: PrefillDecode(Dense(), Dense(), 0), "decode_rows must be an int of at least 1"),
        (lambda: Quest(budget=8), "budget must be an int of at least 16, got 8"),
        (lambda: NearestBlocks(block_size=0), "block_size must be an int of at least 1, got 0"),
        (lambda: NearestBlocks(window=1.5), "window must be an int of at least 0, got 1.5"),
        (lambda: NearestBlocks(margin=-1), "margin must be an int of at least 0, got -1"),
        (lambda: NearestBlocks(window=40, margin=41), "margin is 41, more than window = 40"),
        (lambda: NearestBlocks(top_k=0)(*structured_qk(8)[:2]), "top_k must be at least 1, got 0"),
        (lambda: Quest(page_size=0), "page_size must be an int of at least 1, got 0"),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
