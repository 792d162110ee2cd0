"""The policy picks the best tree, stops where a tree loses, comes back, and never reaches an answer."""

from __future__ import annotations

import random

import pytest
import torch

import vispec
from tests import tiny
from tests.replay import ReplayDraft, answered
from tests.speech import FLAT, LINEAR, STEPS, UNEVEN, Speech
from vispec.decode import generate, memory
from vispec.decode.acceptance import Acceptance
from vispec.decode.costs import CostCurve
from vispec.decode.policy import NODES, PROBE_SHARE, AdaptiveTree, FixedTree, Outcome
from vispec.drafts.base import Plan
from vispec.tree import TreeConfig

SWEEP = (
    (0, 1, 2),
    (1, 1, 3),
    (3, 1, 5),
    (6, 1, 8),
    (1, 2, 4),
    (3, 2, 8),
    (2, 3, 8),
    (4, 3, 16),
    (6, 4, 32),
    (6, 8, 60),
)
CURVES = {"flat": FLAT, "linear": LINEAR, "steps": STEPS, "uneven": UNEVEN}
LEVELS = {"alike": lambda width: 0.05, "by width": lambda width: 0.04 * width}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("curve", CURVES)
def test_it_reaches_the_best_tree_of_a_sweep(curve, level):
    rates = [1 / CURVES[curve](1)]
    for sizes in SWEEP:
        speech = Speech(CURVES[curve], LEVELS[level])
        # The fewer nodes a tree has, the more its luck varies, and the quicker it is tried.
        speech.run(FixedTree(TreeConfig(*sizes)), 1200 if sizes[2] <= 8 else 200)
        rates.append(speech.rate)
    speech = Speech(CURVES[curve], LEVELS[level])
    policy = AdaptiveTree(widest=100)
    speech.run(policy, 150)
    speech.restart()
    speech.run(policy, 600)
    # The best of a sweep is the luckiest too; both are means over hundreds of rounds.
    assert speech.rate > 0.95 * max(rates)
    assert max(rates) > 1.3 * min(rates), "the sweep must tell good trees from bad"


def test_shapes_follow_the_costs():
    """The same draft: many nodes where they are free, few where each one costs, narrow where width costs."""

    def settled(curve, level) -> tuple[float, int]:
        speech, policy = Speech(curve, level), AdaptiveTree(widest=100)
        speech.run(policy, 300)
        sizes: list[int] = []
        own = policy.learn

        def learn(plan, outcome):
            sizes.append(outcome.scores.shape[1])
            own(plan, outcome)

        policy.learn = learn
        speech.run(policy, 200)
        return sum(sizes) / len(sizes), policy.width

    free, wide = settled(FLAT, LEVELS["alike"])
    dear, narrow = settled(LINEAR, lambda width: 0.1 * width)
    assert free > 40 and wide == 8
    assert dear < 5 and narrow <= 2
    assert 6 < settled(STEPS, LEVELS["alike"])[0] < 10


@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("curve", CURVES)
def test_a_useless_draft_costs_three_percent_at_most(curve, rows):
    speech, policy = Speech(CURVES[curve], honesty=0.0), AdaptiveTree(widest=100)
    plain = rows / CURVES[curve](1)
    speech.run(policy, 128, rows)
    assert speech.rate > 0.97 * plain, "the first answer, before anything was known"
    assert not policy.speculating
    speech.restart()
    speech.run(policy, 600, rows)
    assert speech.rate > 0.985 * plain
    assert 0 < speech.speculated < 130, "probes are rare, but they never end"


@pytest.mark.parametrize("curve", CURVES)
def test_it_comes_back_when_the_draft_becomes_good(curve):
    speech, policy = Speech(CURVES[curve], honesty=0.0), AdaptiveTree(widest=100)
    speech.run(policy, 200)
    assert not policy.speculating
    speech.honesty = 0.9
    speech.run(policy, 900)
    assert policy.speculating
    speech.restart()
    speech.run(policy, 300)
    assert speech.rate > 1.2 / CURVES[curve](1)


def test_a_hopeless_price_switches_it_off():
    speech, policy = Speech(lambda nodes: float(nodes), honesty=0.9), AdaptiveTree(widest=100)
    speech.run(policy, 100)
    assert not policy.speculating
    assert speech.rate > 0.97


def test_the_width_keeps_to_what_the_draft_can_propose():
    for widest, first in ((1, 1), (2, 2), (5, 3)):
        speech, policy = Speech(FLAT), AdaptiveTree(widest)
        assert policy.width == first
        speech.run(policy, 200)
        assert policy.width <= widest


