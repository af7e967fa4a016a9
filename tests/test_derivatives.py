"""Second derivatives and forward mode, which go through plain torch operations."""

import pytest
import torch

from sparse_attn import scaled_dot_product_attention, selectors, sparse_attention

from .oracle import CPU_SUFFIXES, assert_accurate, dense_attention, random_layout

BACKENDS = ["cpu" if suffix == "" else suffix[1:] for suffix in CPU_SUFFIXES]


@pytest.fixture(autouse=True)
def two_rows_at_once(monkeypatch):
    monkeypatch.setattr("sparse_attn.reference.derivatives._CHUNK_ELEMENTS", 2 * 2 * 4 * 7)


def _case(dtype, with_sinks):
    """q, k, v, sink_logits and a layout with rows that see nothing."""
    q = torch.randn(2, 4, 5, 3, dtype=dtype)
    k, v = torch.randn(2, 2, 2, 7, 3, dtype=dtype).unbind(0)
    layout = random_layout((5, 7), heads=2, block_size=(2, 2), keep=0.5, columns=2, column_group=3)
    layout.kv_num_blocks[:, :, 0], layout.num_columns[:, 1] = 0, 0
    sees = layout.to_dense(num_heads=4).any(-1)
    assert sees.any() and not sees.all()
    tensors = [q, k, v] + ([torch.randn(4, dtype=dtype)] if with_sinks else [])
    return [x.requires_grad_() for x in tensors], layout


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_against_finite_differences(softcap, with_sinks):
    tensors, layout = _case(torch.float64, with_sinks)

    def attend(q, k, v, sink_logits=None):
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

    assert torch.autograd.gradgradcheck(attend, tensors, fast_mode=True)
    assert torch.autograd.gradcheck(
        attend, tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )


def _second(attend, tensors):
    """Gradients of a function of all first gradients."""
    out, lse = attend(*tensors)
    loss = out.square().sum() + lse.clamp(min=-100).square().sum()
    first = torch.autograd.grad(loss, tensors, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_those_of_every_backend(backend, dtype):
    if (backend, dtype) == ("triton", torch.bfloat16):
        dtype = torch.float16  # Triton's interpreter has no bfloat16
    tensors, layout = _case(dtype, True)
    mask = layout.to_dense(num_heads=4)

    def ours(q, k, v, sink_logits):
        return sparse_attention(
            q, k, v, layout, sink_logits=sink_logits, return_lse=True, backend=backend
        )

    def eager(q, k, v, sink_logits):
        return dense_attention(q, k, v, mask, sink_logits=sink_logits)

    exact = _second(eager, [x.detach().double().requires_grad_() for x in tensors])
    names = ("q", "k", "v", "sink_logits")
    for name, *grads in zip(names, _second(ours, tensors), exact, _second(eager, tensors)):  # noqa: B905
        assert_accurate(*grads, name)


TRANSFORMS = {
    "hessian": torch.func.hessian,
    "jacrev jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "jacfwd jacfwd": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "jacrev jacfwd": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "third": lambda f: torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(f))),
    "autograd": lambda f: lambda x: torch.autograd.functional.hessian(f, x),
    "vmap": lambda f: lambda x: torch.func.vmap(torch.func.hessian(f))(torch.stack([x, 2 * x])),
    "along a tangent": lambda f: lambda x: torch.func.jvp(torch.func.grad(f), (x,), (x + 1,))[1],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    x = torch.randn(1, 1, 3, 2, dtype=torch.float64)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()

    def ours(x):
        return sparse_attention(x, x, x, selectors.Dense(), backend="reference").pow(3).sum()

    def plain(x):
        scores = (x @ x.mT / 2**0.5).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ x).pow(3).sum()

    torch.testing.assert_close(TRANSFORMS[name](ours)(x), TRANSFORMS[name](plain)(x))


def test_those_of_the_drop_in():
    """torch's own kernel on CPUs has none of them."""
    q, k, v = torch.randn(3, 1, 2, 128, 8).unbind(0)

    def attend(q):
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def math(q):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    tangent = torch.randn_like(q)
    results = []
    for function in (attend, math):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, tangent)
            along = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
        leaf = q.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
        results.append((along, *torch.autograd.grad((first * tangent).sum(), leaf)))
    torch.testing.assert_close(*results)
