"""One case of the kernel benchmark as tensors: the calls to compare, and whether ours is right."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from sparse_attn import BlockLayout, sparse_attention

from . import devices
from .cases import Case
from .devices import Device
from .oracle import assert_accurate, dense_attention, rounding_noise

CHECKED_ELEMENTS = 2**27  # of scores, when gradients are checked


class WrongResult(Exception):
    """The output of a case is not accurate."""


# --- what is called


class Problem:
    """The tensors of a case, and the calls to compare: ours, SDPA's, and those of others."""

    def __init__(self, case: Case, device: Device | None = None) -> None:
        self.case, self.device = case, device or devices.cpu()
        self.q, self.k, self.v = case.qkv(self.device.name)
        self.layout = case.pattern.layout(case).to(self.device.name)
        self.density = self.layout.density()
        self.leaves = [x.requires_grad_(case.part == "backward") for x in (self.q, self.k, self.v)]
        self.dout = torch.randn_like(self.q) if case.part == "backward" else None

    def calls(self, with_flex: bool) -> dict[str, Callable[[], object]]:
        """What is timed, by library; those that cannot run the case are left out."""
        found = {"ours": self.ours(), "SDPA": self.sdpa()}
        if with_flex and self.case.flex and (call := self.flex()):
            found["Flex"] = call
        if "flash-attn" in self.device.others and (call := self.flash()):
            found["flash-attn"] = call
        return found

    def ours(self) -> Callable[[], object]:
        return self._part(lambda: sparse_attention(self.q, self.k, self.v, self.layout))

    def sdpa(self) -> Callable[[], object]:
        options = {"is_causal": self.case.seqlen_q > 1, "enable_gqa": self.grouped}
        allowed = self.device.sdpa_backends if self.case.dtype != "fp32" else ()

        def attend() -> Tensor:
            with sdpa_kernel(list(allowed)) if allowed else nullcontext():
                return F.scaled_dot_product_attention(self.q, self.k, self.v, **options)

        return self._part(attend)

    def flex(self) -> Callable[[], object] | None:
        """FlexAttention; None, with a word about it, if torch does not compile it for the case."""
        mask = self.layout.to_block_mask(num_heads=self.case.num_heads)
        attend, options = compiled_flex(), {"block_mask": mask, "enable_gqa": self.grouped}
        if self.device.name != "cpu" and min(mask.BLOCK_SIZE) < 128:  # its tiles must fit
            rows, keys = (min(x, 64) for x in mask.BLOCK_SIZE)
            tiles = {"BLOCK_M": rows, "BLOCK_N": keys, "BLOCK_M1": rows, "BLOCK_N1": keys}
            options["kernel_options"] = tiles | {"BLOCK_M2": rows, "BLOCK_N2": keys}
        try:
            call = self._part(lambda: attend(self.q, self.k, self.v, **options))
            call()
        except RuntimeError as error:
            print(f"{self.case.name}: no FlexAttention: {error}", file=sys.stderr)
            return None
        return call

    def flash(self) -> Callable[[], object] | None:
        """flash-attn, dense; None if it is not installed or does not take the dtype."""
        attend = devices.flash_attention()
        if attend is None or self.case.dtype == "fp32":
            return None

        def call() -> Tensor:
            out = attend(*(x.transpose(1, 2) for x in self.leaves), causal=True)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return self._part(call)

    @property
    def grouped(self) -> bool:
        return self.case.num_heads != self.case.kv_heads

    def _part(self, attend: Callable[[], Tensor]) -> Callable[[], object]:
        """`attend` itself, or its backward pass alone."""
        if self.case.part == "forward":
            return attend
        out = attend()
        return lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)