def test_trees_keep_to_the_nodes_that_a_target_takes():
    speech, policy, sizes = Speech(FLAT), AdaptiveTree(100, most_nodes=20), []
    own = policy.learn
    policy.learn = lambda plan, outcome: (sizes.append(outcome.scores.shape[1]), own(plan, outcome))
    speech.run(policy, 200)
    assert max(sizes) == 20


def test_the_first_round_measures_a_plain_step_and_trees_grow_by_doubling():
    policy, speech = AdaptiveTree(widest=100), Speech(FLAT)
    running = torch.zeros(1, dtype=torch.int64)
    assert policy.next(running) is None
    limits = []
    for _ in range(8):
        plan = policy.next(running)
        limits.append(plan.tree.total_tokens if plan else 1)
        speech.run(policy, 1)
    assert limits[:2] == [1, 2]
    assert all(after <= 2 * before or after <= 2 for before, after in zip(limits, limits[1:], strict=False))


def test_rows_that_ended_do_not_count():
    """A finished row's scores may be anything: what is chosen is what the running row alone would get."""
    speech, policy = Speech(LINEAR), AdaptiveTree(widest=100)
    speech.run(policy, 100)
    alone = policy.next(torch.tensor([0]))
    both = policy.next(torch.tensor([1, 0]))
    frontier, candidates = torch.tensor([[-0.1, -2.0, -3.0]]), torch.tensor([[-0.1, -2.0, -3.0]])
    poison = torch.full_like(frontier, float("nan"))
    assert both.deeper(torch.cat([poison, frontier]), torch.cat([poison, candidates])) == alone.deeper(
        frontier, candidates
    )
    assert both.nodes(torch.cat([poison, candidates])) == alone.nodes(candidates)
    before = policy.acceptance(candidates)
    empty = torch.zeros(0, 4)
    outcome = Outcome(0.1, False, 1.0, empty, empty.long(), empty.bool())
    policy.learn(both, outcome)
    assert torch.equal(policy.acceptance(candidates), before)


def test_nodes_that_cannot_be_are_never_chosen():
    policy, speech = AdaptiveTree(widest=100), Speech(LINEAR)
    speech.run(policy, 60)
    plan = policy.next(torch.tensor([0]))
    scores = torch.full((1, 12), float("-inf"))
    assert plan.nodes(scores) == 1
    assert not plan.deeper(scores[:, :3], scores)


def test_a_probe_has_a_node_verified_even_where_none_pays():
    """Or nothing would ever be learned of a draft that became good."""
    speech, policy = Speech(lambda nodes: float(nodes), honesty=0.0), AdaptiveTree(widest=100)
    speech.run(policy, 100)
    running, hopeless = torch.tensor([0]), torch.full((1, 9), -9.0)
    while policy.next(running) is None:
        policy.learn_plain(1.0)
    assert not policy.speculating
    policy.target.add(2, 2.0)
    assert policy.next(running).nodes(hopeless) == 2
    policy.speculating = True
    assert policy.next(running).nodes(hopeless) == 1


def test_a_backlog_does_not_count_as_the_price_of_a_level():
    speech, policy = Speech(FLAT), AdaptiveTree(widest=100)
    speech.run(policy, 30)
    price = policy.level_seconds(policy.width)
    scores, parents, path = torch.zeros(1, 2), torch.tensor([[-1, 0]]), torch.ones(1, 2, dtype=torch.bool)
    plan = policy.next(torch.tensor([0]))
    for backlog, moved in ((True, False), (False, True)):
        for _ in range(6):
            policy.learn(plan, Outcome(50.0, backlog, 1.0, scores, parents, path))
        assert (policy.level_seconds(policy.width) != price) is moved


def test_probes_spend_their_share():
    speech, policy = Speech(LINEAR, level_seconds=lambda width: 0.5, honesty=0.0), AdaptiveTree(widest=100)
    speech.run(policy, 100)
    speech.restart()
    speech.run(policy, 2000)
    assert speech.seconds / speech.rounds == pytest.approx(1 + PROBE_SHARE, abs=0.004)


