"""FlexAttention as a second opinion on what layouts mean."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from sparse_attn import BlockLayout, selectors, sparse_attention

from .oracle import random_layout

LAYOUTS = {
    "blocks": lambda: random_layout((96, 128), heads=4, block_size=(16, 16)),
    "columns": lambda: random_layout((96, 128), heads=2, block_size=(16, 16), columns=9),
    "sink and window": lambda: BlockLayout.sink_window((96, 128), sink=3, window=20),
    "everything": lambda: random_layout(
        (96, 128),
        batch=2,
        heads=4,
        block_size=(32, 16),
        sink=9,
        window=40,
        columns=5,
        column_group=2,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_flex_attention_agrees(name, is_causal):
    layout = LAYOUTS[name]()
    q = torch.randn(2, 4, 96, 16)
    k, v = torch.randn(2, 2, 2, 128, 16).unbind(0)
    block_mask = layout.to_block_mask(is_causal=is_causal, num_heads=4)
    expected, aux = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True, return_lse=True)
    out, lse = sparse_attention(q, k, v, layout, is_causal=is_causal, return_lse=True)
    seen = lse > -torch.inf
    assert seen.float().mean() > 0.8
    torch.testing.assert_close(out, expected.where(seen[..., None], 0))
    torch.testing.assert_close(lse[seen], aux[seen])


def test_flex_attention_agrees_on_a_selection():
    q, k, v = torch.randn(3, 1, 2, 256, 32).unbind(0)
    layout = selectors.BlockTopK(2, 32, 4, 32)(q, k)
    expected = flex_attention(q, k, v, block_mask=layout.to_block_mask(num_heads=2))
    torch.testing.assert_close(sparse_attention(q, k, v, layout), expected)
