"""Long English inputs for the demo, made from the language reference that ships with Python."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch

PASSKEY = "71432"


@dataclass(frozen=True)
class Prompt:
    """One model input and what is measured on it.

    `ids` is `[1, tokens]`; `scored_from` is the first token whose loss counts, and `answer` are the
    tokens that the model has to write after the last one.
    """

    name: str
    ids: torch.Tensor
    scored_from: int | None = None
    answer: torch.Tensor | None = None


@cache
def english() -> str:
    """The prose of `pydoc_data.topics`: no markup, no code, no grammar, no paragraph twice."""
    from pydoc_data.topics import topics

    paragraphs: dict[str, None] = {}
    for topic in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[topic]):
            if re.search(r"::=|>>>|^\s*[*=\-~^+|]{3,}", block, re.MULTILINE):
                continue
            text = re.sub(r"[*\"“”`]", "", " ".join(block.split()))
            if len(text) > 80 and text[0].isupper() and text[-1] in ".:":
                paragraphs[text] = None
    return "\n\n".join(paragraphs)


def _encode(tokenizer, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]


def _with_bos(tokenizer, ids: torch.Tensor) -> torch.Tensor:
    """`[1, tokens]` ids, after the start token when the tokenizer's model expects one."""
    start = tokenizer("").input_ids
    return torch.cat([torch.tensor(start, dtype=ids.dtype), ids])[None]


def reading(tokenizer, tokens: int) -> Prompt:
    """The first `tokens` tokens of the text, all of them scored."""
    ids = _with_bos(tokenizer, _encode(tokenizer, english()))[:, :tokens]
    return Prompt("reading", ids, scored_from=1)


def second_copy(tokenizer, tokens: int) -> Prompt:
    """A text of `tokens // 2` tokens, twice; only the second copy is scored."""
    half = _encode(tokenizer, english())[: tokens // 2]
    ids = _with_bos(tokenizer, half.repeat(2))
    return Prompt("second copy", ids, scored_from=ids.shape[1] - len(half))


def passkey(tokenizer, tokens: int, depth: float) -> Prompt:
    """A number hidden at `depth` (0 = start, 1 = end) of a long text, asked for at the end.

    Prompt and answer together are `tokens` long.
    """
    filler = _encode(tokenizer, english())
    said = f"The secret number is {PASSKEY}. Remember that the secret number is {PASSKEY}."
    fact = _encode(tokenizer, f"\n\n{said}\n\n")
    question = _encode(tokenizer, "\n\nThe secret number is")
    answer = _encode(tokenizer, f" {PASSKEY}")
    start = len(tokenizer("").input_ids)
    room = tokens - start - len(fact) - len(question) - len(answer)
    before = int(depth * room)
    ids = torch.cat([filler[:before], fact, filler[before:room], question])
    return Prompt(f"passkey at {start + before}", _with_bos(tokenizer, ids), answer=answer)
