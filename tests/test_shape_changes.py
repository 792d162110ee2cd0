"""Rounds that change their shape: answers do not depend on it, and the draft is never left behind."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

import vispec
from tests import tiny
from tests.replay import DeviceReplayDraft
from tests.test_kept_rounds import NO_END, captures, prompts  # noqa: F401
from vispec.decode import generate, graph, memory
from vispec.decode.policy import FixedTree
from vispec.decode.shapes import MENU, AdaptiveShape, OneShape
from vispec.tree import TreeConfig

DEFAULT, PLAIN, SMALL, LARGE = MENU


class Forced(AdaptiveShape):
    """Keeps to what it is told, and notes what it hears."""

    def __init__(self, menu, choose: Callable[[list], object]) -> None:
        super().__init__(menu)
        self.choose = choose
        self.asked: list = []
        self.told: list = []

    def next(self, tokens_left, ready):
        self.asked.append(self.choose(self.asked))
        return self.asked[-1]

    def learn(self, shape, seconds, counts):
        self.told.append((shape, seconds, counts))


def forced(monkeypatch, choose: Callable[[list], object]) -> list[Forced]:
    """Every policy of late rounds that is made from now on; each round's shape is `choose(shapes so far)`."""
    made = []

    class Noted(Forced):
        def __init__(self, menu) -> None:
            super().__init__(menu, choose)
            made.append(self)

    monkeypatch.setattr(generate, "AdaptiveShape", Noted)
    monkeypatch.setattr(memory, "recall", lambda *_: None)
    return made


def in_runs(seed: int) -> Callable[[list], object]:
    """Shapes by chance, often the last one again."""
    chance = random.Random(seed)
    return lambda asked: asked[-1] if asked and chance.random() < 0.6 else chance.choice(MENU)


