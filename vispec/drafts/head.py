"""The target's output layer over the tokens that a draft may propose."""

from __future__ import annotations

from torch import Tensor, nn

from vispec.drafts.weights import Product


class DraftHead:
    """A view of the target's head, or a copy of the rows that a reduced vocabulary needs.

    Dimension letters: Vd tokens of the draft's vocabulary, C hidden units.

    Args:
        tokens: [Vd] int64, the token id of each column; empty: the whole vocabulary.
        form: of the weights, see `weights.FORMATS`; int8 is a copy too.

    Attributes:
        tokens: [Vd] int64, or None for the whole vocabulary.
    """

    def __init__(self, head: nn.Module, tokens: Tensor, form: str | None = None) -> None:
        self.tokens = tokens if tokens.numel() else None
        picked = slice(None) if self.tokens is None else self.tokens
        bias = getattr(head, "bias", None)
        self._product = Product(head.weight.detach()[picked], None if bias is None else bias.detach()[picked], form)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., Vd] of features [..., C]."""
        return self._product(hidden)
