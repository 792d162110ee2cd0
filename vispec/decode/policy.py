"""How large the next draft tree is, and whether there is one: the choice that brings most tokens a second.

Pure: it reads no clock and no tensor of the model. Costs and outcomes are told to it, and nothing it chooses can reach
an answer, because verification keeps the target's own tokens whatever was proposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vispec.decode.acceptance import Acceptance
from vispec.decode.costs import CostCurve
from vispec.drafts.base import Plan
from vispec.tree import TreeConfig

# Nodes and widths that are tried. The steps are fine where passes are small, since there one row more may cost a lot.
NODES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
WIDTHS = (1, 2, 3, 4, 6, 8)
FIRST_WIDTH = 3
DEEPEST = 9
# While speculation is off, probes may cost this share of the time.
PROBE_SHARE = 0.01
# Tokens a row that speculation may lose against plain decoding before it is switched off: at first, and after gains.
FIRST_ALLOWANCE, LARGEST_ALLOWANCE = 0.5, 2.5
# Off until probes have gained this much.
REENTRY = 0.2
# One probe is charged at most so many plain steps: a hiccup of the machine must not lock speculation out.
LARGEST_CHARGE = 2.0
# One round loses at most so many tokens, for the same reason.
LARGEST_LOSS = 1.0
# Rounds that running means remember, rounds between two looks at the width, and looks until a width that did not
# pay is tried again.
ROUNDS_REMEMBERED = 24
WIDTH_ROUNDS = 12
WIDTH_PATIENCE = 8
# Share of a level's time that a narrower one must save: less is noise.
LEAST_SAVING = 0.01


@dataclass
class Outcome:
    """What one round cost and what became of its tree.

    Attributes (R rows that go on after the round, T nodes):
        draft_seconds: time of the proposal; `backlog` says that it made up for rounds without one.
        target_seconds: time of all the rest: verify, accept, commit.
        scores: [R, T] float32 cumulative log-probabilities of the nodes, root first.
        parents: [R, T] int64.
        accepted: [R, T] bool, true on the accepted paths.
    """

    draft_seconds: float
    backlog: bool
    target_seconds: float
    scores: Tensor
    parents: Tensor
    accepted: Tensor


class TreePolicy(Protocol):
    """Chooses the tree of each round.

    Attributes:
        wants_outcomes: whether `learn` is to be called; an outcome takes a few operations to put together.
    """

    wants_outcomes: bool

    def next(self, finished: Tensor) -> Plan | None:
        """The plan of the next round, None for plain decoding; `finished` [B] int64 is nonzero where a row is done."""

    def learn_plain(self, target_seconds: float) -> None:
        """Is told of a round without a tree."""

    def learn(self, plan: Plan, outcome: Outcome) -> None:
        """Is told what became of a plan."""


class FixedTree:
    """The same tree every round, whatever it costs."""

    wants_outcomes = False

    def __init__(self, tree: TreeConfig) -> None:
        self._plan = Plan(tree)

    def next(self, finished: Tensor) -> Plan:
        return self._plan

    def learn_plain(self, target_seconds: float) -> None:
        """There is nothing to learn."""

    def learn(self, plan: Plan, outcome: Outcome) -> None:
        """There is nothing to learn."""


class AdaptiveTree:
    """Weighs each level and each node by what it is expected to bring at the going rate.

    With a rate of r tokens a second, a choice that costs s seconds more is worth it where it brings more than r * s
    tokens more; for the best r that can be reached this is the choice of most tokens a second (renewal reward). The
    rate is plain decoding's, or speculation's own where that is higher. Expected tokens are the draft's scores as
    `Acceptance` corrects them.
    """

    wants_outcomes = True

    def __init__(self, widest: int, most_nodes: int = NODES[-1]) -> None:
        self.most_nodes = most_nodes
        self.widths = tuple(width for width in WIDTHS if width <= widest)
        # Contexts grow and other programs come and go, so that old figures of the target are tried anew.
        self.target = CostCurve(optimism=0.9, forgotten_after=32)
        self.draft = CostCurve(optimism=0.85)
        self.acceptance = Acceptance()
        self.speculating = True
        self.width = max(width for width in self.widths if width <= FIRST_WIDTH)
        self._allowance = FIRST_ALLOWANCE
        self._credit = 0.0
        # Share of a frontier's mass that its best children carry on.
        self.continuation = 0.7
        # Tokens a row, and what they took in plain steps of their time, so that a machine's speed cancels out.
        self._tokens = self._steps = 0.0
        self._mass_of_rank = torch.zeros(max(WIDTHS))
        self._levels = 0.0
        self._looks = self._rounds_of_width = 0
        self._narrowed: dict[int, int] = {}

    def level_seconds(self, width: int) -> float:
        """One level of the draft; before the first measurement a tenth of a plain step."""
        return self.draft(width) if self.draft.largest else self.target(1) / 10

    def rate(self, rows: int) -> float:
        """Tokens a second that any further cost is weighed at."""
        plain = rows / self.target(1)
        return plain * max(self._tokens / self._steps, 1.0) if self._steps and self.speculating else plain

    def next(self, finished: Tensor) -> Growth | None:
        """See `TreePolicy.next`."""
        if not self.target.measured(1) or (not self.speculating and self._credit < 0):
            return None
        return Growth(self, finished == 0)

    def learn_plain(self, target_seconds: float) -> None:
        """See `TreePolicy.learn_plain`."""
        self.target.add(1, target_seconds)
        self._credit += PROBE_SHARE

    def learn(self, plan: Growth, outcome: Outcome) -> None:
        """See `TreePolicy.learn`. Rows that ended are left out: their paths were cut."""
        rows, nodes = outcome.scores.shape
        self.target.add(nodes, outcome.target_seconds)
        if not outcome.backlog:
            self.draft.add(plan.tree.top_k, outcome.draft_seconds / (plan.levels + 1))
        if not rows:
            return
        scores = outcome.scores[:, 1:]
        self.acceptance.add(scores, outcome.accepted[:, 1:])
        # Expected tokens say the same in the mean as those that came, and vary less; those that came cannot be wrong.
        probable = self.acceptance(scores)
        tokens = 1 + float(probable.sum() + outcome.accepted[:, 1:].sum()) / (2 * rows)
        seconds = (plan.levels + 1) * self.level_seconds(plan.tree.top_k) + self.target(nodes)
        self._weigh(tokens, seconds, outcome.draft_seconds)
        if self.speculating:
            kept = 1 - 1 / ROUNDS_REMEMBERED
            self._tokens = kept * self._tokens + tokens
            self._steps = kept * self._steps + seconds / self.target(1)
            self._learn_width(probable, outcome.parents, plan.levels, rows)

    def _weigh(self, tokens: float, seconds: float, draft_seconds: float) -> None:
        """Switches speculation off where it keeps losing, and on again where probes keep winning."""
        plain = self.target(1)
        # A pass that the machine held up says little of what speculation costs.
        gained = max(tokens - seconds / plain, -LARGEST_LOSS)
        if self.speculating:
            self._allowance = min(self._allowance + gained, LARGEST_ALLOWANCE)
            if self._allowance < 0:
                self.speculating, self._credit = False, 0.0
                self._allowance = -REENTRY
                self._tokens = self._steps = 0.0
            return
        spent = (draft_seconds + self.target(2)) / plain - 1
        self._credit -= min(max(spent, 0.0), LARGEST_CHARGE)
        self._allowance = max(self._allowance + gained, -REENTRY)
        if self._allowance > 0:
            self.speculating, self._allowance = True, FIRST_ALLOWANCE

    def _learn_width(self, probable: Tensor, parents: Tensor, levels: int, rows: int) -> None:
        """Looks now and then whether one child more or less a node would pay.

        Widening is judged by carrying on the fall from rank to rank, narrowing by what the last ranks brought.
        """
        nodes = parents.shape[1]
        earlier = torch.ones(nodes, nodes, dtype=torch.bool).tril(-1)
        rank = ((parents[:, :, None] == parents[:, None]) & earlier).sum(2)[:, 1:].flatten()
        mass = torch.zeros(max(*WIDTHS, nodes))
        mass.index_add_(0, rank, probable.flatten() / rows)
        self._mass_of_rank += mass[: max(WIDTHS)]
        self._levels += levels + 1
        self._rounds_of_width += 1
        if self._rounds_of_width < WIDTH_ROUNDS:
            return
        self._looks += 1
        masses = (self._mass_of_rank / self._rounds_of_width).tolist()
        levels_a_round = self._levels / self._rounds_of_width
        price = self.rate(1) * levels_a_round
        place = self.widths.index(self.width)
        now = self.level_seconds(self.width)
        if place > 0:
            narrower = self.widths[place - 1]
            lost = sum(masses[narrower : self.width])
            saved = now - self.level_seconds(narrower)
            if saved > LEAST_SAVING * now and lost < price * saved:
                if self.draft.measured(narrower):
                    self._narrowed[self.width] = self._looks
                self._use_width(narrower)
                return
        if place + 1 < len(self.widths):
            wider = self.widths[place + 1]
            last = masses[self.width - 1]
            fall = min(last / masses[self.width - 2], 1.0) if self.width > 1 and masses[self.width - 2] else 0.5
            found = sum(last * fall**step for step in range(1, wider - self.width + 1))
            waited = self._looks - self._narrowed.get(wider, -WIDTH_PATIENCE) >= WIDTH_PATIENCE
            if waited and found > price * max(self.level_seconds(wider) - now, 0.0):
                self._use_width(wider)
                return
        self._use_width(self.width)

    def _use_width(self, width: int) -> None:
        self.width = width
        self._mass_of_rank = torch.zeros(max(WIDTHS))
        self._levels = 0.0
        self._rounds_of_width = 0


class Growth(Plan):
    """One round's plan of `AdaptiveTree`: decides on depth and nodes while the tree grows.

    Attributes:
        levels: levels behind the first that have been granted.
    """

    def __init__(self, policy: AdaptiveTree, running: Tensor) -> None:
        self._policy = policy
        self._running = running
        self._rate = policy.rate(int(running.sum()))
        # A tree at most doubles the largest size measured, so that a curve is climbed and not jumped.
        limit = min(max(2 * policy.target.largest, 2), policy.most_nodes)
        most = max(nodes for nodes in NODES if nodes <= limit)
        self._mass: float | None = None
        super().__init__(TreeConfig(depth=DEEPEST, top_k=policy.width, total_tokens=most))
        self.levels = 0

    def deeper(self, frontier: Tensor, candidates: Tensor) -> bool:
        """Whether one more level would raise what the tree is worth by more than the level costs."""
        if self.levels == self.tree.depth or self.levels + 2 >= self.tree.total_tokens:
            return False
        policy = self._policy
        probable = policy.acceptance(frontier[self._running])
        mass = float(probable.sum())
        if self._mass:
            policy.continuation += (min(mass / self._mass, 1.0) - policy.continuation) / ROUNDS_REMEMBERED
        self._mass = mass
        known = policy.acceptance(candidates[self._running])
        worth, _ = self._weigh(known, 1)
        deeper, _ = self._weigh(torch.cat([known, probable * policy.continuation], dim=1), 1)
        if deeper - worth <= self._rate * policy.level_seconds(self.tree.top_k):
            return False
        self.levels += 1
        return True

    def nodes(self, candidates: Tensor) -> int:
        """How many nodes are worth verifying, the root among them."""
        # Where speculation is off a probe must see at least one node verified, or nothing would be learned.
        _, nodes = self._weigh(self._policy.acceptance(candidates[self._running]), 1 if self._policy.speculating else 2)
        return nodes

    def _weigh(self, probable: Tensor, least: int) -> tuple[float, int]:
        """What the best choice of at least so many nodes is worth in tokens, and its size: [R, N] probabilities."""
        best = probable.sort(dim=1, descending=True).values[:, : self.tree.total_tokens - 1]
        tokens = [0.0, *best.sum(0).cumsum(0).tolist()]
        sizes = [nodes for nodes in NODES if least <= nodes <= len(tokens)]
        return max((tokens[nodes - 1] - self._rate * self._policy.target(nodes), nodes) for nodes in sizes)
