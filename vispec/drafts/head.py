"""The target's output layer over the tokens that a draft may propose."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DraftHead:
    """A view of the target's head, or a copy of the rows that a reduced vocabulary needs.

    Dimension letters: Vd tokens of the draft's vocabulary, C hidden units.

    Attributes:
        weight: [Vd, C].
        bias: [Vd], or None.
        tokens: [Vd] int64, the token id of each column; None: the whole vocabulary.
    """

    def __init__(self, head: nn.Module, tokens: Tensor) -> None:
        self.tokens = tokens if tokens.numel() else None
        picked = slice(None) if self.tokens is None else self.tokens
        bias = getattr(head, "bias", None)
        self.weight = head.weight.detach()[picked]
        self.bias = None if bias is None else bias.detach()[picked]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., Vd] of features [..., C]."""
        return F.linear(hidden, self.weight, self.bias)
