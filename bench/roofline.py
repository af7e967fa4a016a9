"""What attention over a layout should cost on a GPU: a model, not a measurement.

`python -m bench.roofline` writes its table for the shapes that papers publish; `docs/roofline.md`
has the formulas and what is assumed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import gcd
from pathlib import Path

from sparse_attn import BlockLayout

from .lib import report
from .lib.cases import DTYPES, Blocks, Case, Columns, SinkWindow
from .lib.gpus import Gpu, gpu
from .lib.tiles import all_pairs, keys_touched, tiles_touched

RESULTS = Path(__file__).parent / "results" / "roofline.md"

# Share of the peak that published kernels reach, (dense, sparse): see docs/roofline.md.
SHARES = {
    ("A100", "forward"): (0.73, 0.66),
    ("A100", "backward"): (0.63, 0.53),
    ("H100", "forward"): (0.62, 0.38),
    ("H100", "backward"): (0.57, 0.33),
    ("B200", "forward"): (0.71, 0.27),
    ("B200", "backward"): (0.62, 0.23),
}
BANDWIDTH_SHARE = 0.9
LAUNCH_SECONDS = 5e-6
SPARSE_TILE, DENSE_TILE = (128, 64), (128, 128)


@dataclass(frozen=True)
class Shape:
    """What of a call the layout does not say."""

    num_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    head_dim_v: int | None = None
    dtype: str = "bf16"
    batch: int = 1
    part: str = "forward"
    is_causal: bool = True

    def __post_init__(self) -> None:
        if self.part not in ("forward", "backward"):
            raise ValueError(f"part must be 'forward' or 'backward', got {self.part!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if min(self.num_heads, self.kv_heads, self.head_dim, self.batch) < 1:
            raise ValueError(f"sizes must be positive, got {self}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide num_heads {self.num_heads}")

    @property
    def widths(self) -> tuple[int, int]:
        """``(head_dim, head_dim_v)``."""
        return self.head_dim, self.head_dim_v or self.head_dim

    @property
    def flops_per_pair(self) -> int:
        """Forward ``q k^T`` and ``p v``; backward ``q k^T``, ``dout v^T``, dq, dk and dv."""
        qk, v = self.widths
        return 2 * (qk + v) if self.part == "forward" else 2 * (3 * qk + 2 * v)


@dataclass(frozen=True)
class Cost:
    """What a call costs on a GPU.

    `flops` counts the pairs that are seen, `tile_flops` all pairs of the tiles that hold one;
    `bytes` counts each byte once, `kv_bytes` are those of the keys and values seen. `floor` (s) is
    what no kernel can beat: peak arithmetic or peak bandwidth, whichever `bound` names. `expected`
    (s) has the tiles, and the shares of both peaks that kernels are assumed to reach.
    """

    density: float
    flops: float
    tile_flops: float
    bytes: float
    kv_bytes: float
    floor: float
    bound: str
    compute: float
    memory: float

    @property
    def expected(self) -> float:
        return LAUNCH_SECONDS + max(self.compute, self.memory)


@dataclass(frozen=True)
class Comparison:
    """A layout beside dense attention of the same shape."""

    sparse: Cost
    dense: Cost

    @property
    def speedup(self) -> float:
        """Expected time of dense attention over that of the layout."""
        return self.dense.expected / self.sparse.expected

    @property
    def crossover(self) -> float:
        """The density below which such a layout is expected to be faster than dense attention.

        Tiles and bytes of keys are taken to grow with density.
        """
        cost, budget = self.sparse, self.dense.expected - LAUNCH_SECONDS
        fixed = cost.memory * (1 - cost.kv_bytes / cost.bytes)
        room = [1 / cost.density if cost.density else 0.0]
        if cost.compute > 0:
            room.append(budget / cost.compute)
        if cost.memory > fixed:
            room.append((budget - fixed) / (cost.memory - fixed))
        return cost.density * max(0.0, min(room))


# --- the model


def cost(
    layout: BlockLayout,
    shape: Shape,
    gpu: Gpu,
    *,
    tile: tuple[int, int] = SPARSE_TILE,
    share: float | None = None,
) -> Cost:
    """The cost of one call.

    Args:
        layout: which keys each row sees.
        shape: heads, widths, dtype, forward or backward.
        gpu: see `bench.lib.gpus`.
        tile: rows and keys that the kernel multiplies at once; a part of a tile costs as much
            as a whole one. Default 128 by 64.
        share: of peak arithmetic that the kernel reaches. Default: what sparse kernels do (SHARES).

    Returns:
        Cost: all numbers of the call as a whole.

    Raises:
        ValueError: if the GPU's share is not known and not given.

    Example:
        >>> from bench.lib.gpus import gpu
        >>> layout = BlockLayout.sink_window((8192, 8192), sink=64, window=1024)
        >>> cost(layout, Shape(), gpu("H100")).bound
        'compute'
    """
    share = _share(gpu, shape, 1) if share is None else share
    density = layout.density(is_causal=shape.is_causal)
    pairs = shape.batch * shape.num_heads * density * all_pairs(layout, shape.is_causal)
    pack = heads_per_tile(layout, shape)
    tiles, height = tiles_touched(layout, tile, pack=pack, is_causal=shape.is_causal)
    tile_pairs = shape.batch * shape.num_heads // pack * tiles * height * tile[1]
    flops, tile_flops = (shape.flops_per_pair * n for n in (pairs, tile_pairs))
    total, kv = traffic(layout, shape)
    peak = gpu.flops[shape.dtype]
    times = {"compute": flops / peak, "memory": total / gpu.bandwidth}
    bound = max(times, key=times.get)
    return Cost(
        density=density,
        flops=flops,
        tile_flops=tile_flops,
        bytes=total,
        kv_bytes=kv,
        floor=times[bound],
        bound=bound,
        compute=tile_flops / (peak * share),
        memory=total / (gpu.bandwidth * BANDWIDTH_SHARE),
    )


def compare(
    layout: BlockLayout, shape: Shape, gpu: Gpu, *, tile: tuple[int, int] = SPARSE_TILE
) -> Comparison:
    """The layout, and dense attention of the same shape in the fastest published kernel."""
    every = BlockLayout.dense(layout.seqlens)
    dense = cost(every, shape, gpu, tile=DENSE_TILE, share=_share(gpu, shape, 0))
    return Comparison(cost(layout, shape, gpu, tile=tile), dense)


def _share(gpu: Gpu, shape: Shape, which: int) -> float:
    if (gpu.name, shape.part) not in SHARES:
        known = sorted({name for name, _ in SHARES})
        raise ValueError(f"no share of peak is known for {gpu.name}, only for {', '.join(known)}")
    return SHARES[gpu.name, shape.part][which]


def heads_per_tile(layout: BlockLayout, shape: Shape) -> int:
    """Consecutive query heads that share a KV head and everything in the layout."""
    sizes = (x.shape[0 if x.dim() == 1 else 1] for x in layout.tensors().values())
    return gcd(shape.num_heads // shape.kv_heads, *(shape.num_heads // size for size in sizes))


def traffic(layout: BlockLayout, shape: Shape) -> tuple[float, float]:
    """Bytes that pass between memory and chip when each passes once, and those of them that are
    keys and values which are read.
    """
    itemsize = DTYPES[shape.dtype].itemsize
    row = sum(shape.widths) * itemsize
    rows = shape.batch * shape.num_heads * layout.seqlen_q
    keys = shape.batch * shape.kv_heads * layout.seqlen_kv
    kv = (
        shape.batch
        * shape.kv_heads
        * keys_touched(layout, shape.kv_heads, is_causal=shape.is_causal)
        * row
    )
    lists = sum(x.numel() * x.itemsize for x in layout.tensors().values())
    if shape.part == "forward":  # q, out, lse
        return kv + lists + rows * (row + 4), kv
    # q, out, dout, dq, lse, delta; dk and dv
    return kv + lists + rows * (2 * row + 8) + keys * row, kv


# --- the table

DENSITIES = (0.5, 0.25, 0.1, 0.05)


def _case(pattern, seqlen: int, **fields) -> Case:
    """Lists shared by all heads: another head's would cost the same."""
    fields = {"seqlen_q": seqlen, **fields}
    return Case(pattern, seqlen_kv=seqlen, head_dim=128, num_heads=32, kv_heads=1, **fields)


