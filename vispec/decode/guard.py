"""`exact="guard"`: near-ties are not decided by a pass over many tokens."""

from __future__ import annotations

import torch
from torch import Tensor

# Steps of the dtype that the two best logits must be apart for a pass over many tokens to decide between them. Sums of
# 16-bit formats run in float32 and are rounded after every layer; in float32 the sums themselves round.
GUARD_STEPS = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 128, torch.float64: 128}


def near_ties(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Which nodes' two best logits are less than `GUARD_STEPS` steps of the dtype apart, [B, T] bool.

    Shapes: logits [B, T, V]. `dtype` is the model's own, since processors widen logits. A step at x is the distance
    between numbers of the dtype around x. Does not synchronise.
    """
    best = logits.topk(min(2, logits.shape[-1]), dim=-1).values.float()
    exponent = torch.frexp(best.abs().amax(-1)).exponent - 1
    limit = GUARD_STEPS[dtype] * torch.ldexp(torch.full_like(best[..., 0], torch.finfo(dtype).eps), exponent)
    return best[..., 0] - best[..., -1] < limit


def cut(path: Tensor, emitted: Tensor, counts: Tensor, near: Tensor) -> Tensor:
    """Ends each row's walk before the first node in `near` [B, T], in place; see `ops.accept` for the tensors.

    Returns: [B] bool, the rows that were cut. Does not synchronise.
    """
    places = torch.arange(path.shape[1], device=path.device)
    doubtful = near.gather(1, path.clamp(min=0)) & (places < counts[:, None])
    found = doubtful.any(1)
    counts.copy_(torch.where(found, doubtful.int().argmax(1), counts))
    beyond = places >= counts[:, None]
    path.masked_fill_(beyond, -1)
    emitted.masked_fill_(beyond, -1)
    return found
