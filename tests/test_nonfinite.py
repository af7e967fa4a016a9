"""NaN, infinities, huge and tiny numbers: they come out exactly where float64 eager attention over
the keys that a row sees has them, in out, lse and every gradient.

Where the same in float32 has others, because it rounds a sum to infinity, or a weight that is then
multiplied with infinity to 0, nothing can be asked of a kernel that computes in float32.
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

# Triton, slow in the interpreter, has smaller cases: test_triton_nonfinite.py.
TESTED = backends(lambda backend: backend != "triton")
every_backend = pytest.mark.parametrize("backend", TESTED)


def eager_over_visible(
    q, k, v, mask, *, scale=None, softcap=0.0, sink_logits=None, key_bias=None, alibi_slopes=None
):
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
        if key_bias is not None:
            own_head = h // (q.shape[1] // key_bias.shape[1])
            scores = scores + key_bias[b % len(key_bias), own_head, seen]
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[h] * (i + k.shape[2] - q.shape[2] - seen).abs()
        logits = (
            scores
            if sink_logits is None
            else torch.cat([scores, sink_logits[h : h + 1].to(q.dtype)])
        )
        probs = torch.softmax(logits, 0)[: len(seen)]
        outs.append(probs @ v[b, h // group, seen])
        lses.append(torch.logsumexp(logits, 0) if len(logits) else q.new_tensor(-math.inf))
    return torch.stack(outs).view(*q.shape[:3], -1), torch.stack(lses).view(q.shape[:3])


def gradients(attend, tensors, biases, dout, dlse, dtype):
    """Results and gradients of ``attend(q, k, v, **biases)``, by name."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
    added = {name: x.to(wide, copy=True).requires_grad_() for name, x in biases.items()}
    out, lse = attend(*leaves, **added)
    wanted = [*leaves, *added.values()]
    grads = torch.autograd.grad((out, lse), wanted, (dout.to(out.dtype), dlse.to(lse.dtype)))
    names = ["out", "lse", "dq", "dk", "dv", *(f"d{name}" for name in added)]
    return dict(zip(names, [out.detach(), lse.detach(), *grads], strict=True))


def kind(x: Tensor) -> Tensor:
    """0 for finite numbers, 1, 2 and 3 for inf, -inf and NaN."""
    return (x == math.inf) + 2 * (x == -math.inf) + 3 * x.isnan()


def assert_same(ours: Tensor, exact: Tensor, eager: Tensor, name: str, dtype=None) -> None:
    """NaN and either infinity in the same places; finite values within twice the error of `eager`,
    the same in float32, and the rounding of the inputs' dtype.
    """
    exact, eager = exact.to(ours.dtype), eager.to(ours.dtype)
    sure = kind(eager) == kind(exact)
    differ = sure & (kind(ours) != kind(exact))
    assert not differ.any(), f"{name}: differs at {differ.nonzero()[:4].tolist()}"
    finite = sure & exact.isfinite()
    ours, exact, eager = (torch.where(finite, x.double(), 0) for x in (ours, exact, eager))
    rounding = 1e-4 if (dtype or ours.dtype) == torch.float32 else 4e-2
    if "alibi_slopes" in name:
        rounding *= 4  # scores' gradients, which sum up to zero, are multiplied by distances
    limit = 2 * (eager - exact).abs().max() + rounding * (1 + exact.abs().max())
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