TABLE = [
    *(_case(Blocks(64, 64, d), n) for n in (8192, 32768, 131072) for d in DENSITIES),
    *(_case(Blocks(128, 128, d), 32768) for d in DENSITIES),
    *(_case(Blocks(16, 16, d), 32768) for d in (0.25, 0.1)),
    *(_case(Columns(d), 32768) for d in (0.25, 0.1)),
    _case(SinkWindow(64, 4096, 0.236), 32768),
    *(_case(Blocks(64, 64, d), 8192, part="backward") for d in DENSITIES),
    *(_case(Blocks(64, 64, d), 32768, part="backward") for d in DENSITIES),
    *(_case(Blocks(1, 64, d), n, seqlen_q=1) for n in (32768, 131072) for d in DENSITIES),
    *(_case(Columns(d), 131072, seqlen_q=1) for d in (0.1,)),
]
HEADER = (
    "case",
    "S",
    "layout",
    "density",
    "TFLOP",
    "in tiles",
    "MB",
    "floor ms",
    "bound",
    "expected ms",
    "dense ms",
    "speed-up",
    "faster below",
)

NOTES = """\
**This is a model, not a measurement**: no GPU was used. Batch 1, bfloat16, head_dim 128, 32 query
heads on 8 KV heads, causal; tiles of 128 rows by 64 keys. TFLOP are of the pairs that are seen,
"in tiles" of all pairs of the tiles that a kernel multiplies. "Floor" is peak arithmetic or peak
bandwidth, whichever takes longer; "expected" and "dense" take the shares of them that published
Triton kernels and the fastest published dense kernels reach. "Faster below" is the density from
which on such a layout is expected to beat dense attention. Choosing the keys is not in it.
Formulas and sources:
[docs/roofline.md](../../docs/roofline.md)."""


