"""The benchmark harness: it pairs times as it says, and refuses what is wrong."""

import re
import sys
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

import sparse_attn
from bench import kernels
from bench.lib import devices, problem, report, timing
from bench.lib.cases import (
    CASES,
    CUDA_CASES,
    TABLES,
    Blocks,
    Case,
    Columns,
    Dense,
    SinkWindow,
    chosen,
)


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


def test_a_stopwatch_may_time_the_calls():
    clock, ran = FakeClock(), []
    calls = {name: lambda name=name: ran.append(name) for name in "ab"}
    seconds = {"a": 2.0, "b": 3.0}

    def stopwatch(call):
        call()
        clock.now += 5.0  # what is around a call counts for the rounds, not for the call
        return seconds[ran[-1]]

    times = timing.paired_times(calls, seconds=80, clock=clock, stopwatch=stopwatch)
    assert times == {"a": [2.0] * 8, "b": [3.0] * 8}


def test_events_stand_around_the_call_alone(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("synchronize")

        def elapsed_time(self, end):
            return 5.0

    class OtherData:
        def zero_(self):
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("wait"), raising=False)
    monkeypatch.setattr(timing.torch, "empty", lambda *size, **options: OtherData())
    assert timing.CudaEvents()(lambda: done.append("call")) == 5e-3
    assert done == ["flush", "wait", "record", "call", "record", "synchronize"]


def test_the_ratio_is_the_median_of_paired_ratios_not_the_ratio_of_medians():
    slow_machine = 10.0
    ours, theirs = [1.0, 2.0, slow_machine], [3.0, 4.0, 3 * slow_machine]
    assert timing.paired_ratio(theirs, ours) == 3.0


def test_other_load_is_the_work_that_is_not_ours(monkeypatch):
    seconds = iter([(100.0, 10.0, 0.0), (100.0 + 9, 10.0 + 4, 10.0)])
    monkeypatch.setattr(timing.OtherLoad, "_now", staticmethod(lambda: next(seconds)))
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    assert timing.OtherLoad().share() == 0.25


@pytest.mark.parametrize("device", TABLES)
def test_case_names_are_unique(device):
    names = [case.name for case in TABLES[device]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("device", TABLES)
def test_runs_are_nested_and_can_be_narrowed(device):
    quick, default, full = (chosen(tier, device=device) for tier in ("quick", "default", "full"))
    assert set(quick) < set(default) < set(full) == set(TABLES[device])
    assert {case.kind for case in quick} == {"prefill", "decode", "backward"}
    only = chosen("full", ["decode", "bf16"], device)
    assert only and all(case.kind == "decode" and case.dtype == "bf16" for case in only)
    only = chosen("full", ["decode", "fp32"])
    assert only and all(case.kind == "decode" and case.dtype == "fp32" for case in only)


def geometry(case: Case):
    return case.pattern, case.seqlens, case.kv_heads


def one_list(case: Case) -> Case:
    """The case with a single KV head: long ones take long, and others are alike."""
    return replace(case, kv_heads=1)


@pytest.mark.parametrize(
    "case",
    {geometry(c): c for c in CASES + [one_list(c) for c in CUDA_CASES]}.values(),
    ids=lambda case: f"{case.name} {case.kv_heads}",
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


def fake_gpu(stopwatch=timing.wall_time, **fields) -> devices.Device:
    """All that a GPU's run does, on the CPU."""
    return devices.Device(
        **{
            "name": "cpu",
            "title": "Kernels on a GPU",
            "stem": "gpu",
            "stopwatch": stopwatch,
            "conditions": lambda: "a GPU.",
            "others": ("Flex", "flash-attn"),
            "notes": devices.CUDA_NOTES,
            "sdpa_backends": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
            "matrix": 32,
            "megabytes": 1,
            **fields,
        }
    )


@pytest.fixture
def flash_attn(monkeypatch):
    """A package of that name, which shows how it was called."""
    shapes = []

    def flash_attn_func(q, k, v, causal):
        shapes.append((q.shape, k.shape, causal))
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=q.shape[1] > 1, enable_gqa=True
        )
        return out.transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    return shapes


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_kind_of_case_is_measured(case, gpu, monkeypatch, flash_attn):
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)
    small_cpu = replace(devices.cpu(), matrix=32, megabytes=1)
    device = fake_gpu() if gpu else small_cpu
    result = kernels.measure(case, seconds=0, device=device)
    libraries = {"ours", "SDPA"} | ({"flash-attn"} if gpu and case.dtype != "fp32" else set())
    assert set(result.ms) == set(result.ratios) == libraries
    assert result.error < 0.05 and min([*result.ms.values(), *result.ratios.values()]) > 0
    assert len(kernels.cells(result, device.others)) == len(kernels.header(device.others))
    if "flash-attn" in libraries:
        rows = case.seqlen_q
        assert flash_attn[0] == ((1, rows, 4, 16), (1, 96, 2, 16), True)


def test_the_stopwatch_of_the_device_times_the_calls():
    device = fake_gpu(lambda call: (call(), 0.25)[1], others=())
    result = kernels.measure(SMALL[0], seconds=0, device=device)
    assert result.ms == {"ours": 250.0, "SDPA": 250.0}
    assert result.peak == 2 * 32**3 / 0.25


def test_flex_is_compared_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(problem, "compiled_flex", lambda: flex_attention)
    calls = {
        flex: problem.Problem(small(Blocks(16, 16, 0.5), flex=flex)).calls(with_flex=True)
        for flex in (False, True)
    }
    assert list(calls[False]) == ["ours", "SDPA"] and list(calls[True])[-1] == "Flex"
    torch.testing.assert_close(calls[True]["Flex"](), calls[True]["ours"](), atol=2e-2, rtol=2e-2)


