"""A small attention kernel, compiled for GPUs that are not here: a program of its own, as Triton's
interpreter may be on in the tests' process. Prints what `bench.triton_table` reads.
"""

import json
from dataclasses import asdict
from types import SimpleNamespace

import triton
import triton.language as tl

from bench.triton_table import compile_case


@triton.jit
def attention(
    q_ptr, k_ptr, v_ptr, out_ptr, num_tiles, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM)
    q = tl.load(q_ptr + m[:, None] * HEAD_DIM + d[None, :])
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(num_tiles):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + n[:, None] * HEAD_DIM + d[None, :])
        v = tl.load(v_ptr + n[:, None] * HEAD_DIM + d[None, :])
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale)
        l_i += tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    out = (acc / l_i[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * HEAD_DIM + d[None, :], out)


def case(name: str, rows: int, head_dim: int, dtype: str = "bf16", aligned: bool = True):
    sizes = {"BLOCK_M": rows, "BLOCK_N": 64, "HEAD_DIM": head_dim}
    pointers = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
    signature = {x: f"*{dtype}" for x in pointers} | {"num_tiles": "i32", "scale": "fp32"}
    return SimpleNamespace(
        name=name,
        kernel=attention,
        signature=signature | dict.fromkeys(sizes, "constexpr"),
        constexprs=sizes,
        aligned=pointers if aligned else (),
        options={"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True},
    )


CASES = [
    *((case("good", 64, 64), arch) for arch in ("sm_80", "sm_90", "sm_100", "gfx942")),
    (case("spilling", 128, 256), "sm_80"),
    (case("unaligned", 64, 64, aligned=False), "sm_80"),
    (case("exact float32", 32, 64, dtype="fp32"), "sm_80"),
]

if __name__ == "__main__":
    print(json.dumps([asdict(compile_case(*x)) for x in CASES]))
