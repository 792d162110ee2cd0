"""The target's output layer over the tokens that a draft may propose."""

from __future__ import annotations

from torch import Tensor, nn

from vispec.drafts.weights import Product


class DraftHead(Product):
    """A view of the target's head, or a copy of the rows that a reduced vocabulary needs: logits [..., Vd] of [..., C].

    Dimension letters: Vd tokens of the draft's vocabulary, C hidden units.

    Args:
        tokens: [Vd] int64, the token id of each column; empty: the whole vocabulary.
        form: of the weights, see `weights.FORMATS`; int8 is a copy too.

    Attributes:
        tokens: [Vd] int64, or None for the whole vocabulary.
    """

    def __init__(self, head: nn.Module, tokens: Tensor, form: str | None = None) -> None:
        picked = tokens if tokens.numel() else slice(None)
        bias = getattr(head, "bias", None)
        super().__init__(head.weight.detach()[picked], None if bias is None else bias.detach()[picked], form)
        self.tokens = tokens if tokens.numel() else None
