"""BlockLayout: its definition, its algebra, its other notations, and what it refuses."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import BlockLayout

from .oracle import literal_mask, random_layout

layouts = st.builds(
    lambda seed, seqlens, batch, heads, block_size, options: _seeded(
        seed, seqlens, batch=batch, heads=heads, block_size=block_size, **options
    ),
    seed=st.integers(0, 2**16),
    seqlens=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    batch=st.integers(1, 2),
    heads=st.sampled_from([1, 2, 4]),
    block_size=st.tuples(st.sampled_from([1, 3, 4, 8, 16]), st.sampled_from([1, 2, 4, 8, 16])),
    options=st.fixed_dictionaries(
        {
            "keep": st.floats(0, 1),
            "sink": st.integers(0, 8),
            "window": st.integers(0, 12),
            "columns": st.integers(0, 6),
            "column_group": st.integers(1, 3),
        }
    ),
)


def _seeded(seed, *args, **kwargs):
    torch.manual_seed(seed)
    layout = random_layout(*args, **kwargs)
    if seed % 5 == 0:
        layout = replace(layout, window=torch.where(layout.window < 3, -1, layout.window))
    return layout


def _literal(layout, is_causal, num_heads=4):
    return torch.stack(
        [
            torch.stack(
                [
                    literal_mask(layout, is_causal=is_causal, batch=b, head=h, num_heads=num_heads)
                    for h in range(num_heads)
                ]
            )
            for b in range(layout.batch)
        ]
    )


def _dense(layout, is_causal=True, num_heads=4):
    mask = layout.to_dense(is_causal=is_causal, num_heads=num_heads)
    return mask.expand(layout.batch, -1, -1, -1)


@given(layouts, st.booleans())
@settings(max_examples=60, deadline=None)
def test_to_dense_is_the_definition(layout, is_causal):
    assert torch.equal(_dense(layout, is_causal), _literal(layout, is_causal))


@given(layouts, st.booleans())
@settings(max_examples=60, deadline=None)
def test_density_counts_each_pair_once(layout, is_causal):
    mask = _dense(layout, is_causal)
    every = BlockLayout.dense(layout.seqlens).to_dense(is_causal=is_causal).sum().item()
    expected = mask.sum().item() / (every * mask.shape[0] * mask.shape[1]) if every else 0.0
    assert layout.density(is_causal=is_causal) == pytest.approx(expected, abs=1e-12)


@given(layouts, st.data())
@settings(max_examples=60, deadline=None)
def test_union_is_or(a, data):
    b = data.draw(layouts)
    b_seqlens = a.seqlens
    torch.manual_seed(1)
    b = random_layout(
        b_seqlens, heads=b.num_heads, block_size=b.block_size, keep=0.2, sink=3, window=3,
        columns=data.draw(st.integers(0, 4)), column_group=b.column_group,
    )  # fmt: skip
    both = (a | b).validate()
    for is_causal in (True, False):
        expected = _dense(a, is_causal) | _dense(b, is_causal)
        assert torch.equal(_dense(both, is_causal), expected)


@given(layouts, st.booleans())
@settings(max_examples=30, deadline=None)
def test_refine_and_expand_keep_the_mask(layout, is_causal):
    expected = _dense(layout, is_causal)
    fine = layout.refine((1, 1)).validate()
    assert torch.equal(_dense(fine, is_causal), expected)
    assert torch.equal(_dense(layout.expand_heads(4), is_causal), expected)


@given(layouts)
@settings(max_examples=30, deadline=None)
def test_slices(layout):
    expected = _dense(layout, num_heads=layout.num_heads)
    for b in range(layout.batch):
        for h in range(layout.num_heads):
            assert torch.equal(layout[b, h].to_dense()[0, 0], expected[b, h])
    tail = layout[:, layout.num_heads // 2 :]
    kept = expected[:, layout.num_heads // 2 :]
    assert torch.equal(_dense(tail, num_heads=kept.shape[1]), kept)


def test_slices_out_of_range():
    layout = random_layout((8, 8), heads=2)
    with pytest.raises(IndexError, match="head index 2 is out of range"):
        layout[0, 2]
    with pytest.raises(IndexError, match="batch index 1"):
        layout[1]


@given(layouts)
@settings(max_examples=30, deadline=None)
def test_transposed_lists_the_same_pairs(layout):
    counts, indices = layout.transposed
    blocks = _block_table(layout.kv_num_blocks, layout.kv_indices, layout.num_kv_blocks)
    assert torch.equal(_block_table(counts, indices, layout.num_q_blocks), blocks.mT)


def _block_table(counts, indices, size):
    table = torch.zeros(*counts.shape, size, dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        chosen = indices[tuple(at)][: int(counts[tuple(at)])].tolist()
        assert chosen == sorted(set(chosen))
        table[tuple(at)][chosen] = True
    return table


# ------------------------------------------------------------------------------ other notations


def test_from_dense_round_trip():
    mask = torch.rand(2, 3, 5, 7) < 0.4
    layout = BlockLayout.from_dense(mask, block_size=(8, 4), seqlens=(38, 26)).validate()
    assert torch.equal(_block_table(layout.kv_num_blocks, layout.kv_indices, 7), mask)
    assert layout.kv_indices.shape[-1] == mask.sum(-1).max()


def test_from_topk_takes_any_order_padding_and_duplicates():
    indices = torch.tensor([[[[3, -1, 0], [-1, -1, -1], [2, 2, 1]]]])
    layout = BlockLayout.from_topk(indices, block_size=(2, 2), seqlens=(6, 8)).validate()
    assert layout.kv_num_blocks.tolist() == [[[2, 0, 2]]]
    assert layout.to_topk().tolist() == [[[[0, 3], [-1, -1], [1, 2]]]]


def test_csr_and_bsr_round_trip():
    layout = random_layout((12, 16), block_size=(4, 4))
    csr = layout.to_csr()
    table = _block_table(layout.kv_num_blocks, layout.kv_indices, 4)[0, 0]
    assert torch.equal(csr.to_dense().bool(), table)
    again = BlockLayout.from_csr(csr, block_size=(4, 4), seqlens=(12, 16))
    assert torch.equal(again.to_topk(), layout.to_topk())
    tokens = table.float().repeat_interleave(4, 0).repeat_interleave(4, 1)
    bsr = BlockLayout.from_csr(tokens.to_sparse_bsr((4, 4)), block_size=(4, 4), seqlens=(12, 16))
    assert torch.equal(bsr.to_topk(), layout.to_topk())


def test_block_mask_round_trip():
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b, h, i, j):
        return j <= i

    flex = create_block_mask(causal, 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match="mask_mod a layout cannot hold"):
        BlockLayout.from_block_mask(flex)
    layout = BlockLayout.from_block_mask(flex, drop_mask_mod=True).validate()
    assert torch.equal(layout.to_dense()[0, 0], torch.ones(64, 64).tril().bool())


@given(layouts, st.booleans())
@settings(max_examples=15, deadline=None)
def test_to_block_mask_means_the_same(layout, is_causal):
    from torch.nn.attention.flex_attention import create_mask

    flex = layout.to_block_mask(is_causal=is_causal, num_heads=4)
    dense = create_mask(flex.mask_mod, layout.batch, 4, *layout.seqlens, device="cpu")
    assert torch.equal(dense, _dense(layout, is_causal))
    rows, cols = layout.block_size
    blocks = flex.to_dense().bool().repeat_interleave(rows, 2).repeat_interleave(cols, 3)
    assert not (dense & ~blocks[:, :, : layout.seqlen_q, : layout.seqlen_kv]).any()


def test_to_block_mask_calls_a_block_full_iff_all_of_it_is_seen():
    layout = random_layout((40, 52), keep=0.5, heads=2) | BlockLayout.sink_window((40, 52), sink=20)
    flex = layout.to_block_mask(is_causal=True, num_heads=2)
    full = _block_table(flex.full_kv_num_blocks, flex.full_kv_indices, 4)
    whole = layout.to_dense(num_heads=2)[:, :, :32, :48].unflatten(3, (3, 16)).unflatten(2, (2, 16))
    assert torch.equal(full[:, :, :2, :3], whole.all(5).all(3))
    assert full.any()
    assert not full[:, :, 2].any() and not full[..., 3].any()  # cut short by the ends
    partial = _block_table(flex.kv_num_blocks, flex.kv_indices, 4)
    assert not (partial & full).any()


# ------------------------------------------------------------------------------------- refusals


def _edit(**fields):
    good = random_layout((32, 32), heads=2, columns=3, keep=0.9)
    return replace(good, **fields)


I32 = torch.int32


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sink": [0]}, TypeError, "sink must be a tensor, got list"),
        ({"window": torch.zeros(2)}, ValueError, "window must be int32, got torch.float32"),
        ({"window": torch.zeros(2, 2, dtype=I32)}, ValueError, "window must have shape [any]"),
        ({"seqlens": (-1, 4)}, ValueError, "seqlens[0] must be an int of at least 0, got -1"),
        ({"seqlens": (4, 2**31)}, ValueError, "seqlens[1] must be an int of at most 2**31 - 1"),
        ({"seqlens": 4}, ValueError, "seqlens must be two ints of at least 0, got 4"),
        ({"block_size": (0, 4)}, ValueError, "block_size[0] must be an int of at least 1, got 0"),
        ({"block_size": (4, 2**31)}, ValueError, "block_size[1] must be an int of at most 2**31"),
        ({"block_size": (64.0, 64)}, ValueError, "block_size[0] must be an int of at least 1, got"),
        ({"block_size": (64,)}, ValueError, "block_size must be two ints of at least 1, got (64,)"),
        ({"column_group": 0}, ValueError, "column_group must be an int of at least 1, got 0"),
        ({"kv_indices": None}, ValueError, "kv_num_blocks and kv_indices must be given together"),
        ({"num_columns": None}, ValueError, "num_columns and column_indices must be given"),
        (
            {"kv_num_blocks": torch.zeros(1, 2, 3, dtype=I32)},
            ValueError,
            "kv_num_blocks must have shape [any, any, 2], got [1, 2, 3]",
        ),
        (
            {"kv_indices": torch.zeros(1, 1, 2, 4, dtype=I32)},
            ValueError,
            "kv_indices must have shape [1, 2, 2, any]",
        ),
        ({"sink": torch.zeros(0, dtype=I32)}, ValueError, "sink has a batch or head size of 0"),
    ],
)
def test_malformed_layouts_are_refused(fields, error, message):
    with pytest.raises(error, match=re.escape(message)):
        _edit(**fields)


def bad_values():
    """Layouts whose shapes are right and whose values are not, each with the message expected."""
    counts = torch.full((1, 1, 2), 2, dtype=I32)
    pair = lambda a, b: torch.tensor([[a, b]] * 2, dtype=I32)[None, None]  # noqa: E731
    none = torch.zeros(1, dtype=I32)
    make = lambda **kw: BlockLayout((32, 32), none, none, (16, 16), **kw)  # noqa: E731
    return [
        (replace(make(), sink=none - 1), "sink[0] = -1 is less than 0"),
        (replace(make(), window=none - 2), "window[0] = -2 is less than -1"),
        (make(kv_num_blocks=counts + 1, kv_indices=pair(0, 1)), "kv_num_blocks[0, 0, 0] = 3"),
        (make(kv_num_blocks=counts - 3, kv_indices=pair(0, 1)), "kv_num_blocks[0, 0, 0] = -1"),
        (make(kv_num_blocks=counts, kv_indices=pair(0, 2)), "kv_indices[0, 0, 0, 1] = 2"),
        (make(kv_num_blocks=counts, kv_indices=pair(-1, 1)), "kv_indices[0, 0, 0, 0] = -1"),
        (make(kv_num_blocks=counts, kv_indices=pair(1, 0)), "kv_indices[0, 0, 0, 1] = 0"),
        (make(kv_num_blocks=counts, kv_indices=pair(1, 1)), "kv_indices[0, 0, 0, 1] = 1"),
        (make(num_columns=counts + 1, column_indices=pair(0, 1)), "num_columns[0, 0, 0] = 3"),
        (make(num_columns=counts, column_indices=pair(0, 32)), "column_indices[0, 0, 0, 1] = 32"),
        (make(num_columns=counts, column_indices=pair(5, 5)), "column_indices[0, 0, 0, 1] = 5"),
        (
            make(kv_num_blocks=counts, kv_indices=pair(0, 2**31 - 1)),
            "kv_indices[0, 0, 0, 1] = 2147483647",
        ),
    ]


@pytest.mark.parametrize("number", range(len(bad_values())))
def test_validate_names_the_tensor_and_the_place(number):
    layout, message = bad_values()[number]
    with pytest.raises(ValueError, match=re.escape(message)):
        layout.validate()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: BlockLayout.from_dense(x.float(), block_size=(8, 8), seqlens=(16, 16)), "bool"),
        (lambda x: BlockLayout.from_dense(x, block_size=(8, 8), seqlens=(16, 32)), "(2, 2) blocks"),
        (
            lambda x: BlockLayout.from_topk(x.int() + 9, block_size=(8, 8), seqlens=(16, 16)),
            "indices must be -1 or in [0, 2)",
        ),
        (lambda x: BlockLayout.dense((8, 8)) | BlockLayout.dense((8, 9)), "different seqlens"),
        (lambda x: BlockLayout.dense((8, 8)).refine((3, 8)), "must divide the present block size"),
        (lambda x: BlockLayout.dense((8, 8)).to_topk(), "no block lists"),
        (lambda x: random_layout((8, 8), heads=3).to_dense(num_heads=4), "does not divide 4 heads"),
    ],
)
def test_builders_refuse(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.ones(1, 1, 2, 2, dtype=torch.bool))


def test_a_million_tokens_cost_what_is_kept():
    """One head at 2^20 tokens, 64 blocks of 128 a row: the lists, not the 67 million pairs of
    blocks.
    """
    rows = 2**13
    indices = (torch.arange(64) * 100).expand(1, 1, rows, 64)
    layout = BlockLayout.from_topk(indices, block_size=(128, 128), seqlens=(2**20, 2**20))
    both = layout | BlockLayout.sink_window((2**20, 2**20), sink=64, window=1024)
    size = sum(x.numel() * x.element_size() for x in both.validate().tensors().values())
    assert size == 4 * (rows * 64 + rows + 2)
