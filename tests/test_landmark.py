"""Landmark attention against a literal reading of its definition, forward and gradients."""

import pytest
import torch

from sparse_attn import landmark_attention, selectors, sparse_attention
from sparse_attn.landmark import insert_landmarks, is_landmark, landmark_labels

from .oracle import BACKENDS


def literal(q, k, v, block_size, top_k=None, scale=None):
    """Row after row, with whole softmaxes: ``(out, lse)``, differentiable."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group, off = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    outs, lses = [], []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = k[b, h // group], v[b, h // group]
            for i in range(q.shape[2]):
                p = off + i
                if p < 0:
                    outs.append(torch.zeros_like(values[0]))
                    lses.append(torch.tensor(-torch.inf, dtype=q.dtype))
                    continue
                scores = scale * keys @ q[b, h, i]
                own = p // block_size
                normal = [j for j in range(own * block_size, p + 1) if (j + 1) % block_size]
                marks = [n * block_size + block_size - 1 for n in range(own)]
                if top_k is not None:
                    marks = sorted(marks, key=lambda j: -scores[j].item())[:top_k]
                top = scores[normal + marks]
                gamma = top.softmax(0)
                out = gamma[: len(normal)] @ values[normal]
                for weight, mark in zip(gamma[len(normal) :], marks, strict=True):
                    inside = range(mark - block_size + 1, mark)
                    out = out + weight * (scores[inside].softmax(0) @ values[inside])
                outs.append(out)
                lses.append(top.logsumexp(0))
    shape = q.shape[:3]
    return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape)


def inputs(seqlens, dtype=torch.float64, heads=(4, 2), dims=(16, 24), batch=2):
    q = torch.randn(batch, heads[0], seqlens[0], dims[0], dtype=dtype)
    k = torch.randn(batch, heads[1], seqlens[1], dims[0], dtype=dtype)
    v = torch.randn(batch, heads[1], seqlens[1], dims[1], dtype=dtype)
    return q, k, v


SEQLENS = [
    (32, 32),
    (29, 29),
    (1, 40),
    (1, 30),
    (7, 30),
    (13, 27),
    (3, 3),
    (30, 20),
    (5, 0),
    (0, 9),
]


# Each block is several calls, which take long in Triton's interpreter: fewer cases there.
CASES = [
    (backend, seqlens, block_size)
    for backend in BACKENDS
    for seqlens in SEQLENS
    for block_size in (2, 5, 8)
    if backend != "triton" or (block_size == 8 and max(seqlens) <= 30)
]


@pytest.mark.parametrize(("backend", "seqlens", "block_size"), CASES, ids=str)
@pytest.mark.parametrize("top_k", [None, 2])
def test_outputs_and_gradients_are_the_literal_ones(backend, seqlens, block_size, top_k):
    dtype = torch.float64 if backend == "reference" else torch.float32
    exact = [x.requires_grad_() for x in inputs(seqlens)]
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in exact)
    out, lse = landmark_attention(
        q, k, v, block_size=block_size, top_k=top_k, return_lse=True, backend=backend
    )
    limit = dict(atol=1e-10, rtol=1e-10) if dtype == torch.float64 else dict(atol=1e-5, rtol=1e-5)
    if 0 in seqlens:
        assert out.shape == (*q.shape[:3], 24) and not out.any()
        return
    expected, expected_lse = literal(*exact, block_size, top_k)
    torch.testing.assert_close(out.double(), expected, **limit)
    torch.testing.assert_close(lse.double(), expected_lse, **limit)
    dout, seen = torch.randn_like(expected), expected_lse > -torch.inf
    dlse = torch.randn_like(expected_lse)
    grads = torch.autograd.grad((out * dout).sum() + (lse * dlse)[seen].sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * dout).sum() + (expected_lse * dlse)[seen].sum(), exact)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.double(), want, **{x: 3 * y for x, y in limit.items()})
    landmarks = is_landmark(seqlens[1], block_size)
    assert not grads[2][:, :, landmarks].any()
    assert grads[1][:, :, landmarks].any() == (seqlens[1] > block_size)


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"reference"}))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_errors_are_those_of_eager_attention(backend, dtype):
    """At most twice the error of the formula in the same dtype, with float32 softmax."""
    exact = [x.requires_grad_() for x in inputs((60, 60), batch=1, dims=(32, 32))]
    expected, _ = literal(*exact, 9)
    dout = torch.randn_like(expected).to(dtype)
    wanted = torch.autograd.grad(expected, exact, dout.double())
    errors = []
    for attend in (literal, landmark_attention):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in exact)
        if attend is literal:
            out, _ = literal(q, k, v, 9)
        else:
            out = landmark_attention(q, k, v, block_size=9, backend=backend)
        grads = torch.autograd.grad(out, (q, k, v), dout)
        pairs = zip((out, *grads), (expected, *wanted), strict=True)
        errors.append([(x.double() - y).abs().max().item() for x, y in pairs])
    for eager, ours in zip(*errors, strict=True):
        assert ours <= 2 * eager


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in inputs((7, 11), batch=1, heads=(2, 1), dims=(4, 3)))
    for top_k in (None, 1):
        assert torch.autograd.gradcheck(
            lambda q, k, v, n=top_k: landmark_attention(
                q, k, v, block_size=3, top_k=n, return_lse=True
            ),
            (q, k, v),
        )


@pytest.mark.parametrize("seqlens", [(40, 40), (33, 60), (40, 25)], ids=str)
@pytest.mark.parametrize("top_k", [None, 2])
def test_tiles_of_rows_change_nothing(seqlens, top_k, monkeypatch):
    tensors = [x.requires_grad_() for x in inputs(seqlens)]

    def run():
        results = landmark_attention(*tensors, block_size=8, top_k=top_k, return_lse=True)
        seen = results[1] > -torch.inf
        loss = results[0].square().sum() + results[1][seen].square().sum()
        return (*results, *torch.autograd.grad(loss, tensors))

    whole = run()
    monkeypatch.setattr("sparse_attn.landmark.attention._FEWEST_ROWS", 7)
    monkeypatch.setattr("sparse_attn.landmark.attention._TILE_ELEMENTS", 0)
    torch.testing.assert_close(run(), whole)


def test_one_block_is_ordinary_attention():
    q, k, v = inputs((20, 20), torch.float32)
    out = landmark_attention(q, k, v, block_size=21)
    torch.testing.assert_close(out, sparse_attention(q, k, v, selectors.Dense()))


def test_values_of_landmarks_and_later_tokens_are_not_read():
    q, k, v = inputs((40, 40), torch.float32)
    out = landmark_attention(q, k, v, block_size=8)
    v[:, :, is_landmark(40, 8)] = 1e30
    assert torch.equal(landmark_attention(q, k, v, block_size=8), out)
    k[:, :, 24:], v[:, :, 24:] = torch.nan, torch.nan
    again = landmark_attention(q, k, v, block_size=8)
    assert torch.equal(again[:, :, :24], out[:, :, :24])


def test_rows_of_a_cache_are_rows_of_the_whole():
    q, k, v = inputs((50, 50), torch.float32)
    whole = landmark_attention(q, k, v, block_size=7)
    for start, stop in ((0, 13), (13, 14), (14, 35), (35, 50)):
        part = landmark_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], block_size=7)
        torch.testing.assert_close(part, whole[:, :, start:stop], atol=1e-5, rtol=1e-5)


def test_any_strides_and_autocast():
    q, k, v = inputs((33, 33), torch.float32, dims=(16, 16))
    out = landmark_attention(q, k, v, block_size=8)
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(landmark_attention(*strided, block_size=8), out)
    transposed = (x.mT.contiguous().mT for x in (q, k, v))
    torch.testing.assert_close(landmark_attention(*transposed, block_size=8), out)
    expanded = k[:, :1].expand(-1, 2, -1, -1)
    torch.testing.assert_close(
        landmark_attention(q, expanded, expanded, block_size=8),
        landmark_attention(q, k[:, :1], k[:, :1], block_size=8),
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert landmark_attention(q, k, v, block_size=8).dtype == torch.bfloat16


def test_a_compiled_call_is_one_graph():
    q, k, v = (x.requires_grad_() for x in inputs((40, 40), torch.float32))

    def loss(q, k, v):
        return landmark_attention(q, k, v, block_size=16).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(
        torch.autograd.grad(compiled(q, k, v), (q, k, v)),
        torch.autograd.grad(loss(q, k, v), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 1}, "block_size must be an int of at least 2, got 1"),
        ({"block_size": 8.0}, "block_size must be an int of at least 2, got 8.0"),
        ({"block_size": 8, "top_k": 0}, "top_k must be an int of at least 1, got 0"),
        ({"block_size": 8, "scale": float("nan")}, "scale must be finite"),
        ({"block_size": 8, "backend": "none"}, "backend must be 'auto' or one of"),
        ({"block_size": 8, "backend": "triton"}, "backend='triton' cannot run attention"),
    ],
)
def test_bad_arguments_are_named(changes, message, monkeypatch):
    if changes.get("backend") == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=message):
        landmark_attention(*inputs((9, 9), torch.float32), **changes)
    with pytest.raises(ValueError, match="k must have q's head_dim"):
        q, k, v = inputs((9, 9), torch.float32)
        landmark_attention(q[..., :8], k, v, block_size=4)


@pytest.mark.parametrize("tokens", range(14))
@pytest.mark.parametrize("block_size", [2, 4, 7])
def test_landmarks_stand_at_the_ends_of_whole_blocks(tokens, block_size):
    ids = torch.arange(2 * tokens).view(2, tokens)
    marked = insert_landmarks(ids, -1, block_size=block_size)
    marks = is_landmark(marked.shape[1], block_size)
    assert torch.equal(marked == -1, marks.expand(2, -1))
    assert torch.equal(marked[:, ~marks], ids)
    labels = landmark_labels(marked, block_size=block_size, ignore_index=-7)
    for row, wanted in zip(labels.tolist(), marked.tolist(), strict=True):
        for i, label in enumerate(row):
            later = [x for x in wanted[i + 1 :] if x != -1]
            assert label == (later[0] if wanted[i] != -1 and later else -7)


def test_a_block_needs_a_token_besides_its_landmark():
    ids = torch.arange(3)
    for make in (
        lambda: insert_landmarks(ids, 9, block_size=1),
        lambda: landmark_labels(ids, block_size=1),
        lambda: is_landmark(3, 1),
    ):
        with pytest.raises(ValueError, match="block_size must be an int of at least 2, got 1"):
            make()
