"""The choice among captured shapes finds the best, and costs little where nothing helps."""

from __future__ import annotations

import copy
import random
import time
from collections import deque

import pytest

from vispec.decode.shapes import CAPTURE_ROUNDS, MENU, ROUNDS_REMEMBERED, VISIT, AdaptiveShape, menu_for
from vispec.tree import MAX_NODES, TreeConfig

DEFAULT, PLAIN, SMALL, LARGE = MENU


class Made:
    """Made-up rounds: a path goes on with a chance, wider trees catch a little more, and time is a table.

    Two rounds of a shape run slowly before its capture, which takes its time too; results are told one round late.
    """

    def __init__(self, seconds: dict, hit: float, rows: int = 1, seed: int = 0) -> None:
        self.seconds, self.hit, self.rows = seconds, hit, rows
        self.random = random.Random(seed)
        self.calls = dict.fromkeys(MENU, 0)
        self.restart()

    def restart(self) -> None:
        self.emitted = self.time = 0.0
        self.rounds: list = []

    def lose_graphs(self) -> None:
        self.calls = dict.fromkeys(MENU, 0)

    @property
    def rate(self) -> float:
        return self.emitted / self.time

    def path(self, shape) -> int:
        length = 1
        while shape is not None and length < shape.longest_path and self.random.random() < self.hit:
            length += 1
        return length

    def answer(self, policy, tokens: int) -> None:
        left = [tokens] * self.rows
        late: deque = deque()
        while max(left) > 0:
            ready = {shape for shape in MENU if self.calls[shape] > 2}
            shape = policy.next(max(left), ready)
            self.rounds.append(shape)
            self.calls[shape] += 1
            slow = {1: 3.0, 2: 3.0, 3: 8.0}.get(self.calls[shape], 1.0)
            spent = self.seconds[shape] * self.random.uniform(0.95, 1.05)
            self.time += spent * slow
            counts = [min(self.path(shape), room) for room in left]
            left = [room - count for room, count in zip(left, counts, strict=True)]
            self.emitted += sum(counts)
            late.append((shape, spent if shape in ready else None, counts))
            if len(late) > 1:
                policy.learn(*late.popleft())


def best_rate(seconds: dict, hit: float) -> float:
    def tokens(shape) -> float:
        return 1.0 if shape is None else sum(hit**level for level in range(shape.longest_path))

    return max(tokens(shape) / seconds[shape] for shape in MENU)


