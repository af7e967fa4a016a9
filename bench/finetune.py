"""Fine-tunes SmolLM2-135M on English text, with torch's dense SDPA and with this library.

All subjects see the same tokens in the same order, one step of each in turn. float32 weights,
bfloat16 autocast where the machine multiplies bfloat16 faster, AdamW. Prints the loss and the time
of every step and writes `bench/results/finetune.md` and `finetune.csv`.

    python -m bench.finetune --tokens 4096 --steps 6
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparse_attn import selectors

from .lib.measure import LOGIT_ROWS, Subject, attending
from .lib.pretrained import load
from .lib.report import machine
from .lib.texts import english
from .lib.timing import fastest_dtype

RESULTS = Path(__file__).parent / "results"
PARTS = ("forward", "backward", "step")


@dataclass
class Training:
    """One model in training: its way of attending, and the loss and seconds of every step."""

    subject: Subject
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    autocast: bool
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def step(self, ids: torch.Tensor) -> None:
        with attending(self.model, self.subject):
            start = perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = mean_loss(self.model, ids)
            forward = perf_counter()
            loss.backward()
            backward = perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        times = (forward - start, backward - forward, perf_counter() - start)
        for part, elapsed in zip(PARTS, times, strict=True):
            self.seconds[part].append(elapsed)
        self.losses.append(loss.item())

    def speedup(self, baseline: Training, part: str) -> float:
        """Median of the paired ratios of `part`, without the first step."""
        pairs = zip(baseline.seconds[part][1:], self.seconds[part][1:], strict=True)
        return median(theirs / ours for theirs, ours in pairs)


def mean_loss(model, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token, in nats; logits are formed for a few rows at a time."""

    def summed_loss(hidden, labels):
        return F.cross_entropy(model.lm_head(hidden).float(), labels, reduction="sum")

    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[0].split(LOGIT_ROWS)
    labels = ids[0, 1:].split(LOGIT_ROWS)
    parts = (
        checkpoint(summed_loss, h, label, use_reentrant=False)
        for h, label in zip(hidden, labels, strict=True)
    )
    return sum(parts) / (ids.shape[1] - 1)


def train(
    tokens: int, steps: int, texts: int, window: int, lr: float, dense: bool
) -> list[Training]:
    """Train every subject for `steps` steps on `texts` texts of `tokens` tokens each."""
    subjects = [Subject("torch SDPA", None)]
    if dense:
        subjects.append(Subject("Dense", selectors.Dense()))
    subjects.append(Subject("SinkWindow", selectors.SinkWindow(sink=64, window=window)))
    trainings = []
    for subject in subjects:
        tokenizer, model = load("smollm2", torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        layer = model.model.layers[0].mlp.gate_proj
        autocast = fastest_dtype(layer, tokens) == torch.bfloat16
        trainings.append(Training(subject, model.train(), optimizer, autocast))
    ids = tokenizer(english(), return_tensors="pt").input_ids
    chunks = ids[:, : texts * tokens].split(tokens, 1)
    for step in range(steps):
        for training in trainings:
            training.step(chunks[step % texts])
            times = ", ".join(f"{part} {x[-1]:.2f} s" for part, x in training.seconds.items())
            print(
                f"step {step}: {training.subject.name}: loss {training.losses[-1]:.4f}, {times}",
                flush=True,
            )
    return trainings


def table(trainings: list[Training]) -> str:
    """A row for each subject: losses, median seconds, and the speed-up over the first subject."""
    titles = ("attention", "loss of each step", *(f"{part} (s)" for part in PARTS))
    titles += tuple(f"speed-up of {part}" for part in PARTS)
    lines = [titles, ("---",) * len(titles)]
    for training in trainings:
        losses = " ".join(f"{loss:.3f}" for loss in training.losses)
        seconds = (f"{median(training.seconds[part][1:]):.2f}" for part in PARTS)
        speedups = (f"{training.speedup(trainings[0], part):.2f}x" for part in PARTS)
        lines.append((training.subject.name, losses, *seconds, *speedups))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_csv(path: Path, trainings: list[Training]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("attention", "step", "loss", *(f"{part}_s" for part in PARTS)))
        for training in trainings:
            for i, loss in enumerate(training.losses):
                seconds = [f"{training.seconds[part][i]:.3f}" for part in PARTS]
                writer.writerow((training.subject.name, i, f"{loss:.5f}", *seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--texts", type=int, default=3, help="how many texts the steps cycle over")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dense", action="store_true", help="train with this library's dense too")
    parser.add_argument("--lr", type=float, default=2e-5)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first one is not timed")
    torch.manual_seed(0)
    trainings = train(args.tokens, args.steps, args.texts, args.window, args.lr, args.dense)
    title = (
        f"SmolLM2-135M, {args.tokens} tokens a step, batch 1, window {args.window}, sink 64.\n"
        f"{machine()}."
    )
    text = f"{title}\n\n{table(trainings)}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "finetune.md").write_text(text)
    write_csv(RESULTS / "finetune.csv", trainings)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
