"""NaN, infinities, huge and denormal numbers in the Triton backend: they come out exactly where
float64 eager attention over the keys that a row sees has them, forward and backward; and lists that
change after they were checked lead nowhere outside the tensors.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sparse_attn import BlockLayout
from sparse_attn.contract.arguments import Arguments
from sparse_attn.contract.packing import Packing
from sparse_attn.triton import backward, configs, forward, lists, prepare
from sparse_attn.triton.launch import Call

from .oracle import GPU, random_layout, sparse_attention
from .test_varlen import Batch

pytestmark = [pytest.mark.usefixtures("one_thread")] + ([pytest.mark.gpu] if GPU else [])
interpreted = pytest.mark.skipif(GPU, reason="a test of the interpreter")
drawn = settings(  # without shrinking, which takes minutes in the interpreter
    deadline=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def eager(q, k, v, mask, *, scale=None, softcap=0.0, sink_logits=None):
    """``(out, lse)``, each row over the keys that it sees and the sink logit alone."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = mask.expand(*q.shape[:2], *mask.shape[2:])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    outs, lses = [], []
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        seen = mask[b, h, i]
        scores = k[b, h, seen] @ q[b, h, i] * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if sink_logits is not None:
            scores = torch.cat([scores, sink_logits[h, None].to(scores.dtype)])
        weights = torch.softmax(scores, 0)[: int(seen.sum())]
        outs.append(weights @ v[b, h, seen])
        lses.append(scores.logsumexp(0) if len(scores) else scores.new_tensor(-math.inf))
    return torch.stack(outs).view(*q.shape[:3], -1), torch.stack(lses).view(q.shape[:3])


def with_gradients(attend, q, k, v, sink_logits, dout, dlse):
    """out, lse and the gradients."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sink_logits) if x is not None]
    out, lse = attend(*leaves[:3], sink_logits=None if sink_logits is None else leaves[3])
    grads = torch.autograd.grad((out, lse), leaves, (dout.to(out.dtype), dlse.to(lse.dtype)))
    return [x.detach() for x in (out, lse, *grads)]


def assert_same(found, exact, eager=None):
    """NaN and both infinities in the same places, finite numbers close, or twice as close as those
    of eager attention in float32; for each of `NAMES`.
    """
    tolerance = 3e-2 if found[0].dtype in (torch.float16, torch.bfloat16) else 3e-4
    eager = exact if eager is None else eager
    for name, x, y, z in zip(NAMES, found, exact, eager, strict=False):
        noise = torch.where(y.isfinite() & z.isfinite(), z - y, 0).abs().max()
        y = y.to(x.dtype)
        kinds = [torch.where(z.isfinite(), 0, z).double() for z in (x, y)]
        message = f"{name}:\n{x}\n{y}"
        assert torch.equal(*(z.nan_to_num(7, 8, 9) for z in kinds)), message
        finite = [torch.where(y.isfinite(), z, 0).double() for z in (x, y)]
        error, size = (finite[0] - finite[1]).abs().max(), finite[1].abs().max()
        assert error <= tolerance * size + 2 * noise + 1e-30, f"{message}\nerror {error}"


def check(
    q, k, v, layout, *, is_causal=True, sink_logits=None, dout=None, dlse=None, twice_eager=False,
    **options,
):  # fmt: skip
    dout = torch.randn(*q.shape[:3], v.shape[-1]).to(q.dtype) if dout is None else dout
    dlse = torch.randn(q.shape[:3]) if dlse is None else dlse
    mask = layout.to_dense(is_causal=is_causal, num_heads=q.shape[1])

    def exact(q, k, v, sink_logits):
        return eager(q, k, v, mask, sink_logits=sink_logits, **options)

    def ours(q, k, v, sink_logits):
        return sparse_attention(
            q, k, v, layout, is_causal=is_causal, sink_logits=sink_logits, return_lse=True,
            backend="triton", **options,
        )  # fmt: skip

    tensors = [q, k, v, sink_logits, dout, dlse]
    doubles = [None if x is None else x.double() for x in tensors]
    singles = [None if x is None else x.float() for x in tensors]
    noisy = with_gradients(exact, *singles) if twice_eager else None
    assert_same(with_gradients(ours, *tensors), with_gradients(exact, *doubles), noisy)


def poison(x, draw):
    """Puts up to two special numbers into an element or a row each: in float32 no product of huge
    ones overflows.
    """
    huge, tiny = (6e4, 6e-8) if x.dtype == torch.float16 else (1e16, 1e-40)
    values = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": huge, "tiny": tiny}
    for n, kind in enumerate(draw(st.lists(st.sampled_from(sorted(values)), max_size=2))):
        place = draw(st.integers(0, x.numel() - 1))
        begin, end = place, place + 1
        if draw(st.booleans()):
            begin = place // x.shape[-1] * x.shape[-1]
            end = begin + x.shape[-1]
        x.view(-1)[begin:end] = values[kind] / (1 + n)


def draw_layout(draw, seqlens, heads=2):
    kind = draw(st.sampled_from(["dense", "window", "lists", "columns"]))
    if kind == "dense":
        return BlockLayout.dense(seqlens)
    if kind == "window":
        return BlockLayout.sink_window(seqlens, sink=draw(st.integers(0, 3)), window=7)
    layout = random_layout(
        seqlens, heads=draw(st.sampled_from([1, heads])),
        block_size=draw(st.sampled_from([(8, 4), (32, 16)])), keep=0.4, sink=2, window=5, columns=6,
    )  # fmt: skip
    return layout if kind == "lists" else replace(layout, kv_num_blocks=None, kv_indices=None)


@settings(drawn, max_examples=10)
@given(data=st.data())
def test_what_is_not_finite_comes_out_where_eager_has_it(data):
    """Prefill and decoding, split or not."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(DTYPES))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    rows, keys = draw(st.sampled_from([(1, 200), (3, 140), (20, 40), (30, 20), (40, 70)]))
    dim, dim_v = draw(st.sampled_from([(16, 16), (8, 40)]))
    q, k = torch.randn(1, heads, rows, dim), torch.randn(1, kv_heads, keys, dim)
    v, dout = torch.randn(1, kv_heads, keys, dim_v), torch.randn(1, heads, rows, dim_v)
    q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))
    for x in (q, k, v, dout):
        poison(x, draw)
    sink_logits = torch.randn(heads) if draw(st.booleans()) else None
    if sink_logits is not None:
        sink_logits[0] = draw(st.sampled_from([0.0, 40.0, -math.inf, math.inf, math.nan]))
    check(
        q, k, v, draw_layout(draw, (rows, keys), heads), sink_logits=sink_logits, dout=dout,
        is_causal=draw(st.booleans()), softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        scale=draw(st.sampled_from([None, None, -0.3, 0.0])),
    )  # fmt: skip


