"""The table of benchmarks: one row is one case."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn import BlockLayout

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Dense:
    """Every causal key."""

    density: float = 1.0

    def __str__(self) -> str:
        return "dense"

    def layout(self, case: Case) -> BlockLayout:
        return BlockLayout.dense(case.seqlens)


@dataclass(frozen=True)
class SinkWindow:
    """The first and the last keys of each row; `density` is for `seqlen` rows and keys."""

    sink: int
    window: int
    density: float

    def __str__(self) -> str:
        return f"sink {self.sink} + window {self.window}"

    def layout(self, case: Case) -> BlockLayout:
        return BlockLayout.sink_window(case.seqlens, sink=self.sink, window=self.window)


@dataclass(frozen=True)
class Blocks:
    """Random blocks of each KV head, always with the first and with the diagonal."""

    block_q: int
    block_kv: int
    density: float

    def __str__(self) -> str:
        return f"{self.block_q}x{self.block_kv} blocks"

    def layout(self, case: Case) -> BlockLayout:
        seqlen_q, seqlen_kv = case.seqlens
        first = torch.arange(0, seqlen_q, self.block_q)[:, None] + seqlen_kv - seqlen_q
        last = (first + self.block_q).clamp(max=seqlen_kv) - 1
        begin = torch.arange(0, seqlen_kv, self.block_kv)
        pairs = sum((row + 1 - begin).clamp(0, self.block_kv).double() for row in (first, last)) / 2
        always = (begin == 0) | (begin == last // self.block_kv * self.block_kv)
        optional = ~always & (pairs > 0)
        count = (self.density * pairs.sum() - pairs[always].sum()) / pairs[optional].mean()
        order = torch.rand(1, case.kv_heads, *pairs.shape, generator=_seeded())
        rank = order.masked_fill(~optional, 2).flatten(2).argsort().argsort().view_as(order)
        kept = (always & (pairs > 0)) | (rank < count.round())
        size = (self.block_q, self.block_kv)
        return BlockLayout.from_dense(kept, block_size=size, seqlens=case.seqlens)


@dataclass(frozen=True)
class Columns:
    """Random single keys of each KV head that all rows share (vertical stripes), and key 0."""

    density: float

    def __str__(self) -> str:
        return "columns"

    def layout(self, case: Case) -> BlockLayout:
        seqlen_q, seqlen_kv = case.seqlens
        kept = torch.rand(case.kv_heads, seqlen_kv, generator=_seeded()) < self.density
        kept[:, 0] = True
        listed = BlockLayout.from_dense(
            kept[None, :, None], block_size=(seqlen_q, 1), seqlens=case.seqlens
        )
        none = torch.zeros(1, dtype=torch.int32)
        return BlockLayout(
            case.seqlens,
            none,
            none,
            num_columns=listed.kv_num_blocks,
            column_indices=listed.kv_indices,
            column_group=-(-seqlen_q // 64),
        )


def _seeded(device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    `tier` is the smallest run that holds it: "quick" is in every run and on the page, "default",
    or "full". `flex` asks for a comparison with FlexAttention. `part` is "forward" or "backward".
    """

    pattern: Dense | SinkWindow | Blocks | Columns
    dtype: str = "bf16"
    seqlen_q: int = 8192
    seqlen_kv: int = 8192
    head_dim: int = 64
    num_heads: int = 8
    kv_heads: int = 8
    part: str = "forward"
    tier: str = "default"
    flex: bool = False

    @property
    def kind(self) -> str:
        """ "prefill", "decode" or "backward"."""
        if self.part == "backward":
            return "backward"
        return "decode" if self.seqlen_q == 1 else "prefill"

    @property
    def name(self) -> str:
        """What `--only` looks at."""
        density = (
            f" {self.pattern.density:g}" if isinstance(self.pattern, (Blocks, Columns)) else ""
        )
        return (
            f"{self.kind} {self.dtype} S{self.seqlen_kv} D{self.head_dim} {self.pattern}{density}"
        )

    @property
    def seqlens(self) -> tuple[int, int]:
        return self.seqlen_q, self.seqlen_kv

    def qkv(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Standard normal q, k, v, the same in every run on a device."""
        generator, dtype = _seeded(device), DTYPES[self.dtype]

        def normal(heads: int, seqlen: int) -> Tensor:
            shape = (1, heads, seqlen, self.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        q = normal(self.num_heads, self.seqlen_q)
        return q, normal(self.kv_heads, self.seqlen_kv), normal(self.kv_heads, self.seqlen_kv)


def square(seqlen: int, pattern, **fields) -> Case:
    """As many queries as keys."""
    return Case(pattern, seqlen_q=seqlen, seqlen_kv=seqlen, **fields)


GROUPED = {"head_dim": 128, "num_heads": 32, "kv_heads": 8}


def decode(pattern, seqlen: int = 32768, **fields) -> Case:
    """One new token of 32 heads that share 8 KV heads, over 32K keys."""
    return Case(pattern, seqlen_q=1, seqlen_kv=seqlen, **GROUPED, **fields)


def grouped(seqlen: int, pattern, **fields) -> Case:
    """As many queries of 32 heads as keys of 8, the shape of most published tables."""
    return square(seqlen, pattern, **GROUPED, **fields)


B64 = {density: Blocks(64, 64, density) for density in (1.0, 0.5, 0.25, 0.1, 0.05)}
SPARSE = [B64[density] for density in (0.5, 0.25, 0.1, 0.05)]
WINDOW = SinkWindow(64, 1024, density=0.248)

CASES = [
    # Prefill, bfloat16
    square(8192, Dense(), tier="quick", flex=True),
    square(8192, B64[1.0]),
    square(8192, B64[0.5], flex=True),
    square(8192, B64[0.25], tier="quick", flex=True),
    square(8192, B64[0.1], tier="quick", flex=True),
    square(8192, B64[0.05], flex=True),
    square(8192, Blocks(32, 32, 0.25)),
    square(8192, Blocks(16, 16, 0.25)),
    square(8192, Columns(0.1), tier="quick"),
    square(8192, WINDOW, tier="quick"),
    square(8192, Dense(), head_dim=128, tier="quick"),
    square(8192, B64[1.0], head_dim=128),
    *(square(8192, pattern, head_dim=128) for pattern in SPARSE),
    square(8192, Blocks(32, 32, 0.25), head_dim=128),
    square(8192, Blocks(16, 16, 0.25), head_dim=128),
    square(8192, Columns(0.1), head_dim=128),
    # Prefill, float32 and float16
    square(8192, Dense(), dtype="fp32", tier="quick"),
    square(8192, B64[0.5], dtype="fp32"),
    square(8192, B64[0.25], dtype="fp32", flex=True),
    square(8192, B64[0.1], dtype="fp32"),
    square(8192, B64[0.05], dtype="fp32"),
    *(square(8192, pattern, dtype="fp32", head_dim=128) for pattern in (Dense(), *SPARSE)),
    square(8192, Dense(), dtype="fp16"),
    square(8192, B64[0.5], dtype="fp16"),
    square(8192, B64[0.25], dtype="fp16", tier="quick"),
    square(8192, B64[0.1], dtype="fp16"),
    square(8192, B64[0.05], dtype="fp16"),
    *(square(8192, pattern, dtype="fp16", head_dim=128) for pattern in (Dense(), *SPARSE)),
    # Small problems
    square(128, Dense()),
    square(128, Dense(), dtype="fp32"),
    square(512, Dense(), tier="quick"),
    square(512, Dense(), dtype="fp32"),
    square(512, B64[0.5]),
    # Decoding
    decode(Dense(), tier="quick"),
    decode(Blocks(1, 64, 0.1), tier="quick"),
    decode(Blocks(1, 16, 0.1)),
    decode(Dense(), dtype="fp32"),
    decode(Blocks(1, 64, 0.1), dtype="fp32"),
    # Backward
    square(2048, Dense(), part="backward", tier="quick"),
    square(2048, B64[0.25], part="backward", tier="quick"),
    square(2048, Dense(), dtype="fp32", part="backward"),
    square(2048, B64[0.25], dtype="fp32", part="backward"),
    # Longer prefill
    *(
        square(seqlen, pattern, head_dim=head_dim, tier="full")
        for seqlen in (16384, 32768)
        for head_dim in (64, 128)
        for pattern in (Dense(), *SPARSE)
    ),
    square(16384, Dense(), dtype="fp32", tier="full"),
    square(16384, B64[0.25], dtype="fp32", tier="full"),
    square(8192, Dense(), part="backward", tier="full"),
    square(8192, B64[0.25], part="backward", tier="full"),
]

CUDA_CASES = [
    # Prefill, bfloat16, 8K to 128K
    grouped(8192, Dense(), tier="quick", flex=True),
    grouped(8192, B64[0.5], flex=True),
    grouped(8192, B64[0.25], tier="quick", flex=True),
    grouped(8192, B64[0.1], tier="quick", flex=True),
    grouped(8192, B64[0.05], flex=True),
    grouped(32768, Dense(), flex=True),
    *(grouped(32768, pattern, flex=True) for pattern in SPARSE),
    *(grouped(32768, Blocks(128, 128, density), flex=True) for density in (0.25, 0.1)),
    grouped(32768, Blocks(16, 16, 0.25)),
    grouped(32768, Columns(0.1)),
    grouped(32768, SinkWindow(64, 4096, density=0.238)),
    grouped(131072, Dense()),
    *(grouped(131072, pattern) for pattern in SPARSE),
    grouped(131072, SinkWindow(64, 4096, density=0.062)),
    # Prefill, float16 and float32
    grouped(8192, Dense(), dtype="fp16"),
    grouped(8192, B64[0.25], dtype="fp16"),
    grouped(8192, Dense(), dtype="fp32"),
    grouped(8192, B64[0.25], dtype="fp32"),
    # Decoding
    *(
        decode(pattern, seqlen, tier="quick" if seqlen == 32768 else "default")
        for seqlen in (32768, 131072)
        for pattern in (Dense(), *(Blocks(1, 64, density) for density in (0.25, 0.1, 0.05)))
    ),
    decode(Blocks(1, 16, 0.1)),
    decode(Columns(0.1)),
    # Backward
    grouped(8192, Dense(), part="backward", tier="quick", flex=True),
    grouped(8192, B64[0.25], part="backward", tier="quick", flex=True),
    grouped(8192, B64[0.1], part="backward", flex=True),
    *(grouped(16384, pattern, part="backward", tier="full") for pattern in (Dense(), B64[0.1])),
]

TABLES = {"cpu": CASES, "cuda": CUDA_CASES}
TIERS = ("quick", "default", "full")


def chosen(tier: str, words: list[str] = (), device: str = "cpu") -> list[Case]:
    """The cases of a run on a device whose name holds all `words`."""
    within = TIERS[: TIERS.index(tier) + 1]
    cases = TABLES[device]
    return [c for c in cases if c.tier in within and all(word in c.name for word in words)]
