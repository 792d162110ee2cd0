"""What the engine needs of a draft. A draft never changes an answer, only how many tokens a round brings."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

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


class DraftSession(Protocol):
    """The state of one draft during one generation of B rows."""

    def propose(self, root_tokens: Tensor) -> DraftTree:
        """Proposes a tree for each row behind its root [B] int64, the last token that was emitted."""

    def commit(self, features: Tensor, tokens: Tensor, counts: Tensor, host_counts: list[int] | None) -> None:
        """Learns what a round committed.

        Shapes: `features` [B, M, C], the target's, of the committed nodes, root first; `tokens` [B, M] int64, the
        token that follows each of them; `counts` [B] int64, how many of the M hold (0: the row is finished);
        `host_counts` the same on the host, or None in a session that was fixed.
        """


@runtime_checkable
class FixedSession(DraftSession, Protocol):
    """A session that can do without the host: its rounds then run in a CUDA graph."""

    def fix(self, tokens: int) -> None:
        """From now on nothing is read from the device or moved in memory, until `tokens` committed tokens are
        exceeded or `fix` is called again."""


class Draft(Protocol):
    """A draft model."""

    def check(self, target: Target) -> None:
        """Raises ValueError where this draft was not made for that target."""

    def start(self, target: Target, prompt: Prompt, first_tokens: Tensor, tree: TreeConfig) -> DraftSession:
        """Reads a prefilled prompt and the first sampled token [B] of every row."""
