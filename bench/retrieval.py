"""The tables of docs/retrieval.md: which heads of SmolLM2 look far back, and what it can do with
only these dense.

``python -m bench.retrieval`` measures everything, ``python -m bench.retrieval --only WORD ...`` the
rows whose names hold all the words. Each row is kept in ``bench/results/retrieval.json``.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from sparse_attn import selectors
from sparse_attn.retrieval import (
    head_selectors,
    needle_prompt,
    needle_scores,
    repetition_scores,
    shared_by_groups,
    top_heads,
)

from .lib import smollm2, texts
from .lib.sections import Page, Row, Section

KEPT = Path(__file__).parent / "results" / "retrieval.json"
PAGE = Path(__file__).parents[1] / "docs" / "retrieval.md"
NEEDLES = (
    (
        "The best thing to do in San Francisco is to eat a sandwich in Dolores Park in the sun.",
        "The best thing to do in San Francisco is",
    ),
    (
        "The name of the ship that left the harbour at midnight was the Golden Albatross of Dover.",
        "The name of the ship that left the harbour at midnight was",
    ),
)
LENGTHS, DEPTHS = (1024, 2048, 4096), (0.1, 0.4, 0.7)
SHARES = (0.1, 0.25, 0.5)
SHOWN = 12  # heads


@functools.cache
def scores() -> dict[str, torch.Tensor]:
    """The scores of all heads, by how they were found: ``[layers, heads]``."""
    tokenizer, model = smollm2.load("smollm2")
    prompts = [
        needle_prompt(
            tokenizer, texts.english(), f"\n\n{fact}\n\n", f"\n\n{asked}", tokens=n, depth=depth
        )
        for fact, asked in NEEDLES
        for n in LENGTHS
        for depth in DEPTHS
    ]
    line_breaks = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    found = needle_scores(model, prompts, max_new_tokens=25, stop=line_breaks)
    induction, echo = repetition_scores(model, period=2000, repeats=4)
    chance = torch.rand(found.shape, generator=torch.Generator().manual_seed(0))
    return {"needles": found, "induction": induction, "echo": echo, "chance": chance}


def head(place: int) -> list[str]:
    """The head at some place by its needle score: layer, head, and its scores."""
    found = scores()["needles"]
    layer, index = divmod(int(found.flatten().argsort(descending=True)[place]), found.shape[1])
    kinds = ("needles", "induction", "echo")
    return [str(layer), str(index), *(f"{scores()[x][layer, index]:.3f}" for x in kinds)]


def best_groups(kind: str, share: float) -> list[str]:
    """What SmolLM2 still does if the KV heads with the best query heads alone are dense."""
    found, groups = scores()[kind], smollm2.load("smollm2")[1].config.num_key_value_heads
    best = top_heads(found.unflatten(1, (groups, -1)).amax(2), share)
    return smollm2.retrieval(head_selectors(shared_by_groups(best, found.shape[1])))


def sections() -> dict[str, Section]:
    """The tables of the page."""
    rows: dict[str, Row] = {
        "none: SinkWindow(64, 256)": lambda: smollm2.retrieval(selectors.SinkWindow(64, 256)),
        "all": lambda: smollm2.retrieval(selectors.Dense()),
    }
    for kind in ("needles", "induction", "echo", "chance"):
        for share in SHARES:
            rows[f"{share:.0%} by {kind}"] = functools.partial(best_groups, kind, share)
    places = {str(n + 1): functools.partial(head, n) for n in range(SHOWN)}
    return {
        "heads": Section(("place", "layer", "head", "needles", "induction", "echo"), places),
        "dense": Section(
            ("dense KV heads", "perplexity", "loss on second copy", "passkeys found (depth)"), rows
        ),
    }


if __name__ == "__main__":
    Page(PAGE, KEPT, sections()).run(__doc__)
