"""The demo: what it asks of the machine first, and that it ends in time."""

import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from bench import demo
from bench.lib import budget, report, timing
from bench.lib.budget import SIZES, Cost, Countdown, Size, largest
from sparse_attn.selectors import probes

seconds = st.floats(0.01, 100)


class FakeClock:
    """What `perf_counter` says, moved by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    for module in (budget, demo):
        monkeypatch.setattr(module, "perf_counter", fake)
    return fake


@pytest.mark.parametrize(
    ("float32", "bfloat16", "fastest"), [(2, 1, "bfloat16"), (1, 9, "float32")]
)
def test_a_model_runs_in_the_dtype_that_its_linear_layers_are_faster_in(
    float32, bfloat16, fastest, monkeypatch
):
    times = {torch.float32: float32, torch.bfloat16: bfloat16}
    monkeypatch.setattr(timing, "wall_time", lambda call: call() is None or times[call().dtype])
    layer = torch.nn.Linear(8, 4, dtype=torch.bfloat16)
    assert timing.fastest_dtype(layer) == getattr(torch, fastest)


@pytest.mark.parametrize("fast", [True, False])
def test_selectors_multiply_bfloat16_only_where_the_processor_does(fast, monkeypatch):
    monkeypatch.setattr(probes, "_CPU_MULTIPLIES_BFLOAT16", fast)
    q, k = torch.randn(1, 4, 3, 8).bfloat16(), torch.randn(1, 2, 5, 8).bfloat16()
    found = probes.products(q, k)
    assert found.dtype == (torch.bfloat16 if fast else torch.float32)
    exact = q.double().unflatten(1, (2, 2)) @ k.double()[:, :, None].mT
    torch.testing.assert_close(found.double(), exact.flatten(1, 2), atol=0.05, rtol=0.01)


def test_a_cost_grows_with_the_text_and_attention_with_its_square():
    assert Cost(2048, attention=1.0, rest=10.0).at(8192) == 16 + 40


@settings(max_examples=30)
@given(st.lists(st.builds(Cost, st.just(2048), seconds, seconds), min_size=1), seconds)
def test_the_largest_size_that_fits_is_taken(costs, limit):
    def expected(size):
        return (2 + size.rounds) * sum(cost.at(size.tokens) for cost in costs)

    size, told = largest(costs, untimed=2, seconds=limit)
    assert told == pytest.approx(expected(size))
    larger = SIZES[: SIZES.index(size)]
    assert all(expected(other) > limit for other in larger)
    assert expected(size) <= limit or size == SIZES[-1]


def test_the_countdown_tells_what_is_left(clock, capsys):
    with Countdown(600) as countdown:
        clock.now = 60.0
        countdown.doing("loading")
        countdown.expect(30.0)
        clock.now = 70.0
        countdown.doing("reading")
        assert (countdown.elapsed, countdown.left) == (70.0, 530.0)
    shown = capsys.readouterr().err
    assert "01:00 passed, 09:00 left: loading" in shown
    assert "01:10 passed, 00:20 left: reading" in shown


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def __call__(self, text, return_tensors=None, add_special_tokens=True):
        ids = list(text.encode())
        return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors else ids)


@functools.cache
def tiny_model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256)).eval()


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(demo, "load", lambda name: (Bytes(), tiny_model()))
    monkeypatch.setattr(demo, "DRAWN_LAYERS", (0, 1))
    found = demo.parts()
    for part in found:
        part.load()
        part.size = Size(512, 3)
        part.subjects = part.make_subjects(512)
    return found


def test_every_row_is_measured_in_every_round(parts):
    with Countdown(600) as countdown:
        for part in parts:
            part.run(countdown, until=600, after=0)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in demo.tables(parts).split("\n")
    ]
    assert rows[0] == list(report.HEADER)
    assert len(report.HEADER) == 5
    named = [f"{part.name}: {x.name}" for part in parts for x in part.subjects]
    assert [row[0] for row in rows[2:9]] == named
    for part in parts:
        for subject in part.subjects:
            assert len(subject.prefill) == len(subject.attention) == 3
            assert len(subject.answers) == (3 if part.retrieval else 0)
            assert 0 < subject.density <= 1
    densities = {x.name: x.density for x in parts[0].subjects}
    assert densities["Dense"] == 1 > densities["SinkWindow"]
    drawn = [x.name for x in parts[0].subjects if x.layouts]
    assert drawn == ["HiP"]


def test_the_demo_is_planned_by_what_a_prefill_takes(parts, monkeypatch):
    part = parts[0]
    sdpa, *exact = part.costs(256)
    assert len(exact) == 4 and sdpa.tokens == 256 and min(sdpa.attention, sdpa.rest) > 0
    monkeypatch.setattr(part, "costs", lambda tokens: [Cost(2048, 1.0, 4.0)] * 5)
    assert part.plan(seconds=700) == 4 * 5 * (16 + 16)
    assert part.size == Size(8192, 2)


def test_rounds_that_would_end_too_late_are_left_out(parts, clock, monkeypatch):
    def measure(model, subject, prompt, timed, densities):
        clock.now += 10.0
        if timed:
            subject.prefill.append(10.0)

    monkeypatch.setattr(demo, "measure", measure)
    part = parts[0]  # five subjects: a round takes 50 s, and the first timed one is always run
    with Countdown(600) as countdown:
        part.run(countdown, until=160, after=0)
    assert clock.now == 150 and part.size.rounds == 1
    assert part.took() == "smollm2: 512 tokens, float32, 1 timed round"
