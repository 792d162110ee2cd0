"""`exact="guard"`: near-ties are found in steps of the dtype, end the path, and are decided by one token alone."""

from __future__ import annotations

import pytest
import torch

import vispec
from tests import tiny
from tests.replay import ReplayDraft, answered
from vispec.decode import guard, round
from vispec.tree import TreeConfig

ENDLESS = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": tiny.VOCABULARY + 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("best", [1.0, 17.5, -17.0, -0.3])
def test_near_is_counted_in_steps_of_the_dtype(dtype, best):
    step = 2.0 ** torch.tensor(abs(best)).log2().floor().item() * torch.finfo(dtype).eps
    logits = torch.full((1, 3, 5), -40.0)
    for node, steps in enumerate((0, guard.GUARD_STEPS[dtype] - 1, guard.GUARD_STEPS[dtype])):
        logits[0, node, 3] = best
        logits[0, node, 1] = best - steps * step
    assert guard.near_ties(logits.to(torch.float32), dtype).tolist() == [[True, True, False]]


def test_a_vocabulary_of_one_and_logits_of_minus_infinity():
    assert guard.near_ties(torch.zeros(1, 2, 1), torch.float32).shape == (1, 2)
    logits = torch.full((1, 1, 4), float("-inf"))
    logits[0, 0, 2] = 3.0
    assert guard.near_ties(logits, torch.bfloat16).tolist() == [[False]]


def test_a_walk_ends_before_the_first_near_tie():
    path = torch.tensor([[0, 2, 5], [0, 1, -1], [0, -1, -1], [0, 3, 4]])
    emitted = torch.tensor([[7, 8, 9], [7, 8, -1], [7, -1, -1], [7, 8, 9]])
    counts = torch.tensor([3, 2, 1, 3])
    near = torch.zeros(4, 6, dtype=torch.bool)
    near[0, 5] = near[0, 1] = True  # On the path, and beside it.
    near[1, 2] = True  # Never visited.
    near[2, 0] = True  # The root itself.
    near[3, [3, 4]] = True
    assert guard.cut(path, emitted, counts, near).tolist() == [True, False, True, True]
    assert counts.tolist() == [2, 2, 0, 1]
    assert path.tolist() == [[0, 2, -1], [0, 1, -1], [-1, -1, -1], [0, -1, -1]]
    assert emitted.tolist() == [[7, 8, -1], [7, 8, -1], [-1, -1, -1], [7, -1, -1]]


def test_places_beyond_a_path_do_not_read_the_root():
    """-1 stands for no node; the root's near-tie must not be found there."""
    path, emitted, counts = torch.tensor([[-1, -1]]), torch.tensor([[-1, -1]]), torch.tensor([0])
    assert guard.cut(path, emitted, counts, torch.ones(1, 3, dtype=torch.bool)).tolist() == [False]


@pytest.fixture
def doubtful(monkeypatch):
    """Calls every so many visited nodes a near-tie, and notes the sizes of all trees in turn."""
    sizes: list[int] = []
    own = round.near_ties

    def near(logits, dtype):
        assert logits.shape[1] > 1, "a pass over one token decides for itself"
        flags = torch.zeros_like(own(logits, dtype))
        generator = torch.Generator().manual_seed(len(sizes))
        return flags | (torch.rand(flags.shape, generator=generator) < 0.3)

    monkeypatch.setattr(round, "near_ties", near)
    return sizes


