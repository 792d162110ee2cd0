"""Both stages' losses against formulas that loop over positions and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vispec.drafts.head import DraftHead
from vispec.train.losses import PARTS, STAGES, list_mle, summed_loss

N, C, V = 37, 16, 53


def case(vocabulary: int = V, dtype: torch.dtype = torch.float64, bias: bool = False):
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(N, C, generator=generator, dtype=dtype)
    wanted = torch.randn(N, C, generator=generator, dtype=dtype) * 1.5
    head = torch.nn.Linear(C, vocabulary, bias=bias, dtype=dtype)
    head.weight.data = torch.randn(vocabulary, C, generator=generator, dtype=dtype)
    return predicted, wanted, head


def plain_parts(stage: int, predicted, wanted, head) -> list:
    """One position at a time, with nothing but sums, exponentials and logarithms."""
    weight, totals = head.weight.detach(), [0.0, 0.0, 0.0, 0.0]
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
        if stage == 1:
            spread = -(q * p.log()).sum()
            loss = feature + 0.1 * (spread + 0.1 * ranking)
        else:
            spread = (p - q).abs().sum()
            loss = 10 * spread + 0.1 * ranking
        totals = [sum(pair) for pair in zip(totals, (loss, feature, spread, ranking), strict=True)]
    return totals


@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("vocabulary", (V, 7))
def test_parts_and_gradients_equal_the_plain_formulas(stage, vocabulary):
    predicted, wanted, head = case(vocabulary)
    ours, plain = predicted.clone().requires_grad_(), predicted.clone().requires_grad_()
    expected = plain_parts(stage, plain, wanted, head)
    expected[0].backward()
    loss, actual = summed_loss(stage, ours[None], wanted, head, chunk=8)
    assert not actual.requires_grad and torch.equal(loss.detach(), actual[0])
    # A factor behind the loss must reach its gradient.
    (loss / 4).backward()
    for name, value, wanted_value in zip(PARTS, actual, expected, strict=True):
        assert float(value) == pytest.approx(float(torch.as_tensor(wanted_value).detach()), rel=1e-4), name
    torch.testing.assert_close(4 * ours.grad, plain.grad, rtol=1e-3, atol=1e-4)
    assert head.weight.grad is None


@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("chunk", (1, 5, N, 1000))
def test_chunks_change_nothing_and_passes_add_up(stage, chunk):
    predicted, wanted, head = case(bias=True)
    passes = torch.stack([predicted, predicted.flip(0)])
    whole, pieces = passes.clone().requires_grad_(), passes.clone().requires_grad_()
    expected = sum(STAGES[stage](one, wanted, head(one), head(wanted)) for one in whole)
    expected[0].backward()
    loss, actual = summed_loss(stage, pieces, wanted, head, chunk)
    loss.backward()
    torch.testing.assert_close(actual.double(), expected.detach().double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=1e-4, atol=1e-5)


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
    loss, parts = summed_loss(stage, picked[None], wanted, DraftHead(head, tokens), chunk=8)
    expected, expected_parts = summed_loss(stage, whole[None], wanted, alone, chunk=8)
    (loss + expected).backward()
    assert torch.equal(parts, expected_parts) and torch.equal(picked.grad, whole.grad)
    assert not torch.allclose(parts, summed_loss(stage, predicted[None], wanted, head)[1])
    everything = summed_loss(stage, predicted[None], wanted, DraftHead(head, torch.empty(0, dtype=torch.int64)))
    assert torch.equal(everything[1], summed_loss(stage, predicted[None], wanted, head)[1])


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
            summed_loss(stage, predicted[None], wanted, head, chunk)[0].backward()
        # The head itself, C x V, is seen through views.
        assert largest.elements == made
    assert predicted.grad.isfinite().all() and predicted.grad.any()


def test_the_best_ranking_has_the_least_list_mle():
    target = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    same, turned = list_mle(20 * target, target), list_mle(-20 * target, target)
    assert float(same) < 1e-6 < 10 < float(turned)
    equal = list_mle(torch.zeros(1, 5), target)
    assert float(equal) == pytest.approx(math.log(math.factorial(5)))


def test_a_perfect_draft_has_no_distance():
    _, wanted, head = case()
    assert float(summed_loss(2, wanted[None], wanted, head)[1][2]) == pytest.approx(0, abs=1e-6)
    assert float(summed_loss(1, wanted[None], wanted, head)[1][1]) == 0


def test_bad_arguments():
    predicted, wanted, head = case()
    with pytest.raises(ValueError, match="stage must be one of"):
        summed_loss(3, predicted[None], wanted, head)
    for wrong in (predicted, predicted[None, :-1]):
        with pytest.raises(ValueError, match=r"must be \[P, N, C\] and \[N, C\]"):
            summed_loss(1, wrong, wanted, head)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        summed_loss(1, predicted[None], wanted, head, 0)
