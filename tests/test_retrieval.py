"""Which heads are retrieval heads: against literal readings of eager attention's weights."""

import pytest
import torch

from sparse_attn import patch, selectors
from sparse_attn.retrieval import (
    NeedlePrompt,
    full_heads,
    head_selectors,
    load_gates,
    needle_prompt,
    needle_scores,
    repetition_heads,
    repetition_scores,
    shared_by_groups,
    top_heads,
)

transformers = pytest.importorskip("transformers")


def small_model(**changes):
    sizes = dict(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        vocab_size=12,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval()


def weights(model, ids):
    """Eager attention's softmax weights ``[layers, heads, rows, keys]`` and the next token."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True)
    model.set_attn_implementation(before)
    return torch.cat(output.attentions), int(output.logits[0, -1].argmax())


def literal_needle_score(model, prompt, steps, stop=()):
    """The positions that each head copies, step by step, or None."""
    ids, written = prompt.ids, set()
    copied = {(n, h): set() for n in range(3) for h in range(4)}
    for _ in range(steps):
        mass, token = weights(model, ids)
        if token in stop:
            break
        written.add(token)
        for (n, h), positions in copied.items():
            liked = int(mass[n, h, -1].argmax())
            if liked in prompt.needle and int(prompt.ids[0, liked]) == token:
                positions.add(liked)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    needle = set(prompt.ids[0, prompt.needle.start : prompt.needle.stop].tolist())
    if len(needle & written) <= len(needle) / 2:
        return None
    return {key: len(positions) / len(prompt.needle) for key, positions in copied.items()}


@torch.no_grad()
def test_needle_scores_are_what_heads_copy():
    model, generator = small_model(), torch.Generator().manual_seed(1)
    prompts, expected = [], []
    for length in (20, 33, 41, 50):
        ids = torch.randint(12, (1, length), generator=generator)
        for first in range(2, length - 8, 7):
            prompts.append(NeedlePrompt(ids, range(first, first + 3)))
            expected.append(literal_needle_score(model, prompts[-1], 9, stop=[7]))
    counted = [x for x in expected if x is not None]
    assert 2 < len(counted) < len(expected)
    scores = needle_scores(model, prompts, max_new_tokens=9, stop=[7])
    assert scores.max() > 0
    for n in range(3):
        for h in range(4):
            mean = sum(x[n, h] for x in counted) / len(counted)
            assert float(scores[n, h]) == pytest.approx(mean)
    assert model.config._attn_implementation == "sdpa"


def test_a_needle_that_is_not_written_judges_no_head():
    with pytest.raises(ValueError, match="wrote half of no needle"):
        needle_scores(
            small_model(),
            [NeedlePrompt(torch.zeros(1, 9).long(), range(2, 4))] * 2,
            max_new_tokens=1,
            stop=range(12),
        )


@pytest.mark.parametrize(("start", "repeats"), [((), 3), ((5, 1), 4)])
@torch.no_grad()
def test_repetition_scores_are_sums_of_softmax_mass(start, repeats):
    model, period = small_model(), 11
    induction, echo = repetition_scores(
        model, period=period, repeats=repeats, start=start, tokens=range(2, 12, 3), seed=3
    )
    draw = torch.randint(4, (period,), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([torch.tensor(start, dtype=torch.int64), (2 + 3 * draw).repeat(repeats)])
    mass, _ = weights(model, ids[None])
    for n in range(3):
        for h in range(4):
            sums = [0.0, 0.0]
            for i in range(len(start) + period, len(ids)):
                for j in range(i - period, len(start) - 1, -period):
                    sums[0] += float(mass[n, h, i, j + 1])
                    sums[1] += float(mass[n, h, i, j])
            rows = period * (repeats - 1)
            assert float(induction[n, h]) == pytest.approx(sums[0] / rows, rel=1e-4)
            assert float(echo[n, h]) == pytest.approx(sums[1] / rows, rel=1e-4)


def test_repetition_heads_are_those_of_the_best_groups():
    induction = torch.zeros(2, 4)
    echo = torch.zeros(2, 4)
    induction[0, 3], induction[1, 0], echo[1, 2] = 0.9, 0.8, 0.1
    heads = repetition_heads(induction, echo, num_kv_heads=2, induction_share=0.25, echo_share=0.25)
    assert heads.tolist() == [[False, False, True, True], [False, False, True, True]]


def test_layers_with_a_window_of_their_own_score_nothing():
    sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=30)
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        **sizes,
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    induction, echo = repetition_scores(model, period=20, repeats=2)
    assert (induction[0] == 0).all() and (echo[0] == 0).all()
    assert (induction[1] > 0).all() and (echo[1] > 0).all()


class Words:
    """A tokenizer of words, as transformers' are called."""

    def __init__(self):
        self.known = ["<s>"]

    def __call__(self, text, add_special_tokens=True):
        for word in text.split():
            if word not in self.known:
                self.known.append(word)
        ids = [self.known.index(word) for word in text.split()]
        return transformers.BatchEncoding({"input_ids": [0] * add_special_tokens + ids})


@pytest.mark.parametrize(("depth", "first"), [(0.0, 1), (0.5, 5), (1.0, 10)])
def test_a_needle_prompt_is_a_text_with_a_needle(depth, first):
    words = Words()
    hay = " ".join(f"w{i}" for i in range(20))
    prompt = needle_prompt(words, hay, "the key is 7", "key is", tokens=16, depth=depth)
    text = [words.known[i] for i in prompt.ids[0]]
    assert prompt.needle == range(first, first + 4) and len(text) == 16
    assert [text[i] for i in prompt.needle] == ["the", "key", "is", "7"]
    assert text[0] == "<s>" and text[-2:] == ["key", "is"]
    rest = [x for i, x in enumerate(text) if i not in prompt.needle]
    assert rest[1:-2] == [f"w{i}" for i in range(9)]


def test_full_heads_are_those_above_the_quantile(tmp_path):
    gates = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = tmp_path / "full_attention_heads.tsv"
    lines = ["\t".join(f"{x:.17g}" for x in row) for row in gates.tolist()]
    path.write_text("\n".join(lines) + "\n")
    loaded = load_gates(path)
    assert torch.equal(loaded, gates)
    for sparsity in (0.0, 0.1, 0.25, 0.5, 0.77, 0.99):
        kept = full_heads(loaded, sparsity=sparsity, num_heads=16)
        expected = gates >= gates.flatten().quantile(sparsity)
        assert torch.equal(kept, expected.repeat_interleave(2, 1))
    assert not full_heads(loaded, sparsity=1.0, num_heads=8).any()
    equal = full_heads(torch.ones(2, 2), sparsity=0.5, num_heads=2)
    assert equal.tolist() == [[True, True], [False, False]]
    path.write_text("1.5 -0.2\n0.5 0.25\n")
    assert load_gates(path).tolist() == [[1.0, 0.0], [0.5, 0.25]]


@torch.no_grad()
def test_head_selectors_keep_the_named_heads_dense():
    full = torch.tensor([[True] * 4, [False] * 4, [False, True, True, False]])
    chosen = head_selectors(full, streaming=selectors.SinkWindow(sink=1, window=4))
    q, k = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8)
    window = selectors.SinkWindow(sink=1, window=4)(q, k).to_dense()[0, 0]
    for layer, selector in chosen.items():
        mask = selector(q, k).to_dense(num_heads=4)[0]
        for h in range(4):
            expected = torch.ones(20, 20).tril().bool() if full[layer, h] else window
            assert torch.equal(mask[h], expected)
    model, ids = small_model(), torch.arange(30)[None] % 12
    dense = model(ids).logits
    with patch(model, head_selectors(torch.ones(3, 4, dtype=torch.bool))):
        torch.testing.assert_close(model(ids).logits, dense, atol=1e-4, rtol=1e-4)
    with patch(model, chosen) as patched:
        assert (model(ids).logits - dense).abs().max() > 1e-3
        assert patched.stats["sparse"] == 2


