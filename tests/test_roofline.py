"""The cost model: its counts are those made by hand and by brute force."""

import itertools
from dataclasses import replace

import pytest
import torch

from bench import roofline
from bench.lib.gpus import GPUS, gpu
from bench.lib.tiles import keys_touched, tiles_touched
from bench.roofline import (
    Comparison,
    Shape,
    compare,
    cost,
    heads_per_tile,
)
from sparse_attn import BlockLayout

from .oracle import literal_mask, random_layout

H100 = gpu("H100")


def tiles(layout, tile=(64, 64), **options):
    return tiles_touched(layout, tile, **options)


def columns(seqlen, listed, group=1000):
    none = torch.zeros(1, dtype=torch.int32)
    indices = torch.tensor(listed, dtype=torch.int32)[None, None, None]
    counts = torch.full((1, 1, 1), len(listed), dtype=torch.int32)
    fields = {"num_columns": counts, "column_indices": indices, "column_group": group}
    return BlockLayout((seqlen, seqlen), none, none, **fields)


def block_list(seqlen, size, mask):
    mask = torch.tensor(mask, dtype=torch.bool)[None, None]
    return BlockLayout.from_dense(mask, block_size=size, seqlens=(seqlen, seqlen))


def test_tiles_by_hand():
    assert tiles(BlockLayout.dense((256, 256))) == (1 + 2 + 3 + 4, 64)
    assert tiles(BlockLayout.dense((256, 256)), is_causal=False) == (16, 64)
    # Tiles of rows see: 64 keys from 0; then 4 keys of the sink, and 64 + 15 of the window.
    layout = BlockLayout.sink_window((256, 256), sink=4, window=16)
    assert tiles(layout) == (1 + 3 + 3 + 3, 64)
    # A query block is a tile of rows; the blocks of keys that it lists are gathered.
    small = block_list(64, (16, 16), torch.ones(4, 4).tolist())
    assert tiles(small) == (4, 64)
    # A block of 128 rows is two tiles of rows; the first ends at its diagonal.
    assert tiles(block_list(128, (128, 128), [[1]])) == (1 + 2, 64)
    # 70 columns in two tiles; the first 64 rows see 40 of them.
    listed = [*range(40), *range(90, 120)]
    assert tiles(columns(128, listed)) == (1 + 2, 64)
    # Listed keys are walked whether or not the window has them.
    assert tiles(small | BlockLayout.dense((64, 64))) == (4 + 4, 64)


