"""A draft that does a ViSpec draft's work and then proposes the true continuation, right for a chosen length."""

from __future__ import annotations

import torch
from torch import Tensor

from vispec.drafts import ViSpecDraft
from vispec.drafts.base import Plan
from vispec.prompt import Prompt
from vispec.targets import Target
from vispec.tree import DraftTree, TreeConfig


class PacedDraft:
    """Makes rounds accept `tau` drafted tokens on average, whatever the target says, at a real draft's cost.

    Its first nodes follow `answers` for as many tokens as the round is to accept and are wrong from there; the other
    nodes hang on the root. What it proposes replaces the tree that the real draft has grown, on the device.

    Args:
        real: the draft whose passes are run.
        answers: [B, A] int64, what the target emits behind each prompt, token for token.
        tau: drafted tokens to accept a round; its whole part in some rounds and one more in the others.
        tree: the sizes of every tree.
    """

    def __init__(self, real: ViSpecDraft, answers: Tensor, tau: float, tree: TreeConfig) -> None:
        self.tree = tree
        self.real = real
        self.answers = answers
        self.tau = tau

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
        chain = tree.longest_path
        node = torch.arange(tree.nodes, device=device)
        on_chain = node < chain
        # Nodes of the chain descend from one another, the others from the root.
        self.depths = torch.where(on_chain, node, 1)
        self.parents = torch.where(on_chain, node - 1, 0)
        self.node = node
        words = torch.zeros(tree.nodes, (tree.nodes + 63) // 64, dtype=torch.int64)
        for index in range(tree.nodes):
            for ancestor in range(index + 1) if index < chain else (0, index):
                bit = 1 << ancestor % 64
                words[index, ancestor // 64] |= bit - (1 << 64) if bit >> 63 else bit
        self.ancestors = words.to(device)

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
        answers, tau = self.draft.answers, self.draft.tau
        right = ((self.rounds + 1) * tau).floor() - (self.rounds * tau).floor()
        self.rounds += 1
        places = (self.emitted[:, None] - 1 + self.depths).clamp(max=answers.shape[1] - 1)
        truth = answers.gather(1, places)
        # Siblings of the true child must not be it, nor equal each other.
        wrong = (truth + self.node) % self.vocabulary
        on_path = (self.node == self.depths) & (self.depths <= right)
        tree.tokens.copy_(torch.where(on_path, truth, wrong))
        tree.tokens[:, 0] = root_tokens
        tree.parents.copy_(self.parents)
        tree.depths.copy_(self.depths)
        tree.ancestors.copy_(self.ancestors)
        tree.scores.zero_()
        return tree
