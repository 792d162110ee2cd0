"""Rounds that outlive a call give the tokens of fresh ones, whatever the buffers held and became of the model."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

import vispec
from tests import tiny
from tests.replay import DeviceReplayDraft
from tests.tape import Captures, poison
from vispec.decode import graph, memory, replay
from vispec.decode.kept import KeptRounds
from vispec.drafts.medusa import MedusaDraft
from vispec.ops.backend import use_backend
from vispec.tree import TreeConfig

TREE = TreeConfig(2, 3, 9)
NO_END = {"eos_token_id": tiny.VOCABULARY + 1}


@pytest.fixture
def captures(monkeypatch) -> Captures:
    """Rounds on the CPU are noted and replayed, so that nothing but the kept tensors and the weights can reach them."""
    made = Captures()
    monkeypatch.setattr(replay, "can_capture", lambda device: True)
    monkeypatch.setattr(replay, "capture", made)
    # Native code writes behind PyTorch's back; a tape hears of PyTorch's operations alone.
    with use_backend("reference"):
        yield made


def kept_of(model, draft=None) -> list[KeptRounds]:
    found = memory._rounds.get(model, {}).get(model if draft is None else draft, [])
    return [rounds for _, rounds in found]


def poison_kept(model, draft=None) -> int:
    """Ruins all that calls have left, and says how many tensors that were."""
    count = 0
    with torch.inference_mode():
        for rounds in kept_of(model, draft):
            buffers = rounds.buffers
            caches = buffers.caches.values()
            stores = [tensor for cache in caches for tensor in (*cache.keys, *cache.values, cache.lengths)]
            for tensor in (*buffers.tensors.values(), *stores):
                poison(tensor)
                count += 1
    return count


def prompts(family: tiny.Family, seed: int, rows: int = 2, text: int = 5) -> dict:
    pictures = family.name in tiny.VISION_FAMILIES
    made = [family.prompt((row + seed) % 3 if pictures else 0, seed + row, text + 3 * row) for row in range(rows)]
    return family.batch(made, "left")


def drafts(family: tiny.Family) -> dict:
    torch.manual_seed(5)
    reduced = vispec.ViSpecDraft.for_target(family.model)
    reduced.head_tokens = torch.arange(3, 140)
    return {
        "none": None,
        "vispec": vispec.ViSpecDraft.for_target(family.model),
        "reduced": reduced,
        "medusa": MedusaDraft.for_target(family.model),
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "vispec") for name in tiny.FAMILIES), *(("llava", kind) for kind in ("none", "reduced", "medusa"))],
)
def test_later_calls_replay_the_first_ones_graph_and_give_their_own_tokens(name, kind, captures):
    """Prompts, pictures, lengths, seeds, settings and end tokens differ; every kept tensor is ruined between."""
    family = tiny.build(name)
    draft = drafts(family)[kind]
    calls = [
        (seed, {"max_new_tokens": 14 + seed, "eos_token_id": tiny.VOCABULARY + seed, "text": 5 + 2 * seed})
        for seed in range(3)
    ]
    sampled = [
        {"seed": 3},
        {"seed": [7, 2**64 - 1], "top_k": 5, "min_p": 0.01},
        {"seed": 5, "top_p": 0.8, "temperature": 2.5},
    ]
    for mode in ("greedy", "sampled"):
        for (seed, options), settings in zip(calls, sampled, strict=True):
            options = dict(options)
            batch = prompts(family, seed, text=options.pop("text"))
            options |= {"do_sample": True, **settings} if mode == "sampled" else {}
            expected = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
            before = captures.count, captures.replays
            if seed:
                assert poison_kept(family.model, draft) > 10
            actual = vispec.fast_generate(family.model, draft, batch, tree=TREE, graphs=True, **options)
            assert torch.equal(actual, expected), (mode, seed)
            made, replayed = captures.count - before[0], captures.replays - before[1]
            assert made == (seed == 0), "the first call alone captures"
            # Without a capture all rounds are replayed, those before it not.
            assert replayed >= (4 if seed == 0 else 3)


def test_a_true_path_is_accepted_in_replayed_rounds(captures):
    family = tiny.build("llava")
    for seed in range(3):
        batch = prompts(family, seed)
        answers = vispec.fast_generate(family.model, None, batch, graphs=False, max_new_tokens=40, **NO_END)
        draft = DeviceReplayDraft(answers[:, batch["input_ids"].shape[1] :], tiny.VOCABULARY, miss_every=4)
        for _ in range(2):
            result = vispec.fast_generate(
                family.model,
                draft,
                batch,
                tree=TreeConfig(),
                graphs=True,
                max_new_tokens=40,
                return_dict_in_generate=True,
                **NO_END,
            )
            assert torch.equal(result.sequences, answers)
            assert result.stats.tau > 1.5
        assert captures.count == seed + 1, "a draft's own tensors are part of what is captured"


def test_end_tokens_end_a_row_in_replayed_rounds(captures):
    """The number of end tokens decides the work; which they are does not."""
    family = tiny.build("llama")
    batch = prompts(family, 1)
    plain = vispec.fast_generate(family.model, None, batch, graphs=False, max_new_tokens=40, **NO_END)
    new = plain[:, batch["input_ids"].shape[1] :]
    counts = []
    tokens = new[0, 9], new[1, 12], new[0, 20], new[1, 6], new[0, 8]
    a, b, c, d, e = map(int, tokens)
    for ends in ([150], [a], [b], [c, d], [149, e], []):
        options = {"max_new_tokens": 40, "eos_token_id": ends, "pad_token_id": 0}
        expected = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
        before = captures.count
        assert torch.equal(vispec.fast_generate(family.model, None, batch, graphs=True, **options), expected)
        counts.append(captures.count - before)
    assert counts == [1, 0, 0, 1, 0, 1]


def test_the_two_latest_rounds_are_kept(captures):
    family = tiny.build("llama")

    def captured(rows: int) -> int:
        before = captures.count
        vispec.fast_generate(family.model, None, prompts(family, 1, rows), graphs=True, max_new_tokens=8, **NO_END)
        return captures.count - before

    assert [captured(rows) for rows in (1, 2, 1, 2, 3, 2, 1, 3)] == [1, 1, 0, 0, 1, 0, 1, 1]
    assert len(kept_of(family.model)) == memory.KEPT_ROUNDS == 2


def test_a_longer_prompt_grows_the_room_and_a_shorter_one_fits_it(captures, monkeypatch):
    monkeypatch.setattr(graph, "TOKENS_AHEAD", 16)
    family = tiny.build("llama")
    draft = drafts(family)["vispec"]
    counts = []
    for text, tokens in ((5, 12), (40, 12), (5, 12), (40, 12), (5, 90), (5, 70)):
        batch = prompts(family, 3, text=text)
        expected = vispec.fast_generate(family.model, None, batch, graphs=False, max_new_tokens=tokens, **NO_END)
        before = captures.count
        poison_kept(family.model, draft)
        options = {"tree": TREE, "graphs": True, "max_new_tokens": tokens, **NO_END}
        assert torch.equal(vispec.fast_generate(family.model, draft, batch, **options), expected)
        counts.append(captures.count - before)
    assert counts[:4] == [1, 1, 0, 0]
    assert counts[4] == 1 and counts[5] == 0
    assert len(kept_of(family.model, draft)) == 1


class Adapter(nn.Module):
    """A linear layer with a low-rank change, kept as PEFT keeps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        torch.manual_seed(1)
        self.up = nn.ModuleDict({name: nn.Linear(4, base.out_features, bias=False) for name in "ab"})
        self.down = nn.ModuleDict({name: nn.Linear(base.in_features, 4, bias=False) for name in "ab"})
        self.scaling = {"a": 1.0, "b": 1.0}
        self.active = ["a"]
        self._disabled = False
        self.settings = Settings()

    def forward(self, hidden):
        output = self.base_layer(hidden)
        for name in () if self._disabled else self.active:
            output = output + self.settings.share * self.scaling[name] * self.up[name](self.down[name](hidden))
        return output


