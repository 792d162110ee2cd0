"""What the engine needs of a draft. A draft never changes an answer, only how many tokens a round brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vispec.cache import KeyValueCache
from vispec.prompt import Prompt
from vispec.targets import Target
from vispec.tree import DraftTree, TreeConfig


def check_sizes(config: Any, target: Target) -> None:
    """Raises ValueError where a draft's hidden size or vocabulary is not this target's."""
    for name, wanted in (("hidden_size", target.hidden_size), ("vocab_size", target.vocabulary)):
        own = getattr(config, name)
        if own != wanted:
            raise ValueError(
                f"draft: made for another target: {name} must be {wanted} ({type(target.model).__name__}), got {own}"
            )


@dataclass
class Plan:
    """What one round asks of a draft: here a tree of the full size. A subclass may cut it short while it grows.

    Attributes:
        tree: the sizes that are not exceeded.
    """

    tree: TreeConfig

    def deeper(self, frontier: Tensor, candidates: Tensor) -> bool:
        """Whether to add one more level behind this frontier; asked before each level while `tree.depth` allows one.

        Shapes: cumulative log-probabilities, [B, K] of the frontier and [B, N] of all candidates so far.
        """
        return True

    def nodes(self, candidates: Tensor) -> int:
        """How many nodes, the root among them, to keep of candidates with these scores [B, N]; at most N + 1."""
        return min(self.tree.total_tokens, candidates.shape[1] + 1)


class DraftSession(Protocol):
    """The state of one draft during one generation of B rows."""

    def propose(self, root_tokens: Tensor, plan: Plan) -> DraftTree:
        """Proposes a tree for each row behind its root [B] int64, the last token that was emitted.

        A draft that cannot stop half-way may leave `plan`'s methods unasked and keep to `plan.tree`.
        """

    def commit(self, features: Tensor, tokens: Tensor, counts: Tensor, host_counts: list[int] | None) -> None:
        """Learns what was committed since the last call, by one round or several.

        Shapes: `features` [B, M, C], the target's, of the committed nodes, root first; `tokens` [B, M] int64, the
        token that follows each of them; `counts` [B] int64, how many of the M hold (0: the row is finished);
        `host_counts` the same on the host, or None in a session that was fixed.
        """


class Places(Protocol):
    """Memory that outlives a generation, for what differs from one to the next. The engine's own names hold a dot."""

    def tensor(self, name: str, value: Tensor) -> Tensor:
        """A tensor with this content, at the place of that name; `value` itself is given up to it."""

    def cache(self, name: str, value: KeyValueCache) -> KeyValueCache:
        """A cache with this content, at the place of that name; `value` itself is given up to it."""


@runtime_checkable
class FixedSession(DraftSession, Protocol):
    """A session that can do without the host: its rounds then run in a CUDA graph, which outlives the session."""

    def settle(self, places: Places) -> None:
        """Goes on with tensors at `places` in the stead of all its own that change or that the prompt decided."""

    def fix(self, tokens: int, tree: TreeConfig) -> None:
        """From now on no tree exceeds these sizes, and nothing is read from the device or moved in memory.

        It holds until `tokens` committed tokens are exceeded or `fix` is called again.
        """


class Draft(Protocol):
    """A draft model."""

    def check(self, target: Target) -> None:
        """Raises ValueError where this draft was not made for that target."""

    def widest(self, target: Target) -> int:
        """Most children that a node can have: the size of the vocabulary that is proposed from."""

    def start(self, target: Target, prompt: Prompt, first_tokens: Tensor) -> DraftSession:
        """Reads a prefilled prompt and the first sampled token [B] of every row."""
