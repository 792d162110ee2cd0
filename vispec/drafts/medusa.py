"""Medusa's heads, for comparison: each guesses a token further ahead from the target's last feature alone.

Here the heads are Medusa's residual blocks in front of the target's own output layer, which stays frozen; Medusa trains
a copy of that layer for every head.
Source: Medusa (arXiv 2401.10774). Dimension letters: B rows, C hidden units, K heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vispec.drafts.base import Places, Plan, check_sizes
from vispec.drafts.files import write_draft
from vispec.drafts.growth import TreeGrower
from vispec.drafts.head import DraftHead
from vispec.prompt import Prompt
from vispec.targets import Target, load_target
from vispec.tree import DraftTree, TreeConfig


@dataclass(frozen=True)
class MedusaDraftConfig:
    """Sizes of a Medusa draft; a tree can be as deep as there are heads."""

    hidden_size: int
    vocab_size: int
    num_heads: int = 4


class MedusaDraft(nn.Module):
    """K residual blocks on the target's feature; make one with `for_target` or `vispec.load_draft`."""

    def __init__(self, config: MedusaDraftConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(
            [nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_heads)]
        )
        # Token ids that may be proposed, [Vd]; empty: the whole vocabulary.
        self.register_buffer("head_tokens", torch.empty(0, dtype=torch.int64))
        for block in self.blocks:
            # As the target itself, to begin with.
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)

    @classmethod
    def for_target(cls, model: object, num_heads: int = 4) -> MedusaDraft:
        """Fresh weights of the right sizes for a Hugging Face model (or a `Target`), in its dtype, on its device."""
        target = load_target(model)
        draft = cls(MedusaDraftConfig(target.hidden_size, target.vocabulary, num_heads))
        return draft.to(device=target.device, dtype=target.dtype).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        write_draft(self, folder, {})

    def check(self, target: Target) -> None:
        """Raises ValueError where the sizes are not this target's."""
        check_sizes(self.config, target)

    def forward(self, features: Tensor, head: int) -> Tensor:
        """What head `head` makes of features [..., C]: the feature so many tokens further on, [..., C]."""
        return features + F.silu(self.blocks[head](features))

    def widest(self, target: Target) -> int:
        """Columns of the head; see `Draft.widest`."""
        return self.head_tokens.numel() or target.vocabulary

    def start(self, target: Target, prompt: Prompt, first_tokens: Tensor) -> MedusaSession:
        """Reads a prefilled prompt; see `Draft.start`."""
        return MedusaSession(self, target, prompt)


class MedusaSession:
    """See `vispec.drafts.base.DraftSession`. All nodes of a level share one distribution."""

    def __init__(self, draft: MedusaDraft, target: Target, prompt: Prompt) -> None:
        self.draft = draft
        self.head = DraftHead(target.head, draft.head_tokens)
        batch, device = len(prompt.lengths), prompt.lengths.device
        # The target's feature of the token before the root, [B, C].
        self._last = prompt.features[torch.arange(batch, device=device), prompt.lengths - 1]

    def propose(self, root_tokens: Tensor, plan: Plan) -> DraftTree:
        """Grows the tree level by level, as deep as there are heads; see `DraftSession.propose`."""
        grower = TreeGrower(plan, self.head, root_tokens)
        frontier = grower.root()
        for head in range(self.draft.config.num_heads):
            if head and not grower.deeper(frontier):
                break
            logits = self.head(self.draft(self._last, head))[:, None]
            frontier = grower.grow(logits.expand(-1, frontier.tokens.shape[1], -1), frontier)
        return grower.build()

    def settle(self, places: Places) -> None:
        """See `FixedSession.settle`."""
        self._last = places.tensor("last", self._last)

    def fix(self, tokens: int, tree: TreeConfig) -> None:
        """See `FixedSession.fix`: nothing moves, and nothing is read back."""

    def commit(self, features: Tensor, tokens: Tensor, counts: Tensor, host_counts: list[int] | None) -> None:
        """Keeps the feature of the last committed node; see `DraftSession.commit`."""
        rows = torch.arange(len(counts), device=counts.device)
        last = features[rows, (counts - 1).clamp(min=0)]
        self._last.copy_(torch.where((counts > 0)[:, None], last, self._last))
