"""Selection with a total order: higher value first, then lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest values along the last dimension, ties by lower index.

    torch.topk leaves the order of ties open. Here each float32 becomes an integer with the same
    order, with the complement of its index below it; all keys differ, and topk of them has one
    answer. NaN counts as -inf.

    Shapes: values float32 [..., n]; returns int64 [..., count].
    """
    values = torch.nan_to_num(values, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    bits = values.contiguous().view(torch.int32).long()
    ordered = torch.where(bits < 0, ~(bits & 0x7FFFFFFF), bits)
    n = values.shape[-1]
    index = torch.arange(n, device=values.device)
    return n - 1 - (((ordered << 31) | (n - 1 - index)).topk(count, dim=-1).values & 0x7FFFFFFF)
