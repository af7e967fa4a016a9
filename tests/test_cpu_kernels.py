"""The C++ CPU kernels, each instruction set forced in turn, against float64 with a dense mask."""

from __future__ import annotations

import math

import pytest
import torch

import sparse_attn

from .cpu_calls import _C, DTYPES, ISAS, SIZES, ULP, Case, check, make_qkv, random_lists

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("is_causal", (True, False))
def test_dense(isa, request, dtype, size, is_causal):
    batch, heads, kv_heads, seqlen_q, seqlen_kv, dim, dim_v = size
    generator = torch.Generator().manual_seed(0)
    qkv = make_qkv((batch, heads, seqlen_q, dim), kv_heads, seqlen_kv, dim_v, dtype, generator)
    check(Case(*qkv, window=[-1], is_causal=is_causal), request)


@pytest.mark.parametrize(
    "block", [(1, 1), (16, 16), (48, 48), (64, 64), (128, 128), (64, 16), (16, 64)], ids=str
)
@pytest.mark.parametrize("parts", ["blocks", "columns", "window", "all"])
@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_layouts(isa, request, dtype, block, parts, is_causal):
    generator = torch.Generator().manual_seed(block[0] * 7 + block[1] + len(parts))
    batch, heads, kv_heads, seqlen_q, seqlen_kv = 2, 4, 2, 150, 211
    case = Case(
        *make_qkv((batch, heads, seqlen_q, 48), kv_heads, seqlen_kv, 32, dtype, generator),
        block=block,
        is_causal=is_causal,
        sink=[0, 5],
    )
    rows = -(-seqlen_q // block[0])
    if parts in ("blocks", "all"):
        case.blocks = random_lists(1, 2, rows, -(-seqlen_kv // block[1]), 0.3, generator)
    if parts in ("columns", "all"):
        case.column_group = 2
        case.columns = random_lists(batch, 4, -(-rows // 2), seqlen_kv, 0.2, generator)
    if parts in ("window", "all"):
        case.window = [1, 40, 0, 2**31 - 1] if parts == "window" else [17]
    check(case, request)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", (0.0, 5.0))
@pytest.mark.parametrize("sink_logits", (False, True))
@pytest.mark.parametrize("scale", (None, -0.3, 0.0, 2.0))
def test_score_options(isa, request, dtype, softcap, sink_logits, scale):
    generator = torch.Generator().manual_seed(1)
    case = Case(*make_qkv((1, 4, 90, 64), 2, 70, 64, dtype, generator), window=[-1])
    case.softcap, case.scale = softcap, scale
    case.sink_logits = torch.tensor([-math.inf, 0.0, 3.0, 20.0]) if sink_logits else None
    check(case, request)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(isa, request, dtype):
    generator = torch.Generator().manual_seed(2)
    q, k, v = make_qkv((2, 4, 70, 64), 2, 90, 32, dtype, generator)
    plain = Case(q, k, v, window=[-1])
    expected, expected_lse = plain.run()
    assert expected.is_contiguous()
    transposed = Case(
        *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), window=[-1]
    )
    out, lse = transposed.run()
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    wide = Case(*(torch.cat([x, x + 1], -1)[..., : x.shape[-1]] for x in (q, k, v)), window=[-1])
    assert torch.equal(wide.run()[0], expected)
    expanded = Case(
        q, k[:, :1].expand(-1, 2, -1, -1), v[:, :, :1].expand(-1, -1, 90, -1), window=[-1]
    )
    assert expanded.k.stride(1) == 0 and expanded.v.stride(2) == 0
    check(expanded, request)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_q", (1, 128))
def test_unselected_keys_and_slack_are_never_used(isa, dtype, seqlen_q):
    generator = torch.Generator().manual_seed(3)
    q, k, v = make_qkv((1, 2, seqlen_q, 64), 1, 128 + 37, 64, dtype, generator)
    case = Case(q, k, v, sink=[3], block=(64, 16))
    rows = -(-seqlen_q // 64)
    case.blocks = random_lists(1, 1, 1, 11, 0.3, generator)
    case.blocks = tuple(x.expand(-1, -1, rows, *x.shape[3:]).contiguous() for x in case.blocks)
    case.columns = random_lists(1, 1, 1, 165, 0.05, generator)
    case.columns = tuple(x.expand(-1, -1, rows, *x.shape[3:]).contiguous() for x in case.columns)
    expected, expected_lse = case.run()
    unseen = ~case.mask()[0].any(0).any(0)
    assert 20 < unseen.sum() < 160
    for poison in (math.nan, math.inf):
        slack = torch.full((1, 1, 300, 96), poison, dtype=dtype)
        case.k, case.v = slack.clone()[:, :, 60:225, 16:80], slack.clone()[:, :, 60:225, 16:80]
        case.k[:, :, ~unseen], case.v[:, :, ~unseen] = k[:, :, ~unseen], v[:, :, ~unseen]
        out, lse = case.run()
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_head_of_which_only_the_first_keys_are_packed(isa, dtype):
    seqlen, block, listed = 70_000, 256, 20
    generator = torch.Generator().manual_seed(7)
    q, k, v = make_qkv((1, 1, 16 * block, 256), 1, seqlen, 256, dtype, generator)
    scores = torch.rand(16, seqlen // block, generator=generator)
    scores[:, -1] = 1  # lies behind the packed keys
    lists = scores.topk(listed).indices.sort().values.to(torch.int32)
    counts = torch.full((1, 1, 16), listed, dtype=torch.int32)
    case = Case(q, k, v, blocks=(counts, lists[None, None].contiguous()), block=(block, block))
    case.is_causal = False
    out, lse = case.run()
    rows = torch.tensor([0, 5 * block + 1, 16 * block - 1])
    seen = [(lists[row // block, :, None] * block + torch.arange(block)).flatten() for row in rows]
    for row, keys in zip(rows, seen, strict=True):
        scores = q[0, 0, row].double() @ k[0, 0, keys].double().mT / 16
        exact = scores.softmax(-1) @ v[0, 0, keys].double()
        assert (out[0, 0, row] - exact).abs().max() <= 2 * ULP[dtype] * exact.abs().max()
        assert abs(lse[0, 0, row] - scores.logsumexp(-1)) < 1e-4


def _case_with_lists():
    generator = torch.Generator().manual_seed(4)
    case = Case(*make_qkv((1, 4, 128, 32), 2, 200, 32, torch.float32, generator), block=(32, 16))
    case.blocks = random_lists(1, 4, 4, 13, 0.5, generator)
    case.columns = random_lists(1, 2, 4, 200, 0.1, generator)
    case.sink_logits = torch.zeros(4)
    return case


def _break_blocks(index, value):
    def change(case):
        case.blocks[1][index] = value

    return change


def _break_columns(index, value):
    def change(case):
        case.columns[1][index] = value

    return change


BROKEN = {
    "count too large": (
        lambda c: c.blocks[0].__setitem__((0, 1, 2), 99),
        r"kv_num_blocks\[0, 1, 2\] = 99",
    ),
    "count negative": (
        lambda c: c.columns[0].__setitem__((0, 1, 2), -1),
        r"num_columns\[0, 1, 2\] = -1",
    ),
    "block beyond": (
        _break_blocks((0, 3, 1, 0), 13),
        r"kv_indices\[0, 3, 1, 0\] = 13 is out of range: the layout has 13 key blocks",
    ),
    "block negative": (_break_blocks((0, 0, 0, 0), -2), r"kv_indices\[0, 0, 0, 0\] = -2"),
    "block huge": (_break_blocks((0, 0, 0, 0), 2**31 - 1), r"kv_indices\[0, 0, 0, 0\]"),
    "blocks repeated": (
        lambda c: c.blocks[1].__setitem__((0, 2, 0, 1), int(c.blocks[1][0, 2, 0, 0])),
        r"kv_indices\[0, 2, 0, 1\].*ascending",
    ),
    "column beyond": (
        _break_columns((0, 1, 3, 0), 200),
        r"column_indices\[0, 1, 3, 0\] = 200 .*200 keys",
    ),
    "columns descending": (
        _break_columns((0, 0, 0, 0), 199),
        r"column_indices\[0, 0, 0, 1\].*ascending",
    ),
    "sink negative": (lambda c: setattr(c, "sink", [0, -1]), r"sink\[1\] = -1"),
    "window negative": (lambda c: setattr(c, "window", [-2]), r"window\[0\] = -2"),
    "heads do not divide": (lambda c: setattr(c, "window", [1, 1, 1]), r"window has 3 heads"),
    "counts alone": (
        lambda c: setattr(c, "blocks", (c.blocks[0], None)),
        "kv_indices must be given together",
    ),
    "counts not int32": (
        lambda c: setattr(c, "blocks", (c.blocks[0].long(), c.blocks[1])),
        "kv_num_blocks must be int32",
    ),
    "indices not contiguous": (
        lambda c: setattr(c, "columns", (c.columns[0], c.columns[1].mT.contiguous().mT)),
        "column_indices must be contiguous",
    ),
    "rows do not match": (lambda c: setattr(c, "block", (64, 16)), "kv_num_blocks has 4 rows"),
    "sink_logits too short": (
        lambda c: setattr(c, "sink_logits", torch.zeros(3)),
        "sink_logits has 3 entries",
    ),
    "k of another dtype": (lambda c: setattr(c, "k", c.k.half()), "k must have the dtype of q"),
    "v of another length": (lambda c: setattr(c, "v", c.v[:, :, :-1]), "v has shape"),
    "q not unit stride": (
        lambda c: setattr(c, "q", c.q.mT.contiguous().mT),
        "q must have unit stride",
    ),
    "head_dim too large": (
        lambda c: (
            setattr(c, "q", torch.zeros(1, 4, 128, 257)),
            setattr(c, "k", torch.zeros(1, 2, 200, 257)),
        ),
        "q must have a head dimension",
    ),
    "block size zero": (lambda c: setattr(c, "block", (0, 16)), "block_q must be positive"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_untrusted_layouts_are_refused(isa, name):
    case = _case_with_lists()
    case.run()
    breakage, message = BROKEN[name]
    breakage(case)
    with pytest.raises((ValueError, RuntimeError), match=message):
        case.run()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_bitwise_equal_on_any_number_of_threads(isa, dtype):
    generator = torch.Generator().manual_seed(5)
    case = Case(
        *make_qkv((1, 4, 300, 64), 2, 300, 64, dtype, generator), block=(64, 64), window=[33]
    )
    case.blocks = random_lists(1, 4, 5, 5, 0.5, generator)
    first = case.run()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again = case.run()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_that_outgrow_those_of_the_first_keys(isa, dtype, request):
    """More than once, and by more than a weight may grow; in the last head they shrink."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = make_qkv((1, 3, 70, 64), 3, 1000, 64, dtype, generator)
    growth = torch.linspace(0, 12, 1000)[:, None]
    k = (k * torch.stack([growth, growth.exp2() / 256, growth.flip(0)])).to(dtype)
    check(Case(q, k, v, window=[-1], sink_logits=torch.tensor([0.0, 50.0, 50.0])), request)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_heads_give_the_same_alone_and_on_threads_of_their_own(isa, dtype):
    """So many keys that each thread packs and works on one KV head after the other."""
    generator = torch.Generator().manual_seed(6)
    q, k, v = make_qkv((1, 6, 192, 64), 3, 8192, 64, dtype, generator)
    blocks = random_lists(1, 6, 3, 128, 0.3, generator)
    alone = []
    for h in range(6):
        kv = slice(h // 2, h // 2 + 1)
        case = Case(q[:, h : h + 1], k[:, kv], v[:, kv], block=(64, 64), window=[33])
        case.blocks = tuple(x[:, h : h + 1].contiguous() for x in blocks)
        alone.append(case.run())
    case = Case(q, k, v, block=(64, 64), window=[33])
    case.blocks = blocks
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for together, parts in zip(case.run(), zip(*alone, strict=True), strict=True):
            assert torch.equal(together, torch.cat(parts, 1))


def test_threads_take_turns_where_memory_holds_the_packed_keys_of_one_head(isa):
    generator = torch.Generator().manual_seed(9)
    qkv = make_qkv((1, 3, 70, 256), 3, 66000, 256, torch.bfloat16, generator)
    counts = torch.full((1, 3, 2), 140, dtype=torch.int32)
    picks = [torch.randperm(1031, generator=generator)[:140].sort().values for _ in range(6)]
    case = Case(*qkv, block=(64, 64), window=[66000 // 2], is_causal=True)
    case.blocks = (counts, torch.stack(picks).int().view(1, 3, 2, 140))
    alone = case.run()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, case.run(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim_v", (64, 80))
@pytest.mark.parametrize("rows_first", (False, True))
def test_a_result_that_is_written_past_the_caches_equals_its_parts(isa, dtype, dim_v, rows_first):
    generator = torch.Generator().manual_seed(8)
    q, k, v = make_qkv((1, 16, 1024, 32), 16, 1024, dim_v, dtype, generator)
    if rows_first:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = Case(q, k, v, sink=[3], window=[40]).run()
    assert out.numel() * out.element_size() >= 2**21
    for h in range(0, 16, 4):
        heads = slice(h, h + 4)
        part = Case(q[:, heads], k[:, heads], v[:, heads], sink=[3], window=[40]).run()
        assert torch.equal(out[:, heads], part[0]) and torch.equal(lse[:, heads], part[1])


def test_float32_in_two_terms_where_torch_permits_it():
    q, k, v = torch.randn(3, 2, 2, 300, 48).unbind(0)
    layout = sparse_attn.BlockLayout.sink_window((300, 300), sink=5, window=100)
    exact = sparse_attn.sparse_attention(q.double(), k.double(), v.double(), layout)
    errors, grads, before = {}, [], torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            out = sparse_attn.sparse_attention(q, k, v, layout)
            errors[precision] = float((out - exact).abs().max())
            compiled = torch.compile(sparse_attn.sparse_attention, fullgraph=True, backend="eager")
            assert torch.equal(compiled(q, k, v, layout), out)
            leaf = q.clone().requires_grad_()
            trained = sparse_attn.sparse_attention(leaf, k, v, layout)
            grads.append(torch.autograd.grad(trained.sum(), leaf)[0])
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 2e-6 and errors["high"] < 1e-4
    assert torch.equal(*grads), "gradients are of float32 products"
    if _C.cpu_isa() == "amx":
        assert errors["high"] > 2 * errors["highest"], "AMX was not used"


def test_choice_of_instruction_set():
    assert _C.cpu_isa() == ISAS[-1]
    assert ISAS[0] == "generic"
    with pytest.raises(ValueError, match="unknown instruction set"):
        _C.set_cpu_isa("mmx")
    assert _C.cpu_isa() == ISAS[-1]


def test_long_sums_round_no_more_than_eager(isa):
    """Of thousands of keys, without slack for units in the last place."""
    q = torch.randn(1, 1, 64, 64)
    k, v = torch.randn(2, 1, 1, 8192, 64).unbind(0)
    layout = sparse_attn.BlockLayout.dense((64, 8192))

    def eager(dtype):
        x, y, z = (x.to(dtype) for x in (q, k, v))
        s = x @ y.mT / 8
        return s.softmax(-1) @ z, s.logsumexp(-1)

    ours = sparse_attn.sparse_attention(q, k, v, layout, is_causal=False, return_lse=True)
    for x, exact, theirs in zip(ours, eager(torch.float64), eager(torch.float32), strict=True):
        assert (x - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_long_sums_of_gradients_round_no_more_than_eager(isa):
    q, dout = torch.randn(2, 1, 1, 8192, 64).unbind(0)
    k, v = torch.randn(2, 1, 1, 64, 64).unbind(0)
    layout = sparse_attn.BlockLayout.dense((8192, 64))

    def gradients(attend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves), leaves, dout.to(dtype))

    def eager(q, k, v):
        return (q @ k.mT / 8).softmax(-1) @ v

    def sparse(q, k, v):
        return sparse_attn.sparse_attention(q, k, v, layout, is_causal=False)

    ours = gradients(sparse, torch.float32)
    exact, theirs = gradients(eager, torch.float64), gradients(eager, torch.float32)
    for x, y, z in zip(ours, exact, theirs, strict=True):
        assert (x - y).abs().max() <= 2 * (z - y).abs().max()