def test_costs_are_measured_then_guessed_between_and_beyond():
    curve = CostCurve(optimism=0.9, forgotten_after=10)
    with pytest.raises(ValueError, match="a pass must have been measured"):
        curve(1)
    curve.add(4, 2.0)
    assert (curve(4), curve.largest) == (2.0, 4)
    assert curve(1) == pytest.approx(1.8), "below all figures: a little less than the smallest"
    curve.add(1, 1.0)
    assert curve(2) == pytest.approx(0.9 * (1 + 1 / 3))
    assert curve(10) == pytest.approx(2 + 6 * (1 / 3) / 2), "beyond all figures: half the slope"


def test_one_slow_pass_is_not_believed_for_long():
    curve = CostCurve(optimism=0.9, forgotten_after=10)
    for _ in range(20):
        curve.add(1, 1.0)
    curve.add(8, 9.0)
    assert curve(8) == pytest.approx(9.0)
    curve.add(8, 1.2)
    assert curve(8) < 1.5
    for _ in range(19):
        curve.add(1, 1.0)
    assert curve.measured(8)
    curve.add(1, 1.0)
    assert not curve.measured(8) and curve.measured(1)


def test_a_busy_machine_slows_all_sizes_alike():
    curve = CostCurve(optimism=0.9)
    for size, seconds in ((1, 1.0), (8, 2.0)) * 4:
        curve.add(size, seconds)
    for _ in range(20):
        curve.add(1, 3.0)
    assert curve(8) == pytest.approx(6.0, rel=0.15)
    assert curve(1) == pytest.approx(3.0, rel=0.05)


def test_three_surprises_in_a_row_are_a_new_level_and_fewer_are_hiccups():
    curve = CostCurve(optimism=0.9)
    for size, seconds in ((1, 1.0), (8, 2.0)) * 4:
        curve.add(size, seconds)
    for seconds in (30.0, 30.0, 1.0, 30.0, 0.02, 30.0, 1.0):
        curve.add(1, seconds)
    assert (curve(1), curve(8)) == pytest.approx((1.0, 2.0))
    for size, seconds in ((8, 60.0), (3, 40.0), (1, 30.0)):
        assert curve(1) == pytest.approx(1.0)
        curve.add(size, seconds)
    assert (curve(1), curve(8)) == pytest.approx((30.0, 60.0))
    assert not curve.measured(3), "a size that was tried during the change has no figure from before it"
    for _ in range(3):
        curve.add(8, 2.0)
    assert (curve(1), curve(8)) == pytest.approx((1.0, 2.0)), "the shape has not taken the change for its own"


@pytest.mark.parametrize("factor", (3, 30, 0.2))
def test_it_keeps_its_pace_when_the_machine_changes_its_speed(factor):
    """Another program comes for sixty rounds and goes; every time is a little uneven."""

    def rates(curve, seed: int, changing: bool) -> tuple[float, float]:
        noise, speed = random.Random(seed), 1.0

        def uneven(seconds):
            return lambda size: seconds(size) * speed * (1 + abs(noise.gauss(0, 0.15)))

        speech = Speech(uneven(curve), uneven(LEVELS["alike"]), seed=seed)
        policy = AdaptiveTree(widest=100)
        speech.run(policy, 60)
        speech.restart()
        speed = factor if changing else 1.0
        speech.run(policy, 60)
        during, speed = speech.rate * speed, 1.0
        speech.restart()
        speech.run(policy, 60)
        return during, speech.rate

    found = [(rates(curve, seed, True), rates(curve, seed, False)) for curve in CURVES.values() for seed in range(3)]
    for then in (0, 1):
        disturbed, calm = (sum(pair[which][then] for pair in found) for which in (0, 1))
        assert disturbed > 0.85 * calm


def test_acceptance_begins_with_the_drafts_word_and_ends_with_what_came():
    acceptance = Acceptance()
    scores = torch.tensor([-0.01, -0.3, -1.2, -3.0, float("-inf")])
    torch.testing.assert_close(acceptance(scores), scores.exp())
    shy = torch.full((1, 40), -3.0)
    for _ in range(10):
        acceptance.add(shy, torch.arange(40)[None] % 2 == 0)
    assert float(acceptance(scores)[3]) == pytest.approx(0.5, abs=0.12)
    liar = Acceptance()
    for _ in range(10):
        liar.add(torch.full((1, 4), -0.01), torch.zeros(1, 4, dtype=torch.bool))
    found = liar(scores)
    assert float(found[0]) < 0.02
    assert float(found[1]) < 0.1, "a class without nodes of its own believes no more than the whole"
    assert float(found[4]) == 0
    for _ in range(12):
        liar.add(torch.full((1, 4), -0.01), torch.ones(1, 4, dtype=torch.bool))
    assert float(liar(scores)[0]) > 0.5, "what was long ago is forgotten"


