"""Sparse against dense attention in two pretrained models, on 8192 tokens of English.

Run it with `make demo`, or `python -m bench.demo --quick` for a smoke test.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from sparse_attn import BlockLayout, selectors

from . import report, texts
from .measure import Subject, attending, layer_layout, measure, observed_attention
from .pretrained import load

RESULTS = Path(__file__).parent / "results"
PASSKEY_DEPTHS = (0.25, 0.5, 0.9)
DRAWN_LAYERS = (9, 20)
DRAWN = "BlockTopK"


def smollm2_subjects() -> list[Subject]:
    """Torch, ours exact, two ways to leave keys out, and their union."""
    window = selectors.SinkWindow(sink=64, window=1024)
    top_k = selectors.BlockTopK(top_k=64, block_size=16)
    return [
        Subject("torch SDPA", None),
        Subject("Dense", selectors.Dense()),
        Subject("SinkWindow", window),
        Subject(DRAWN, top_k),
        Subject("union of both", window | top_k),
    ]


def gemma3_subjects() -> list[Subject]:
    """Torch, which computes every pair of the 15 sliding layers and masks, and ours exact."""
    return [Subject("torch SDPA", None), Subject("Dense", selectors.Dense())]


def rounds(tokenizer, tokens: int, retrieval: bool) -> list[tuple[texts.Prompt, bool]]:
    """(prompt, timed) pairs; the first round warms up and is not timed."""
    reading = texts.reading(tokenizer, tokens)
    if not retrieval:  # a vocabulary of 262144 makes the loss dearer than the model
        reading = replace(reading, scored_from=tokens * 3 // 4)
        return [(reading, False)] + [(reading, True)] * 3
    copies = texts.second_copy(tokenizer, tokens * 3 // 4)
    hidden = [texts.passkey(tokenizer, tokens, depth) for depth in PASSKEY_DEPTHS]
    return [(reading, False), (copies, False), *((prompt, True) for prompt in hidden)]


def compare(model, subjects: list[Subject], plan: list[tuple[texts.Prompt, bool]]) -> None:
    """Measure every subject in every round; one after the other, so that timings are paired."""
    with tqdm(total=len(plan) * len(subjects), unit="prefill") as progress:
        for number, (prompt, timed) in enumerate(plan):
            for subject in subjects:
                progress.set_description(f"{subject.name}: {prompt.name}")
                measure(model, subject, prompt, timed=timed, densities=number == 0)
                progress.update()


@torch.inference_mode()
def layouts_of(model, subject: Subject, ids: torch.Tensor) -> dict[int, BlockLayout]:
    """What `subject` keeps in the layers to draw."""
    kept = {}

    def observe(module, q, k, v, seconds, kwargs):
        if module.layer_idx in DRAWN_LAYERS:
            kept[module.layer_idx] = layer_layout(subject, q, k, kwargs)

    with attending(model, subject), observed_attention(model, observe):
        model.model(ids)
    return kept


def notes(tokens: int) -> str:
    """How the numbers of the table were taken."""
    return f"""\
Prefill is one forward pass over {tokens} tokens (bfloat16, batch 1, with a cache) and the logits of
the last one: median of three after a warm-up. The rows take turns, and a speed-up is the median of
the paired ratios to torch SDPA. The time of attention is measured around the attention function of
every layer, choosing keys included. Density is the share of the causal (query, key) pairs that are
seen, mean over layers. Perplexity is over the {tokens} tokens of the documentation of Python
(gemma3: over their last quarter); its change is against torch SDPA. The loss on the second copy
(nats per token) is over the second half of {tokens * 3 // 4} tokens that are a text twice: low only
if attention finds the first copy. The passkey is a number to be repeated at the end of {tokens}
tokens, said once at three places; those where it was found are named by their token."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2048 tokens; writes only to --out")
    parser.add_argument("--out", type=Path, help="folder for the results; default bench/results")
    args = parser.parse_args()
    tokens, out = (2048, args.out) if args.quick else (8192, args.out or RESULTS)
    torch.exp(torch.ones(2**16))  # the first threaded call of a process may be less accurate

    results = {}
    models = {"smollm2": smollm2_subjects(), "gemma3": gemma3_subjects()}
    for name, subjects in models.items():
        tqdm.write(f"{name}: loading")
        tokenizer, model = load(name)
        plan = rounds(tokenizer, tokens, retrieval=name == "smollm2")
        compare(model, subjects, plan)
        results[name] = subjects
        if out and name == "smollm2":
            drawn = next(s for s in subjects if s.name == DRAWN)
            kept = layouts_of(model, drawn, plan[0][0].ids)
            out.mkdir(parents=True, exist_ok=True)
            heads = model.config.num_attention_heads
            report.draw_kept_blocks(out / "kept_blocks.png", kept, heads)
    show(results, tokens, out)


def show(results: dict[str, list[Subject]], tokens: int, out: Path | None) -> None:
    """Print the table, and write it to `out`."""
    rows = []
    for name, subjects in results.items():
        for subject in subjects:
            first, *rest = report.cells(subject, subjects[0])
            rows.append([f"{name}: {first}", *rest])
    table = report.markdown_table(rows)
    print(f"\n{table}\n\n{notes(tokens)}\n\n{report.machine()}")
    if out:
        text = f"# Demo\n\n{table}\n\n{notes(tokens)}\n\nMachine: {report.machine()}\n"
        (out / "demo.md").write_text(text)
        report.write_csv(out / "demo.csv", results)
        print(f"written to {os.path.relpath(out)}")


if __name__ == "__main__":
    main()
