"""Selectors that keep something between calls choose what objects without a memory choose."""

import copy
import gc
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sparse_attn import sparse_attention
from sparse_attn.selectors import (
    Dense,
    KeyBuffer,
    MaskCache,
    PerHead,
    PrefillDecode,
    Quest,
    SinkWindow,
    Union,
    lineage,
)
from sparse_attn.selectors import quest as quest_module

from .remembering import HIP, STAGES, Compared, Proof, same_lists

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Histories(RuleBasedStateMachine):
    """Keys grow in a KeyBuffer, in a tensor written to behind its back, by views, or by `cat`; and
    are rolled back, edited, reordered and replaced. After every step all selectors are called.
    """

    @initialize(seed=st.integers(0, 99), length=st.integers(0, 90), batch=st.integers(1, 2))
    def prompt(self, seed, length, batch):
        self.random = torch.Generator().manual_seed(seed)  # never repeats keys
        self.selector, self.dtype, self.rows, self.causal, self.scale = (
            Compared(),
            torch.float32,
            1,
            True,
            None,
        )
        self.replace_keys(self.draw(length, batch))

    def draw(self, length, batch=None, heads=2):
        batch = self.k.shape[0] if batch is None else batch
        return torch.randn(batch, heads, length, 8, generator=self.random).to(self.dtype)

    def replace_keys(self, keys):
        self.buffer = KeyBuffer(keys, capacity=60)
        self.k = self.buffer.keys
        Proof.lost()

    @rule(count=st.sampled_from([1, 1, 1, 1, 1, 1, 2, 5]))
    def step(self, count):
        self.buffer.append(self.draw(count))
        self.k = self.buffer.keys
        self.rows, self.causal = count, True

    @rule()
    def steps(self):
        for _ in range(3):
            self.step(1)
            self.all_choose_as_without_memory()

    @rule(count=st.integers(1, 90))
    def roll_back(self, count):
        self.buffer.crop(max(0, len(self.buffer) - count))
        self.k = self.buffer.keys

    @rule(count=st.integers(1, 9))
    def roll_back_and_go_on(self, count):
        self.roll_back(count)
        self.step(count + 1)
        self.rows = 1

    @rule(counts=st.lists(st.integers(1, 9), min_size=2, max_size=3))
    def roll_back_and_go_on_unseen(self, counts):
        for count in counts:
            self.roll_back(count)
            self.step(count // 2 + 1)
        self.rows = 1

    @rule(where=st.floats(0, 0.99), rest=st.booleans())
    def edit_in_place(self, where, rest):
        at = int(where * self.k.shape[2])
        self.k[:, :, at : None if rest else at + 1] = self.draw(1)
        Proof.lost()

    @rule()
    def reorder(self):
        self.replace_keys(self.k.flip(0))

    @rule()
    def other_batch(self):
        self.replace_keys(self.draw(self.k.shape[2], 3 - self.k.shape[0]))

    @rule(dtype=st.sampled_from(DTYPES))
    def other_dtype(self, dtype):
        self.dtype = dtype
        self.replace_keys(self.k.to(dtype))

    @rule(more=st.integers(-3, 3))
    def another_prompt_where_the_old_keys_lay(self, more):
        shape = self.k.shape
        self.buffer = self.k = None  # its memory may be given to the next
        self.k = self.draw(max(0, shape[2] + more), shape[0])
        Proof.lost()
        self.all_choose_as_without_memory()
        self.replace_keys(self.k)

    @rule()
    def grow_by_cat(self):
        self.k = torch.cat([self.k, self.draw(1)], 2)
        Proof.lost()
        self.all_choose_as_without_memory()
        self.replace_keys(self.k)

    @rule()
    def views_of_one_tensor(self):
        whole = torch.cat([self.k, self.draw(3)], 2)
        Proof.lost()
        n = self.k.shape[2]
        for first, stop in ((0, n + 1), (0, n + 2), (0, n + 3), (1, n + 3), (2, n + 3), (0, n + 2)):
            self.k = whole[:, :, first:stop]
            self.all_choose_as_without_memory()
        self.replace_keys(self.k)

    @rule()
    def two_continuations(self):
        """Of the same keys; and back to the first."""
        first, other = self.buffer, copy.deepcopy(self.buffer)
        for self.buffer in (first, other, first):
            self.step(1)
            self.all_choose_as_without_memory()
            Proof.lost()

    @rule(rows=st.sampled_from([1, 3]), scale=st.sampled_from([None, -1.0]))
    def another_call_between_steps(self, rows, scale):
        self.step(1)
        self.all_choose_as_without_memory()
        self.rows, self.scale, before = rows, scale, self.scale
        self.all_choose_as_without_memory()
        self.scale = before
        self.step(1)

    @rule(rows=st.integers(1, 4), causal=st.booleans(), scale=st.sampled_from([None, -1.0, 0.5]))
    def another_kind_of_call(self, rows, causal, scale):
        self.rows, self.causal, self.scale = rows, causal, scale

    @rule(through=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def selectors_are_copied(self, through):
        kept = self.selector.remembering
        self.selector.remembering.update({name: through(x) for name, x in kept.items()})
        Proof.lost()

    @invariant()
    def all_choose_as_without_memory(self):
        if not hasattr(self, "k"):
            return
        q = self.draw(self.rows, heads=4)
        self.selector(q, self.k, is_causal=self.causal, scale=self.scale)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)


WRITES = {
    "item": lambda k: k[0, 0, 3].fill_(9),
    "other view": lambda k: k.transpose(1, 2)[:, 3].mul_(-9),
    "detached": lambda k: k.detach()[:, :, 3].mul_(-9),
    "index_copy_": lambda k: k.index_copy_(2, torch.tensor([3]), torch.full((1, 2, 1, 16), 9.0)),
    "out": lambda k: torch.mul(k.clone(), -9, out=k),
    "foreach": lambda k: torch._foreach_mul_([k], -9),
    "set_": lambda k: k.set_(-9 * k),
    "data": lambda k: setattr(k, "data", -9 * k),
    "NumPy, and torch is told": lambda k: (
        k.numpy().__imul__(-9),
        torch.autograd.graph.increment_version(k),
    ),
    "compiled": torch.compile(lambda k: k.mul_(-9), backend="aot_eager"),
    "inference mode": torch.inference_mode()(lambda k: k.mul_(-9)),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_seen(name):
    """After most writes the keys are the same at many places."""
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 60, 16)
    quest, cache = Quest(budget=8, page_size=4), MaskCache(HIP, 4)
    before = quest(q, k), cache(q, k[:, :, :59])
    with torch.no_grad():
        WRITES[name](k)
    assert same_lists(quest(q, k), Quest(budget=8, page_size=4)(q, k))
    assert same_lists(cache(q, k), HIP(q, k))
    assert not same_lists(before[0], Quest(budget=8, page_size=4)(q, k))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_known_keys_are_not_read_again(mode, monkeypatch):
    read = []

    def page_bounds(k, page_size):
        read.append(k.shape[2])
        return bounds(k, page_size)

    bounds = quest_module._page_bounds
    monkeypatch.setattr(quest_module, "_page_bounds", page_bounds)
    q, quest = torch.randn(1, 4, 1, 16), Quest(budget=16, page_size=8)
    with mode():
        buffer = KeyBuffer(torch.randn(1, 2, 100, 16))
        for _ in range(15):
            sparse_attention(q, buffer.keys, buffer.keys, quest)
            buffer.append(torch.randn(1, 2, 1, 16))
        assert read == [96, 8, 8]  # at 100, 104 and 112 keys
        buffer.crop(90)
        quest(q, buffer.keys)
        buffer.append(torch.randn(1, 2, 30, 16))
        quest(q, buffer.keys)
        assert read[3:] == [0, 32]  # from the page of key 88 on


def test_keys_in_inference_tensors_are_read_each_time():
    q = torch.randn(1, 4, 1, 16)
    quest, cache = Quest(budget=8, page_size=4), MaskCache(HIP, 4)
    with torch.inference_mode():
        k = torch.randn(1, 2, 60, 16)
        for n in range(50, 60):
            k[:, :, 3] *= -9
            assert same_lists(quest(q, k[:, :, :n]), quest.for_layer(0)(q, k[:, :, :n]))
            assert same_lists(cache(q, k[:, :, :n]), HIP(q, k[:, :, :n]))


def test_bounds_made_in_inference_mode_serve_where_gradients_are_recorded():
    q, k, quest = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 60, 16), Quest(budget=8, page_size=4)
    with torch.inference_mode():
        expected = quest(q, k)
    assert same_lists(quest(q.requires_grad_(), k.requires_grad_()), expected)
    assert not quest._memory.value.requires_grad


