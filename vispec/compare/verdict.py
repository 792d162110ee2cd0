"""When two greedy answers differ: is it the rounding of a tie, or a fault?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# How many steps of the logits' dtype the two best must be apart for their order to be certain.
# In bf16 and fp16 sums run in fp32 and are rounded once, to a step; two steps are more than one
# rounding can turn. In fp32 the sums themselves round, in another order for another number of rows:
# between passes of one token and one pass of a hundred, the gap of the two best logits moved by a
# median of 3 and at most 27 steps (300 tokens of SmolLM2-135M on a CPU; the smallest gap among them
# was 5150 steps). Twice the most, rounded up to a power of two, is 64 steps: 7.6e-6 of a logit.
TIE_STEPS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 64, torch.float64: 64}


@dataclass(frozen=True)
class Difference:
    """The first token in which a row differs from plain generation.

    Attributes:
        row: the row of the batch.
        token: index among the new tokens.
        plain, vispec: the two token ids; None where that run had ended already.
        gap: how far apart plain decoding's two best logits are there; None where one run had ended.
        limit: a tie is below this gap.
        tie: whether the gap is below the limit and vispec's token is one of the two.
    """

    row: int
    token: int
    plain: int | None
    vispec: int | None
    gap: float | None
    limit: float | None
    tie: bool


def find_difference(
    plain: list[list[int]],
    vispec: list[list[int]],
    scores_at: Callable[[int, int], Tensor],
    dtype: torch.dtype,
) -> Difference | None:
    """The first difference that is no tie, else the first tie, else None.

    Args:
        plain, vispec: each row's new tokens, up to and with the one that ended it.
        scores_at: plain decoding's logits [V] at a row and token; asked only where rows differ.
        dtype: of the logits as the model computed them.
    """
    tie = None
    for row, (one, other) in enumerate(zip(plain, vispec, strict=True)):
        if one == other:
            continue
        shorter = min(len(one), len(other))
        token = next((index for index in range(shorter) if one[index] != other[index]), shorter)
        found = _judge(
            row,
            token,
            one[token] if token < len(one) else None,
            other[token] if token < len(other) else None,
            scores_at,
            dtype,
        )
        if not found.tie:
            return found
        tie = tie or found
    return tie


def step_at(value: float, dtype: torch.dtype) -> float:
    """The distance between numbers of a dtype around a value.

    At x in a dtype with a relative precision of eps it is 2**floor(log2|x|) * eps, where eps is
    2**-7 in bf16, 2**-10 in fp16 and 2**-23 in fp32.
    """
    smallest = torch.finfo(dtype).smallest_normal
    return 2.0 ** math.floor(math.log2(max(abs(value), smallest))) * torch.finfo(dtype).eps


def tie_limit(best: float, dtype: torch.dtype) -> float:
    """The gap below which the order of the two best logits is left to rounding: `TIE_STEPS` steps."""
    return TIE_STEPS[dtype] * step_at(best, dtype)


def _judge(
    row: int,
    token: int,
    plain: int | None,
    vispec: int | None,
    scores_at: Callable[[int, int], Tensor],
    dtype: torch.dtype,
) -> Difference:
    # One run ended and the other went on though all tokens before were equal: no tie does that.
    if plain is None or vispec is None:
        return Difference(row, token, plain, vispec, None, None, False)
    values, indices = scores_at(row, token).double().topk(2)
    best, second = values.tolist()
    limit = tie_limit(max(best, second, key=abs), dtype)
    gap = best - second
    chosen = indices.tolist()
    # Plain decoding chose one of the two as well, or its second run did not repeat its first.
    tie = gap < limit and vispec in chosen and plain in chosen
    return Difference(row, token, plain, vispec, gap, limit, tie)