class Settings:
    """An object that is neither a module nor plain."""

    def __init__(self) -> None:
        self.share = 2.0


class Halved(nn.Linear):
    """A linear layer of another kind with the same tensors."""

    def forward(self, hidden):
        return super().forward(hidden) / 2


def replaced_data(layer):
    layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data * -1.0


def replaced_forward(layer):
    layer.mlp.forward = lambda hidden: hidden * 0.5


def hooked(layer):
    layer.mlp.register_forward_hook(lambda module, args, output: output * 2)


def other_constant(layer):
    layer.input_layernorm.variance_epsilon = 10.0


def swapped_module(layer):
    old = layer.mlp.up_proj
    layer.mlp.up_proj = Halved(old.in_features, old.out_features, bias=False)
    layer.mlp.up_proj.weight = old.weight


def other_adapter(layer):
    layer.mlp.gate_proj.active = ["b"]


def adapter_off(layer):
    layer.mlp.gate_proj._disabled = True


def rescaled(layer):
    layer.mlp.gate_proj.scaling["a"] = 3.0


def setting_of_an_object(layer):
    layer.mlp.gate_proj.settings.share = -4.0


CHANGES = (
    replaced_data,
    replaced_forward,
    hooked,
    other_constant,
    swapped_module,
    other_adapter,
    adapter_off,
    rescaled,
    setting_of_an_object,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_captured_anew(change, captures):
    family = tiny.build("llama")
    layer = family.model.model.layers[1]
    layer.mlp.gate_proj = Adapter(layer.mlp.gate_proj)
    batch, options = prompts(family, 1), {"max_new_tokens": 12, **NO_END}
    draft = drafts(family)["vispec"]

    def answer():
        before = captures.count
        expected = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
        actual = vispec.fast_generate(family.model, draft, batch, tree=TREE, graphs=True, **options)
        assert torch.equal(actual, expected)
        return expected, captures.count - before

    first, captured = answer()
    assert captured == 1
    assert answer()[1] == 0, "nothing has changed"
    change(layer)
    changed, captured = answer()
    assert not torch.equal(changed, first), "the change must matter"
    assert captured == 1


def test_changes_in_place_are_seen_without_a_capture(captures):
    family = tiny.build("llama")
    batch, options = prompts(family, 1), {"max_new_tokens": 12, **NO_END}
    first = vispec.fast_generate(family.model, None, batch, graphs=True, **options)
    with torch.no_grad():
        family.model.model.layers[1].mlp.down_proj.weight.mul_(-1.0)
    expected = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
    assert torch.equal(vispec.fast_generate(family.model, None, batch, graphs=True, **options), expected)
    assert not torch.equal(first, expected)
    assert captures.count == 1


def test_another_dtype_moves_the_buffers(captures):
    family = tiny.build("llama")
    batch, options = prompts(family, 1), {"graphs": True, "max_new_tokens": 12, **NO_END}
    for count, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32), 1):
        family.model.to(dtype)
        actual = vispec.fast_generate(family.model, None, batch, **options)
        assert captures.count == 2 * count - 1
        vispec.release(family.model)
        assert torch.equal(actual, vispec.fast_generate(family.model, None, batch, **options))


