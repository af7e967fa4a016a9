"""key_bias and alibi_slopes in the C++ kernels, each instruction set forced in turn."""

from __future__ import annotations

import math

import pytest
import torch

from .cpu_calls import DTYPES, Case, check, make_qkv, random_lists

pytestmark = pytest.mark.usefixtures("one_thread")


def biased(dtype, seqlens, bias_shape, generator, **options):
    batch, heads, kv_heads, block = 2, 6, 2, (48, 16)
    shape = (batch, heads, seqlens[0], 48)
    case = Case(
        *make_qkv(shape, kv_heads, seqlens[1], 40, dtype, generator), block=block, **options
    )
    num_q, num_kv = (-(-n // size) for n, size in zip(seqlens, block, strict=True))
    case.blocks = random_lists(1, 2, num_q, num_kv, 0.3, generator)
    case.columns = random_lists(batch, 1, num_q, seqlens[1], 0.05, generator)
    case.key_bias = torch.randn(*bias_shape, seqlens[1], generator=generator)
    case.alibi_slopes = torch.rand(heads, generator=generator) / 16
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", (0.0, 5.0))
@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize(
    "seqlens", [(1, 300), (7, 5000), (150, 211), (130, 70), (90, 900)], ids=str
)
def test_biases(isa, request, dtype, softcap, is_causal, seqlens):
    """Through runs of keys and gathered ones, in tiles and by rows, in one part and in several."""
    generator = torch.Generator().manual_seed(sum(seqlens))
    heads = {1: 6, 7: 3, 150: 2, 130: 1, 90: 3}[seqlens[0]]  # some span two KV heads
    batch = 1 + seqlens[0] % 2
    case = biased(
        dtype, seqlens, (batch, heads), generator, softcap=softcap, is_causal=is_causal, sink=[3],
        window=[20, 0],
    )  # fmt: skip
    check(case, request)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_q", [3, 100])
def test_strides_of_biases(isa, dtype, seqlen_q):
    """Nothing is read around a bias that lies in a larger tensor."""
    generator = torch.Generator().manual_seed(seqlen_q)
    case = biased(dtype, (seqlen_q, 230), (2, 3), generator)
    memory = torch.full((231, 5, 4), math.nan)
    inner = memory[1:, 1:4, 1:3]
    inner.copy_(case.key_bias.permute(2, 1, 0))
    slopes = torch.full((2 * 6,), math.nan)[::2]
    slopes.copy_(case.alibi_slopes)
    expected = case.run()
    case.key_bias, case.alibi_slopes = inner.permute(2, 1, 0), slopes
    assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))
    for dim in range(3):  # an expanded tensor
        first = inner.permute(2, 1, 0).narrow(dim, 0, 1)
        case.key_bias = first.expand(2, 3, 230)
        shared = case.run()
        case.key_bias = first.expand(2, 3, 230).contiguous()
        assert all(torch.equal(a, b) for a, b in zip(case.run(), shared, strict=True))


BAD_BIASES = {
    "key_bias must have 3 dimensions": {"key_bias": torch.zeros(4, 70)},
    "key_bias must be float32": {"key_bias": torch.zeros(1, 4, 70, dtype=torch.float64)},
    "key_bias has batch size 3, but q has 2": {"key_bias": torch.zeros(3, 4, 70)},
    "key_bias has 3 heads, which do not divide": {"key_bias": torch.zeros(1, 3, 70)},
    "key_bias has 0 heads": {"key_bias": torch.zeros(1, 0, 70)},
    "key_bias has 69 keys": {"key_bias": torch.zeros(1, 4, 69)},
    "alibi_slopes must be float32": {"alibi_slopes": torch.zeros(4, dtype=torch.float64)},
    "alibi_slopes has 3 entries": {"alibi_slopes": torch.zeros(3)},
    "alibi_slopes must have 1 dimensions": {"alibi_slopes": torch.zeros(1, 4)},
}


@pytest.mark.parametrize("message", BAD_BIASES)
def test_biases_that_do_not_fit_are_refused(message):
    generator = torch.Generator().manual_seed(0)
    qkv = make_qkv((2, 4, 9, 8), 2, 70, 8, torch.float32, generator)
    with pytest.raises((ValueError, RuntimeError), match=message):
        Case(*qkv, window=[-1], **BAD_BIASES[message]).run()
