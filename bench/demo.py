"""Sparse against dense attention in two pretrained models, on long English texts.

Run it with `make demo`, or `python -m bench.demo --quick` for a smoke test. It asks the machine
first: in which dtype its linear layers are faster, and how long the texts may be and how many
rounds there may be, so that all of it ends within ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import torch
from transformers.utils import logging

from sparse_attn import selectors

from .lib import report, texts
from .lib.budget import SIZES, Cost, Countdown, Size, largest
from .lib.devices import cpu_isa
from .lib.measure import Subject, measure
from .lib.pretrained import load

RESULTS = Path(__file__).parent / "results"
LIMIT = 600.0  # seconds
SPARE = 0.85  # of the time that is left is planned with
DEPTHS = (0.5, 0.25, 0.75)
DRAWN_LAYERS = (9, 20)
TRIAL, WARM_UP = 2048, 256  # tokens


def smollm2_subjects(tokens: int) -> list[Subject]:
    """Torch, ours exact, two that choose by looking at q and k, and one that does not look."""
    return [
        Subject("torch SDPA", None),
        Subject("Dense", selectors.Dense()),
        Subject("HiP", selectors.HiP(k=512), drawn=DRAWN_LAYERS),
        Subject("VerticalSlash", selectors.VerticalSlash(vertical=500, slash=700)),
        Subject("SinkWindow", selectors.SinkWindow(sink=64, window=tokens // 8)),
    ]


def gemma3_subjects(tokens: int) -> list[Subject]:
    """Torch, which computes every pair of the 15 sliding layers and masks, and ours exact."""
    return [Subject("torch SDPA", None), Subject("Dense", selectors.Dense())]


@dataclass
class Part:
    """One model's share of the demo, and what was measured of it."""

    name: str
    make_subjects: Callable[[int], list[Subject]]
    share: float  # of the time that no part before it takes
    retrieval: bool  # whether texts are also copied and searched
    size: Size = SIZES[-1]
    subjects: list[Subject] = field(default_factory=list)

    def load(self) -> None:
        """Bring the model and its tokenizer into memory."""
        self.tokenizer, self.model = load(self.name)

    @property
    def untimed(self) -> int:
        """How many rounds are not timed."""
        return 2 if self.retrieval else 1

    def reading(self, tokens: int) -> texts.Prompt:
        """A text whose loss is measured."""
        prompt = texts.reading(self.tokenizer, tokens)
        if not self.retrieval:  # a vocabulary of 262144 makes the loss dearer than the model
            prompt = replace(prompt, scored_from=tokens * 3 // 4)
        return prompt

    def rounds(self) -> list[tuple[texts.Prompt, bool]]:
        """(prompt, timed) pairs; the first round warms up and is not timed."""
        tokens, timed = self.size.tokens, self.size.rounds
        reading = self.reading(tokens)
        if not self.retrieval:
            return [(reading, False)] + [(reading, True)] * timed
        copies = texts.second_copy(self.tokenizer, tokens * 3 // 4)
        hidden = [texts.passkey(self.tokenizer, tokens, depth) for depth in DEPTHS[:timed]]
        return [(reading, False), (copies, False), *((prompt, True) for prompt in hidden)]

    def costs(self, tokens: int) -> list[Cost]:
        """What each subject costs; torch and ours exact are tried, and sparse ones taken to cost
        what exact ones do.
        """
        found = []
        for subject in self.make_subjects(tokens)[:2]:
            measure(self.model, subject, texts.reading(self.tokenizer, WARM_UP), False, False)
            subject.losses.clear()
            start = perf_counter()
            measure(self.model, subject, self.reading(tokens), timed=True, densities=False)
            attention = subject.attention[-1]
            found.append(Cost(tokens, attention, perf_counter() - start - attention))
        sdpa, exact = found
        return [sdpa] + [exact] * (len(self.make_subjects(tokens)) - 1)

    def plan(self, seconds: float) -> float:
        """Choose a size that takes at most so many seconds; returns how many are expected."""
        self.size, expected = largest(self.costs(TRIAL), self.untimed, seconds)
        self.subjects = self.make_subjects(self.size.tokens)
        return expected

    def run(self, clock: Countdown, until: float, after: float) -> None:
        """Measure every subject in every round; one after the other, so that timings are paired.

        Rounds that would end later than `until` seconds after the start are left out, but for one
        that is timed. `after` are the seconds that come after this part.
        """
        plan = self.rounds()
        longest = 0.0
        for number, (prompt, timed) in enumerate(plan):
            if clock.elapsed + longest > until and self.subjects[0].prefill:
                self.size = replace(self.size, rounds=number - self.untimed)
                clock.write(f"{self.name}: {len(plan) - number} of {len(plan)} rounds left out")
                break
            start = perf_counter()
            for i, subject in enumerate(self.subjects):
                if number:
                    rounds_left = len(plan) - number - i / len(self.subjects)
                    clock.expect(longest * rounds_left + after)
                clock.doing(
                    f"{self.name}, {self.size.tokens} tokens, round {number + 1} of {len(plan)}: "
                    f"{subject.name} ({prompt.name})"
                )
                measure(self.model, subject, prompt, timed=timed, densities=number == 0)
            longest = max(longest, perf_counter() - start)

    def took(self) -> str:
        """What the machine allowed."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        rounds = f"{self.size.rounds} timed round" + "s" * (self.size.rounds > 1)
        return f"{self.name}: {self.size.tokens} tokens, {dtype}, {rounds}"


def parts() -> list[Part]:
    """The models of the demo; the first has the questions, and most of the time."""
    return [
        Part("smollm2", smollm2_subjects, 0.68, retrieval=True),
        Part("gemma3", gemma3_subjects, 1.0, retrieval=False),
    ]


def notes(shown: list[Part]) -> str:
    """How the numbers of the tables were taken."""
    took = "; ".join(part.took() for part in shown)
    asked = max(part.size.rounds for part in shown if part.retrieval)
    depths = " and ".join(f"{depth:.0%}" for depth in DEPTHS[:asked])
    return f"""\
Taken by this machine: {took}.

Batch 1, with a cache. The rows take turns after a warm-up; "attention alone" and "whole prefill"
are speed-ups, medians of the paired ratios to torch SDPA. The time of attention is measured around
the attention function of every layer, choosing keys included. Density is the share of the causal
(query, key) pairs that are seen, mean over layers. A number, said once at {depths} of the text, one
depth a round, is asked for at the end. A few numbers in one text show that it works; they do not
measure how well. Perplexity is over
the documentation of Python (gemma3: over the last quarter); its change is against torch SDPA. The
loss on the second copy (nats per token) is over the second half of a text of three quarters of the
tokens that is a text twice: low only if attention finds the first copy."""


def tables(shown: list[Part]) -> str:
    """Speed and what was found; then seconds and losses."""

    def rows(make: Callable[[Subject, Subject], list[str]]) -> list[list[str]]:
        found = []
        for part in shown:
            for subject in part.subjects:
                first, *rest = make(subject, part.subjects[0])
                found.append([f"{part.name}: {first}", *rest])
        return found

    first = report.markdown_table(rows(report.cells))
    return f"{first}\n\n{report.markdown_table(rows(report.details), report.DETAILS)}"


def write(shown: list[Part], out: Path) -> None:
    """The tables, all values, and a picture of the blocks that the drawn subject kept."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"demo-{cpu_isa()}"
    text = f"# Demo\n\n{tables(shown)}\n\n{notes(shown)}\n\nMachine: {report.machine()}\n"
    (out / f"{stem}.md").write_text(text)
    report.write_csv(out / f"{stem}.csv", {part.name: part.subjects for part in shown})
    for part in shown:
        for subject in part.subjects:
            if subject.layouts:
                heads = part.model.config.num_attention_heads
                report.draw_kept_blocks(out / "kept_blocks.png", subject.layouts, heads)
    print(f"written to {os.path.relpath(out)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smallest size; writes only to --out")
    parser.add_argument("--out", type=Path, help="folder for the results; default bench/results")
    args = parser.parse_args()
    out = args.out or (None if args.quick else RESULTS)
    torch.exp(torch.ones(2**16))  # the first threaded call of a process may be less accurate
    logging.disable_progress_bar()  # its lines and ours would mix

    shown = parts()
    with Countdown(LIMIT) as clock:
        for part in shown:
            clock.doing(f"{part.name}: loading (the first time, the weights are converted)")
            part.load()
        expected = {}
        for part in shown:
            clock.doing(f"{part.name}: one prefill, to see what fits")
            part.subjects = part.make_subjects(part.size.tokens)
            if not args.quick:
                free = SPARE * clock.left - sum(expected.values())
                expected[part.name] = part.plan(part.share * free)
        clock.expect(sum(expected.values()) if expected else clock.left)
        for number, part in enumerate(shown):
            later = sum(expected.get(other.name, 0.0) for other in shown[number + 1 :])
            part.run(clock, until=clock.limit - later, after=later)
        if out:
            clock.doing("drawing")
            write(shown, out)
        elapsed = clock.elapsed
    print(f"\n{tables(shown)}\n\n{notes(shown)}\n\n{report.machine()}\nIt took {elapsed:.0f} s.")


if __name__ == "__main__":
    main()