@pytest.mark.parametrize("way", ["in place", "replaced"])
def test_a_trained_draft_is_captured_anew(way, captures):
    """Its input layers are multiplied out beforehand, so that a graph over the old product would propose old trees."""
    family = tiny.build("llama")
    batch, draft = prompts(family, 1), drafts(family)["vispec"]
    options = {"tree": TREE, "graphs": True, "max_new_tokens": 20, "return_dict_in_generate": True, **NO_END}
    vispec.fast_generate(family.model, draft, batch, **options)
    with torch.no_grad():
        if way == "in place":
            draft.fc.weight.neg_()
        else:
            draft.fc.weight = nn.Parameter(-draft.fc.weight)
    kept = vispec.fast_generate(family.model, draft, batch, **options)
    assert captures.count == 2
    vispec.release(family.model)
    fresh = vispec.fast_generate(family.model, draft, batch, **options)
    assert torch.equal(kept.sequences, fresh.sequences)
    assert kept.stats.accepted_per_round == fresh.stats.accepted_per_round


@pytest.mark.parametrize("how", ["criterion", "not finite"])
def test_a_call_that_raises_leaves_nothing(how, captures):
    family = tiny.build("llama")
    batch, draft = prompts(family, 1), drafts(family)["vispec"]
    options = {"tree": TREE, "graphs": True, "max_new_tokens": 30, **NO_END}
    expected = vispec.fast_generate(family.model, draft, batch, **options)
    assert len(kept_of(family.model, draft)) == 1
    seen = []

    def breaks(tokens, scores):
        seen.append(tokens)
        if len(seen) == 20 and how == "criterion":
            raise KeyError("in the middle")
        if len(seen) == 20:
            family.model.lm_head.weight.data.fill_(torch.nan)
        return torch.tensor([False])

    weights = family.model.lm_head.weight.detach().clone()
    with pytest.raises((KeyError, FloatingPointError)):
        vispec.fast_generate(family.model, draft, batch, stopping_criteria=[breaks], **options)
    assert not kept_of(family.model, draft)
    family.model.lm_head.weight.data.copy_(weights)
    assert torch.equal(vispec.fast_generate(family.model, draft, batch, **options), expected)
    assert captures.count == 2