class Wild(AdaptiveTree):
    """Chooses at random: sizes, depths, plain rounds, and trees that are cut off anywhere."""

    def __init__(self, seed: int, widest: int) -> None:
        super().__init__(widest)
        self.random = random.Random(seed)
        self.sizes: set[int] = set()

    def next(self, finished):
        chance = self.random
        if chance.random() < 0.3:
            return None
        policy = self

        class Cut(Plan):
            levels = 0

            def deeper(self, frontier, candidates):
                assert frontier.shape[1] == self.tree.top_k
                assert candidates.shape[1] == self.tree.top_k + self.levels * self.tree.top_k**2
                self.levels += 1
                return chance.random() < 0.8

            def nodes(self, candidates):
                policy.sizes.add(chance.randint(1, min(candidates.shape[1] + 1, 70)))
                return chance.choice(sorted(policy.sizes & set(range(candidates.shape[1] + 2))) or [1])

        return Cut(
            TreeConfig(depth=chance.randint(0, 6), top_k=chance.randint(1, 9), total_tokens=chance.randint(1, 70))
        )

    def learn(self, plan, outcome):
        assert outcome.accepted[:, 0].all(), "the root is on every path"
        assert outcome.scores.shape == outcome.parents.shape == outcome.accepted.shape
        depth = outcome.accepted.sum(1)
        assert torch.equal(
            outcome.accepted.gather(1, outcome.parents.clamp(min=0)) & outcome.accepted, outcome.accepted
        )
        assert (depth >= 1).all()


@pytest.fixture
def wild(monkeypatch):
    def force(seed: int) -> None:
        monkeypatch.setattr(generate, "_policy", lambda *_: Wild(seed, 9))

    return force


def fresh_draft(model) -> vispec.ViSpecDraft:
    torch.manual_seed(1)
    return vispec.ViSpecDraft.for_target(model)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_greedy_answers_are_the_same_whatever_is_chosen(name, wild):
    family = tiny.build(name)
    options = {"max_new_tokens": 40, "do_sample": False}
    batch, answers = answered(family, **options)
    draft = fresh_draft(family.model)
    nodes = set()
    for seed in range(4):
        wild(seed)
        replay = ReplayDraft(answers, tiny.VOCABULARY, hit_rate=0.8, seed=seed)
        for one in (draft, replay):
            result = vispec.fast_generate(family.model, one, batch, return_dict_in_generate=True, **options)
            nodes.update(result.stats.nodes_per_round)
            for row, new in enumerate(result.sequences[:, batch["input_ids"].shape[1] :].tolist()):
                expected = list(answers.values())[row]
                assert new[: len(expected)] == expected and set(new[len(expected) :]) <= {tiny.PAD}
    assert len(nodes) > 10 and 1 in nodes


def test_sampled_answers_are_the_same_whatever_is_chosen(wild):
    family = tiny.build("llava")
    prompt = family.prompt(1, seed=3)
    options = {"max_new_tokens": 40, "do_sample": True, "top_k": 0, "seed": 11, "eos_token_id": tiny.VOCABULARY + 1}
    expected = vispec.fast_generate(family.model, None, prompt, **options)
    new = expected[0, prompt["input_ids"].shape[1] :].tolist()
    drafts = [fresh_draft(family.model)]
    drafts += [ReplayDraft({tuple(prompt["input_ids"][0].tolist()): new}, tiny.VOCABULARY, hit_rate=0.8)]
    for seed in range(4):
        wild(seed)
        for draft in drafts:
            assert torch.equal(vispec.fast_generate(family.model, draft, prompt, **options), expected)
    for draft in drafts:
        fixed = vispec.fast_generate(family.model, draft, prompt, tree=TreeConfig(), **options)
        assert torch.equal(fixed, expected)


