"""A made-up draft and target for the policy: trees grow from random scores, time is a formula, nothing is computed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vispec.decode.policy import Outcome, TreePolicy
from vispec.drafts.base import Plan

LEVEL_SECONDS = 0.05
RANKS = 8

FLAT: Callable[[int], float] = lambda nodes: 1.0  # noqa: E731
LINEAR: Callable[[int], float] = lambda nodes: 1.0 + 0.15 * (nodes - 1)  # noqa: E731
# A kernel of eight rows: the ninth costs as much as eight more.
STEPS: Callable[[int], float] = lambda nodes: 0.5 + 0.5 * math.ceil(nodes / 8)  # noqa: E731
# What a CPU's matrix kernels really did: sixteen rows were cheaper than ten.
UNEVEN: Callable[[int], float] = lambda nodes: 1.0 + (0.08 * (nodes - 1) if nodes < 4 or nodes > 12 else 0.2 * nodes)  # noqa: E731


@dataclass
class Speech:
    """One text and its draft.

    Attributes:
        verify_seconds: cost of a pass over so many nodes; level_seconds: cost of a level of the draft by its width.
        honesty: share of the draft's stated probability that is true; 0 is a useless draft that does not know it.
    """

    verify_seconds: Callable[[int], float]
    level_seconds: Callable[[int], float] = lambda width: LEVEL_SECONDS
    honesty: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.tokens = 0
        self.seconds = 0.0
        self.rounds = 0
        self.speculated = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def restart(self) -> None:
        """Forgets tokens and time, so that what a policy spent on learning can be left out."""
        self.tokens, self.seconds, self.rounds, self.speculated = 0, 0.0, 0, 0

    def run(self, policy: TreePolicy, rounds: int, rows: int = 1) -> None:
        for _ in range(rounds):
            plan = policy.next(torch.zeros(rows, dtype=torch.int64))
            self.rounds += 1
            if plan is None:
                self._spend(rows, self.verify_seconds(1))
                policy.learn_plain(self.verify_seconds(1))
            else:
                self.speculated += 1
                self._speculate(policy, plan, rows)

    def _spend(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    def _speculate(self, policy: TreePolicy, plan: Plan, rows: int) -> None:
        """Grows all rows' trees side by side, as a draft does, and walks them."""
        width = plan.tree.top_k
        trees = [_Candidates(self, width) for _ in range(rows)]
        levels = 0
        while levels < plan.tree.depth and plan.deeper(
            torch.tensor([tree.frontier_scores() for tree in trees]), torch.tensor([tree.scores for tree in trees])
        ):
            for tree in trees:
                tree.expand()
            levels += 1
        nodes = plan.nodes(torch.tensor([tree.scores for tree in trees]))
        kept = [tree.best(nodes - 1) for tree in trees]
        draft_seconds = (levels + 1) * self.level_seconds(width)
        target_seconds = self.verify_seconds(nodes)
        parents, accepted = [], []
        for tree, chosen in zip(trees, kept, strict=True):
            place = {-1: 0, **{candidate: 1 + at for at, candidate in enumerate(chosen)}}
            parents.append([-1] + [place[tree.parents[candidate]] for candidate in chosen])
            accepted.append([True] + [tree.true[candidate] for candidate in chosen])
        self._spend(sum(map(sum, accepted)), draft_seconds + target_seconds)
        if policy.wants_outcomes:
            scores = [[0.0] + [tree.scores[one] for one in chosen] for tree, chosen in zip(trees, kept, strict=True)]
            outcome = Outcome(
                draft_seconds,
                False,
                target_seconds,
                torch.tensor(scores),
                torch.tensor(parents),
                torch.tensor(accepted),
            )
            policy.learn(plan, outcome)


class _Candidates:
    """One row's growing tree: `true` marks the nodes that the target's own text goes through."""

    def __init__(self, speech: Speech, width: int) -> None:
        self.speech, self.width = speech, width
        self.scores: list[float] = []
        self.parents: list[int] = []
        self.true: list[bool] = []
        self.frontier = [-1]
        self.expand()

    def expand(self) -> None:
        children: list[int] = []
        for parent in self.frontier:
            score, true = (0.0, True) if parent < 0 else (self.scores[parent], self.true[parent])
            chance = self.speech.random
            # The draft is sure of its first word or it is not; what is left falls by half from rank to rank.
            first = chance.choice((0.97, 0.9, 0.6, 0.3))
            stated = [first] + [(1 - first) * 0.5 ** (rank + 1) for rank in range(RANKS - 1)]
            draw, right = chance.random() / max(self.speech.honesty, 1e-9), -1
            for rank, probability in enumerate(stated):
                if 0 <= draw < probability:
                    right = rank
                    break
                draw -= probability
            for rank in range(self.width):
                children.append(len(self.scores))
                self.scores.append(score + math.log(stated[rank]))
                self.parents.append(parent)
                self.true.append(true and rank == right)
        self.frontier = sorted(children, key=lambda node: -self.scores[node])[: self.width]

    def frontier_scores(self) -> list[float]:
        return [self.scores[node] for node in self.frontier]

    def best(self, count: int) -> list[int]:
        return sorted(sorted(range(len(self.scores)), key=lambda node: -self.scores[node])[:count])
