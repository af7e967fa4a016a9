"""The rules from scores to block lists, against literal readings."""

import itertools
import math

import pytest
import torch

from sparse_attn.selectors.choose import (
    blocks_at_distances,
    covering_blocks,
    highest,
    highest_within,
    join_lists,
    listed_blocks,
    top_blocks,
)


def lists_of(counts, indices):
    """The lists as Python lists, in the order of their rows."""
    rows = zip(counts.flatten().tolist(), indices.flatten(0, -2).tolist(), strict=True)
    return [row[:n] for n, row in rows]


def literal_top_blocks(row, top_k):
    """The blocks of one row of scores: the highest, of equal ones the earlier."""
    ranked = sorted(range(len(row)), key=lambda n: (-row[n], n))
    return sorted(n for n in ranked[:top_k] if row[n] > -math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [1, 7, 40, 1000])
@pytest.mark.parametrize("kind", ["normal", "few", "ties", "hidden", "large"])
def test_top_blocks_are_the_highest_scores(dtype, top_k, kind):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 17, 300, generator=generator, dtype=dtype)
    if kind == "few":
        scores = scores[..., :5]
    elif kind == "ties":
        scores = scores.round() * torch.tensor([-0.0, 1.0], dtype=dtype).repeat(150)
    elif kind == "hidden":
        scores = scores.masked_fill(scores < 1.2, -math.inf)
    elif kind == "large":
        scores = scores.sign() * scores.mul(80).exp2()
    counts, indices = top_blocks(scores, top_k)
    width = min(top_k, scores.shape[-1])
    assert counts.dtype == indices.dtype == torch.int32 and indices.shape[-1] == width
    if kind == "ties" and dtype == torch.float64:  # torch.topk's choice
        kept = scores.gather(-1, indices.long()).sort(-1).values
        assert torch.equal(kept, scores.topk(width).values.flip(-1))
        return
    for row, n, found in zip(
        scores.flatten(0, 2).tolist(),
        counts.flatten().tolist(),
        indices.flatten(0, 2).tolist(),
        strict=True,
    ):
        assert found[:n] == literal_top_blocks(row, top_k)
        assert found[n:] == [scores.shape[-1]] * (width - n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 8])
def test_nan_takes_no_place_among_the_top_blocks(dtype, top_k):
    values = (math.nan, -math.nan, 2.0, -math.inf, 1.0, math.inf, 0.0, math.nan)
    rows = [list(row) for row in itertools.islice(itertools.permutations(values), 0, None, 997)]
    rows += [[math.nan] * 8, [math.nan] * 7 + [-math.inf], [math.nan, 3.0] * 4]
    scores = torch.tensor(rows, dtype=dtype)
    without = [[-math.inf if math.isnan(x) else x for x in row] for row in rows]
    reference = torch.ops.sparse_attn.top_blocks_reference(scores, top_k)
    ties = len(rows) - 1  # of equal scores torch.topk may choose any
    for found in (top_blocks(scores, top_k), reference):
        kept = lists_of(*found)
        assert kept[:ties] == [literal_top_blocks(row, top_k) for row in without[:ties]]
        assert set(kept[ties]) <= {1, 3, 5, 7} and len(kept[ties]) == min(top_k, 4)


def test_top_blocks_of_no_blocks_and_bad_numbers_and_opcheck():
    scores = torch.tensor([[math.nan, 2.0, -math.inf, 1.0, math.inf, 0.0]] * 2)
    assert top_blocks(scores[:, :0], 3)[1].shape == (2, 0)
    torch.library.opcheck(torch.ops.sparse_attn.top_blocks.default, (scores, 3))
    for choose in (top_blocks, torch.ops.sparse_attn.top_blocks):
        with pytest.raises(ValueError, match="top_k must be at least 1"):
            choose(scores, 0)


def literal_covering(row, share, forced):
    """The blocks of one row of scores: the forced ones, then the highest until the share is met."""
    allowed = [n for n, x in enumerate(row) if x > -math.inf]
    total = sum(row[n] for n in allowed)
    ranked = sorted(allowed, key=lambda n: (not forced[n], -row[n], n))
    kept, before = [], 0.0
    for n in ranked:
        if forced[n] or before < share * total:
            kept.append(n)
        before += row[n]
    return sorted(kept)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "hidden"])
