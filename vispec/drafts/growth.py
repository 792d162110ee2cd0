"""Growing a tree level by level, whatever a draft's logits come from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vispec import ops
from vispec.drafts.base import Plan
from vispec.drafts.head import DraftHead
from vispec.tree import DraftTree


class Frontier(NamedTuple):
    """The nodes of one level that are expanded next, [B, K] each, and what a pass over them reads beside their tokens.

    Level l's node k lies in slot l * K + k of the draft's tail. See `ops.grow_level`.

    Attributes:
        rows: which node of the frontier before each one is a child of; None of the roots.
        ancestors: [B, K, W] the slots that each node sees; None before the first level, and where nobody asked.
        hidden: [B, K, C] the output of the pass that each node was proposed by; None where nobody asked.
    """

    candidates: Tensor
    tokens: Tensor
    scores: Tensor
    rows: Tensor | None = None
    ancestors: Tensor | None = None
    hidden: Tensor | None = None


class TreeGrower:
    """The candidates of one tree a row while it grows behind its root [B], as large as the plan lets it."""

    def __init__(self, plan: Plan, head: DraftHead, root_tokens: Tensor) -> None:
        batch, device = len(root_tokens), root_tokens.device
        self.plan = plan
        self.head = head
        self.levels = 0
        self._roots = root_tokens
        self._grown = 0
        self._tokens = torch.empty(batch, plan.tree.candidates, dtype=torch.int64, device=device)
        self._parents = torch.empty_like(self._tokens)
        self._scores = torch.empty_like(self._tokens, dtype=torch.float32)
        # Cleared once a tree, and by every level after itself: the levels of a tree come one after another.
        self._arrivals = torch.zeros(batch, dtype=torch.int32, device=device)

    def root(self) -> Frontier:
        """The frontier of the roots alone."""
        shape, device = (len(self._roots), 1), self._roots.device
        return Frontier(
            candidates=torch.full(shape, -1, dtype=torch.int64, device=device),
            tokens=self._roots[:, None],
            scores=torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def grow(self, logits: Tensor, frontier: Frontier, hidden: Tensor | None = None) -> Frontier:
        """Scores the children of a frontier by logits [B, R, Vd]; picks the next frontier.

        With `hidden` [B, R, C], the output of the pass over the frontier, the next one comes with what another such
        pass reads; not on the tree's last level, behind which there is none.
        """
        batch, top_k, tree = len(logits), self.plan.tree.top_k, self.plan.tree
        slots = self.levels * top_k

        def integers(*shape: int) -> Tensor:
            return torch.empty(batch, top_k, *shape, dtype=torch.int64, device=logits.device)

        last = hidden is None or self.levels == tree.depth
        following = Frontier(
            candidates=integers(),
            tokens=integers(),
            scores=torch.empty(batch, top_k, dtype=torch.float32, device=logits.device),
            rows=integers(),
            ancestors=None if last else integers((slots + top_k + 63) // 64),
            hidden=None if last else hidden.new_empty(batch, top_k, hidden.shape[2]),
        )
        ops.grow_level(
            logits,
            frontier.scores,
            frontier.candidates,
            candidate_tokens=self._tokens,
            candidate_scores=self._scores,
            candidate_parents=self._parents,
            offset=self._grown,
            next_frontier=following.candidates,
            next_rows=following.rows,
            next_tokens=following.tokens,
            next_scores=following.scores,
            arrivals=self._arrivals,
            head_tokens=self.head.tokens,
            slots=slots,
            ancestors=frontier.ancestors,
            next_ancestors=following.ancestors,
            hidden=hidden,
            next_hidden=following.hidden,
        )
        self.levels += 1
        self._grown += logits.shape[1] * top_k
        return following

    def deeper(self, frontier: Frontier) -> bool:
        """Whether the plan wants a level behind this frontier."""
        return self.levels <= self.plan.tree.depth and self.plan.deeper(frontier.scores, self._scores[:, : self._grown])

    def build(self) -> DraftTree:
        """The best of all candidates as a tree behind each root."""
        tokens, parents, scores = (
            values[:, : self._grown].contiguous() for values in (self._tokens, self._parents, self._scores)
        )
        nodes = self.plan.nodes(scores)
        tree = DraftTree.empty(len(tokens), nodes, min(self.levels + 1, nodes), tokens.device)
        ops.build_tree(
            self._roots,
            tokens,
            scores,
            parents,
            tokens=tree.tokens,
            parents=tree.parents,
            depths=tree.depths,
            ancestors=tree.ancestors,
            scores=tree.scores,
        )
        return tree
