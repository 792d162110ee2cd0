"""Both stages' losses against formulas that loop over positions and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vispec.drafts.head import DraftHead
from vispec.train.losses import PARTS, STAGES, LossWeights, list_mle, summed_loss

N, C, V = 37, 16, 53


def case(vocabulary: int = V, dtype: torch.dtype = torch.float64, bias: bool = False):
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(N, C, generator=generator, dtype=dtype)
    wanted = torch.randn(N, C, generator=generator, dtype=dtype) * 1.5
    head = torch.nn.Linear(C, vocabulary, bias=bias, dtype=dtype)
    head.weight.data = torch.randn(vocabulary, C, generator=generator, dtype=dtype)
    return predicted, wanted, head


ALL = LossWeights(feature=0.7, cross_entropy=0.4, distance=3.0, ranking=0.2)
WEIGHTS = {"stage 1": STAGES[1], "stage 2": STAGES[2], "all": ALL, "ranking": LossWeights(0, 0, 0, 1.0)}


def plain_rows(predicted, wanted, head) -> list[list]:
    """Each position's feature, cross-entropy, distance and ranking with nothing but sums, exponentials, logarithms."""
    weight, found = head.weight.detach(), []
    for row, truth in zip(predicted, wanted, strict=True):
        logits, targets = weight @ row, weight @ truth
        p, q = logits.exp() / logits.exp().sum(), targets.exp() / targets.exp().sum()
        difference = (row - truth).abs()
        feature = sum((d * d / 2 if d < 1 else d - 0.5) for d in difference) / C
        order = sorted(range(len(q)), key=lambda token: -float(q[token]))[:10]
        ranking = 0.0
        for place, token in enumerate(order):
            rest = sum(logits[other].exp() for other in order[place:])
            ranking = ranking - (logits[token].exp() / rest).log()
        found.append([feature, -(q * p.log()).sum(), (p - q).abs().sum(), ranking])
    return found


def plain_parts(weights, rows: list[list]) -> list:
    """The loss and the sums of its parts; a part without weight is 0, the features' distance excepted."""
    factors = [weights.feature, weights.cross_entropy, weights.distance, weights.ranking]
    sums = [sum(column) for column in zip(*rows, strict=True)]
    loss = sum(factor * value for factor, value in zip(factors, sums, strict=True))
    shown = [sums[0], *(value if factor else 0.0 for factor, value in zip(factors[1:], sums[1:], strict=True))]
    return [loss, *shown]


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("vocabulary", (V, 7))
def test_parts_and_gradients_equal_the_plain_formulas(weights, vocabulary):
    predicted, wanted, head = case(vocabulary)
    ours, plain = predicted.clone().requires_grad_(), predicted.clone().requires_grad_()
    expected = plain_parts(weights, plain_rows(plain, wanted, head))
    expected[0].backward()
    loss, actual = summed_loss(weights, ours[None], wanted, head, chunk=8)
    assert not actual.requires_grad and torch.equal(loss.detach(), actual[0])
    # A factor behind the loss must reach its gradient.
    (loss / 4).backward()
    for name, value, wanted_value in zip(PARTS, actual, expected, strict=True):
        assert float(value) == pytest.approx(float(torch.as_tensor(wanted_value).detach()), rel=1e-4), name
    torch.testing.assert_close(4 * ours.grad, plain.grad, rtol=1e-3, atol=1e-4)
    assert head.weight.grad is None


@pytest.mark.parametrize("chunk", (1, 5, N, 1000))
def test_chunks_change_nothing_and_passes_add_up(chunk):
    """Two passes of which different positions count, against each position alone."""
    predicted, wanted, head = case()
    passes = torch.stack([predicted, predicted.flip(0)])
    counted = torch.rand(2, N, generator=torch.Generator().manual_seed(1)) < 0.6
    for mask in (None, counted):
        plain, pieces = passes.clone().requires_grad_(), passes.clone().requires_grad_()
        kept = torch.ones_like(counted) if mask is None else mask
        rows = [row for one, keep in zip(plain, kept, strict=True) for row in plain_rows(one[keep], wanted[keep], head)]
        expected = plain_parts(ALL, rows)
        expected[0].backward()
        loss, actual = summed_loss(ALL, pieces, wanted, head, counted=mask, chunk=chunk)
        loss.backward()
        torch.testing.assert_close(actual.double(), torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pieces.grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_a_heads_bias_counts():
    predicted, wanted, head = case(bias=True)
    bare = torch.nn.Linear(C, V, bias=False, dtype=predicted.dtype)
    # The bias as one more unit that is always one.
    bare.weight.data = head.weight.data
    wide = torch.nn.Linear(C + 1, V, bias=False, dtype=predicted.dtype)
    wide.weight.data = torch.cat([head.weight.data, head.bias.data[:, None]], 1)
    one = predicted.new_ones(N, 1)
    weights = LossWeights(0, 1.0, 1.0, 1.0)
    actual = summed_loss(weights, predicted[None], wanted, head)[1][2:]
    expected = summed_loss(weights, torch.cat([predicted, one], 1)[None], torch.cat([wanted, one], 1), wide)[1][2:]
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, summed_loss(weights, predicted[None], wanted, bare)[1][2:])