def test_gradients_are_checked_in_parts_alike(monkeypatch):
    some = problem.Problem(small(Blocks(16, 16, 0.5), part="backward", dtype="fp32"))
    whole = problem.backward_results(some)
    monkeypatch.setattr(problem, "CHECKED_ELEMENTS", 2 * 96 * 20)
    parts = problem.backward_results(some)
    for name in ("dq", "dk", "dv"):
        for a, b in zip(whole[name], parts[name], strict=True):
            torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(whole[name][1], parts[name][1], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_wrong_result_is_refused(case, monkeypatch):
    def wrong(q, k, v, layout, return_lse=False):
        out, lse = sparse_attn.sparse_attention(q, k, 1.1 * v, layout, return_lse=True)
        return (out, lse) if return_lse else out

    monkeypatch.setattr(problem, "sparse_attention", wrong)
    for device in (None, fake_gpu()):
        with pytest.raises(problem.WrongResult, match=re.escape(case.name)):
            kernels.measure(case, device=device)


def run_program(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["kernels", *map(str, arguments)])
    kernels.main()


def test_the_program_fails_and_names_the_wrong_case(monkeypatch, tmp_path):
    case = SMALL[0]
    monkeypatch.setitem(TABLES, "cpu", [case])
    monkeypatch.setattr(kernels, "check", lambda problem: refuse(problem.case))

    def refuse(case):
        raise problem.WrongResult(f"{case.name}: off")

    with pytest.raises(SystemExit) as stopped:
        run_program(monkeypatch, "--out", tmp_path)
    assert case.name in str(stopped.value.code)  # a message as the code is exit status 1
    assert not list(tmp_path.iterdir())


def test_a_run_on_a_gpu_writes_its_page(monkeypatch, tmp_path, flash_attn):
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)
    monkeypatch.setattr(devices, "cuda", fake_gpu)
    too_large = small(Dense(), dtype="fp16")
    monkeypatch.setitem(TABLES, "cuda", [*SMALL[:2], too_large])

    def measure(case, *arguments):
        if case is too_large:
            raise torch.OutOfMemoryError
        return measured(case, *arguments)

    measured = kernels.measure
    monkeypatch.setattr(kernels, "measure", measure)
    run_program(monkeypatch, "--device", "cuda", "--out", tmp_path)
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith("# Kernels on a GPU") and "vs flash-attn" in page
    assert f"Left out, as memory does not hold them: {too_large.name}." in page
    assert "Backend: " in page and "CUDA events" in page
    columns, *rows = (tmp_path / "gpu.csv").read_text().splitlines()
    assert len(rows) == 2 and "flash-attn ms" in columns


def test_a_case_that_flex_does_not_compile_is_measured_without_it(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no tiles fit")

    monkeypatch.setattr(problem, "compiled_flex", lambda: fail)
    some = problem.Problem(replace(SMALL[0], flex=True))
    assert set(some.calls(with_flex=True)) == {"ours", "SDPA"}
    assert "no FlexAttention: no tiles fit" in capsys.readouterr().err


def test_without_a_gpu_the_program_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run_program(monkeypatch, "--device", "cuda")
    assert re.fullmatch(
        r"DEVICE=cuda needs a GPU, and torch \S+ finds none: .*", stopped.value.code
    )


def test_flash_attn_is_optional(monkeypatch):
    for name in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)
    assert devices.flash_attention() is None
    assert problem.Problem(SMALL[0], fake_gpu()).flash() is None


def test_work_counts_the_pairs_that_are_seen():
    device = fake_gpu(lambda call: 1.0)
    pairs = 96 * 97 // 2 * 4
    product, read = 2 * 32**3, 2**20

    def work(case):
        return kernels.work(problem.Problem(case, device))

    assert work(small(Dense())) == (pairs * 2 * 2 * 16, product)
    assert work(small(Dense(), part="backward")) == (pairs * 5 * 2 * 16, product)
    assert work(small(Dense(), seqlen_q=1)) == (96 * 2 * (16 + 16) * 2, read)


def test_sampled_rows_exist():
    assert problem.sampled_rows(1).tolist() == [0]
    assert problem.sampled_rows(100).max() == 99
    assert torch.all(problem.sampled_rows(8192).diff() > 0)


def test_a_section_of_a_page_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n")
    for text in ("new", "newer"):
        report.replace_section(page, "x", text)
        expected = f"before\n<!-- x: begin -->\n{text}\n<!-- x: end -->\nafter\n"
        assert page.read_text() == expected
    with pytest.raises(ValueError, match="has no section <!-- y: begin -->"):
        report.replace_section(page, "y", "text")


def test_results_are_written(tmp_path):
    result = kernels.Result(
        case=SMALL[0], density=0.5, ms={"SDPA": 2.0, "ours": 1.0, "Flex": 3.0},
        ratios={"SDPA": 2.0, "ours": 1.0, "Flex": 3.0}, error=1e-3, rate=5.0, peak=10.0,
    )  # fmt: skip
    device = devices.cpu()
    assert device.stem == f"cpu-{sparse_attn._C.cpu_isa()}".replace("_", "-")
    kernels.write([result], tmp_path, "a machine", device)
    assert "| 50 %" in (tmp_path / f"{device.stem}.md").read_text()
    header, row = (tmp_path / f"{device.stem}.csv").read_text().splitlines()
    assert len(header.split(",")) == len(row.split(",")) == len(kernels.header(("Flex",))) + 3


@pytest.mark.parametrize("seconds, size", [(1e-3, 512), (0.5, 256)])
def test_slow_products_are_left_early(seconds, size):
    rate = timing.matmul_rate(torch.float32, 512, stopwatch=lambda call: seconds)
    assert rate == 2 * size**3 / seconds