@settings(drawn, max_examples=4)
@given(data=st.data())
def test_packed_and_paged(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    dtype, is_causal = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    batch = Batch([(1, 90), (20, 30), (5, 3), (3, 50)], dtype, dim=16, dim_v=24)
    for x in (batch.q, batch.k, batch.v):
        poison(x, draw)
    batch.page_size = draw(st.sampled_from([None, 1, 16]))
    if batch.page_size:
        batch._fill_pages(batch.page_size)
    layout = draw_layout(draw, batch.greatest())
    found = batch.run(layout, backend="triton", is_causal=is_causal)
    outs, lses = [], []
    for b, (rows, keys) in enumerate(zip(pairwise(batch.cu_q), pairwise(batch.cu_kv), strict=True)):
        parts = ((batch.q, rows), (batch.k, keys), (batch.v, keys))
        q, k, v = (x[i:j].transpose(0, 1)[None].double() for x, (i, j) in parts)
        out, lse = eager(q, k, v, batch.mask(layout, b, is_causal))
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    assert_same(found, (torch.cat(outs), torch.cat(lses, 1)))


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_of_scores_that_are_all_infinite_or_nan(monkeypatch, splits):
    """Unlike rows that see no key, which are 0 with an lse of -inf."""
    monkeypatch.setattr(configs, "num_splits", lambda *args: splits)
    layout = BlockLayout.sink_window((4, 150), sink=0, window=120)
    layout = replace(layout, window=torch.tensor([120, 0], dtype=torch.int32))
    k, v = torch.ones(1, 2, 150, 16), torch.randn(1, 2, 150, 16)
    q = torch.zeros(1, 2, 4, 16)
    q[:, :, :, 0] = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    for sink_logits in (None, torch.tensor([1.0, 2.0]), torch.tensor([-math.inf, 0.0])):
        check(q, k, v, layout, sink_logits=sink_logits)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_hidden_infinity_beside_a_visible_one(monkeypatch, splits):
    """Rows of one tile that see some of the keys that are not finite, or none."""
    monkeypatch.setattr(configs, "num_splits", lambda *args: splits)
    for poisoned in (1, 2):
        tensors = [torch.randn(1, 2, n, 16) for n in (20, 130, 130)]
        tensors[poisoned][:, :, [3, 115, 129], ::3] = torch.tensor([math.inf, -math.inf, math.nan])[
            :, None
        ]
        check(*tensors, BlockLayout.sink_window((20, 130), sink=1, window=9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 40])
def test_scores_up_to_the_largest_number(dtype, rows):
    """All alike: any weights are right, gradients know how many; and far apart."""
    values = (2.0**15,) if dtype == torch.float16 else (2.0**15, 2.0**60)  # no sum is rounded
    for value in values:
        k = torch.full((1, 1, 40, 64), value, dtype=dtype)
        q, v = k[:, :, -rows:] / 8, torch.ones_like(k)
        v[:, :, ::2] = 2
        dout = torch.randn(1, 1, rows, 64).to(dtype)
        grads = [torch.randn(1, 1, rows), dout]
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        layout = BlockLayout.dense((rows, 40))
        out, lse = sparse_attention(*leaves, layout, return_lse=True, backend="triton")
        mask = layout.to_dense(is_causal=True)
        exact, exact_lse = eager(q.double(), k.double(), v.double(), mask)
        assert_same((out.detach(), lse.detach()), (exact, exact_lse))
        (dv,) = torch.autograd.grad((lse, out), leaves[2], grads)
        weights = mask[0, 0] / mask[0, 0].sum(1, keepdim=True)
        exact = weights.double().T @ dout[0, 0].double()
        torch.testing.assert_close(dv[0, 0].double(), exact, rtol=3e-2, atol=3e-2)
    q, k = torch.zeros(1, 1, rows, 8, dtype=dtype), torch.zeros(1, 1, 40, 8, dtype=dtype)
    q[..., 0] = torch.tensor([values[-1], -values[-1]]).repeat(rows)[:rows]
    k[..., 0] = torch.linspace(-1, 1, 40) * (6e4 if dtype == torch.float16 else 64 * values[-1])
    v, dout = torch.randn(1, 1, 40, 8).to(dtype), torch.zeros(1, 1, rows, 8, dtype=dtype)
    dlse = torch.zeros(1, 1, rows)
    check(q, k, v, BlockLayout.dense((rows, 40)), scale=1.0, dout=dout, dlse=dlse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("scale", "softcap", "exponent"),
    [
        (3e38, 0.0, -56),
        (-3e38, 0.0, -56),
        (1e-38, 0.0, 60),
        (1e-38, 0.0, 0),
        (None, 3e38, 0),
        (1.0, 3e38, 60),
        (3e38, 3e38, -56),
        (None, 1e-38, 0),
        (3e38, 1e-38, 0),
        (1e-38, 1e-38, 0),
        (1e-38, 3e38, 60),
        (1.0, 1e-45, 0),
        (0.0, 3e38, 0),
    ],
)
def test_scale_and_softcap_at_the_ends_of_float32(dtype, scale, softcap, exponent):
    """Of products that no order of sums rounds, as numpy's depends on where in a tile they are."""
    q, k = torch.randint(-4, 5, (2, 1, 2, 40, 16)) * 2.0**exponent
    q, k, v = (x.to(dtype) for x in (q[:, :, :5], k, torch.randn(1, 2, 40, 16)))
    layout = BlockLayout.sink_window((5, 40), sink=3, window=20)
    sink_logits = torch.tensor([0.0, 1.0])
    check(q, k, v, layout, scale=scale, softcap=softcap, sink_logits=sink_logits, twice_eager=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_up_to_the_largest_number(dtype):
    """Sums of them overflow, means do not."""
    q, k = torch.randn(1, 1, 5, 16).to(dtype), torch.randn(1, 1, 200, 16).to(dtype)
    v = torch.full((1, 1, 200, 16), torch.finfo(dtype).max / 1.01, dtype=dtype)
    layout = BlockLayout.dense((5, 200))
    found = sparse_attention(q, k, v, layout, return_lse=True, backend="triton")
    mask = layout.to_dense(is_causal=True)
    assert_same(found, eager(q.double(), k.double(), v.double(), mask))


# --- lists that change after they were checked

WILD = (-(2**31), 10**6, 2**31 - 1)


def fenced(*shape):
    """Random numbers in the middle of a tensor of NaN: what reads its surroundings shows."""
    x = torch.full((3 * math.prod(shape),), math.nan)
    inner = x[math.prod(shape) : 2 * math.prod(shape)].view(shape)
    return inner.copy_(torch.randn(shape))


def disturbed(monkeypatch, tensors):
    """Fills all `tensors` with a wild number behind the back of a call that has checked them:
    before its first kernel is described, or before the first one runs. Yields for each number and
    time the module that is disturbed.
    """
    good = [x.clone() for x in tensors]
    for wild, module in itertools.product(WILD, (prepare, forward, backward)):
        name = "launches" if module is prepare else "steps"
        describe = getattr(module, name)

        def then_wild(*args, wild=wild, is_first=module is prepare, describe=describe):
            found = None if is_first else describe(*args)
            for x in tensors:
                x.fill_(wild)
            return describe(*args) if is_first else found

        for x, y in zip(tensors, good, strict=True):
            x.copy_(y)
        with monkeypatch.context() as context:
            context.setattr(module, name, then_wild)
            yield module


@interpreted
def test_lists_that_change_during_a_call(monkeypatch):
    q, k, v = fenced(1, 2, 24, 16), fenced(1, 2, 40, 16), fenced(1, 2, 40, 16)
    layout = random_layout((24, 40), heads=2, block_size=(16, 8), sink=1, window=3, columns=9)
    biases = {"key_bias": fenced(1, 2, 40), "alibi_slopes": torch.rand(2)}
    arguments = [Arguments.of(layout, 0.25, 0.0, x, **biases) for x in (True, False)]
    attend = torch.ops.sparse_attn.attention_triton
    gradients = torch.ops.sparse_attn.attention_backward_triton
    results = [attend(q, k, v, *x) for x in arguments]
    dout, dlse = torch.randn(1, 2, 24, 16), torch.zeros(1, 2, 24)
    tensors = list(layout.tensors().values())
    for n, module in enumerate(disturbed(monkeypatch, tensors)):
        given = arguments[n // 3 % 2]
        if module is forward:
            found = attend(q, k, v, *given)
        else:
            found = gradients(dout, dlse, q, k, v, *results[n // 3 % 2], *given)
        assert all(not x.isnan().any() for x in found)


@interpreted
@pytest.mark.parametrize("paged", [True, False])
def test_sequences_that_change_during_a_call(monkeypatch, paged):
    def int32(*values):
        return torch.tensor(values, dtype=torch.int32)

    shape = (5, 8, 2, 16) if paged else (39, 2, 16)
    q, k, v = fenced(9, 2, 16), fenced(*shape), fenced(*shape)
    ends = int32(0, 4, 9)
    packing = Packing(ends, int32(0, 9, 39))
    if paged:
        packing = Packing(ends, None, int32(9, 30), int32(1, 0, 0, 0, 0, 2, 3, 4).view(2, 4))
    tensors = [x for x in vars(packing).values() if x is not None]
    attend = torch.ops.sparse_attn.attention_varlen_triton
    layout = Arguments.of(BlockLayout.dense((5, 30)), 0.25, 0.0, True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # not all rows are some sequence's
    for _ in disturbed(monkeypatch, tensors):
        out, lse = attend(q, k, v, *vars(packing).values(), 5, 30, *layout)
        assert out.shape == q.shape and lse.shape == (2, 9)


@interpreted
def test_columns_that_change_while_they_are_transposed(monkeypatch):
    layout = random_layout((24, 40), heads=2, block_size=(16, 8), columns=9)
    call = Call(layout, 2, 2, 1, None, 0.25, 0.0, True)
    where = torch.where

    def then_wild(*args):
        layout.column_indices.fill_(10**6)
        return where(*args)

    keys, _ = lists.transposed_columns(call, 64)
    assert keys.max() >= 0
    monkeypatch.setattr(torch, "where", then_wild)
    keys, _ = lists.transposed_columns(call, 64)
    assert ((keys >= -1) & (keys < 40)).all()