def test_calls_at_the_same_time_have_rounds_of_their_own(captures):
    """One call is held up in its middle while another thread runs a whole one, with the same model and draft."""
    family = tiny.build("llava")
    draft = drafts(family)["vispec"]
    first, second = prompts(family, 1), prompts(family, 2)
    options = {"tree": TREE, "graphs": True, "max_new_tokens": 30, **NO_END}
    expected = [vispec.fast_generate(family.model, draft, batch, **options) for batch in (first, second)]
    reached, go_on = threading.Event(), threading.Event()
    seen, answers = [], {}

    def wait(tokens, scores):
        seen.append(tokens)
        if len(seen) == 24:
            reached.set()
            assert go_on.wait(60)
        return torch.tensor([False])

    def held_up():
        answers[0] = vispec.fast_generate(family.model, draft, first, stopping_criteria=[wait], **options)

    thread = threading.Thread(target=held_up)
    thread.start()
    try:
        assert reached.wait(60)
        answers[1] = vispec.fast_generate(family.model, draft, second, **options)
        assert len(kept_of(family.model, draft)) == 1
    finally:
        go_on.set()
        thread.join()
    assert torch.equal(answers[0], expected[0])
    assert torch.equal(answers[1], expected[1])
    kept = kept_of(family.model, draft)
    assert len(kept) == 2 and kept[0].buffers is not kept[1].buffers
    assert captures.count == 2


def test_what_is_kept_keeps_nothing_alive(captures):
    family = tiny.build("llava")
    batch, options = prompts(family, 1), {"graphs": True, "max_new_tokens": 12, **NO_END}
    draft = drafts(family)["vispec"]
    for one in (None, draft):
        vispec.fast_generate(family.model, one, batch, **options)
    rounds = weakref.ref(kept_of(family.model, draft)[0])
    plain = weakref.ref(kept_of(family.model)[0])
    model, alive = weakref.ref(family.model), weakref.ref(draft)
    # What a tape holds a graph would not.
    captures.tapes.clear()
    del draft, one
    gc.collect()
    assert alive() is None and rounds() is None
    del family
    gc.collect()
    assert model() is None and plain() is None


def test_warm_ups_belong_to_a_call(captures):
    """What a decoder's first pass of a call does otherwise must not be what is captured."""
    family = tiny.build("llama")
    batch = prompts(family, 1)
    for tokens, count in ((2, 0), (2, 0), (2, 0), (3, 1)):  # one token a round, and a round behind the last
        expected = vispec.fast_generate(family.model, None, batch, graphs=False, max_new_tokens=tokens, **NO_END)
        actual = vispec.fast_generate(family.model, None, batch, graphs=True, max_new_tokens=tokens, **NO_END)
        assert torch.equal(actual, expected)
        assert captures.count == count


def test_release_gives_the_memory_back(captures):
    family = tiny.build("llama")
    batch, options = prompts(family, 1), {"graphs": True, "max_new_tokens": 12, **NO_END}
    expected = vispec.fast_generate(family.model, None, batch, **options)
    rounds = weakref.ref(kept_of(family.model)[0])
    vispec.release(family.model)
    gc.collect()
    assert rounds() is None and not kept_of(family.model)
    vispec.release(family.model)
    assert torch.equal(vispec.fast_generate(family.model, None, batch, **options), expected)
    assert captures.count == 2


def test_the_model_is_as_before(captures):
    family = tiny.build("qwen2_5_vl")
    model = family.model
    model.train()
    model.model.rope_deltas = torch.tensor([[3]])
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    for seed in range(2):
        vispec.fast_generate(model, drafts(family)["vispec"], prompts(family, seed), graphs=True, max_new_tokens=12)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert before.keys() == after.keys()
    for name, own in before.items():
        assert own.keys() == after[name].keys()
        for key, value in own.items():
            assert after[name][key] is value or after[name][key] == value, (name, key)


def test_a_round_that_cannot_be_captured_is_told_of_once(captures, monkeypatch):
    def fails(function, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(replay, "capture", fails)
    family = tiny.build("llama")
    batch, options = prompts(family, 1), {"max_new_tokens": 12, **NO_END}
    expected = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
    with pytest.warns(UserWarning, match="LlamaForCausalLM cannot be captured"):
        assert torch.equal(vispec.fast_generate(family.model, None, batch, graphs=True, **options), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(vispec.fast_generate(family.model, None, batch, graphs=True, **options), expected)
