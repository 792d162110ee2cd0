"""The target as its own draft, for comparison: what it accepts of itself bounds what any draft can reach.

It drafts from the very distributions that the tokens are drawn from and pays a pass of the target for each level, so
it makes nothing faster. Greedy, whole paths are accepted; sampled, tau says how far a tree of that size can go.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vispec.drafts.base import Plan
from vispec.drafts.growth import TreeGrower
from vispec.drafts.head import DraftHead
from vispec.prompt import Prompt
from vispec.targets import Target
from vispec.tree import DraftTree


class OracleDraft:
    """A draft without weights."""

    def check(self, target: Target) -> None:
        """Any target will do."""

    def widest(self, target: Target) -> int:
        """See `Draft.widest`."""
        return target.vocabulary

    def start(self, target: Target, prompt: Prompt, first_tokens: Tensor) -> OracleSession:
        """Keeps the prompt's cache, which the engine goes on filling; see `Draft.start`."""
        return OracleSession(target, prompt)


class OracleSession:
    """See `vispec.drafts.base.DraftSession`. Verifies the tree as far as it has grown to learn its next level."""

    def __init__(self, target: Target, prompt: Prompt) -> None:
        self.target = target
        self._head = DraftHead(target.head, torch.empty(0, dtype=torch.int64))
        # The target's own: every pass over a tree writes behind the committed slots, where the next one writes again.
        self._cache = prompt.cache
        self._positions = prompt.next_positions.clone()

    def propose(self, root_tokens: Tensor, plan: Plan) -> DraftTree:
        """Grows a tree behind each root; see `DraftSession.propose`."""
        grower = TreeGrower(plan, self._head, root_tokens)
        frontier, grown = grower.root(), DraftTree.root_only(root_tokens)
        while True:
            logits, _ = self.target.verify(grown, self._positions, self._cache)
            frontier = grower.grow(logits[:, -frontier.tokens.shape[1] :], frontier)
            if not grower.deeper(frontier):
                return grower.build()
            grown = _with_level(grown, frontier.tokens, frontier.rows)

    def commit(self, features: Tensor, tokens: Tensor, counts: Tensor, host_counts: list[int] | None) -> None:
        """Moves on; see `DraftSession.commit`."""
        self._positions += counts


def _with_level(tree: DraftTree, tokens: Tensor, rows: Tensor) -> DraftTree:
    """A tree with one more level: `tokens` [B, K] behind the nodes `rows` [B, K] of its last level."""
    batch, added = tokens.shape
    first = int((tree.depths[0] < tree.depths[0, -1]).sum())
    parents = first + rows
    nodes = tree.size + torch.arange(added, device=tokens.device)
    words = (tree.size + added + 63) // 64
    ancestors = F.pad(tree.ancestors, (0, words - tree.ancestors.shape[2]))
    own = torch.zeros(added, words, dtype=torch.int64, device=tokens.device)
    own.scatter_(1, nodes[:, None] // 64, 1 << (nodes[:, None] % 64))
    following = ancestors.gather(1, parents[..., None].expand(-1, -1, words)) | own
    depth = tree.longest_path
    return DraftTree(
        tokens=torch.cat([tree.tokens, tokens], dim=1),
        parents=torch.cat([tree.parents, parents], dim=1),
        depths=torch.cat([tree.depths, torch.full_like(tokens, depth)], dim=1),
        ancestors=torch.cat([ancestors, following], dim=1),
        scores=torch.cat([tree.scores, torch.zeros(batch, added, device=tokens.device)], dim=1),
        longest_path=depth + 1,
    )
