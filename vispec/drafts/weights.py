"""The products of a draft's rounds: with its weights as they are, or rounded to int8."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vispec import ops

# How a draft's weights may be kept for its rounds; None: as they are.
FORMATS = (None, "int8")


class Product(nn.Module):
    """A linear layer [..., C] to [..., N] whose weight is shared, or rounded to int8 a row of it at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None, form: str | None) -> None:
        super().__init__()
        self.bias = bias
        self.weight, self.scales = (weight, None) if form is None else ops.int8_weight(weight)

    def forward(self, rows: Tensor) -> Tensor:
        if self.scales is None:
            return F.linear(rows, self.weight, self.bias)
        flat = rows.reshape(-1, rows.shape[-1])
        output = flat.new_empty(len(flat), len(self.weight))
        ops.int8_linear(flat, self.weight, self.scales, output=output, bias=self.bias)
        return output.view(*rows.shape[:-1], -1)


def check_format(form: str | None) -> None:
    """Raises ValueError for a format that there is not."""
    if form not in FORMATS:
        raise ValueError(f"draft: weights must be one of {', '.join(map(repr, FORMATS))}, got {form!r}")


def rounded(layer: nn.Module, form: str | None) -> nn.Module:
    """The same layer with its linear layers as `Product`s; itself where nothing is rounded. Shares all else."""
    if form is None:
        return layer
    copy = object.__new__(type(layer))
    copy.__dict__ = {**vars(layer), "_modules": {}}
    for name, module in layer.named_children():
        plain = type(module) is nn.Linear
        bias = None if not plain or module.bias is None else module.bias.detach()
        copy._modules[name] = Product(module.weight.detach(), bias, form) if plain else rounded(module, form)
    return copy