@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("bias", (False, True))
def test_a_reduced_vocabulary_is_a_vocabulary_of_its_own(stage, bias):
    """The target's distribution is the one over the picked tokens alone, and it sums to one there."""
    predicted, wanted, head = case(bias=bias)
    tokens = torch.tensor([1, 4, 5, 9, 17, 20, 21, 30, 31, 40, 52])
    alone = torch.nn.Linear(C, len(tokens), bias=bias, dtype=predicted.dtype)
    alone.weight.data = torch.stack([head.weight.data[token] for token in tokens])
    if bias:
        alone.bias.data = torch.stack([head.bias.data[token] for token in tokens])
    picked, whole = predicted.clone().requires_grad_(), predicted.clone().requires_grad_()
    loss, parts = summed_loss(STAGES[stage], picked[None], wanted, DraftHead(head, tokens), chunk=8)
    expected, expected_parts = summed_loss(STAGES[stage], whole[None], wanted, alone, chunk=8)
    (loss + expected).backward()
    assert torch.equal(parts, expected_parts) and torch.equal(picked.grad, whole.grad)
    assert not torch.allclose(parts, summed_loss(STAGES[stage], predicted[None], wanted, head)[1])
    everything = summed_loss(STAGES[stage], predicted[None], wanted, DraftHead(head, torch.empty(0, dtype=torch.int64)))
    assert torch.equal(everything[1], summed_loss(STAGES[stage], predicted[None], wanted, head)[1])


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


@pytest.mark.parametrize("stage", (1, 2))
def test_nothing_of_the_size_positions_times_vocabulary_is_ever_made(stage):
    predicted, wanted, head = case(40 * V, torch.float32)
    predicted.requires_grad_()
    for chunk, made in ((2, max(2 * 40 * V, C * 40 * V)), (N, N * 40 * V)):
        with Largest() as largest:
            summed_loss(STAGES[stage], predicted[None], wanted, head, chunk=chunk)[0].backward()
        # The head itself, C x V, is seen through views.
        assert largest.elements == made
    assert predicted.grad.isfinite().all() and predicted.grad.any()


def test_the_best_ranking_has_the_least_list_mle():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    assert float(list_mle(20 * scores)) < 1e-6 < 10 < float(list_mle(-20 * scores))
    assert float(list_mle(torch.zeros(1, 5))) == pytest.approx(math.log(math.factorial(5)))


def test_a_perfect_draft_has_no_distance():
    _, wanted, head = case()
    found = summed_loss(ALL, wanted[None], wanted, head)[1]
    assert float(found[1]) == 0 and float(found[3]) == pytest.approx(0, abs=1e-6)


def test_logits_beyond_exp():
    """Weights that give logits of some thousands: all finite, and the parts are their limits."""
    predicted, wanted, head = case()
    head.weight.data *= 1e3
    predicted.requires_grad_()
    loss, parts = summed_loss(ALL, predicted[None], wanted, head)
    loss.backward()
    assert parts.isfinite().all() and predicted.grad.isfinite().all()
    assert float(parts[3]) <= 2 * N


def test_bad_arguments():
    predicted, wanted, head = case()
    for wrong in (predicted, predicted[None, :-1]):
        with pytest.raises(ValueError, match=r"must be \[P, N, C\] and \[N, C\]"):
            summed_loss(ALL, wrong, wanted, head)
    with pytest.raises(ValueError, match=r"counted must be \(1, 37\), got \(37,\)"):
        summed_loss(ALL, predicted[None], wanted, head, counted=torch.ones(N, dtype=torch.bool))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        summed_loss(ALL, predicted[None], wanted, head, chunk=0)
