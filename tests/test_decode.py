"""Calls of few query rows on each instruction set: groups of heads, lists, parts of the keys."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .test_cpu_kernels import (
    _C,
    DTYPES,
    ISAS,
    Case,
    check,
    make_qkv,
    random_lists,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def _case(
    *,
    rows=1,
    keys=300,
    heads=8,
    kv_heads=2,
    batch=1,
    dims=(64, 64),
    dtype=torch.float32,
    seed=0,
    block=None,
    list_heads=None,
    density=0.3,
    columns=0.0,
    **options,
):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, rows, dims[0])
    case = Case(*make_qkv(shape, kv_heads, keys, dims[1], dtype, generator), **options)
    list_heads = list_heads or kv_heads
    case.block = block or (rows, 1)
    blocks_q = -(-rows // case.block[0])
    if density:
        blocks = -(-keys // case.block[1])
        case.blocks = random_lists(batch, list_heads, blocks_q, blocks, density, generator)
    if columns:
        groups = -(-blocks_q // case.column_group)
        case.columns = random_lists(1, kv_heads, groups, keys, columns, generator)
    return case


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("rows", range(1, 18))
def test_rows(isa, request, dtype, rows):
    check(_case(rows=rows, dtype=dtype, block=(rows, 16), window=[5], sink=[2]), request)


@pytest.mark.parametrize("rows", (1, 3, 16))
@pytest.mark.parametrize("group", (1, 2, 3, 4, 7, 16, 71))
@pytest.mark.parametrize("list_heads", ("all", "kv", "query"))
def test_groups_of_heads(isa, request, rows, group, list_heads):
    heads = 2 * group
    list_heads = {"all": 1, "kv": 2, "query": heads}[list_heads]
    case = _case(rows=rows, heads=heads, list_heads=list_heads, dims=(32, 16), keys=130)
    if rows == 3:
        case.window = list(range(2 * group))
    check(case, request)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", ((1, 1), (1, 16), (4, 64), (16, 1), (16, 128)), ids=str)
@pytest.mark.parametrize("rows", (1, 7))
@pytest.mark.parametrize("is_causal", (True, False))
def test_lists(isa, request, dtype, block, rows, is_causal):
    case = _case(
        rows=rows,
        block=block,
        dtype=dtype,
        keys=777,
        batch=2,
        columns=0.05,
        column_group=2,
        sink=[3, 0],
        window=[0, 20],
        is_causal=is_causal,
    )
    check(case, request)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(1, 3), (40, 17), (72, 80), (128, 64), (256, 256), (64, 200)])
def test_head_dims(isa, request, dtype, dims):
    check(_case(rows=2, dims=dims, dtype=dtype, window=[-1], density=0, heads=6), request)


LONG = {
    "dense": {"window": [-1], "density": 0},
    "window": {"window": [3000], "density": 0, "sink": [5]},
    "tokens": {"density": 0.5},
    "pages": {"density": 0.6, "block": (4, 64), "columns": 0.01, "window": [300]},
    "few": {"density": 0.01},
    "nothing": {"density": 0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("rows", (1, 4))
def test_keys_in_several_parts(isa, request, dtype, name, rows):
    case = _case(keys=9000, rows=rows, heads=4, kv_heads=1, dtype=dtype, **LONG[name])
    case.sink_logits = torch.tensor([0.0, -math.inf, 1.0, 30.0])
    case.softcap = 3.0 if rows == 4 else 0.0
    check(case, request)


@pytest.mark.parametrize("name", LONG)
def test_any_number_of_threads_gives_the_same_bits(isa, name):
    case = _case(keys=9000, heads=6, kv_heads=3, dtype=torch.bfloat16, **LONG[name] | {"batch": 2})
    first = case.run()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(first, case.run(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (1, 5))
def test_other_keys_and_slack_are_never_used(isa, dtype, rows):
    case = _case(
        rows=rows, keys=5000, dims=(24, 40), dtype=dtype, kv_heads=1, density=0.5, columns=0.01
    )
    expected = case.run()
    unseen = ~case.mask()[0].any(0).any(0)
    assert 1000 < unseen.sum() < 4000
    for poison in (math.nan, math.inf):
        k, v = (torch.full((1, 1, 5100, 96), poison, dtype=dtype) for _ in range(2))
        k[:, :, 60:5060, 16:40][:, :, ~unseen] = case.k[:, :, ~unseen]
        v[:, :, 60:5060, 16:56][:, :, ~unseen] = case.v[:, :, ~unseen]
        views = {"k": k[:, :, 60:5060, 16:40], "v": v[:, :, 60:5060, 16:56]}
        poisoned = Case(**(vars(case) | views))
        for a, b in zip(poisoned.run(), expected, strict=True):
            assert torch.equal(a, b)


def test_transposed_output():
    case = _case(rows=3)
    out, lse = case.run()
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    other, other_lse = case.run()
    assert other.transpose(1, 2).is_contiguous()
    assert torch.equal(out, other) and torch.equal(lse, other_lse)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_case(data):
    draw = data.draw
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 7, 20]))
    rows, keys = draw(st.integers(1, 17)), draw(st.sampled_from([0, 1, 33, 500, 2047, 4100]))
    heads = kv_heads * group
    case = _case(
        rows=rows,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        list_heads=draw(st.sampled_from([1, kv_heads, heads])),
        batch=draw(st.integers(1, 2)),
        dims=(draw(st.integers(1, 70)), draw(st.integers(1, 70))),
        dtype=draw(st.sampled_from(DTYPES)),
        block=(draw(st.integers(1, 20)), draw(st.sampled_from([1, 16, 50, 64]))),
        density=draw(st.sampled_from([0, 0.02, 0.3, 1.0])),
        columns=draw(st.sampled_from([0, 0.02])),
        column_group=draw(st.integers(1, 3)),
        sink=[draw(st.integers(0, 40))],
        window=draw(st.sampled_from([[0], [-1], [7], [0, 3000] if heads % 2 == 0 else [50]])),
        is_causal=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
        scale=draw(st.sampled_from([None, -0.2])),
    )
    exact, exact_lse = case.dense(torch.float64)
    allowed = 2 * (case.dense(case.q.dtype)[0].double() - exact).abs().max().item()
    allowed += 4 * torch.finfo(case.q.dtype).eps * max(1, case.v.abs().max().item() if keys else 1)
    for name in ISAS:
        _C.set_cpu_isa(name)
        try:
            out, lse = case.run()
        finally:
            _C.set_cpu_isa(None)
        assert (out.double() - exact).abs().max() <= allowed
        torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-5, atol=2e-5)
