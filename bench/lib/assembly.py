"""Reading assembly language: what the innermost loop of a kernel is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Assembly:
    """How to read the assembly language of one vendor."""

    instruction: str
    label: str
    target: str
    products: str
    wide_loads: str
    spills: str


SASS = Assembly(
    instruction=r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)",
    label=r"\s*(\.L_x_\d+):",
    target=r"\bBRA\S*\s.*?`\((\.L_x_\d+)\)",
    products=r"(HMMA|IMMA|HGMMA|QGMMA|UTC[A-Z]*MMA)\b",
    wide_loads=r"(LDG|LDGSTS)\.\S*128|UTMALDG|UBLKCP",
    spills=r"(STL|LDL)\b",
)
AMDGCN = Assembly(
    instruction=r"\t([a-z]\w+)(?:\s|$)",
    label=r"(\.LBB\d+_\d+):",
    target=r"\ts_c?branch\S*\s+(\.LBB\d+_\d+)",
    products=r"v_mfma|v_smfmac|v_wmma",
    wide_loads=r"(global|buffer)_load_(dwordx4|b128|lds_dwordx4)",
    spills=r"scratch_(load|store)",
)


def hot_loop(text: str, language: Assembly, cold: str | None = None) -> list[str]:
    """The mnemonics of the innermost loop with the most matrix products (of several the shortest);
    of the whole kernel if no loop has any.

    Loops with code from the source file `cold` do not count. The text must name source files then.
    """
    mnemonics, labels, loops, is_cold = [], {}, [], []
    for line in text.splitlines():
        if cold is not None and cold in line:
            is_cold.append(len(mnemonics))
        elif found := re.match(language.label, line):
            labels[found[1]] = len(mnemonics)
        elif found := re.match(language.instruction, line):
            mnemonics.append(found[1])
            branch = re.search(language.target, line)
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(mnemonics)))
    products = [
        (begin, end)
        for begin, end in loops
        if any(re.match(language.products, x) for x in mnemonics[begin:end])
        and not any(begin <= at < end for at in is_cold)
    ]
    innermost = [
        mnemonics[begin:end]
        for begin, end in products
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in products)
    ]
    return max(innermost, key=lambda x: (count(x, language.products), -len(x)), default=mnemonics)


def count(mnemonics: list[str], pattern: str) -> int:
    return sum(bool(re.match(pattern, x)) for x in mnemonics)
