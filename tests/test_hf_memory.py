"""Selectors with a memory in a patched model, whatever happens to its cache."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer

from sparse_attn import patch
from sparse_attn.hf.caches import LayerSelectors
from sparse_attn.selectors import (
    Dense,
    MaskCache,
    PerHead,
    PrefillDecode,
    Quest,
    SinkWindow,
    lineage,
)
from sparse_attn.selectors.lineage import Memory

from .remembering import HIP, Compared, Proof

LAYERS, ROOM = 2, 128
MODES = (torch.no_grad, torch.inference_mode, torch.enable_grad)
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_size=32,
    intermediate_size=32,
    vocab_size=50,
)


def make_model():
    return LlamaForCausalLM(copy.deepcopy(CONFIG)).eval()


MODEL = make_model()
CACHES = {
    "dynamic": lambda: DynamicCache(config=CONFIG),
    "static": lambda: StaticCache(config=CONFIG, max_cache_len=ROOM),
}


def roll_back(cache, count):
    """Take back the last keys; in a static cache they stay until others are written."""
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            layer.cumulative_length -= count
    else:
        cache.crop(-count)


class Generations(RuleBasedStateMachine):
    """A patched model reads and writes, while its cache is rolled back, edited, reordered, copied
    and replaced. In every call of attention each selector is compared with its oracle.
    """

    @initialize(seed=st.integers(0, 99), kind=st.sampled_from(sorted(CACHES)))
    def patch_model(self, seed, kind):
        torch.manual_seed(seed)
        self.compared = Compared()
        self.patched = patch(MODEL, self.compared)
        self.mode, self.batch = torch.no_grad, 1
        self.prompt(kind, 70, 1)

    def teardown(self):
        self.patched.remove()
        MODEL.float()

    def forward(self, count):
        if self.length + count > ROOM:
            self.prompt("dynamic", 3, self.batch)
        calls = next(self.compared.calls)
        with self.mode():
            ids = torch.randint(50, (self.batch, count))
            MODEL(ids, past_key_values=self.cache)
        assert next(self.compared.calls) == calls + LAYERS + 1
        self.length += count

    @rule(kind=st.sampled_from(sorted(CACHES)), length=st.integers(1, 90), batch=st.integers(1, 2))
    def prompt(self, kind, length, batch):
        Proof.lost()
        self.kind, self.batch, self.length = kind, batch, 0
        with self.mode():
            self.cache = CACHES[kind]()
        self.forward(length)

    @rule(count=st.sampled_from([1, 1, 2, 4]))
    def step(self, count):
        self.forward(count)

    @rule()
    def steps(self):
        for _ in range(5):
            self.forward(1)

    @rule(count=st.integers(1, 40), more=st.integers(1, 40))
    def roll_back_and_go_on(self, count, more):
        count = min(count, self.length - 1)
        if count == 0:
            return
        with self.mode():
            roll_back(self.cache, count)
        self.length -= count
        self.forward(more)

    @rule(at=st.floats(0, 0.99))
    def edit_in_place(self, at):
        Proof.lost()
        with self.mode():
            for layer in self.cache.layers:
                layer.keys.detach()[:, :, int(at * self.length)] *= -3
        self.forward(1)

    @rule(indices=st.sampled_from([[0, 0], [1, 0], [0], [1]]))
    def choose_sequences(self, indices):
        if self.kind == "static" or max(indices) >= self.batch:
            return
        Proof.lost()
        self.batch = len(indices)
        if self.batch == 2:
            self.cache.reorder_cache(torch.tensor(indices))
        else:
            self.cache.batch_select_indices(torch.tensor(indices))
        self.forward(1)

    @rule()
    def go_back_to_keys_of_before(self):
        """And on from them in another way."""
        if self.kind == "static":
            return
        kept = [(layer.keys, layer.values) for layer in self.cache.layers]
        self.forward(1)
        for layer, before in zip(self.cache.layers, kept, strict=True):
            layer.keys, layer.values = before
        self.length -= 1
        self.forward(2)

    @rule()
    def copy_cache(self):
        if self.mode is not torch.enable_grad:  # graphs cannot be copied
            Proof.lost()
            self.cache = copy.deepcopy(self.cache)
        self.forward(1)

    @rule(mode=st.sampled_from(MODES))
    def other_mode(self, mode):
        self.mode = mode
        self.prompt(self.kind, 70, self.batch)

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def other_dtype(self, dtype):
        MODEL.to(dtype)
        self.prompt(self.kind, 70, self.batch)

    @rule()
    def patch_again(self):
        Proof.lost()
        self.patched.remove()
        self.patched = patch(MODEL, self.compared)
        self.forward(1)


TestGenerations = Generations.TestCase
TestGenerations.settings = settings(max_examples=10, stateful_step_count=10, deadline=None)


@pytest.fixture
def known(monkeypatch):
    """How many keys each call knew, of how many."""
    calls, before = [], Memory.known

    def recording(self, k):
        calls.append((before(self, k), k.shape[2]))
        return calls[-1][0]

    monkeypatch.setattr(Memory, "known", recording)
    return calls


SELECTORS = {
    "Quest": Quest(budget=8, page_size=4),
    "in a Union": Quest(budget=8, page_size=4) | SinkWindow(sink=1, window=4),
    "in a PerHead": PerHead({(0, 3): Quest(budget=8, page_size=4)}, default=Dense()),
    "MaskCache": PrefillDecode(Dense(), MaskCache(HIP, 4)),
    "of each layer": dict.fromkeys(range(LAYERS), Quest(budget=8, page_size=4)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", SELECTORS)
def test_layers_know_the_keys_of_their_cache(name, kind, mode, known):
    with mode(), patch(MODEL, SELECTORS[name]):
        cache = CACHES[kind]()
        for count in (20, 1, 1, 1):
            MODEL(torch.randint(50, (1, count)), past_key_values=cache)
    expected = [(n - 1, n) for n in (21, 22, 23) for _ in range(LAYERS)]
    if name == "MaskCache":
        assert known == expected[LAYERS:]  # the first step has none before it
    else:
        assert known == [(0, 20)] * LAYERS + expected


@pytest.mark.parametrize("kind", CACHES)
def test_rolled_back_keys_are_known_up_to_there(kind, known):
    cache = CACHES[kind]()
    with torch.no_grad(), patch(MODEL, SELECTORS["Quest"]):
        MODEL(torch.randint(50, (1, 20)), past_key_values=cache)
        roll_back(cache, 5)
        MODEL(torch.randint(50, (1, 9)), past_key_values=cache)
    assert known[LAYERS:] == [(15, 24)] * LAYERS


def test_models_with_one_selector_do_not_mix(known):
    quest, other = Quest(budget=8, page_size=4), make_model()
    with torch.no_grad(), patch(MODEL, quest), patch(other, quest):
        caches = [(model, CACHES["dynamic"]()) for model in (MODEL, other)]
        for _ in range(3):
            for model, cache in caches:
                model(torch.randint(50, (1, 5)), past_key_values=cache)
    assert [n - new for new, n in known] == [5] * len(known)
    assert quest._memory.value is None


def test_copies_of_a_patched_model_remember_for_themselves(known):
    with torch.no_grad(), patch(make_model(), Quest(budget=8, page_size=4)) as patched:
        model = patched._model
        MODEL_INPUT = torch.randint(50, (1, 9))
        cache = CACHES["dynamic"]()
        model(MODEL_INPUT, past_key_values=cache)
        twin = copy.deepcopy(model)
        known.clear()
        twin(torch.randint(50, (1, 1)), past_key_values=copy.deepcopy(cache))
        assert known == [(0, 10)] * LAYERS
        known.clear()
        model(torch.randint(50, (1, 1)), past_key_values=cache)
        assert known == [(9, 10)] * LAYERS


def test_each_module_has_its_own_even_with_one_layer_index():
    first, second, quest = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), Quest()
    first.layer_idx = second.layer_idx = None
    layers = LayerSelectors()
    assert layers.own(first, quest) is layers.own(first, quest)
    assert quest is not layers.own(first, quest) is not layers.own(second, quest) is not quest
    window = SinkWindow()
    assert layers.own(first, window) is window and layers.own(first, len) is len
    for copied in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert len(copied._own) == 0
    del first
    gc.collect()
    assert len(layers._own) == 1


def test_what_is_kept_goes_with_the_patch():
    cache = CACHES["dynamic"]()
    with torch.no_grad(), patch(MODEL, Quest(budget=8, page_size=4)) as patched:
        MODEL(torch.randint(50, (1, 20)), past_key_values=cache)
        assert len(patched._router.layers._own) == LAYERS
    assert len(patched._router.layers._own) == 0
    keys = cache.layers[0].keys
    cache.update(*torch.randn(2, 1, 2, 1, 8), 0)  # nobody says what it keeps
    assert lineage.find(keys) is not None and lineage.find(cache.layers[0].keys) is None


def test_caches_of_other_models_do_as_before():
    with patch(MODEL, SELECTORS["Quest"]):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                layer = DynamicLayer()
                keys, values = torch.randn(2, 1, 2, 20, 8)
                for n in range(5, 20, 5):
                    new = keys[:, :, n - 5 : n], values[:, :, n - 5 : n]
                    found = (
                        layer.update(*new)
                        if n % 2
                        else layer.update(key_states=new[0], value_states=new[1])
                    )
                    assert torch.equal(found[0], keys[:, :, :n])
                    assert torch.equal(found[1], values[:, :, :n])
