"""Selectors that a user writes: ten lines of a class, or a function."""

from dataclasses import replace

import pytest
import torch

from sparse_attn import BlockLayout, patch, selectors
from sparse_attn.selectors import (
    Dense,
    KeyBuffer,
    MaskCache,
    PerHead,
    PrefillDecode,
    SinkWindow,
    SlidingWindow,
)

from .hf_models import new_model, tokens
from .structured import structured_qk
from .test_selectors import NearestBlocks


def literal_nearest(selector, q, k, margin=0):
    """The blocks of NearestBlocks for one head, causal: q ``[Sq, D]``, k ``[Skv, D]``."""
    size, off, rows = selector.block_size, len(k) - len(q), []
    for queries in q.double().split(size):
        last = off + size * len(rows) + len(queries) - 1
        distances = {}
        for n, keys in enumerate(k.double().split(size)):
            if n * size <= last - (selector.window - margin):
                distances[n] = float((queries.mean(0) - keys.mean(0)).norm())
        rows.append(sorted(sorted(distances, key=distances.get)[: selector.top_k]))
    return rows


@pytest.mark.parametrize("margin", [0, 20])
@pytest.mark.parametrize("seqlens", [(300, 300), (70, 300), (1, 300), (300, 200)], ids=str)
def test_a_selector_of_ten_lines_is_its_docstring(seqlens, margin):
    q, k, _ = structured_qk(300)
    q, k = q[:, :, : seqlens[0]], k[:, :, : seqlens[1]]
    selector = NearestBlocks(top_k=2, block_size=16, window=40, margin=margin)
    layout = selector(q, k).validate()
    for h in range(4):
        counts, lists = layout.kv_num_blocks[0, h].tolist(), layout.kv_indices[0, h].tolist()
        found = [row[:n] for row, n in zip(lists, counts, strict=True)]
        assert found == literal_nearest(selector, q[0, h], k[0, h // 2], margin)


def test_a_selector_of_ten_lines_combines_with_the_others():
    q, k, _ = structured_qk(300)
    selector = NearestBlocks(top_k=2, block_size=16, window=40, margin=3)
    mask = selector(q, k).to_dense(num_heads=4)
    heads = PerHead({(1, 2): selector}, default=Dense())(q, k).to_dense(num_heads=4)
    assert torch.equal(heads[:, 1:3], mask[:, 1:3]) and heads[:, 0].equal(heads[:, 3])
    both = PrefillDecode(selector, Dense())
    assert torch.equal(both(q, k).to_dense(num_heads=4), mask)
    cache, buffer, made = MaskCache(selector, refresh=4), KeyBuffer(k[:, :, :290]), None
    for n in range(290, 300):
        layout = cache(q[:, :, n - 1 : n], buffer.keys)
        made = selector(q[:, :, n - 1 : n], buffer.keys) if n % 4 == 2 else made
        assert layout.seqlens == (1, n) and layout.kv_indices.equal(made.kv_indices)
        buffer.append(k[:, :, n : n + 1])


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in MaskCache"])
def test_a_selector_of_ten_lines_serves_a_model(wrapped):
    model, ids = new_model(), tokens(length=40)
    selector = NearestBlocks(top_k=1, block_size=4, window=8, margin=3)
    with torch.no_grad(), patch(model, MaskCache(selector, 4) if wrapped else selector) as patched:
        cache = model(ids[:, :30], use_cache=True).past_key_values
        for n in range(30, 40):
            out = model(ids[:, n : n + 1], past_key_values=cache).logits
    assert patched.stats == {"sparse": 22} and out.isfinite().all()


def by_hand(q, k, *, is_causal, scale):
    """A selector without a class."""
    assert isinstance(scale, float)
    return BlockLayout.sink_window((q.shape[2], k.shape[2]), sink=2, window=9, device=q.device)


def test_a_function_goes_wherever_a_selector_goes():
    q, k, _ = structured_qk(100)
    expected = SinkWindow(sink=2, window=9)(q, k).to_dense(num_heads=4)
    wide = SlidingWindow(window=30)
    for selector in (
        PerHead({0: by_hand}, default=by_hand),
        PrefillDecode(by_hand, Dense()),
        selectors.Union((by_hand,)),
        PerHead({(0, 1, 2, 3): by_hand}).for_layer(3),
    ):
        assert torch.equal(selector(q, k).to_dense(num_heads=4), expected)
    for both in (wide | by_hand, by_hand | wide, by_hand | wide | by_hand):
        assert torch.equal(both(q, k).to_dense()[0, 0], (expected | wide(q, k).to_dense())[0, 0])
        assert all(x in (wide, by_hand) for x in both.selectors)
    with patch(new_model(), by_hand) as patched:
        patched._model(tokens())
    assert patched.stats == {"sparse": 2}


class LastBlocks:
    """The last key block that the first row of a call has behind it, found in two stages; derives
    from nothing.
    """

    margin, num_stages = 7, 2

    def prune(self, stage, kept, q, k, *, is_causal=True, scale=None):
        assert (kept is None) == (stage == 0)
        return (k.shape[2] - q.shape[2]) // 4 if stage == 0 else kept

    def layout(self, kept, q, k):
        block = torch.full((1, 1, -(-q.shape[2] // 64), 1), kept, dtype=torch.int32)
        window = BlockLayout.sink_window((q.shape[2], k.shape[2]), window=8)
        lists = dict(kv_num_blocks=torch.ones_like(block[..., 0]), kv_indices=block)
        return replace(window, block_size=(64, 4), **lists)

    def __call__(self, q, k, *, is_causal=True, scale=None):
        return self.layout(self.prune(1, self.prune(0, None, q, k), q, k), q, k)


def test_any_selector_with_stages_can_be_refreshed():
    buffer, cache = KeyBuffer(torch.randn(1, 2, 20, 8)), MaskCache(LastBlocks(), refresh=(8, 2))
    blocks = []
    for _ in range(17):
        blocks.append(cache(torch.randn(1, 4, 1, 8), buffer.keys).kv_indices.item())
        buffer.append(torch.randn(1, 2, 1, 8))
    assert blocks == [4] * 8 + [6] * 8 + [8]
    with pytest.raises(ValueError, match="needs a margin of at least 8, got 7"):
        MaskCache(LastBlocks(), refresh=9)
