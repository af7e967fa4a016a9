"""The C++ gradients, each instruction set forced in turn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_attn import BlockLayout, sparse_attention
from sparse_attn.contract.arguments import Arguments

from .oracle import DTYPES, random_layout
from .test_attention import check, make_qkv, random_biases

pytest.importorskip("sparse_attn._C")
pytestmark = pytest.mark.usefixtures("one_thread")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))

LAYOUTS = {
    "dense": lambda s: BlockLayout.dense(s),
    "window": lambda s: BlockLayout.sink_window(s, window=50),
    "one key": lambda s: BlockLayout.sink_window(s, window=1),
    "sink window": lambda s: BlockLayout.sink_window(s, sink=40, window=7),
    "single rows": lambda s: random_layout(s, heads=2, block_size=(1, 1), keep=0.1),
    "narrow": lambda s: random_layout(s, heads=4, block_size=(16, 8), sink=9, window=20),
    "odd": lambda s: random_layout(s, heads=4, block_size=(47, 21), columns=5, column_group=2),
    "wide": lambda s: random_layout(s, batch=2, heads=2, block_size=(128, 64)),
    "columns": lambda s: replace(
        random_layout(s, batch=2, block_size=(64, 64), columns=40),
        kv_num_blocks=None,
        kv_indices=None,
    ),
}
SIZES = [
    ((290, 290), True),
    ((290, 290), False),
    ((65, 310), True),
    ((140, 60), True),
    ((1, 300), False),
]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("seqlens", "is_causal"), SIZES, ids=str)
def test_layouts(isa, dtype, layout, seqlens, is_causal):
    q, k, v = make_qkv(dtype, batch=2, seqlens=seqlens, dims=(40, 24))
    check("cpu", q, k, v, LAYOUTS[layout](seqlens), is_causal=is_causal)


@every_dtype
@pytest.mark.parametrize("dims", [(1, 1), (64, 64), (96, 130), (128, 64), (256, 256)], ids=str)
def test_head_dims(isa, dtype, dims):
    q, k, v = make_qkv(dtype, seqlens=(150, 150), dims=dims)
    check("cpu", q, k, v, random_layout((150, 150), block_size=(64, 32), window=10))


@every_dtype
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
@pytest.mark.parametrize("sink_logits", [None, (-2.0, 0.0, 1.5, 6.0)], ids=["", "sink_logits"])
def test_score_options(isa, dtype, softcap, scale, sink_logits):
    q, k, v = make_qkv(dtype, batch=2, seqlens=(90, 70))
    layout = random_layout((90, 70), heads=4, keep=0.2, window=4)
    sink_logits = None if sink_logits is None else torch.tensor(sink_logits)
    check("cpu", q, k, v, layout, softcap=softcap, scale=scale, sink_logits=sink_logits)


@every_dtype
@pytest.mark.parametrize("bias_shape", [(1, 1), (1, 3), (2, 2), (2, 6)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(("seqlens", "is_causal"), [((310, 330), True), ((65, 300), False)])
def test_biases(isa, dtype, bias_shape, softcap, seqlens, is_causal):
    """Three heads of a bias span the two KV heads."""
    q, k, v = make_qkv(dtype, batch=2, heads=6, kv_heads=2, seqlens=seqlens, dims=(24, 40))
    layout = random_layout(seqlens, heads=2, block_size=(47, 32), sink=3, window=90, columns=5)
    check(
        "cpu", q, k, v, layout, is_causal=is_causal, softcap=softcap, sink_logits=torch.randn(6),
        key_bias=torch.randn(*bias_shape, seqlens[1]), alibi_slopes=torch.rand(6) / 16,
    )  # fmt: skip


@every_dtype
@pytest.mark.parametrize("shared", [True, False])
def test_biases_of_a_batch_without_entries_or_heads_without_keys(isa, dtype, shared):
    for batch, keys in ((0, 70), (2, 0)):
        q, k, v = make_qkv(dtype, batch=batch, seqlens=(70, keys))
        bias = torch.randn(1 if shared else batch, 2, keys)
        layout = BlockLayout.dense((70, keys))
        arguments = Arguments.of(layout, 0.2, 0.0, True, torch.zeros(4), bias, torch.zeros(4))
        out, lse = torch.ops.sparse_attn.attention(q, k, v, *arguments)
        results = torch.ops.sparse_attn.attention_backward(out, lse, q, k, v, out, lse, *arguments)
        for x, y in zip(results[4:], (bias, torch.zeros(4)), strict=True):
            assert torch.equal(x, torch.zeros_like(y))
        assert results[3].shape == (4,) and (batch > 0 or (results[3] == 0).all())


@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
@given(data=st.data())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape_layout_and_stride(isa, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    seqlens = draw(st.tuples(st.integers(1, 300), st.integers(1, 300)))
    q, k, v = make_qkv(
        draw(st.sampled_from(DTYPES)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        seqlens=seqlens,
        dims=draw(st.tuples(st.integers(1, 80), st.integers(1, 80))),
    )
    layout = random_layout(
        seqlens,
        heads=draw(st.sampled_from([1, kv_heads, kv_heads * group])),
        block_size=draw(st.tuples(st.integers(1, 150), st.integers(1, 150))),
        keep=draw(st.floats(0, 1)),
        sink=draw(st.integers(0, 40)),
        window=draw(st.integers(0, 100)),
        columns=draw(st.integers(0, 20)),
        column_group=draw(st.integers(1, 3)),
    )
    biases = random_biases(draw, 1, kv_heads * group, seqlens[1])
    softcap, is_causal = draw(st.sampled_from([0.0, 2.0])), draw(st.booleans())
    check("cpu", q, k, v, layout, is_causal=is_causal, softcap=softcap, **biases)


@every_dtype
def test_bitwise_equal_on_any_number_of_threads(isa, dtype):
    q, k, v = make_qkv(dtype, seqlens=(700, 900))
    layout = random_layout((700, 900), heads=4, block_size=(64, 64), sink=40, window=300)
    grads = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        shapes = {"sink_logits": (4,), "key_bias": (1, 1, 900), "alibi_slopes": (4,)}
        biases = {name: torch.rand(x, requires_grad=True) for name, x in shapes.items()}
        out, lse = sparse_attention(*leaves, layout, **biases, return_lse=True, backend="cpu")
        loss = (out * torch.randn(out.shape, dtype=dtype)).sum() + lse.sum()
        grads.append(torch.autograd.grad(loss, (*leaves, *biases.values())))
    for again in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], again, strict=True))


@every_dtype
def test_strides_of_the_gradient(isa, dtype):
    q, k, v = make_qkv(dtype, batch=2)
    layout = Arguments.of(random_layout((70, 70), window=9), 0.2, 0.0, True)
    out, lse = torch.ops.sparse_attn.attention(q, k, v, *layout)
    dout, dlse = torch.randn(1, 4, 70, 1, dtype=dtype), torch.randn(2, 4, 1)
    dout, dlse = dout.expand(2, -1, -1, 32), dlse.expand(-1, -1, 70)

    def gradients(*given):
        return torch.ops.sparse_attn.attention_backward(*given, q, k, v, out, lse, *layout)

    expected = gradients(dout.contiguous(), dlse.contiguous())
    turned = dout.contiguous().transpose(1, 2).contiguous().transpose(1, 2)
    for pair in ((dout, dlse), (turned, dlse.contiguous())):
        assert all(torch.equal(a, b) for a, b in zip(gradients(*pair), expected, strict=True))


@every_dtype
@pytest.mark.parametrize("sink_logits", [None, torch.zeros(4)], ids=["", "sink_logits"])
def test_what_nobody_sees_may_hold_nan(isa, dtype, sink_logits):
    q, k, v = make_qkv(dtype, seqlens=(130, 300))
    k, v = k.contiguous(), v.contiguous()
    layout = random_layout((130, 300), block_size=(16, 8), keep=0.02, columns=2)
    layout = replace(layout, sink=torch.zeros(1, dtype=torch.int32))
    mask = layout.to_dense(is_causal=False)[0, 0]
    idle, unseen = ~mask.any(1), ~mask.any(0)
    assert idle.sum() > 10 and unseen.sum() > 100
    arguments = Arguments.of(layout, 0.2, 0.0, False, sink_logits)
    out, lse = torch.ops.sparse_attn.attention(q, k, v, *arguments)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)

    def gradients(dout, q, k, v):
        return torch.ops.sparse_attn.attention_backward(dout, dlse, q, k, v, out, lse, *arguments)

    expected = gradients(dout, q, k, v)
    dq, dk, dv, *_ = expected
    assert (dq[:, :, idle] == 0).all()
    assert (dk[:, :, unseen] == 0).all() and (dv[:, :, unseen] == 0).all()
    for poison in (torch.nan, torch.inf):
        dout, q = (torch.where(idle[:, None], poison, x) for x in (dout, q))
        k, v = (torch.where(unseen[:, None], poison, x) for x in (k, v))
        again = gradients(dout, q, k, v)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


BROKEN = {
    "dout has the wrong dtype": lambda x: x | {"dout": x["dout"].double()},
    "dout has shape": lambda x: x | {"dout": x["dout"][:, :, 1:]},
    "dlse has shape": lambda x: x | {"dlse": x["dlse"][:, 1:]},
    "lse has the wrong dtype": lambda x: x | {"lse": x["lse"].double()},
    "out must have 4 dimensions": lambda x: x | {"out": x["out"][0]},
}


@pytest.mark.parametrize("message", BROKEN)
def test_wrong_gradients_are_refused(message):
    q, k, v = make_qkv(torch.float32)
    layout = Arguments.of(BlockLayout.dense((70, 70)), 0.2, 0.0, True)
    out, lse = torch.ops.sparse_attn.attention(q, k, v, *layout)
    given = {"dout": out, "dlse": lse, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    given = BROKEN[message](given)
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.sparse_attn.attention_backward(*given.values(), *layout)


def test_broken_layouts_are_refused(isa):
    q, k, v = make_qkv(torch.float32)
    layout = random_layout((70, 70))
    arguments = Arguments.of(layout, 0.2, 0.0, True)
    out, lse = torch.ops.sparse_attn.attention(q, k, v, *arguments)
    layout.kv_num_blocks[0, 0, 1] = 99
    with pytest.raises((ValueError, RuntimeError), match=r"kv_num_blocks\[0, 0, 1\] = 99"):
        torch.ops.sparse_attn.attention_backward(out, lse, q, k, v, out, lse, *arguments)
