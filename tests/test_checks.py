"""Numbers, flags and objects of the wrong kind: whatever takes one says so by name, or takes it as
what it stands for.
"""

import dataclasses
import re
import sys

import numpy as np
import pytest
import torch

import sparse_attn
from sparse_attn import BlockLayout, landmark, quality, retrieval, selectors, sparse_attention

from .oracle import BACKENDS, dense_attention
from .test_selectors import TABLE

Q, K = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
LIMIT = 2**31 - 1

# What a parameter of a kind must refuse. Ints may stand for floats, never the other way round.
NO_NUMBERS = [
    True, np.bool_(True), "4", float("nan"), np.float32("nan"), torch.tensor([4, 4]),
    torch.tensor(True), [4], 4 + 0j, object(), selectors.Dense, selectors.Dense(),
    torch.tensor(4.0, requires_grad=True),
]  # fmt: skip
NO_INTS = [*NO_NUMBERS, 4.0, np.float64(4), torch.tensor(4.0), None]
NO_BOOLS = [0, 1, 1.0, "yes", None, np.int64(1), torch.tensor(1), torch.tensor([True]), object()]
NO_SELECTORS = [selectors.SinkWindow, 3, "dense", torch.ones(4, 4, dtype=torch.bool)]
BY_TYPE = {"int": NO_INTS, "float": NO_NUMBERS, "bool": NO_BOOLS, "SelectorLike": NO_SELECTORS}
BY_TYPE["Refreshable"] = [*NO_SELECTORS, selectors.HiP, selectors.Dense()]


def parameters():
    """Every field of every public selector that is a parameter."""
    for name, selector in TABLE.items():
        for field in dataclasses.fields(selector):
            if field.init and type(selector).__name__ in selectors.__all__:
                yield pytest.param(selector, field, id=f"{name}.{field.name}")


every_parameter = pytest.mark.parametrize(("selector", "field"), list(parameters()))


def _kind(field):
    kind = field.type.split(" | ")[0]
    return "tuple" if kind.startswith("tuple[int") else kind


@every_parameter
def test_selectors_refuse_other_kinds_by_name(selector, field):
    values = list(BY_TYPE.get(_kind(field), [3, "dense", selectors.Dense, None]))
    if "None" in field.type:
        values = [x for x in values if x is not None]
    if "tuple" in field.type:
        values = [x for x in values if not isinstance(x, list)]
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"\b{field.name}\b"):
            dataclasses.replace(selector, **{field.name: value})


@every_parameter
def test_selectors_take_numpys_numbers_and_tensors_without_dimensions(selector, field):
    value = getattr(selector, field.name)
    casts = {int: (np.int64, np.int32, torch.tensor), float: (np.float64, torch.tensor)}
    casts[bool] = (np.bool_, torch.tensor)
    for cast in casts.get(type(value), ()):
        other = dataclasses.replace(selector, **{field.name: cast(value)})
        expected, got = (x(Q, K).to_dense(num_heads=4) for x in (selector, other))
        assert torch.equal(got, expected)


@every_parameter
def test_selectors_serve_sizes_beyond_int32_as_the_limit_or_name_the_range(selector, field):
    """Whatever is taken costs what the sequence needs, not what the number says."""
    if type(getattr(selector, field.name)) is not int:
        return
    names = "|".join(x.name for x in dataclasses.fields(selector))
    unlimited = None
    for value in (2**20, LIMIT, LIMIT + 1, 10**10, sys.maxsize, 10**30):
        try:
            made = dataclasses.replace(selector, **{field.name: value})
        except ValueError as error:
            assert re.search(names, str(error))
            continue
        mask = made(Q, K).validate().to_dense(num_heads=4)
        if value <= LIMIT:
            unlimited = mask
        else:
            assert torch.equal(mask, unlimited)
        assert sparse_attention(Q, K, K, made).isfinite().all()


def _layout():
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    return BlockLayout.from_dense(mask, block_size=(10, 10), seqlens=(40, 40))


def _packed(**changes):
    ends = torch.tensor([0, 40], dtype=torch.int32)
    rows, keys = Q[0].transpose(0, 1), K[0].transpose(0, 1)
    arguments = {"layout": _layout(), "cu_seqlens_q": ends, "cu_seqlens_kv": ends} | changes
    return sparse_attn.sparse_attention_varlen(rows, keys, keys, **arguments)


