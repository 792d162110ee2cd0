"""The losses of both training stages, over chunks of positions.

Dimension letters: N supervised positions, C hidden units, V vocabulary.
Source: EAGLE (arXiv 2401.15077) for the text stage, ViSpec (arXiv 2509.15235) for the vision stage; ListMLE is
Xia et al., "Listwise approach to learning to rank" (ICML 2008).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vispec.drafts.head import DraftHead

RANKED_TOKENS = 10
# Stage 1: SmoothL1 + 0.1 * (cross-entropy + 0.1 * ListMLE).
TEXT_DISTRIBUTION_WEIGHT = 0.1
TEXT_RANKING_WEIGHT = 0.1
# Stage 2: 10 * L1 of probabilities + 0.1 * ListMLE.
VISION_DISTRIBUTION_WEIGHT = 10.0
VISION_RANKING_WEIGHT = 0.1
PARTS = ("loss", "feature", "distribution", "ranking")


def soft_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Cross-entropy of each position with the target's distribution: [N, V] twice to [N]."""
    return -(target_logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def probability_distance(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Sum over the vocabulary of |p_draft - p_target|, from 0 to 2: [N, V] twice to [N]."""
    return (logits.softmax(-1) - target_logits.softmax(-1)).abs().sum(-1)


def list_mle(logits: Tensor, target_logits: Tensor, top: int = RANKED_TOKENS) -> Tensor:
    """Negative log-likelihood, under the draft, of the order in which the target ranks its own top tokens.

    Plackett-Luce over those tokens alone: the sum over i of log(sum over j >= i of exp(s_j)) - s_i, where s are
    the draft's logits in the target's order. Shapes: [N, V] twice to [N]. A smaller vocabulary is ranked whole.
    """
    ranked = target_logits.topk(min(top, logits.shape[-1]), dim=-1).indices
    scores = logits.gather(-1, ranked)
    remaining = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (remaining - scores).sum(-1)


def text_parts(predicted: Tensor, wanted: Tensor, logits: Tensor, target_logits: Tensor) -> Tensor:
    """Sums over N positions of stage 1's loss and its parts, [4] in the order of `PARTS`."""
    feature = F.smooth_l1_loss(predicted, wanted, reduction="none").mean(-1).sum()
    entropy = soft_cross_entropy(logits, target_logits).sum()
    ranking = list_mle(logits, target_logits).sum()
    loss = feature + TEXT_DISTRIBUTION_WEIGHT * (entropy + TEXT_RANKING_WEIGHT * ranking)
    return torch.stack([loss, feature, entropy, ranking])


def vision_parts(predicted: Tensor, wanted: Tensor, logits: Tensor, target_logits: Tensor) -> Tensor:
    """Sums over N positions of stage 2's loss and its parts, [4] in the order of `PARTS`.

    The feature's own distance is only reported: it is no part of this loss.
    """
    with torch.no_grad():
        feature = F.smooth_l1_loss(predicted, wanted, reduction="none").mean(-1).sum()
    distance = probability_distance(logits, target_logits).sum()
    ranking = list_mle(logits, target_logits).sum()
    loss = VISION_DISTRIBUTION_WEIGHT * distance + VISION_RANKING_WEIGHT * ranking
    return torch.stack([loss, feature, distance, ranking])


STAGES: dict[int, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {1: text_parts, 2: vision_parts}


class _ChunkedLoss(torch.autograd.Function):
    """Takes each chunk's gradient as soon as its loss is known, so that its logits can be forgotten at once."""

    @staticmethod
    def forward(
        ctx: Any, predicted: Tensor, wanted: Tensor, weight: Tensor, bias: Tensor | None, stage: int, chunk: int
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(PARTS), dtype=torch.float64, device=predicted.device)
        gradient = torch.empty_like(predicted)
        for start in range(0, wanted.shape[0], chunk):
            place = slice(start, start + chunk)
            targets = wanted[place]
            target_logits = F.linear(targets.to(weight.dtype), weight, bias).float()
            for number, rows in enumerate(predicted[:, place]):
                with torch.enable_grad():
                    rows = rows.detach().requires_grad_()
                    logits = F.linear(rows.to(weight.dtype), weight, bias).float()
                    parts = STAGES[stage](rows.float(), targets.float(), logits, target_logits)
                    (gradient[number, place],) = torch.autograd.grad(parts[0], rows)
                total += parts.detach()
        ctx.save_for_backward(gradient)
        total = total.float()
        ctx.mark_non_differentiable(total)
        return total[0].clone(), total

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None, None, None


def summed_loss(
    stage: int, predicted: Tensor, wanted: Tensor, head: torch.nn.Module | DraftHead, chunk: int = 128
) -> tuple[Tensor, Tensor]:
    """A stage's loss, summed over P passes and N positions, with its gradient; and the sums of its parts.

    Logits exist for `chunk` positions at a time and are computed once: the gradient of a chunk is taken when its
    loss is, so memory grows with chunk x V and not with N x V. Nothing flows into the head or the target's features.
    Divide by N for the mean over positions.

    With a reduced vocabulary the target's distribution is the one it would have over those tokens alone: a draft
    cannot put probability elsewhere, and what counts is how it shares out the rest. A position whose own next token
    lies outside still teaches that.

    Shapes: `predicted` [P, N, C] and `wanted` [N, C], any float dtype; `head` the target's linear output layer, or
    the part of it that the draft may propose from.
    Returns: the loss, a scalar, and its parts [4] in the order of `PARTS`, without a gradient; float32.
    Raises: ValueError for an unknown stage, other shapes, or a chunk below 1.
    """
    if stage not in STAGES:
        raise ValueError(f"summed_loss: stage must be one of {sorted(STAGES)}, got {stage}")
    if predicted.ndim != 3 or predicted.shape[1:] != wanted.shape:
        raise ValueError(
            "summed_loss: predicted and wanted must be [P, N, C] and [N, C], "
            f"got {tuple(predicted.shape)} and {tuple(wanted.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"summed_loss: chunk must be at least 1, got {chunk}")
    bias = getattr(head, "bias", None)
    bias = None if bias is None else bias.detach()
    with torch.autocast(predicted.device.type, enabled=False):
        return _ChunkedLoss.apply(predicted, wanted.detach(), head.weight.detach(), bias, stage, chunk)
