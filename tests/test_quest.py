"""Quest against a literal reading, what it keeps between calls, and how it combines."""

import pytest
import torch

from sparse_attn import sparse_attention
from sparse_attn.selectors import Dense, PrefillDecode, Quest, SinkWindow

from .structured import structured_qk


def page_score(q, keys):
    """The greatest product that q could have with a key within the bounds of some keys."""
    return torch.maximum(q * keys.amin(0), q * keys.amax(0)).sum().item()


def literal_quest(selector, q, k, is_causal):
    """The pages of each row: q ``[heads, Sq, D]`` of one KV head, or of one query head."""
    size, off = selector.page_size, k.shape[0] - q.shape[1]
    q, k = q.double(), k.double()
    rows = []
    for i in range(q.shape[1]):
        own = (off + i) // size
        pages = range(max(0, own) if is_causal else -(-len(k) // size))
        scores = {
            n: sum(page_score(x[i], k[n * size : (n + 1) * size]) for x in q)
            for n in pages
            if n != own
        }
        count = selector.budget // size - (own >= 0)
        ranked = sorted(scores, key=scores.get, reverse=True)[:count]
        rows.append(sorted(ranked + [own] * (own >= 0)))
    return rows


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("seqlens", [(1, 100), (4, 96), (37, 90), (90, 37), (9, 9)], ids=str)
def test_quest_is_its_docstring(seqlens, is_causal, shared):
    q, k, _ = structured_qk(100)
    _check(
        Quest(budget=33, page_size=8, shared=shared),
        q[:, :, : seqlens[0]],
        k[:, :, : seqlens[1]],
        is_causal,
    )


@pytest.mark.parametrize("shared", [False, True])
def test_quest_on_real_queries_and_keys(real_qk, shared):
    for q, k in real_qk.values():
        _check(Quest(budget=128, shared=shared), q[:, :, -20:], k, True)


def _check(selector, q, k, is_causal):
    layout = selector(q, k, is_causal=is_causal).validate()
    group = q.shape[1] // k.shape[1]
    heads = q[0].unflatten(0, (k.shape[1], group) if selector.shared else (q.shape[1], 1))
    assert layout.kv_num_blocks.shape[1] == len(heads)
    for h, queries in enumerate(heads):
        keys = k[0, h if selector.shared else h // group]
        counts, lists = layout.kv_num_blocks[0, h].tolist(), layout.kv_indices[0, h].tolist()
        expected = literal_quest(selector, queries, keys, is_causal)
        assert [row[:n] for row, n in zip(lists, counts, strict=True)] == expected


def test_no_product_exceeds_the_score_of_its_page():
    q, k, _ = structured_qk(64)
    for page in k[0, 0].split(16):
        assert (
            (q[0, 0] @ page.mT)
            .amax(1)
            .le(torch.tensor([page_score(row, page) for row in q[0, 0]]) + 1e-5)
            .all()
        )


def decoding(selector, q, k, steps):
    """The layouts of single rows, each with one more key."""
    first = k.shape[2] - steps + 1
    return [selector(q[:, :, n - 1 : n], k[:, :, :n]) for n in range(first, k.shape[2] + 1)]


def test_kept_bounds_change_nothing():
    q, k, _ = structured_qk(128)
    quest = Quest(budget=32, page_size=8)
    for kept, n in zip(decoding(quest, q, k, 30), range(99, 129), strict=True):
        anew = Quest(budget=32, page_size=8)(q[:, :, n - 1 : n], k[:, :, :n])
        assert torch.equal(kept.kv_indices, anew.kv_indices)
    edited = k.clone()
    edited[:, :, 9] = 1e4
    anew = Quest(budget=32, page_size=8)(q[:, :, -1:], edited)
    assert not torch.equal(kept.kv_indices, anew.kv_indices)
    assert torch.equal(quest(q[:, :, -1:], edited).kv_indices, anew.kv_indices)


def test_another_sequence_is_chosen_for_anew():
    q, k, _ = structured_qk(128)
    other_q, other_k, _ = structured_qk(128)
    quest = Quest(budget=32, page_size=8)
    for new_q, new_k in (
        (q, k),
        (other_q, other_k),
        (q[:, :, :64], k[:, :, :64]),
        (q, k.bfloat16()),
    ):
        kept = quest(new_q.to(new_k.dtype)[:, :, -1:], new_k)
        anew = Quest(budget=32, page_size=8)(new_q.to(new_k.dtype)[:, :, -1:], new_k)
        assert torch.equal(kept.kv_indices, anew.kv_indices)
    batch = quest(torch.cat([q, other_q])[:, :, -1:], torch.cat([k, other_k]))
    assert torch.equal(batch.kv_indices[1], quest(other_q[:, :, -1:], other_k).kv_indices[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_scores_choose_nearly_the_best_pages(dtype):
    q, k, _ = structured_qk(256)
    q, k = q[:, :, -4:].to(dtype), k.to(dtype)
    layout = Quest(budget=64, page_size=8)(q, k)
    for h in range(4):
        for i, pages in enumerate(layout.kv_indices[0, h].tolist()):
            page_scores = [
                page_score(q[0, h, i].double(), x.double()) for x in k[0, h // 2].split(8)
            ]
            left_out = [x for n, x in enumerate(page_scores[:31]) if n not in pages]
            worst = min(page_scores[n] for n in pages if n != 31)
            assert worst >= max(left_out) - 0.01 * abs(max(left_out))


def test_chunks_of_rows_change_nothing(monkeypatch):
    q, k, _ = structured_qk(128)
    whole = Quest(budget=32, page_size=8)(q, k)
    monkeypatch.setattr(Quest, "chunk_elements", 300)
    assert torch.equal(Quest(budget=32, page_size=8)(q, k).kv_indices, whole.kv_indices)


def test_a_budget_for_every_page_is_dense():
    q, k, _ = structured_qk(100)
    out = sparse_attention(q, k, k, Quest(budget=112))
    torch.testing.assert_close(out, sparse_attention(q, k, k, Dense()))


def test_prefill_and_decode_choose_by_the_number_of_rows():
    q, k, _ = structured_qk(64)
    both = PrefillDecode(SinkWindow(4, 16), Dense(), decode_rows=3)
    assert both(q, k).window.item() == 16
    assert both(q[:, :, -4:], k).window.item() == 16
    assert both(q[:, :, -3:], k).window.item() == -1