HEADS = torch.rand(2, 2)
BOOL, FLOAT, INT, PAIR = NO_BOOLS, NO_NUMBERS, NO_INTS, [3, (3,), (3.0, 4), (True, 4), (1, 2, 3)]
SWEEP = {
    sparse_attention: (
        lambda **x: sparse_attention(Q, K, K, **{"layout_or_selector": _layout()} | x),
        {"layout_or_selector": NO_SELECTORS, "is_causal": BOOL, "return_lse": BOOL,
         "scale": FLOAT, "softcap": FLOAT, "backend": [3, None, ["cpu"], "gpu"]},
    ),
    sparse_attn.sparse_attention_varlen: (
        _packed,
        {"layout": NO_SELECTORS, "is_causal": BOOL, "return_lse": BOOL, "scale": FLOAT,
         "softcap": FLOAT, "backend": [3, None, ["cpu"], "gpu"], "cu_seqlens_q": [3, None, [0, 4]]},
    ),
    sparse_attn.scaled_dot_product_attention: (
        lambda **x: sparse_attn.scaled_dot_product_attention(
            Q, K, K, **{"enable_gqa": True, "selector": selectors.Dense()} | x
        ),
        {"selector": NO_SELECTORS, "is_causal": BOOL, "enable_gqa": BOOL, "scale": FLOAT},
    ),
    sparse_attn.explain: (
        lambda **x: sparse_attn.explain(Q, K, K, **x), {"backend": [3, None, ["cpu"], "gpu"]}
    ),
    landmark.landmark_attention: (
        lambda **x: landmark.landmark_attention(Q, K, K, **{"block_size": 8} | x),
        {"block_size": INT, "top_k": INT[:-1], "scale": FLOAT, "return_lse": BOOL},
    ),
    landmark.is_landmark: (
        lambda **x: landmark.is_landmark(**{"seqlen": 8, "block_size": 4} | x),
        {"seqlen": [*INT, -1, 2**31], "block_size": [*INT, 1, 2**31]},
    ),
    landmark.insert_landmarks: (
        lambda **x: landmark.insert_landmarks(
            **{"ids": torch.arange(5), "landmark": 9, "block_size": 4} | x
        ),
        {"ids": [3, [1, 2], torch.rand(4)], "landmark": INT, "block_size": INT},
    ),
    landmark.landmark_labels: (
        lambda **x: landmark.landmark_labels(**{"ids": torch.arange(5), "block_size": 4} | x),
        {"ids": [3, [1, 2], torch.rand(4)], "block_size": INT, "ignore_index": INT},
    ),
    quality.measure: (
        lambda **x: quality.measure(Q, K, K, **{"selection": _layout()} | x),
        {"selection": NO_SELECTORS, "is_causal": BOOL, "scale": FLOAT, "rows": [3, (0, 4)]},
    ),
    retrieval.top_heads: (
        lambda **x: retrieval.top_heads(**{"scores": HEADS, "share": 0.5} | x),
        {"scores": [3, [[0.5]], torch.rand(3)], "share": [*FLOAT, -0.1, 1.5, None]},
    ),
    retrieval.full_heads: (
        lambda **x: retrieval.full_heads(
            **{"gates": HEADS, "sparsity": 0.5, "num_heads": 4} | x
        ),
        {"gates": [3, torch.rand(3)], "sparsity": [*FLOAT, -0.1, None], "num_heads": [*INT, 0]},
    ),
    retrieval.repetition_heads: (
        lambda **x: retrieval.repetition_heads(
            **{"induction": HEADS, "echo": HEADS, "num_kv_heads": 2} | x
        ),
        {"induction": [3, torch.rand(3)], "num_kv_heads": [*INT, 0, 3], "echo_share": FLOAT,
         "induction_share": [*FLOAT, 2]},
    ),
    retrieval.head_selectors: (
        lambda **x: retrieval.head_selectors(**{"full": HEADS > 0.5} | x),
        {"full": [3, HEADS], "retrieval": NO_SELECTORS, "streaming": NO_SELECTORS},
    ),
    BlockLayout.sink_window: (
        lambda **x: BlockLayout.sink_window(**{"seqlens": (4, 4)} | x),
        {"seqlens": PAIR, "sink": [1.9, True, None, torch.tensor([1.9]), torch.tensor([True]), -1],
         "window": [1.9, True, None, torch.tensor([1.9]), -2]},
    ),
    BlockLayout.from_dense: (
        lambda **x: BlockLayout.from_dense(
            **{"block_mask": torch.ones(1, 1, 2, 2).bool(), "block_size": (2, 2),
               "seqlens": (4, 4)} | x
        ),
        {"block_mask": [3, [[True]], torch.ones(2, 2).bool()], "block_size": PAIR,
         "seqlens": PAIR},
    ),
    BlockLayout.from_block_mask: (
        BlockLayout.from_block_mask, {"block_mask": [3, torch.ones(2, 2).bool()]}
    ),
    BlockLayout.visible: (
        lambda **x: _layout().visible(**{"start": 2, "stop": 8} | x),
        {"start": [*INT, -1, 9], "stop": [*INT, 41], "is_causal": BOOL, "num_heads": INT[:-1]},
    ),
    BlockLayout.to_csr: (
        lambda **x: _layout().to_csr(**x), {"batch": [*INT, 1], "head": [*INT, 7]}
    ),
    BlockLayout.density: (lambda **x: _layout().density(**x), {"is_causal": BOOL}),
    BlockLayout.refine: (lambda **x: _layout().refine(**x), {"block_size": PAIR}),
    BlockLayout.expand_heads: (lambda **x: _layout().expand_heads(**x), {"num_heads": [*INT, 0]}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("call", "name", "values"),
    [
        pytest.param(call, name, values, id=f"{function.__name__}.{name}")
        for function, (call, sweep) in SWEEP.items()
        for name, values in sweep.items()
    ],
)
def test_functions_refuse_other_kinds_by_name(call, name, values):
    for value in values:
        with pytest.raises((TypeError, ValueError, IndexError), match=rf"\b{name}\b"):
            call(**{name: value})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        {"sink": 10**10}, {"window": 10**10}, {"sink": LIMIT, "window": sys.maxsize},
        {"sink": torch.tensor([2**32 + 1]), "window": 4},
        {"block_size": (LIMIT, 8)}, {"block_size": (8, LIMIT)}, {"block_size": (LIMIT, LIMIT)},
        {"block_size": (np.int64(8), np.int64(8)), "column_group": LIMIT},
    ],
    ids=str,
)  # fmt: skip
def test_layouts_of_whole_sequences(backend, is_causal, sizes):
    q, k, v = torch.randn(3, 1, 2, 20, 16).unbind(0)
    if "block_size" in sizes:
        rows, keys = (-(-20 // int(n)) for n in sizes["block_size"])
        counts = torch.ones(1, 1, rows, dtype=torch.int32)
        lists = torch.full((1, 1, rows, 1), keys - 1, dtype=torch.int32)
        columns = torch.tensor([[[[1, 7]]]], dtype=torch.int32)
        none = torch.zeros(1, dtype=torch.int32)
        layout = BlockLayout(
            (20, 20), none, none, kv_num_blocks=counts, kv_indices=lists,
            num_columns=torch.full((1, 1, 1), 2, dtype=torch.int32), column_indices=columns,
            **{"column_group": rows} | sizes,
        )  # fmt: skip
        j = torch.arange(20)
        seen = (j // min(sizes["block_size"][1], 20) == keys - 1) | (j == 1) | (j == 7)
        mask = seen.expand(20, 20)
    else:
        layout = BlockLayout.sink_window((20, 20), **sizes)
        mask = torch.ones(20, 20, dtype=torch.bool)
    mask = mask.tril() if is_causal else mask
    assert torch.equal(layout.to_dense(is_causal=is_causal)[0, 0], mask)
    fine = (layout | BlockLayout.sink_window((20, 20), sink=1)).refine((1, 1))
    assert torch.equal(fine[0, 0].validate().to_dense()[0, 0, :, 1:], mask.tril()[:, 1:])
    out = sparse_attention(q, k, v, layout, is_causal=is_causal, backend=backend)
    torch.testing.assert_close(out, dense_attention(q, k, v, mask)[0])


def test_softcap_none_is_off():
    layout = _layout()
    expected = sparse_attention(Q, K, K, layout)
    assert torch.equal(sparse_attention(Q, K, K, layout, softcap=None), expected)
    assert torch.equal(_packed(softcap=None), _packed())


def test_merge_states_names_what_is_no_pair():
    with pytest.raises(TypeError, match=r"states\[0\] must be a pair of tensors"):
        sparse_attn.merge_states(Q)