@pytest.mark.parametrize("kind", ("fixed", "auto"))
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_answers_stay_the_same_wherever_paths_are_cut(name, kind, doubtful):
    family = tiny.build(name)
    options = {"max_new_tokens": 24, "do_sample": False}
    batch, answers = answered(family, **options)
    draft = ReplayDraft(answers, tiny.VOCABULARY, hit_rate=0.9)
    result = vispec.fast_generate(
        family.model,
        draft,
        batch,
        tree=TreeConfig() if kind == "fixed" else "auto",
        exact="guard",
        on_round=lambda event: doubtful.append(event.tree.size if event.tree else 0),
        return_dict_in_generate=True,
        **options,
    )
    for row, new in enumerate(result.sequences[:, batch["input_ids"].shape[1] :].tolist()):
        expected = list(answers.values())[row]
        assert new[: len(expected)] == expected and set(new[len(expected) :]) <= {tiny.PAD}
    if kind == "fixed":
        assert result.stats.guarded > 2
        assert result.stats.new_tokens == sum(map(len, answers.values()))
        # Whatever was left undecided is decided by the very next round, and by nothing longer than one token.
        assert doubtful.count(1) > 2 and set(doubtful[1:]) == {1, TreeConfig().nodes}


@pytest.mark.parametrize("at", range(2, 8))
def test_an_end_behind_a_cut_does_not_end_the_answer(at, monkeypatch):
    """The end token stays undecided with everything else behind the cut, and ends the answer a round later."""
    family = tiny.build("llava")
    prompt = family.prompt(1, seed=6)
    full = family.model.generate(**prompt, **ENDLESS)[0, prompt["input_ids"].shape[1] :].tolist()
    draft = ReplayDraft({tuple(prompt["input_ids"][0].tolist()): full}, tiny.VOCABULARY, hit_rate=1.0)
    monkeypatch.setattr(round, "near_ties", lambda logits, dtype: torch.ones(logits.shape[:2], dtype=torch.bool))
    for options in ({"max_new_tokens": at}, {"max_new_tokens": 32, "eos_token_id": full[at - 1]}):
        options = {**ENDLESS, **options}
        expected = family.model.generate(**prompt, **options)
        result = vispec.fast_generate(
            family.model, draft, prompt, tree=TreeConfig(), exact="guard", return_dict_in_generate=True, **options
        )
        assert torch.equal(result.sequences, expected)
        assert result.stats.guarded == expected.shape[1] - prompt["input_ids"].shape[1] - 1


def test_ties_of_equal_logits_are_decided_by_one_token(monkeypatch):
    """With twin rows in the head every choice is a tie: each is left to a pass over one token."""
    family = tiny.build("llama")
    head = family.model.get_output_embeddings().weight
    with torch.no_grad():
        head[1::2] = head[:-1:2]
    prompt = family.prompt(0, seed=3)
    draft = vispec.ViSpecDraft.for_target(family.model)
    options = {**ENDLESS, "tree": TreeConfig(), "return_dict_in_generate": True}
    law = vispec.fast_generate(family.model, draft, prompt, **options)
    guarded = vispec.fast_generate(family.model, draft, prompt, exact="guard", **options)
    assert law.stats.guarded == 0
    assert guarded.stats.guarded == 31
    assert torch.equal(law.sequences, guarded.sequences)


def test_clear_answers_cost_nothing():
    family = tiny.build("llava")
    prompt, draft = family.prompt(1, seed=3), vispec.ViSpecDraft.for_target(family.model)
    options = {**ENDLESS, "tree": TreeConfig(), "return_dict_in_generate": True}
    law = vispec.fast_generate(family.model, draft, prompt, **options)
    guarded = vispec.fast_generate(family.model, draft, prompt, exact="guard", **options)
    assert guarded.stats.guarded == 0 and guarded.stats.rounds == law.stats.rounds
    assert torch.equal(law.sequences, guarded.sequences)


def test_what_guard_is_not_offered_for():
    family = tiny.build("llama")
    prompt = family.prompt(0, seed=3)
    with pytest.raises(ValueError, match="exact must be one of law, guard, self, got 'none'"):
        vispec.fast_generate(family.model, None, prompt, exact="none", max_new_tokens=3)
    with pytest.raises(ValueError, match='exact must be "law" or "self" where do_sample is True, got "guard"'):
        vispec.fast_generate(family.model, None, prompt, exact="guard", do_sample=True, max_new_tokens=3)