def compiled_flex() -> Callable:
    """FlexAttention as one compiled kernel; the first call takes some seconds. Kernels of earlier
    cases are forgotten: after too many torch would no longer compile.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)


# --- whether it is right


def check(problem: Problem) -> float:
    """The greatest error of a case against float64; WrongResult if it is too great."""
    if problem.case.part == "backward":
        return worst_error(problem.case.name, backward_results(problem))
    qkv = (problem.q, problem.k, problem.v)
    out, lse = sparse_attention(*qkv, problem.layout, return_lse=True)
    compared = forward_results(*qkv, problem.layout, out, lse)
    return worst_error(problem.case.name, compared)


def worst_error(case: str, compared: dict[str, tuple[Tensor, Tensor, Tensor]]) -> float:
    """The greatest error of ours in (ours, float64, eager) results.

    Raises:
        WrongResult: if it is more than eager attention in the same dtype justifies.
    """
    worst = 0.0
    for name, (ours, exact, eager, *noise) in compared.items():
        try:
            assert_accurate(ours, exact, eager.to(ours.dtype), name, *noise)
        except AssertionError as error:
            raise WrongResult(f"{case}: {error}") from error
        worst = max(worst, float((ours.double() - exact).abs().max()))
    return worst


def forward_results(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, out: Tensor, lse: Tensor
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Ours, float64 and eager attention for out and lse, on some rows of every head."""
    rows, kv_heads = sampled_rows(q.shape[2]), k.shape[1]
    masks = [layout.visible(r, r + 1, num_heads=q.shape[1]) for r in rows.tolist()]
    exact, eager = [], []
    for queries, keys, values, seen in zip(
        q[:, :, rows].chunk(kv_heads, 1),
        k.split(1, 1),
        v.split(1, 1),
        torch.cat(masks, 2).chunk(kv_heads, 1),
        strict=True,
    ):
        exact.append(dense_attention(*(x.double() for x in (queries, keys, values)), seen))
        eager.append(dense_attention(queries, keys, values, seen))
    ours = (out[:, :, rows], lse[:, :, rows])
    exact, eager = ([torch.cat(x, 1) for x in zip(*pairs, strict=True)] for pairs in (exact, eager))
    return dict(zip(("out", "lse"), zip(ours, exact, eager, strict=True), strict=True))


def backward_results(problem: Problem) -> dict[str, tuple[Tensor, ...]]:
    """dq, dk, dv of ours, of float64 and of eager attention, and what rounding lse can change, for
    the last KV head.
    """
    case = problem.case
    group = case.num_heads // case.kv_heads
    heads = slice(case.num_heads - group, None)
    layout = problem.layout.expand_heads(case.num_heads)[:, heads]
    q, k, v = (x.detach()[:, -n:] for x, n in zip(problem.leaves, (group, 1, 1), strict=True))
    dout = problem.dout[:, heads]

    def dense(dtype: torch.dtype, rows: slice, mask: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (q[:, :, rows], k, v)]
        out, _ = dense_attention(*leaves, mask)
        return torch.autograd.grad(out, leaves, dout[:, :, rows].to(dtype))

    parts = []
    step = max(1, CHECKED_ELEMENTS // (group * case.seqlen_kv))
    for start in range(0, case.seqlen_q, step):
        rows = slice(start, min(start + step, case.seqlen_q))
        mask = layout.visible(rows.start, rows.stop, num_heads=group)
        some = (q[:, :, rows], k, v, mask, dout[:, :, rows])
        noise = rounding_noise(*some, some[-1].new_zeros(some[-1].shape[:3]))
        parts.append(
            [*(dense(x, rows, mask) for x in (torch.float64, q.dtype)), list(noise.values())]
        )

    dq, dk, dv = problem.ours()()
    ours = (dq[:, heads], dk[:, -1:], dv[:, -1:])
    summed = [_join(x) for x in zip(*parts, strict=True)]
    return {
        name: (x, *more) for name, x, *more in zip(("dq", "dk", "dv"), ours, *summed, strict=True)
    }


def _join(parts: tuple[tuple[Tensor, ...], ...]) -> tuple[Tensor, ...]:
    """(dq, dk, dv) of all rows from those of some rows each."""
    dq, dk, dv = zip(*parts, strict=True)
    return torch.cat(dq, 2), sum(x.double() for x in dk), sum(x.double() for x in dv)


def sampled_rows(seqlen: int) -> Tensor:
    """The first and last rows, those around the end of a block, and some in the middle."""
    wanted = [0, 1, 15, 16, 63, 64, seqlen // 3, seqlen // 2, seqlen - 65, seqlen - 2, seqlen - 1]
    return torch.tensor(sorted({row for row in wanted if 0 <= row < seqlen}))
