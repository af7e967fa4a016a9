"""Every example in docstrings runs, and every block marked `python` in README and docs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import sparse_attn

ROOT = Path(__file__).parents[1]
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(sparse_attn.__path__, "sparse_attn.")
    if not name.endswith("._C")
]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    names = {"torch": torch, **vars(sparse_attn), **vars(sparse_attn.selectors), **vars(module)}
    results = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, str(page), "exec"), {"__name__": "example"})


def anchors(page: Path) -> set[str]:
    """The names by which links reach the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_exist(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}#{anchor}"


def tables(text: str) -> list[str]:
    """The first line of each table."""
    return [x[1] for x in re.finditer(r"(?:^|\n\n)(\|.*)", text)]


def test_the_first_page_is_short():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    begin = "\n".join(lines[:25])
    assert len(lines) <= 100
    assert all(x in begin for x in ("pip install", "make demo", "make test"))
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(example.splitlines()) <= 12
    backends, measured = tables(text)
    assert backends.startswith("| backend ") and measured.count("|") - 1 <= 5


def test_the_design_is_short():
    lines = (ROOT / "docs" / "design.md").read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120
    grids = ("block", "column group", "row block", "tile", "granule", "pack", "band", "split")
    assert all(any(x.startswith(f"| {word} |") for x in lines) for word in grids)
