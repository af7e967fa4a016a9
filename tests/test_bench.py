"""The benchmark harness: it pairs times as it says, and refuses what is wrong."""

import re
from itertools import count
from types import SimpleNamespace

import pytest
import torch

import sparse_attn
from bench import kernels, report, timing
from bench.cases import CASES, Blocks, Case, Columns, Dense, SinkWindow, chosen


class FakeClock:
    """Time passes only where it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def call(self, *seconds):
        """A call whose n-th run takes the n-th of `seconds`, then the last."""
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_paired_times_leave_the_first_round_out_and_fill_the_time():
    clock = FakeClock()
    calls = {"a": clock.call(100.0, 2.0), "b": clock.call(100.0, 6.0)}
    times = timing.paired_times(calls, seconds=80, clock=clock)
    assert times == {"a": [2.0] * 10, "b": [6.0] * 10}
    times = timing.paired_times(calls, seconds=1, clock=clock)
    assert times == {"a": [2.0] * timing.MIN_ROUNDS, "b": [6.0] * timing.MIN_ROUNDS}
    assert len(timing.paired_times(calls, seconds=1e9, clock=clock)["a"]) == timing.MAX_ROUNDS


def test_paired_times_change_the_order():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    ticks = count()
    timing.paired_times(calls, seconds=0, clock=lambda: next(ticks))
    rounds = list(zip(*[iter(order)] * 3, strict=True))
    assert len(rounds) == timing.MIN_ROUNDS + 1
    assert len(set(rounds)) > 1 and all(sorted(x) == ["a", "b", "c"] for x in rounds)


def test_the_ratio_is_the_median_of_paired_ratios_not_the_ratio_of_medians():
    slow_machine = 10.0
    ours, theirs = [1.0, 2.0, slow_machine], [3.0, 4.0, 3 * slow_machine]
    assert timing.paired_ratio(theirs, ours) == 3.0


def test_other_load_is_the_work_that_is_not_ours(monkeypatch):
    seconds = iter([(100.0, 10.0, 0.0), (100.0 + 9, 10.0 + 4, 10.0)])
    monkeypatch.setattr(timing.OtherLoad, "_now", staticmethod(lambda: next(seconds)))
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    assert timing.OtherLoad().share() == 0.25


def test_case_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def test_runs_are_nested_and_can_be_narrowed():
    quick, default, full = (chosen(tier) for tier in ("quick", "default", "full"))
    assert set(quick) < set(default) < set(full) == set(CASES)
    assert {case.kind for case in quick} == {"prefill", "decode", "backward"}
    only = chosen("full", ["decode", "fp32"])
    assert only and all(case.kind == "decode" and case.dtype == "fp32" for case in only)


def geometry(case: Case):
    return case.pattern, case.seqlens, case.kv_heads


@pytest.mark.parametrize(
    "case", {geometry(c): c for c in CASES}.values(), ids=lambda case: case.name
)
def test_layouts_are_valid_and_as_dense_as_they_claim(case):
    layout = case.pattern.layout(case).validate()
    assert layout.seqlens == case.seqlens
    assert layout.density() == pytest.approx(case.pattern.density, rel=0.03)


def small(pattern, **fields) -> Case:
    shape = {"seqlen_q": 96, "seqlen_kv": 96, "head_dim": 16, "num_heads": 4, "kv_heads": 2}
    return Case(pattern, **{**shape, **fields})


SMALL = [
    small(Dense()),
    small(Blocks(16, 16, 0.5), dtype="fp32"),
    small(Columns(0.3), dtype="fp16"),
    small(SinkWindow(4, 16, density=0.5)),
    small(Blocks(1, 16, 0.5), seqlen_q=1),
    small(Blocks(16, 16, 0.5), part="backward"),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_kind_of_case_is_measured(case, monkeypatch):
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)
    monkeypatch.setattr(kernels, "matmul_rate", lambda dtype: 1e12)
    monkeypatch.setattr(kernels, "read_rate", lambda: 1e10)
    result = kernels.measure(case, seconds=0)
    assert result.error < 0.05 and min(result.ours_ms, result.sdpa_ms, result.ratio) > 0
    assert len(kernels.cells(result)) == len(kernels.HEADER)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_wrong_result_is_refused(case, monkeypatch):
    def wrong(q, k, v, layout, return_lse=False):
        out, lse = sparse_attn.sparse_attention(q, k, 1.1 * v, layout, return_lse=True)
        return (out, lse) if return_lse else out

    monkeypatch.setattr(kernels, "sparse_attention", wrong)
    with pytest.raises(kernels.WrongResult, match=re.escape(case.name)):
        kernels.measure(case)


def test_the_program_fails_and_names_the_wrong_case(monkeypatch, tmp_path):
    case = SMALL[0]
    monkeypatch.setattr(kernels.cases, "CASES", [case])
    monkeypatch.setattr(kernels, "check", lambda problem: refuse(problem.case))
    monkeypatch.setattr("sys.argv", ["kernels", "--out", str(tmp_path)])

    def refuse(case):
        raise kernels.WrongResult(f"{case.name}: off")

    with pytest.raises(SystemExit) as stopped:
        kernels.main()
    assert case.name in str(stopped.value.code)  # a message as the code is exit status 1
    assert not list(tmp_path.iterdir())


def test_work_counts_the_pairs_that_are_seen(monkeypatch):
    monkeypatch.setattr(kernels, "matmul_rate", lambda dtype: 1.0)
    monkeypatch.setattr(kernels, "read_rate", lambda: 1.0)
    pairs = 96 * 97 // 2 * 4
    assert kernels.work(kernels.Problem(small(Dense()))) == (pairs * 2 * 2 * 16, 1.0)
    backward = kernels.Problem(small(Dense(), part="backward"))
    assert kernels.work(backward) == (pairs * 5 * 2 * 16, 1.0)
    decode = kernels.Problem(small(Dense(), seqlen_q=1))
    assert kernels.work(decode) == (96 * 2 * (16 + 16) * 2, 1.0)


def test_sampled_rows_exist():
    assert kernels.sampled_rows(1).tolist() == [0]
    assert kernels.sampled_rows(100).max() == 99
    assert torch.all(kernels.sampled_rows(8192).diff() > 0)


def test_a_section_of_a_page_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n")
    for text in ("new", "newer"):
        report.replace_section(page, "x", text)
        expected = f"before\n<!-- x: begin -->\n{text}\n<!-- x: end -->\nafter\n"
        assert page.read_text() == expected
    with pytest.raises(ValueError, match="has no section <!-- y: begin -->"):
        report.replace_section(page, "y", "text")


def test_results_are_written(tmp_path, monkeypatch):
    result = SimpleNamespace(
        case=SMALL[0], density=0.5, sdpa_ms=2.0, ours_ms=1.0, ratio=2.0, flex_ms=3.0,
        flex_ratio=3.0, error=1e-3, rate=5.0, peak=10.0,
    )  # fmt: skip
    kernels.write([result], tmp_path, "a machine")
    assert "| 50 %" in (tmp_path / "cpu.md").read_text()
    header, row = (tmp_path / "cpu.csv").read_text().splitlines()
    assert len(header.split(",")) == len(row.split(",")) == len(kernels.HEADER) + 3