def check(
    backend,
    q,
    k,
    v,
    layout,
    *,
    is_causal,
    dout=None,
    dlse=None,
    sink_logits=None,
    key_bias=None,
    alibi_slopes=None,
    values=True,
    **options,
):
    """Results and gradients against the oracle, on every instruction set; of the gradients only
    what is not finite unless `values`.
    """
    dout = torch.randn(*q.shape[:3], v.shape[-1]).to(q.dtype) if dout is None else dout
    dlse = torch.randn(q.shape[:3]) if dlse is None else dlse
    mask = layout.to_dense(is_causal=is_causal, num_heads=q.shape[1])

    def exact(q, k, v, **biases):
        return eager_over_visible(q, k, v, mask, **biases, **options)

    def ours(q, k, v, **biases):
        return sparse_attention(
            q, k, v, layout, is_causal=is_causal, return_lse=True, backend=backend, **biases,
            **options,
        )  # fmt: skip

    biases = {"sink_logits": sink_logits, "key_bias": key_bias, "alibi_slopes": alibi_slopes}
    biases = {name: x for name, x in biases.items() if x is not None}
    rest = (q, k, v), biases, dout, dlse
    expected, eager = (gradients(exact, *rest, dtype) for dtype in (torch.float64, torch.float32))
    for isa in each_isa(backend):
        alone = ours(q, k, v, **biases)  # without a gradient other kernels may run
        for name, x in zip(("out", "lse"), alone, strict=True):
            assert_same(x, expected[name], eager[name], f"{name} alone, {isa}", q.dtype)
        for name, x in gradients(ours, *rest, q.dtype).items():
            if values or name in ("out", "lse"):
                assert_same(x, expected[name], eager[name], f"{name}, {isa}", q.dtype)
            else:
                assert torch.equal(kind(x), kind(expected[name].to(x.dtype))), f"{name}, {isa}"


def huge(dtype):
    """So that products of two, summed up, are finite in float32; in float16 the greatest number."""
    return 6e4 if dtype == torch.float16 else 1e16


def poison(x: Tensor, kinds: list[str], draw, large: float) -> None:
    """Puts numbers of the kinds into a few places, no two huge ones alike."""
    tiny = 6e-8 if x.dtype == torch.float16 else 1e-40
    values = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": large, "tiny": tiny}
    for i, name in enumerate(kinds):
        value = values[name] / (1 + i)
        place = draw(st.integers(0, x.numel() - 1))
        flat = x.view(-1)
        if draw(st.booleans()):  # a whole row
            row = place // x.shape[-1] * x.shape[-1]
            flat[row : row + x.shape[-1]] = value
        else:
            flat[place] = value


KINDS = st.lists(st.sampled_from(["nan", "inf", "-inf", "huge", "tiny"]), max_size=2)

NOT_FINITE = st.lists(st.sampled_from(["nan", "inf", "-inf"]), max_size=2)


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
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
    sink_logits = torch.randn(heads) if draw(st.booleans()) else None
    if sink_logits is not None:
        sink_logits[0] = draw(st.sampled_from([0.0, 40.0, -math.inf, math.inf, math.nan]))
    key_bias = alibi_slopes = None
    if draw(st.booleans()):
        key_bias = torch.randn(1, draw(st.sampled_from([1, heads])), keys)
        poison(key_bias, draw(NOT_FINITE), draw, 1e16)
    if draw(st.booleans()):
        alibi_slopes = torch.rand(heads)
        alibi_slopes[0] = draw(st.sampled_from([0.0, -0.5, -math.inf, math.inf, math.nan]))
    check(
        backend, q, k, v, draw_layout(draw, (rows, keys), kv_heads), dout=dout, dlse=dlse,
        sink_logits=sink_logits, key_bias=key_bias, alibi_slopes=alibi_slopes,
        is_causal=draw(st.booleans()), softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        scale=draw(st.sampled_from([None, -0.3, 0.0])),
    )  # fmt: skip


@every_backend
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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

    def attend(dtype):
        outs, lses = [], []
        ends = zip(pairwise(batch.cu_q), pairwise(batch.cu_kv), strict=True)
        for b, (rows, keys) in enumerate(ends):
            parts = ((batch.q, rows), (batch.k, keys), (batch.v, keys))
            q, k, v = (x[i:j].transpose(0, 1)[None].to(dtype) for x, (i, j) in parts)
            out, lse = eager_over_visible(q, k, v, batch.mask(layout, b, is_causal))
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, 1)

    expected, eager = attend(torch.float64), attend(torch.float32)
    for isa in each_isa(backend):
        result = batch.run(layout, backend=backend, is_causal=is_causal)
        for x, y, z, name in zip(result, expected, eager, ("out", "lse"), strict=True):
            assert_same(x, y, z, f"{name}, {isa}", dtype)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 40])