def test_heads_that_share_everything_share_tiles():
    small = block_list(64, (16, 16), torch.ones(4, 4).tolist())
    assert tiles(small, pack=4) == (4, 64)
    assert tiles(small, pack=8) == (4 * 2, 64)
    assert tiles(BlockLayout.dense((1, 256)), pack=4) == (4, 64)
    assert tiles(small, (128, 64), pack=8) == (4, 128)
    # 64 slots of 3 heads: rows 0 to 21, 21 to 42, 42 to 63.
    assert tiles(block_list(64, (64, 16), [[1, 1, 1, 1]]), (64, 16), pack=3) == (2 + 3 + 4, 64)
    shape = Shape(num_heads=8, kv_heads=2)
    assert heads_per_tile(small, shape) == 4
    assert heads_per_tile(random_layout((32, 32), heads=4), shape) == 2
    assert heads_per_tile(random_layout((32, 32), heads=8), shape) == 1


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("seqlens", [(96, 96), (50, 130), (100, 40), (1, 77)])
def test_tiles_hold_the_keys_that_their_rows_see(seqlens, is_causal):
    for fields in ({"keep": 0.4}, {"keep": 0.0, "sink": 20, "window": 30}):
        layout = random_layout(seqlens, heads=2, **fields)
        found = tiles(layout, (16, 16), is_causal=is_causal)
        needed = 0
        for head in range(2):
            mask = literal_mask(layout, is_causal=is_causal, head=head, num_heads=2)
            for rows in mask.split(16):
                key = rows.any(0).nonzero().flatten()
                runs = torch.tensor_split(key, (key.diff() > 1).nonzero().flatten() + 1)
                whole = [runs] if "sink" in fields else [[key]]
                needed += sum(-(-len(keys) // 16) for keys in whole[0])
        assert found[0] == needed / 2


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("seqlens", [(96, 96), (50, 130), (100, 40), (1, 77)])
def test_keys_touched_are_those_that_a_row_sees(seqlens, is_causal):
    layout = random_layout(seqlens, batch=2, heads=4, keep=0.1, window=9, columns=3, column_group=2)
    seen = 0
    for batch in range(2):
        masks = [
            literal_mask(layout, is_causal=is_causal, batch=batch, head=head, num_heads=4)
            for head in range(4)
        ]
        seen += sum(int((a | b).any(0).sum()) for a, b in (masks[:2], masks[2:]))
    assert keys_touched(layout, 2, is_causal=is_causal) == seen / 4
    # KV heads that share a list
    assert keys_touched(layout, 4, is_causal=is_causal) == keys_touched(
        layout, 8, is_causal=is_causal
    )


def test_flops_and_bytes_by_hand():
    layout = BlockLayout.dense((128, 128))
    shape = Shape(num_heads=4, kv_heads=2, head_dim=32, head_dim_v=16, batch=3)
    found = cost(layout, shape, H100)
    assert found.flops == 3 * 4 * (128 * 129 / 2) * 2 * (32 + 16)
    # two heads share tiles of 64 rows by 64 keys
    assert found.tile_flops == 3 * 2 * (1 + 2) * 128 * 64 * 2 * (32 + 16)
    assert found.kv_bytes == 3 * 2 * 128 * (32 + 16) * 2
    assert found.bytes == found.kv_bytes + 3 * 4 * 128 * ((32 + 16) * 2 + 4) + 8
    backward = cost(layout, replace(shape, part="backward"), H100)
    assert backward.flops == found.flops / (2 * (32 + 16)) * 2 * (3 * 32 + 2 * 16)
    rows, keys = 3 * 4 * 128, 3 * 2 * 128
    assert backward.bytes == rows * (4 * 48 + 8) + 2 * keys * 48 * 2 + 8


def test_floor_is_the_slower_of_both_peaks():
    prefill = cost(BlockLayout.dense((8192, 8192)), Shape(), H100)
    assert (prefill.bound, prefill.floor) == ("compute", prefill.flops / 989.4e12)
    decode = cost(BlockLayout.dense((1, 8192)), Shape(), H100)
    assert (decode.bound, decode.floor) == ("memory", decode.bytes / 3.35e12)
    # One token: the heads of a group share a tile, and the rows of 32 heads weigh little.
    assert decode.tile_flops == 8 * 128 * 64 * 64 * 2 * 256
    assert decode.bytes == pytest.approx(8 * 8192 * 256 * 2, rel=1e-2)
    for found in (prefill, decode):
        assert found.expected > found.floor


def test_more_keys_cost_more():
    layouts = [BlockLayout.sink_window((8192, 8192), window=2**n) for n in range(5, 14)]
    costs = [cost(layout, Shape(), H100) for layout in layouts]
    for less, more in itertools.pairwise(costs):
        assert less.flops < more.flops
        assert less.expected <= more.expected
    ratios = [compare(layout, Shape(), H100).speedup for layout in layouts]
    assert ratios == sorted(ratios, reverse=True)


def test_in_the_dense_limit_nothing_is_gained():
    dense = BlockLayout.dense((4096, 4096))
    found = compare(dense, Shape(), H100, tile=roofline.DENSE_TILE)
    ours, theirs = roofline.SHARES["H100", "forward"]
    assert found.sparse.floor == found.dense.floor
    assert found.speedup == pytest.approx(theirs / ours, rel=0.05)
    same = Comparison(found.dense, found.dense)
    assert same.speedup == 1 and same.crossover == pytest.approx(1)


@pytest.mark.parametrize("seqlen_q, part", [(4096, "forward"), (4096, "backward"), (1, "forward")])
def test_at_the_crossover_both_take_as_long(seqlen_q, part):
    layout = BlockLayout.sink_window((seqlen_q, 4096), window=400)
    found = compare(layout, Shape(part=part), H100)
    scale = found.crossover / found.sparse.density
    grown = replace(
        found.sparse,
        compute=found.sparse.compute * scale,
        memory=found.sparse.memory * (1 + (scale - 1) * found.sparse.kv_bytes / found.sparse.bytes),
    )
    assert grown.expected == pytest.approx(found.dense.expected, rel=0.02)
    assert 0.1 < found.crossover <= 1


def test_nothing_seen_costs_nothing_but_the_rows():
    found = compare(BlockLayout.sink_window((128, 128)), Shape(), H100)
    assert (found.sparse.flops, found.sparse.tile_flops, found.sparse.kv_bytes) == (0, 0, 0)
    assert found.crossover == 0


def test_gpus_and_shapes_that_do_not_exist_are_refused():
    assert gpu("sm_90") is H100
    with pytest.raises(ValueError, match=r"gpu must be one of A100 \(sm_80\), .*, got 'T4'"):
        gpu("T4")
    with pytest.raises(ValueError, match="no share of peak is known for MI300X"):
        cost(BlockLayout.dense((8, 8)), Shape(), gpu("MI300X"))
    wrong = ({"kv_heads": 5}, {"part": "both"}, {"dtype": "int8"}, {"head_dim": 0})
    for fields in wrong:
        with pytest.raises(ValueError, match=next(iter(fields))):
            Shape(**fields)
    assert len({g.name for g in GPUS}) == len({g.arch for g in GPUS}) == len(GPUS)


def test_the_page_says_that_it_is_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "TABLE", roofline.TABLE[:2])
    monkeypatch.setattr("sys.argv", ["roofline", "--out", str(tmp_path / "page.md")])
    roofline.main()
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# What to expect on a GPU: a model, not a measurement")
    for name in ("A100", "H100", "B200"):
        assert f"## {name}" in page
    assert page.count("prefill") == 6


def test_the_table_has_each_case_once():
    assert len(set(roofline.TABLE)) == len(roofline.TABLE)