def test_a_draft_that_paused_is_where_one_that_kept_up_is():
    """Several rounds committed in one pass leave the state that as many passes leave, rows of other lengths too."""
    from vispec.decode.round import Committed
    from vispec.targets import load_target

    family = tiny.build("llava")
    target, draft = load_target(family.model), fresh_draft(family.model)
    batch = family.batch([family.prompt(1, seed=1, text=5), family.prompt(1, seed=2, text=8)], "left")
    generator = torch.Generator().manual_seed(3)
    rounds = []
    for counts in ([2, 1], [1, 0], [3, 0], [1, 2]):
        width = max(counts)
        features = torch.randn(2, width, 64, generator=generator)
        tokens = torch.randint(3, 100, (2, width), generator=generator)
        for row, count in enumerate(counts):
            # Beyond a row's count lies anything.
            features[row, count:] = float("nan")
        rounds.append(Committed(features, tokens, torch.tensor(counts), counts))
    with torch.inference_mode():
        prompt = target.prefill(batch)
        first = prompt.logits.argmax(-1)
        steps, once = draft.start(target, prompt, first), draft.start(target, prompt, first)
        for one in rounds:
            finite = one._replace(features=one.features.nan_to_num())
            steps.commit(*finite)
        joined = Committed.joined(rounds)
        assert joined.host_counts == [7, 3] and joined.counts.tolist() == [7, 3]
        assert not joined.features[0].isnan().any() and not joined.features[1, :3].isnan().any()
        once.commit(*joined._replace(features=joined.features.nan_to_num()))
        torch.testing.assert_close(once._last, steps._last, rtol=1e-4, atol=1e-4)
        assert torch.equal(once._positions, steps._positions)
        plan = Plan(TreeConfig())
        after, expected = once.propose(first, plan), steps.propose(first, plan)
        assert torch.equal(after.tokens, expected.tokens)


def test_a_draft_that_is_never_asked_never_starts(monkeypatch):
    family = tiny.build("llama")
    prompt = family.prompt(0, seed=3)
    draft = fresh_draft(family.model)

    def start(*_):
        raise AssertionError("started without need")

    class Never(AdaptiveTree):
        def next(self, finished):
            return None

    monkeypatch.setattr(draft, "start", start)
    monkeypatch.setattr(generate, "_policy", lambda *_: Never(9))
    expected = family.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(vispec.fast_generate(family.model, draft, prompt, max_new_tokens=12), expected)


def test_what_was_learned_is_kept_for_the_next_call_and_no_longer_than_the_draft():
    family = tiny.build("llama")
    prompt, draft = family.prompt(0, seed=3), fresh_draft(family.model)
    options = {"max_new_tokens": 12, "eos_token_id": tiny.VOCABULARY + 1}
    key = (1, False, torch.get_num_threads(), False)
    assert memory.recall(family.model, draft, key) is None
    vispec.fast_generate(family.model, draft, prompt, **options)
    kept = memory.recall(family.model, draft, key)
    assert kept.target.measured(1)
    passes = kept.target._passes
    vispec.fast_generate(family.model, draft, prompt, **options)
    assert memory.recall(family.model, draft, key).target._passes > passes
    assert kept.target._passes == passes, "a call in flight has a copy of its own"
    assert memory.recall(family.model, draft, (2, False, torch.get_num_threads(), False)) is None
    assert memory.recall(tiny.build("llama").model, draft, key) is None
    vispec.fast_generate(family.model, draft, prompt, tree=TreeConfig(), **options)
    assert memory.recall(family.model, draft, key).target._passes > passes
    held = len(memory._policies)
    del draft
    assert len(memory._policies) == held - 1


def test_a_tree_by_any_other_name():
    family = tiny.build("llama")
    prompt, draft = family.prompt(0, seed=3), fresh_draft(family.model)
    for wrong in ("wide", None, 7):
        with pytest.raises(ValueError, match='tree must be "auto" or a TreeConfig, got'):
            vispec.fast_generate(family.model, draft, prompt, tree=wrong, max_new_tokens=3)
    draft.head_tokens = torch.tensor([3, 5, 8])
    with pytest.raises(ValueError, match="top_k must be at most the 3 tokens that the draft proposes from, got 8"):
        vispec.fast_generate(family.model, draft, prompt, tree=TreeConfig(), max_new_tokens=3)
    expected = family.model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert torch.equal(vispec.fast_generate(family.model, draft, prompt, max_new_tokens=24), expected)


def test_a_fixed_tree_is_kept_to():
    family = tiny.build("llama")
    prompt, draft = family.prompt(0, seed=3), fresh_draft(family.model)
    result = vispec.fast_generate(
        family.model, draft, prompt, tree=TreeConfig(2, 3, 11), max_new_tokens=12, return_dict_in_generate=True
    )
    assert set(result.stats.nodes_per_round) == {11}
    assert len(result.stats.nodes_per_round) == result.stats.rounds


def test_sizes_are_in_order():
    assert list(NODES) == sorted(set(NODES)) and NODES[:2] == (1, 2)
