"""Every kernel in the configurations that the launchers choose, described for a compiler without a
device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..layout import BlockLayout
from ..varlen import Packing
from . import DTYPES, backward, forward, hip, infinite_hip
from .configs import Target
from .launch import Call, Launch

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
HEAD_DIMS = (64, 128, 256)
LAYOUTS = ("static", "blocks", "small blocks and columns", "pages")


@dataclass(frozen=True)
class CompileCase:
    """One kernel as `triton.compiler.ASTSource` takes it.

    Args:
        name: kernel, dtype, head_dim and layout.
        kernel: the function; a `triton.JITFunction` unless TRITON_INTERPRET is set.
        signature: for each argument its type, or "constexpr".
        constexprs: the values of the latter.
        aligned: arguments that are divisible by 16, pointers included.
        num_warps, num_stages: options of `triton.compile`.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int


def _described(name: str, launch: Launch) -> CompileCase:
    """What the just-in-time compiler would derive from the arguments of a launch."""
    signature, constexprs, aligned = {}, {}, []
    for parameter in launch.kernel.params:
        key, x = parameter.name, launch.arguments[parameter.name]
        if isinstance(x, torch.Tensor):
            signature[key] = _TYPES[x.dtype]
            aligned.append(key)
        elif isinstance(x, float) and not parameter.is_constexpr:
            signature[key] = "fp32"
        elif x is None or parameter.is_constexpr or (x == 1 and not parameter.do_not_specialize):
            signature[key] = "constexpr"
            constexprs[key] = x
        else:
            signature[key] = "i32" if abs(x) < 2**31 else "i64"
            if x % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(key)
    kernel = launch.kernel
    name = f"{kernel.fn.__name__.strip('_')} {name}"
    options = (launch.num_warps, launch.num_stages)
    return CompileCase(name, kernel, signature, constexprs, tuple(aligned), *options)


def _layout(kind: str, rows: int, keys: int) -> BlockLayout:
    def lists(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (1, 8, rows)
        return (
            torch.empty(shape, dtype=torch.int32, device="meta"),
            torch.empty(*shape, width, dtype=torch.int32, device="meta"),
        )

    per_head = torch.empty(8, dtype=torch.int32, device="meta")
    block = {"blocks": 64, "small blocks and columns": 16}.get(kind, 0)
    if not block:
        return BlockLayout((rows, keys), per_head, per_head)
    num_rows = -(-rows // block)
    columns = lists(num_rows, 64) if kind != "blocks" else (None, None)
    blocks = lists(num_rows, 32)
    return BlockLayout((rows, keys), per_head, per_head, (block, block), *blocks, *columns)


def _call(layout: BlockLayout, batch: int, softcap: float, is_causal: bool) -> Call:
    return Call(layout, 32, 8, batch, None, 0.125, softcap, is_causal)


def _launches(
    dtype: torch.dtype, dim: int, kind: str, target: Target, *, softcap: float, is_causal: bool
) -> list[Launch]:
    """A batch of 2 with 32 query and 8 KV heads: 4096 rows, or one row for each page table."""
    if kind == "pages":
        q = torch.empty(2, 32, dim, dtype=dtype, device="meta")
        k = torch.empty(512, 16, 8, dim, dtype=dtype, device="meta")
        ends = torch.empty(3, dtype=torch.int32, device="meta")
        table = torch.empty(2, 256, dtype=torch.int32, device="meta")
        packing = Packing(ends, None, ends[1:], table)
        call = _call(_layout("static", 1, 4096), 2, softcap, is_causal)
        return forward.launches(call, q, k, k, packing, False, target)[0]
    q = torch.empty(2, 32, 4096, dim, dtype=dtype, device="meta")
    k = torch.empty(2, 8, 4096, dim, dtype=dtype, device="meta")
    call = _call(_layout(kind, 4096, 4096), 2, softcap, is_causal)
    launches, (out, lse) = forward.launches(call, q, k, k, None, False, target)
    return launches + backward.launches(call, out, lse, q, k, k, out, lse, target)[0]


def compile_cases(capability: tuple[int, int], warp_size: int = 32) -> Iterator[CompileCase]:
    """Each kernel in each configuration that the launchers choose on a GPU of this capability: all
    dtypes, padded head dims and kinds of layouts, causal, without softcap; and with a softcap, not
    causal, for bfloat16 and head_dim 128.
    """
    target = Target(capability, 132, warp_size)
    plain = {"softcap": 0.0, "is_causal": True}
    cases = [(t, d, kind, plain) for t in DTYPES for d in HEAD_DIMS for kind in LAYOUTS]
    cases.append((torch.bfloat16, 128, "blocks", {"softcap": 20.0, "is_causal": False}))
    seen = set()
    for dtype, dim, kind, options in cases:
        name = f"{str(dtype).removeprefix('torch.')} {dim} {kind}"
        name += "" if options is plain else " softcap"
        for launch in _launches(dtype, dim, kind, target, **options):
            case = _described(name, launch)
            key = (case.kernel.fn, str(case.signature), str(case.constexprs), case.aligned)
            if key not in seen:
                seen.add(key)
                yield case
    yield from _selectors(target)


HIP = {
    "blocks": (4096, 16),
    "blocks of 1": (4096, 1),
    "blocks of 2": (4096, 2),
    "one row": (1, 16),
}


INFINITE_HIP = {"first stage": (16, 256), "last stage": (64, 8)}


def _selectors(target: Target) -> Iterator[CompileCase]:
    """HiP's search for 512 keys, and the searches of InfiniteHiP's stages for some queries of each
    row block in chunks of keys; in all kinds for bfloat16 and head_dim 128.
    """
    for dtype in DTYPES:
        for dim in HEAD_DIMS:
            name = f"{str(dtype).removeprefix('torch.')} {dim}"
            every = (dtype, dim) == (torch.bfloat16, 128)
            k = torch.empty(2, 8, 4096, dim, dtype=dtype, device="meta")
            for kind, (rows, block) in HIP.items():
                if every or kind == "blocks":
                    q = torch.empty(2, 32, rows, dim, dtype=dtype, device="meta")
                    sizes = (512 // block, 64, block, 2, 1, 2, 16, 256, False, True)
                    (launch,), _ = hip.launches(q, k, *sizes, target)
                    yield _described(f"{name} {kind}", launch)
            for kind, (queries, size) in INFINITE_HIP.items():
                if every or kind == "last stage":
                    q = torch.empty(2, 32, 64, queries, dim, dtype=dtype, device="meta")
                    left = torch.empty(2, 1, 64, 1024, dtype=torch.int32, device="meta")
                    limits = torch.empty(64, dtype=torch.int32, device="meta")
                    (launch,), _ = infinite_hip.launches(q, k, left, size, 4096, limits, target)
                    yield _described(f"{name} {kind}", launch)
