"""Results as tables, CSV files and a picture."""

from __future__ import annotations

import csv
import math
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import torch

import sparse_attn
from sparse_attn import BlockLayout

from .measure import Subject

HEADER = ("attention", "density", "attention alone", "whole prefill", "numbers found")
DETAILS = (
    "attention",
    "prefill (s)",
    "attention (s)",
    "perplexity",
    "change",
    "loss on second copy",
)
CSV_HEADER = (
    "model",
    "attention",
    "selector",
    "density",
    "loss_reading",
    "loss_second_copy",
    "passkeys_found",
    "prefill_s",
    "attention_s",
)


def conditions(other_load: float) -> str:
    """The machine, and what share of its time other programs took during the run."""
    return f"{machine()}. Other programs took {100 * other_load:.0f} % of its time during this run."


def machine() -> str:
    """The processor, its vector instructions, the threads and versions that timings depend on."""
    features = torch.cpu.get_capabilities()
    wanted = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
    names = ", ".join(name for name in wanted if features.get(name)) or "no vector instructions"
    return (
        f"{_processor()} ({names}), {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"sparse_attn {sparse_attn.__version__}, Python {platform.python_version()}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def cells(subject: Subject, baseline: Subject) -> list[str]:
    """The row of one subject, in the order of `HEADER`."""
    found = f"{sum(subject.answers.values())} of {len(subject.answers)}"
    return [
        subject.name,
        f"{100 * subject.density:.0f} %",
        f"{subject.speedup(baseline, 'attention'):.2f}x",
        f"{subject.speedup(baseline, 'prefill'):.2f}x",
        found if subject.answers else "not asked",
    ]


def details(subject: Subject, baseline: Subject) -> list[str]:
    """The row of one subject, in the order of `DETAILS`."""
    perplexity, dense = (math.exp(s.losses["reading"]) for s in (subject, baseline))
    return [
        subject.name,
        f"{median(subject.prefill):.2f}",
        f"{median(subject.attention):.2f}",
        f"{perplexity:.2f}",
        f"{100 * (perplexity / dense - 1):+.1f} %",
        f"{subject.losses['second copy']:.2f}" if "second copy" in subject.losses else "not asked",
    ]


def markdown_table(rows: list[list[str]], header: Sequence[str] = HEADER) -> str:
    """Rows under `header`, in Markdown with aligned columns."""
    lines = [list(header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ((cell.ljust(width) for cell, width in zip(x, widths, strict=True)) for x in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def replace_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the lines ``<!-- name: begin -->`` and ``<!-- name: end -->`` of a page.

    Raises:
        ValueError: if the page does not have both marks.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = path.read_text()
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{path} has no section {begin} ... {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_csv(path: Path, results: dict[str, list[Subject]]) -> None:
    """All measured values of the demo, one line for each model and subject."""
    rows = []
    for model, subjects in results.items():
        for s in subjects:
            scored = (s.losses.get(name) for name in ("reading", "second copy"))
            losses = ["" if loss is None else f"{loss:.4f}" for loss in scored]
            times = [" ".join(f"{x:.3f}" for x in part) for part in (s.prefill, s.attention)]
            found = " ".join(f"{name.split()[-1]}:{ok:d}" for name, ok in s.answers.items())
            selector = "torch SDPA" if s.selector is None else repr(s.selector)
            rows.append([model, s.name, selector, f"{s.density:.4f}", *losses, found, *times])
    write_rows(path, CSV_HEADER, rows)


def kept_share(layout: BlockLayout, head: int, block: int = 64) -> torch.Tensor:
    """Share of the pairs of each (query block, key block) that a head sees: `[Mq, Mkv]`."""
    one_head = layout[0, head]
    whole = layout.seqlen_kv // block * block
    rows = []
    for start in range(0, layout.seqlen_q // block * block, block):
        seen = one_head.visible(start, start + block)[0, 0, :, :whole]
        rows.append(seen.float().unflatten(1, (-1, block)).mean((0, 2)))
    return torch.stack(rows)


def draw_kept_blocks(path: Path, layouts: dict[int, BlockLayout], num_heads: int) -> None:
    """One panel for each layer and head: rows are query blocks, columns are key blocks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(layouts),
        num_heads,
        figsize=(1.5 * num_heads, 2.1 * len(layouts)),
        squeeze=False,
        layout="constrained",
    )
    for row, (layer, layout) in zip(axes, layouts.items(), strict=True):
        spelled_out = layout.expand_heads(num_heads)
        for head, axis in enumerate(row):
            axis.imshow(kept_share(spelled_out, head), cmap="Blues", vmin=0, vmax=1)
            density = 100 * spelled_out[0, head].density()
            axis.set_title(f"layer {layer} head {head}\n{density:.0f} % kept", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.supxlabel("key block", fontsize=9)
    figure.supylabel("query block", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
