"""Packed sequences and paged caches against one dense call for each sequence."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sparse_attn import BlockLayout, selectors, sparse_attention_varlen
from sparse_attn.contract.arguments import Arguments

from .oracle import (
    BACKENDS,
    CPU_SUFFIXES,
    GPU,
    assert_accurate,
    cases,
    dense_attention,
    is_interpreted,
    on_device,
    random_layout,
)

LENGTHS = {
    "decode": [(1, 70), (1, 0), (1, 5000), (1, 33)],
    "prefill": [(40, 40), (130, 200), (17, 17)],
    "mixed": [(1, 300), (90, 90), (0, 50), (16, 40), (20, 0), (3, 2), (50, 10)],
    "one": [(5, 9)],
    "none": [],
}


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


class Batch:
    """Random sequences, and the same keys packed or in shuffled pages."""

    def __init__(self, lengths, dtype, *, heads=4, kv_heads=2, dim=32, dim_v=40, page_size=None):
        self.lengths = lengths
        self.cu_q, self.cu_kv = (ends([x[i] for x in lengths]) for i in range(2))
        total_q, total_kv = int(self.cu_q[-1]), int(self.cu_kv[-1])
        self.q = torch.randn(total_q, heads, dim).to(dtype)
        self.k = torch.randn(total_kv, kv_heads, dim).to(dtype)
        self.v = torch.randn(total_kv, kv_heads, dim_v).to(dtype)
        self.page_size = page_size
        if page_size:
            self._fill_pages(page_size)

    def _fill_pages(self, size):
        used = [-(-n // size) for _, n in self.lengths]
        numbers = torch.randperm(sum(used) + 3).int()
        shape = (len(numbers), size, self.k.shape[1])
        self.k_pages = torch.full((*shape, self.k.shape[2]), math.nan, dtype=self.k.dtype)
        self.v_pages = torch.full((*shape, self.v.shape[2]), math.nan, dtype=self.v.dtype)
        table = torch.full((len(used), max(used, default=0) + 1), -99, dtype=torch.int32)
        for b, n in enumerate(used):
            table[b, :n], numbers = numbers[:n], numbers[n:]
            for j in range(self.lengths[b][1]):
                page, row, source = table[b, j // size], j % size, int(self.cu_kv[b]) + j
                self.k_pages[page, row] = self.k[source]
                self.v_pages[page, row] = self.v[source]
        self.table = table

    def run(self, layout, *, backend="auto", **options):
        if not self.page_size:
            keys = {"cu_seqlens_kv": self.cu_kv}
            k, v = self.k, self.v
        else:
            lengths = torch.tensor([n for _, n in self.lengths], dtype=torch.int32)
            keys = {"seqlens_kv": lengths, "block_table": self.table}
            k, v = self.k_pages, self.v_pages
        keys |= {"cu_seqlens_q": self.cu_q, "return_lse": True} | options
        return on_device(sparse_attention_varlen, backend, self.q, k, v, layout, **keys)

    def greatest(self):
        return tuple(max((x[i] for x in self.lengths), default=0) for i in range(2))

    def dense(self, layout, dtype, *, is_causal=True, **options):
        """Each sequence with the mask that the layout's definition gives for its lengths."""
        outs, lses = [self.q[:0, :, :1].expand(-1, -1, self.v.shape[2]).to(dtype)], []
        for b, (rows, keys) in enumerate(
            zip(pairwise(self.cu_q), pairwise(self.cu_kv), strict=True)
        ):
            q, k, v = (
                x[i:j].transpose(0, 1)[None].to(dtype)
                for x, (i, j) in ((self.q, rows), (self.k, keys), (self.v, keys))
            )
            mask = self.mask(layout, b, is_causal)
            if k.shape[2] == 0:
                out = q.new_zeros(*q.shape[:3], v.shape[3])
                sink_logits = options.get("sink_logits")
                lse = q.new_full(q.shape[:3], -math.inf)
                if sink_logits is not None:
                    lse[:] = sink_logits[:, None]
            else:
                own = dict(options)
                if "key_bias" in options:
                    bias = options["key_bias"]
                    own["key_bias"] = bias[b % len(bias), None, :, : k.shape[2]]
                out, lse = dense_attention(q, k, v, mask, **own)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        lses = lses or [torch.empty(self.q.shape[1], 0, dtype=dtype)]
        return torch.cat(outs), torch.cat(lses, 1)

    def mask(self, layout, b, is_causal):
        seqlen_q, seqlen_kv = self.lengths[b]
        heads = self.q.shape[1]
        p = torch.arange(seqlen_q)[:, None] + seqlen_kv - seqlen_q
        j = torch.arange(seqlen_kv)[None]
        distance = p - j if is_causal else (p - j).abs()
        full = replace(layout, sink=torch.zeros(1, dtype=torch.int32), window=layout.window[:1] * 0)
        lists = full.to_dense(is_causal=False, num_heads=heads)
        mask = lists[b if lists.shape[0] > 1 else 0, :, :seqlen_q, :seqlen_kv].clone()
        for h in range(heads):
            sink = layout.sink[h * len(layout.sink) // heads]
            window = layout.window[h * len(layout.window) // heads]
            mask[h] |= (j < sink) | (distance < window) | (window == -1)
        return (mask & (j <= p) if is_causal else mask)[None]


def layouts(batch):
    seqlens = batch.greatest()
    num = max(1, len(batch.lengths))
    yield "dense", BlockLayout.dense(seqlens)
    yield "static", BlockLayout.sink_window(seqlens, sink=3, window=20)
    if min(seqlens) == 0:
        return
    for name, size, columns in (("tokens", (1, 1), 0), ("blocks", (16, 64), 5)):
        yield (
            name,
            random_layout(
                seqlens, batch=num, heads=2, block_size=size, sink=4, window=9, columns=columns
            ),
        )
    yield "larger", random_layout((seqlens[0] + 9, seqlens[1] + 99), heads=4, block_size=(32, 16))


def random_biases(batch, layout):
    """Of the layout's keys, of which each sequence takes the first ones."""
    shape = (len(batch.lengths) if layout.seqlen_kv % 2 else 1, 2, layout.seqlen_kv)
    return {"key_bias": torch.randn(shape), "alibi_slopes": torch.rand(4) / 16}


def paged_cases():
    """(backend, dtype, page_size): two page sizes are enough where kernels are interpreted."""
    found = []
    for case in cases():
        backend, dtype = getattr(case, "values", case)
        for page_size in (None, 16) if is_interpreted(backend) else (None, 1, 16, 64):
            marks = getattr(case, "marks", ())
            found.append(pytest.param(backend, dtype, page_size, marks=marks))
    return found


@pytest.mark.parametrize(("backend", "dtype", "page_size"), paged_cases(), ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_against_each_sequence_alone(backend, dtype, page_size, name):
    lengths = LENGTHS[name]
    if is_interpreted(backend):
        lengths = [(min(a, 20), min(b, 100)) for a, b in lengths]
    batch = Batch(lengths, dtype, page_size=page_size)
    for kind, layout in layouts(batch):
        options = {"softcap": 2.0} if kind == "blocks" else {}
        if kind != "static":
            options["sink_logits"] = torch.randn(4)
        if kind in ("dense", "tokens") and lengths:
            options |= random_biases(batch, layout)
        for is_causal in (True, False) if not is_interpreted(backend) else (page_size is None,):
            options["is_causal"] = is_causal
            out, lse = batch.run(layout, backend=backend, **options)
            exact, exact_lse = batch.dense(layout, torch.float64, **options)
            eager, _ = batch.dense(layout, dtype, **options)
            assert_accurate(out, exact, eager, kind)
            torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page_size", [None, 16])
def test_every_instruction_set(isa, dtype, page_size):
    batch = Batch(LENGTHS["mixed"], dtype, page_size=page_size)
    if page_size:  # rows that are no keys lie between the pages
        batch.k_pages, batch.v_pages = (
            torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 2), value=math.nan)[:, 1:-2]
            for x in (batch.k_pages, batch.v_pages)
        )
    for kind, layout in layouts(batch):
        for biases in ({}, random_biases(batch, layout)):
            exact, _ = batch.dense(layout, torch.float64, **biases)
            eager, _ = batch.dense(layout, dtype, **biases)
            out, _ = batch.run(layout, backend="cpu", **biases)
            assert_accurate(out, exact, eager, f"{kind} on {isa}")


def test_unseen_pages_are_never_read():
    batch = Batch([(1, 640), (30, 640)], torch.float32, page_size=16)
    layout = BlockLayout.from_topk(
        torch.tensor([3, 20]).expand(2, 1, 1, 2), block_size=(30, 16), seqlens=(30, 640)
    )
    expected = batch.run(layout)
    for b in range(2):
        for i in range(40):
            if i not in (3, 20):
                batch.k_pages[batch.table[b, i]] = math.nan
                batch.v_pages[batch.table[b, i]] = math.nan
    for a, b in zip(batch.run(layout), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads):
    batch = Batch([(1, 9000), (40, 100), (1, 10)], torch.bfloat16)
    layout = BlockLayout.dense(batch.greatest())
    before = torch.get_num_threads()
    expected = batch.run(layout)
    torch.set_num_threads(threads)
    try:
        for a, b in zip(batch.run(layout), expected, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients(dtype):
    batch = Batch([(5, 9), (0, 3), (20, 20)], dtype, dim=8, dim_v=6)
    layout = random_layout(batch.greatest(), batch=3, heads=2, block_size=(4, 4), window=3)
    sink_logits = torch.randn(4, dtype=dtype, requires_grad=True)
    for x in (batch.q, batch.k, batch.v):
        x.requires_grad_()
    inputs = (batch.q, batch.k, batch.v, sink_logits)
    out, lse = batch.run(layout, sink_logits=sink_logits)
    grads = torch.autograd.grad(out.sin().sum() + lse.sin().sum(), inputs)
    exact_out, exact_lse = batch.dense(layout, torch.float64, sink_logits=sink_logits)
    exact = torch.autograd.grad(exact_out.sin().sum() + exact_lse.sin().sum(), inputs)
    torch.testing.assert_close(grads, exact)


BAD = {
    "both kinds": (lambda c: c.update(block_table=torch.zeros(2, 1, dtype=torch.int32)), "either"),
    "q 4-D": (lambda c: c.update(q=c["q"][None]), r"q must be \[total_q"),
    "k of another head_dim": (lambda c: c.update(k=c["k"][..., :3]), "k must have q's head_dim"),
    "v shorter": (lambda c: c.update(v=c["v"][1:]), "v must have k's shape"),
    "ends of int64": (lambda c: c.update(cu_seqlens_q=c["cu_seqlens_q"].long()), "cu_seqlens_q"),
    "other batch": (lambda c: c.update(cu_seqlens_kv=ends([8])), "cu_seqlens_kv has 2 entries"),
    "descending": (
        lambda c: c.update(cu_seqlens_kv=torch.tensor([0, 9, 8], dtype=torch.int32)),
        r"cu_seqlens_kv\[2\] = 8 follows 9",
    ),
    "beyond k": (lambda c: c.update(cu_seqlens_kv=ends([9, 99])), r"cu_seqlens_kv\[2\] = 108"),
    "not all of q": (lambda c: c.update(cu_seqlens_q=ends([5, 6])), r"cu_seqlens_q\[2\] = 11"),
    "not from 0": (lambda c: c["cu_seqlens_q"].__setitem__(0, 1), "cu_seqlens_q"),
    "longer than the layout": (
        lambda c: c.update(layout=BlockLayout.dense((6, 9))),
        "cu_seqlens_q: sequence 1 has 7 queries, but the layout is for at most 6",
    ),
    "keys longer than the layout": (
        lambda c: c.update(layout=BlockLayout.dense((7, 8))),
        "cu_seqlens_kv: sequence 0 has 9 keys, but the layout is for at most 8",
    ),
    "selector": (lambda c: c.update(layout=selectors.Dense()), "layout must be a BlockLayout"),
    "layout of another batch": (
        lambda c: c.update(layout=random_layout((7, 9), batch=3)),
        "batch size 3",
    ),
    "scale": (lambda c: c.update(scale=math.inf), "scale must be finite"),
    "sink_logits": (
        lambda c: c.update(sink_logits=torch.zeros(3)),
        "sink_logits must be a float tensor",
    ),
}
BAD_PAGES = {
    "page beyond": (
        lambda c: c["block_table"].__setitem__((1, 0), 99),
        r"block_table\[1, 0\] = 99",
    ),
    "page negative": (
        lambda c: c["block_table"].__setitem__((0, 2), -1),
        r"block_table\[0, 2\] = -1",
    ),
    "too few pages": (lambda c: c.update(block_table=c["block_table"][:, :2]), "block_table has 2"),
    "negative length": (
        lambda c: c["seqlens_kv"].__setitem__(1, -1),
        "seqlens_kv: sequence 1 has -1",
    ),
    "without lengths": (lambda c: c.update(seqlens_kv=None), "either cu_seqlens_kv"),
    "rows": (lambda c: c.update(block_table=c["block_table"][:1]), "block_table has 1 entries"),
    "gradients": (lambda c: c["q"].requires_grad_(), "paged cache"),
}


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton" or not GPU])
@pytest.mark.parametrize("name", [*BAD, *BAD_PAGES])
def test_bad_inputs_are_refused(backend, name):
    batch = Batch([(5, 9), (7, 8)], torch.float32, page_size=4)
    call = {"q": batch.q, "layout": BlockLayout.dense((7, 9)), "cu_seqlens_q": batch.cu_q}
    if name in BAD:
        call |= {"k": batch.k, "v": batch.v, "cu_seqlens_kv": batch.cu_kv}
    else:
        lengths = torch.tensor([9, 8], dtype=torch.int32)
        call |= {"k": batch.k_pages, "v": batch.v_pages}
        call |= {"seqlens_kv": lengths, "block_table": batch.table}
    sparse_attention_varlen(**call, backend=backend)
    change, message = (BAD | BAD_PAGES)[name]
    change(call)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        sparse_attention_varlen(**call, backend=backend)


@pytest.mark.parametrize("suffix", CPU_SUFFIXES)
@pytest.mark.parametrize("page_size", [None, 4])
def test_opcheck(suffix, page_size):
    batch = Batch([(5, 9), (20, 20)], torch.float32, page_size=page_size)
    args = Arguments.of(random_layout((20, 20), heads=2), 0.3, 0.0, True)
    if page_size:
        lengths = torch.tensor([9, 20], dtype=torch.int32)
        tensors = (batch.q, batch.k_pages, batch.v_pages, batch.cu_q, None, lengths, batch.table)
    else:
        tensors = (batch.q, batch.k, batch.v, batch.cu_q, batch.cu_kv, None, None)
    op = getattr(torch.ops.sparse_attn, f"attention_varlen{suffix}").default
    torch.library.opcheck(op, (*tensors, 20, 20, *args))
    with pytest.raises(RuntimeError, match="has no gradient"):
        op(batch.q.requires_grad_(), *tensors[1:], 20, 20, *args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("page_size", [None, 4])
def test_compile_fullgraph(dynamic, page_size):
    torch.compiler.reset()
    batch = Batch([(5, 9), (20, 20)], torch.float32, page_size=page_size)
    layout = random_layout((20, 20), heads=2, window=3)
    compiled = torch.compile(batch.run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for a, b in zip(compiled(layout), batch.run(layout), strict=True):
        torch.testing.assert_close(a, b)


def test_strided_inputs_and_autocast():
    batch = Batch([(5, 9), (20, 20)], torch.float32, page_size=4)
    layout = BlockLayout.dense((20, 20))
    expected = batch.run(layout)
    batch.q = batch.q.transpose(0, 2).contiguous().transpose(0, 2)
    batch.k_pages = batch.k_pages.transpose(1, 2).contiguous().transpose(1, 2)
    batch.v_pages = torch.cat([batch.v_pages, batch.v_pages], -1)[..., : batch.v.shape[2]]
    for a, b in zip(batch.run(layout), expected, strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert batch.run(layout)[0].dtype == torch.bfloat16
