"""Bad inputs: each gets an error that names the argument; untrusted layouts never reach a
kernel.
"""

import re
from dataclasses import replace

import pytest
import torch

from sparse_attn import BlockLayout, explain, selectors, sparse_attention

from .oracle import BACKENDS as ALL_BACKENDS
from .oracle import GPU, short_id
from .test_layout import bad_values

# On a GPU a broken layout fails asynchronously, and ends the process's use of it.
BACKENDS = [b for b in ALL_BACKENDS if b != "triton" or not GPU]

Q = torch.randn(2, 4, 8, 16)
K = torch.randn(2, 2, 12, 16)
DENSE = BlockLayout.dense((8, 12))

CASES = [
    ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    ({"k": K[0]}, ValueError, "k must be [batch, heads, seqlen, head_dim], got shape [2, 12, 16]"),
    ({"q": Q.int()}, ValueError, "q must be a floating-point tensor, got torch.int32"),
    ({"v": K.double()}, ValueError, "v must have q's dtype torch.float32, got torch.float64"),
    ({"k": K.to("meta")}, ValueError, "k must be on q's device cpu, got meta"),
    ({"k": K[:1]}, ValueError, "k must have q's batch size 2, got 1"),
    ({"v": K[:, :, :5]}, ValueError, "v must have k's heads and seqlen [2, 12], got [2, 5]"),
    ({"k": K[..., :8]}, ValueError, "k must have q's head_dim 16, got 8"),
    ({"q": Q[:, :3]}, ValueError, "q has 3 heads, not a multiple of the 2 heads of k"),
    ({"q": Q[:, :0]}, ValueError, "batch, heads and head dims must be positive"),
    ({"v": K[..., :0]}, ValueError, "batch, heads and head dims must be positive"),
    (
        {"layout_or_selector": 3},
        TypeError,
        "layout_or_selector must be a BlockLayout or a selector",
    ),
    ({"layout_or_selector": lambda *a, **k: 3}, TypeError, "layout_or_selector must be a BlockL"),
    (
        {"layout_or_selector": BlockLayout.dense((8, 8))},
        ValueError,
        "the layout is for seqlens (8,",
    ),
    (
        {"layout_or_selector": DENSE.to("meta")},
        ValueError,
        "the layout is on meta, but q is on cpu",
    ),
    (
        {"layout_or_selector": replace(DENSE, sink=torch.zeros(3, dtype=torch.int32))},
        ValueError,
        "sink has 3 heads, which does not divide the 4 heads of q",
    ),
    (
        {
            "layout_or_selector": BlockLayout.from_topk(
                torch.zeros(3, 1, 1, 1).int(), block_size=(8, 8), seqlens=(8, 12)
            )
        },
        ValueError,
        "kv_num_blocks has batch size 3, it must be 1 or q's 2",
    ),
    ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ({"softcap": -1.0}, ValueError, "softcap must be finite and at least 0"),
    ({"softcap": float("inf")}, ValueError, "softcap must be finite"),
    ({"sink_logits": [0.0] * 4}, TypeError, "sink_logits must be a tensor, got list"),
    ({"sink_logits": torch.zeros(3)}, ValueError, "sink_logits must be a float tensor [4]"),
    ({"sink_logits": torch.zeros(4).int()}, ValueError, "sink_logits must be a float tensor [4]"),
    (
        {"sink_logits": torch.zeros(4, device="meta")},
        ValueError,
        "sink_logits must be on q's device cpu",
    ),
    ({"backend": "tpu"}, ValueError, "backend must be 'auto' or one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), CASES, ids=short_id)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"q": Q, "k": K, "v": K, "layout_or_selector": DENSE} | change
    with pytest.raises(error, match=re.escape(message)):
        sparse_attention(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(len(bad_values())))
def test_untrusted_layouts(backend, number):
    layout, message = bad_values()[number]
    q, k, v = torch.randn(3, 1, 2, 32, 16).unbind(0)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        sparse_attention(q, k, v, layout, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_behind_the_count_is_ignored(backend):
    q, k, v = torch.randn(3, 1, 2, 32, 16).unbind(0)
    indices = torch.tensor([[[[0, 2**31 - 1], [0, 1]]]], dtype=torch.int32)
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    none = torch.zeros(1, dtype=torch.int32)
    layout = BlockLayout((32, 32), none, none, (16, 16), counts, indices)
    out = sparse_attention(q, k, v, layout, backend=backend)
    dense = sparse_attention(q, k, v, selectors.Dense(), backend=backend)
    torch.testing.assert_close(out, dense)


def test_a_named_backend_never_falls_back():
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"(?s)backend='cpu' cannot run.*cpu: the dtype is torch.fl"
    ):
        sparse_attention(q, q, q, selectors.Dense(), backend="cpu")
    wide = torch.randn(1, 1, 4, 300)
    with pytest.raises(ValueError, match="head_dim is 300; it takes 1 to 256"):
        sparse_attention(wide, wide, wide, selectors.Dense(), backend="cpu")
    assert explain(wide, wide, wide).backend == "reference"
    assert sparse_attention(wide, wide, wide, selectors.Dense()).shape == wide.shape


def test_explain():
    for backend in BACKENDS:
        assert explain(Q, K, K, backend=backend).backend == backend
    text = str(explain(Q.double(), K.double(), K.double()))
    assert text.startswith("backend: reference")
    assert "cpu: the dtype is torch.float64" in text


def test_nan_and_inf_inputs_stay_in_their_rows():
    q, k, v = torch.randn(3, 1, 1, 64, 16).unbind(0)
    expected = sparse_attention(q, k, v, selectors.Dense())
    q = q.clone()
    q[0, 0, 5], q[0, 0, 6] = torch.nan, torch.inf
    out = sparse_attention(q, k, v, selectors.Dense())
    rest = [i for i in range(64) if i not in (5, 6)]
    assert torch.equal(out[0, 0, rest], expected[0, 0, rest])
    assert out[0, 0, 5].isnan().all()


def test_a_call_that_was_right_hides_no_wrong_one():
    """Checks are skipped for shapes, dtypes and devices seen before, all of them together."""
    layout = selectors.Dense()
    sparse_attention(Q, K, K, layout)
    with pytest.raises(ValueError, match="v must have q's dtype"):
        sparse_attention(Q, K, K.double(), layout)
    with pytest.raises(ValueError, match="v must have k's heads"):
        sparse_attention(Q, K, K[:, :, 1:], layout)
    with pytest.raises(ValueError, match="backend must be"):
        sparse_attention(Q, K, K, layout, backend="fastest")
    with pytest.raises(TypeError, match="k must be a tensor"):
        sparse_attention(Q, K.tolist(), K, layout)


def test_a_layout_that_fitted_before_is_checked_again():
    layout = replace(DENSE, sink=torch.zeros(4, dtype=torch.int32))
    sparse_attention(Q, K, K, layout)
    for q, k, message in [
        (Q[:, :2], K, "sink has 4 heads, which does not divide the 2 heads of q"),
        (Q[:, :, :3], K, "the layout is for seqlens"),
        (Q, K[:, :, :9], "the layout is for seqlens"),
        (Q.to("meta"), K.to("meta"), "the layout is on cpu, but q is on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            sparse_attention(q, k, k, layout)