def cells(case: Case, found: Comparison) -> list[str]:
    """One row of the table, in the order of `HEADER`."""
    x = found.sparse
    return [
        case.kind,
        str(case.seqlen_kv),
        str(case.pattern),
        f"{x.density:.3f}",
        f"{x.flops / 1e12:.3g}",
        f"{x.tile_flops / 1e12:.3g}",
        f"{x.bytes / 1e6:.3g}",
        f"{1e3 * x.floor:.3g}",
        x.bound,
        f"{1e3 * x.expected:.3g}",
        f"{1e3 * found.dense.expected:.3g}",
        f"{found.speedup:.2f}",
        f"{found.crossover:.2f}",
    ]


def table(cases: list[Case], names: list[str]) -> str:
    """The whole page but its heading."""
    layouts = {(c.pattern, c.seqlens): c.pattern.layout(c) for c in cases}
    parts = []
    for name in names:
        rows = []
        for case in cases:
            shape = Shape(num_heads=32, kv_heads=8, head_dim=case.head_dim, part=case.part)
            layout = layouts[case.pattern, case.seqlens]
            rows.append(cells(case, compare(layout, shape, gpu(name))))
        parts.append(f"## {name}\n\n{report.markdown_table(rows, HEADER)}")
    return "\n\n".join([NOTES, *parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    known = sorted({name for name, _ in SHARES})
    parser.add_argument("--gpu", choices=known, help="default: all of them")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the page to write")
    args = parser.parse_args()
    text = table(TABLE, [args.gpu] if args.gpu else known)
    print(text)
    args.out.write_text(f"# What to expect on a GPU: a model, not a measurement\n\n{text}\n")


if __name__ == "__main__":
    main()
