"""Every kernel in the configurations that the launchers choose, described for a compiler without a
device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sparse_attn import BlockLayout
from sparse_attn.contract.packing import Packing
from sparse_attn.triton import backward, forward, hip, infinite_hip, lists, prepare
from sparse_attn.triton.autotune import Choice
from sparse_attn.triton.configs import Target
from sparse_attn.triton.launch import Call, Launch
from sparse_attn.triton.support import DTYPES

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
HEAD_DIMS = (64, 128, 256)
# Kinds of calls: of layouts, of a row for each sequence ("decoding"), of packed sequences. Without
# lists the kernels are what is left of those with them.
KINDS = ("blocks", "small blocks and columns", "pages", "decoding")
FORWARD_ONLY = ("packed", "pages", "decoding")


@dataclass(frozen=True)
class CompiledCall:
    """A call whose kernels are compiled: what they are made for."""

    dtype: torch.dtype
    head_dim: int
    kind: str
    is_causal: bool = True
    softcap: float = 0.0
    has_sinks: bool = False
    has_biases: bool = False
    batch: int = 2  # of many, nothing is split

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), str(self.head_dim), self.kind]
        parts += ["not causal"] * (not self.is_causal) + ["softcap"] * (self.softcap > 0)
        parts += ["sinks"] * self.has_sinks + ["biases"] * self.has_biases
        parts += ["unsplit"] * (self.batch > 2)
        return " ".join(parts)


def compiled_calls() -> list[CompiledCall]:
    """Float32 and bfloat16 with every padded head dim and kind of call; what may be added to a call
    for some of them. Float16 takes bfloat16's configurations and instructions of the same shapes:
    one head dim of it is compiled.
    """
    half, full, many = torch.bfloat16, torch.float32, 64
    found = [CompiledCall(half, dim, "static") for dim in HEAD_DIMS]
    for dim in HEAD_DIMS:
        found += [CompiledCall(x, dim, kind) for x in (full, half) for kind in KINDS]
    found += [CompiledCall(torch.float16, 128, kind) for kind in ("blocks", "decoding")]
    found += [CompiledCall(half, 128, "packed")]
    found += [CompiledCall(x, 128, "blocks", softcap=20.0) for x in (full, half)]
    found += [CompiledCall(x, 128, "blocks", has_biases=True) for x in (full, half)]
    found += [CompiledCall(half, 128, "blocks", is_causal=False, has_sinks=True)]
    found += [CompiledCall(half, 128, kind, batch=many) for kind in ("blocks", "decoding")]
    found += [CompiledCall(half, 128, "wide blocks")]
    return found


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
    sizes = {"blocks": (64, 64), "small blocks and columns": (16, 16), "decoding": (1, 16)}
    block = (sizes | {"wide blocks": (128, 128)}).get(kind)
    if not block:
        return BlockLayout((rows, keys), per_head, per_head)
    num_rows = -(-rows // block[0])
    columns = (None, None) if block[0] >= 64 else counts_and_indices(num_rows, 64)
    blocks = counts_and_indices(num_rows, 32)
    return BlockLayout((rows, keys), per_head, per_head, block, *blocks, *columns)


def steps_of(what: CompiledCall, target: Target) -> list[Choice | Launch]:
    """What is run for a call with 64 query and 8 KV heads: 4096 rows, or one row of each
    sequence.
    """
    rows = 1 if what.kind in ("pages", "decoding") else 4096
    batch, dim, dtype = what.batch, what.head_dim, what.dtype
    q = torch.empty(batch, 64, rows, dim, dtype=dtype, device="meta")
    k = torch.empty(batch, 8, 4096, dim, dtype=dtype, device="meta")
    sinks = torch.empty(64, device="meta") if what.has_sinks else None
    layout = _layout(what.kind, rows, 4096)
    biases = (torch.empty(1, 8, 4096, device="meta"), torch.empty(64, device="meta"))
    call = Call(
        layout, 64, 8, batch, sinks, 0.125, what.softcap, what.is_causal,
        *(biases if what.has_biases else ()),
    )  # fmt: skip
    packing = None
    if what.kind in ("pages", "packed"):
        ends = torch.empty(batch + 1, dtype=torch.int32, device="meta")
        q, k = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
        packing = Packing(ends, ends)
    if what.kind == "pages":
        table = torch.empty(batch, 256, dtype=torch.int32, device="meta")
        packing = Packing(ends, None, ends[1:], table)
        k = k.unflatten(0, (-1, 16))
    steps, (out, lse) = forward.steps(call, q, k, k, packing, False, target)
    if what.kind in FORWARD_ONLY:
        return steps
    return steps + backward.steps(call, out, lse, q, k, k, out, lse, target)[0]


def _launches(step: Choice | Launch) -> list[Launch]:
    """The launches of a step, in all configurations that it may choose."""
    if isinstance(step, Launch):
        return [step]
    return [launch for config in step.candidates for launch in step.build(config)]


def compile_cases(capability: tuple[int, int], warp_size: int = 32) -> Iterator[CompileCase]:
    """Each kernel in each configuration that the launchers may choose on a GPU of this capability
    for the calls of `compiled_calls`.
    """
    target = Target(capability, 132, warp_size)
    seen = set()
    for what in compiled_calls():
        name = str(what)
        for step in steps_of(what, target):
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
                    sizes = (512 // block, 64, block, 4, 1, 2, 16, 256, False, True)
                    (launch,), _ = hip.launches(q, k, *sizes, target)
                    yield _described(f"{name} {kind}", launch)
            for kind, (queries, size) in INFINITE_HIP.items():
                if every or kind == "last stage":
                    q = torch.empty(2, 32, 64, queries, dim, dtype=dtype, device="meta")
                    left = torch.empty(2, 1, 64, 1024, dtype=torch.int32, device="meta")
                    limits = torch.empty(64, dtype=torch.int32, device="meta")
                    (launch,), _ = infinite_hip.launches(q, k, left, size, 4096, limits, target)
                    yield _described(f"{name} {kind}", launch)