# Seconds of the shapes where one pass costs the same whatever it holds, and where rows cost.
ALIKE = {PLAIN: 0.8, SMALL: 0.9, DEFAULT: 1.0, LARGE: 1.25}
DEAR = {PLAIN: 0.35, SMALL: 0.5, DEFAULT: 1.0, LARGE: 1.8}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("hit", [0.0, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("seconds", [ALIKE, DEAR], ids=["alike", "dear"])
def test_it_reaches_the_best_shape(seconds, hit, rows):
    made, policy = Made(seconds, hit, rows), AdaptiveShape(MENU)
    made.answer(policy, 2000)
    made.restart()
    made.answer(policy, 6000)
    assert made.rate > 0.95 * rows * best_rate(seconds, hit)


def test_each_shape_is_the_best_one_somewhere():
    found = set()
    for seconds in (ALIKE, DEAR):
        for hit in (0.0, 0.3, 0.6, 0.8, 0.95):
            made, policy = Made(seconds, hit), AdaptiveShape(MENU)
            made.answer(policy, 4000)
            made.restart()
            made.answer(policy, 2000)
            found.add(max(MENU, key=made.rounds.count))
    assert found == set(MENU)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dear", [1.1, 1.35, 2.0, 3.0])
def test_a_useless_draft_costs_a_few_percent_of_a_long_answer(dear, seed):
    """The first answer, of which nothing was known, with the captures."""
    seconds = {PLAIN: 1.0, SMALL: 0.5 + dear / 2, DEFAULT: dear, LARGE: dear * 1.3}
    made, policy = Made(seconds, 0.0, seed=seed), AdaptiveShape(MENU)
    made.answer(policy, 4096)
    assert made.rate > 0.95
    made.restart()
    made.answer(policy, 4096)
    assert made.rate > 0.985
    assert 0 < sum(shape is not None for shape in made.rounds) < 300, "visits are rare, but they never end"


def test_it_begins_with_the_first_shape_and_short_answers_capture_no_other():
    policy = AdaptiveShape(MENU)
    for seconds in (ALIKE, DEAR):
        for hit in (0.0, 0.95):
            made, policy = Made(seconds, hit), AdaptiveShape(MENU)
            made.answer(policy, 24)
            assert set(made.rounds) == {DEFAULT}


def test_what_is_left_of_an_answer_must_earn_the_capture():
    """A hopeful guess of plain decoding saves 0.4 of each round here; a capture costs twelve."""
    policy = AdaptiveShape(MENU)
    ready = {DEFAULT}
    for known in range(1, 60):
        policy.learn(DEFAULT, 1.0, [1])
        for left in (1, 29, 31, 10_000):
            shape = copy.deepcopy(policy).next(left, ready)
            assert shape == (PLAIN if min(known, left) * 0.4 > CAPTURE_ROUNDS else DEFAULT)
            assert copy.deepcopy(policy).next(left, set(MENU)) is PLAIN, "what is captured costs nothing"


def test_it_comes_back_when_the_draft_becomes_good():
    made, policy = Made(ALIKE, 0.0), AdaptiveShape(MENU)
    made.answer(policy, 2000)
    assert max(MENU, key=made.rounds.count) is PLAIN
    made.hit = 0.8
    made.answer(policy, 2000)
    made.restart()
    made.answer(policy, 4000)
    assert made.rate > 0.93 * best_rate(ALIKE, 0.8)


def test_rows_that_ended_do_not_count():
    alone, among = AdaptiveShape(MENU), AdaptiveShape(MENU)
    for count in (1, 3, 5, 2):
        alone.learn(DEFAULT, 1.0, [count])
        among.learn(DEFAULT, 1.0, [0, count, 0])
    assert among.tokens(DEFAULT) == alone.tokens(DEFAULT) > 2
    among.learn(DEFAULT, 1.0, [0, 0, 0])
    assert among.tokens(DEFAULT) == alone.tokens(DEFAULT)


def test_a_shape_never_tried_is_guessed_from_the_first_ones_paths():
    policy = AdaptiveShape(MENU)
    for count in (DEFAULT.longest_path, 1):
        policy.learn(DEFAULT, 1.0, [count])
    half = pytest.approx
    weight = 1 - 1 / ROUNDS_REMEMBERED
    assert policy.tokens(PLAIN) == 1.0
    assert policy.tokens(SMALL) == half((weight * SMALL.longest_path + 1) / (weight + 1))
    assert policy.tokens(LARGE) == half((weight * LARGE.longest_path + 1) / (weight + 1))
    policy.learn(LARGE, 1.0, [2])
    assert policy.tokens(LARGE) == 2.0


def test_a_trial_whose_graph_is_lost_ends():
    policy, shapes = AdaptiveShape(MENU), []
    for _ in range(400):
        shape = policy.next(10_000, {DEFAULT})
        shapes.append(shape)
        policy.learn(shape, 1.0 if shape == DEFAULT else None, [1])
    assert 0 < shapes.count(PLAIN) < 80
    assert shapes.count(DEFAULT) > 200


def test_a_visit_lasts_until_its_rounds_are_told():
    policy = AdaptiveShape(MENU)
    for _ in range(3):
        policy.learn(DEFAULT, 1.0, [1])
    ready = set(MENU)
    assert policy.next(1000, ready) is PLAIN
    for _ in range(VISIT):
        assert policy.next(1000, ready) is PLAIN
        policy.learn(PLAIN, 5.0, [1])
    assert policy.next(1000, ready) != PLAIN


def test_it_reads_no_clock_and_no_chance(monkeypatch):
    first, second = AdaptiveShape(MENU), AdaptiveShape(MENU)
    one, other = Made(ALIKE, 0.6), Made(ALIKE, 0.6)
    one.answer(first, 500)
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("reads a clock"))
    monkeypatch.setattr(random, "random", lambda: pytest.fail("draws"))
    other.answer(second, 500)
    assert one.rounds == other.rounds


@pytest.mark.parametrize("widest", range(1, 17))
def test_the_menu_keeps_to_what_the_draft_can_propose(widest):
    menu = menu_for(widest, MAX_NODES)
    trees = [shape for shape in menu if shape is not None]
    assert all(shape.top_k <= widest for shape in trees)
    assert len({shape.nodes for shape in trees} | {1}) == len(menu), "times are told apart by nodes"
    assert menu[0].top_k == min(TreeConfig().top_k, widest)


def test_the_menu_keeps_to_the_nodes_that_a_target_takes():
    assert menu_for(8, LARGE.nodes) == MENU
    assert menu_for(8, LARGE.nodes - 1) == (DEFAULT, PLAIN, SMALL)
