"""key_bias and alibi_slopes in the Triton kernels: packs of heads, splits, lists of all kinds, and
what is not finite.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import BlockLayout, sparse_attention
from sparse_attn.triton import configs
from sparse_attn.triton.launch import Call

from .oracle import GPU, random_layout
from .test_attention import make_qkv
from .test_bias import NAMES, check, eager
from .test_triton_nonfinite import assert_same, drawn, fenced

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(GPU, reason="the tensors are on the CPU"),
]
BIASES = dict(zip(("sink_logits", "key_bias", "alibi_slopes"), NAMES[5:], strict=True))


def compare(q, k, v, layout, biases, dtype, *, is_causal=True, **options):
    """Holds Triton against dense attention, in which rows that see no key give 0."""
    mask = layout.to_dense(is_causal=is_causal, num_heads=q.shape[1])
    empty = ~mask.any(-1)

    def ours(q, k, v, *given):
        named = dict(zip(biases, given, strict=True))
        out, lse = sparse_attention(
            q, k, v, layout, is_causal=is_causal, return_lse=True, backend="triton", **named,
            **options,
        )  # fmt: skip
        return out, torch.where(empty, 0, lse)

    def dense(q, k, v, *given):
        named = dict(zip(biases, given, strict=True))
        out, lse = eager(q, k, v, mask | empty[..., None], **named, **options)
        return torch.where(empty[..., None], 0, out), torch.where(empty, 0, lse)

    names = (*NAMES[:5], *(BIASES[name] for name in biases))
    check(ours, dense, [q, k, v, *biases.values()], dtype, names)


def key_bias(draw, batch, heads, keys):
    """Of any shape; expanded, transposed or as it is in memory."""
    of_batch = draw(st.sampled_from([1, batch]))
    of_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    kind = draw(st.sampled_from(["expanded", "transposed", "usual"]))
    if kind == "expanded":
        return torch.randn(1, 1, keys).expand(of_batch, of_heads, keys)
    x = torch.randn(of_batch, of_heads, keys)
    return x.mT.contiguous().mT if kind == "transposed" else x


@settings(drawn, max_examples=4)
@given(data=st.data())
def test_any_call(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3), (1, 4)]))
    heads, batch = kv_heads * group, draw(st.integers(1, 2))
    seqlens = draw(st.sampled_from([(1, 90), (3, 40), (20, 40), (40, 30)]))
    dims = draw(st.sampled_from([(8, 8), (24, 40), (16, 5)]))
    q, k, v = make_qkv(
        dtype, batch=batch, heads=heads, kv_heads=kv_heads, seqlens=seqlens, dims=dims
    )
    layout = random_layout(
        seqlens, batch=draw(st.sampled_from([1, batch])), heads=draw(st.sampled_from([1, heads])),
        block_size=draw(st.sampled_from([(16, 8), (32, 64), (64, 3)])), keep=0.4, sink=2,
        window=draw(st.sampled_from([0, 9])), columns=draw(st.sampled_from([0, 7])),
    )  # fmt: skip
    biases = {
        "sink_logits": torch.randn(heads),
        "key_bias": key_bias(draw, batch, heads, seqlens[1]),
        "alibi_slopes": torch.rand(heads),
    }
    absent = draw(st.sets(st.sampled_from(sorted(biases)), max_size=2))
    compare(
        q, k, v, layout, {name: x for name, x in biases.items() if name not in absent}, dtype,
        is_causal=draw(st.booleans()), softcap=draw(st.sampled_from([0.0, 2.0])), scale=0.3,
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "splits"), [(1, 5), (40, 2)])
def test_any_number_of_splits(monkeypatch, rows, splits):
    """Forward and backward, blocks and columns, heads that share biases within a group or not; all
    within their tensors.
    """
    monkeypatch.setattr(configs, "num_splits", lambda *args: splits)
    q, k, v = make_qkv(torch.float32, heads=4, kv_heads=1, seqlens=(rows, 150), dims=(16, 16))
    layout = random_layout((rows, 150), block_size=(32, 16), sink=2, window=30, columns=20)
    for heads in (1, 4):
        bias = fenced(1, heads, 150)
        compare(
            q, k, v, layout, {"key_bias": bias, "alibi_slopes": torch.rand(4)}, torch.float32,
            scale=0.3,
        )  # fmt: skip


def test_heads_are_packed_that_share_their_biases():
    layout = BlockLayout.dense((5, 9))
    for heads, expected in ((1, 4), (2, 4), (4, 2), (8, 1)):
        bias = torch.zeros(1, heads, 9)
        call = Call(layout, 8, 2, 1, None, 0.1, 0.0, True, bias, torch.zeros(8))
        assert call.pack == expected
    assert Call(layout, 8, 2, 1, None, 0.1, 0.0, True, None, torch.zeros(8)).pack == 4


def results(backend, q, k, v, layout, biases, dtype, **options):
    """out, lse and all gradients, from a backend in a dtype."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v, *biases.values())]
    named = dict(zip(biases, leaves[3:], strict=True))
    out, lse = sparse_attention(
        *leaves[:3], layout, return_lse=True, backend=backend, **named, **options
    )
    torch.manual_seed(1)
    weights = (torch.randn(out.shape).to(out), torch.randn(lse.shape).to(lse))
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, weights)]


