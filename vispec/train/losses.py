"""The losses of both training stages, over chunks of positions.

Dimension letters: P passes, N supervised positions, C hidden units, V tokens of the draft's vocabulary.
Source: EAGLE (arXiv 2401.15077) for the text stage, ViSpec (arXiv 2509.15235) for the vision stage; ListMLE is
Xia et al., "Listwise approach to learning to rank" (ICML 2008).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vispec.drafts.head import DraftHead

RANKED_TOKENS = 10
PARTS = ("loss", "feature", "cross_entropy", "distance", "ranking")


@dataclass(frozen=True)
class LossWeights:
    """How much each part counts; a part that weighs nothing is not computed, but for the features' distance.

    Attributes:
        feature: SmoothL1 of the features, mean over units.
        cross_entropy: with the target's distribution.
        distance: sum over the vocabulary of |p_draft - p_target|, from 0 to 2.
        ranking: ListMLE over the target's top 10.
    """

    feature: float
    cross_entropy: float
    distance: float
    ranking: float


STAGES = {
    1: LossWeights(feature=1.0, cross_entropy=0.1, distance=0.0, ranking=0.01),
    2: LossWeights(feature=0.0, cross_entropy=0.0, distance=10.0, ranking=0.1),
}


def list_mle(scores: Tensor) -> Tensor:
    """Negative log-likelihood, under the draft, of the order in which the target ranks its own top tokens.

    Plackett-Luce over those tokens alone: the sum over i of log(sum over j >= i of exp(s_j)) - s_i.
    Shapes: `scores` [N, K], the draft's logits of the K tokens, the target's best first; returns [N].
    """
    remaining = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (remaining - scores).sum(-1)


class _Known:
    """What the target says of a chunk of positions, computed once for all passes."""

    def __init__(self, logits: Tensor, ranked: bool) -> None:
        self.ranked = logits.topk(min(RANKED_TOKENS, logits.shape[-1]), dim=-1).indices if ranked else None
        self.probabilities = logits.softmax(-1)


def _vocabulary_parts(logits: Tensor, known: _Known, weights: LossWeights) -> tuple[list[Tensor], Tensor]:
    """Cross-entropy, distance and ranking of each position, [n] each, and the gradient of their weighted sum.

    By hand, because autograd would keep several [n, V] tensors and pass over them again. `logits` is overwritten.
    """
    zero = logits.new_zeros(len(logits))
    entropy, distance, ranking, scattered = zero, zero, zero, None
    if weights.ranking:
        with torch.enable_grad():
            scores = logits.gather(-1, known.ranked).requires_grad_()
            ranking = list_mle(scores)
            (scattered,) = torch.autograd.grad(ranking.sum(), scores)
        ranking = ranking.detach()
    target = known.probabilities
    if weights.cross_entropy:
        entropy = logits.logsumexp(-1) - (target * logits).sum(-1)
    own = torch.softmax(logits, -1)
    gradient = torch.sub(own, target, out=logits)
    if weights.distance:
        signs = gradient.sign()
        distance = gradient.abs().sum(-1)
        # The derivative of softmax: q (s - sum of q s).
        slope = own * (signs - (own * signs).sum(-1, keepdim=True))
        gradient = gradient.mul_(weights.cross_entropy).add_(slope, alpha=weights.distance)
    else:
        gradient = gradient.mul_(weights.cross_entropy)
    if scattered is not None:
        gradient.scatter_add_(-1, known.ranked, weights.ranking * scattered)
    return [entropy, distance, ranking], gradient


class _ChunkedLoss(torch.autograd.Function):
    """Takes each chunk's gradient as soon as its loss is known, so that its logits can be forgotten at once."""

    @staticmethod
    def forward(
        ctx: Any,
        predicted: Tensor,
        wanted: Tensor,
        counted: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        weights: LossWeights,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(PARTS), dtype=torch.float64, device=predicted.device)
        gradient = torch.empty_like(predicted)
        factors = predicted.new_tensor(astuple(weights), dtype=torch.float64)
        for start in range(0, wanted.shape[0], chunk):
            place = slice(start, start + chunk)
            targets = wanted[place].float()
            known = _Known(F.linear(wanted[place].to(weight.dtype), weight, bias).float(), bool(weights.ranking))
            for number, rows in enumerate(predicted[:, place]):
                logits = F.linear(rows.to(weight.dtype), weight, bias).float()
                spoken, slope = _vocabulary_parts(logits, known, weights)
                distance = rows.float() - targets
                feature = F.smooth_l1_loss(rows.float(), targets, reduction="none").mean(-1)
                own = torch.stack([feature, *spoken], 1)
                slope = (slope.to(weight.dtype) @ weight).float()
                slope += distance.clamp_(-1, 1).mul_(weights.feature / distance.shape[-1])
                if counted is not None:
                    left_out = ~counted[number, place, None]
                    own, slope = own.masked_fill_(left_out, 0), slope.masked_fill_(left_out, 0)
                gradient[number, place] = slope.to(gradient.dtype)
                sums = own.double().sum(0)
                total += torch.cat([(factors * sums).sum()[None], sums])
        ctx.save_for_backward(gradient)
        total = total.float()
        ctx.mark_non_differentiable(total)
        return total[0].clone(), total

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), *[None] * 6


def summed_loss(
    weights: LossWeights,
    predicted: Tensor,
    wanted: Tensor,
    head: torch.nn.Module | DraftHead,
    *,
    counted: Tensor | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """A stage's loss, summed over P passes and N positions, with its gradient; and the sums of its parts.

    Logits exist for `chunk` positions at a time and are computed once: the gradient of a chunk is taken when its
    loss is, so memory grows with chunk x V and not with N x V. Nothing flows into the head or the target's features.
    Divide by N for the mean over positions.

    With a reduced vocabulary the target's distribution is the one it would have over those tokens alone: a draft
    cannot put probability elsewhere, and what counts is how it shares out the rest. A position whose own next token
    lies outside still teaches that.

    Shapes: `predicted` [P, N, C] and `wanted` [N, C], any float dtype; `head` the target's linear output layer, or
    the part of it that the draft may propose from; `counted` [P, N] bool, the positions of each pass that count
    (None: all).
    Returns: the loss, a scalar, and its parts [5] in the order of `PARTS`, without a gradient; float32.
    Raises: ValueError for other shapes, or a chunk below 1.
    """
    if predicted.ndim != 3 or predicted.shape[1:] != wanted.shape:
        raise ValueError(
            "summed_loss: predicted and wanted must be [P, N, C] and [N, C], "
            f"got {tuple(predicted.shape)} and {tuple(wanted.shape)}"
        )
    if counted is not None and counted.shape != predicted.shape[:2]:
        raise ValueError(f"summed_loss: counted must be {tuple(predicted.shape[:2])}, got {tuple(counted.shape)}")
    if chunk < 1:
        raise ValueError(f"summed_loss: chunk must be at least 1, got {chunk}")
    bias = getattr(head, "bias", None)
    bias = None if bias is None else bias.detach()
    with torch.autocast(predicted.device.type, enabled=False):
        return _ChunkedLoss.apply(predicted, wanted.detach(), counted, head.weight.detach(), bias, weights, chunk)