@pytest.mark.parametrize("option", [{}, {"do_sample": True, "seed": 3, "top_k": 20}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_answers_do_not_depend_on_the_shapes(name, option, monkeypatch):
    family = tiny.build(name)
    batch, options = prompts(family, 1, rows=3), {"max_new_tokens": 40, **NO_END, **option}
    expected = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
    new = expected[:, batch["input_ids"].shape[1] :]
    for seed, draft in enumerate(
        (vispec.ViSpecDraft.for_target(family.model), DeviceReplayDraft(new, tiny.VOCABULARY, miss_every=4))
    ):
        made = forced(monkeypatch, in_runs(seed))
        actual = vispec.fast_generate(family.model, draft, batch, graphs=True, **options)
        assert torch.equal(actual, expected)
        assert len(set(made[0].asked)) == 4
        assert [shape for shape, _, _ in made[0].told] == made[0].asked[: len(made[0].told)]
        assert sum(sum(counts) for _, _, counts in made[0].told) == new.numel() - len(new)
        assert all(seconds > 0 for _, seconds, _ in made[0].told)


@pytest.mark.parametrize("missed", [1, 3, 32])
def test_the_draft_catches_up_with_plain_rounds(missed, monkeypatch, captures):  # noqa: F811
    """A draft that is always right is right again in the first tree behind any number of plain rounds."""
    monkeypatch.setattr(graph, "MISSED_TOKENS", missed)
    family = tiny.build("llama")
    batch, options = prompts(family, 1, rows=2), {"max_new_tokens": 90, **NO_END}
    expected = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
    new = expected[:, batch["input_ids"].shape[1] :]
    draft = DeviceReplayDraft(new, tiny.VOCABULARY, miss_every=1000)
    script = [DEFAULT, *[None] * 2, DEFAULT, None, DEFAULT, *[None] * 40, *[DEFAULT, None] * 40]

    for call in range(2):
        made = forced(monkeypatch, lambda asked: script[len(asked)])
        before = captures.count
        actual = vispec.fast_generate(family.model, draft, batch, graphs=True, **options)
        assert torch.equal(actual, expected)
        told = [(shape, counts) for shape, _, counts in made[0].told]
        for shape, counts in told[:-3]:
            assert counts == [1 if shape is None else DEFAULT.longest_path] * 2
        for shape in (DEFAULT, PLAIN):
            # Rounds before the capture, and the one that holds it, are slower than those to come.
            unlike = [seconds is None for asked, seconds, _ in made[0].told if asked == shape]
            assert unlike == [not call and place < 3 for place in range(len(unlike))] and len(unlike) > 6
        if call:
            assert captures.count == before, "plain rounds, trees and the catching up are all kept"
        else:
            assert captures.count == 3


def test_the_vispec_draft_catches_up_as_it_does_behind_waiting_rounds(monkeypatch):
    """The same shapes in the same order, with and without a host that waits: the same paths are accepted."""
    family = tiny.build("llava")
    draft = vispec.ViSpecDraft.for_target(family.model)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2)
    batch = prompts(family, 1, rows=2)
    script = [DEFAULT, None, None, DEFAULT, None, DEFAULT, *[None] * 5, *[DEFAULT] * 40]
    options = {"max_new_tokens": 30, "return_dict_in_generate": True, **NO_END}

    class WaitingScript(FixedTree):
        def __init__(self, widest, most_nodes):
            super().__init__(DEFAULT)
            self.asked = 0

        def next(self, finished):
            self.asked += 1
            return None if script[self.asked - 1] is None else super().next(finished)

    monkeypatch.setattr(generate, "AdaptiveTree", WaitingScript)
    forced(monkeypatch, lambda asked: script[len(asked)])
    proposed = []
    propose = type(draft).start

    def start(self, *args):
        session = propose(self, *args)
        own = session.propose
        session.propose = lambda *rest: (proposed.append(own(*rest)), proposed[-1])[1]
        return session

    monkeypatch.setattr(type(draft), "start", start)
    results = []
    for graphs in (False, True):
        proposed.clear()
        result = vispec.fast_generate(family.model, draft, batch, graphs=graphs, **options)
        results.append((result, [(tree.tokens.clone(), tree.scores.clone()) for tree in proposed]))
    (waiting, trees), (late, late_trees) = results
    assert torch.equal(waiting.sequences, late.sequences)
    assert waiting.stats.accepted_per_round == late.stats.accepted_per_round[: len(waiting.stats.accepted_per_round)]
    assert len(late_trees) in (len(trees), len(trees) + 1)
    for (tokens, scores), (late_tokens, late_scores) in zip(trees, late_trees, strict=False):
        assert torch.equal(tokens, late_tokens)
        assert torch.allclose(scores, late_scores, rtol=1e-3, atol=1e-2)


def test_auto_learns_shapes_and_remembers_them():
    family = tiny.build("llama")
    draft, batch = vispec.ViSpecDraft.for_target(family.model), prompts(family, 1)
    result = vispec.fast_generate(
        family.model, draft, batch, graphs=True, max_new_tokens=60, return_dict_in_generate=True, **NO_END
    )
    (kept,) = memory._policies[draft][family.model].values()
    assert isinstance(kept, AdaptiveShape)
    assert result.stats.nodes_per_round[0] == DEFAULT.nodes
    assert set(result.stats.nodes_per_round) >= {DEFAULT.nodes, 1}, "a useless draft: plain rounds are tried"
    rounds = kept._rounds
    vispec.fast_generate(family.model, draft, batch, graphs=True, max_new_tokens=60, **NO_END)
    (again,) = memory._policies[draft][family.model].values()
    assert again._rounds > rounds and kept._rounds == rounds


def test_a_trees_sizes_given_by_the_caller_are_kept_to():
    family = tiny.build("llama")
    draft, batch = vispec.ViSpecDraft.for_target(family.model), prompts(family, 1)
    options = {"graphs": True, "max_new_tokens": 30, "return_dict_in_generate": True, **NO_END}
    result = vispec.fast_generate(family.model, draft, batch, tree=TreeConfig(2, 3, 11), **options)
    assert set(result.stats.nodes_per_round) == {11}
    assert OneShape(SMALL).next(5, set()) is SMALL


def test_a_draft_whose_vocabulary_shrinks_is_not_asked_for_more_than_it_has():
    family = tiny.build("llama")
    draft, batch = vispec.ViSpecDraft.for_target(family.model), prompts(family, 1)
    options = {"graphs": True, "max_new_tokens": 12, **NO_END}
    expected = vispec.fast_generate(family.model, draft, batch, **options)
    draft.head_tokens = torch.tensor([3, 5, 8])
    assert torch.equal(vispec.fast_generate(family.model, draft, batch, **options), expected)
