"""InfiniteHiP's stages against the paper's text, one chunk at a time."""

import pytest
import torch

from sparse_attn import BlockLayout, selectors, sparse_attention
from sparse_attn.selectors import InfiniteHiP

from .structured import structured_qk


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
        while first < seqlen_kv - hip.window:
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
    op = torch.ops.sparse_attn.infinite_hip_select.default
    torch.library.opcheck(op, (q, k, [16, 4], [32, 16], [4, 1], 16, 4, 20, True, True))
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
    ],
)
def test_bad_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        InfiniteHiP(**arguments)
