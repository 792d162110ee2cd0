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
    """The nodes of one level that are expanded next, [B, K] each: see `ops.grow_level`."""

    candidates: Tensor
    rows: Tensor
    tokens: Tensor
    scores: Tensor


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

    def root(self) -> Frontier:
        """The frontier of the roots alone."""
        shape, device = (len(self._roots), 1), self._roots.device
        return Frontier(
            candidates=torch.full(shape, -1, dtype=torch.int64, device=device),
            rows=torch.zeros(shape, dtype=torch.int64, device=device),
            tokens=self._roots[:, None],
            scores=torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def grow(self, logits: Tensor, frontier: Frontier) -> Frontier:
        """Scores the children of a frontier by logits [B, R, Vd]; picks the next frontier."""
        batch, device, top_k = len(logits), logits.device, self.plan.tree.top_k
        following = Frontier(
            *(torch.empty(batch, top_k, dtype=torch.int64, device=device) for _ in range(3)),
            scores=torch.empty(batch, top_k, dtype=torch.float32, device=device),
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
            head_tokens=self.head.tokens,
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
