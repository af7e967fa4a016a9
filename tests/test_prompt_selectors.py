"""Selectors for prompts against slow literal readings of their papers, one head at a time."""

import math

import pytest
import torch

from sparse_attn import BlockLayout
from sparse_attn.selectors import (
    AnchorAttention,
    FlexPrefill,
    SpargeAttn,
    VerticalSlash,
    XAttention,
)

from .structured import structured_qk

SEQLENS = [(160, 160), (70, 160), (45, 157), (1, 160), (160, 100)]


def causal_softmax(q, k, rows):
    """The causal softmax of some rows of one head, float64, a row for each that sees a key."""
    off = len(k) - len(q)
    scores = q.double() @ k.double().mT * q.shape[1] ** -0.5
    return {off + i: scores[i, : off + i + 1].softmax(0).tolist() for i in rows if off + i >= 0}


def best(scores, count, first=()):
    """The indices of the greatest scores, those in `first` before all others."""
    ranked = sorted(range(len(scores)), key=lambda n: (n not in first, -scores[n]))
    return set(ranked[:count])


def block_mask(kept, seqlens, size):
    """The token mask of sets of (query block, key block)."""
    mask = torch.zeros(1, 1, -(-seqlens[0] // size), -(-seqlens[1] // size), dtype=torch.bool)
    for m, n in kept:
        mask[0, 0, m, n] = True
    layout = BlockLayout.from_dense(mask, block_size=(size, size), seqlens=seqlens)
    return layout.to_dense()[0, 0]


def literal_vertical_slash(selector, q, k):
    seqlen_q, seqlen_kv, size = len(q), len(k), selector.block_size
    off, last = seqlen_kv - seqlen_q, range(max(0, seqlen_q - selector.last_q), seqlen_q)
    by_key, by_distance = [0.0] * seqlen_kv, [0.0] * seqlen_kv
    for p, weights in causal_softmax(q, k, last).items():
        for j, weight in enumerate(weights):
            by_key[j] += weight
            by_distance[p - j] += weight
    keys = best(by_key, selector.vertical, range(30))
    distances = best(
        [200.0 - d if d < 100 else x for d, x in enumerate(by_distance)], selector.slash
    )
    blocks = {
        (m, (p - d) // size)
        for m in range(-(-seqlen_q // size))
        for p in range(off + m * size, off + (m + 1) * size)
        for d in distances
        if 0 <= (p - d) // size < -(-seqlen_kv // size)
    }
    mask = block_mask(blocks, (seqlen_q, seqlen_kv), size)
    for i in range(seqlen_q):
        for j in keys:
            mask[i, j] |= j <= off + i
    return mask


def literal_x_attention(selector, q, k):
    seqlen_q, seqlen_kv, size, stride = len(q), len(k), selector.block_size, selector.stride
    off, scale = seqlen_kv - seqlen_q, q.shape[1] ** -0.5 / stride
    groups = range(-(-seqlen_q // stride)), range(-(-seqlen_kv // stride))
    products = (q.double() @ k.double().mT).tolist()
    kept = set()
    scores = {}
    for r in groups[0]:
        row = {}
        for c in groups[1]:
            if min((c + 1) * stride, seqlen_kv) > min(off + (r + 1) * stride, seqlen_kv):
                continue
            pairs = [(r * stride + stride - 1 - t, c * stride + t) for t in range(stride)]
            inside = [(i, j) for i, j in pairs if i < seqlen_q and j < seqlen_kv]
            row[c] = scale * sum(products[i][j] for i, j in inside)
        total = sum(math.exp(x) for x in row.values())
        for c, x in row.items():
            block = (r * stride // size, c * stride // size)
            scores[block] = scores.get(block, 0.0) + math.exp(x) / total
    for m in range(-(-seqlen_q // size)):
        first, last = off + m * size, off + min((m + 1) * size, seqlen_q) - 1
        candidates = [n for n in range(-(-seqlen_kv // size)) if n * size <= last]
        forced = [n for n in candidates if n == 0 or (n + 1) * size > first]
        ranked = sorted(candidates, key=lambda n: (n not in forced, -scores.get((m, n), 0.0), n))
        total, before = sum(scores.get((m, n), 0.0) for n in candidates), 0.0
        for n in ranked:
            if n in forced or before < selector.mass * total:
                kept.add((m, n))
            before += scores.get((m, n), 0.0)
    return block_mask(kept, (seqlen_q, seqlen_kv), size)


def literal_flex_prefill(selector, q, k):
    seqlen_q, seqlen_kv, size = len(q), len(k), selector.block_size
    off = seqlen_kv - seqlen_q
    if seqlen_q <= max(2 * size, selector.min_budget):
        return torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool).tril(off)
    q, k = q.double(), k.double()
    blocks = range(-(-seqlen_kv // size))
    vertical, slash = [0.0] * seqlen_kv, [0.0] * seqlen_kv
    for p, weights in causal_softmax(q, k, range(seqlen_q - size, seqlen_q)).items():
        for j, weight in enumerate(weights):
            vertical[j] += weight / size
            slash[p - j] += weight / size

    def budget(mass):
        taken, count = 0.0, 0
        for x in sorted(mass, reverse=True):
            taken += x
            count += taken <= selector.mass
        return (count + 1) // size + 1

    def pooled(mass):
        return [sum(mass[n * size : (n + 1) * size]) for n in blocks]

    means = torch.stack([k[n * size : (n + 1) * size].mean(0) for n in blocks])
    scale = q.shape[1] ** -0.5
    estimate = (scale * means @ q[-size:].mean(0)).softmax(0).tolist()
    divergence = 0.0
    for x, y in zip(estimate, pooled(vertical), strict=True):
        for z in (x, y):
            divergence += z / 2 * math.log(2 * z / (x + y)) if z > 0 else 0.0
    aware = math.sqrt(divergence) < selector.tau
    low, high = (x and x // size for x in (selector.min_budget, selector.max_budget))
    counts = [low if aware else max(budget(x), low) for x in (vertical, slash)]
    if high is not None and not aware:
        counts = [min(count, high) for count in counts]
    lines = best(pooled(vertical), counts[0], [0])
    distances = best(pooled(slash), counts[1], [0])
    kept, every = set(), {}
    for m in range(-(-seqlen_q // size)):
        first, last = off + m * size, off + min((m + 1) * size, seqlen_q) - 1
        own = {first // size, last // size}
        seen = [n for n in blocks if n * size <= last]
        row = (scale * means[seen] @ q[m * size : (m + 1) * size].mean(0)).softmax(0).tolist()
        every |= {(m, n): x for n, x in zip(seen, row, strict=True)}
        kept |= {(m, n) for n in seen if n in lines or any(x - n in distances for x in own)}
    if aware:
        taken = 0.0
        for pair in sorted(every, key=every.get, reverse=True):
            taken += every[pair]
            kept.add(pair)
            if taken > selector.mass * (m + 1):
                break
    return block_mask(kept, (seqlen_q, seqlen_kv), size)


def literal_anchor_attention(selector, q, k):
    seqlen_q, seqlen_kv, size = len(q), len(k), selector.block_size
    off, scale = seqlen_kv - seqlen_q, q.shape[1] ** -0.5
    scores = scale * q.double() @ k.double().mT
    mask = torch.zeros(seqlen_q, seqlen_kv, dtype=torch.bool)
    group = size * selector.step
    for start in range(0, seqlen_q, group):
        rows = range(start, min(start + group, seqlen_q))
        zone = max(0, start + off) // size * size
        mask[rows.start : rows.stop, :size] = True
        mask[rows.start : rows.stop, zone:] = True
        anchors = {
            i: max(scores[i, j] for j in (*range(size), *range(zone, off + i + 1)))
            for i in rows
            if zone > size
        }
        for first in range(start, rows.stop, size):
            block = range(first, min(first + size, rows.stop))
            for j in range(size, zone):
                mean = sum(scores[i, j] for i in block) / len(block)
                if mean >= sum(anchors[i] for i in block) / len(block) - selector.theta:
                    mask[rows.start : rows.stop, j] = True
    return mask.tril(off)


def literal_sparge_attn(selector, q, k, is_causal=True):
    seqlen_q, seqlen_kv = len(q), len(k)
    block_q, block_k, off = selector.block_q, selector.block_k, seqlen_kv - seqlen_q
    q, k = q.double(), k.double()

    def coherent(rows):
        pairs = [(x, y) for x in rows for y in rows]
        cosines = [torch.cosine_similarity(x, y, 0).item() for x, y in pairs]
        return sum(cosines) / len(cosines) > selector.similarity

    clear = [coherent(x) for x in k.split(block_k)]
    means = [x.mean(0) for x in k.split(block_k)]
    mask = torch.zeros(seqlen_q, seqlen_kv, dtype=torch.bool)
    for m, rows in enumerate(q.split(block_q)):
        first, last = off + m * block_q, off + m * block_q + len(rows) - 1
        seen = [n for n in range(len(means)) if not is_causal or n * block_k <= last]
        clear_seen = [n for n in seen if clear[n]]
        kept = set(seen) if not coherent(rows) else {n for n in seen if not clear[n]}
        kept |= {n for n in seen if first < (n + 1) * block_k and n * block_k <= last}
        if clear_seen:
            logits = torch.stack([means[n] @ rows.mean(0) for n in clear_seen])
            share = (logits * q.shape[1] ** -0.5).softmax(0).tolist()
            ranked = sorted(range(len(share)), key=lambda i: -share[i])
            count = int(selector.top * len(means))
            if selector.mass is not None:
                held = [sum(share[i] for i in ranked[: n + 1]) for n in range(len(ranked))]
                count = sum(x <= selector.mass for x in held)
            kept |= {clear_seen[i] for i in ranked[: max(1, count)]}
        for n in kept:
            mask[m * block_q : m * block_q + len(rows), n * block_k : (n + 1) * block_k] = True
    return mask.tril(off) if is_causal else mask


LITERAL = {
    SpargeAttn(top=0.3, similarity=0.19, block_q=32, block_k=16): literal_sparge_attn,
    SpargeAttn(mass=0.6, similarity=0.19, block_q=8, block_k=16): literal_sparge_attn,
    SpargeAttn(top=0.3, similarity=0.6, block_q=16, block_k=16): literal_sparge_attn,
    SpargeAttn(top=0.01, similarity=-1.0, block_q=16, block_k=16): literal_sparge_attn,
    VerticalSlash(vertical=33, slash=105, last_q=20, block_size=16): literal_vertical_slash,
    VerticalSlash(vertical=30, slash=50, last_q=5, block_size=1): literal_vertical_slash,
    XAttention(mass=0.5, stride=4, block_size=16): literal_x_attention,
    FlexPrefill(mass=0.4, tau=0.0, block_size=16, min_budget=16): literal_flex_prefill,
    FlexPrefill(mass=0.6, tau=1.0, block_size=16, min_budget=32): literal_flex_prefill,
    FlexPrefill(mass=0.9, tau=0.3, block_size=8, min_budget=8, max_budget=16): (
        literal_flex_prefill
    ),
    AnchorAttention(theta=2.0, block_size=16, step=2): literal_anchor_attention,
}
every_literal = pytest.mark.parametrize(
    ("selector", "literal"), LITERAL.items(), ids=[str(selector) for selector in LITERAL]
)


@every_literal
@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
def test_a_selection_is_its_paper(selector, literal, seqlens):
    q, k, _ = structured_qk(160)
    _check(selector, literal, q[:, :, : seqlens[0]], k[:, :, : seqlens[1]])


@every_literal
def test_a_selection_on_real_queries_and_keys_is_its_paper(selector, literal, real_qk):
    for q, k in real_qk.values():
        _check(selector, literal, q[:, ::3, :200], k[:, :, :200])


@pytest.mark.parametrize("selector", [x for x in LITERAL if isinstance(x, SpargeAttn)], ids=str)
@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
def test_sparge_attn_that_is_not_causal(selector, seqlens):
    q, k, _ = structured_qk(160)
    q, k = q[:, :, : seqlens[0]], k[:, :, : seqlens[1]]
    _check(selector, literal_sparge_attn, q, k, is_causal=False)


def _check(selector, literal, q, k, **causal):
    mask = selector(q, k, **causal).validate().to_dense(num_heads=q.shape[1], **causal)
    for h in range(q.shape[1]):
        expected = literal(selector, q[0, h], k[0, h // (q.shape[1] // k.shape[1])], **causal)
        assert torch.equal(mask[-1, h], expected), f"head {h}"


@pytest.mark.parametrize("theta", [-1.0, 0.0, 100.0])
def test_anchor_attention_without_stripes_and_with_all(theta):
    q, k, _ = structured_qk(128)
    layout = AnchorAttention(theta=theta, block_size=16, step=2)(q, k)
    if theta == 100.0:
        assert layout.density() == 1.0
    else:
        expected = literal_anchor_attention(AnchorAttention(theta, 16, 2), q[0, 0], k[0, 0])
        assert torch.equal(layout.to_dense(num_heads=4)[0, 0], expected)


def test_the_literal_cases_of_sparge_attn_have_blocks_of_both_kinds():
    q, k, _ = structured_qk(160)
    for x, size, similarity in ((k, 16, 0.19), (q, 16, 0.6)):
        coherent = SpargeAttn(similarity=similarity)._coherent(x, size)
        assert coherent.any() and not coherent.all()


def test_sparge_attn_in_chunks_is_the_same(monkeypatch):
    q, k, _ = structured_qk(256)
    selector = SpargeAttn(mass=0.5, similarity=0.19, block_q=16, block_k=16)
    whole = selector(q, k)
    monkeypatch.setattr(SpargeAttn, "chunk_elements", 300)
    assert torch.equal(selector(q, k).to_dense(num_heads=4), whole.to_dense(num_heads=4))


@pytest.mark.parametrize(
    "selector",
    [
        XAttention(mass=0.3, block_size=32),
        VerticalSlash(vertical=64, slash=100),
        FlexPrefill(mass=0.95, block_size=32, min_budget=128),
        AnchorAttention(theta=3.0, block_size=32, step=4),
    ],
    ids=str,
)
def test_needles_are_found_at_low_density(selector):
    """The last rows ask for needles far away, which a window loses."""
    q, k, needles = structured_qk(2048)
    layout = selector(q, k)
    assert layout.to_dense(num_heads=4)[0, :, -1, needles].all()
    assert layout.density() < 0.5


def test_x_attention_in_chunks_is_the_same(monkeypatch):
    q, k, _ = structured_qk(512)
    selector = XAttention(mass=0.7, block_size=32)
    whole = selector(q[:, :, 100:], k)
    monkeypatch.setattr(XAttention, "chunk_elements", 300)
    parts = selector(q[:, :, 100:], k)
    assert torch.equal(parts.to_dense(num_heads=4), whole.to_dense(num_heads=4))


def test_a_scale_below_zero_turns_the_order_round():
    q, k, _ = structured_qk(256)
    for selector in LITERAL:
        turned = selector(q, k, scale=-0.1).to_dense(num_heads=4)
        assert torch.equal(turned, selector(-q, k, scale=0.1).to_dense(num_heads=4))