def test_scores_up_to_the_largest_number(backend, dtype, rows):
    """All alike, so that any weights are right; and far apart, up to both ends of float32."""
    largest = 3e4 if dtype == torch.float16 else 3e18
    layout = BlockLayout.dense((rows, 40))
    for value in (3e4, largest):
        x = torch.full((1, 1, 40, 64), value, dtype=dtype)
        dout = torch.ones(1, 1, rows, 64, dtype=dtype)
        q, v = x[:, :, -rows:] / 8, x / value
        check(backend, q, x, v, layout, is_causal=True, dout=dout, values=False)
    q = torch.zeros(1, 1, rows, 8, dtype=dtype)
    k, v = torch.zeros(1, 1, 40, 8, dtype=dtype), torch.randn(1, 1, 40, 8).to(dtype)
    q[..., 0] = torch.tensor([largest, -largest]).repeat(rows)[:rows]
    k[..., 0] = torch.linspace(-1, 1, 40) * 35 * largest
    k = k.clamp(-6e4, 6e4) if dtype == torch.float16 else k
    check(backend, q, k, v, layout, is_causal=True, scale=1.0, values=False)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize(
    ("scale", "softcap", "size"),
    [
        (3e38, 0.0, 1e-17),
        (-3e38, 0.0, 1e-17),
        (1e-38, 0.0, 3e18),
        (1e-38, 0.0, 1.0),
        (None, 3e38, 1.0),
        (1.0, 3e38, 1e18),
        (3e38, 3e38, 1e-17),
        (None, 1e-38, 1.0),
        (3e38, 1e-38, 1.0),
        (1e-38, 1e-38, 1.0),
        (1e-38, 3e38, 3e18),
        (1.0, 1e-45, 1.0),
        (0.0, 3e38, 1.0),
    ],
)
def test_scale_and_softcap_at_the_ends_of_float32(backend, dtype, rows, scale, softcap, size):
    q, k, v = torch.randn(3, 1, 2, 40, 16).unbind(0)
    q, k, v = (q[:, :, -rows:] * size).to(dtype), (k * size).to(dtype), v.to(dtype)
    layout = random_layout((rows, 40), block_size=(18, 8), sink=3, window=20)
    sink_logits = torch.tensor([0.0, 1.0])
    check(
        backend,
        q,
        k,
        v,
        layout,
        is_causal=True,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
    )


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("value", [-3.4e38, -1e30, -1e5, 1e5, 1e30, 3.4e38])
def test_biases_up_to_the_largest_number(backend, dtype, rows, value):
    """Of some keys, of all keys, and by their distances; torch's own gradient of lse is wrong
    there.
    """
    q, k, v = (torch.randn(1, 2, n, 16).to(dtype) for n in (rows, 40, 40))
    layout = random_layout((rows, 40), block_size=(18, 8), sink=3, window=20)
    some = torch.where(torch.rand(1, 2, 40) < 0.3, value, torch.randn(1, 2, 40))
    every = torch.full((1, 1, 1), value).expand(1, 1, 40)
    dlse = torch.zeros(1, 2, rows)
    for bias in (some, every):
        check(backend, q, k, v, layout, is_causal=True, dlse=dlse, key_bias=bias)
    slopes = torch.tensor([value / 64, -value / 64])
    check(backend, q, k, v, layout, is_causal=False, dlse=dlse, alibi_slopes=slopes)


@every_backend
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("flush", [False, True])
def test_denormal_numbers_of_float16(backend, rows, flush):
    """They are ordinary ones of float32, whatever torch does to denormal numbers of that."""
    q, k, v = (torch.randn(1, 1, 40, 16).half() * 2.0**-20 for _ in range(3))
    torch.set_flush_denormal(flush)
    try:
        check(
            backend, q[:, :, -rows:], k, v * 2.0**-4, BlockLayout.dense((rows, 40)),
            is_causal=True, scale=2.0**38,
        )  # fmt: skip
    finally:
        torch.set_flush_denormal(False)
