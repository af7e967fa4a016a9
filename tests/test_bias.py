"""key_bias and alibi_slopes: added to the scores of visible keys, with gradients; a backend that
does not serve them says so by name.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

import sparse_attn
from sparse_attn import BlockLayout, explain
from sparse_attn.ops import backends
from sparse_attn.reference.varlen import sequence_layout
from sparse_attn.triton import support

from .oracle import (
    BACKENDS,
    DTYPES,
    is_interpreted,
    on_device,
    random_layout,
    sparse_attention,
)

COMBINATIONS = list(
    product([True, False], [0.0, 1.5], [(2, 4), (1, 2), (1, 1)], [(9, 23), (1, 23)])
)
CASES = [
    (backend, dtype, *some)
    for backend in BACKENDS
    for dtype in {"reference": [torch.float32, torch.float64], "cpu": DTYPES}.get(
        backend, [torch.float32]
    )
    for some in COMBINATIONS[:: 5 if is_interpreted(backend) else 1]  # some of everything
]


def sparse_attention_varlen(*args, backend, **kwargs):
    return on_device(sparse_attn.sparse_attention_varlen, backend, *args, **kwargs)


def widest(backend):
    """The widest dtype that a backend takes."""
    return torch.float64 if backend == "reference" else torch.float32


def eager(q, k, v, mask, *, scale, softcap=0.0, sink_logits=None, key_bias=None, alibi_slopes=None):
    """``(out, lse)`` from dense scores, an explicit mask and explicit distances."""
    heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = scale * q @ k.mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if key_bias is not None:
        scores = scores + key_bias.repeat_interleave(heads // key_bias.shape[1], 1)[:, :, None]
    if alibi_slopes is not None:
        position = torch.arange(rows)[:, None] + keys - rows
        scores = scores - alibi_slopes[:, None, None] * (position - torch.arange(keys)).abs()
    scores = scores.masked_fill(~mask, -torch.inf)
    if sink_logits is not None:
        scores = torch.cat(
            [scores, sink_logits.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1
        )
    return scores.softmax(-1)[..., :keys] @ v, scores.logsumexp(-1)


def inputs(dtype, seqlens=(9, 23), bias_shape=(2, 2)):
    torch.manual_seed(0)
    q = torch.randn(2, 4, seqlens[0], 8, dtype=dtype)
    k, v = torch.randn(2, 2, 2, seqlens[1], 8, dtype=dtype).unbind(0)
    bias = torch.randn(*bias_shape, seqlens[1], dtype=dtype)
    return [q, k, v, torch.randn(4, dtype=dtype), bias, torch.rand(4, dtype=dtype)]


def with_gradients(attend, tensors, dtype):
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
    out, lse = attend(*leaves)
    torch.manual_seed(1)
    weights = (torch.randn(out.shape).to(out), torch.randn(lse.shape).to(lse))
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, weights)


NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks", "dkey_bias", "dalibi_slopes")


@pytest.mark.parametrize(
    ("backend", "dtype", "is_causal", "softcap", "bias_shape", "seqlens"), CASES, ids=str
)
def test_against_dense_attention(backend, dtype, is_causal, softcap, bias_shape, seqlens):
    layout = random_layout(seqlens, heads=2, block_size=(4, 4), sink=2, window=3, columns=3)
    mask = layout.to_dense(is_causal=is_causal, num_heads=4)
    tensors = inputs(dtype, seqlens, bias_shape)

    def ours(q, k, v, sink_logits, bias, slopes):
        return sparse_attention(
            q, k, v, layout, is_causal=is_causal, scale=0.4, softcap=softcap,
            sink_logits=sink_logits, key_bias=bias, alibi_slopes=slopes, return_lse=True,
            backend=backend,
        )  # fmt: skip

    def dense(q, k, v, sink_logits, bias, slopes):
        more = {"sink_logits": sink_logits, "key_bias": bias, "alibi_slopes": slopes}
        return eager(q, k, v, mask, scale=0.4, softcap=softcap, **more)

    check(ours, dense, tensors, dtype)


def check(ours, dense, tensors, dtype, names=NAMES):
    """Results and gradients are at most twice as far from those of float64 as eager ones."""
    found = with_gradients(ours, tensors, dtype)
    exact = with_gradients(dense, tensors, torch.float64)
    own = with_gradients(dense, tensors, dtype)
    for name, x, y, z in zip(names, found, exact, own, strict=True):
        rounding = 16 * torch.finfo(dtype).eps * y.abs().max()
        error, limit = (x - y).abs().max(), 2 * (z - y).abs().max() + rounding
        assert error <= limit, f"{name}: {error} > {limit}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_merged_with_the_log_of_their_number_equal_the_keys_apart(backend):
    q, k, v, *_ = inputs(widest(backend))
    times = torch.tensor([1, 3, 2, 5] * 6)[:23]
    apart = [x.repeat_interleave(times, 2) for x in (k, v)]
    dense = [BlockLayout.dense((9, n)) for n in (23, int(times.sum()))]
    bias = times.to(q.dtype).log().expand(1, 1, -1)
    merged = sparse_attention(
        q, k, v, dense[0], is_causal=False, key_bias=bias, return_lse=True, backend=backend
    )
    every = sparse_attention(q, *apart, dense[1], is_causal=False, return_lse=True, backend=backend)
    torch.testing.assert_close(merged, every)


@pytest.mark.parametrize("given", ["key_bias", "alibi_slopes", "both"])
def test_gradcheck_twice(given):
    q, k, v, _, bias, slopes = (x[..., :5] for x in inputs(torch.float64, (3, 5)))
    layout = random_layout((3, 5), heads=2, block_size=(2, 2), window=2)
    more = {"key_bias": bias, "alibi_slopes": slopes[:4]}
    more = {name: x for name, x in more.items() if given in (name, "both")}
    leaves = [x.detach().requires_grad_() for x in (q, k, v, *more.values())]

    def attend(q, k, v, *others):
        named = dict(zip(more, others, strict=True))
        return sparse_attention(q, k, v, layout, scale=0.4, backend="reference", **named)

    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias_batch", [1, 2])
def test_packed_sequences_equal_each_alone(backend, bias_batch):
    q, k, v, sink_logits, bias, slopes = inputs(widest(backend), (16, 23), (bias_batch, 2))
    lengths = [(7, 12), (9, 11)]
    ends_q, ends_kv = (torch.tensor([0, a, a + b]).int() for a, b in zip(*lengths, strict=True))
    layout = random_layout((9, 12), heads=2, block_size=(4, 4), window=3)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    more = {"sink_logits": sink_logits, "alibi_slopes": slopes, "backend": backend}
    bias = bias[..., :12]
    leaf = packed[0].clone().requires_grad_()  # through the op that has gradients too
    for rows in (packed[0], leaf):
        out = sparse_attention_varlen(
            rows, *packed[1:], layout, cu_seqlens_q=ends_q, cu_seqlens_kv=ends_kv, key_bias=bias,
            **more,
        )  # fmt: skip
        for b, (n, m) in enumerate(lengths):
            at_q, at_kv = slice(ends_q[b], ends_q[b] + n), slice(ends_kv[b], ends_kv[b] + m)
            alone = sparse_attention(
                q[:1, :, at_q], k[:1, :, at_kv], v[:1, :, at_kv],
                sequence_layout(layout, b, (n, m)),
                key_bias=bias[b % bias_batch, None, :, :m], **more,
            )  # fmt: skip
            torch.testing.assert_close(out[at_q].transpose(0, 1)[None], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_paged_cache_equals_packed_keys(backend):
    q, k, v, sink_logits, bias, slopes = inputs(widest(backend), (5, 24), (1, 2))
    layout = random_layout((5, 24), heads=2, block_size=(4, 4), window=3)
    rows, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))
    order = torch.tensor([2, 0, 1])
    pages = [torch.empty(3, 8, *x.shape[1:], dtype=x.dtype) for x in (keys, values)]
    for page, x in zip(pages, (keys, values), strict=True):
        page[order] = x.unflatten(0, (3, 8))
    more = {"sink_logits": sink_logits, "key_bias": bias, "alibi_slopes": slopes}
    ends = torch.tensor([0, 5], dtype=torch.int32)
    paged = sparse_attention_varlen(
        rows, *pages, layout, cu_seqlens_q=ends, seqlens_kv=torch.tensor([24], dtype=torch.int32),
        block_table=order[None].int(), backend=backend, **more,
    )  # fmt: skip
    packed = sparse_attention_varlen(
        rows, keys, values, layout, cu_seqlens_q=ends,
        cu_seqlens_kv=torch.tensor([0, 24], dtype=torch.int32), backend=backend, **more,
    )  # fmt: skip
    torch.testing.assert_close(paged, packed)
    without = {"sink_logits": sink_logits}
    plain = sparse_attention(q[:1], k[:1], v[:1], layout, backend=backend, **without)
    assert (paged.transpose(0, 1)[None] - plain).abs().max() > 1e-3  # the biases have an effect


@pytest.mark.parametrize("features", ["key_bias", 3, ["nothing"], None], ids=repr)
def test_explain_names_features_that_it_does_not_know(features):
    q, k, v, *_ = inputs(torch.float32)
    with pytest.raises((TypeError, ValueError), match="features must be"):
        explain(q, k, v, features=features)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", ["key_bias", "alibi_slopes"])
def test_a_backend_that_lacks_one_refuses_it_by_name(monkeypatch, backend, name):
    lists = {"cpu": (backends, "_CPU_FEATURES"), "triton": (support, "FEATURES")}
    module, served = lists[backend]
    monkeypatch.setattr(module, served, getattr(module, served) - {name})
    q, k, v, _, bias, slopes = inputs(torch.float32, (11, 29))  # which no other test has
    given = {"key_bias": bias, "alibi_slopes": slopes}[name]
    with pytest.raises(ValueError, match=f"it does not serve {name}"):
        sparse_attention(q, k, v, BlockLayout.dense((11, 29)), backend=backend, **{name: given})
    assert f"it does not serve {name}" in explain(q, k, v, features=[name]).reasons[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("rows", [3, 40])
def test_only_distances_matter_however_far_the_rows_are(backend, is_causal, rows):
    """The last keys of a long call, of which rows see no others, are a call of their own."""
    keys, few, dtype = 2**17, 2**10, widest(backend)
    q, k, v = (torch.randn(1, 1, n, 4, dtype=dtype) for n in (rows, keys, keys))
    bias, slopes = torch.randn(1, 1, keys, dtype=dtype), torch.ones(1, dtype=dtype)
    results = [
        sparse_attention(
            q, k[:, :, -n:], v[:, :, -n:], BlockLayout.sink_window((rows, n), window=100),
            is_causal=is_causal, key_bias=bias[..., -n:], alibi_slopes=slopes, backend=backend,
            return_lse=True,
        )
        for n in (keys, few)
    ]  # fmt: skip
    for far, near in zip(*results, strict=True):
        torch.testing.assert_close(far, near, rtol=0, atol=1e-6)


def test_auto_takes_a_backend_that_serves_them():
    q, k, v, _, bias, slopes = inputs(torch.float32)
    layout, biases = BlockLayout.dense((9, 23)), {"key_bias": bias, "alibi_slopes": slopes}
    found = sparse_attn.sparse_attention(q, k, v, layout, **biases)
    assert torch.equal(found, sparse_attention(q, k, v, layout, **biases, backend="cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key_bias": torch.zeros(2, 2, 22)}, "key_bias must be a float tensor"),
        ({"key_bias": torch.zeros(2, 3, 23)}, "key_bias must be a float tensor"),
        ({"key_bias": torch.zeros(3, 2, 23)}, "key_bias must be a float tensor"),
        ({"key_bias": torch.zeros(2, 2, 23, dtype=torch.int32)}, "key_bias must be a float"),
        ({"key_bias": 1.0}, "key_bias must be a tensor"),
        ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes must be a float tensor"),
        ({"alibi_slopes": [0.1] * 4}, "alibi_slopes must be a tensor"),
    ],
    ids=range(7),
)
def test_what_does_not_fit_is_named(arguments, message):
    q, k, v, *_ = inputs(torch.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        sparse_attn.sparse_attention(q, k, v, BlockLayout.dense((9, 23)), **arguments)
