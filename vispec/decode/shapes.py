"""Which of a few shapes the next round has, where rounds run ahead of the host and a shape must be captured first.

Pure, like `policy.py`: times and counts are told to it, late, and nothing it chooses can reach an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Protocol

from vispec.decode.costs import CostCurve
from vispec.tree import TreeConfig

# None is a round of plain decoding. The first shape is the one to begin with.
Shape = TreeConfig | None
MENU: tuple[Shape, ...] = (
    TreeConfig(),
    None,
    TreeConfig(depth=1, top_k=4, total_tokens=8),
    TreeConfig(depth=6, top_k=8, total_tokens=60),
)
# A shape is captured where it promises to earn so many rounds of the present one: its warm-ups and the capture.
CAPTURE_ROUNDS = 12.0
# Time of a shape without a figure, against what the others suggest: low, so that it is tried if it may be worth it.
OPTIMISM = 0.6
# Rounds of a visit that count, and rounds after which it ends if they do not come (the graph was lost under it).
VISIT, LONGEST_VISIT = 4, 16
# Visits to shapes that look worse may cost this share of the time; one costs at least half a round, for the change.
VISIT_SHARE, LEAST_COST = 0.01, 0.5
# Rounds until a shape is tried again whose trial ended so.
PATIENCE = 128
# Rounds that a tree's counts remember, and how many of them count beside those of a visit: they are old by then.
ROUNDS_REMEMBERED, OLD_ROUNDS = 48, 8


class ShapePolicy(Protocol):
    """Chooses the shape of each round.

    Attributes:
        menu: every shape that it may choose, a tree first unless it is the only one.
    """

    menu: tuple[Shape, ...]

    def next(self, tokens_left: int, ready: Collection[Shape]) -> Shape:
        """The shape of the next round.

        `tokens_left`: tokens that the longest row may still emit; `ready`: shapes that cost no capture.
        """

    def learn(self, shape: Shape, seconds: float | None, counts: Sequence[int]) -> None:
        """Is told what became of a round, one or more rounds later.

        `seconds`: its time, None where it did not run as it always will; `counts`: tokens that each row emitted.
        """


class OneShape:
    """The same shape every round, whatever it costs."""

    def __init__(self, shape: Shape) -> None:
        self.menu = (shape,)

    def next(self, tokens_left: int, ready: Collection[Shape]) -> Shape:
        return self.menu[0]

    def learn(self, shape: Shape, seconds: float | None, counts: Sequence[int]) -> None:
        """There is nothing to learn."""


class AdaptiveShape:
    """The shape of most tokens a second, found by trying.

    Every shape has a time, measured or guessed from the others', and tokens a round: plain decoding brings one a row; a
    tree brings what it brought lately, and one that was never tried what the latest tree's paths would have been, cut
    at its depth or, where they reached the bottom, carried on to its own. Guesses are hopeful, and every trial replaces
    one.

    A shape that must be captured first has to promise more than the capture costs, over the rounds that the answer may
    still have, or as many as there were so far, whichever is less: answers end early. Shapes that are captured and look
    worse are visited now and then.
    """

    def __init__(self, menu: Sequence[Shape]) -> None:
        self.menu = tuple(menu)
        self._time = CostCurve(OPTIMISM)
        # Of each tree: how many rows went so many tokens far, later ones weighing more.
        self._paths: dict[Shape, dict[int, float]] = {}
        self._latest: TreeConfig | None = None
        self._rounds = 0
        self._current = self.menu[0]
        self._visited: dict[Shape, int] = {}
        self._visiting = self._current
        self._wanted = self._patience = 0

    def tokens(self, shape: Shape) -> float:
        """Tokens that a running row is expected to emit in one round."""
        if shape is None:
            return 1.0
        paths = self._paths.get(shape) or self._carried_on(shape)
        total = sum(paths.values())
        return sum(count * weight for count, weight in paths.items()) / total if total else 1.0

    def _carried_on(self, shape: TreeConfig) -> dict[int, float]:
        """The latest tree's paths as far as this one would have followed them, hopefully."""
        paths: dict[int, float] = {}
        for count, weight in self._paths.get(self._latest, {}).items():
            bottom = count >= self._latest.longest_path
            reached = shape.longest_path if bottom else min(count, shape.longest_path)
            paths[reached] = paths.get(reached, 0.0) + weight
        return paths

    def rate(self, shape: Shape) -> float:
        """Tokens of a running row a second."""
        return self.tokens(shape) / self.seconds(shape)

    def seconds(self, shape: Shape) -> float:
        """Time of a round; the guess is that no tree is quicker than plain decoding."""
        seconds = self._time(_nodes(shape))
        return seconds if self._measured(shape) or not self._measured(None) else max(seconds, self._time(1))

    def next(self, tokens_left: int, ready: Collection[Shape]) -> Shape:
        """See `ShapePolicy.next`."""
        if self._wanted and self._patience:
            self._patience -= 1
            return self._visiting
        self._wanted = 0
        if not self._time.largest:
            return self._current
        shape = self._best(tokens_left, ready)
        if self._measured(shape):
            self._current = shape
            shape = self._due(ready)
        if shape != self._current:
            self._visit(shape)
        return shape

    def learn(self, shape: Shape, seconds: float | None, counts: Sequence[int]) -> None:
        """See `ShapePolicy.learn`. Rows that emitted nothing had ended."""
        running = [count for count in counts if count]
        if not running:
            return
        self._rounds += 1
        if shape is not None:
            self._latest = shape
            paths = self._paths.setdefault(shape, {})
            for count in paths:
                paths[count] *= 1 - 1 / ROUNDS_REMEMBERED
            for count in running:
                paths[count] = paths.get(count, 0.0) + 1 / len(running)
        if seconds is not None:
            self._time.add(_nodes(shape), seconds)
            if shape == self._visiting:
                self._wanted = max(self._wanted - 1, 0)

    def _best(self, tokens_left: int, ready: Collection[Shape]) -> Shape:
        """The shape that is worth most over the rounds to come, in rounds of the present shape."""
        now = self.rate(self._current)
        rounds = min(tokens_left / self.tokens(self._current), self._rounds)

        def worth(shape: Shape) -> float:
            if shape == self._current:
                return 0.0
            if not self._measured(shape) and self._rounds - self._visited.get(shape, -PATIENCE) < PATIENCE:
                return -1.0
            return rounds * (1 - now / self.rate(shape)) - (0.0 if shape in ready else CAPTURE_ROUNDS)

        return max((self._current, *self.menu), key=worth)

    def _due(self, ready: Collection[Shape]) -> Shape:
        """The shape whose last visit is longest ago, if visits have cost less than they may; else the present one."""
        others = [shape for shape in self.menu if shape != self._current and shape in ready and self._measured(shape)]
        if not others:
            return self._current
        shape = min(others, key=lambda shape: self._visited.get(shape, 0))
        lost = VISIT * max(1 - self.rate(shape) / self.rate(self._current), 0.0) + LEAST_COST
        lost *= max(self.seconds(shape) / self.seconds(self._current), 1.0)
        since = self._rounds - max(self._visited.values(), default=0)
        return shape if since * VISIT_SHARE >= lost else self._current

    def _visit(self, shape: Shape) -> None:
        self._visiting, self._wanted, self._patience = shape, VISIT, LONGEST_VISIT
        self._visited[shape] = self._rounds
        paths = self._paths.get(shape, {})
        share = min(OLD_ROUNDS / sum(paths.values()), 1.0) if paths else 1.0
        for count in paths:
            paths[count] *= share

    def _measured(self, shape: Shape) -> bool:
        return self._time.measured(_nodes(shape))


def menu_for(widest: int, most_nodes: int) -> tuple[Shape, ...]:
    """The menu for a draft that proposes from so many tokens, and a target that takes so many nodes."""
    narrowed = (shape and replace(shape, top_k=min(shape.top_k, widest)) for shape in MENU)
    return tuple(shape for shape in narrowed if _nodes(shape) <= most_nodes)


def _nodes(shape: Shape) -> int:
    return 1 if shape is None else shape.nodes