def test_nothing_is_kept_of_keys_that_are_gone():
    gc.collect()
    before = len(lineage._VIEWS)
    quest, k = Quest(budget=16), torch.randn(1, 2, 3000, 64)
    heads = PerHead({0: quest}, default=Dense())
    sparse_attention(torch.randn(1, 4, 1, 64), k, k, heads)
    assert len(lineage._VIEWS) > before
    del k
    gc.collect()
    assert len(lineage._VIEWS) == before


def test_a_state_does_not_hold_all_that_came_before():
    buffer, quest = KeyBuffer(torch.randn(1, 2, 10, 16)), Quest(budget=16)
    for _ in range(50):
        quest(torch.randn(1, 4, 1, 16), buffer.keys)
        buffer.append(torch.randn(1, 2, 1, 16))
    assert len(lineage.find(buffer.keys).state.origins) <= 2


def test_a_failed_call_leaves_no_half_made_selection():
    buffer, cache = KeyBuffer(torch.randn(1, 2, 60, 16)), MaskCache(STAGES, (4, 2))
    q = torch.randn(1, 4, 1, 16)
    for _ in range(5):
        cache(q, buffer.keys)
        buffer.append(torch.randn(1, 2, 1, 16))
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            cache(torch.randn(1, 4, 1, 8), buffer.keys)
        assert same_lists(cache(q, buffer.keys), STAGES(q, buffer.keys))