def test_covering_blocks_are_the_fewest_that_hold_a_share(share, kind):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 3, 9, 40, generator=generator)
    forced = torch.rand(9, 40, generator=generator) < 0.05
    if kind == "ties":
        scores = (4 * scores).round() / 4
    elif kind == "zeros":
        scores = scores * 0
    elif kind == "hidden":
        scores = scores.masked_fill(scores < 0.5, -math.inf)
        scores[0, 0, 0] = math.nan
    counts, indices = covering_blocks(scores, share, forced)
    expected = [
        literal_covering(row, share, forced[i % 9].tolist())
        for i, row in enumerate(scores.double().flatten(0, 2).tolist())
    ]
    assert lists_of(counts, indices) == expected
    assert indices.shape[-1] == max(map(len, expected))


def test_covering_blocks_keep_the_block_that_crosses_the_line():
    counts, indices = covering_blocks(torch.tensor([[0.2, 0.5, 0.3]]), 0.6)
    assert lists_of(counts, indices) == [[1, 2]]
    counts, indices = covering_blocks(torch.tensor([[0.25, 0.5, 0.25]]), 0.5)
    assert lists_of(counts, indices) == [[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forced_blocks_are_among_the_top_whatever_their_score(dtype):
    scores = torch.tensor([[4.0, 3.0, -math.inf, 2.0], [1.0, math.nan, 3.0, 4.0]], dtype=dtype)
    forced = torch.tensor([[False, False, False, True], [False, True, False, False]])
    assert lists_of(*top_blocks(scores, 2, forced)) == [[0, 3], [1, 3]]
    assert lists_of(*top_blocks(scores[:1], 2, forced[1])) == [[0, 1]]
    assert lists_of(*top_blocks(scores[:1], 2)) == [[0, 1]]


@pytest.mark.parametrize("values", [6, 10**4])
def test_the_highest_scores_are_the_first_of_a_stable_sort(values):
    """Whole numbers: sums are exact, and with few of them many are equal."""
    scores = torch.randint(0, values, (2, 3, 5, 40)).float()
    share = 10.0 * values
    counts = torch.randint(0, 41, (2, 3, 5, 1))
    masks = {
        "same": highest(scores, 7),
        "each": highest(scores, counts),
        "below": highest_within(scores, share, inclusive=False),
        "across": highest_within(scores, share, inclusive=True),
        "one": highest_within(scores, 0.5, inclusive=False),
    }
    for at in itertools.product(*map(range, counts.shape[:3])):
        row = scores[at].tolist()
        ranked = sorted(range(40), key=lambda n, row=row: (-row[n], n))
        fits = sum(total <= share for total in scores[at][ranked].cumsum(0).tolist())
        sizes = {"same": 7, "each": counts[at].item(), "below": fits, "across": fits + 1, "one": 1}
        for name, mask in masks.items():
            kept = mask[at].nonzero()[:, 0].tolist()
            assert kept == sorted(ranked[: sizes[name]]), name


def test_a_mask_is_listed_in_ascending_order():
    keep = torch.rand(2, 3, 5, 9) < 0.4
    counts, indices = listed_blocks(keep)
    assert lists_of(counts, indices) == [row.nonzero()[:, 0].tolist() for row in keep.flatten(0, 2)]
    assert counts.dtype == indices.dtype == torch.int32
    assert indices.shape[-1] == keep.sum(-1).max()


@pytest.mark.parametrize("seqlens", [(64, 64), (50, 50), (20, 70), (70, 20), (1, 33), (64, 67)])
@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_blocks_at_distances_hold_every_key_at_them(seqlens, block_size):
    distances = torch.randint(0, seqlens[1], (2, 3, 5))
    counts, indices = blocks_at_distances(distances, seqlens, block_size)
    off, found = seqlens[1] - seqlens[0], iter(lists_of(counts, indices))
    for b in range(2):
        for h in range(3):
            for start in range(0, seqlens[0], block_size):
                rows = range(start + off, start + off + block_size)  # of whole query blocks
                keys = {p - d for p in rows for d in distances[b, h].tolist()}
                last = min(rows[-1], seqlens[1] - 1)
                blocks = {j // block_size for j in keys if j >= 0}
                # Only the last query block may be given more, if it is shorter than a block.
                assert next(found) == sorted(n for n in blocks if n * block_size <= last)


def test_lists_of_different_widths_are_joined():
    parts = [torch.tensor([[[1, 2]]]), torch.tensor([[[3]]])]
    lists = [torch.tensor([[[[7], [8]]]]), torch.tensor([[[[4, 5, 6]]]])]
    counts, indices = join_lists(list(zip(parts, lists, strict=True)))
    assert counts.tolist() == [[[1, 2, 3]]]
    assert indices.tolist() == [[[[7, 0, 0], [8, 0, 0], [4, 5, 6]]]]
