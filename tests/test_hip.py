"""HiP's tree search against the paper's text, one head and one node at a time."""

import pytest
import torch

from sparse_attn import BlockLayout, selectors, sparse_attention
from sparse_attn.selectors import HiP, SinkWindow

from .oracle import BACKENDS, GPU
from .structured import structured_qk

needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="not a backend under test")


def literal_hip(q, k, hip, is_causal=True):
    """The key blocks of each query block: q ``[Sq, D]`` and k ``[Skv, D]`` of one head."""
    q, k = q.double(), k.double()
    off = len(k) - len(q)
    chosen = []
    for start in range(0, len(q), hip.block_q):
        stop = min(start + hip.block_q, len(q))
        rows = [r for r in range(start, stop) if (r - start + 1) % hip.stride_q == 0]
        rows = [start] if hip.strict else [*rows, stop - 1]
        last_position = off + start + hip.block_q - 1
        last_position = min(last_position, len(k) - 1)
        end = last_position + 1 - (hip.window - hip.margin) if is_causal else len(k)
        blocks = [
            n
            for n in range(-(-len(k) // hip.block_k))
            if (n + 1) * hip.block_k > hip.sink and n * hip.block_k < end
        ]
        slots = -(-hip.k // hip.block_k)
        if len(blocks) <= slots:
            chosen.append(blocks)
            continue
        products = q[rows] @ k.T
        near = [*range(min(hip.sink, end)), *range(end, last_position + 1)]
        if end <= last_position and is_causal:
            products -= products[:, near].amax(1, keepdim=True)
        best = products.amax(0).tolist()

        size = 1
        while -(-len(blocks) // size) > 8 * slots:
            size *= 2
        nodes = [blocks[i : i + size] for i in range(0, len(blocks), size)]
        while True:
            scores = []
            for node in nodes:
                judges = [node[min(size // 2, len(node) - 1)], node[0]][: hip.representatives]
                keys = [min(j, end - 1) for n in judges for j in sampled_keys(n, hip)]
                scores.append(max(best[j] for j in keys))
            order = sorted(range(len(nodes)), key=lambda i, s=scores: -s[i])  # stable: ties first
            nodes = sorted(nodes[i] for i in order[:slots])
            if size == 1:
                break
            size //= 2
            nodes = [half for node in nodes for half in (node[:size], node[size:]) if half]
        chosen.append([node[0] for node in nodes])
    return chosen


def sampled_keys(block, hip):
    first = block * hip.block_k
    return range(first + hip.stride_k // 2, first + hip.block_k, hip.stride_k)


def lists(layout, batch=0, head=0):
    counts = layout.kv_num_blocks[batch, head].tolist()
    return [row[:n] for row, n in zip(layout.kv_indices[batch, head].tolist(), counts, strict=True)]


def chosen(op, q, k, hip, is_causal=True):
    """What the selector chooses through an op."""
    counts, indices = op(
        q,
        k,
        -(-hip.k // hip.block_k),
        hip.block_q,
        hip.block_k,
        hip.stride_q,
        hip.stride_k,
        hip.representatives,
        hip.sink,
        hip.window - hip.margin,
        hip.strict,
        is_causal,
    )
    sizes = (hip.block_q, hip.block_k)
    none = torch.zeros(1, dtype=torch.int32)
    seqlens = (q.shape[2], k.shape[2])
    return BlockLayout(seqlens, none, none, sizes, counts.cpu(), indices.cpu()).validate()


def reference(q, k, hip, is_causal=True):
    return chosen(torch.ops.sparse_attn.hip_select_reference, q, k, hip, is_causal)


def on_triton(q, k, hip, is_causal=True):
    q, k = (x.cuda() if GPU else x for x in (q, k))
    return chosen(torch.ops.sparse_attn.hip_select_triton, q, k, hip, is_causal)


def same(layout, expected):
    counts = torch.equal(layout.kv_num_blocks, expected.kv_num_blocks)
    return counts and layout.to_topk().equal(expected.to_topk())


def integer_qk(seqlens, *, batch=1, heads=2, kv_heads=1, dim=16, dtype=torch.float32):
    """Small integers: every dtype and order of addition gives the same scores, with many ties."""
    q = torch.randint(-3, 4, (batch, heads, seqlens[0], dim)).to(dtype)
    return q, torch.randint(-3, 4, (batch, kv_heads, seqlens[1], dim)).to(dtype)


SETTINGS = {
    "paper": HiP(k=32, block_q=32, block_k=2, sink=4, window=16, representatives=1),
    "two representatives": HiP(k=32, block_q=32, block_k=2, sink=4, window=16),
    "one slot": HiP(k=4, block_q=16, block_k=4, sink=0, window=1),
    "one query a block": HiP(k=12, block_q=1, stride_q=1, block_k=1, sink=3, window=5),
    "odd": HiP(k=37, block_q=24, block_k=5, stride_q=7, stride_k=2, sink=7, window=9),
    "one key a block": HiP(k=64, block_q=64, block_k=8, stride_q=4, stride_k=8, window=30),
    "strict": HiP(k=32, block_q=32, block_k=4, window=36, margin=4, strict=True),
    "margin": HiP(k=16, block_q=16, block_k=4, window=16, margin=16),
    "everything": HiP(k=400, block_q=32, window=16),
}
every_setting = pytest.mark.parametrize("hip", SETTINGS.values(), ids=SETTINGS)


@every_setting
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("seqlens", [(256, 256), (70, 333), (1, 300), (90, 40)])
def test_reference_is_the_literal_search(hip, is_causal, seqlens):
    q, k = integer_qk(seqlens)
    layout = reference(q, k, hip, is_causal)
    assert lists(layout, head=1) == literal_hip(q[0, 1], k[0, 0], hip, is_causal)


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seqlens", [(257, 257), (70, 333), (1, 300)])
def test_every_instruction_set_chooses_as_the_reference(isa, hip, dtype, seqlens):
    q, k = integer_qk(seqlens, batch=2, heads=4, kv_heads=2, dim=40, dtype=dtype)
    for is_causal in (True, False):
        assert same(hip(q, k, is_causal=is_causal), reference(q, k, hip, is_causal))


@needs_triton
@every_setting
def test_triton_chooses_as_the_reference(hip):
    q, k = integer_qk((max(20, hip.block_q), 150))
    assert same(on_triton(q, k, hip), reference(q, k, hip))


@needs_triton
@pytest.mark.parametrize(
    ("name", "dtype", "seqlens", "is_causal", "dim"),
    [
        ("paper", torch.float16, (33, 140), False, 40),
        ("two representatives", torch.bfloat16, (1, 300), True, 33),
        ("two representatives", torch.float16, (1, 200), True, 256),
        ("odd", torch.float16, (60, 40), True, 1),
        ("odd", torch.float32, (30, 100), False, 72),
    ],
)
def test_triton_with_dtypes_and_head_dims(name, dtype, seqlens, is_causal, dim):
    q, k = integer_qk(seqlens, batch=2, heads=4, kv_heads=2, dim=dim, dtype=dtype)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    layout = on_triton(q, k, SETTINGS[name], is_causal)
    assert same(layout, reference(q, k, SETTINGS[name], is_causal))


@needs_triton
def test_triton_searches_rows_and_keys_in_parts():
    """More sampled rows and more keys of a block than a tile holds."""
    hip = HiP(k=400, block_q=160, block_k=200, stride_q=1, sink=0, window=8)
    q, k = integer_qk((160, 1100), heads=1)
    assert same(on_triton(q, k, hip), reference(q, k, hip))


@needs_triton
def test_triton_leaves_many_slots_to_the_reference():
    hip = HiP(k=2049, block_k=1, block_q=16, window=8)
    q, k = integer_qk((16, 2100), heads=1)
    assert same(on_triton(q, k, hip), reference(q, k, hip))
    q, k = (x.cuda() if GPU else x for x in (q, k))
    with pytest.raises(ValueError, match="representatives must be 1 or 2, but is 3"):
        torch.ops.sparse_attn.hip_select_triton(q, k, 8, 16, 4, 2, 1, 3, 4, 16, False, True)


@needs_triton
def test_triton_with_not_a_number():
    q, k = torch.randn(2, 1, 1, 64, 16).unbind(0)
    for value in (torch.nan, -torch.inf):
        k[:, :, ::3], q[:, :, 5] = value, value
        layout = on_triton(q, k, HiP(k=16, block_q=32, block_k=2, sink=0, window=8))
        assert (layout.kv_num_blocks == 8).all()


@pytest.mark.parametrize("representatives", [1, 2])
@pytest.mark.parametrize(
    ("seqlens", "window", "block_q", "stride_q"),
    [
        ((700, 700), 32, 16, 1),  # searches that begin with nodes of 1, 2 and 4 blocks
        ((650, 650), 9, 64, 2),  # the last block of a search has few keys
        ((33, 700), 30, 8, 4),  # few searches
        ((130, 801), 300, 64, 1),
    ],
)
def test_whole_blocks_at_once(isa, seqlens, window, block_q, stride_q, representatives):
    """Blocks of 16 sampled keys, which AMX multiplies for several searches."""
    sizes = {"block_q": block_q, "stride_q": stride_q, "representatives": representatives}
    for keys, block_k in ((16, 16), (64, 16), (96, 32)):
        hip = HiP(k=keys, block_k=block_k, stride_k=block_k // 16, sink=20, window=window, **sizes)
        q, k = integer_qk(seqlens, heads=3, kv_heads=1, dim=64, dtype=torch.bfloat16)
        for is_causal in (True, False):
            assert same(hip(q, k, is_causal=is_causal), reference(q, k, hip, is_causal))


def test_rows_of_large_products_leave_room_for_others(isa):
    """Row 31 sees its needle, though all other rows have greater products with other keys."""
    q, k = torch.randn(2, 1, 1, 512, 64).unbind(0)
    q[0, 0, 480:511] *= 100
    k[0, 0, 200] = 3 * q[0, 0, 511]
    for dtype in (torch.float32, torch.bfloat16):
        hip = HiP(k=32, block_q=32, stride_q=1, sink=4, window=64)
        layout = hip(q.to(dtype), k.to(dtype))
        assert layout.visible(511, 512)[0, 0, 0, 200]


def test_keys_that_exceed_the_cache(isa):
    """Query blocks search together, one part of the keys after the other."""
    hip = HiP(k=100, block_q=8, block_k=1, sink=3, window=4)
    q, k = integer_qk((160, 3000), dim=256)
    layout, expected = hip(q, k), reference(q, k, hip)
    assert layout.to_topk().equal(expected.to_topk())


@pytest.mark.parametrize("dim", [1, 33, 128, 256])
def test_head_dims_and_strides(isa, dim):
    hip = SETTINGS["paper"]
    for dtype in (torch.float32, torch.bfloat16):
        q, k = integer_qk((130, 130), heads=3, kv_heads=3, dim=dim, dtype=dtype)
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        assert hip(q, k).to_topk().equal(reference(q, k, hip).to_topk())
        columns = k.mT.contiguous().mT  # last stride not 1
        assert hip(q, columns).to_topk().equal(reference(q, k, hip).to_topk())


def test_structured_and_real_queries_and_keys(isa, real_qk):
    hip = HiP(k=64, block_q=32, block_k=4, sink=4, window=32)
    for q, k in [structured_qk(700)[:2], *real_qk.values()]:
        layout = hip(q, k)
        for head in (0, q.shape[1] - 1):
            kv_head = head // (q.shape[1] // k.shape[1])
            expected = literal_hip(q[0, head], k[0, kv_head], hip)
            assert lists(layout, head=head) == expected


@pytest.mark.parametrize("seqlens", [(300, 300), (50, 300), (1, 300)])
def test_enough_keys_are_dense_attention(isa, seqlens):
    q, k, v = torch.randn(3, 1, 4, 300, 64).unbind(0)
    q = q[:, :, : seqlens[0]]
    out = sparse_attention(q, k, v, HiP(k=300))
    assert HiP(k=300)(q, k).density() == 1
    torch.testing.assert_close(out, sparse_attention(q, k, v, selectors.Dense()))


def test_only_the_own_block_looks_ahead():
    q, k, _ = structured_qk(512)
    for strict in (False, True):
        hip = HiP(k=48, block_q=64, block_k=4, sink=4, window=64, strict=strict)
        before = hip(q, k)
        kept = 256 if not strict else 193  # of the tokens; block 3 has rows 192 to 255
        q2, k2 = q.clone(), k.clone()
        q2[:, :, kept:], k2[:, :, kept:] = 9.0, torch.randn(64)
        after = hip(q2, k2)
        assert torch.equal(after.kv_indices[:, :, :4], before.kv_indices[:, :, :4])


def test_no_key_falls_between_mask_and_window():
    """With a budget for all searched keys, each row sees everything, also where it is strict."""
    q, k, _ = structured_qk(500)
    dense = BlockLayout.dense((500, 500)).to_dense()
    for strict in (False, True):
        for window, block_k in ((64, 8), (65, 7), (100, 3)):
            hip = HiP(k=500, block_q=64, block_k=block_k, sink=9, window=window, strict=strict)
            assert torch.equal(hip(q, k).to_dense(num_heads=4), dense.expand(-1, 4, -1, -1))


def test_finds_needles_that_a_window_loses():
    q, k, needles = structured_qk(1024)
    mask = HiP(k=128, block_q=32, block_k=1, sink=4, window=64)(q, k).to_dense(num_heads=4)
    window = SinkWindow(sink=4, window=64)(q, k).to_dense()
    assert not window[0, :, -1, needles].any()
    assert mask[0, :, -1, needles].float().mean() > 0.3  # chance is 0.13


def test_negative_scale_turns_the_order_round():
    q, k, _ = structured_qk(300)
    hip = HiP(k=16, block_q=32, block_k=2, sink=0, window=8)
    assert torch.equal(hip(q, k, scale=-0.3).to_topk(), hip(-q, k).to_topk())


def test_not_a_number_still_gives_valid_lists(isa):
    for value in (torch.nan, torch.inf, -torch.inf):
        for dtype in (torch.float32, torch.bfloat16):
            q, k = torch.randn(2, 1, 2, 200, 32, dtype=dtype).unbind(0)
            k[:, :, ::3] = value
            q[:, :, 5] = value
            layout = HiP(k=16, block_q=32, block_k=2, sink=0, window=8)(q, k).validate()
            assert (layout.kv_num_blocks[..., 2:] == 8).all()


def test_opcheck():
    q, k, _ = structured_qk(100)
    for name in ("hip_select", "hip_select_reference"):
        op = getattr(torch.ops.sparse_attn, name).default
        torch.library.opcheck(op, (q, k, 8, 16, 4, 2, 1, 2, 4, 16, False, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_and_trains(dynamic):
    torch.compiler.reset()
    q, k, _ = (x[:, :, :100] if x.dim() == 4 else x for x in structured_qk(128))
    v = torch.randn_like(k)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    hip = HiP(k=16, block_q=16, block_k=2, sink=2, window=16)

    def loss(q, k, v):
        return sparse_attention(2 * q, k, v, hip).square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    again = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False)
    for value in (compiled(*leaves), again):
        torch.testing.assert_close(torch.autograd.grad(value, leaves), expected)


def test_gradients_are_those_of_the_fixed_mask():
    q, k, _ = structured_qk(96)
    v = torch.randn_like(k)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    hip = HiP(k=16, block_q=16, block_k=2, sink=2, window=16)
    mask = hip(q.double(), k.double()).to_dense(num_heads=4)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *leaves, attn_mask=mask, enable_gqa=True
    )
    out = sparse_attention(*leaves, hip)
    dout = torch.randn_like(out)
    grads = (torch.autograd.grad(x, leaves, dout) for x in (out, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be an int of at least 1, got 0"),
        ({"block_q": 0}, "block_q must be"),
        ({"block_k": 1.5}, "block_k must be"),
        ({"sink": -1}, "sink must be"),
        ({"window": 0}, "window must be"),
        ({"stride_q": 65}, "stride_q is 65, more than block_q = 64"),
        ({"stride_k": 17}, "stride_k is 17, more than block_k = 16"),
        ({"representatives": 3}, "representatives must be 1 or 2, got 3"),
        ({"margin": -1}, "margin must be"),
        ({"margin": 257}, "margin is 257, more than window = 256"),
        ({"strict": True, "window": 64, "margin": 1}, r"strict needs window - margin >= block_q"),
    ],
)
def test_bad_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        HiP(**arguments)
