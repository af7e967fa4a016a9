"""The quick cases under pytest-benchmark: `pytest bench/ --benchmark-only`."""

import pytest

from bench.lib.cases import chosen
from bench.lib.problem import Problem, check


@pytest.mark.parametrize("library", ["sparse_attn", "torch SDPA"])
@pytest.mark.parametrize("case", chosen("quick"), ids=lambda case: case.name)
def test_kernels(benchmark, case, library):
    problem = Problem(case)
    check(problem)
    benchmark.group = case.name
    benchmark.extra_info.update(density=problem.density)
    call = problem.ours() if library == "sparse_attn" else problem.sdpa()
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
