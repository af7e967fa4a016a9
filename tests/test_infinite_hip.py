"""InfiniteHiP's stages against the paper's text, one chunk at a time."""

from dataclasses import replace

import pytest
import torch

from sparse_attn import BlockLayout, patch, selectors, sparse_attention
from sparse_attn.selectors import InfiniteHiP, MaskCache

from .oracle import BACKENDS, GPU
from .structured import structured_qk

needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="not a backend under test")


def literal_infinite_hip(q, k, hip, is_causal=True):
    """The key blocks of each query block, for all heads: q ``[H, Sq, D]``, k ``[Hkv, Skv, D]``."""
    q, k = q.double(), k.double().repeat_interleave(len(q) // len(k), 0)
    seqlen_q, seqlen_kv = q.shape[1], k.shape[1]
    behind = max(0, hip.window - hip.chunk[0])
    chosen = []
    for start in range(0, seqlen_q, hip.block_q):
        stop = min(start + hip.block_q, seqlen_q)
        limit = max(0, start + seqlen_kv - seqlen_q - behind) if is_causal else seqlen_kv
        chunks = []
        first = hip.sink
        while first < seqlen_kv - hip.window + hip.margin:
            chunks.append(first)
            first += hip.chunk[0]
        for stage, size in enumerate(hip.chunk):
            if stage > 0:
                chunks = [c + o for c in chunks for o in range(0, hip.chunk[stage - 1], size)]
            scored = []
            for c in chunks:
                scores = []
                for h in range(len(q)):
                    means = [
                        q[h, r : min(r + hip.stride_q[stage], stop)].mean(0)
                        for r in range(start, stop, hip.stride_q[stage])
                    ]
                    low, high = c, min(c + size, seqlen_kv - behind)
                    score, length = None, size
                    while length >= 1:
                        length /= 2
                        if low >= high or low > limit:
                            continue
                        centre = (low + high) // 2
                        a, b = (
                            max(float(x @ k[h, j]) for x in means)
                            for j in ((low + centre) // 2, (centre + high) // 2)
                        )
                        score = max(a, b) if score is None else max(score, a, b)
                        low, high = (low, centre) if a > b else (centre, high)
                    if score is not None:
                        scores.append(score)
                if scores:
                    scored.append((c, max(scores)))
            scored.sort(key=lambda pair: -pair[1])  # stable: the earlier of equal ones first
            chunks = sorted(c for c, _ in scored[: hip.keep[stage] // size])
        chosen.append([c // hip.chunk[-1] for c in chunks])
    return chosen


def lists(layout, head):
    counts = layout.kv_num_blocks[0, head].tolist()
    rows = layout.kv_indices[0, head].tolist()
    return [row[:n] for row, n in zip(rows, counts, strict=True)]


SETTINGS = {
    "three stages": InfiniteHiP((32, 16, 4), (96, 64, 24), (4, 4, 1), 16, 8, 48),
    "one stage": InfiniteHiP((8,), (32,), (2,), 8, 16, 16),
    "small window": InfiniteHiP((64, 8), (128, 32), (16, 4), 64, 0, 5),
    "odd": InfiniteHiP((30, 6), (60, 18), (3, 2), 10, 6, 70),
    "margin": InfiniteHiP((16, 4), (64, 24), (4, 4), 16, 8, 24, margin=16),
}


@pytest.mark.parametrize("hip", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("seqlens", [(160, 160), (20, 250), (1, 200)])
def test_is_the_literal_search(hip, is_causal, seqlens):
    """Multiples of 12, of which all means here are exact."""
    q = 12.0 * torch.randint(-3, 4, (1, 4, seqlens[0], 8))
    k = torch.randint(-3, 4, (1, 2, seqlens[1], 8)).float()
    shared = hip(q, k, is_causal=is_causal).validate()
    assert shared.kv_num_blocks.shape[1] == 1
    assert lists(shared, 0) == literal_infinite_hip(q[0], k[0], hip, is_causal)
    per_head = InfiniteHiP(**(vars(hip) | {"shared": False}))
    layout = per_head(q, k, is_causal=is_causal).validate()
    for h in (0, 3):
        expected = literal_infinite_hip(q[0, h : h + 1], k[0, h // 2][None], hip, is_causal)
        assert lists(layout, h) == expected


def integer_qk(seqlens, *, dim=8, dtype=torch.float32):
    q = 12 * torch.randint(-3, 4, (2, 4, seqlens[0], dim))
    return q.to(dtype), torch.randint(-3, 4, (2, 2, seqlens[1], dim)).to(dtype)


def in_stages(op, q, k, hip, is_causal=True, device="cpu"):
    """The layout that an op's stages find."""
    kept = (None, None)
    q, k = q.to(device), k.to(device)
    for stage, size in enumerate(hip.chunk):
        kept = op(
            q,
            k,
            *kept,
            hip.chunk[max(0, stage - 1)],
            size,
            hip.keep[stage] // size,
            hip.stride_q[stage],
            hip.block_q,
            hip.sink,
            hip.window - hip.margin,
            max(0, hip.window - hip.chunk[0]),
            hip.shared,
            is_causal,
        )
    return hip.layout(tuple(x.cpu() for x in kept), q.cpu(), k.cpu()).validate()


def same(layout, expected):
    counts = torch.equal(layout.kv_num_blocks, expected.kv_num_blocks)
    return counts and layout.to_topk().equal(expected.to_topk())


REFERENCE = torch.ops.sparse_attn.infinite_hip_stage_reference
TRITON = torch.ops.sparse_attn.infinite_hip_stage_triton
DEVICE = "cuda" if GPU else "cpu"


@pytest.mark.parametrize("hip", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_chooses_as_the_reference(isa, hip, dtype):
    for seqlens, dim in [((160, 160), 40), ((70, 333), 64), ((1, 200), 256), ((40, 20), 1)]:
        q, k = integer_qk(seqlens, dim=dim, dtype=dtype)
        for shared, is_causal in ((True, True), (False, True), (True, False)):
            hip = replace(hip, shared=shared)
            expected = in_stages(REFERENCE, q, k, hip, is_causal)
            assert same(hip(q, k, is_causal=is_causal), expected)


@needs_triton
@pytest.mark.parametrize(
    ("name", "dtype", "seqlens", "dim", "shared", "is_causal"),
    [
        ("three stages", torch.float32, (20, 160), 40, True, True),
        ("three stages", torch.float16, (1, 300), 256, False, True),
        ("one stage", torch.bfloat16, (17, 60), 16, False, True),
        ("small window", torch.float16, (70, 170), 33, True, True),
        ("odd", torch.float16, (20, 130), 1, True, False),
        ("margin", torch.float16, (40, 120), 24, False, True),
    ],
)
def test_triton_chooses_as_the_reference(name, dtype, seqlens, dim, shared, is_causal):
    q, k = integer_qk(seqlens, dim=dim, dtype=dtype)
    hip = replace(SETTINGS[name], shared=shared)
    layout = in_stages(TRITON, q, k, hip, is_causal, DEVICE)
    assert same(layout, in_stages(REFERENCE, q, k, hip, is_causal))


@needs_triton
def test_triton_searches_queries_in_parts_and_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr("sparse_attn.reference.infinite_hip_stage._SCORES", 1)
    q, k = integer_qk((160, 300), dtype=torch.float16)
    hip = InfiniteHiP((128, 16), (128, 32), (1, 2), 128, 0, 64)
    q, k = q[:1, :2], k[:1, :1]
    assert same(in_stages(TRITON, q, k, hip, True, DEVICE), in_stages(REFERENCE, q, k, hip))


def test_structured_queries_and_keys(isa):
    q, k, _ = structured_qk(700)
    hip = InfiniteHiP((64, 16, 4), (256, 128, 64), (4, 4, 1), 32, 16, 64)
    for dtype in (torch.float32, torch.bfloat16):
        q, k = q.to(dtype), k.to(dtype)
        assert same(hip(q, k), in_stages(REFERENCE, q, k, hip))


OPS = [
    "infinite_hip_stage",
    "infinite_hip_stage_reference",
    pytest.param("infinite_hip_stage_triton", marks=needs_triton),
]


@pytest.mark.parametrize("name", OPS)
def test_what_is_out_of_range_is_no_candidate(name):
    op = getattr(torch.ops.sparse_attn, name)
    device = DEVICE if name.endswith("triton") else "cpu"
    most = 2**31 - 1
    indices = torch.tensor([[[[1, 2, 3, 4]], [[-1, 2, most, -most]]]], dtype=torch.int32)
    counts = torch.tensor([[[2], [most]]], dtype=torch.int32)
    q, k = torch.randn(1, 2, 1, 8, device=device), torch.randn(1, 1, 100, 8, device=device)
    sizes = (16, 4, 6, 1, 1, 8, 16, 0, False, True)
    found, chunks = op(q, k, counts.to(device), indices.to(device), *sizes)
    assert found.flatten().tolist() == [6, 4] and chunks.shape == (1, 2, 1, 6)
    assert set(chunks[0, 0, 0].tolist()) <= set(range(4, 12))
    assert chunks[0, 1, 0].tolist() == [8, 9, 10, 11, 0, 0]
    none = op(q, k, -counts.to(device), indices.to(device), *sizes)
    assert not none[0].any() and not none[1].any()


@pytest.mark.parametrize("name", OPS)
def test_bad_arguments_are_named(name):
    op = getattr(torch.ops.sparse_attn, name)
    device = DEVICE if name.endswith("triton") else "cpu"
    q, k = (torch.randn(1, heads, 20, 8, device=device) for heads in (2, 1))
    counts = torch.zeros(1, 1, 2, dtype=torch.int32, device=device)
    indices = torch.zeros(1, 1, 2, 3, dtype=torch.int32, device=device)
    sizes = dict(parent=16, chunk=4, slots=2, stride_q=2, block_q=10, sink=0, window=4, behind=0)

    def call(counts=counts, indices=indices, **changed):
        return op(q, k, counts, indices, **(sizes | changed), shared=True, is_causal=True)

    for size in ("parent", "chunk", "slots", "stride_q", "block_q"):
        with pytest.raises((ValueError, RuntimeError), match=f"{size} must be"):
            call(**{size: 0})
    with pytest.raises((ValueError, RuntimeError), match="16 is no multiple of chunk = 5"):
        call(chunk=5)
    for lists in (
        (counts, None),
        (counts.long(), indices),
        (counts, indices[:, :, :1]),
        (counts[..., :1], indices),
        (counts.expand(2, 1, 2), indices.expand(2, 1, 2, 3)),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"counts|indices"):
            call(*lists)


@pytest.mark.parametrize("seqlens", [(20, 20), (100, 100), (60, 150), (1, 150)])
def test_short_sequences_are_dense(seqlens):
    q, k, _ = structured_qk(200)
    q, k = q[:, :, : seqlens[0]], k[:, :, : seqlens[1]]
    hip = InfiniteHiP((32, 8), (256, 256), (4, 1), 32, sink=16, window=64)
    assert hip(q, k).density() == 1
    out = sparse_attention(q, k, k, hip)
    torch.testing.assert_close(out, sparse_attention(q, k, k, selectors.Dense()))


def test_attention_sees_nothing_later():
    q, k, _ = structured_qk(256)
    hip = InfiniteHiP((32, 8), (64, 32), (4, 1), 32, sink=16, window=64)
    out = sparse_attention(q, k, k, hip)
    q2, k2 = q.clone(), k.clone()
    q2[:, :, 128:], k2[:, :, 128:] = 9.0, torch.randn(64)
    torch.testing.assert_close(sparse_attention(q2, k2, k2, hip)[:, :, :128], out[:, :, :128])


def test_opcheck_and_compile():
    q, k, _ = structured_qk(100)
    for name in ("infinite_hip_stage", "infinite_hip_stage_reference"):
        op = getattr(torch.ops.sparse_attn, name).default
        first = (q, k, None, None, 16, 16, 4, 4, 16, 4, 20, 4, True, True)
        torch.library.opcheck(op, first)
        torch.library.opcheck(op, (q, k, *op(*first), 16, 4, 8, 1, 16, 4, 20, 4, True, True))
    hip = InfiniteHiP((16, 4), (32, 16), (4, 1), 16, 4, 20)
    leaves = [x.clone().requires_grad_() for x in (q, k)]

    def loss(q, k):
        return sparse_attention(2 * q, k, k, hip).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_not_a_number_still_gives_valid_lists():
    q, k = torch.randn(2, 1, 2, 200, 32).unbind(0)
    k[:, :, ::3], q[:, :, 5] = torch.nan, torch.inf
    layout = InfiniteHiP((32, 8), (64, 32), (4, 1), 16, 8, 32)(q, k)
    assert isinstance(layout.validate(), BlockLayout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk": ()}, "chunk must have one entry"),
        ({"keep": (64,)}, "keep must have one entry for each stage"),
        ({"chunk": (256, 48, 8)}, "256 is no multiple of 48"),
        ({"keep": (32768, 8192, 2047)}, "2047 is no multiple of its chunk of 8"),
        ({"stride_q": (4, 0, 1)}, "every entry of stride_q must be an int of at least 1"),
        ({"block_q": 257}, r"block_q is 257, more than chunk\[0\] = 256"),
        ({"sink": 3}, "sink: 3 is no multiple of the last chunk"),
        ({"window": 0}, "window must be"),
        ({"margin": 257}, r"margin is 257, more than window = 1024 or chunk\[0\] = 256"),
    ],
)
def test_bad_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        InfiniteHiP(**arguments)


# --- stages that are kept while decoding


def test_no_keys_and_no_rows():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    hip = InfiniteHiP((16, 4), (32, 16), (4, 1), 16, 4, 20)
    for rows, keys in ((3, 0), (0, 3), (0, 0)):
        assert not hip(q[:, :, :rows], k[:, :, :keys]).validate().kv_num_blocks.any()


def decode(cache, q, k, start, steps):
    """The layouts of `steps` decoding steps, the first one with `start` keys."""
    return [cache(q[:, :, n - 1 : n], k[:, :, :n]) for n in range(start, start + steps)]


CACHED = InfiniteHiP((16, 8, 4), (64, 32, 16), (4, 1, 1), 16, 4, 24, margin=7)


@pytest.mark.parametrize("refresh", [(8, 4, 2), (8, 8, 1), (5, 2, 2), (1, 1, 1), 8])
def test_stages_run_when_they_are_due(refresh):
    q, k, _ = structured_qk(400)
    intervals = refresh if isinstance(refresh, tuple) else (refresh,) * 3
    kept, made = [None] * 3, [None] * 3
    layouts = decode(MaskCache(CACHED, refresh=refresh), q, k, 300, 20)
    for n, layout in enumerate(layouts, 300):
        now = q[:, :, n - 1 : n], k[:, :, :n]
        due = [made[i] is None or n - made[i] >= intervals[i] for i in range(3)]
        for i in range(due.index(True) if any(due) else 3, 3):
            kept[i], made[i] = CACHED.prune(i, kept[i - 1] if i else None, *now), n
        assert layout.seqlens == (1, n)
        assert same(layout.validate(), CACHED.layout(kept[-1], *now))


def test_one_step_between_selections_is_no_cache():
    q, k, _ = structured_qk(300)
    for n, layout in enumerate(decode(MaskCache(CACHED, refresh=1), q, k, 200, 10), 200):
        assert same(layout, CACHED(q[:, :, n - 1 : n], k[:, :, :n]))


def test_no_key_falls_between_kept_stages_and_the_window():
    q, k, _ = structured_qk(400)
    for window, margin, refresh in ((24, 7, (8, 4, 2)), (24, 15, 16), (8, 8, (9, 3, 1))):
        hip = InfiniteHiP((16, 8, 4), (400, 400, 400), (1, 1, 1), 16, 4, window, margin=margin)
        for start in range(200, 216):  # chunks end at every place in the window
            for layout in decode(MaskCache(hip, refresh=refresh), q, k, start, 18):
                assert layout.density() == 1


def test_a_margin_is_needed():
    q, k, _ = structured_qk(400)
    hip = InfiniteHiP((16,), (400,), (1,), 16, 0, 24)  # with 200 keys the last chunk ends at 176
    stale = hip(q[:, :, 199:200], k[:, :, :200])
    assert stale.density() == 1
    assert replace(stale, seqlens=(1, 201)).density() < 1


def test_a_cache_knows_its_sequence():
    q, k, _ = structured_qk(300)
    other_q, other_k, _ = structured_qk(300)
    cache = MaskCache(CACHED, refresh=(8, 4, 2))
    decode(cache, q, k, 250, 3)
    for other, n in (((other_q, other_k), 253), ((q, k), 250), ((q, k), 258), ((q, k), 255)):
        layout = decode(cache, *other, n, 1)[0]
        assert same(layout, CACHED(other[0][:, :, n - 1 : n], other[1][:, :, :n]))


def test_caches_of_stages_in_a_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(num_hidden_layers=3, num_key_value_heads=2, vocab_size=99, **sizes)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 99, (2, 120))
    hip = InfiniteHiP((16, 4), (400, 400), (4, 1), 16, 4, 24, margin=7)
    caches = {layer: MaskCache(hip, refresh=(8, 2)) for layer in (1, 2)}
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    with patch(model, caches) as patched:
        sparse = model.generate(ids, **options)
    assert patched.stats == {"dense": 20, "sparse": 40}
    assert torch.equal(sparse, model.generate(ids, **options))


@pytest.mark.parametrize(
    ("refresh", "message"),
    [
        ((8, 4), "must have one entry for each stage of the selector, which has 3"),
        ((8, 4, 0), "refresh must be an int of at least 1"),
        ((4, 8, 2), "a stage runs whenever one before it does"),
        ((9, 4, 2), "needs a margin of at least 8, got 7"),
        (9, "needs a margin of at least 8, got 7"),
    ],
)
def test_bad_intervals_are_named(refresh, message):
    with pytest.raises(ValueError, match=message):
        MaskCache(CACHED, refresh=refresh)
