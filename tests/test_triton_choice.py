"""How the Triton backend chooses: configurations pruned and timed, all of them compiled somewhere,
work in even parts.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace

import pytest
import torch

from bench.lib.compile_cases import HEAD_DIMS, compiled_calls, steps_of
from sparse_attn import BlockLayout
from sparse_attn.contract.arguments import Arguments
from sparse_attn.contract.packing import Packing
from sparse_attn.triton import autotune, backward, configs, forward, prepare
from sparse_attn.triton.configs import Config, Target
from sparse_attn.triton.launch import Call
from sparse_attn.triton.support import DTYPES

from .oracle import GPU, random_layout
from .test_attention import check, make_qkv

pytestmark = [pytest.mark.gpu] if GPU else []
interpreted = pytest.mark.skipif(GPU, reason="a test of the interpreter")

TARGETS = {
    "sm_80": Target((8, 0), 132),
    "sm_90": Target((9, 0), 132),
    "sm_100": Target((10, 0), 132),
    "gfx942": Target((9, 4), 132, 64),
}
KERNELS = {
    "forward": lambda dtype, dim, irregular, target, **sizes: configs.forward(
        dtype, dim, irregular, False, False, target=target, **sizes
    ),
    "backward_rows": lambda dtype, dim, irregular, target, **sizes: configs.backward_rows(
        dtype, dim, irregular, False, target=target, **sizes
    ),
    "backward_keys": lambda dtype, dim, irregular, target, **sizes: configs.backward_keys(
        dtype, dim, irregular, target=target, **sizes
    ),
}
MANY = {"slots": 512, "keys": 4096}


# --- which configurations a call may choose


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_lists_are_short_and_fit_the_call(kernel, target):
    for dtype in DTYPES:
        for dim in HEAD_DIMS:
            for irregular in (True, False):
                choose, case = KERNELS[kernel], (dtype, dim, irregular, target)
                found = choose(*case, **MANY)
                assert 1 <= len(set(found)) == len(found) <= 3
                few = choose(*case, slots=4, keys=4096)
                lowest = min(x.block_m for x in found)
                assert {x.block_m for x in few} <= {16, 32, 64} and few[0].block_m <= lowest
                assert all(x.block_m <= max(64, lowest) for x in choose(*case, slots=64, keys=4096))
                short = choose(*case, slots=512, keys=5)
                assert len(short) == 1 or all(x.block_n <= 20 for x in short)
                if target.warp_size == 64:
                    assert all(x.num_warps <= 4 and x.num_stages == 1 for x in found)


def test_registers_are_limited_where_the_assembler_would_spill_some():
    choose = KERNELS["forward"]
    for arch, expected in {"sm_90": 255, "gfx942": None}.items():
        found = choose(torch.float32, 64, True, TARGETS[arch], **MANY)
        assert [x.max_registers for x in found] == [expected]
    (config,) = choose(torch.float32, 256, True, TARGETS["sm_90"], **MANY)
    assert (config.num_warps, config.max_registers) == (16, 128)
    assert choose(torch.bfloat16, 64, True, TARGETS["sm_90"], **MANY)[0].max_registers is None


def compiled(target: Target) -> set:
    """What `compile_cases` has compiled: the candidates of its steps."""
    found = set()
    for what in compiled_calls():
        for step in steps_of(what, target):
            if isinstance(step, autotune.Choice):
                found |= {(step.kind[0], what.dtype, what.head_dim, x) for x in step.candidates}
    return found


def test_float16_takes_the_configurations_of_bfloat16():
    for target in TARGETS.values():
        for choose in KERNELS.values():
            for dim, irregular in itertools.product(HEAD_DIMS, (True, False)):
                half = choose(torch.float16, dim, irregular, target, **MANY)
                assert half == choose(torch.bfloat16, dim, irregular, target, **MANY)


@pytest.mark.parametrize("arch", TARGETS)
def test_every_configuration_that_can_be_chosen_is_compiled(arch):
    known = compiled(TARGETS[arch])

    def wide(dtype, dim, irregular, target, **sizes):
        return configs.forward(dtype, dim, False, True, False, target=target, **sizes)

    for kernel, choose in [*KERNELS.items(), ("forward", wide)]:
        for dtype in (torch.float32, torch.bfloat16):
            for dim in (16, 32, 64, 128, 256):
                chosen = {
                    config
                    for irregular in (True, False)
                    for slots in (1, 4, 16, 17, 32, 48, 64, 65, 100, 128, 256, 1000, 10**6)
                    for keys in (1, 4, 16, 40, 300, 10**6)
                    for config in choose(
                        dtype, dim, irregular, TARGETS[arch], slots=slots, keys=keys
                    )
                }
                assert {(kernel, dtype, max(dim, 64), x) for x in chosen} <= known


# --- choosing the fastest


@pytest.fixture
def timer(monkeypatch):
    """Timing that says a configuration takes `block_m` milliseconds, and what it has timed."""
    timed = []

    def milliseconds(launches):
        timed.append(launches[0].arguments["BLOCK_M"])
        return float(timed[-1])

    monkeypatch.setattr(autotune, "winners", {})
    monkeypatch.setattr(autotune, "is_enabled", lambda: True)
    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    two = (Config(64, 64, 4, 1), Config(16, 64, 4, 1))
    for kernel in KERNELS:
        monkeypatch.setattr(configs, kernel, lambda *args, **sizes: two)
    return timed


def qkv(dtype=torch.float32, seqlen=40):
    return make_qkv(dtype, seqlens=(seqlen, seqlen))


@interpreted
def test_the_first_call_of_a_kind_times_and_the_winner_stays(timer):
    layout = BlockLayout.sink_window((40, 40), sink=2, window=9)
    check("triton", *qkv(), layout)
    assert timer == 3 * [64, 16]
    assert {kind[0] for kind in autotune.winners} == set(KERNELS)
    assert {x.block_m for x in autotune.winners.values()} == {16}
    check("triton", *qkv(seqlen=50), BlockLayout.sink_window((50, 50), sink=2, window=9))
    assert len(timer) == 6
    check("triton", *qkv(seqlen=70), BlockLayout.sink_window((70, 70), sink=2, window=9))
    assert len(timer) == 12
    check("triton", *qkv(torch.float16), layout)
    assert len(timer) == 18


@interpreted
def test_the_first_is_taken_where_nothing_may_be_timed(timer, monkeypatch):
    call = Call(BlockLayout.dense((40, 40)), 4, 2, 1, None, 0.1, 0.0, True)
    q, k, v = qkv()

    def chosen():
        (choice,), _ = forward.steps(call, q, k, v, None, False, configs.INTERPRETER)
        return autotune.chosen(choice).block_m

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen() == 64 and not timer
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert chosen() == 16 and len(timer) == 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen() == 16  # known by now
    monkeypatch.setattr(autotune, "is_enabled", lambda: False)
    assert chosen() == 64 and len(timer) == 2


def test_when_winners_are_wanted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.use_deterministic_algorithms(False)
    assert autotune.is_enabled()
    monkeypatch.setenv("SPARSE_ATTN_AUTOTUNE", "0")
    assert not autotune.is_enabled()
    monkeypatch.delenv("SPARSE_ATTN_AUTOTUNE")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert not autotune.is_enabled()
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not autotune.is_enabled()


def test_what_cannot_run_takes_forever(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def launch():
        raise OutOfResources(300, 200, "shared memory")

    monkeypatch.setattr("triton.testing.do_bench", lambda run, **options: run() or 3.0)
    assert autotune.milliseconds([launch]) == float("inf")
    assert autotune.milliseconds([]) == 3.0


@interpreted
@pytest.mark.parametrize("columns", [0, 5])
def test_launches_may_be_repeated(columns):
    """As timing does: nothing may be added to what an earlier launch left."""
    q, k, v = make_qkv(torch.float32, seqlens=(40, 60))
    layout = random_layout((40, 60), heads=2, block_size=(16, 16), sink=3, columns=columns)
    biases = (torch.randn(1, 4, 60), torch.rand(4))
    call = Call(layout, 4, 2, 1, None, 0.1, 0.0, True, *biases)
    found, (out, lse) = forward.steps(call, q, k, v, None, False, configs.INTERPRETER)
    more, gradients = backward.steps(
        call, torch.randn_like(q), torch.randn(1, 4, 40), q, k, v, out, lse, configs.INTERPRETER
    )
    results, first = (out, lse, *gradients), []
    for times in (1, 2, 1):
        for step in found + more:
            for _ in range(times):
                step()
        first = first or [x.clone() for x in results]
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


# --- even parts


def makespan(costs: list[float], cores: int) -> float:
    """When the last of some programs ends that start in this order, each on the first free core."""
    free = [0.0] * cores
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


def programs_of(launch, rows_of_tile: torch.Tensor) -> list[float]:
    """What each program of the launch for dk and dv has to do, from the rows of each tile."""
    x = launch.arguments
    order = x["order_ptr"].tolist() if x["order_ptr"] is not None else range(len(rows_of_tile))
    costs = [float(rows_of_tile[n]) for n in order]
    if x["partial_dk_ptr"] is None:
        return costs
    split = [c / x["num_splits"] for c in costs[: x["num_split_tiles"]]]
    split = [c for c in split for _ in range(x["num_splits"])]
    return split + costs[x["num_split_tiles"] :]


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize(
    "layout",
    [
        BlockLayout.sink_window((4096, 4096), sink=4, window=64),
        BlockLayout.sink_window((4096, 4096), sink=100, window=300),
        BlockLayout.dense((4096, 4096)),
    ],
    ids=["sink", "wide sink", "dense"],
)
def test_keys_that_all_rows_see_are_shared_out(layout, kv_heads):
    target = Target((9, 0), 16)
    q, k = torch.empty(1, kv_heads, 4096, 16), torch.empty(1, kv_heads, 4096, 16)
    call = Call(layout, kv_heads, kv_heads, 1, None, 0.1, 0.0, True)
    lse = torch.empty(q.shape[:3])
    choice = backward.steps(call, q, lse, q, k, k, q, lse, target)[0][-1]
    launch = choice.build(choice.candidates[0])[0]
    block_n = launch.arguments["BLOCK_N"]
    seen = layout.to_dense(is_causal=True)[0, 0].unflatten(1, (-1, block_n)).any(-1).sum(0)
    costs = programs_of(launch, seen.repeat_interleave(kv_heads))
    assert sum(costs) == pytest.approx(float(seen.sum()) * kv_heads)
    assert len(costs) == launch.grid[0]
    assert makespan(costs, 16) <= 1.2 * sum(costs) / 16


@pytest.mark.parametrize("is_causal", [True, False])
def test_long_rows_come_first(is_causal):
    """Every eighth row block sees everything, the others little: the order of a causal call is that
    of its rows.
    """
    counts = torch.where(torch.arange(64) % 8 == 7, 64, 3).int().view(1, 1, 64)
    indices = torch.arange(64, dtype=torch.int32).expand(1, 1, 64, 64)
    none = torch.zeros(1, dtype=torch.int32)
    layout = BlockLayout((4096, 4096), none, none, (64, 64), counts, indices)
    layout = ends_of_lists(layout) if is_causal else layout
    q = torch.empty(1, 8, 4096, 16)
    call = Call(layout, 8, 8, 1, None, 0.1, 0.0, is_causal)
    (choice,), _ = forward.steps(call, q, q, q, None, False, Target((9, 0), 100))
    launch = choice.build(choice.candidates[0])[0]
    order = launch.arguments["order_ptr"]
    assert (order is None) == is_causal
    order = torch.arange(512) if is_causal else order
    cost = layout.kv_num_blocks[0, 0].flip(0).repeat_interleave(8)[order.long()].tolist()
    assert sorted(order.tolist()) == list(range(512))
    assert launch.grid == (512 * launch.arguments["parts"], 1)
    assert is_causal or cost == sorted(cost, reverse=True)
    assert makespan(cost, 100) <= 1.2 * max(sum(cost) / 100, max(cost))


# --- lists behind the diagonal


def ends_of_lists(layout, packing=None, totals=(0, 0)):
    """The layout with lists that end at the diagonal."""
    device = "cuda" if GPU else "cpu"
    packing = packing and Packing(
        *(x if x is None else x.to(device) for x in vars(packing).values())
    )
    launches, found = prepare.launches(layout.to(device), packing, totals, True)
    for launch in launches:
        launch()
    return found.to("cpu")


@pytest.mark.parametrize("batch", [1, 2])
def test_lists_end_at_the_diagonal(batch):
    layout = random_layout(
        (70, 100), batch=batch, heads=2, block_size=(16, 8), columns=60, column_group=2
    )
    cut = ends_of_lists(layout)
    for b in range(batch):
        for h in range(2):
            for m in range(layout.num_q_blocks):
                last = min(16 * m + 16, 70) - 1 + 30
                count = layout.kv_num_blocks[b, h, m]
                expected = int((8 * layout.kv_indices[b, h, m, :count] <= last).sum())
                assert cut.kv_num_blocks[b, h, m] == expected
            for g in range(layout.num_column_groups):
                last = min(32 * g + 32, 70) - 1 + 30
                count = layout.num_columns[b, h, g]
                expected = int((layout.column_indices[b, h, g, :count] <= last).sum())
                assert cut.num_columns[b, h, g] == expected
    assert (cut.kv_num_blocks < layout.kv_num_blocks).any()
    assert (cut.num_columns < layout.num_columns).any()


def test_lists_of_packed_sequences_end_at_their_own_diagonals():
    layout = random_layout((32, 64), batch=2, block_size=(16, 8), keep=1.0)
    ends_q, ends_kv, lengths = (
        torch.tensor(x, dtype=torch.int32) for x in ([0, 20, 25], [0, 30, 94], [30, 64])
    )
    shared = replace(
        layout, kv_num_blocks=layout.kv_num_blocks[:1], kv_indices=layout.kv_indices[:1]
    )
    table = torch.zeros(2, 8, dtype=torch.int32)
    for packing in (Packing(ends_q, ends_kv), Packing(ends_q, None, lengths, table)):
        cut = ends_of_lists(layout, packing, (25, 94))
        assert cut.kv_num_blocks[:, 0].tolist() == [[4, 6], [8, 8]]
        assert ends_of_lists(shared, packing, (25, 94)).kv_num_blocks[:, 0].tolist() == [[8, 8]]


def test_long_lists_end_at_the_diagonal():
    """Lists longer than what is read at a time, and rows before the first key."""
    layout = random_layout((300, 260), block_size=(1, 1), keep=0.9)
    cut = ends_of_lists(layout)
    for m in range(300):
        count = layout.kv_num_blocks[0, 0, m]
        expected = int((layout.kv_indices[0, 0, m, :count] <= m - 40).sum())
        assert cut.kv_num_blocks[0, 0, m] == expected


# --- addresses


@interpreted
def test_gradients_of_tensors_that_span_more_than_2_to_the_31_elements():
    """Only the touched pages of the 4 GiB are resident."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    rows, stride = 40, 2**26
    memory = torch.empty(rows * stride, dtype=torch.float16)
    assert (rows - 1) * stride > 2**31
    q, k, v, dout = (
        memory.as_strided((1, 2, rows, 16), (1, 16, stride, 1), 64 * n) for n in range(4)
    )
    for x in (q, k, v, dout):
        x.copy_(torch.randn(x.shape))
    layout = Arguments.of(random_layout((rows, rows), sink=3, columns=4), 0.2, 0.0, True)

    def gradients(q, k, v, dout):
        out, lse = torch.ops.sparse_attn.attention_triton(q, k, v, *layout)
        dlse = torch.zeros_like(lse)
        return torch.ops.sparse_attn.attention_backward_triton(
            dout, dlse, q, k, v, out, lse, *layout
        )

    near = gradients(*(x.contiguous() for x in (q, k, v, dout)))
    far = gradients(q, k, v, dout)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
