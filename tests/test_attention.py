"""The op pair of every backend against float64 dense attention with an explicit mask."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import BlockLayout, merge_states

from .oracle import (
    DTYPES,
    assert_accurate,
    backends,
    cases,
    dense_attention,
    is_interpreted,
    random_layout,
    rounding_noise,
    shorter,
    sparse_attention,
)

every_case = pytest.mark.parametrize(
    ("backend", "dtype"), cases(), ids=lambda x: str(x).removeprefix("torch.")
)


def make_qkv(dtype, *, batch=1, heads=4, kv_heads=2, seqlens=(70, 70), dims=(32, 32)):
    """q, k, v as views of ``[B, S, H, D]`` memory, k and v as slices of a longer cache filled with
    NaN.
    """
    (sq, skv), (d, dv) = seqlens, dims
    q = torch.randn(batch, sq, heads, d).to(dtype).transpose(1, 2)

    def cached(dim):
        memory = torch.full((batch, kv_heads, skv + 7, dim + 3), torch.nan, dtype=dtype)
        memory[:, :, :skv, :dim] = torch.randn(batch, kv_heads, skv, dim).to(dtype)
        return memory[:, :, :skv, :dim]

    return q, cached(d), cached(dv)


def run_both(
    backend, q, k, v, layout, *, is_causal=True, sink_logits=None, key_bias=None, alibi_slopes=None,
    **kwargs,
):  # fmt: skip
    """Ours, eager in the same dtype, and float64: outputs, lse and the gradients of a random
    loss; and the `rounding_noise` of the gradients.
    """
    biases = {"sink_logits": sink_logits, "key_bias": key_bias, "alibi_slopes": alibi_slopes}
    biases = {name: x.detach() for name, x in biases.items() if x is not None}
    mask = layout.to_dense(is_causal=is_causal, num_heads=q.shape[1])
    dout = torch.randn(*q.shape[:3], v.shape[-1]).to(q.dtype)
    dlse = torch.randn(q.shape[:3])

    def ours(q, k, v, **biases):
        return sparse_attention(
            q, k, v, layout, is_causal=is_causal, return_lse=True, backend=backend, **biases,
            **kwargs,
        )  # fmt: skip

    def dense(q, k, v, **biases):
        return dense_attention(q, k, v, mask, **biases, **kwargs)

    def gradients(attend, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        added = {name: x.to(wide).requires_grad_() for name, x in biases.items()}
        out, lse = attend(*leaves, **added)
        finite = torch.where(torch.isinf(lse), 0, lse)
        loss = (out * dout.to(dtype)).sum() + (finite * dlse.to(finite.dtype)).sum()
        grads = torch.autograd.grad(loss, [*leaves, *added.values()])
        names = ["out", "lse", "dq", "dk", "dv", *(f"d{name}" for name in added)]
        return dict(zip(names, [out.detach(), lse.detach(), *grads], strict=True))

    return (
        gradients(ours, q.dtype),
        gradients(dense, q.dtype),
        gradients(dense, torch.float64),
        rounding_noise(q, k, v, mask, dout, dlse, **biases, **kwargs),
    )


def random_biases(draw, batch, heads, seqlen_kv):
    """Some of sink logits, a bias of any shape and stride for each key, and slopes."""
    biases = {}
    if draw(st.booleans()):
        biases["sink_logits"] = torch.randn(heads)
    if draw(st.booleans()):
        own_heads = draw(st.sampled_from([h for h in range(1, heads + 1) if heads % h == 0]))
        shape = (draw(st.sampled_from([1, batch])), own_heads, seqlen_kv)
        bias = torch.randn(shape[::-1]).permute(2, 1, 0)
        shared = draw(st.sampled_from([None, 0, 1, 2]))  # a dimension of stride 0
        if shared is not None:
            bias = bias.narrow(shared, 0, 1).expand(shape)
        biases["key_bias"] = bias
    if draw(st.booleans()):
        biases["alibi_slopes"] = torch.rand(1 if draw(st.booleans()) else heads).expand(heads)
    return biases


def check(backend, q, k, v, layout, **kwargs):
    ours, eager, exact, noise = run_both(backend, q, k, v, layout, **kwargs)
    eager["lse"] = eager["lse"].to(ours["lse"].dtype)
    for name in ours:
        assert_accurate(ours[name], exact[name], eager[name], name, noise.get(name))


@every_case
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("seqlens", [(70, 70), (33, 131), (1, 97), (97, 64), (128, 128)])
def test_random_layouts(backend, dtype, is_causal, seqlens):
    seqlens = shorter(backend, seqlens)
    q, k, v = make_qkv(dtype, batch=2, seqlens=seqlens)
    layout = random_layout(
        seqlens, batch=2, heads=4, block_size=(16, 16), sink=5, window=9, columns=6, column_group=2
    )
    check(backend, q, k, v, layout, is_causal=is_causal)


@every_case
@pytest.mark.parametrize("block_size", [(1, 1), (1, 16), (16, 1), (7, 5), (64, 64), (32, 128)])
def test_block_sizes(backend, dtype, block_size):
    seqlens = (75, 150) if block_size[0] > 1 else shorter(backend, (75, 150))
    q, k, v = make_qkv(dtype, seqlens=seqlens)
    check(backend, q, k, v, random_layout(seqlens, heads=2, block_size=block_size, keep=0.4))


@every_case
@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (8, 1), (6, 2), (9, 3)])
@pytest.mark.parametrize("layout_heads", ["one", "kv", "query"])
def test_heads(backend, dtype, heads, layout_heads):
    count = {"one": 1, "kv": heads[1], "query": heads[0]}[layout_heads]
    seqlens = shorter(backend, (70, 70))
    q, k, v = make_qkv(dtype, heads=heads[0], kv_heads=heads[1], seqlens=seqlens)
    check(backend, q, k, v, random_layout(seqlens, heads=count, sink=3, window=8, columns=4))


@every_case
@pytest.mark.parametrize(
    "dims", [(64, 64), (1, 1), (24, 16), (16, 40), (128, 96), (192, 128), (256, 256)]
)
def test_head_dims(backend, dtype, dims):
    q, k, v = make_qkv(dtype, dims=dims)
    check(backend, q, k, v, random_layout((70, 70), window=10))


@every_case
@pytest.mark.parametrize(
    ("sink", "window"), [(0, -1), (0, 1), (0, 16), (3, 0), (4, 16), (100, 0), (0, 1000), (64, 64)]
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_static_layouts(backend, dtype, sink, window, is_causal):
    q, k, v = make_qkv(dtype, seqlens=(150, 150))
    layout = BlockLayout.sink_window((150, 150), sink=sink, window=window)
    check(backend, q, k, v, layout, is_causal=is_causal)


@every_case
def test_retrieval_and_streaming_heads_together(backend, dtype):
    q, k, v = make_qkv(dtype, seqlens=(90, 120))
    window = torch.tensor([-1, 16, 1, -1], dtype=torch.int32)
    sink = torch.tensor([0, 4, 0, 9], dtype=torch.int32)
    check(backend, q, k, v, BlockLayout.sink_window((90, 120), sink=sink, window=window))


@every_case
@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap(backend, dtype, softcap):
    q, k, v = make_qkv(dtype)
    check(backend, 3 * q, k, v, random_layout((70, 70), window=20), softcap=softcap, scale=0.3)


@every_case
def test_learnable_sinks(backend, dtype):
    q, k, v = make_qkv(dtype)
    layout = random_layout((70, 70), heads=4, keep=0.2, window=4)
    check(backend, q, k, v, layout, sink_logits=torch.tensor([-2.0, 0.0, 1.5, 6.0]))


@every_case
def test_empty_rows(backend, dtype):
    q, k, v = make_qkv(dtype, seqlens=(96, 64))
    layout = random_layout((96, 64), keep=0.1)
    check(backend, q, k, v, layout)
    nothing = BlockLayout.sink_window((96, 64))
    out, lse = sparse_attention(q, k, v, nothing, return_lse=True, backend=backend)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    sink_logits = torch.tensor([1.0, -1.0, 0.0, 2.0])
    out, lse = sparse_attention(
        q, k, v, nothing, sink_logits=sink_logits, return_lse=True, backend=backend
    )
    assert (out == 0).all()
    assert torch.equal(lse, sink_logits[None, :, None].expand_as(lse).to(lse.dtype))


@every_case
@pytest.mark.parametrize("seqlens", [(0, 8), (8, 0), (0, 0)])
def test_zero_lengths(backend, dtype, seqlens):
    q, k, v = make_qkv(dtype, seqlens=seqlens)
    layout = BlockLayout.dense(seqlens)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attention(*leaves, layout, return_lse=True, backend=backend)
    assert out.shape == (1, 4, seqlens[0], 32)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    out.sum().backward()
    assert all((x.grad == 0).all() for x in leaves)


@every_case
def test_unselected_keys_may_hold_nan(backend, dtype):
    q, k, v = make_qkv(dtype, seqlens=(64, 256))
    layout = random_layout((64, 256), block_size=(64, 16), sink=3, columns=5)
    seen = layout.to_dense(is_causal=False)[0].any(0).any(0)
    expected = sparse_attention(q, k, v, layout, is_causal=False, backend=backend)
    poisoned = [torch.where(seen[:, None], x, torch.nan) for x in (k, v)]
    if backend == "reference":
        # It multiplies all of v, with weight 0 where nothing is seen.
        poisoned[1] = v
    out = sparse_attention(q, *poisoned, layout, is_causal=False, backend=backend)
    assert torch.equal(out, expected)


@every_case
def test_strides(backend, dtype):
    q, k, v = make_qkv(dtype)
    layout = random_layout((70, 70), window=5)
    expected = sparse_attention(*(x.contiguous() for x in (q, k, v)), layout, backend=backend)
    assert expected.is_contiguous()
    transposed = sparse_attention(q, k, v, layout, backend=backend)
    assert torch.equal(transposed, expected)
    assert transposed.transpose(1, 2).is_contiguous()
    strided = torch.stack([q, q], -1)[..., 0]
    assert strided.stride(-1) == 2
    assert torch.equal(sparse_attention(strided, k, v, layout, backend=backend), expected)
    one_k, one_v = k[:, :1, :, :], v[:, :1, :, :]
    expanded = [x.expand(-1, 4, -1, -1) for x in (one_k, one_v)]
    out = sparse_attention(q, *expanded, layout, backend=backend)
    expected = sparse_attention(q, one_k, one_v, layout, backend=backend)
    if backend == "triton":  # heads of one KV head share a tile
        torch.testing.assert_close(out, expected)
    else:
        assert torch.equal(out, expected)


@every_case
def test_run_to_run_equality(backend, dtype):
    seqlens = shorter(backend, (200, 200))
    q, k, v = make_qkv(dtype, seqlens=seqlens)
    layout = random_layout(seqlens, heads=4, window=30, columns=5)
    torch.manual_seed(1)
    first = run_both(backend, q, k, v, layout)[0]
    torch.manual_seed(1)
    second = run_both(backend, q, k, v, layout)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_case
def test_large_scores_do_not_overflow(backend, dtype):
    q, k, v = make_qkv(dtype)
    check(backend, 40 * q, 4 * k, v, random_layout((70, 70), window=20), scale=1.0)


@every_case
def test_merged_parts_equal_the_whole(backend, dtype):
    q, k, v = make_qkv(dtype, seqlens=(40, 120))
    whole = BlockLayout.dense((40, 120))
    parts, sink_logits = [], torch.randn(4)
    for start, stop in ((0, 30), (30, 33), (33, 120)):
        part = [x[:, :, start:stop] for x in (k, v)]
        parts.append(
            sparse_attention(
                q, *part, BlockLayout.dense((40, stop - start)), is_causal=False, return_lse=True,
                sink_logits=sink_logits if start == 0 else None, backend=backend,
            )
        )  # fmt: skip
    out, lse = merge_states(*parts)
    mask = whole.to_dense(is_causal=False)
    exact = dense_attention(
        *(x.double() for x in (q, k, v)), mask, sink_logits=sink_logits.double()
    )
    eager = dense_attention(q, k, v, mask, sink_logits=sink_logits)
    assert_accurate(out, exact[0], eager[0])
    assert_accurate(lse, exact[1], eager[1].to(lse.dtype))


@pytest.mark.parametrize("lses", [(math.inf, 1.0), (math.inf, -math.inf), (math.inf, math.inf)])
def test_merge_states_of_infinite_scores_is_what_attention_over_all_keys_gives(lses):
    outs = torch.tensor([[math.nan], [math.nan if lses[1] == math.inf else 0.0]])
    parts = [
        (out.view(1, 1, 1, 1), torch.tensor([[[x]]])) for out, x in zip(outs, lses, strict=True)
    ]
    out, lse = merge_states(*parts)
    assert out.isnan().all() and (lse == math.inf).all()
    out, lse = merge_states(*reversed(parts))
    assert out.isnan().all() and (lse == math.inf).all()


def test_merge_states_is_differentiable_and_takes_empty_parts():
    out = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(3, 1, 2, 4, dtype=torch.float64)
    lse[0, 0, 0] = -torch.inf
    lse[:, 0, 1, 2] = -torch.inf
    merged, total = merge_states(*zip(out, lse, strict=True))
    assert (merged[0, 1, 2] == 0).all()
    assert total[0, 1, 2] == -torch.inf
    finite = torch.randn(3, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda o, x: merge_states(*zip(o, x, strict=True)), (out, finite))
    merged.sum().backward()
    assert torch.isfinite(out.grad).all()
    with pytest.raises(ValueError, match="states must agree in shape"):
        merge_states((out[0], lse[0]), (out[0, :, :1], lse[0]))
    with pytest.raises(ValueError, match="at least one"):
        merge_states()


@pytest.mark.parametrize("backend", backends(lambda b: not is_interpreted(b)))
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_layout_stride_and_dtype(backend, data):
    check_any(backend, data.draw)


@pytest.mark.parametrize("backend", backends(is_interpreted))
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_any_shape_layout_stride_and_dtype_interpreted(backend, data):
    check_any(backend, data.draw, most=40)


def check_any(backend, draw, most=150):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    heads, batch = kv_heads * group, draw(st.integers(1, 2))
    seqlens = draw(st.tuples(st.integers(1, most), st.integers(1, most)))
    dtype = draw(st.sampled_from(DTYPES))
    dims = draw(st.tuples(st.integers(1, 80), st.integers(1, 80)))
    q, k, v = make_qkv(
        dtype, batch=batch, heads=heads, kv_heads=kv_heads, seqlens=seqlens, dims=dims
    )
    layout = random_layout(
        seqlens,
        batch=draw(st.sampled_from([1, batch])),
        heads=draw(st.sampled_from([1, kv_heads, heads])),
        block_size=draw(st.tuples(st.integers(1, 80), st.integers(1, 80))),
        keep=draw(st.floats(0, 1)),
        sink=draw(st.integers(0, 20)),
        window=draw(st.integers(0, 60)),
        columns=draw(st.integers(0, 10)),
        column_group=draw(st.integers(1, 4)),
    )
    if draw(st.booleans()):
        layout = replace(layout, window=torch.full_like(layout.window, -1))
    biases = random_biases(draw, batch, heads, seqlens[1])
    softcap, is_causal = draw(st.sampled_from([0.0, 2.0])), draw(st.booleans())
    check(backend, q, k, v, layout, is_causal=is_causal, softcap=softcap, **biases)


@pytest.mark.parametrize("backend", backends(lambda b: b != "reference"))
def test_more_than_2_to_the_31_elements(backend):
    """Offsets beyond 32 bits, in tensors of 4 GiB of which only the touched pages are resident."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    seqlen = 2**25 + 64
    dtype = torch.float16 if is_interpreted(backend) else torch.bfloat16
    k = torch.empty(1, 1, seqlen, 64, dtype=dtype)
    v = torch.empty(1, 1, seqlen, 64, dtype=dtype)
    assert k.numel() > 2**31
    kept = torch.cat([torch.arange(16), torch.arange(seqlen - 64, seqlen)])
    q = torch.randn(1, 2, 1, 64, dtype=dtype)
    k[:, :, kept], v[:, :, kept] = torch.randn(2, 1, 1, 80, 64, dtype=dtype).unbind(0)
    layout = BlockLayout.sink_window((1, seqlen), sink=16, window=64)
    out = sparse_attention(q, k, v, layout, backend=backend)
    mask = torch.ones(1, 1, 1, len(kept), dtype=torch.bool)
    seen = (q, k[:, :, kept], v[:, :, kept])
    exact, _ = dense_attention(*(x.double() for x in seen), mask)
    eager, _ = dense_attention(*seen, mask)
    assert_accurate(out, exact, eager)
