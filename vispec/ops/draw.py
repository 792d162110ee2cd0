"""One draw, keyed by seed and absolute position: the PyTorch form of csrc/sampling.h."""

from __future__ import annotations

import torch
from torch import Tensor

# First counter word of verification's draws; noise for another purpose must use another one.
ACCEPT_STREAM = 0x56695370
WEIGHT_BITS = 44
MAX_VOCABULARY = (1 << 19) - 1
WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random 32-bit words for a counter of four words and a key of two.

    Shapes: int64 tensors that broadcast, each holding a 32-bit word; returns four of them.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap into the sign bit; the masks take the words out unchanged.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & WORD) ^ c1 ^ k0,
            p1 & WORD,
            ((p0 >> 32) & WORD) ^ c3 ^ k1,
            p0 & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def draw_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """The uniform number in [0, 1) of a position: 48 bits, float64.

    Key: the seed's low and high word. Counter: (ACCEPT_STREAM, 0, position low, position high).
    Number: the first word above the upper half of the second, times 2^-48.

    Shapes: int64 tensors that broadcast.
    """
    zero = torch.zeros_like(positions)
    counter = (zero + ACCEPT_STREAM, zero, positions & WORD, (positions >> 32) & WORD)
    words = philox4x32(counter, (seeds & WORD, (seeds >> 32) & WORD))
    return ((words[0] << 16) | (words[1] >> 16)).double() * 2.0**-48


def token_weights(distances: Tensor) -> Tensor:
    """round(exp(distance) * 2^44) as int64, for float32 distances of at most 0 from the best score.

    Single IEEE operations in a fixed order, so that every backend gets the same integer. The
    relative error is below 2e-7, like that of a float32 softmax.
    """
    x = distances.clamp(min=-40.0)
    n = torch.round(x * 1.44269504088896341)
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        p = p * r + coefficient
    p = (p * (r * r) + r) + 1.0
    # Powers of two from a table: exact, which a library's pow need not be.
    powers = torch.tensor([2.0**e for e in range(WEIGHT_BITS - 58, WEIGHT_BITS + 1)], dtype=torch.float64)
    scaled = p.double() * powers.to(x.device)[n.long() + 58]
    return torch.round(scaled).long()


def keep_weights(scores: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero the weights that top-k, top-p and min-p remove, in that order, with transformers' tie
    rules.

    top-k keeps every token tied with the k-th. top-p removes tokens in ascending order (score, then
    index) while their sum is at most (1 - top_p) of what top-k left, and never the last. min-p
    removes tokens below
    min_p times the best one. transformers sums in float32, this sums exactly: a token whose
    cumulative mass lies within about 1e-6 of the threshold may fall on the other side there.

    Shapes: scores float32 and weights int64 [..., V]; the rest broadcast to [..., 1].
    """
    V = scores.shape[-1]
    ascending, order = torch.sort(scores, dim=-1, stable=True)
    k = torch.where(top_k > 0, top_k.clamp(max=V), V).expand(*scores.shape[:-1], 1)
    weights = weights.masked_fill(scores < ascending.gather(-1, V - k), 0)

    cumulative = weights.gather(-1, order).cumsum(dim=-1)
    limit = torch.floor((1.0 - top_p.double()) * cumulative[..., -1:].double()).long()
    removed = cumulative <= limit
    removed[..., -1] = False
    weights = weights.masked_fill(removed.gather(-1, order.argsort(dim=-1)), 0)
    return weights.masked_fill(weights.double() < min_p.double() * 2.0**WEIGHT_BITS, 0)


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """The lowest index whose cumulative weight exceeds uniform times the sum.

    An index of weight 0 never qualifies, and some index always does: floor(uniform * sum) < sum.

    Shapes: weights int64 [..., V], uniform float64 [..., 1]; returns int64 [...].
    """
    cumulative = weights.cumsum(dim=-1)
    target = torch.floor(uniform * cumulative[..., -1:].double()).long()
    return (cumulative <= target).sum(dim=-1)
