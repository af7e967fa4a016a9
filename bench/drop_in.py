"""Dense calls of torch's function, by torch and by the C++ kernels: which one takes less time.

Run it with `python -m bench.drop_in`, quiet. `sparse_attn.scaled_dot_product_attention` and
`patch(model, Dense())` leave to torch what `sparse_attn.ops.dense.torch_is_faster` says; a test
compares that rule with the results written here.
"""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_attn
from sparse_attn.ops import dense

from .lib import report
from .lib.devices import cpu_isa
from .lib.timing import OtherLoad, paired_ratio, paired_times

RESULTS = Path(__file__).parent / "results"
SECONDS = 0.3  # for the rounds of one call


class Shape(NamedTuple):
    """A call: `grad` says whether its gradients are taken too."""

    seqlen_q: int
    seqlen_kv: int
    num_heads: int
    kv_heads: int
    is_causal: bool
    grad: bool = False


SHAPES = (
    *(Shape(n, n, 4, 4, is_causal) for n in (16, 64, 256, 1024) for is_causal in (True, False)),
    *(Shape(n, n, 2, 2, True) for n in (4096, 8192)),
    Shape(4096, 4096, 2, 2, False),
    *(Shape(n, n, 4, 4, True, grad=True) for n in (64, 256, 1024)),
    Shape(4096, 4096, 2, 2, True, grad=True),
    *(Shape(n, 4096, 8, 8, False) for n in (1, 4, 16, 17, 24, 32, 128)),
    *(Shape(n, 4096, 8, 2, False) for n in (1, 16, 32)),
    Shape(1, 128, 8, 8, False),
    Shape(1, 1024, 8, 8, False),
)
HEAD_DIMS = (32, 64, 96, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Row:
    """Medians in microseconds, and the median of torch's time over ours in the same round."""

    shape: Shape
    dtype: torch.dtype
    head_dim: int
    ours: float
    torch: float
    ratio: float


HEADER = ("dtype", "head_dim", *Shape._fields, "torch us", "ours us", "vs torch", "left to torch")


def tensors(shape: Shape, dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    """q, k and v of a call."""
    q = torch.randn(1, shape.num_heads, shape.seqlen_q, head_dim)
    k, v = torch.randn(2, 1, shape.kv_heads, shape.seqlen_kv, head_dim).unbind(0)
    return [x.to(dtype).requires_grad_(shape.grad) for x in (q, k, v)]


def measure(shape: Shape, dtype: torch.dtype, head_dim: int) -> Row:
    """Time torch's function and ours, by the C++ kernels, in one run."""
    inputs = tensors(shape, dtype, head_dim)
    gqa = shape.num_heads != shape.kv_heads
    functions = {
        "torch": F.scaled_dot_product_attention,
        "ours": sparse_attn.scaled_dot_product_attention,
    }

    def call(function):
        out = function(*inputs, is_causal=shape.is_causal, enable_gqa=gqa)
        return torch.autograd.grad(out.sum(), inputs) if shape.grad else out

    calls = {name: functools.partial(call, x) for name, x in functions.items()}
    with mock.patch("sparse_attn.sdpa.torch_is_faster", lambda q, k: False):
        times = paired_times(calls, SECONDS)
    ours, torchs = (1e6 * median(times[name]) for name in ("ours", "torch"))
    return Row(shape, dtype, head_dim, ours, torchs, paired_ratio(times["torch"], times["ours"]))


def cells(row: Row) -> list[str]:
    """One line of the table, in the order of `HEADER`."""
    q, k, _ = tensors(row.shape, row.dtype, row.head_dim)
    return [
        str(row.dtype).removeprefix("torch."),
        str(row.head_dim),
        *(str(int(x)) for x in row.shape),
        f"{row.torch:.4g}",
        f"{row.ours:.4g}",
        f"{row.ratio:.2f}",
        str(int(dense.torch_is_faster(q, k))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load, rows = OtherLoad(), []
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for shape in SHAPES:
                rows.append(measure(shape, dtype, head_dim))
                print(" ".join(cells(rows[-1])), file=sys.stderr, flush=True)
    lines = [cells(row) for row in rows]
    report.write_rows(args.out / f"drop-in-{cpu_isa()}.csv", HEADER, lines)
    kept = [float(line[-2]) for line in lines if line[-1] == "0"]
    slower = [" ".join(line) for line in lines if line[-1] == "0" and float(line[-2]) < 1]
    print(f"{len(kept)} of {len(lines)} calls are ours; torch's time over ours: median")
    print(f"{median(kept):.2f}, least {min(kept):.2f}; below 1: {slower or 'none'}")
    print(report.conditions(load.share()))


if __name__ == "__main__":
    main()
