"""Lists that another thread writes while a call runs: the call refuses them or gives some numbers,
and never reads outside a tensor.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparse_attn import BlockLayout
from sparse_attn.contract.arguments import Arguments

from .oracle import BACKENDS


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_thread_that_writes_into_the_lists_of_running_calls():
    assert "cpu" in BACKENDS
    command = [sys.executable, "-m", "tests.changing_lists"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


LISTS = ("sink", "window", "kv_num_blocks", "kv_indices", "num_columns", "column_indices")


def call(op, lists):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind(0)
    named = dict(zip(LISTS, lists, strict=True))
    args = Arguments.of(BlockLayout((40, 40), block_size=(8, 8), **named), 0.3)
    ops = torch.ops.sparse_attn
    if op == "attention":
        return ops.attention_reference(q, k, v, *args)
    if op == "attention_varlen":
        ends = torch.tensor([0, 40], dtype=torch.int32)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return ops.attention_varlen_reference(q, k, v, ends, ends, None, None, 40, 40, *args)
    out, lse = torch.randn_like(q), torch.randn(1, 2, 40)
    return ops.attention_backward_reference(out, lse, q, k, v, out, lse, *args)


@pytest.mark.parametrize("changed", range(6), ids=LISTS)
@pytest.mark.parametrize("op", ("attention", "attention_backward", "attention_varlen"))
def test_the_reference_works_on_what_it_has_validated(op, changed, monkeypatch):
    def lists():
        rows = torch.arange(5, dtype=torch.int32)[:, None].expand(5, 2)
        indices = torch.stack([rows[:, 0] // 2, rows[:, 0]], -1).contiguous()[None, None]
        counts = torch.ones(1, 1, 5, dtype=torch.int32)
        numbers = (torch.tensor([x], dtype=torch.int32) for x in (1, 3))
        return [*numbers, counts, indices, counts.clone(), indices + 8]

    expected = call(op, lists())
    given, validate = lists(), BlockLayout.validate

    def validate_before_a_change(layout):
        validate(layout)
        given[changed].fill_(2)
        return layout

    monkeypatch.setattr(BlockLayout, "validate", validate_before_a_change)
    for x, y in zip(call(op, given), expected, strict=True):
        assert torch.equal(x, y)
