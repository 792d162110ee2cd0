"""A draft that does a ViSpec draft's work and then proposes the true continuation, right for a chosen length."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from benchmarks.ops.tree_attention import ancestor_words
from vispec.drafts import ViSpecDraft
from vispec.drafts.base import Places, Plan
from vispec.prompt import Prompt
from vispec.targets import Target
from vispec.tree import DraftTree, TreeConfig


class PacedDraft:
    """Makes rounds accept `tau` drafted tokens on average, whatever the target says, at a real draft's cost.

    One path of its tree follows `answers` for as many tokens as the round is to accept and is wrong from there; the
    other nodes hang on the root. The path's nodes lie apart from one another, as those of a real tree do, so that a
    commit has something to move. What it proposes replaces the tree that the real draft has grown, on the device.

    Args:
        real: the draft whose passes are run.
        answers: [B, A] int64, what the target emits behind each prompt, token for token.
        tau: drafted tokens to accept a round; its whole part in some rounds and one more in the others.
        tree: the sizes of every tree.

    Attributes:
        pacing: entered around the work that no real draft does, for who wants to time it.
    """

    def __init__(self, real: ViSpecDraft, answers: Tensor, tau: float, tree: TreeConfig) -> None:
        self.tree = tree
        self.real = real
        self.answers = answers
        self.tau = tau
        self.pacing: Callable[[], AbstractContextManager] = nullcontext

    def check(self, target: Target) -> None:
        """See `Draft.check`."""
        self.real.check(target)

    def widest(self, target: Target) -> int:
        """See `Draft.widest`."""
        return self.real.widest(target)

    def start(self, target: Target, prompt: Prompt, first_tokens: Tensor) -> PacedSession:
        """See `Draft.start`."""
        return PacedSession(self, self.real.start(target, prompt, first_tokens), self.tree, target.vocabulary)


class PacedSession:
    """Counts rounds and emitted tokens on the device; see `FixedSession`."""

    def __init__(self, draft: PacedDraft, real: object, tree: TreeConfig, vocabulary: int) -> None:
        self.draft = draft
        self.real = real
        self.vocabulary = vocabulary
        device = draft.answers.device
        self.emitted = torch.ones_like(draft.answers[:, 0])
        self.rounds = torch.zeros((), dtype=torch.int64, device=device)
        # One behind the root a level, as far apart as they can be; the others are the root's children.
        step = max(1, (tree.nodes - 1) // max(1, tree.longest_path - 1))
        node = torch.arange(tree.nodes)
        on_path = (node % step == 0) & (node < tree.longest_path * step)
        depths = torch.where(on_path, node // step, 1)
        parents = torch.where(on_path, node - step, 0).clamp(min=-1)
        self.node, self.on_path = node.to(device), on_path.to(device)
        self.depths, self.parents = depths.to(device), parents.to(device)
        self.ancestors = ancestor_words(parents)[1].to(device)

    def settle(self, places: Places) -> None:
        """See `FixedSession.settle`."""
        self.real.settle(places)
        self.emitted = places.tensor("emitted", self.emitted)
        self.rounds = places.tensor("rounds", self.rounds)
        # Constants, but made anew for each generation.
        for name in ("depths", "parents", "node", "on_path", "ancestors"):
            setattr(self, name, places.tensor(name, getattr(self, name)))

    def fix(self, tokens: int, tree: TreeConfig) -> None:
        """See `FixedSession.fix`."""
        self.real.fix(tokens, tree)

    def commit(self, features: Tensor, tokens: Tensor, counts: Tensor, host_counts: list[int] | None) -> None:
        """See `DraftSession.commit`."""
        self.real.commit(features, tokens, counts, host_counts)
        self.emitted += counts

    def propose(self, root_tokens: Tensor, plan: Plan) -> DraftTree:
        """See `DraftSession.propose`."""
        tree = self.real.propose(root_tokens, plan)
        with self.draft.pacing():
            self._replace(tree, root_tokens)
        return tree

    def _replace(self, tree: DraftTree, root_tokens: Tensor) -> None:
        answers, tau = self.draft.answers, self.draft.tau
        right = ((self.rounds + 1) * tau).floor() - (self.rounds * tau).floor()
        self.rounds += 1
        places = (self.emitted[:, None] - 1 + self.depths).clamp(max=answers.shape[1] - 1)
        truth = answers.gather(1, places)
        # Siblings of the true child must not be it, nor equal each other.
        wrong = (truth + self.node) % self.vocabulary
        tree.tokens.copy_(torch.where(self.on_path & (self.depths <= right), truth, wrong))
        tree.tokens[:, 0] = root_tokens
        tree.parents.copy_(self.parents)
        tree.depths.copy_(self.depths)
        tree.ancestors.copy_(self.ancestors)
        tree.scores.zero_()
