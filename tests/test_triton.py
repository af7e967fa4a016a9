"""What is particular to the Triton backend: tile shapes, splits, orders, transposed lists, and what
it refuses. That it computes the right thing is tested with all other backends.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sparse_attn import BlockLayout, explain, selectors, sparse_attention
from sparse_attn.contract.arguments import Arguments
from sparse_attn.contract.packing import Packing
from sparse_attn.contract.packing import violations as violations_of_packing
from sparse_attn.layout.rules import violations
from sparse_attn.triton import backward, configs, forward, lists
from sparse_attn.triton.launch import Call

from .oracle import GPU, literal_mask, random_layout
from .oracle import sparse_attention as attend
from .test_attention import check, make_qkv
from .test_layout import bad_values

pytestmark = [pytest.mark.gpu] if GPU else []
DEVICE = "cuda" if GPU else "cpu"
interpreted = pytest.mark.skipif(GPU, reason="a test of the interpreter")

LAYOUTS = {
    "blocks": lambda s: random_layout(s, heads=2, block_size=(16, 16), sink=3, window=5),
    "wide blocks": lambda s: random_layout(s, heads=2, block_size=(32, 80), keep=0.6),
    "columns": lambda s: replace(
        random_layout(s, batch=2, block_size=(16, 16), columns=20),
        kv_num_blocks=None,
        kv_indices=None,
    ),
    "both": lambda s: random_layout(s, heads=4, block_size=(8, 4), columns=9, column_group=3),
}


@pytest.mark.parametrize(
    ("dtype", "name", "is_causal"),
    [
        (torch.float16, "blocks", True),
        (torch.float16, "wide blocks", False),
        (torch.float16, "columns", True),
        (torch.float16, "both", False),
        (torch.bfloat16, "both", True),
    ],
    ids=str,
)
def test_16_bits(dtype, name, is_causal):
    q, k, v = make_qkv(dtype, batch=2, seqlens=(40, 90), dims=(24, 40))
    sink_logits = torch.randn(4) if is_causal else None
    check("triton", q, k, v, LAYOUTS[name]((40, 90)), is_causal=is_causal, sink_logits=sink_logits)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_scales(scale, softcap):
    q, k, v = make_qkv(torch.float32, seqlens=(40, 50))
    layout = random_layout((40, 50), heads=2, keep=0.2, window=4)
    sink_logits = torch.tensor([-2.0, 0.0, 1.5, 6.0])
    check("triton", q, k, v, layout, softcap=softcap, scale=scale, sink_logits=sink_logits)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("rows", "name"), [(1, "both"), (3, "dense"), (1, "columns")])
def test_any_number_of_splits(monkeypatch, rows, name, splits):
    monkeypatch.setattr(configs, "num_splits", lambda *args: splits)
    q, k, v = make_qkv(torch.float32, batch=2, heads=8, seqlens=(rows, 300))
    layout = BlockLayout.dense((rows, 300)) if name == "dense" else LAYOUTS[name]((rows, 300))
    sink_logits = torch.randn(8) if rows == 1 else None
    check("triton", q, k, v, layout, sink_logits=sink_logits, softcap=2.0 if rows == 3 else 0.0)


@interpreted
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 64)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_tile(monkeypatch, block_m, block_n, name):
    config = configs.Config(block_m, block_n, 4, 1)
    for kernel in ("forward", "backward_rows", "backward_keys"):
        monkeypatch.setattr(configs, kernel, lambda *args, **sizes: (config,))
    q, k, v = make_qkv(torch.float32, heads=4, kv_heads=1, seqlens=(40, 90))
    layout = LAYOUTS[name]((40, 90))
    if layout.batch == 2:
        q, k, v = (x.repeat(2, 1, 1, 1) for x in (q, k, v))
    check("triton", q, k, v, layout)


def test_splits_keep_a_device_busy():
    target = configs.Target((9, 0), 132)
    assert configs.num_splits(200, 1000, target) == 1
    assert configs.num_splits(8, 1000, target) == 33
    assert configs.num_splits(8, 10, target) == 5
    assert configs.num_splits(1, 10**6, target) == 64
    assert configs.num_splits(1, 1, target) == 1


def _call(layout, *, heads=4, kv_heads=2, batch=2, is_causal=True):
    return Call(layout, heads, kv_heads, batch, None, 0.1, 0.0, is_causal)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("per_tile", [1, 3, 64])
def test_transposed_lists_name_every_pair_once(heads, per_tile):
    layout = random_layout((90, 70), batch=2, heads=heads, block_size=(7, 5))
    transposed = lists.transposed_blocks(_call(layout.to(DEVICE)), per_tile)
    found = []
    for row in range(len(transposed.offsets) - 1):
        begin, end = transposed.offsets[row : row + 2]
        sources = transposed.sources[begin:end].tolist()
        assert sources == sorted(set(sources))
        bits = [1] * len(sources) if per_tile == 1 else transposed.bits[begin:end].tolist()
        for source, entry in zip(sources, bits, strict=True):
            places = [i for i in range(64) if entry >> i & 1]
            found += [(row, source, i) for i in places]
    tiles = transposed.shape[2]
    expected = set()
    for b in range(2):
        for h in range(heads):
            for m in range(layout.num_q_blocks):
                count = layout.kv_num_blocks[b, h, m]
                for n in layout.kv_indices[b, h, m, :count].tolist():
                    expected.add(((b * heads + h) * tiles + n // per_tile, m, n % per_tile))
    assert len(found) == len(set(found))
    assert set(found) == expected


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_active_columns_are_those_of_any_row(heads):
    layout = random_layout((60, 200), batch=2, heads=heads, columns=7, column_group=2)
    keys, transposed = lists.transposed_columns(_call(layout.to(DEVICE)), 64)
    assert keys.shape[:2] == (2, 1 if heads == 1 else 2)
    assert transposed.shape[1] == heads
    for b in range(2):
        for owner in range(keys.shape[1]):
            own = range(owner * heads // keys.shape[1], (owner + 1) * heads // keys.shape[1])
            expected = {
                j
                for h in own
                for g in range(layout.num_column_groups)
                for j in layout.column_indices[b, h, g, : layout.num_columns[b, h, g]].tolist()
            }
            found = keys[b, owner][keys[b, owner] >= 0].tolist()
            assert found == sorted(expected)


@pytest.mark.parametrize("is_causal", [True, False])
def test_rows_with_most_keys_come_first(is_causal):
    layout = random_layout((96, 128), heads=2, block_size=(16, 16), columns=9, sink=9)
    layout = replace(layout, kv_num_blocks=layout.kv_num_blocks * (torch.rand(1, 2, 6) < 0.5).int())
    call = _call(layout, batch=1, is_causal=is_causal)
    order = lists.order_of_rows(call, 16, layout.seqlens)
    assert order.sort().values.tolist() == list(range(12))
    index, pack = order // 2, order % 2
    seen = []
    for row_block, head in zip((5 - index).tolist(), pack.tolist(), strict=True):
        count = (
            layout.kv_num_blocks[0, head, row_block] * 16 + layout.num_columns[0, head, row_block]
        )
        last = row_block * 16 + 15 + 32
        sink = min(int(layout.sink[head]), last + 1)
        end = last + 1 if is_causal else min(last + int(layout.window[head]), 128)
        begin = max(row_block * 16 + 32 - int(layout.window[head]) + 1, sink)
        seen.append(int(count) + sink + max(0, end - begin))
    assert seen == sorted(seen, reverse=True)


def test_what_nobody_sees_may_hold_nan():
    for sink_logits in (None, torch.zeros(4)):
        q, k, v = make_qkv(torch.float32, seqlens=(70, 150))
        k, v = k.contiguous(), v.contiguous()
        layout = random_layout((70, 150), block_size=(16, 8), keep=0.02, columns=2)
        layout = replace(layout, sink=torch.zeros(1, dtype=torch.int32))
        mask = layout.to_dense(is_causal=False)[0, 0]
        idle, unseen = ~mask.any(1), ~mask.any(0)
        assert idle.sum() > 5 and unseen.sum() > 50
        weights = torch.randn(1, 4, 70, 32)

        def gradients(weights, q, k, v, layout=layout, sink_logits=sink_logits):
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            out = attend(
                *leaves, layout, is_causal=False, sink_logits=sink_logits, backend="triton"
            )
            return torch.autograd.grad(out, leaves, weights)

        expected = gradients(weights, q, k, v)
        assert (expected[0][:, :, idle] == 0).all()
        assert all((x[:, :, unseen] == 0).all() for x in expected[1:])
        for poison in (torch.nan, torch.inf):
            weights, q = (torch.where(idle[:, None], poison, x) for x in (weights, q))
            k, v = (torch.where(unseen[:, None], poison, x) for x in (k, v))
            again = gradients(weights, q, k, v)
            assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@interpreted
def test_strides_and_shapes_of_gradients():
    q, k, v = make_qkv(torch.float32, batch=2, seqlens=(20, 20))
    layout = Arguments.of(random_layout((20, 20), window=9), 0.2, 0.0, True)
    out, lse = torch.ops.sparse_attn.attention_triton(q, k, v, *layout)
    dout, dlse = torch.randn(1, 4, 20, 1), torch.randn(2, 4, 1)
    dout, dlse = dout.expand(2, -1, -1, 32), dlse.expand(-1, -1, 20)

    def gradients(*given):
        return torch.ops.sparse_attn.attention_backward_triton(*given, q, k, v, out, lse, *layout)

    expected = gradients(dout.contiguous(), dlse.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(gradients(dout, dlse), expected, strict=True))
    for given, message in (
        ((dout.double(), dlse), "dout has the wrong dtype"),
        ((dout[:, :, 1:], dlse), "dout has shape"),
        ((dout[0], dlse), "dout must have 4 dimensions"),
        ((dout, dlse[:, 1:]), "dlse has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            gradients(*given)


def test_what_float32_is_multiplied_in(monkeypatch):
    chosen = []
    steps = forward.steps
    monkeypatch.setattr(forward, "steps", lambda *args: chosen.append(args[5]) or steps(*args))
    q = torch.randn(1, 1, 4, 16)
    torch.set_float32_matmul_precision("high")
    try:
        attend(q, q, q, selectors.Dense(), backend="triton")
        attend(q.requires_grad_(), q, q, selectors.Dense(), backend="triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    attend(q.detach(), q, q, selectors.Dense(), backend="triton")
    assert chosen == [True, False, False]


def test_violations_are_what_validate_refuses():
    for layout, message in bad_values():
        names = [name for name, bad, _ in violations(layout) if bad.any()]
        assert names[0] == message.split("[")[0]


PACKED = ["descending", "beyond k", "not all of q", "not from 0", "longer than the layout"]
PACKED += ["keys longer than the layout", "page beyond", "page negative", "too few pages"]
PACKED += ["negative length"]


@pytest.mark.parametrize("name", PACKED)
def test_violations_are_what_packed_sequences_are_refused_for(name):
    from .test_varlen import BAD, BAD_PAGES, Batch

    batch = Batch([(5, 9), (7, 8)], torch.float32, page_size=4)
    call = {"layout": BlockLayout.dense((7, 9)), "q": batch.q, "cu_seqlens_q": batch.cu_q}
    call["k"] = batch.k if name in BAD else batch.k_pages
    if name in BAD:
        call["cu_seqlens_kv"] = batch.cu_kv
    else:
        call |= {"seqlens_kv": torch.tensor([9, 8], dtype=torch.int32), "block_table": batch.table}

    def broken():
        packing = Packing(*(call.get(x) for x in Packing.__dataclass_fields__))
        found = violations_of_packing(call["q"], call["k"], packing, call["layout"].seqlens)
        return {field for field, bad, _ in found if bad.any()}

    assert not broken()
    (BAD | BAD_PAGES)[name][0](call)
    expected = "seqlens_kv" if name == "too few pages" else (BAD | BAD_PAGES)[name][1]
    assert any(field in expected for field in broken())


@interpreted
def test_kernels_read_within_their_tensors_whatever_lists_say():
    """As on a GPU, where the check of values does not wait: reads far outside end the process."""
    q, k, v = torch.randn(3, 1, 2, 32, 16).unbind(0)
    garbage = torch.tensor([-(2**31), -7, 2**30, 2**31 - 1], dtype=torch.int32)
    cases = [layout for layout, _ in bad_values()]
    indices = garbage.expand(1, 1, 2, 4).contiguous()
    counts = torch.full((1, 1, 2), 2**31 - 1, dtype=torch.int32)
    none = torch.zeros(1, dtype=torch.int32)
    cases.append(BlockLayout((32, 32), none, none, (16, 16), counts, indices, counts, indices))
    for layout in cases:
        call = _call(layout, heads=2, batch=1)
        bias = torch.randn(1, 2, layout.seqlen_kv)
        call = replace(call, key_bias=bias, alibi_slopes=torch.rand(2))
        steps, (out, lse) = forward.steps(call, q, k, v, None, False, configs.INTERPRETER)
        more, gradients = backward.steps(
            call, out, torch.zeros_like(lse), q, k, v, out, lse, configs.INTERPRETER
        )
        for step in steps + more:
            step()
        assert all(torch.isfinite(x).all() for x in (out, *gradients))


@pytest.mark.skipif(not GPU, reason="a test of a GPU")
@pytest.mark.parametrize("name", sorted({message.split("[")[0] for _, message in bad_values()}))
def test_a_gpu_asserts_what_validate_refuses(name):
    """In processes of their own, as none can use the GPU after a failed assertion."""
    code = f"""
