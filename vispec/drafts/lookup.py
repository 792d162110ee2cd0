"""Prompt lookup, for comparison: what followed the last few tokens when they occurred before.

Source: A. Saxena, "Prompt Lookup Decoding" (2023); here the latest occurrence counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vispec.drafts.base import Plan
from vispec.prompt import Prompt
from vispec.targets import Target
from vispec.tree import DraftTree, chain_words

LONGEST_MATCH = 3


class PromptLookupDraft:
    """A draft without weights. `longest_match`: tokens that are looked for first, then one fewer, and so on."""

    def __init__(self, longest_match: int = LONGEST_MATCH) -> None:
        if longest_match < 1:
            raise ValueError(f"prompt lookup: longest_match must be at least 1, got {longest_match}")
        self.longest_match = longest_match

    def check(self, target: Target) -> None:
        """Any target will do."""

    def widest(self, target: Target) -> int:
        """See `Draft.widest`; a chain is narrower than any tree."""
        return target.vocabulary

    def start(self, target: Target, prompt: Prompt, first_tokens: Tensor) -> PromptLookupSession:
        """Reads a prefilled prompt; see `Draft.start`. Notes: the host reads the prompt's tokens."""
        return PromptLookupSession(self, target, prompt, first_tokens)


class PromptLookupSession:
    """See `vispec.drafts.base.DraftSession`. Proposes a chain, or the root alone where nothing occurred before."""

    def __init__(self, draft: PromptLookupDraft, target: Target, prompt: Prompt, first_tokens: Tensor) -> None:
        self.draft = draft
        self.placeholders = frozenset(target.placeholder_tokens)
        rows = zip(prompt.tokens.tolist(), prompt.lengths.tolist(), first_tokens.tolist(), strict=True)
        self._histories = [[*tokens[:length], first] for tokens, length, first in rows]

    def propose(self, root_tokens: Tensor, plan: Plan) -> DraftTree:
        """A chain behind each root; see `DraftSession.propose`."""
        longest = plan.tree.longest_path - 1
        found = [self._continuation(history, longest) for history in self._histories]
        nodes = 1 + max(map(len, found))
        # Rows that found less are filled up; the target refuses what does not fit.
        chains = [[history[-1], *chain] for history, chain in zip(self._histories, found, strict=True)]
        tokens = torch.tensor([chain + chain[-1:] * (nodes - len(chain)) for chain in chains])
        batch, device, depths = len(found), root_tokens.device, torch.arange(nodes)
        return DraftTree(
            tokens=tokens.to(device),
            parents=(depths - 1).expand(batch, -1).contiguous().to(device),
            depths=depths.expand(batch, -1).contiguous().to(device),
            ancestors=chain_words(batch, nodes, device),
            scores=torch.zeros(batch, nodes, device=device),
            longest_path=nodes,
        )

    def commit(self, features: Tensor, tokens: Tensor, counts: Tensor, host_counts: list[int]) -> None:
        """Writes down what was committed; see `DraftSession.commit`."""
        for history, row, count in zip(self._histories, tokens.tolist(), host_counts, strict=True):
            history.extend(row[:count])

    def _continuation(self, history: list[int], longest: int) -> list[int]:
        """What followed the latest earlier occurrence of the longest ending that occurred before."""
        for size in range(min(self.draft.longest_match, len(history) - 1), 0, -1):
            ending = history[-size:]
            for start in range(len(history) - size - 1, -1, -1):
                if history[start : start + size] == ending:
                    chain = history[start + size : start + size + longest]
                    stops = [place for place, token in enumerate(chain) if token in self.placeholders]
                    return chain[: stops[0]] if stops else chain
        return []
