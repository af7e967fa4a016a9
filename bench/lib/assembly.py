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


@dataclass(frozen=True)
class Loops:
    """The mnemonics of a kernel, and where its loops begin and end, those of cold code apart."""

    mnemonics: list[str]
    hot: list[tuple[int, int]]


def loops(text: str, language: Assembly, cold: str | None = None) -> Loops:
    """Reads a kernel. Loops with code from the source file `cold` are not hot; the text must name
    source files then.
    """
    mnemonics, labels, found, is_cold = [], {}, [], []
    for line in text.splitlines():
        if cold is not None and cold in line:
            is_cold.append(len(mnemonics))
        elif label := re.match(language.label, line):
            labels[label[1]] = len(mnemonics)
        elif instruction := re.match(language.instruction, line):
            mnemonics.append(instruction[1])
            branch = re.search(language.target, line)
            if branch and branch[1] in labels:
                found.append((labels[branch[1]], len(mnemonics)))
    hot = [(a, b) for a, b in found if not any(a <= at < b for at in is_cold)]
    return Loops(mnemonics, hot)


def hot_loop(text: str, language: Assembly, cold: str | None = None) -> list[str]:
    """The mnemonics of the innermost hot loop with the most matrix products (of several the
    shortest); of the whole kernel if no loop has any.
    """
    found = loops(text, language, cold)
    products = [
        (begin, end)
        for begin, end in found.hot
        if any(re.match(language.products, x) for x in found.mnemonics[begin:end])
    ]
    innermost = [
        found.mnemonics[begin:end]
        for begin, end in products
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in products)
    ]
    by_products = lambda x: (count(x, language.products), -len(x))  # noqa: E731
    return max(innermost, key=by_products, default=found.mnemonics)


def hot_spills(text: str, language: Assembly, cold: str) -> int:
    """Accesses to spilled registers in any hot loop; all that there are in a kernel without code
    from the source file `cold`.
    """
    found = loops(text, language, cold)
    if cold not in text:
        return count(found.mnemonics, language.spills)
    within = {at for begin, end in found.hot for at in range(begin, end)}
    return count([found.mnemonics[at] for at in sorted(within)], language.spills)


def count(mnemonics: list[str], pattern: str) -> int:
    return sum(bool(re.match(pattern, x)) for x in mnemonics)
