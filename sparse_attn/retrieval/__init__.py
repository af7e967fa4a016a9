"""Retrieval heads: which heads of a model look far back, and selectors that keep these dense."""

from .gates import full_heads, load_gates
from .heads import head_selectors, shared_by_groups, top_heads
from .needles import NeedlePrompt, needle_prompt, needle_scores
from .repetition import repetition_heads, repetition_scores

__all__ = [
    "NeedlePrompt",
    "full_heads",
    "head_selectors",
    "load_gates",
    "needle_prompt",
    "needle_scores",
    "repetition_heads",
    "repetition_scores",
    "shared_by_groups",
    "top_heads",
]


def __dir__() -> list[str]:
    return __all__
