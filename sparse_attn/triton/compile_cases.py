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
from . import DTYPES, backward, forward, hip, infinite_hip, lists, prepare
from .autotune import Choice
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
# Kinds of calls: of layouts, of a row for each sequence ("decoding"), of packed sequences. Without
# lists the kernels are what is left of those with them, for all dtypes the same.
KINDS = ("blocks", "small blocks and columns", "pages", "decoding")
FORWARD_ONLY = ("packed", "pages", "decoding")


@dataclass(frozen=True)
class CompileCase:
    """One kernel as `triton.compiler.ASTSource` takes it.

    Args:
        name: kernel, dtype, head_dim, layout and configuration.
        kernel: the function; a `triton.JITFunction` unless TRITON_INTERPRET is set.
        signature: for each argument its type, or "constexpr".
        constexprs: the values of the latter.
        aligned: arguments that are divisible by 16, pointers included.
        options: those of `triton.compile`.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]


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
    tile = "x".join(str(constexprs[x]) for x in ("BLOCK_M", "BLOCK_N") if x in constexprs)
    part = "" if launch.arguments.get("active_ptr") is None else "_of_columns"
    config = f"{tile} w{launch.num_warps} s{launch.num_stages}"
    name = f"{kernel.fn.__name__.strip('_')}{part} {name} {config}"
    return CompileCase(name, kernel, signature, constexprs, tuple(aligned), launch.options)


def _layout(kind: str, rows: int, keys: int) -> BlockLayout:
    def counts_and_indices(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (1, 8, rows)
        return (
            torch.empty(shape, dtype=torch.int32, device="meta"),
            torch.empty(*shape, width, dtype=torch.int32, device="meta"),
        )

    per_head = torch.empty(8, dtype=torch.int32, device="meta")
    block = {"blocks": (64, 64), "small blocks and columns": (16, 16), "decoding": (1, 16)}.get(
        kind
    )
    if not block:
        return BlockLayout((rows, keys), per_head, per_head)
    num_rows = -(-rows // block[0])
    columns = (None, None) if kind == "blocks" else counts_and_indices(num_rows, 64)
    blocks = counts_and_indices(num_rows, 32)
    return BlockLayout((rows, keys), per_head, per_head, block, *blocks, *columns)


def _steps(
    dtype: torch.dtype, dim: int, kind: str, target: Target, *, softcap: float, is_causal: bool
) -> list[Choice | Launch]:
    """A batch of 2 with 64 query and 8 KV heads: 4096 rows, or one row of each sequence."""
    rows = 1 if kind in ("pages", "decoding") else 4096
    q = torch.empty(2, 64, rows, dim, dtype=dtype, device="meta")
    k = torch.empty(2, 8, 4096, dim, dtype=dtype, device="meta")
    call = Call(_layout(kind, rows, 4096), 64, 8, 2, None, 0.125, softcap, is_causal)
    packing = None
    if kind in ("pages", "packed"):
        ends = torch.empty(3, dtype=torch.int32, device="meta")
        q, k = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
        packing = Packing(ends, ends)
    if kind == "pages":
        table = torch.empty(2, 256, dtype=torch.int32, device="meta")
        packing = Packing(ends, None, ends[1:], table)
        k = k.unflatten(0, (-1, 16))
    steps, (out, lse) = forward.steps(call, q, k, k, packing, False, target)
    if kind in FORWARD_ONLY:
        return steps
    return steps + backward.steps(call, out, lse, q, k, k, out, lse, target)[0]


def _launches(step: Choice | Launch) -> list[Launch]:
    """The launches of a step, in all configurations that it may choose."""
    if isinstance(step, Launch):
        return [step]
    return [launch for config in step.candidates for launch in step.build(config)]


def compile_cases(capability: tuple[int, int], warp_size: int = 32) -> Iterator[CompileCase]:
    """Each kernel in each configuration that the launchers may choose on a GPU of this capability:
    all dtypes, padded head dims and kinds of calls, causal, without softcap; for bfloat16 also
    without lists, and of head_dim 128 packed sequences, and with a softcap, not causal.
    """
    target = Target(capability, 132, warp_size)
    plain = {"softcap": 0.0, "is_causal": True}
    bfloat16 = torch.bfloat16
    cases = [(bfloat16, dim, "static", plain) for dim in HEAD_DIMS]
    cases += [(dtype, dim, kind, plain) for dtype in DTYPES for dim in HEAD_DIMS for kind in KINDS]
    cases.append((bfloat16, 128, "packed", plain))
    cases.append((bfloat16, 128, "blocks", {"softcap": 20.0, "is_causal": False}))
    seen = set()
    for dtype, dim, kind, options in cases:
        name = f"{str(dtype).removeprefix('torch.')} {dim} {kind}"
        name += "" if options is plain else " softcap"
        for step in _steps(dtype, dim, kind, target, **options):
            for launch in _launches(step):
                case = _described(name, launch)
                key = (
                    case.kernel.fn, str(case.signature), str(case.constexprs), case.aligned,
                    str(case.options),
                )  # fmt: skip
                if key not in seen:
                    seen.add(key)
                    yield case
    yield from _preparations()
    yield from _selectors(target)


def _preparations() -> Iterator[CompileCase]:
    """What runs before the kernels, on what both kinds of lists need."""
    layout = _layout("small blocks and columns", 4096, 4096)
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    for name, packing in (("lists", None), ("lists of packed sequences", Packing(ends, ends))):
        (launch,), _ = prepare.launches(layout, packing, (8192, 8192), True)
        yield _described(name, launch)
    for per_tile in (1, 4):
        counts, indices = layout.kv_num_blocks, layout.kv_indices
        yield _described(
            f"{per_tile} a tile", lists.pairs(counts, indices, layout.num_kv_blocks, per_tile)
        )


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
