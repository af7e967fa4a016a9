"""`scaled_dot_product_attention` is torch's function, and refuses by name what a selector cannot
do.
"""

import csv
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db

import sparse_attn
from sparse_attn import selectors
from sparse_attn.ops.dense import torch_is_faster

from .oracle import DTYPES, assert_accurate, dense_attention, rounding_noise, short_id

ours = sparse_attn.scaled_dot_product_attention
INFO = next(x for x in op_db if x.name == "nn.functional.scaled_dot_product_attention")


@pytest.mark.parametrize("is_causal", [False, True])
def test_small_calls_are_torchs(monkeypatch, is_causal):
    q, k, v = torch.randn(3, 1, 2, 60, 40).unbind(0)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert not torch.equal(ours(q, k, v, is_causal=is_causal), expected), "no kernel of ours ran"
    monkeypatch.undo()
    assert torch.equal(ours(q, k, v, is_causal=is_causal), expected)
    longer = torch.randn(1, 2, 400, 40)
    served = ours(longer, longer, longer, is_causal=is_causal)
    assert torch.equal(
        served, ours(longer, longer, longer, is_causal=is_causal, selector=_dense(longer))
    )


RESULTS = sorted((Path(__file__).parents[1] / "bench" / "results").glob("drop-in-*.csv"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_calls_that_torch_was_measured_to_do_faster_are_left_to_it(monkeypatch, path):
    monkeypatch.undo()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 100
    for row in rows:
        q, k = (
            torch.empty(
                (1, int(row[heads]), int(row[seqlen]), int(row["head_dim"])),
                dtype=getattr(torch, row["dtype"]),
                device="meta",
            )
            for heads, seqlen in (("num_heads", "seqlen_q"), ("kv_heads", "seqlen_kv"))
        )
        left = torch_is_faster(q, k)
        assert left == (row["left to torch"] == "1"), "measured with another rule: measure anew"
        assert left or float(row["vs torch"]) > 0.95, row  # a twentieth is noise


def test_nested_tensors_are_torchs():
    x = torch.nested.nested_tensor([torch.randn(2, 5, 8), torch.randn(2, 7, 8)])
    expected = F.scaled_dot_product_attention(x, x, x)
    for a, b in zip(ours(x, x, x).unbind(), expected.unbind(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="q is a nested tensor"):
        ours(x, x, x, selector=selectors.Dense())
    with pytest.raises(ValueError, match="q is a nested tensor"):
        sparse_attn.sparse_attention(x, x, x, selectors.Dense())


def _dense(x):
    return sparse_attn.BlockLayout.dense((x.shape[2], x.shape[2]))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_every_sample_of_torchs_own_opinfo(dtype, requires_grad):
    samples = list(INFO.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    assert len(samples) > 20
    for sample in samples:
        torch.manual_seed(0)
        expected = F.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
        torch.manual_seed(0)
        out = ours(sample.input, *sample.args, **sample.kwargs)
        assert out.requires_grad == expected.requires_grad
        exact_inputs = [x.detach().double() for x in (sample.input, *sample.args)]
        if not torch.equal(out, expected):
            exact = F.scaled_dot_product_attention(*exact_inputs, **sample.kwargs)
            assert_accurate(out, exact, expected)
        if requires_grad:
            _check_gradients(sample, out, expected, exact_inputs)


def _check_gradients(sample, out, expected, exact_inputs):
    tensors = (sample.input, *sample.args, *sample.kwargs.values())
    inputs = [x for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad]
    got, want = (torch.autograd.grad(x.sum(), inputs) for x in (out, expected))
    if all(torch.equal(*pair) for pair in zip(got, want, strict=True)):
        return
    leaves = [x.requires_grad_() for x in exact_inputs]
    exact = F.scaled_dot_product_attention(*leaves, **sample.kwargs)
    exact_grads = torch.autograd.grad(exact.sum(), leaves)
    q, k, v = (x.detach() for x in leaves)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask = mask.tril() if sample.kwargs.get("is_causal") else mask
    noise = rounding_noise(
        q, k, v, mask, torch.ones_like(out), torch.zeros(q.shape[:3]),
        scale=sample.kwargs.get("scale"),
    )  # fmt: skip
    for name, *grads in zip(noise, got, exact_grads, want, strict=True):
        assert_accurate(*grads, name, noise[name])


def test_transforms_of_functions_are_torchs():
    q, k, v = torch.randn(3, 1, 2, 16, 8).unbind(0)

    def gradient(attend):
        return torch.func.grad(lambda q: attend(q, k, v, is_causal=True).square().sum())(q)

    torch.testing.assert_close(gradient(ours), gradient(F.scaled_dot_product_attention))


def test_torchs_error_samples_raise():
    for sample in INFO.error_inputs("cpu") if INFO.error_inputs_func else ():
        arguments = sample.sample_input
        with pytest.raises(sample.error_type):
            ours(arguments.input, *arguments.args, **arguments.kwargs)
    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    with pytest.raises(RuntimeError):
        ours(q, k, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlens", [(64, 64), (40, 100), (100, 40)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_alignment_is_torchs(dtype, seqlens, is_causal):
    q = torch.randn(2, 4, seqlens[0], 32).to(dtype)
    k, v = torch.randn(2, 2, 2, seqlens[1], 32).to(dtype).unbind(0)
    out = ours(q, k, v, is_causal=is_causal, enable_gqa=True)
    mask = torch.ones(seqlens, dtype=torch.bool)
    mask = mask.tril() if is_causal else mask
    exact = dense_attention(*(x.double() for x in (q, k, v)), mask)[0]
    assert_accurate(out, exact, dense_attention(q, k, v, mask)[0])


def test_mask_and_is_causal_are_torchs():
    q, k, v = torch.randn(3, 1, 2, 16, 8).unbind(0)
    mask = torch.rand(16, 16) < 0.5
    for arguments in ({"attn_mask": mask}, {"attn_mask": torch.randn(16, 16)}, {"dropout_p": 0.5}):
        torch.manual_seed(3)
        expected = F.scaled_dot_product_attention(q, k, v, **arguments)
        torch.manual_seed(3)
        assert torch.equal(ours(q, k, v, **arguments), expected)


def test_with_a_selector():
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind(0)
    out = ours(q, k, v, is_causal=True, selector=selectors.SlidingWindow(8))
    mask = torch.ones(64, 64).tril().triu(-7).bool()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    short = ours(q[:, :, :40], k, v, is_causal=True, selector=selectors.Dense())
    expected = F.scaled_dot_product_attention(q[:, :, :40], k, v, is_causal=True)
    torch.testing.assert_close(short, expected)


Q = torch.randn(1, 4, 8, 16)
REFUSED = [
    ({"attn_mask": torch.ones(8, 8, dtype=torch.bool)}, "attn_mask is not supported"),
    ({"dropout_p": 0.1}, "dropout_p must be 0, got 0.1"),
    ({"key": Q[:, :2], "value": Q[:, :2]}, "enable_gqa must be True for 4 query and 2 key heads"),
    ({"key": Q[:, :, :4], "value": Q[:, :, :4], "is_causal": True}, "is_causal with more queries"),
    ({"query": Q[0]}, "q must be [batch, heads, seqlen, head_dim], got shape [4, 8, 16]"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=short_id)
@pytest.mark.parametrize("asker", [{"selector": selectors.Dense()}, {"backend": "reference"}])
def test_refused_by_name(change, message, asker):
    arguments = {"query": Q, "key": Q, "value": Q} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        ours(**arguments, **asker)


def test_a_named_backend_serves_the_call():
    out = ours(Q, Q, Q, is_causal=True, backend="reference")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(Q, Q, Q, is_causal=True))


def _outcome(attend, *args, **kwargs):
    """What a call gives: its result, or the type and the message of its error."""
    try:
        return attend(*args, **kwargs)
    except Exception as error:  # noqa: BLE001
        return type(error), str(error)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.3, -1.0, -1, 0])
@pytest.mark.parametrize("shape", [(1, 4, 48, 16), (2, 48, 16), (1, 4, 48, 300)], ids=str)
def test_scales_that_torchs_kernel_gets_wrong(monkeypatch, few, dtype, scale, shape):
    """Its kernel for causal calls on CPUs gives NaN with them."""
    if few:
        monkeypatch.undo()
    size = shape[-1] ** 0.25  # so that scores are of the order of 1
    q, k, v = ((torch.randn(shape) / size).to(dtype).requires_grad_() for _ in range(3))
    out = ours(q, k, v, is_causal=True, scale=scale)
    mask = torch.ones(48, 48, dtype=torch.bool).tril()
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = (scale * (leaves[0] @ leaves[1].mT)).masked_fill(~mask, -torch.inf)
    exact = scores.softmax(-1) @ leaves[2]
    tolerances = {"rtol": 1e-4, "atol": 1e-5} if dtype.itemsize > 2 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(out.double(), exact, **tolerances)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    expected = torch.autograd.grad(exact.sum(), leaves)
    torch.testing.assert_close(tuple(x.double() for x in grads), expected, **tolerances)


WRONG_KINDS = [
    {"is_causal": 1}, {"is_causal": None}, {"is_causal": torch.tensor(True)}, {"enable_gqa": 1},
    {"enable_gqa": None}, {"scale": "1"}, {"scale": [1.0]}, {"dropout_p": None},
    {"dropout_p": "0"}, {"dropout_p": 1.5}, {"attn_mask": 3}, {"query": None}, {"key": [[1.0]]},
    {"query": torch.ones(1, 2, 16, 8, dtype=torch.int32)}, {"value": torch.randn(1, 2, 16)},
    {"key": torch.randn(1, 2, 16, 8, dtype=torch.float64)}, {"query": torch.randn(8)},
    {"key": torch.randn(1, 3, 16, 8)}, {"key": torch.randn(1, 2, 16, 4)},
    {"query": torch.randn(1, 2, 16, 8).to(torch.float8_e5m2)},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG_KINDS, ids=lambda changes: "-".join(changes))
def test_errors_are_torchs(change):
    x = torch.randn(1, 2, 16, 8)
    tensors = [change.get(name, x) for name in ("query", "key", "value")]
    others = {name: x for name, x in change.items() if name not in ("query", "key", "value")}
    expected = _outcome(F.scaled_dot_product_attention, *tensors, **others)
    assert isinstance(expected, tuple)
    assert _outcome(ours, *tensors, **others) == expected


SERVED_KINDS = [
    {"scale": True}, {"scale": 2}, {"scale": float("inf")}, {"scale": float("nan")},
    {"scale": torch.tensor(0.5)}, {"dropout_p": False}, {"dropout_p": 0},
]  # fmt: skip


@pytest.mark.parametrize("change", SERVED_KINDS, ids=str)
def test_what_torch_takes_for_a_number_is_taken(change):
    x = torch.randn(1, 2, 16, 8)
    expected = F.scaled_dot_product_attention(x, x, x, **change)
    torch.testing.assert_close(ours(x, x, x, **change), expected, equal_nan=True)


@pytest.mark.parametrize("kernel", torch.nn.attention.SDPBackend.__members__.values(), ids=str)
def test_a_pinned_kernel_of_torch_runs_or_is_refused(kernel):
    if kernel == torch.nn.attention.SDPBackend.ERROR:
        return
    x = torch.randn(1, 2, 64, 16)
    with torch.nn.attention.sdpa_kernel(kernel):
        expected = _outcome(F.scaled_dot_product_attention, x, x, x)
        got = _outcome(ours, x, x, x)
    assert isinstance(got, tuple) == isinstance(expected, tuple)
    assert got == expected if isinstance(got, tuple) else torch.equal(got, expected)


def test_a_pinned_kernel_is_pinned_in_compiled_code():
    x, seen = torch.randn(1, 2, 64, 16), []

    def attend(x):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return ours(x, x, x)

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(attend, backend=backend, fullgraph=True)(x)
    assert not any("sparse_attn" in name for name in seen)
    assert any("scaled_dot_product_attention" in name for name in seen)


class Recording(torch.Tensor):
    calls: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_of_tensors_see_torchs_function():
    x = torch.randn(1, 2, 64, 16)
    for query, value in ((x.as_subclass(Recording), x), (x, x.as_subclass(Recording))):
        Recording.calls.clear()
        assert type(ours(query, x, value)) is Recording
        assert F.scaled_dot_product_attention in Recording.calls


def test_tensors_without_data_are_torchs():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(1, 2, 64, 16)
        assert type(ours(x, x, x)) is FakeTensor
    meta = torch.empty(1, 2, 64, 16, device="meta")
    assert ours(meta, meta, meta).is_meta
