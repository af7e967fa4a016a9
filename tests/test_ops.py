"""The ops as torch sees them: gradcheck, opcheck, torch.compile, autocast."""

import pytest
import torch
import torch._dynamo.testing

from sparse_attn import (
    BlockLayout,
    scaled_dot_product_attention,
    selectors,
    sparse_attention,
)
from sparse_attn.contract.arguments import Arguments

from .oracle import CPU_SUFFIXES, random_layout


def _inputs(dtype, *, requires_grad=False, seqlens=(9, 13), dim=8):
    q = torch.randn(2, 4, seqlens[0], dim, dtype=dtype)
    k, v = torch.randn(2, 2, 2, seqlens[1], dim, dtype=dtype).unbind(0)
    return [x.clone().requires_grad_(requires_grad) for x in (q, k, v)]


def _layout(seqlens=(9, 13)):
    return random_layout(
        seqlens, heads=2, block_size=(4, 4), sink=2, window=3, columns=3, column_group=2
    )


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradcheck(softcap, with_sinks):
    layout = _layout((5, 7))
    q, k, v = _inputs(torch.float64, requires_grad=True, seqlens=(5, 7), dim=3)
    sink_logits = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None

    def attend(q, k, v, sink_logits):
        out, lse = sparse_attention(
            q,
            k,
            v,
            layout,
            softcap=softcap,
            sink_logits=sink_logits,
            return_lse=True,
            backend="reference",
        )
        return out, lse.clamp(min=-100)

    assert torch.autograd.gradcheck(attend, (q, k, v, sink_logits))


VARIANTS = ["lists", "no lists", "sink_logits", "biases", "transposed"]
OPCHECKS = [(x, variant) for x in ("attention", "attention_reference") for variant in VARIANTS]
OPCHECKS += [("attention_triton", "sink_logits")] if "_triton" in CPU_SUFFIXES else []


@pytest.mark.parametrize(("name", "variant"), OPCHECKS)
def test_opcheck_forward(name, variant):
    q, k, v = _inputs(torch.float32, requires_grad=True)
    layout = BlockLayout.dense((9, 13)) if variant == "no lists" else _layout()
    sink_logits = torch.randn(4, requires_grad=True) if variant == "sink_logits" else None
    if variant == "transposed":
        q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    op = getattr(torch.ops.sparse_attn, name).default
    biases = _biases() if variant == "biases" else {}
    arguments = Arguments.of(layout, 0.3, 0.0, True, sink_logits, **biases)
    torch.library.opcheck(op, (q, k, v, *arguments))


def _biases():
    """The keys' bias in an order of its own, that of gradients being the usual one."""
    key_bias = torch.randn(13, 2, 2).permute(1, 2, 0)
    return {"key_bias": key_bias, "alibi_slopes": torch.rand(4, requires_grad=True)}


BACKWARD_OPCHECKS = [(x, variant) for x in CPU_SUFFIXES for variant in ("", "sink_logits")]
BACKWARD_OPCHECKS += [("", "biases"), ("_reference", "biases")]


@pytest.mark.parametrize(("suffix", "variant"), BACKWARD_OPCHECKS)
def test_opcheck_backward(suffix, variant):
    name = f"attention{suffix}"
    q, k, v = _inputs(torch.float32)
    sink_logits = torch.randn(4) if variant == "sink_logits" else None
    biases = _biases() if variant == "biases" else {}
    biases = {name: x.detach() for name, x in biases.items()}
    layout = Arguments.of(_layout(), 0.3, 0.0, True, sink_logits, **biases)
    out, lse = getattr(torch.ops.sparse_attn, name)(q, k, v, *layout)
    op = getattr(torch.ops.sparse_attn, f"attention_backward{suffix}").default
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    torch.library.opcheck(op, (dout, dlse, q, k, v, out, lse, *layout))


def test_gradients_only_where_asked():
    q, k, v = _inputs(torch.float32)
    out = sparse_attention(q, k.requires_grad_(), v, _layout())
    out.sum().backward()
    assert q.grad is None
    assert v.grad is None
    assert k.grad is not None


