"""Calls of the C++ kernels, written as the op takes them, and what they must give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from sparse_attn.contract.arguments import Arguments

_C = pytest.importorskip("sparse_attn._C")

ISAS = _C.supported_cpu_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@dataclass
class Case:
    """One call: the inputs, and a layout written as the op's arguments."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sink: list[int] = field(default_factory=lambda: [0])
    window: list[int] = field(default_factory=lambda: [0])
    blocks: tuple[torch.Tensor, torch.Tensor] | None = None
    columns: tuple[torch.Tensor, torch.Tensor] | None = None
    sink_logits: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    block: tuple[int, int] = (1, 1)
    column_group: int = 1
    scale: float | None = None
    softcap: float = 0.0
    is_causal: bool = True

    def run(self):
        kv_num_blocks, kv_indices = self.blocks or (None, None)
        num_columns, column_indices = self.columns or (None, None)
        arguments = Arguments(
            sink=torch.tensor(self.sink, dtype=torch.int32),
            window=torch.tensor(self.window, dtype=torch.int32),
            kv_num_blocks=kv_num_blocks,
            kv_indices=kv_indices,
            num_columns=num_columns,
            column_indices=column_indices,
            sink_logits=self.sink_logits,
            key_bias=self.key_bias,
            alibi_slopes=self.alibi_slopes,
            block_q=self.block[0],
            block_kv=self.block[1],
            column_group=self.column_group,
            scale=self.q.shape[-1] ** -0.5 if self.scale is None else self.scale,
            softcap=self.softcap,
            is_causal=self.is_causal,
        )
        return torch.ops.sparse_attn.attention(self.q, self.k, self.v, *arguments)

    def mask(self) -> torch.Tensor:
        """Dense bool [batch, num_heads, seqlen_q, seqlen_kv], straight from the definition."""
        batch, heads, seqlen_q, _ = self.q.shape
        seqlen_kv = self.k.shape[2]
        p = torch.arange(seqlen_q)[:, None] + seqlen_kv - seqlen_q
        j = torch.arange(seqlen_kv)[None, :]
        mask = torch.zeros(batch, heads, seqlen_q, seqlen_kv, dtype=torch.bool)
        for h in range(heads):
            sink = self.sink[h * len(self.sink) // heads]
            window = self.window[h * len(self.window) // heads]
            mask[:, h] |= j < sink
            distance = p - j if self.is_causal else (p - j).abs()
            mask[:, h] |= (distance < window) if window >= 0 else torch.ones_like(distance) > 0
            if self.is_causal and window > 0:
                mask[:, h] &= (j <= p) | (j < sink)
        lists = [(self.blocks, self.block[0], self.block[1])]
        lists += [(self.columns, self.block[0] * self.column_group, 1)]
        for pair, rows, width in lists:
            if pair is not None:
                listed = listed_values(*pair, -(-seqlen_kv // width))
                listed = listed.repeat_interleave(heads // listed.shape[1], 1)
                listed = listed.repeat_interleave(rows, 2)[:, :, :seqlen_q]
                mask |= listed.repeat_interleave(width, 3)[..., :seqlen_kv]
        return mask & (j <= p) if self.is_causal else mask

    def dense(self, dtype):
        """The definition in `dtype`, step by step as eager torch would do it."""
        group = self.q.shape[1] // max(self.k.shape[1], 1)
        q, k, v = (x.to(dtype) for x in (self.q, self.k, self.v))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        if self.softcap > 0:
            s = self.softcap * torch.tanh(s / self.softcap)
        if self.key_bias is not None:
            times = s.shape[1] // self.key_bias.shape[1]
            s = s + self.key_bias.to(dtype).repeat_interleave(times, 1)[:, :, None]
        if self.alibi_slopes is not None:
            position = torch.arange(s.shape[2])[:, None] + s.shape[3] - s.shape[2]
            distance = (position - torch.arange(s.shape[3])).abs()
            s = s - self.alibi_slopes.to(dtype)[:, None, None] * distance
        s = s.masked_fill(~self.mask(), -math.inf)
        logits = s
        if self.sink_logits is not None:
            column = self.sink_logits.to(dtype)[None, :, None, None].expand(*s.shape[:3], 1)
            logits = torch.cat([s, column], -1)
        lse = torch.logsumexp(logits.double(), -1)
        if logits.shape[-1] == 0:
            lse = torch.full(s.shape[:3], -math.inf, dtype=torch.float64)
        weights = torch.softmax(logits, -1)[..., : s.shape[-1]].nan_to_num(0.0)
        return weights @ v, lse


def listed_values(counts, indices, num_values):
    """Bool [batch, heads, rows, num_values]: whether a list holds the value."""
    valid = torch.arange(indices.shape[-1]) < counts[..., None]
    table = torch.zeros(*counts.shape, num_values + 1, dtype=torch.bool)
    return table.scatter_(-1, indices.long().where(valid, num_values), valid)[..., :num_values]


def random_lists(batch, heads, rows, num_values, density, generator):
    keep = torch.rand(batch, heads, rows, num_values, generator=generator) < density
    counts = keep.sum(-1).to(torch.int32)
    width = int(counts.max()) + 1 if counts.numel() else 1
    order = keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    indices = torch.full((batch, heads, rows, width), -12345, dtype=torch.int32)
    indices[..., :num_values] = order[..., :width]
    valid = torch.arange(width) < counts[..., None]
    return counts, indices.where(valid, -12345)


def make_qkv(shape_q, kv_heads, seqlen_kv, dim_v, dtype, generator):
    batch, _, _, dim = shape_q
    return tuple(
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (
            shape_q,
            (batch, kv_heads, seqlen_kv, dim),
            (batch, kv_heads, seqlen_kv, dim_v),
        )
    )


_expected = {}  # oracles by test, shared by the instruction sets


def check(case: Case, request):
    """Compares with float64, allowing twice the error of eager torch and a few units in the last
    place.
    """
    key = request.node.name.replace(request.node.callspec.params["isa"], "")
    if key not in _expected:
        _expected[key] = (*case.dense(torch.float64), case.dense(case.q.dtype)[0])
    expected, expected_lse, eager = _expected[key]
    out, lse = case.run()
    allowed = 2 * (eager.double() - expected).abs().max() if eager.numel() else 0.0
    allowed += (
        4
        * ULP[case.q.dtype]
        * max(1.0, float(case.v.double().abs().max()) if case.v.numel() else 1.0)
    )
    assert out.dtype == case.q.dtype and out.shape == expected.shape
    assert lse.dtype == torch.float32 and lse.shape == expected_lse.shape
    if out.numel():
        assert not out.isnan().any()
        assert (out.double() - expected).abs().max() <= allowed
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert (out[empty] == 0).all()
    lse_error = (lse.double() - expected_lse)[~empty].abs()
    if lse_error.numel():
        scale = max(1.0, float(expected_lse[~empty].abs().max()))
        assert lse_error.max() <= scale * (2e-6 if case.q.dtype == torch.float32 else 2e-5)


SIZES = [  # (batch, heads, kv_heads, seqlen_q, seqlen_kv, dim, dim_v)
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 65, 131, 64, 64),
    (1, 2, 1, 200, 77, 40, 96),
    (1, 8, 2, 3, 300, 128, 128),
    (1, 1, 1, 130, 257, 256, 17),
    (1, 2, 2, 0, 16, 32, 32),
    (1, 2, 2, 16, 0, 32, 32),
]
