"""Growing a tree level by level, whatever a draft's logits come from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vispec import ops
from vispec.drafts.head import DraftHead
from vispec.tree import DraftTree, TreeConfig


class Frontier(NamedTuple):
    """The nodes of one level that are expanded next, [B, K] each: see `ops.grow_level`."""

    candidates: Tensor
    rows: Tensor
    tokens: Tensor
    scores: Tensor


class TreeGrower:
    """The candidates of one row's tree after another, kept for a whole generation of B rows."""

    def __init__(self, tree: TreeConfig, head: DraftHead, batch: int, device: torch.device) -> None:
        self.tree = tree
        self.head = head
        self._tokens = torch.empty(batch, tree.candidates, dtype=torch.int64, device=device)
        self._parents = torch.empty_like(self._tokens)
        self._scores = torch.empty(batch, tree.candidates, dtype=torch.float32, device=device)

    def root(self, root_tokens: Tensor) -> Frontier:
        """The frontier of the roots [B] alone."""
        shape, device = (len(root_tokens), 1), root_tokens.device
        return Frontier(
            candidates=torch.full(shape, -1, dtype=torch.int64, device=device),
            rows=torch.zeros(shape, dtype=torch.int64, device=device),
            tokens=root_tokens[:, None],
            scores=torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def grow(self, logits: Tensor, frontier: Frontier, level: int) -> Frontier:
        """Scores the children of level `level` (0: the root's) by logits [B, R, Vd]; picks the next frontier."""
        batch, device, top_k = len(logits), logits.device, self.tree.top_k
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
            offset=top_k + (level - 1) * top_k * top_k if level else 0,
            next_frontier=following.candidates,
            next_rows=following.rows,
            next_tokens=following.tokens,
            next_scores=following.scores,
            head_tokens=self.head.tokens,
        )
        return following

    def build(self, root_tokens: Tensor) -> DraftTree:
        """The best candidates of all levels as a tree behind each root [B]."""
        tree = DraftTree.empty(len(root_tokens), self.tree.nodes, self.tree.longest_path, root_tokens.device)
        ops.build_tree(
            root_tokens,
            self._tokens,
            self._scores,
            self._parents,
            tokens=tree.tokens,
            parents=tree.parents,
            depths=tree.depths,
            ancestors=tree.ancestors,
            scores=tree.scores,
        )
        return tree