def test_top_heads_are_ranked_over_all_layers():
    scores = torch.tensor([[0.5, 0.1, 0.4], [0.4, 0.3, 0.9]])
    assert top_heads(scores, 0.5).tolist() == [[True, False, True], [False, False, True]]
    assert not top_heads(scores, 0.0).any() and top_heads(scores, 1.0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: top_heads(torch.ones(2, 2), 1.5), r"share must lie in \[0, 1\], got 1.5"),
        (lambda: full_heads(torch.ones(2, 2), sparsity=-1, num_heads=2), "sparsity must lie in"),
        (lambda: full_heads(torch.ones(2, 3), sparsity=0, num_heads=4), "3 KV heads do not divide"),
        (lambda: shared_by_groups(torch.ones(2, 3).bool(), 4), "3 KV heads do not divide 4 query"),
        (lambda: head_selectors(torch.ones(2, 2)), "full must be bool"),
        (lambda: NeedlePrompt(torch.zeros(4), range(1)), r"ids must be \[1, tokens\]"),
        (lambda: NeedlePrompt(torch.zeros(1, 4), range(2, 5)), "a range of the 4 positions"),
        (lambda: NeedlePrompt(torch.zeros(1, 4), range(0)), "a range of the 4 positions"),
        (lambda: NeedlePrompt([1], range(1)), "ids must be a tensor, got list"),
        (lambda: NeedlePrompt(torch.zeros(1, 4), [1, 2]), "needle must be a range, got list"),
        (lambda: needle_prompt(Words(), "a", "b", "c", tokens=9, depth=0.5), "tokens must leave"),
        (lambda: needle_prompt(Words(), "a", "b", "c", tokens=3, depth=2), "depth must lie in"),
        (lambda: repetition_scores(small_model(), tokens=range(0)), "tokens is empty"),
        (
            lambda: repetition_scores(small_model(), period=1),
            "period must be an int of at least 2, got 1",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_uneven_gates_are_refused(tmp_path):
    path = tmp_path / "gates.tsv"
    for text in ("1 2\n3\n", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="as many numbers in each line"):
            load_gates(path)
