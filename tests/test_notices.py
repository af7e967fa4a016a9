"""What is allowed and probably not meant has a warning, once; a mask, a class or a name that does
not exist is answered with what was meant.
"""

import pickle
import re
import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import sparse_attn
from sparse_attn import BlockLayout, api, notices, quality, selectors, sparse_attention


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(notices, "_given", set())
    monkeypatch.setattr(api, "_seen", {})


def _said(*shapes, dtype=torch.float32, backend="auto", head_dim=16):
    """The warnings of two calls each."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for q_shape, k_shape in shapes:
            q, k = torch.zeros(1, *q_shape, head_dim), torch.zeros(1, *k_shape, head_dim)
            for _ in range(2):
                sparse_attention(q.to(dtype), k.to(dtype), k.to(dtype), _window, backend=backend)
    assert all(x.filename == __file__ for x in said)  # where the call is made
    return [str(x.message) for x in said]


def _window(q, k, *, is_causal, scale):
    return BlockLayout.sink_window((q.shape[2], k.shape[2]), window=4, device=q.device)


@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [((512, 32), (512, 32)), ((300, 8), (300, 2)), ((100, 32), (100, 8)), ((257, 1), (257, 1))],
)
def test_tensors_in_the_order_of_other_libraries(q_shape, k_shape):
    (message,) = _said((q_shape, k_shape), (q_shape, k_shape))
    assert re.search(r"read as \[batch, heads, seqlen, head_dim\].*need x.transpose", message)


@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [
        ((32, 5), (32, 5)),  # short prompts
        ((128, 1), (128, 1)),
        ((256, 16), (256, 16)),
        ((32, 5), (8, 5)),
        ((32, 1), (32, 300)),  # decoding
        ((512, 1), (512, 300)),  # with the batch among the heads
        ((512, 7), (512, 300)),
        ((4, 300), (4, 300)),
        ((4, 64), (4, 8)),  # more rows than keys
        ((2, 300), (1, 300)),
    ],
)
def test_the_right_order_has_no_warning(q_shape, k_shape):
    assert not _said((q_shape, k_shape))


def test_an_order_that_does_not_fit_names_the_transposition():
    q, k = torch.randn(1, 1, 8, 16), torch.randn(1, 40, 2, 16)
    with pytest.raises(ValueError, match=r"not a multiple of the 40 heads.*x.transpose\(1, 2\)"):
        sparse_attention(q, k, k, selectors.Dense())
    with pytest.raises(ValueError, match=r"not a multiple of the 3 heads of k$"):
        sparse_attention(torch.randn(1, 4, 9, 16), *torch.randn(2, 1, 3, 12, 16), selectors.Dense())


def test_a_slow_backend_is_named_once_for_each_reason():
    small = ((2, 8), (2, 8))
    for kind in ({"head_dim": 300}, {"dtype": torch.float64}):
        (message,) = _said(small, ((2, 9), (2, 9)), **kind)
        assert message.startswith("backend='auto' runs on 'reference', right but slow, as 'cpu'")
        assert not _said(((2, 10), (2, 10)), **kind)
    assert not _said(small, head_dim=300, backend="reference")
    assert not _said(small)


def test_the_drop_in_and_explain_warn_of_nothing():
    x = torch.randn(1, 512, 32, 300, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_attn.scaled_dot_product_attention(x, x, x)
        sparse_attn.explain(x, x, x)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bits_are_refused(dtype):
    x = torch.randn(1, 2, 8, 16).to(dtype)
    with pytest.raises(ValueError, match="q must be float32, bfloat16, float16 or float64, got"):
        sparse_attention(x, x, x, selectors.Dense())


X = torch.randn(1, 2, 32, 16)
MASKS = [
    (torch.ones(32, 32, dtype=torch.bool), "BlockLayout.from_dense("),
    (torch.zeros(1, 2, 32, 32), "BlockLayout.from_dense("),
    (torch.eye(2).to_sparse_csr(), "BlockLayout.from_csr("),
    (
        create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 32, 32, device="cpu", BLOCK_SIZE=16),
        "BlockLayout.from_block_mask(",
    ),
    (selectors.SinkWindow, "SinkWindow(...)"),
]


@pytest.mark.parametrize(("mask", "builder"), MASKS, ids=lambda x: type(x).__name__)
def test_other_masks_are_answered_with_their_builder(mask, builder):
    rows, ends = X[0].transpose(0, 1), torch.tensor([0, 32], dtype=torch.int32)
    for call in (
        lambda: sparse_attention(X, X, X, mask),
        lambda: sparse_attention(X, X, X, lambda q, k, **_: mask),
        lambda: sparse_attn.scaled_dot_product_attention(X, X, X, selector=mask),
        lambda: sparse_attn.sparse_attention_varlen(
            rows, rows, rows, mask, cu_seqlens_q=ends, cu_seqlens_kv=ends
        ),
        lambda: quality.measure(X, X, X, mask),
    ):
        with pytest.raises(TypeError, match=re.escape(builder)):
            call()


@pytest.mark.parametrize(
    ("module", "name", "meant"),
    [
        (sparse_attn, "sparse_atention", "sparse_attn.sparse_attention"),
        (sparse_attn, "SparseAttention", "sparse_attn.sparse_attention"),
        (sparse_attn, "flash_attn_func", "sparse_attn.sparse_attention"),
        (sparse_attn, "SinkWindow", "sparse_attn.selectors.SinkWindow"),
        (sparse_attn, "blocklayout", "sparse_attn.BlockLayout"),
        (selectors, "SlidingWindows", "sparse_attn.selectors.SlidingWindow"),
        (selectors, "Hip", "sparse_attn.selectors.HiP"),
        (selectors, "sparse_attention", "sparse_attn.sparse_attention"),
    ],
)
def test_a_missing_name_is_answered_with_the_nearest(module, name, meant):
    with pytest.raises(AttributeError, match=f"do you mean {re.escape(meant)}\\?$"):
        getattr(module, name)


def test_names_are_missing_as_ever():
    for module in (sparse_attn, selectors):
        assert not hasattr(module, "__wrapped__") and not hasattr(module, "nothing_like_it_at_all")
        assert getattr(module, "nothing_like_it_at_all", 3) == 3
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute"):
            module.nothing_like_it_at_all  # noqa: B018
        exec("from " + module.__name__ + " import *", {})
    from sparse_attn import contract  # a submodule that is no attribute before

    assert contract.__doc__
    assert pickle.loads(pickle.dumps(selectors.SinkWindow(1, 2))) == selectors.SinkWindow(1, 2)
    with pytest.raises(ImportError):
        from sparse_attn.selectors import SlidingWindows  # noqa: F401
