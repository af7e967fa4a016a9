"""Tables of a page that take long to measure, kept row by row."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import report

Row = Callable[[], list[str]]
Cells = dict[str, list[str]]  # of the rows of a section, by name


@dataclass
class Section:
    """One table: its header, how each of its rows is measured, and what follows it."""

    header: Sequence[str]
    rows: dict[str, Row]
    closing: Callable[[Cells], str] = lambda kept: ""


@dataclass
class Page:
    """The sections of a page, by the names of their marks in it."""

    page: Path
    kept: Path
    sections: dict[str, Section]

    def run(self, description: str) -> None:
        """Measure the rows that the command line asks for, and fill in the tables.

        Each row is kept as soon as it is measured, so that a run may be interrupted.
        """
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows named so")
        args = parser.parse_args()
        torch.manual_seed(0)
        torch.exp(torch.ones(2**16))  # the first threaded call of a process may be less accurate
        for name, section in self.sections.items():
            for title, row in section.rows.items():
                if not all(word in f"{name} {title}" for word in args.only):
                    continue
                cells = row()
                print(name, title, *cells, sep=" | ", flush=True)
                kept = self.stored()  # other runs may have added to it
                kept.setdefault(name, {})[title] = cells
                self.kept.write_text(json.dumps(kept, indent=1) + "\n")
        self.write(self.stored())

    def stored(self) -> dict[str, Cells]:
        """The cells of all rows measured so far, by section."""
        return json.loads(self.kept.read_text()) if self.kept.exists() else {}

    def write(self, kept: dict[str, Cells]) -> None:
        """Put the tables into the page."""
        for name, section in self.sections.items():
            measured = {x: kept[name][x] for x in section.rows if x in kept.get(name, {})}
            cells = [[title, *row] for title, row in measured.items()]
            text = report.markdown_table(cells, section.header) if cells else "Not measured."
            if closing := section.closing(measured):
                text += f"\n\n{closing}"
            report.replace_section(self.page, name, text)
