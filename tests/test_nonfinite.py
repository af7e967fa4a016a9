"""NaN, infinities, huge and tiny numbers: they come out exactly where float64 eager attention over
the keys that a row sees has them, in out, lse and every gradient.

Drawn so that float32 rounds nothing to infinity, and no weight is 0 in float32 alone: there eager
attention in float32 and in float64 differ themselves.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_attn import BlockLayout

from .oracle import DTYPES, backends, random_layout, sparse_attention
from .test_varlen import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

TESTED = backends(lambda backend: backend != "triton")
every_backend = pytest.mark.parametrize("backend", TESTED)


def eager_over_visible(q, k, v, mask, *, scale=None, softcap=0.0, sinks=None):
    """``(out, lse)``, row by row over the keys that it sees: what is hidden is not there."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = mask.expand(q.shape[0], q.shape[1], -1, -1)
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        seen = mask[b, h, i].nonzero().flatten()
        scores = (k[b, h // group, seen] @ q[b, h, i]) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        logits = scores if sinks is None else torch.cat([scores, sinks[h : h + 1].to(q.dtype)])
        probs = torch.softmax(logits, 0)[: len(seen)]
        outs.append(probs @ v[b, h // group, seen])
        lses.append(torch.logsumexp(logits, 0) if len(logits) else q.new_tensor(-math.inf))
    return torch.stack(outs).view(*q.shape[:3], -1), torch.stack(lses).view(q.shape[:3])


def gradients(attend, tensors, dout, dlse, dtype):
    """Results and gradients of ``attend(q, k, v, sinks)``, by name."""
    leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in tensors[:3]]
    sinks = tensors[3]
    if sinks is not None:
        sinks = sinks.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
    out, lse = attend(*leaves, sinks)
    wanted = leaves + ([] if sinks is None else [sinks])
    grads = torch.autograd.grad((out, lse), wanted, (dout.to(out.dtype), dlse.to(lse.dtype)))
    names = ["out", "lse", "dq", "dk", "dv", "dsinks"]
    return dict(zip(names, [out.detach(), lse.detach(), *grads], strict=False))


def assert_same(ours: Tensor, exact: Tensor, name: str) -> None:
    """NaN and either infinity in the same places, and finite values within rounding."""
    exact = exact.to(ours.dtype).double()
    low_precision = ours.dtype in (torch.bfloat16, torch.float16)
    ours = ours.double()
    for kind, found in (
        ("NaN", torch.isnan),
        ("inf", lambda x: x == math.inf),
        ("-inf", lambda x: x == -math.inf),
    ):
        differ = found(ours) != found(exact)
        assert not differ.any(), f"{name}: {kind} differs at {differ.nonzero()[:4].tolist()}"
    finite = exact.isfinite()
    ours, exact = (torch.where(finite, x, 0) for x in (ours, exact))
    limit = (4e-2 if low_precision else 2e-4) * exact.abs().max() + 1e-37
    error = (ours - exact).abs().max()
    assert error <= limit, f"{name}: error {error:.3g} > {limit:.3g}"


def each_isa(backend):
    """The instruction sets that a backend is to be run with."""
    if backend != "cpu":
        yield None
        return
    from sparse_attn import _C

    try:
        for name in _C.supported_cpu_isas():
            _C.set_cpu_isa(name)
            yield name
    finally:
        _C.set_cpu_isa(None)


def check(backend, q, k, v, layout, *, is_causal, dout=None, dlse=None, sinks=None, **options):
    """Results and gradients against the oracle, on every instruction set."""
    dout = torch.randn(*q.shape[:3], v.shape[-1]).to(q.dtype) if dout is None else dout
    dlse = torch.randn(q.shape[:3]) if dlse is None else dlse
    mask = layout.to_dense(is_causal=is_causal, num_heads=q.shape[1])

    def exact(q, k, v, sinks):
        return eager_over_visible(q, k, v, mask, sinks=sinks, **options)

    def ours(q, k, v, sinks):
        return sparse_attention(
            q, k, v, layout, is_causal=is_causal, sinks=sinks, return_lse=True, backend=backend,
            **options,
        )  # fmt: skip

    tensors = (q, k, v, sinks)
    expected = gradients(exact, tensors, dout, dlse, torch.float64)
    for isa in each_isa(backend):
        alone = ours(*tensors)  # without a gradient other kernels may run
        for name, x in zip(("out", "lse"), alone, strict=True):
            assert_same(x, expected[name], f"{name} alone, {isa}")
        for name, x in gradients(ours, tensors, dout, dlse, q.dtype).items():
            assert_same(x, expected[name], f"{name}, {isa}")


def huge(dtype):
    """So that products of two, summed up, are finite in float32; in float16 the greatest number."""
    return 6e4 if dtype == torch.float16 else 1e16


def poison(x: Tensor, kinds: list[str], draw, large: float) -> None:
    """Puts numbers of the kinds into a few places."""
    tiny = 6e-8 if x.dtype == torch.float16 else 1e-40
    values = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": large, "tiny": tiny}
    for kind in kinds:
        place = draw(st.integers(0, x.numel() - 1))
        flat = x.view(-1)
        if draw(st.booleans()):  # a whole row
            row = place // x.shape[-1] * x.shape[-1]
            flat[row : row + x.shape[-1]] = values[kind]
        else:
            flat[place] = values[kind]


KINDS = st.lists(st.sampled_from(["nan", "inf", "-inf", "huge", "tiny"]), max_size=2)


def draw_layout(draw, seqlens, heads):
    kind = draw(st.sampled_from(["dense", "window", "lists"]))
    if kind == "dense":
        return BlockLayout.dense(seqlens)
    if kind == "window":
        return BlockLayout.sink_window(seqlens, sink=draw(st.integers(0, 3)), window=7)
    return random_layout(
        seqlens, heads=heads, block_size=draw(st.sampled_from([(1, 1), (8, 4), (32, 16)])),
        keep=0.4, sink=2, window=5, columns=3,
    )  # fmt: skip


@every_backend
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_is_not_finite_comes_out_where_eager_has_it(backend, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(DTYPES))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 2)]))
    rows, keys = draw(st.sampled_from([(1, 40), (7, 33), (16, 20), (40, 40), (20, 90), (35, 20)]))
    dim, dim_v = draw(st.sampled_from([(16, 16), (5, 9), (32, 17)]))
    q = torch.randn(1, heads, rows, dim).to(dtype)
    k = torch.randn(1, kv_heads, keys, dim).to(dtype)
    v = torch.randn(1, kv_heads, keys, dim_v).to(dtype)
    dout, dlse = torch.randn(1, heads, rows, dim_v).to(dtype), torch.randn(1, heads, rows)
    for x in (q, k, v, dout):
        poison(x, draw(KINDS), draw, huge(dtype))
    sinks = torch.randn(heads) if draw(st.booleans()) else None
    if sinks is not None:
        sinks[0] = draw(st.sampled_from([0.0, 40.0, -math.inf, math.inf, math.nan]))
    check(
        backend, q, k, v, draw_layout(draw, (rows, keys), kv_heads), dout=dout, dlse=dlse,
        sinks=sinks, is_causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        scale=draw(st.sampled_from([None, -0.3, 0.0])),
    )  # fmt: skip


@every_backend
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_packed_and_paged(backend, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    dtype, is_causal = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    batch = Batch([(1, 40), (20, 30), (5, 3), (3, 50)], dtype, dim=16, dim_v=24)
    for x in (batch.q, batch.k, batch.v):
        poison(x, draw(KINDS), draw, huge(dtype))
    batch.page_size = draw(st.sampled_from([None, 1, 16]))
    if batch.page_size:
        batch._fill_pages(batch.page_size)
    layout = draw_layout(draw, batch.greatest(), 2)
    outs, lses = [], []
    for b, (rows, keys) in enumerate(zip(pairwise(batch.cu_q), pairwise(batch.cu_kv), strict=True)):
        parts = ((batch.q, rows), (batch.k, keys), (batch.v, keys))
        q, k, v = (x[i:j].transpose(0, 1)[None].double() for x, (i, j) in parts)
        out, lse = eager_over_visible(q, k, v, batch.mask(layout, b, is_causal))
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    for isa in each_isa(backend):
        out, lse = batch.run(layout, backend=backend, is_causal=is_causal)
        assert_same(out, torch.cat(outs), f"out, {isa}")
        assert_same(lse, torch.cat(lses, 1), f"lse, {isa}")