# --- KeyBuffer


def test_a_key_buffer_is_cat_and_crop():
    keys = torch.randn(2, 3, 5, 4)
    buffer, expected = KeyBuffer(keys, capacity=7), keys
    for count in (1, 1, 1, 0, 30, 1):
        new = torch.randn(2, 3, count, 4)
        buffer.append(new)
        expected = torch.cat([expected, new], 2)
        assert torch.equal(buffer.keys, expected) and len(buffer) == expected.shape[2]
    buffer.crop(6)
    buffer.append(new)
    assert torch.equal(buffer.keys, torch.cat([expected[:, :, :6], new], 2))
    assert torch.equal(keys, expected[:, :, :5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda k: KeyBuffer(k[0]), r"keys must have shape \[B, Hkv, S, D\]"),
        (lambda k: KeyBuffer(k, capacity=-1), "capacity must be an int of at least 0, got -1"),
        (lambda k: KeyBuffer(k.clone().requires_grad_()), "keys needs a gradient"),
        (lambda k: KeyBuffer(k).append(k.clone().requires_grad_()), "new needs a gradient"),
        (lambda k: KeyBuffer(k).append(k.double()), "new is torch.float64"),
        (lambda k: KeyBuffer(k).append(k[:, :1]), "new is .* which does not continue keys of"),
        (lambda k: KeyBuffer(k).append(k[0]), "new is .* which does not continue keys of"),
        (lambda k: KeyBuffer(k).crop(6), "length must be an int from 0 to 5, got 6"),
        (lambda k: KeyBuffer(k).crop(-1), "length must be an int from 0 to 5, got -1"),
    ],
)
def test_bad_keys_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.randn(1, 2, 5, 4))


# --- objects, classes and copies


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskCache(SinkWindow()), "selector must be a HiP or an InfiniteHiP.*SinkWindow"),
        (lambda: MaskCache(type(HIP)), "selector must be a HiP or an InfiniteHiP.*HiP'>"),
        (lambda: MaskCache(None), "selector must be a HiP or an InfiniteHiP.*None"),
        (lambda: Union((Dense(), Quest)), r"selectors\[1\] is the class Quest: pass an obj"),
        (lambda: PerHead({(0, 1): Quest}), r"selectors\[\(0, 1\)\] is the class Quest"),
        (lambda: PerHead({}, default=Dense), "default is the class Dense"),
        (lambda: PrefillDecode(Dense, Quest()), "prefill is the class Dense"),
        (lambda: PrefillDecode(Dense(), Quest), "decode is the class Quest"),
        (lambda: PrefillDecode(Dense(), 3), "decode must be a selector, got int"),
        (lambda: Quest() | Dense, "unsupported operand"),
    ],
)
def test_what_is_no_selector_is_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_for_layer_is_an_equal_selector_with_a_memory_of_its_own():
    window, quest = SinkWindow(), Quest()
    assert window.for_layer(0) is window
    for plain in (window | Dense(), PerHead({0: window}), PrefillDecode(window, Dense())):
        assert plain.for_layer(0) is plain
    for selector in (
        quest,
        MaskCache(HIP, 2),
        window | quest,
        PerHead({(0, 1): quest}, default=quest),
        PrefillDecode(window, window | quest),
    ):
        own = selector.for_layer(0)
        assert own == selector and own is not selector
    heads = PerHead({(0, 1): quest, 2: quest}).for_layer(0).selectors
    assert quest is not heads[0, 1] is not heads[2] is not quest


def test_sizes_do_not_change_under_what_is_kept():
    with pytest.raises(FrozenInstanceError):
        Quest().page_size = 3