def compare_with_reference(*call):
    """NaN and infinities in the same places, the rest close."""
    found = results("triton", *call, torch.float32)
    exact, noisy = (results("reference", *call, x) for x in (torch.float64, torch.float32))
    for part in (slice(5), slice(5, None)):  # of q, k and v, and of biases
        assert_same(found[part], exact[part], noisy[part])


@pytest.mark.parametrize(
    ("name", "value", "splits"),
    [
        ("key_bias", -math.inf, 3),
        ("key_bias", math.inf, 1),
        ("key_bias", math.nan, 1),
        ("key_bias", 1e30, 3),
        ("alibi_slopes", math.inf, 3),
        ("alibi_slopes", 1e30, 1),
    ],
)
def test_biases_that_are_not_finite_count_for_those_who_see_them(monkeypatch, name, value, splits):
    """Beside values that are not finite; a few keys, then all keys of some tiles and rows."""
    monkeypatch.setattr(configs, "num_splits", lambda *args: splits)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, m, 16) for n, m in ((2, 12), (1, 90), (1, 90)))
    v[0, 0, 60, ::3] = math.inf
    layout = random_layout((12, 90), block_size=(8, 16), keep=0.5, sink=1, window=9, columns=9)
    for places in ((0, [3, 81, 89]), (0, range(80))) if name == "key_bias" else (1,):
        biases = {"key_bias": torch.randn(1, 2, 90), "alibi_slopes": torch.rand(2)}
        biases[name][(0, *places) if name == "key_bias" else places] = value
        compare_with_reference(q, k, v, layout, biases)


@pytest.mark.parametrize("sinks", [True, False])
def test_an_lse_that_float32_does_not_hold(sinks):
    """The backward pass then sums rows anew, with their biases."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, m, 16) for n, m in ((4, 20), (2, 90), (2, 90)))
    layout = random_layout((20, 90), heads=2, block_size=(8, 16), sink=1, window=9, columns=9)
    layout = replace(layout, window=torch.tensor([9, 0], dtype=torch.int32))
    biases = {"key_bias": torch.randn(1, 2, 90) + 6000, "alibi_slopes": torch.rand(4)}
    if sinks:
        biases["sink_logits"] = torch.tensor([5990.0, 6001.0, 7000.0, 0.0])
    compare_with_reference(q, k, v, layout, biases)


def test_second_derivatives():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (3, 5, 5))
    layout = BlockLayout.dense((3, 5))

    def twice(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, bias, slopes)]
        out = sparse_attention(
            leaves[0], k.to(dtype), v.to(dtype), layout, key_bias=leaves[1],
            alibi_slopes=leaves[2], backend=backend,
        )  # fmt: skip
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in grads), leaves)

    bias, slopes = torch.randn(1, 2, 5), torch.rand(2)
    for x, y in zip(twice("triton", torch.float32), twice("reference", torch.float64), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