import torch
from sparse_attn import sparse_attention
from tests.test_layout import bad_values
layout = next(x for x, message in bad_values() if message.startswith("{name}["))
q = torch.randn(1, 2, layout.seqlen_q, 16, device="cuda")
k = torch.randn(1, 2, layout.seqlen_kv, 16, device="cuda")
sparse_attention(q, k, k, layout.to("cuda"))
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and f"{name}: " in done.stderr + done.stdout


def test_where_it_cannot_run():
    q = torch.randn(1, 1, 4, 8)
    assert explain(q, q, q).backend in ("cpu", "reference")
    for x, reason in (
        (q.double(), "the dtype is torch.float64"),
        (torch.randn(1, 1, 4, 300), "head_dim is 300; it takes 1 to 256"),
    ):
        with pytest.raises(ValueError, match=rf"(?s)triton: .*{reason}"):
            sparse_attention(x, x, x, selectors.Dense(), backend="triton")


def test_cpu_tensors_are_refused_outside_the_interpreter():
    code = """
import torch, sys, sparse_attn
q = torch.randn(1, 1, 4, 8)
try:
    sparse_attn.sparse_attention(q, q, q, sparse_attn.selectors.Dense(), backend="triton")
except ValueError as error:
    assert "triton: q is on cpu; it takes GPU tensors (CPU tensors only" in str(error), error
else:
    raise AssertionError("a CPU tensor must be refused")
assert "sparse_attn.triton.ops" not in sys.modules
"""
    env = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr("sparse_attn.triton.support.INSTALLED", False)
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="triton: triton is not installed"):
        sparse_attention(q, q, q, selectors.Dense(), backend="triton")


def test_literal_mask_at_the_edges_of_int32():
    """Windows and sink_logits as large as int32 holds: positions must not overflow."""
    most = 2**31 - 1
    for sink, window in ((most, 0), (0, most), (most, most)):
        layout = BlockLayout.sink_window((20, 30), sink=sink, window=window)
        mask = literal_mask(layout, is_causal=True)
        assert mask.sum() == sum(range(11, 31))
        q, k, v = make_qkv(torch.float32, seqlens=(20, 30))
        for is_causal in (True, False):
            check("triton", q, k, v, layout, is_causal=is_causal)