SELECTORS = {
    "layout": None,
    "dense": selectors.Dense(),
    "sink window": selectors.SinkWindow(2, 4),
    "block top-k": selectors.BlockTopK(1, 4, 1, 2),
    "static union": selectors.SlidingWindow(3) | selectors.SinkWindow(1, 2),
}


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(name, dynamic):
    torch.compiler.reset()
    q, k, v = _inputs(torch.float32, requires_grad=True)
    source = SELECTORS[name] or _layout()

    def attend(q, k, v, source):
        out, lse = sparse_attention(2 * q, k, v, source, return_lse=True)
        return out.sin(), lse

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected, got = attend(q, k, v, source), compiled(q, k, v, source)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(x[0].sum(), (q, k, v)) for x in (got, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("arguments", [{}, {"selector": selectors.SlidingWindow(3)}])
def test_compile_fullgraph_of_torchs_function(arguments):
    torch.compiler.reset()
    q, k, v = (x[:, :2] for x in _inputs(torch.float32))

    def attend(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True, **arguments).sin()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


def test_compile_with_inductor():
    torch.compiler.reset()
    q, k, v = _inputs(torch.float32)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    layout = _layout()
    compiled = torch.compile(lambda *x: sparse_attention(*x, layout) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), sparse_attention(q, k, v, layout) + 1)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return sparse_attention(q, k, v, selectors.SinkWindow(2, 4))

    q, k, v = _inputs(torch.float32)
    program = torch.export.export(Module(), (q, k, v))
    torch.testing.assert_close(program.module()(q, k, v), Module()(q, k, v))


def test_autocast_and_checkpoint():
    q, k, v = _inputs(torch.float32, requires_grad=True)
    layout = _layout()
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_attention(q, k, v, layout)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == torch.float32

    def loss(q, k, v):
        return sparse_attention(q, k, v, layout).square().sum()

    direct = torch.autograd.grad(loss(q, k, v), (q, k, v))
    again = torch.utils.checkpoint.checkpoint(loss, q, k, v, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, (q, k, v)), direct)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func():
    q, k, v = _inputs(torch.float32)
    layout = _layout()

    def loss(q, k, v):
        return sparse_attention(q, k, v, layout).square().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2))(q, k, v), expected)
    pairs = [torch.stack([x, 2 * x]) for x in (q, k, v)]
    per_sample = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*pairs)
    torch.testing.assert_close(tuple(x[0] for x in per_sample), expected)
    _, pullback = torch.func.vjp(loss, q, k, v)
    torch.testing.assert_close(pullback(torch.ones(())), expected)


LENGTHS = (96, 128, 200)
COUNTED = {
    "Dense": selectors.Dense(),
    "SinkWindow": selectors.SinkWindow(sink=4, window=32),
    "BlockTopK": selectors.BlockTopK(top_k=2, block_size=16, sink=4, window=16),
    "Union": selectors.SinkWindow(sink=4, window=32) | selectors.BlockTopK(2, 16, 4, 16),
    "drop-in": None,
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_code_serves_all_lengths(name, dynamic):
    """Once for the first length and once for all others; once if told that lengths vary."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def attend(q, k):
        if name == "drop-in":
            return scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        return sparse_attention(q, k, k, COUNTED[name])

    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=dynamic)
    for seqlen in LENGTHS:
        q, k, _ = _inputs(torch.float32, seqlens=(seqlen, seqlen))
        torch.testing.assert_close(compiled(q, k), attend(q, k))
    assert counter.frame_count <= (1 if dynamic else 2)


def test_compiled_code_serves_all_layouts():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(sparse_attention, backend=counter, fullgraph=True)
    for seqlen in LENGTHS:
        q, k, v = _inputs(torch.float32, seqlens=(seqlen, seqlen))
        layout = COUNTED["BlockTopK"](q, k)
        torch.testing.assert_close(compiled(q, k, v, layout), sparse_attention(q, k, v, layout))
    assert counter.frame_count <= 2
